"""Outboxes of any layout, and a backlog in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from outbox_relay import schema
from outbox_relay.servers import PostgresServer

# Keys alternate, so that neighbours in the table are strangers to each other.
FILL = """
-- fill
INSERT INTO outbox (topic, key, type, payload)
SELECT $1, $4 || n % $3, 'OrderPlaced', decode(repeat('2a', 300), 'hex')
FROM generate_series(1, $2) AS n
"""


async def create_outbox(server: PostgresServer, name: str, *, buckets: int = 64, slots: int = 16) -> str:
    """A database with the product's schema, in another layout if need be; its url."""
    sql = schema.read_sql()
    for shipped, wanted in (
        ("& 63)::smallint", f"& {buckets - 1})::smallint"),
        ("VALUES (64, 16,", f"VALUES ({buckets}, {slots},"),
        ("generate_series(0, 15)", f"generate_series(0, {slots - 1})"),
    ):
        if sql.count(shipped) != 1:
            raise RuntimeError(f"schema.sql has changed, and this script with it must: no single {shipped!r}")
        sql = sql.replace(shipped, wanted)
    url = await asyncio.to_thread(server.create_database, name)
    async with connected(url) as connection:
        await connection.execute(sql)
        # Not in the middle of a run.
        await connection.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    return url


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        yield connection
    finally:
        await connection.close(timeout=10)


async def fill(connection: asyncpg.Connection, topic: str, rows: int, keys: int, prefix: str = "k") -> None:
    await connection.execute(FILL, topic, rows, keys, prefix)


async def refill(connection: asyncpg.Connection, topic: str, rows: int, keys: int, prefix: str = "k") -> None:
    """Nothing but a new backlog, analysed.

    The checkpoint comes before it, as it mostly does: rows are usually relayed soon after they were written.
    """
    await connection.execute("TRUNCATE outbox")
    await connection.execute("CHECKPOINT")
    await fill(connection, topic, rows, keys, prefix)
    await connection.execute("VACUUM (ANALYZE) outbox")
