"""The inbox as FastStream's middleware, on real servers; that it survives kills is in test_inbox_kafka.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from faststream import AckPolicy, Context
from faststream.exceptions import AckMessage, RejectMessage
from faststream.kafka import KafkaBroker, KafkaMessage
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from outbox_relay.inbox import message_id
from outbox_relay.inbox.faststream import InboxMiddleware, SubscriberError
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.redis import Claimed, RedisInbox
from outbox_relay.retry import Backoff
from outbox_relay.servers import Kafka
from tests.acceptance.inboxes import charges_of, engine_of, prepare
from tests.conftest import Database
from tests.consumed import record
from tests.redis_server import RedisServer
from tests.waiting import eventually

AT_ONCE = Backoff(0.01, 0.01)


@pytest.fixture
async def topic(kafka: Kafka) -> str:
    name = f"orders-{uuid4().hex}"
    await kafka.create_topic(name)
    return name


async def send(kafka: Kafka, topic: str, *headers: list[tuple[str, bytes]]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for each in headers:
            await producer.send_and_wait(topic, b"{}", headers=each, partition=0)


def ids(*names: str) -> list[list[tuple[str, bytes]]]:
    return [[("id", name.encode())] for name in names]


def id_of(message: KafkaMessage) -> str:
    record: Any = message.raw_message
    return message_id(record)


async def committed(kafka: Kafka, topic: str) -> int | None:
    """The offset of the group, which has the topic's name."""
    partition = TopicPartition(topic, 0)
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=topic, enable_auto_commit=False
    ) as watcher:
        watcher.assign([partition])
        offset: int | None = await watcher.committed(partition)
        return offset


@asynccontextmanager
async def running(
    kafka: Kafka,
    topic: str,
    middleware: InboxMiddleware,
    handler: Any,
    policy: AckPolicy = AckPolicy.NACK_ON_ERROR,
    **options: Any,
) -> AsyncIterator[None]:
    broker = KafkaBroker(kafka.bootstrap_servers, middlewares=[middleware], logger=None, graceful_timeout=1)
    subscriber = broker.subscriber(topic, group_id=topic, auto_offset_reset="earliest", ack_policy=policy, **options)
    subscriber(handler)
    async with broker:
        await broker.start()
        yield


@pytest.mark.parametrize("max_workers", [1, 2])
async def test_repeats_and_failures_have_one_effect_each(
    database: Database, kafka: Kafka, topic: str, max_workers: int
) -> None:
    await prepare(database)
    await send(kafka, topic, *ids("m1", "fails", "m1", "rejected", "acknowledged", "m2", "fails"))
    handled: list[str] = []

    async def charge(message: KafkaMessage, session: Annotated[AsyncSession, Context("inbox_session")]) -> None:
        id_ = id_of(message)
        handled.append(id_)
        await session.execute(text("INSERT INTO charge VALUES (:id)"), {"id": id_})
        if id_ == "fails" and handled.count(id_) < 3:
            raise ValueError("try again")
        if id_ == "rejected":
            raise RejectMessage
        if id_ == "acknowledged":
            raise AckMessage

    async with engine_of(database.url) as engine:
        sessions = async_sessionmaker(engine)
        middleware = InboxMiddleware(Inbox("payments"), transaction=sessions.begin, backoff=AT_ONCE)
        async with running(kafka, topic, middleware, charge, max_workers=max_workers):

            async def is_finished() -> bool:
                return await committed(kafka, topic) == 7

            await eventually(is_finished, "everything is committed")
    assert await charges_of(database) == {"acknowledged": 1, "fails": 1, "m1": 1, "m2": 1}
    assert handled == ["m1", "fails", "fails", "fails", "rejected", "acknowledged", "m2"]


