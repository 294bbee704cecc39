"""Claim transaction or sticky slot: ``python -m bench.decisions.claim_strategies [PART …]``, for docs/decisions/0001.

Three candidates over the same spine, publisher and claim statement (``candidates.py``, and the product):

- claim transaction: rows are published inside the transaction that has locked their buckets
- sticky slot: the product; a row says who owns a slot, and each claim is a short transaction that checks its epoch
- advisory lock: the same, but a session-level advisory lock owns the slot, and there is no epoch

Parts, all unless some are named: ``drain`` (what a message costs), ``silent`` (Kafka answers late), ``crash``
(PostgreSQL crashes after a publish), ``takeover`` (a relay is killed, or hangs).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import asyncpg

from bench.decisions.candidates import BUCKET_TABLE
from bench.decisions.draining import CPU_AND_RATE, Drain, cpu_and_rate, drain
from bench.decisions.lanes import Candidate, Watch, opened, relay_all
from bench.decisions.outboxes import connected, create_outbox, fill, refill
from bench.measuring import AT_MOST_SECONDS, interleaved, print_machine, print_table, spread
from outbox_relay import daemon, ledger, logs
from outbox_relay.checker import Report
from outbox_relay.config import Config
from outbox_relay.servers import KafkaServer, PostgresServer
from outbox_relay.topic_reader import check_topics
from tests.acceptance.relays import RelayProcess, drained
from tests.waiting import eventually

CANDIDATES = list(Candidate)
KEYS = 1_000
PARTITIONS = 12


@dataclass
class Bench:
    postgres: PostgresServer
    kafka: KafkaServer
    url: str

    @classmethod
    async def on(cls, postgres: PostgresServer, kafka: KafkaServer) -> Bench:
        bench = cls(postgres, kafka, await create_outbox(postgres, "strategies"))
        async with connected(bench.url) as connection:
            await connection.execute(BUCKET_TABLE)
        return bench

    def settings(self, kafka: Mapping[str, Any] | None = None, **relay: Any) -> dict[str, dict[str, Any]]:
        """The product's defaults, but for what is said."""
        return {
            "database": {"url": self.url},
            "kafka": {"bootstrap_servers": [self.kafka.bootstrap_servers], **(kafka or {})},
            "relay": {"name": f"bench-{uuid4().hex[:8]}", **relay},
        }

    def config(self, kafka: Mapping[str, Any] | None = None, **relay: Any) -> Config:
        return Config.model_validate(self.settings(kafka, **relay))

    async def new_topic(self) -> str:
        name = f"bench-{uuid4().hex}"
        await self.kafka.create_topic(name, PARTITIONS)
        return name

    async def check(self, connection: asyncpg.Connection, topic: str) -> Report:
        """What Kafka has of what the table says; the figures of a run that did damage are worth nothing."""
        committed = await ledger.committed_rows(connection)
        report = await check_topics(committed, self.kafka.bootstrap_servers, [topic], deadline_seconds=60)
        if not report.sound:
            raise RuntimeError(f"not sound: {report}")
        return report


# -- drain: what a message costs


async def measure_drain(bench: Bench, rounds: int, rows: int) -> None:
    topic, config = await bench.new_topic(), bench.config()

    async def drained_by(candidate: Candidate) -> Drain:
        return await drain(bench.postgres, candidate, config, topic, rows, KEYS)

    await drained_by(Candidate.STICKY_SLOT)  # warms the servers up
    drains: dict[Candidate, list[Drain]] = {candidate: [] for candidate in CANDIDATES}
    for candidate in interleaved(CANDIDATES, rounds):
        drains[candidate].append(await drained_by(candidate))
    print_table(
        f"Drain of {rows:,} rows of 300 B, {KEYS:,} keys, {PARTITIONS} partitions, two lanes; {rounds} rounds: "
        "median [lowest, highest], ratios to the sticky slot's round by round",
        ["candidate", *CPU_AND_RATE, "WAL, kB/1,000", "statements/1,000"],
        [
            [
                candidate,
                *cpu_and_rate(found, drains[Candidate.STICKY_SLOT]),
                spread([one.wal_bytes for one in found], 0),
                spread([one.statements * 1000 for one in found]),
            ]
            for candidate, found in drains.items()
        ],
    )
    for candidate, found in drains.items():
        print(f"statements a claim, {candidate}: {found[-1].a_claim}")


# -- silent: Kafka answers late

LONGEST_TRANSACTION = """
-- longest transaction
SELECT COALESCE(max(extract(epoch FROM clock_timestamp() - a.xact_start)), 0)::float8
FROM pg_stat_activity a
WHERE a.datname = current_database() AND a.backend_type = 'client backend' AND a.pid <> pg_backend_pid()
"""

