"""docs/operations.md: what it tells people to ask is understood by PostgreSQL, and shows what it is meant to."""

from __future__ import annotations

import re
from pathlib import Path

import asyncpg
import pytest

from tests.conftest import Database

OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
TABLES, LOOK_UP, INDEXES, HELD = re.findall(r"```sql\n(.*?)```", OPERATIONS, re.DOTALL)


async def test_a_transaction_that_holds_vacuum_back_is_seen(outbox_database: Database) -> None:
    connection, other = [await outbox_database.connect() for _ in range(2)]
    await other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM outbox")
    await connection.execute("INSERT INTO outbox (topic, payload) SELECT 't', '' FROM generate_series(1, 6400)")
    await connection.execute("UPDATE outbox SET sent_at = now()")
    await connection.execute("VACUUM outbox")
    assert f"session {other.get_server_pid()}" in [row["what"] for row in await connection.fetch(HELD)]
    buffers_beside_it = await buffers(connection)
    await other.execute("ROLLBACK")
    await connection.execute("VACUUM outbox")
    assert await buffers(connection) <= 4 < buffers_beside_it
    assert (await connection.fetch(TABLES))[0]["relname"] == "outbox"


async def buffers(connection: asyncpg.Connection) -> int:
    plan = "\n".join(row[0] for row in await connection.fetch(LOOK_UP))
    return sum(map(int, re.findall(r"(?:hit|read)=(\d+)", plan.partition("->")[0])))


async def test_indexes_are_measured(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pgstattuple')"):
        pytest.skip("this PostgreSQL has no pgstattuple")
    create, measure = INDEXES.strip().removesuffix(";").split(";")
    await connection.execute(create)
    rows = await connection.fetch(measure)
    assert {row["indexrelname"] for row in rows} == {"outbox_pkey", "outbox_unsent"}
