"""Where a cell is measured: servers, a database and topics of its own in them, a real relay, and a ledger."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from sqlalchemy import make_url

from outbox_relay import outbox, schema
from outbox_relay.inbox import schema as inbox_schema
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka, KafkaServer, Postgres, PostgresServer
from outbox_relay.servers.guarded import Guarded
from outbox_relay.topic_reader import read_topics
from tests.acceptance.relays import RelayProcess, relay_process
from tests.conftest import POSTGRES_SETTINGS
from tests.processes import state_and_parent
from tests.waiting import eventually

SECONDS = 60.0


@contextlib.contextmanager
def servers() -> Iterator[tuple[Postgres, Kafka]]:
    """Servers that may be killed."""
    with PostgresServer.start(POSTGRES_SETTINGS) as postgres, KafkaServer.start() as kafka:
        yield Postgres(postgres.url(), postgres), Kafka(kafka.bootstrap_servers, kafka)


class Service:
    """A consumer process, one after the other under the same member id. Ends with this process."""

    def __init__(self, place: Place, member: str) -> None:
        self._guarded = Guarded("service")
        self._arguments = [
            *(place.url, place.kafka.bootstrap_servers, place.topic, place.results, place.group, member, place.mode)
        ]

    def start(self, *trouble: object) -> None:
        command = [sys.executable, "-m", "tests.semantics.service", *self._arguments, *map(str, trouble)]
        self._guarded.start(command, {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})

    async def says(self, what: str) -> None:
        """Since its last start."""
        await eventually(lambda: what in self._guarded.output(), f"that the service says {what!r}", SECONDS)

    async def in_trouble(self) -> None:
        await self.says("trouble: ")

    async def frozen(self) -> None:
        await eventually(self._is_frozen, "that the service is frozen", SECONDS)

    def _is_frozen(self) -> bool:
        found = state_and_parent(self._guarded.pid)
        return found is not None and found[0] == "T"

    def kill(self) -> None:
        self._guarded.stop(signal.SIGKILL)

    def go_on(self) -> None:
        os.kill(self._guarded.pid, signal.SIGUSR1)

    def thaw(self) -> None:
        self._guarded.resume()

    async def stop(self) -> None:
        """It finishes what it has begun."""
        os.kill(self._guarded.pid, signal.SIGTERM)
        code = await asyncio.to_thread(self._guarded.wait, SECONDS)
        assert code == 0, f"the service ended with {code}"

    def tail(self) -> str:
        return self._guarded.tail()

    def close(self) -> None:
        self._guarded.close()


@dataclass
class Place:
    """One cell's; see :func:`place`."""

    mode: str
    url: str
    postgres: Postgres
    kafka: Kafka
    topic: str
    results: str
    relay: RelayProcess
    group: str = field(default_factory=lambda: f"semantics-{uuid4().hex}")
    #: The ids of what was committed.
    ledger: list[str] = field(default_factory=list)
    services: list[Service] = field(default_factory=list)

    def service(self, member: str = "first") -> Service:
        self.services.append(Service(self, member))
        return self.services[-1]

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.url, timeout=10, command_timeout=SECONDS)
        try:
            yield connection
        finally:
            connection.terminate()

    async def write(self, messages: int) -> None:
        """Commit so many in one transaction, which the relay claims together, and roll as many back."""
        for is_kept in (False, True):
            batch = [Message(self.topic, {"number": number}, key="one") for number in range(messages)]
            async with self.connected() as connection:
                transaction = connection.transaction()
                await transaction.start()
                await outbox.add_async(connection, *batch)
                if is_kept:
                    await transaction.commit()
                    self.ledger += [str(message.event_id) for message in batch]
                else:
                    await transaction.rollback()

    async def published(self) -> None:
        """Until the relay has marked everything."""
        async with self.connected() as connection:
            await eventually(
                lambda: connection.fetchval("SELECT NOT EXISTS (SELECT FROM outbox WHERE sent_at IS NULL)"),
                "that all is published",
                SECONDS,
            )

    async def consumed(self) -> None:
        """Until all is published, and the group's offset is at the topic's end."""
        await self.published()
        partition = TopicPartition(self.topic, 0)
        async with AIOKafkaConsumer(
            bootstrap_servers=self.kafka.bootstrap_servers, group_id=self.group, enable_auto_commit=False
        ) as reader:
            reader.assign([partition])

            async def is_at_the_end() -> bool:
                try:
                    async with asyncio.timeout(10):
                        end = (await reader.end_offsets([partition]))[partition]
                        return bool(await reader.committed(partition) == end)
                except (KafkaError, TimeoutError):
                    return False

            await eventually(is_at_the_end, "that all is consumed", SECONDS)

    async def effects(self) -> Counter[str]:
        """How many each message has, by its id."""
        if self.mode == "topic-to-topic":
            records = read_topics(
                self.kafka.bootstrap_servers, [self.results], deadline_seconds=SECONDS, isolation="read_committed"
            )
            return Counter([_id(record.headers) async for record in records])
        async with self.connected() as connection:
            return Counter(row["message"] for row in await connection.fetch("SELECT message FROM effect"))


def _id(headers: Any) -> str:
    return (dict(headers)["id"] or b"").decode()


@contextlib.asynccontextmanager
async def place(mode: str, postgres: Postgres, kafka: Kafka) -> AsyncIterator[Place]:
    name = f"semantics_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.url, timeout=10)
    await admin.execute(f"CREATE DATABASE {name}")
    admin.terminate()
    url = make_url(postgres.url).set(database=name).render_as_string(hide_password=False)
    topic, results = f"orders-{uuid4().hex}", f"results-{uuid4().hex}"
    await kafka.create_topic(topic)
    await kafka.create_topic(results)
    with relay_process(url, kafka.bootstrap_servers, start=False) as relay:
        here = Place(mode, url, postgres, kafka, topic, results, relay)
        async with here.connected() as connection:
            await schema.apply(connection)
            await inbox_schema.apply(connection)
            # Without a unique key, so that repeats are there to be counted.
            await connection.execute("CREATE TABLE effect (message text NOT NULL)")
        relay.start()
        try:
            yield here
        except BaseException:
            sys.stdout.write("".join(f"a service, its last lines:\n{service.tail()}\n" for service in here.services))
            raise
        finally:
            for service in here.services:
                service.close()
    admin = await asyncpg.connect(postgres.url, timeout=10)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.terminate()
