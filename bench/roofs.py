"""What the parts take alone: no relay that is made of them can be faster than both together.

``R_db`` claims and marks, with the product's own statements, decodes the rows, and throws them away. ``R_kafka`` has
rows in memory, builds the records, and publishes them with the product's own publisher. Each is tried with several
sizes of a batch and several claims in flight, and the best counts.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import asyncpg

from bench.arms import Run
from bench.arms.ours import Mark
from bench.cpu import Cpu
from bench.decisions.lanes import Watch
from bench.drain import write_backlog
from bench.ledger import LEDGER
from bench.rows import Rows
from bench.stage import Stage, connected
from outbox_relay import daemon
from outbox_relay.config import Config
from outbox_relay.message import Delivered, Record
from outbox_relay.relay import Publisher
from outbox_relay.source.polling import CLAIM_BYTES
from outbox_relay.source.statements import OUTBOX, Statements

#: Batch size and claims in flight.
Combination: TypeAlias = tuple[int, int]
COMBINATIONS: Sequence[Combination] = tuple(itertools.product((2_000, 4_000), (1, 2, 3)))
QUICK_COMBINATIONS: Sequence[Combination] = ((2_000, 2), (4_000, 2))
_BUCKETS = 64
_SECONDS = 60.0

#: As ``OWN`` has them for a claim.
_SETTINGS = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}


@dataclass(frozen=True)
class Tried:
    """One batch size with so many claims in flight."""

    batch: int
    claims: int
    rate: float
    cpu_us: dict[str, float]  #: a message, by whom; ``all`` is their sum


async def database_roof(stage: Stage, rows: Rows, combinations: Sequence[Combination] = COMBINATIONS) -> list[Tried]:
    """``R_db``: each combination gets its part of one backlog."""
    # Whole batches are taken, so more than wanted.
    surplus = sum(batch * claims for batch, claims in combinations)
    part = (rows.count - surplus) // len(combinations)
    async with stage.run(rows) as run:
        await _outbox(run, rows)
        return [await _claim_and_mark(stage, run, part, batch, claims) for batch, claims in combinations]


async def kafka_roof(stage: Stage, rows: Rows, combinations: Sequence[Combination] = COMBINATIONS) -> list[Tried]:
    """``R_kafka``: each combination sends the same rows."""
    async with stage.run(rows) as run:
        records = await _records(run, rows.count // len(combinations))
        return [await _publish(stage, run, records, batch, claims) for batch, claims in combinations]


async def _outbox(run: Run, rows: Rows) -> None:
    arm = Mark()
    async with connected(run.database_url) as connection:
        await connection.execute(LEDGER)
    await arm.prepare(run)
    await write_backlog(run, arm, rows)


async def _claim_and_mark(stage: Stage, run: Run, count: int, batch: int, claims: int) -> Tried:
    statements = Statements(OUTBOX)
    left = count

    async def lane(connection: asyncpg.Connection, buckets: list[int]) -> None:
        nonlocal left
        settle = await connection.prepare(statements.settle)
        claim = await connection.prepare(statements.claim["bytea"])
        ids: list[int] = []
        while left > 0 or ids:
            async with connection.transaction():
                if ids:
                    await settle.fetch(ids)
                rows = (
                    await claim.fetch(buckets, batch // len(buckets), batch, [], [], [], [], CLAIM_BYTES)
                    if left > 0
                    else []
                )
            ids = [row["id"] for row in rows]
            left -= len(ids)
            if not ids:
                break

    connections = [await asyncpg.connect(run.database_url, server_settings=_SETTINGS) for _ in range(claims)]
    try:
        lanes = [
            (lambda connection=connection, number=number: lane(connection, list(range(number, _BUCKETS, claims))))
            for number, connection in enumerate(connections)
        ]
        seconds, used = await _measured(stage, lanes)
    finally:
        for connection in connections:
            await connection.close(timeout=10)
    return _tried(batch, claims, count - left, seconds, used)


async def _publish(stage: Stage, run: Run, records: Sequence[Record], batch: int, claims: int) -> Tried:
    # A key's records are in one lane, as they are in the relay.
    lanes_of: list[list[Record]] = [[] for _ in range(claims)]
    for record in records:
        lanes_of[hash(record.key) % claims].append(record)
    publishers = [_publisher(run) for _ in range(claims)]

    async def lane(publisher: Publisher, own: Sequence[Record]) -> None:
        for first in range(0, len(own), batch):
            outcomes = await publisher.publish(own[first : first + batch], lambda: True)
            if not all(isinstance(outcome, Delivered) for outcome in outcomes):
                raise RuntimeError("Kafka didn't take all rows")

    try:
        for publisher in publishers:
            await publisher.connect()
        lanes = [
            (lambda publisher=publisher, own=own: lane(publisher, own))
            for publisher, own in zip(publishers, lanes_of, strict=True)
        ]
        seconds, used = await _measured(stage, lanes)
    finally:
        for publisher in publishers:
            await publisher.close()
    return _tried(batch, claims, len(records), seconds, used)


async def _measured(stage: Stage, lanes: Sequence[Callable[[], Awaitable[None]]]) -> tuple[float, Cpu]:
    """Run all lanes at once; how long that took, and what it used: of this process all that it did meanwhile."""
    own, servers, began = time.process_time(), stage.cpu([]), time.monotonic()
    async with asyncio.timeout(_SECONDS):
        await asyncio.gather(*(lane() for lane in lanes))
    seconds = time.monotonic() - began
    used = stage.cpu([]) - servers
    return seconds, Cpu(time.process_time() - own, used.postgresql, used.kafka)


def _tried(batch: int, claims: int, count: int, seconds: float, used: Cpu) -> Tried:
    parts = {**asdict(used), "all": used.total}
    return Tried(batch, claims, count / seconds, {who: cpu / count * 1e6 for who, cpu in parts.items()})


async def _records(run: Run, count: int) -> list[Record]:
    """Rows in memory, with the headers that the relay gives them."""
    async with connected(run.database_url) as connection:
        rows = await connection.fetch(
            "SELECT n, gen_random_uuid()::text AS id, key, payload FROM bench_rows WHERE n <= $1 ORDER BY n",
            count,
        )
    return [
        Record(
            id=row["n"],
            event_id=row["id"],
            topic=run.topic,
            key=row["key"].encode(),
            value=row["payload"].encode(),
            headers=[
                ("id", row["id"].encode()),
                ("type", b"OrderPlaced"),
                ("outbox-id", b"%d" % row["n"]),
                ("created_at", b"2026-01-01T00:00:00.000000Z"),
            ],
        )
        for row in rows
    ]


def _publisher(run: Run) -> Publisher:
    settings = {"database": {"url": run.database_url}, "kafka": {"bootstrap_servers": [run.bootstrap_servers]}}
    return daemon._publisher(Config.model_validate(settings), Watch())
