"""The number of buckets and slots: ``python -m bench.decisions.buckets [PART …]``, for docs/decisions/0002.

The product's source, one lane that owns every slot, over layouts of other sizes. A publisher that acknowledges at once
stands in for Kafka, so only PostgreSQL and the relay's side of it are measured.

Parts, all unless some are named: ``drain`` (what a message costs), ``hot`` (who waits for a hot key), ``idle`` (a claim
that finds nothing), ``even`` (the largest share of several relays).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import asyncpg

from bench.cpu import cpu_seconds
from bench.decisions.draining import CPU_AND_RATE, Drain, cpu_and_rate, drain
from bench.decisions.lanes import AtOnce, Candidate, Watch, opened, relay_all
from bench.decisions.outboxes import connected, create_outbox, fill, refill
from bench.measuring import AT_MOST_SECONDS, interleaved, print_machine, print_table, spread
from outbox_relay import logs
from outbox_relay.config import Config
from outbox_relay.message import Record
from outbox_relay.servers import PostgresServer

TOPIC = "bench"
BATCH_ROWS = 2_000


class Layout(NamedTuple):
    buckets: int
    slots: int

    def __str__(self) -> str:
        return f"{self.buckets}/{self.slots}"


SHIPPED = Layout(64, 16)
LAYOUTS = (
    Layout(1, 1),
    Layout(16, 16),
    Layout(64, 4),
    SHIPPED,
    Layout(64, 64),
    Layout(256, 16),
    Layout(1024, 16),
    Layout(1024, 64),
)


@dataclass
class Outbox:
    layout: Layout
    config: Config

    @classmethod
    async def of(cls, layout: Layout, postgres: PostgresServer) -> Outbox:
        url = await create_outbox(postgres, f"b{layout.buckets}s{layout.slots}", **layout._asdict())
        settings = {
            "database": {"url": url},
            "kafka": {"bootstrap_servers": ["127.0.0.1:1"]},
            "relay": {"name": "bench", "claims_in_flight": 1, "batch_rows": BATCH_ROWS},
        }
        return cls(layout, Config.model_validate(settings))

    @property
    def url(self) -> str:
        return self.config.database.url


# -- drain: what a message costs


async def measure_drain(postgres: PostgresServer, outboxes: list[Outbox], keys: int, rounds: int, rows: int) -> None:
    async def drained(outbox: Outbox) -> Drain:
        return await drain(postgres, Candidate.STICKY_SLOT, outbox.config, TOPIC, rows, keys, AtOnce)

    await drained(outboxes[0])  # warms the server up
    drains: dict[Layout, list[Drain]] = {outbox.layout: [] for outbox in outboxes}
    for outbox in interleaved(outboxes, rounds):
        drains[outbox.layout].append(await drained(outbox))
    print_table(
        f"Drain of {rows:,} rows of {keys:,} key(s), without Kafka; {rounds} rounds: median [lowest, highest], "
        f"ratios to {SHIPPED} round by round",
        ["buckets/slots", *CPU_AND_RATE, "index, B/row"],
        [
            [layout, *cpu_and_rate(found, drains[SHIPPED]), spread([one.index_bytes for one in found])]
            for layout, found in drains.items()
        ],
    )


# -- hot: who waits for a hot key

HOT_ROWS = 20_000
OTHER_KEYS = 1_000


async def measure_hot(outboxes: list[Outbox]) -> None:
    table: list[list[object]] = []
    for outbox in outboxes:
        claims: list[Sequence[Record]] = []
        watch = Watch(claims.append)
        async with connected(outbox.url) as connection:
            await refill(connection, TOPIC, HOT_ROWS, 1, "hot")
            await fill(connection, TOPIC, OTHER_KEYS, OTHER_KEYS)
            async with opened(Candidate.STICKY_SLOT, outbox.config, watch) as sources, asyncio.timeout(60):
                await relay_all(sources, outbox.config, watch, once=True, publisher=AtOnce)
        turns = [
            turn for turn, claim in enumerate(claims, 1) for record in claim if not (record.key or b"").startswith(b"h")
        ]
        late = sum(turn > len(claims) / 2 for turn in turns)
        table.append(
            [outbox.layout, len(claims), f"{statistics.median(turns):g}", max(turns), f"{late / len(turns):.1%}"]
        )
    print_table(
        f"{HOT_ROWS:,} rows of one key, then one row of each of {OTHER_KEYS:,} others; claims of {BATCH_ROWS:,}",
        ["buckets/slots", "claims in all", "the others' median", "the last of them", "of them in the latter half"],
        table,
    )


# -- idle: a claim that finds nothing

CLAIMS = 500


async def measure_idle(postgres: PostgresServer, outboxes: list[Outbox], rounds: int, rows: int) -> None:
    found: dict[Layout, list[tuple[float, float, float]]] = {outbox.layout: [] for outbox in outboxes}
    for outbox in outboxes:
        async with connected(outbox.url) as connection:
            await refill(connection, TOPIC, rows, 1_000)
            await connection.execute("UPDATE outbox SET sent_at = now()")
            await connection.execute("VACUUM (ANALYZE) outbox")
    for outbox in interleaved(outboxes, rounds):
        found[outbox.layout].append(await _idle(postgres, outbox))
    print_table(
        f"A claim that finds nothing, {rows:,} rows sent; {rounds} rounds of {CLAIMS} claims: median [lowest, highest]",
        ["buckets/slots", "PostgreSQL CPU, ms", "a claim, ms", "WAL, B"],
        [
            [
                layout,
                *(spread(values, digits) for values, digits in zip(zip(*rounds_, strict=True), (2, 2, 0), strict=True)),
            ]
            for layout, rounds_ in found.items()
        ],
    )


async def _idle(postgres: PostgresServer, outbox: Outbox) -> tuple[float, float, float]:
    """CPU and time in ms, and bytes, of a claim."""
    async with opened(Candidate.STICKY_SLOT, outbox.config, Watch()) as (source,), connected(outbox.url) as other:
        for _ in range(10):  # until it owns its slots and its statements are prepared
            await source.claim()
        wal = await other.fetchval("SELECT pg_current_wal_insert_lsn()")
        cpu, began = cpu_seconds(postgres.pid), time.perf_counter()
        for _ in range(CLAIMS):
            await source.claim()
        cpu, seconds = cpu_seconds(postgres.pid) - cpu, time.perf_counter() - began
        wal_bytes = int(await other.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", wal))
    return cpu / CLAIMS * 1000, seconds / CLAIMS * 1000, wal_bytes / CLAIMS


# -- even: the largest share

TRIALS = 20

# A bucket is a hash's last bits and a slot is those of the bucket, so that a slot is the hash's last bits too.
HASHES = """
-- hashes
SELECT trial, (hashtextextended('t' || trial || '-' || n, 0) & 63)::integer AS bits, count(*)
FROM generate_series(1, $1::integer) AS trial, generate_series(1, $2::integer) AS n
GROUP BY 1, 2
"""


async def measure_even(url: str) -> None:
    key_counts, relay_counts = (50, 1_000, 100_000), (2, 3, 4, 5)
    async with connected(url) as connection:
        hashes = {keys: await connection.fetch(HASHES, TRIALS, keys) for keys in key_counts}
    table: list[list[object]] = []
    for slots in (4, 16, 64):
        for relays in relay_counts:
            alone = math.ceil(slots / relays) / (slots / relays)
            shares = [spread(_largest_shares(hashes[keys], keys, slots, relays), 2) for keys in key_counts]
            table.append([slots, relays, f"{alone:.2f}", *shares])
    print_table(
        f"The largest relay's share against the mean; {TRIALS} sets of keys: median [lowest, highest]",
        ["slots", "relays", "of slots", *(f"of {keys:,} keys" for keys in key_counts)],
        table,
    )


def _largest_shares(hashes: Sequence[asyncpg.Record], keys: int, slots: int, relays: int) -> list[float]:
    loads = [[0] * relays for _ in range(TRIALS)]
    for row in hashes:
        # Whichever slots a relay has, it has its fair share of their number.
        loads[row["trial"] - 1][row["bits"] % slots % relays] += row["count"]
    return [max(load) / (keys / relays) for load in loads]


PARTS = ("drain", "hot", "idle", "even")


async def _main(parts: list[str], rounds: int, rows: int) -> None:
    print_machine()
    with PostgresServer.start() as postgres:
        outboxes = [await Outbox.of(layout, postgres) for layout in LAYOUTS]
        if "drain" in parts:
            await measure_drain(postgres, outboxes, 1_000, rounds, rows)
            await measure_drain(postgres, outboxes, 1, 3, rows // 2)
        if "hot" in parts:
            await measure_hot(outboxes)
        if "idle" in parts:
            await measure_idle(postgres, outboxes, 4, rows)
        if "even" in parts:
            await measure_even(outboxes[0].url)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS), default=PARTS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=30_000)
    arguments = parser.parse_args()
    logs.configure("critical", "json")
    asyncio.run(asyncio.wait_for(_main(arguments.parts, arguments.rounds, arguments.rows), AT_MOST_SECONDS))