@pytest.mark.parametrize(
    "headers", [[], [("id", b"m2"), ("trace", b"\xff")]], ids=["without an id", "that FastStream can't parse"]
)
async def test_a_message_that_cannot_be_told_is_not_passed_over(
    database: Database, kafka: Kafka, topic: str, headers: list[tuple[str, bytes]]
) -> None:
    await prepare(database)
    await send(kafka, topic, *ids("m1"), headers, *ids("m3"))

    async def charge(message: KafkaMessage, session: Annotated[AsyncSession, Context("inbox_session")]) -> None:
        await session.execute(text("INSERT INTO charge VALUES (:id)"), {"id": id_of(message)})

    async with engine_of(database.url) as engine:
        sessions = async_sessionmaker(engine)
        middleware = InboxMiddleware(Inbox("payments"), transaction=sessions.begin, backoff=AT_ONCE)
        async with running(kafka, topic, middleware, charge):
            await eventually(lambda: sum(middleware._failures.values()) > 3, "it comes again and again")
    assert await charges_of(database) == {"m1": 1}
    assert await committed(kafka, topic) == 1


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (AckPolicy.ACK_FIRST, {"auto_commit_interval_ms": 10}),
        (AckPolicy.ACK, {}),
        (AckPolicy.MANUAL, {}),
        (AckPolicy.NACK_ON_ERROR, {"batch": True}),
    ],
    ids=["ack_first", "ack", "manual", "batch"],
)
async def test_a_subscriber_that_would_lose_messages_is_refused(
    kafka: Kafka, topic: str, policy: AckPolicy, options: dict[str, Any]
) -> None:
    await send(kafka, topic, *ids("m1", "m2"))
    handled = []
    errors: list[BaseException] = []

    class Watching(InboxMiddleware):
        def __call__(self, msg: Any, /, *, context: Any) -> Any:
            handling = super().__call__(msg, context=context)
            check = handling.on_receive

            async def on_receive() -> None:
                try:
                    await check()
                except SubscriberError as error:
                    errors.append(error)
                    raise

            handling.on_receive = on_receive  # type: ignore[method-assign]
            return handling

    async def handle(message: KafkaMessage) -> None:
        handled.append(message)

    @asynccontextmanager
    async def transaction() -> AsyncIterator[Any]:
        yield None

    middleware = Watching(Inbox("payments"), transaction=transaction, backoff=AT_ONCE)
    async with running(kafka, topic, middleware, handle, policy, **options):
        await eventually(lambda: len(errors) > 3, "each message is refused")
    assert handled == []
    assert not await committed(kafka, topic)


async def test_on_redis_a_message_that_another_holds_comes_again(kafka: Kafka, topic: str) -> None:
    await send(kafka, topic, *ids("m1", "m1", "m2"))
    sent: list[str] = []

    async def mail(message: KafkaMessage) -> None:
        sent.append(id_of(message))
        if len(sent) == 1:
            raise OSError

    with RedisServer.start() as server:
        async with Redis.from_url(server.url) as redis:
            inbox = RedisInbox(redis, "mails", lease_seconds=3600, keep_seconds=3600)
            held = await inbox.claim(record("m1"))
            assert isinstance(held, Claimed)
            middleware = InboxMiddleware(inbox, backoff=AT_ONCE)
            async with running(kafka, topic, middleware, mail):
                await eventually(lambda: sum(middleware._failures.values()) > 3, "it comes again and again")
                assert sent == []
                await inbox.release(held)

                async def is_finished() -> bool:
                    return await committed(kafka, topic) == 3

                await eventually(is_finished, "everything is committed")
    assert sent == ["m1", "m1", "m2"]


async def test_messages_that_are_iterated_are_refused(kafka: Kafka, topic: str) -> None:
    """They would count as handled before they are."""
    await send(kafka, topic, *ids("m1"))
    async with Redis() as redis:  # which is asked for nothing
        inbox = RedisInbox(redis, "mails", lease_seconds=1, keep_seconds=1)
        broker = KafkaBroker(
            kafka.bootstrap_servers, middlewares=[InboxMiddleware(inbox, backoff=AT_ONCE)], logger=None
        )
        subscriber = broker.subscriber(topic, auto_offset_reset="earliest", ack_policy=AckPolicy.NACK_ON_ERROR)
        async with broker:
            await broker.start()
            with pytest.raises(SubscriberError):
                await subscriber.get_one(timeout=30)


async def test_what_postgresql_rolls_back_without_an_error_comes_again(
    database: Database, kafka: Kafka, topic: str
) -> None:
    await prepare(database)
    await send(kafka, topic, *ids("m1"))
    tries: list[str] = []

    async def charge(message: KafkaMessage, session: Annotated[AsyncSession, Context("inbox_session")]) -> None:
        tries.append(id_of(message))
        await session.execute(text("INSERT INTO charge VALUES ('m1')"))
        if len(tries) == 1:
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))

    async with engine_of(database.url) as engine:
        middleware = InboxMiddleware(Inbox("payments"), transaction=async_sessionmaker(engine).begin, backoff=AT_ONCE)
        async with running(kafka, topic, middleware, charge):

            async def is_finished() -> bool:
                return await committed(kafka, topic) == 1

            await eventually(is_finished, "it is handled")
    assert tries == ["m1", "m1"]
    assert await charges_of(database) == {"m1": 1}
