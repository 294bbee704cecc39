"""Writers write at a rate, the relay relays: how long a message takes from its COMMIT to the consumer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from bench import writers
from bench.arms import Arm, Run
from bench.arms.ours import count_in
from bench.cpu import peak_rss_mb
from bench.drain import RunFailedError, checked, prepared
from bench.ledger import row_of
from bench.rows import Rows
from bench.stage import Stage, connected
from bench.writers import Load, Written

#: Written before anything is measured: connections are made, plans and code are warm.
WARM_UP_SECONDS = 5.0
#: Then writers connect anew, and the relay has become idle meanwhile, which isn't what steady writing is about.
_LEAD_IN_SECONDS = 1.0
_ARRIVE_SECONDS = 60.0
_NO_ROWS = 1

PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}


@dataclass(frozen=True)
class Steady:
    """What a while of steady writing showed."""

    written_per_second: float
    latency_ms: Mapping[str, float]  #: from the writer's COMMIT, acknowledged, to the consumer
    commit_ms: Mapping[str, float]  #: of the writers, from when a message was due to its COMMIT
    behind_ms: float  #: how much later the last tenth arrived than the first tenth, at the median
    relay_cpu_percent: float
    postgresql_cpu_percent: float  #: the writers' share included
    rss_mb: float
    autovacuums: int  #: of the run's tables
    repeated: int


class Arrivals:
    """A consumer that notes when each message came first."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._failure: Exception | None = None
        self.at: dict[int, float] = {}  #: by number, monotonic seconds

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Arrivals]:
        """Read the topic of the run within the block, from its beginning."""
        self._thread.start()
        try:
            await asyncio.to_thread(self._ready.wait, 30)
            yield self
        finally:
            self._stopping.set()
            await asyncio.to_thread(self._thread.join)

    async def all_of(self, numbers: Sequence[int]) -> None:
        """Wait until each has arrived. Raises :class:`RunFailedError` when they don't."""
        deadline = time.monotonic() + _ARRIVE_SECONDS
        while missing := sum(n not in self.at for n in numbers):
            if self._failure is not None:
                raise RunFailedError(f"the consumer failed: {self._failure}")
            if time.monotonic() > deadline:
                raise RunFailedError(f"{missing:,} of {len(numbers):,} messages didn't arrive in {_ARRIVE_SECONDS:g} s")
            await asyncio.sleep(0.05)

    def _read(self) -> None:
        consumer = Consumer(
            {"bootstrap.servers": self._run.bootstrap_servers, "group.id": "bench", "enable.auto.commit": False}
        )
        try:
            consumer.assign([TopicPartition(self._run.topic, number, 0) for number in range(self._run.partitions)])
            consumer.poll(0.5)
            self._ready.set()
            while not self._stopping.is_set():
                message = consumer.poll(0.1)
                if message is None:
                    continue
                now = time.monotonic()
                if message.error() is not None:
                    raise KafkaException(message.error())
                if (row := row_of(message.value())) is not None:
                    self.at.setdefault(row.n, now)
        except Exception as error:
            self._failure = error
        finally:
            consumer.close()


async def steady(stage: Stage, arm: Arm, *, rate: float, seconds: float, size: int) -> Steady:
    """Write at a rate for so long, after a while that isn't measured. Raises :class:`RunFailedError`."""
    async with stage.run(Rows(_NO_ROWS, size)) as run, prepared(arm, run):
        await writers.prepare(run, arm, size)
        async with Arrivals(run).read() as arrivals:
            await arm.start(run)
            warm = await writers.write(Load(run.database_url, rate, WARM_UP_SECONDS))
            await arrivals.all_of([one.n for one in warm])
            cpu, began = stage.cpu(arm.pids), time.monotonic()
            written = await writers.write(Load(run.database_url, rate, _LEAD_IN_SECONDS + seconds, first=len(warm)))
            used, took = stage.cpu(arm.pids) - cpu, time.monotonic() - began
            await arrivals.all_of([one.n for one in written])
            starts = min(one.due for one in written) + _LEAD_IN_SECONDS
            written = [one for one in written if one.due >= starts]
            rss = peak_rss_mb(arm.pids)
        await arm.stop()
        _, verdict = await checked(run, arm, complete=True)
        autovacuums = await count_in(run, "SELECT coalesce(sum(autovacuum_count), 0) FROM pg_stat_user_tables")
    latencies = [(arrivals.at[one.n] - one.committed) * 1000 for one in sorted(written, key=lambda one: one.due)]
    tenth = len(latencies) // 10 or 1
    return Steady(
        written_per_second=len(written) / seconds,
        latency_ms=percentiles(latencies),
        commit_ms=commit_ms(written),
        behind_ms=median(latencies[-tenth:]) - median(latencies[:tenth]),
        relay_cpu_percent=used.relay / took * 100,
        postgresql_cpu_percent=used.postgresql / took * 100,
        rss_mb=rss,
        autovacuums=autovacuums,
        repeated=verdict.repeated,
    )


