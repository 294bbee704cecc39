"""A backlog is there, the relay begins: how fast it gets to Kafka, and what that costs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from confluent_kafka import KafkaException

from bench.arms import Arm, Run
from bench.conditions import CLEAN, Condition
from bench.cpu import Cpu, peak_rss_mb
from bench.ledger import LEDGER, Seen, Verdict, compare, read_ledger, read_topic
from bench.rows import Rows
from bench.stage import Stage, connected
from outbox_relay.errors import ServerError

#: Of the backlog, what is left out at the beginning: starting up isn't what is measured.
WARM_UP = 0.05
#: The most rows, and the most bytes, in one transaction of the backlog's writer.
_ROWS_A_TRANSACTION = 1_000
_BYTES_A_TRANSACTION = 32_000_000
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 0.3
_FILL_SECONDS = 300.0
#: Nothing new in Kafka for so long: the arm has come to a stand.
_STANDSTILL_SECONDS = 60.0

BACKLOG = """
CREATE PROCEDURE bench_write_backlog(bench_rows_in_all bigint, bench_rows_a_transaction bigint) LANGUAGE plpgsql AS $$
DECLARE bench_first bigint;
BEGIN
    FOR bench_first IN 1 .. bench_rows_in_all BY bench_rows_a_transaction LOOP
        INSERT INTO bench_ledger SELECT n, k, v FROM bench_rows
        WHERE n >= bench_first AND n < bench_first + bench_rows_a_transaction;
        {insert};
        COMMIT;
    END LOOP;
END $$
"""
SLICE = "(SELECT * FROM bench_rows WHERE n >= bench_first AND n < bench_first + bench_rows_a_transaction) AS rows"


class RunFailedError(Exception):
    """The run is no result; the message says why."""


@dataclass(frozen=True)
class Drained:
    """What one drain showed."""

    rate: float  #: messages a second, from when the first 5 % were in Kafka
    messages: int  #: of these, how many
    seconds: float
    cpu_us: dict[str, float]  #: a message, by whom; ``all`` is their sum
    rss_mb: float
    wal_bytes: float  #: a message
    repeated: int


async def drain(
    stage: Stage, arm: Arm, rows: Rows, *, most_seconds: float | None = None, condition: Condition = CLEAN
) -> Drained:
    """Write the backlog, have it relayed, and check it; with ``most_seconds`` cut off so long after its beginning.

    Raises :class:`RunFailedError`, and ArmUnavailableError where the arm can't be had.
    """
    async with stage.run(rows) as run, prepared(arm, run):
        await condition.before(run)
        await write_backlog(run, arm, rows)
        async with condition.during(run):
            return await drain_backlog(stage, arm, run, rows.count, most_seconds=most_seconds)


@asynccontextmanager
async def prepared(arm: Arm, run: Run) -> AsyncIterator[None]:
    """The arm with its tables; it is stopped after the block. Its last words are added to whatever goes wrong."""
    try:
        async with connected(run.database_url) as connection:
            await connection.execute(LEDGER)
        await arm.prepare(run)
        yield
    except (RunFailedError, ServerError, TimeoutError, OSError, asyncpg.PostgresError, KafkaException) as error:
        raise RunFailedError(f"{arm.name}: {error or type(error).__name__}\n{arm.log()}".rstrip()) from error
    finally:
        await arm.stop()


async def write_backlog(run: Run, arm: Arm, rows: Rows) -> None:
    """In many transactions, each with its ledger; then the tables are as autovacuum would leave them."""
    at_once = max(1, min(_ROWS_A_TRANSACTION, _BYTES_A_TRANSACTION // rows.size))
    async with connected(run.database_url) as connection:
        await connection.execute(BACKLOG.format(insert=arm.insert(SLICE).rstrip().rstrip(";")))
        await connection.execute(f"CALL bench_write_backlog({rows.count}, {at_once})", timeout=_FILL_SECONDS)
        await connection.execute("VACUUM (ANALYZE)", timeout=_FILL_SECONDS)


async def drain_backlog(stage: Stage, arm: Arm, run: Run, count: int, *, most_seconds: float | None = None) -> Drained:
    """Start the arm, measure until everything is in Kafka and settled, then check what Kafka has."""
    async with records_in(run) as written:
        await arm.start(run)
        # One that is cut off doesn't get far enough for a part of the backlog to be its start.
        await reach(written, 1 if most_seconds is not None else int(count * WARM_UP))
        wal, cpu, began, first = await _wal(run), stage.cpu(arm.pids), time.monotonic(), await written()
        last = await reach(written, count, most_seconds)
        seconds = time.monotonic() - began
        used = stage.cpu(arm.pids) - cpu
        if last >= count:
            used = await settled(stage, arm, run) - cpu
        wal, rss = await _wal(run) - wal, peak_rss_mb(arm.pids)
    await arm.stop()
    records, verdict = await checked(run, arm, complete=last >= count)
    if first < last >= count:
        # By the broker's clock, which is finer than how often it was asked.
        times = sorted(record.at_ms for record in records)
        last, seconds = len(times), (times[-1] - times[first]) / 1000
    messages = last - first
    if messages <= 0 or seconds <= 0:
        raise RunFailedError("too little got to Kafka to be measured")
    return Drained(
        rate=messages / seconds,
        messages=messages,
        seconds=seconds,
        cpu_us={who: used_by / messages * 1e6 for who, used_by in {**asdict(used), "all": used.total}.items()},
        rss_mb=rss,
        wal_bytes=wal / messages,
        repeated=verdict.repeated,
    )


@asynccontextmanager
async def records_in(run: Run) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Tells how many records are in the run's topic."""
    consumer = AIOKafkaConsumer(bootstrap_servers=run.bootstrap_servers)
    partitions = [TopicPartition(run.topic, number) for number in range(run.partitions)]

    async def written() -> int:
        return sum((await consumer.end_offsets(partitions)).values())

    await consumer.start()
    try:
        yield written
    finally:
        await consumer.stop()