SILENT_SECONDS = 4.0
SILENT_SENDS = 3
#: (publish deadline, patience with a relay that hangs): the one below the silence, then the other.
LIMITS = ((20.0, 3.0), (2.0, 60.0))


async def measure_silent(bench: Bench, rows: int) -> None:
    table: list[list[object]] = []
    for deadline_seconds, patience_seconds in LIMITS:
        for candidate in CANDIDATES:
            kafka = {"publish_deadline_seconds": deadline_seconds, "publish_warn_seconds": deadline_seconds}
            config = bench.config(kafka, claims_in_flight=1, batch_rows=rows, lease_seconds=patience_seconds)
            repeats, longest, seconds = await _drain_in_silence(bench, candidate, config, rows)
            limits = f"publish deadline {deadline_seconds:g} s, patience {patience_seconds:g} s"
            table.append([limits, candidate, f"{repeats / rows:g}", f"{longest:.2f}", f"{seconds:.1f}"])
    print_table(
        f"One claim of {rows:,} rows; Kafka is silent for {SILENT_SECONDS:g} s at each of the first {SILENT_SENDS} "
        "times that it is sent",
        ["limits", "candidate", "repeats of the claim", "longest transaction, s", "until marked, s"],
        table,
    )


async def _drain_in_silence(bench: Bench, candidate: Candidate, config: Config, rows: int) -> tuple[int, float, float]:
    loop = asyncio.get_running_loop()
    silences: list[asyncio.TimerHandle] = []

    def fall_silent(_: object) -> None:
        # Before the first byte is sent. Kafka reads what was sent when it goes on.
        if len(silences) < SILENT_SENDS:
            bench.kafka.pause()
            silences.append(loop.call_later(SILENT_SECONDS, bench.kafka.resume))

    topic, watch = await bench.new_topic(), Watch(fall_silent)
    async with connected(bench.url) as connection, _longest_transaction(bench) as longest:
        await refill(connection, topic, rows, KEYS)
        longest.clear()
        async with opened(candidate, config, watch) as sources:
            relaying = asyncio.create_task(relay_all(sources, config, watch, once=False))
            await drained(connection, 60)
            seconds = time.monotonic() - watch.first_claimed
            relaying.cancel()
            await asyncio.wait([relaying])
        await asyncio.sleep(max(0.0, silences[-1].when() - loop.time()))
        bench.kafka.resume()
        report = await bench.check(connection, topic)
    return report.duplicates, max(longest), seconds


@asynccontextmanager
async def _longest_transaction(bench: Bench) -> AsyncIterator[list[float]]:
    """The longest transaction of the moment, each 10 ms."""
    seen: list[float] = []

    async def sample() -> None:
        async with connected(bench.url) as connection:
            while True:
                seen.append(await connection.fetchval(LONGEST_TRANSACTION))
                await asyncio.sleep(0.01)

    sampling = asyncio.create_task(sample())
    try:
        yield seen
    finally:
        sampling.cancel()
        await asyncio.wait([sampling])


# -- crash: was what is in Kafka durable in PostgreSQL


async def measure_crash(kafka: KafkaServer, trials: int) -> None:
    lost = dict.fromkeys(CANDIDATES, 0)
    # The WAL writer would make an asynchronous commit durable some time; here it comes late.
    with PostgresServer.start({"wal_writer_delay": "10s"}) as postgres:
        bench = await Bench.on(postgres, kafka)
        for candidate in interleaved(CANDIDATES, trials):
            lost[candidate] += await _is_lost(bench, candidate)
    print_table(
        f"A writer with synchronous_commit = off; PostgreSQL crashes right after the publish; {trials} trials",
        ["candidate", "rows that Kafka has and the table lost"],
        [[candidate, f"{number} of {trials}"] for candidate, number in lost.items()],
    )


async def _is_lost(bench: Bench, candidate: Candidate) -> bool:
    topic, config, watch = await bench.new_topic(), bench.config(claims_in_flight=1), Watch()
    publisher = daemon._publisher(config, watch)
    try:
        await publisher.connect()
        async with connected(bench.url) as connection, opened(candidate, config, watch) as sources:
            while not (claim := await sources[0].claim()).is_idle:  # until it owns its slots
                pass
            # Whatever else is unflushed goes first, so that only the row is at stake.
            await connection.execute("CHECKPOINT")
            await connection.execute("SET synchronous_commit = off")
            await fill(connection, topic, 1, 1)
            id_ = await connection.fetchval("SELECT max(id) FROM outbox")
            claim = await sources[0].claim()
            await publisher.publish(claim.records, claim.is_ours)
            if watch.claims != 1:
                raise RuntimeError(f"{candidate} claimed nothing")
            await asyncio.to_thread(bench.postgres.stop, "immediate")
    finally:
        await publisher.close()
        await asyncio.to_thread(bench.postgres.start_again)
    async with connected(bench.url) as connection:
        is_there: bool = await connection.fetchval("SELECT EXISTS (SELECT FROM outbox WHERE id = $1)", id_)
        await connection.execute("TRUNCATE outbox")
    return not is_there


