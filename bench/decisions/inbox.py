"""What finding old ids costs: ``python -m bench.decisions.inbox``, for docs/decisions/0014.

An inbox that is at its size: as many messages come as are pruned, and vacuumed space is used again. With the product's
index, with a BRIN index in its place, and with none.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import asyncpg

from bench.cpu import cpu_seconds
from bench.measuring import interleaved, print_machine, print_table, spread
from outbox_relay.inbox import schema
from outbox_relay.inbox.postgres import PRUNE_ROWS
from outbox_relay.servers import PostgresServer

ROUNDS = 6
SIZE = 200_000
TURNOVER = 50_000
BATCH_ROWS = 100

ARMS = {
    "btree (consumer, handled_at)": "",
    "BRIN (handled_at)": "DROP INDEX inbox_handled; CREATE INDEX ON inbox USING brin (handled_at)",
    "no index": "DROP INDEX inbox_handled",
}
ORDERED = "btree (consumer, handled_at)"

# As the product's, but for the time, which is the bench's own here: one second a batch.
INSERT = """
-- accept messages
INSERT INTO inbox (consumer, message_id, handled_at)
SELECT 'payments', id, $2 FROM unnest($1::text[]) AS id
ON CONFLICT (consumer, message_id) DO NOTHING
RETURNING message_id
"""
PRUNE = """
-- prune the inbox
WITH old AS MATERIALIZED (
    SELECT ctid AS place FROM inbox
    WHERE consumer = 'payments' AND handled_at >= $1 AND handled_at < $2
    {order} LIMIT $3 FOR UPDATE SKIP LOCKED
), pruned AS (
    DELETE FROM inbox WHERE ctid = ANY (ARRAY(SELECT place FROM old)) RETURNING handled_at
)
SELECT count(*) AS rows, max(handled_at) AS until FROM pruned
"""
FIRST = datetime(2026, 1, 1, tzinfo=UTC)


class Arm:
    """An inbox with one of the indexes; ``handled`` counts the messages that ever came."""

    def __init__(self, server: PostgresServer, name: str, connection: asyncpg.Connection) -> None:
        self.name = name
        self._server = server
        self._connection = connection
        self.handled = 0
        self.figures: dict[str, list[float]] = defaultdict(list)

    async def prepare(self) -> None:
        await self._connection.execute(schema.read_sql())
        await self._connection.execute(f"ALTER TABLE inbox SET (autovacuum_enabled = off); {ARMS[self.name]}")
        if self.name == ORDERED:
            await self._connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
        await self.insert(SIZE)
        await self._connection.execute("VACUUM ANALYZE inbox")

    async def round(self) -> None:
        for what, work in (("insert", self.insert), ("prune", self.prune), ("vacuum", self.vacuum)):
            await self._connection.execute("CHECKPOINT")
            cpu, wal = cpu_seconds(self._server.pid), await self._wal()
            await work(TURNOVER)
            self.figures[f"{what} CPU"].append((cpu_seconds(self._server.pid) - cpu) / TURNOVER * 1e6)
            self.figures[f"{what} WAL"].append((await self._wal() - wal) / TURNOVER)

    async def insert(self, rows: int) -> None:
        for _ in range(rows // BATCH_ROWS):
            await self._connection.fetch(INSERT, sorted(str(uuid4()) for _ in range(BATCH_ROWS)), self._now())
            self.handled += BATCH_ROWS

    async def prune(self, rows: int) -> None:
        cut, after = self._now() - timedelta(seconds=SIZE / BATCH_ROWS), FIRST
        statement = PRUNE.format(order="ORDER BY handled_at" if self.name == ORDERED else "")
        deleted = 0
        while row := await self._connection.fetchrow(statement, after, cut, PRUNE_ROWS):
            deleted += row["rows"]
            if row["rows"] < PRUNE_ROWS:
                break
            # Only what comes in order ends where the next begins.
            after = row["until"] if self.name == ORDERED else after
        if deleted != rows:
            raise RuntimeError(f"{self.name}: {deleted} rows were pruned, not {rows}")

    async def vacuum(self, _: int) -> None:
        await self._connection.execute("VACUUM inbox")

    async def size(self) -> int:
        return int(await self._connection.fetchval("SELECT pg_indexes_size('inbox')")) >> 20

    def _now(self) -> datetime:
        return FIRST + timedelta(seconds=self.handled / BATCH_ROWS)

    async def _wal(self) -> float:
        return float(await self._connection.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))


async def measure(server: PostgresServer) -> None:
    arms = []
    for number, name in enumerate(ARMS):
        url = await asyncio.to_thread(server.create_database, f"inbox_{number}")
        arms.append(Arm(server, name, await asyncpg.connect(url)))
        await arms[-1].prepare()
    for arm in interleaved(arms, ROUNDS):
        await arm.round()
    columns = [f"{what} {unit}" for what in ("insert", "prune", "vacuum") for unit in ("CPU", "WAL")]
    print_table(
        f"{SIZE:,} messages kept, {TURNOVER:,} come and go in each of {ROUNDS} rounds;"
        " PostgreSQL's CPU in µs and its WAL in bytes, a message",
        ["", *columns, "indexes, MB"],
        [[arm.name, *(spread(arm.figures[column], 0) for column in columns), await arm.size()] for arm in arms],
    )


def main() -> None:
    print_machine()
    with PostgresServer.start({"synchronous_commit": "off", "max_wal_size": "4GB"}) as server:
        asyncio.run(measure(server))


if __name__ == "__main__":
    main()
