"""``inbox.sql`` on a real PostgreSQL: how it is applied, and what it leaves alone."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from outbox_relay.errors import SchemaError
from outbox_relay.inbox import schema
from tests.acceptance.commands import outbox_relay
from tests.conftest import Database
from tests.waiting import eventually

TABLES = ["inbox", "inbox_offset", "inbox_state"]


async def tables_of(connection: asyncpg.Connection, namespace: str = "public") -> list[str]:
    rows = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = $1::regnamespace AND relkind = 'r' ORDER BY relname",
        namespace,
    )
    return [row["relname"] for row in rows]


async def test_the_command_makes_the_inbox_alone_and_then_leaves_it_alone(database: Database) -> None:
    connection = await database.connect()
    said = [await outbox_relay(database, "schema", "apply", "--inbox") for _ in range(2)]
    assert said == ["created the inbox, version 1\n", "the inbox is at version 1 already\n"]
    assert await tables_of(connection) == TABLES


async def test_the_inbox_may_lie_beside_an_outbox(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    before = await tables_of(connection)
    await outbox_relay(outbox_database, "schema", "apply", "--inbox")
    assert await tables_of(connection) == sorted(before + TABLES)


async def test_the_first_line_names_the_version() -> None:
    assert schema.read_sql().startswith(f"-- outbox-relay inbox, version {schema.INBOX_VERSION}: ")


async def test_apply_creates_in_the_first_schema_of_the_search_path(database: Database) -> None:
    connection = await database.connect()
    await connection.execute("CREATE SCHEMA payments; SET search_path = payments, public")
    assert await schema.apply(connection)
    assert not await schema.apply(connection)
    assert await tables_of(connection, "payments") == TABLES
    assert await tables_of(connection) == []


async def test_several_at_once_wait_for_one_another(database: Database) -> None:
    first, second, watcher = [await database.connect() for _ in range(3)]
    await second.execute("SET default_transaction_isolation = 'repeatable read'")
    async with first.transaction():
        assert await schema.apply(first)
        other = asyncio.create_task(schema.apply(second))
        await eventually(
            lambda: watcher.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", second.get_server_pid()),
            "the second apply waits",
        )
    async with asyncio.timeout(30):
        assert not await other


@pytest.mark.parametrize("table", TABLES)
async def test_tables_of_others_are_named_and_left_alone(database: Database, table: str) -> None:
    connection = await database.connect()
    await connection.execute(f"CREATE TABLE {table} (theirs int); COMMENT ON TABLE {table} IS 'theirs'")
    with pytest.raises(SchemaError, match=f"\"{table}\" already exists, and it isn't outbox-relay's: rename it, or"):
        await schema.apply(connection)
    assert await tables_of(connection) == [table]


async def test_an_inbox_of_another_release_is_left_alone(database: Database) -> None:
    connection = await database.connect()
    await schema.apply(connection)
    await connection.execute("COMMENT ON TABLE inbox IS 'outbox-relay inbox, version 10'")
    with pytest.raises(SchemaError, match="version 10', and this one knows version 1: apply with the newest"):
        await schema.apply(connection)


async def test_who_may_make_no_tables_is_told_so(database: Database) -> None:
    connection = await database.connect()
    role = f"nobody_{uuid4().hex}"
    # Not in the schema public, where before PostgreSQL 15 everybody may.
    await connection.execute(f"CREATE ROLE {role}; CREATE SCHEMA theirs; GRANT USAGE ON SCHEMA theirs TO {role}")
    try:
        await connection.execute(f"SET search_path = theirs; SET ROLE {role}")
        with pytest.raises(SchemaError, match="log in as a role that may make tables"):
            await schema.apply(connection)
    finally:
        await connection.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")