# -- takeover: a relay is killed, or hangs


KILLED = "kill -9"
#: The product behind a pooler has no lock that would tell of its death.
POOLED = "kill -9, behind a pooler"
HUNG = "SIGSTOP"
LEASE_SECONDS = 3.0


async def measure_takeover(bench: Bench, rounds: int) -> None:
    endings = [(how, candidate) for how in (KILLED, HUNG) for candidate in CANDIDATES]
    endings.append((POOLED, Candidate.STICKY_SLOT))
    results: dict[tuple[str, Candidate], list[tuple[float, int]]] = {ending: [] for ending in endings}
    for ending in interleaved(endings, rounds):
        results[ending].append(await _takeover(bench, *ending))
    print_table(
        f"Two relays of two lanes, {KEYS:,} rows claimed and unanswered; one ends; {KEYS:,} more rows; "
        f"heartbeat 1 s, patience {LEASE_SECONDS:g} s, {rounds} runs",
        ["ended by", "candidate", "until all is marked, s", "repeats"],
        [
            [
                *ending,
                spread([seconds for seconds, _ in found], 2),
                spread([repeats for _, repeats in found], 0),
            ]
            for ending, found in results.items()
        ],
    )


async def _takeover(bench: Bench, how: str, candidate: Candidate) -> tuple[float, int]:
    topic = await bench.new_topic()
    async with connected(bench.url) as connection:
        await connection.execute("TRUNCATE outbox")
        with ExitStack() as stack:
            relays = [_process(bench, candidate) for _ in range(2)]
            for relay in relays:
                stack.callback(relay.close)
                relay.start()
            await _share_the_work(connection, topic, relays)
            # Both are in the middle of a claim when one ends.
            bench.kafka.pause()
            stack.callback(bench.kafka.resume)
            before = sum(len(relay.ids("claim.made")) for relay in relays)
            await fill(connection, topic, KEYS, KEYS)
            await eventually(
                lambda: sum(len(relay.ids("claim.made")) for relay in relays) >= before + KEYS, "all rows are claimed"
            )
            await _end(connection, relays[0], how)
            ended_at = time.monotonic()
            bench.kafka.resume()
            await fill(connection, topic, KEYS, KEYS)
            await drained(connection, 60)
            seconds = time.monotonic() - ended_at
            if how == HUNG:
                relays[0].signal(signal.SIGCONT)
                await asyncio.sleep(2)  # whatever it still does, it does soon
        return seconds, (await bench.check(connection, topic)).duplicates


def _process(bench: Bench, candidate: Candidate) -> RelayProcess:
    relay = RelayProcess({**bench.settings(lease_seconds=LEASE_SECONDS), "log": {"level": "debug", "format": "json"}})
    if candidate is not Candidate.STICKY_SLOT:
        config = str(relay.directory / "config.toml")
        relay._command = [sys.executable, "-m", "bench.decisions.contender", candidate, config, "2"]
    return relay


async def _share_the_work(connection: asyncpg.Connection, topic: str, relays: list[RelayProcess]) -> None:
    """Give them work until both have had at least a fifth of it."""
    rows = 200
    async with asyncio.timeout(60):
        done = [0, 0]
        while min(done) < rows / 5:
            before = [len(relay.ids("claim.settled")) for relay in relays]
            await fill(connection, topic, rows, rows)
            await drained(connection, 60)
            done = [len(relay.ids("claim.settled")) - count for relay, count in zip(relays, before, strict=True)]


async def _end(connection: asyncpg.Connection, relay: RelayProcess, how: str) -> None:
    if how != KILLED:
        relay.signal(signal.SIGSTOP)
    if how == POOLED:
        # What a relay behind a pooler says of itself.
        await connection.execute("UPDATE outbox_relay SET direct = false WHERE name = $1", relay.name)
    if how != HUNG:
        os.kill(relay.pid, signal.SIGKILL)


PARTS = ("drain", "silent", "crash", "takeover")


async def _main(parts: list[str], rounds: int, rows: int) -> None:
    print_machine()
    with PostgresServer.start() as postgres, KafkaServer.start() as kafka:
        bench = await Bench.on(postgres, kafka)
        if "drain" in parts:
            await measure_drain(bench, rounds, rows)
        if "silent" in parts:
            await measure_silent(bench, 2_000)
        if "crash" in parts:
            await measure_crash(kafka, 3)
        if "takeover" in parts:
            await measure_takeover(bench, 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS), default=PARTS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=30_000)
    arguments = parser.parse_args()
    logs.configure("critical", "json")
    asyncio.run(asyncio.wait_for(_main(arguments.parts, arguments.rounds, arguments.rows), AT_MOST_SECONDS))
