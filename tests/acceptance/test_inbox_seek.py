"""Offsets in the database, and a real group: partitions are taken beside one another, whatever becomes of one; members
that live hand them over; and each message is charged for once.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from sqlalchemy import make_url

from outbox_relay.errors import PartitionBusyError, PartitionLostError, PassedOverError
from outbox_relay.inbox import message_id
from outbox_relay.inbox.offsets import Offsets, SeekOnAssignment
from outbox_relay.servers import Kafka
from tests.acceptance.inboxes import charges_of, engine_of, prepare
from tests.conftest import Database
from tests.consumed import record
from tests.tcp_proxy import TcpProxy
from tests.waiting import eventually

#: By partition, what each holds in the beginning.
IDS = [[f"p{partition}-{number}" for number in range(4)] for partition in range(2)]
ONCE_EACH = dict.fromkeys([id_ for ids in IDS for id_ in ids], 1)


class Seek(SeekOnAssignment, ConsumerRebalanceListener):  # type: ignore[misc]
    """As aiokafka wants a listener to be; it remembers what it was given last."""

    given: frozenset[TopicPartition] = frozenset()

    async def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        await super().on_partitions_assigned(assigned)
        self.given = frozenset(assigned)


class Impatient(Offsets):
    """Waits for locks no time at all, and counts how often it met one."""

    def __init__(self) -> None:
        super().__init__("payments", lock_timeout_seconds=0.001)
        self.found_busy = 0

    async def take(self, *args: Any, **options: Any) -> int:
        try:
            return await super().take(*args, **options)
        except PartitionBusyError:
            self.found_busy += 1
            raise


@pytest.fixture
async def inbox_database(database: Database) -> Database:
    await prepare(database)
    return database


@pytest.fixture
async def topic(kafka: Kafka) -> str:
    name = f"orders-{uuid4().hex}"
    await kafka.create_topic(name, 2)
    await send(kafka, name, IDS)
    return name


async def send(kafka: Kafka, topic: str, ids: list[list[str]]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for partition, of_partition in enumerate(ids):
            for id_ in of_partition:
                await producer.send_and_wait(topic, b"{}", headers=[("id", id_.encode())], partition=partition)


@asynccontextmanager
async def pool_of(url: str, **options: Any) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(url, min_size=0, max_size=2, **options) as pool:
        yield pool


@asynccontextmanager
async def consumer_of(kafka: Kafka, **options: Any) -> AsyncIterator[AIOKafkaConsumer]:
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, enable_auto_commit=False, auto_offset_reset="none", **options
    ) as consumer:
        yield consumer


@asynccontextmanager
async def assigned(kafka: Kafka, topic: str) -> AsyncIterator[tuple[AIOKafkaConsumer, TopicPartition, TopicPartition]]:
    first, second = TopicPartition(topic, 0), TopicPartition(topic, 1)
    async with consumer_of(kafka) as consumer:
        consumer.assign([first, second])
        yield consumer, first, second


@asynccontextmanager
async def handling(database: Database, topic: str) -> AsyncIterator[tuple[Offsets, asyncpg.Connection]]:
    """Another has partition 0, and a transaction open in which it handles the second message."""
    connection = await database.connect()
    old = Offsets("payments")
    async with connection.transaction():
        await old.take(connection, topic, 0, beginning=1, end=4)
    async with connection.transaction():
        await handle(old, connection, record(IDS[0][1], topic=topic, partition=0, offset=1))
        yield old, connection


async def handle(offsets: Offsets, connection: asyncpg.Connection, message: Any) -> None:
    if await offsets.accept(connection, message):
        await connection.execute("INSERT INTO charge VALUES ($1)", message_id(message))


async def consume(consumer: AIOKafkaConsumer, offsets: Offsets, connection: asyncpg.Connection, many: int) -> None:
    async with asyncio.timeout(60):
        for _ in range(many):
            message = await consumer.getone()
            async with connection.transaction():
                await handle(offsets, connection, message)


Opener: TypeAlias = Callable[[str], AbstractAsyncContextManager[Any]]


@pytest.mark.parametrize("open_", [pool_of, engine_of])
async def test_a_partition_whose_last_owner_has_a_transaction_open_waits_and_holds_up_nothing(
    inbox_database: Database, kafka: Kafka, topic: str, open_: Opener
) -> None:
    offsets, connection = Impatient(), await inbox_database.connect()
    async with open_(inbox_database.url) as database, assigned(kafka, topic) as (consumer, first, second):
        async with handling(inbox_database, topic):
            async with asyncio.timeout(60):
                await Seek(offsets, consumer, database).on_partitions_assigned([first, second])
            await consume(consumer, offsets, connection, 4)
            await eventually(lambda: offsets.found_busy > 1, "the partition was tried again")
            assert consumer.paused() == {first}
        await consume(consumer, offsets, connection, 2)
    charged = await charges_of(inbox_database)
    assert charged == {id_: times for id_, times in ONCE_EACH.items() if id_ != IDS[0][0]}


async def test_of_a_partition_that_cannot_be_taken_nothing_is_handled_or_passed_over(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    """Kafka has deleted its first message, so nothing can be read from offset 0 on."""
    offsets, connection = Impatient(), await inbox_database.connect()
    errors: list[PartitionLostError] = []
    frames = []
    async with pool_of(inbox_database.url) as pool, assigned(kafka, topic) as (consumer, first, second):
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
        await admin.start()
        try:
            await admin.delete_records({first: RecordsToDelete(1)})
        finally:
            await admin.close()
        seek = Seek(offsets, consumer, pool, give_up_seconds=0)
        async with handling(inbox_database, topic), asyncio.timeout(60):
            await seek.on_partitions_assigned([first, second])
            for _ in range(3 + 4):
                message = await consumer.getone()
                try:
                    async with connection.transaction():
                        await handle(offsets, connection, message)
                except PartitionLostError as error:
                    assert message.partition == 0
                    errors.append(error)
                    frames.append(len(traceback.extract_tb((error.__cause__ or error).__traceback__)))
        assert len({id(error) for error in errors}) == 3
        assert [type(error.__cause__) for error in errors] == [PartitionBusyError] * 3
        assert len(set(frames)) == 1
        await seek.on_partitions_revoked([first, second])
        await seek.on_partitions_assigned([first, second])
        await consume(consumer, offsets, connection, 2)
    charged = await charges_of(inbox_database)
    assert charged == {id_: times for id_, times in ONCE_EACH.items() if id_ != IDS[0][0]}


async def test_an_outage_of_the_database_is_waited_out(inbox_database: Database, kafka: Kafka, topic: str) -> None:
    url = make_url(inbox_database.url)
    offsets, connection, failed = Offsets("payments"), await inbox_database.connect(), 0

    async def connect(*args: Any, **options: Any) -> asyncpg.Connection:
        nonlocal failed
        try:
            return await asyncpg.connect(*args, **options)
        except OSError:
            failed += 1
            raise

    async with TcpProxy(url.host or "127.0.0.1", url.port or 5432) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.own_port).render_as_string(hide_password=False)
        await proxy.refuse()
        async with (
            pool_of(through, connect=connect) as pool,
            assigned(kafka, topic) as (consumer, first, second),
        ):
            await Seek(offsets, consumer, pool).on_partitions_assigned([first, second])
            await eventually(lambda: failed > 2, "a partition was tried again")
            await proxy.accept()
            await consume(consumer, offsets, connection, 8)
    assert await charges_of(inbox_database) == ONCE_EACH


async def test_what_does_not_pass_is_said_at_once(inbox_database: Database, kafka: Kafka, topic: str) -> None:
    offsets, connection = Offsets("payments"), await inbox_database.connect()
    async with (
        pool_of(inbox_database.url, server_settings={"search_path": "nowhere"}) as pool,
        assigned(kafka, topic) as (consumer, first, second),
    ):
        await Seek(offsets, consumer, pool, give_up_seconds=3_600).on_partitions_assigned([first, second])
        with pytest.raises(PartitionLostError, match="couldn't be taken, start the consumer anew: UndefinedTableError"):
            await consume(consumer, offsets, connection, 1)


async def test_a_consumer_that_was_stopped_takes_nothing(inbox_database: Database, kafka: Kafka, topic: str) -> None:
    offsets, others = Impatient(), asyncio.all_tasks()
    async with pool_of(inbox_database.url) as pool:
        async with handling(inbox_database, topic) as (old, connection), assigned(kafka, topic) as (consumer, first, _):
            await Seek(offsets, consumer, pool).on_partitions_assigned([first])
            await eventually(lambda: offsets.found_busy, "the partition is tried")
        await eventually(lambda: asyncio.all_tasks() <= others, "nothing of the consumer is at work")
        async with connection.transaction():
            assert await old.accept(connection, record(topic=topic, partition=0, offset=2))


async def charge_and_accept(
    offsets: Offsets, connection: asyncpg.Connection, message: Any, may_go_on: asyncio.Event
) -> None:
    async with connection.transaction():
        await handle(offsets, connection, message)
        await may_go_on.wait()


async def charge_before_accepting(
    offsets: Offsets, connection: asyncpg.Connection, message: Any, may_go_on: asyncio.Event
) -> None:
    """Broken: the offset isn't in the transaction of the effects."""
    await connection.execute("INSERT INTO charge VALUES ($1)", message_id(message))
    await may_go_on.wait()
    async with connection.transaction():
        await offsets.accept(connection, message)