async def writers_beside(
    stage: Stage, make: Callable[[], Arm], *, share: float, seconds: float, size: int
) -> dict[str, Any]:
    """What writers at a share of what the machine takes without a relay feel of one: alone, beside it, and alone."""
    most = len(await _alone(stage, make(), None, seconds, size)) / seconds
    rate = most * share
    before = commit_ms(await _alone(stage, make(), rate, seconds, size))
    beside = await steady(stage, make(), rate=rate, seconds=seconds, size=size)
    after = commit_ms(await _alone(stage, make(), rate, seconds, size))
    return {
        "most_per_second": most,
        "due_per_second": rate,
        "written_per_second": beside.written_per_second,
        "alone_ms": {name: (before[name] + after[name]) / 2 for name in before},
        "beside_ms": beside.commit_ms,
        "latency_ms": beside.latency_ms,
    }


async def _alone(stage: Stage, arm: Arm, rate: float | None, seconds: float, size: int) -> list[Written]:
    """Write into the arm's tables without a relay."""
    async with stage.run(Rows(_NO_ROWS, size)) as run, prepared(arm, run):
        await writers.prepare(run, arm, size)
        warm = await writers.write(Load(run.database_url, rate, WARM_UP_SECONDS))
        return await writers.write(Load(run.database_url, rate, seconds, first=len(warm)))


def commit_ms(written: Sequence[Written]) -> dict[str, float]:
    """From when a message was due to its COMMIT."""
    return percentiles([(one.committed - one.due) * 1000 for one in written])


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """By name; with few values the upper ones are the largest."""
    ordered = sorted(values)
    if not ordered:
        raise RunFailedError("nothing was written")
    return {name: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for name, share in PERCENTILES.items()}


def median(values: Sequence[float]) -> float:
    return percentiles(values)["p50"]


async def after_silence(
    stage: Stage, make: Callable[[], Arm], *, silence_seconds: float, places: int, messages: int, size: int
) -> dict[str, Any]:
    """Single messages after a silence: in several databases side by side, one after the other, so that it takes less.

    Nothing else goes on meanwhile, and no two messages are under way at once.
    """
    latencies: list[float] = []

    async def one_place(number: int) -> None:
        arm = make()
        async with stage.run(Rows(_NO_ROWS, size)) as run, prepared(arm, run):
            await writers.prepare(run, arm, size)
            async with connected(run.database_url) as connection, Arrivals(run).read() as arrivals:
                await connection.prepare("SELECT bench_write($1, $2)")
                await arm.start(run)
                await connection.fetch("SELECT bench_write(1, 1)")
                await arrivals.all_of([1])
                ready.release()
                await go.wait()
                began = time.monotonic()
                for turn in range(1, messages + 1):
                    due = began + turn * silence_seconds + number * silence_seconds / (places + 1)
                    await asyncio.sleep(due - time.monotonic())
                    await connection.fetch("SELECT bench_write($1, 1)", turn + 1)
                    committed = time.monotonic()
                    await arrivals.all_of([turn + 1])
                    latencies.append((arrivals.at[turn + 1] - committed) * 1000)
            await arm.stop()
            await checked(run, arm, complete=True)

    ready, go = asyncio.Semaphore(0), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(places):
            group.create_task(one_place(number))
        for _ in range(places):
            await ready.acquire()
        go.set()
    return {"latency_ms": percentiles(latencies), "messages": len(latencies), "silence_seconds": silence_seconds}
