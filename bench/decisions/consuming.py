"""How many messages a second a consumer handles once: ``python -m bench.decisions.consuming``, for docs/decisions/0016.

The inbox's ``Consumer`` with an empty handler, an inbox in PostgreSQL, and servers that ship their settings and share
the machine's cores. By ``batch_size``; and where every message is a repeat.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import asyncpg
import structlog
from aiokafka import AIOKafkaProducer

from bench.cpu import cpu_seconds
from bench.measuring import interleaved, print_machine, print_table, spread
from outbox_relay.inbox import schema
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.runner import Consumer
from outbox_relay.inbox.transaction import Connection
from outbox_relay.servers import KafkaServer, PostgresServer

ROUNDS = 5
PARTITIONS = 12
KEYS = 1_000
SIZE = 300
_SECONDS = 120.0

M = TypeVar("M")


@dataclass(frozen=True)
class Arm:
    name: str
    batch_size: int
    messages: int
    are_repeats: bool = False


ARMS = (
    Arm("one by one", 1, 10_000),
    Arm("batches of 50", 50, 100_000),
    Arm("batches of 200", 200, 100_000),
    Arm("batches of 500", 500, 100_000),
    Arm("batches of 200, all repeats", 200, 100_000, are_repeats=True),
)


class Counting(Inbox):
    """Knows of how many messages it was asked, and how many of them were new."""

    def __init__(self, consumer: str) -> None:
        super().__init__(consumer)
        self.has_begun = asyncio.Event()
        self.new = self.seen = 0

    async def accept_batch(self, connection: Connection, messages: Iterable[M]) -> list[M]:
        self.has_begun.set()
        given = list(messages)
        new = await super().accept_batch(connection, given)  # type: ignore[type-var]
        self.seen += len(given)
        self.new += len(new)
        return new


class Bench:
    """Both servers, and what came of each arm."""

    def __init__(self, postgres: PostgresServer, kafka: KafkaServer, pool: asyncpg.Pool) -> None:
        self._postgres, self._kafka, self._pool = postgres, kafka, pool
        self._topics: dict[int, str] = {}
        self.figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    async def fill(self, count: int) -> str:
        """A topic with so many messages."""
        if count not in self._topics:
            topic = f"messages-{count}"
            await self._kafka.create_topic(topic, PARTITIONS)
            async with AIOKafkaProducer(
                bootstrap_servers=self._kafka.bootstrap_servers, acks="all", linger_ms=5, max_batch_size=131_072
            ) as producer:
                for number in range(count):
                    key, id_ = f"k{number % KEYS}".encode(), uuid4().hex.encode()
                    await producer.send(topic, os.urandom(SIZE), key, headers=[("id", id_)])
            self._topics[count] = topic
        return self._topics[count]

    async def round(self, arm: Arm) -> None:
        topic = await self.fill(arm.messages)
        name = f"consumer-{uuid4().hex}"
        if arm.are_repeats:
            await self.consume(arm, topic, name)
        rate, cpu_us = await self.consume(arm, topic, name, are_repeats=arm.are_repeats)
        self.figures[arm.name]["rate"].append(rate)
        self.figures[arm.name]["cpu"].append(cpu_us)

    async def consume(self, arm: Arm, topic: str, name: str, *, are_repeats: bool = False) -> tuple[float, float]:
        inbox = Counting(name)
        is_through = asyncio.Event()

        @asynccontextmanager
        async def transaction() -> AsyncIterator[Any]:
            async with self._pool.acquire() as connection, connection.transaction():
                yield connection
            if inbox.seen == arm.messages:
                is_through.set()

        consumer = Consumer(
            self._kafka.bootstrap_servers,
            f"group-{uuid4().hex}",
            inbox=inbox,
            transaction=transaction,
            batch_size=arm.batch_size,
        )
        handled = 0

        @consumer.handler(topic)
        async def handle(message: Any, connection: Any) -> None:
            nonlocal handled
            handled += 1

        running = asyncio.create_task(consumer.run())
        async with asyncio.timeout(_SECONDS):
            await inbox.has_begun.wait()
            cpu = self._cpu_seconds()
            counted = inbox.seen
            began = time.monotonic()
            await is_through.wait()
            seconds, cpu = time.monotonic() - began, self._cpu_seconds() - cpu
            consumer.stop()
            await running
        if handled != (0 if are_repeats else arm.messages) or inbox.new != handled:
            raise RuntimeError(f"{arm.name}: {handled} messages were handled and {inbox.new} new, of {arm.messages}")
        return (arm.messages - counted) / seconds, cpu / (arm.messages - counted) * 1e6

    def _cpu_seconds(self) -> float:
        return cpu_seconds(os.getpid(), self._postgres.pid, self._kafka.pid)


async def measure(postgres: PostgresServer, kafka: KafkaServer) -> None:
    url = await asyncio.to_thread(postgres.create_database, "consumer")
    async with asyncpg.create_pool(url, min_size=4, max_size=16) as pool:
        await pool.execute(schema.read_sql())
        bench = Bench(postgres, kafka, pool)
        for arm in interleaved(ARMS, ROUNDS):
            await bench.round(arm)
    print_table(
        f"{PARTITIONS} partitions, {KEYS:,} keys, messages of {SIZE} B; messages/s, and CPU in µs a message of the"
        f" consumer, PostgreSQL and Kafka together, in {ROUNDS} rounds",
        ["", "messages/s", "CPU"],
        [
            [arm.name, spread(bench.figures[arm.name]["rate"], 0), spread(bench.figures[arm.name]["cpu"], 0)]
            for arm in ARMS
        ],
    )


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    print_machine()
    with PostgresServer.start() as postgres, KafkaServer.start() as kafka:
        asyncio.run(measure(postgres, kafka))


if __name__ == "__main__":
    main()