async def checked(run: Run, arm: Arm, *, complete: bool) -> tuple[list[Seen], Verdict]:
    """What is in the topic, and that it is what the ledger says. Raises :class:`RunFailedError`."""
    async with connected(run.database_url) as connection:
        ledger = await read_ledger(connection)
    records = await asyncio.to_thread(read_topic, run.bootstrap_servers, run.topic, run.partitions)
    verdict = compare(ledger, records, complete=complete, ordered=arm.ordered)
    if problem := verdict.problem(ordered=arm.ordered):
        raise RunFailedError(problem)
    return records, verdict


async def reach(written: Callable[[], Awaitable[int]], wanted: int, most_seconds: float | None = None) -> int:
    """Wait for so many records, or for so long; how many there are then."""
    began = moved = time.monotonic()
    count = 0
    while (now := time.monotonic()) - began < (math.inf if most_seconds is None else most_seconds):
        before, count = count, await written()
        if count >= wanted:
            break
        if count > before:
            moved = now
        elif now - moved > _STANDSTILL_SECONDS:
            raise RunFailedError(f"nothing new in Kafka for {_STANDSTILL_SECONDS:g} s, after {count:,} of {wanted:,}")
        await asyncio.sleep(_POLL_SECONDS)
    return count


async def settled(stage: Stage, arm: Arm, run: Run) -> Cpu:
    """Wait until all that is in Kafka is settled too; what has been used by then, our asking left out."""
    began = time.monotonic()
    while time.monotonic() - began < _STANDSTILL_SECONDS:
        await asyncio.sleep(_SETTLE_SECONDS)
        used = stage.cpu(arm.pids)
        if not await arm.unsettled(run):
            return used
    raise RunFailedError("everything is in Kafka, and the relay doesn't settle it")


async def _wal(run: Run) -> int:
    async with connected(run.database_url) as connection:
        return int(await connection.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))
