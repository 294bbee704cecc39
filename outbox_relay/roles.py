"""``roles.sql``: the roles with the least privileges, over the table as it is called in the database."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import resources

import asyncpg

from outbox_relay.errors import SchemaError
from outbox_relay.source.statements import OUTBOX, OutboxTable, quoted, topic_columns

ROLES = ("outbox_writer", "outbox_relay", "outbox_pruner", "outbox_operator")

_GRANT = re.compile(r"^GRANT (.+) ON (.+) TO (\w+);$", re.MULTILINE)
_PRIVILEGE = re.compile(r"([A-Z]+)(?: \((.+?)\))?")

_USAGE = """
GRANT USAGE ON SCHEMA {schema} TO {role};"""


def read_sql() -> str:
    """The file, with its comments."""
    return resources.files("outbox_relay").joinpath("roles.sql").read_text("utf-8")


def roles_sql(table: OutboxTable = OUTBOX, schema: str = "") -> str:
    """The same for a table and columns that are called otherwise, in a schema that is named."""
    if table == OUTBOX and not schema:
        return read_sql()

    def grant(match: re.Match[str]) -> str:
        privileges, tables, role = match.groups()
        names = [_qualified(table.name if name == OUTBOX.name else name, schema) for name in tables.split(", ")]
        if tables == OUTBOX.name:
            privileges = ", ".join(_granted(privileges, table))
        return f"GRANT {privileges} ON {', '.join(names)} TO {role};"

    sql = _GRANT.sub(grant, read_sql())
    if table != OUTBOX:
        sql += (
            "\n-- An application that fills in other columns of this table, too, needs INSERT on them."
            " Where it writes already, it does.\n"
        )
    if schema:
        sql += "".join(_USAGE.format(schema=quoted(schema), role=role) for role in ROLES) + "\n"
    return sql


def granted(table: OutboxTable, *roles: str) -> dict[str, dict[str, list[str]]]:
    """What these roles get: by table and privilege the columns; none: the whole table."""
    found: dict[str, dict[str, list[str]]] = {}
    for privileges, tables, role in _GRANT.findall(read_sql()):
        if role not in roles:
            continue
        for name in tables.split(", "):
            is_outbox = name == OUTBOX.name
            of = found.setdefault(table.name if is_outbox else name, {})
            for privilege, columns in _PRIVILEGE.findall(privileges):
                named = [column for column in columns.split(", ") if column]
                of[privilege] = _columns(table, named) if is_outbox else named
    return found


async def apply(connection: asyncpg.Connection, sql: str) -> None:
    """Make the roles that aren't there, and give all of them their rights; all of it or nothing.

    Raises SchemaError where the connection's own role may not.
    """
    try:
        async with connection.transaction():
            await connection.execute(sql)
    except asyncpg.InsufficientPrivilegeError as error:
        raise SchemaError(
            f"{error.args[0]}: log in as the owner of the tables, who may make roles (CREATEROLE):"
            " --database-url postgresql://…"
        ) from error


def _granted(privileges: str, table: OutboxTable) -> Iterator[str]:
    for privilege, columns in _PRIVILEGE.findall(privileges):
        names = ", ".join(map(quoted, _columns(table, columns.split(", ") if columns else [])))
        yield f"{privilege} ({names})" if columns else privilege


def _columns(table: OutboxTable, names: Sequence[str]) -> list[str]:
    """What those of ``outbox`` are called in the table, if it has them; each once."""
    found: list[str] = []
    for name in names:
        found += topic_columns(table.topic) if name == "topic" else [getattr(table, name)]
    return [column for column in dict.fromkeys(found) if column]


def _qualified(name: str, schema: str) -> str:
    return f"{quoted(schema)}.{quoted(name)}" if schema else quoted(name)