class Member:
    """Of a group; it goes on with what comes next, whatever becomes of a message."""

    def __init__(self, consumer: AIOKafkaConsumer, pool: asyncpg.Pool, topic: str, handler: Any) -> None:
        self.offsets = Offsets("payments")
        self.listener = Seek(self.offsets, consumer, pool)
        self.may_go_on = asyncio.Event()
        consumer.subscribe([topic], listener=self.listener)
        self._consumer, self._handler = consumer, handler

    async def run(self, connection: asyncpg.Connection) -> None:
        while True:
            message = await self._consumer.getone()
            try:
                await self._handler(self.offsets, connection, message, self.may_go_on)
            except (PartitionLostError, PassedOverError):
                continue


async def charges_after_handing_over(
    database: Database, kafka: Kafka, topic: str, handler: Any
) -> tuple[dict[str, int], dict[str, int]]:
    """A member is in the middle of a message when another joins, which leaves later; what is charged, and is to be."""
    sent = Counter(ONCE_EACH)
    settings = {"group_id": topic, "heartbeat_interval_ms": 100}
    async with pool_of(database.url) as pool, AsyncExitStack() as first, AsyncExitStack() as second:

        async def join(stack: AsyncExitStack) -> Member:
            consumer = await stack.enter_async_context(consumer_of(kafka, **settings))
            member = Member(consumer, pool, topic, handler)
            running = asyncio.create_task(member.run(await database.connect()))
            stack.callback(running.cancel)
            return member

        async def charged() -> bool:
            return set(await charges_of(database)) == set(sent)

        one = await join(first)
        await eventually(lambda: len(one.listener.given) == 2, "the first has both")
        watcher = await database.connect()
        begun = (
            "SELECT EXISTS (SELECT FROM charge) OR EXISTS (SELECT FROM pg_locks WHERE relation = 'charge'::regclass)"
        )
        await eventually(partial(watcher.fetchval, begun), "a message is in work")
        other = await join(second)
        other.may_go_on.set()
        await eventually(lambda: len(one.listener.given) == len(other.listener.given) == 1, "each has one")
        one.may_go_on.set()
        await eventually(charged, "all are charged for")
        more = [["p0-more"], ["p1-more"]]
        sent.update(id_ for ids in more for id_ in ids)
        await send(kafka, topic, more)
        await eventually(charged, "so is what was sent to both")
        await second.aclose()
        await eventually(lambda: len(one.listener.given) == 2, "the first has both again")
        last = [["p0-last"], ["p1-last"]]
        sent.update(id_ for ids in last for id_ in ids)
        await send(kafka, topic, last)
        await eventually(charged, "so is what was sent to the one that is left")
    return await charges_of(database), dict(sent)


async def test_members_that_hand_partitions_over_have_one_effect_each(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    charged, sent = await charges_after_handing_over(inbox_database, kafka, topic, charge_and_accept)
    assert charged == sent


async def test_members_whose_offset_is_in_another_transaction_are_caught(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    charged, sent = await charges_after_handing_over(inbox_database, kafka, topic, charge_before_accepting)
    assert set(charged) == set(sent)
    assert charged != sent
