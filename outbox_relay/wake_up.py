"""``wake_up.sql``: the trigger by which writers wake an idle relay, over the table as it is called in the database."""

from __future__ import annotations

from importlib import resources

import asyncpg

from outbox_relay.errors import SchemaError
from outbox_relay.source.statements import OUTBOX, OutboxTable, literal, quoted

_TABLE = " ON outbox"
_FUNCTION = "EXECUTE FUNCTION outbox_wake"
_RELAYS = "'outbox_relay'::regclass"


def read_sql() -> str:
    """The file, with its comments."""
    return resources.files("outbox_relay").joinpath("wake_up.sql").read_text("utf-8")


def wake_up_sql(table: OutboxTable = OUTBOX, schema: str = "") -> str:
    """The same for a table that is called otherwise, in a schema that is named."""
    sql = read_sql()
    if table.name == OUTBOX.name and not schema:
        return sql
    in_schema = f"{quoted(schema)}." if schema else ""
    sql = sql.replace(_TABLE, f" ON {in_schema}{quoted(table.name)}")
    sql = sql.replace(_FUNCTION, f"EXECUTE FUNCTION {in_schema}outbox_wake")
    return sql.replace(_RELAYS, f"{literal(f'{in_schema}outbox_relay')}::regclass")


async def apply(connection: asyncpg.Connection, sql: str) -> None:
    """Make the trigger, or make it anew. Raises SchemaError where the connection's own role may not."""
    try:
        async with connection.transaction():
            await connection.execute(sql)
    except asyncpg.InsufficientPrivilegeError as error:
        raise SchemaError(
            f"{error.args[0]}: log in as the owner of the tables: --database-url postgresql://…"
        ) from error
