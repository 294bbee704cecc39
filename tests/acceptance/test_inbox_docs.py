"""docs/inbox.md: its examples do what it says they do."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import async_sessionmaker

from outbox_relay.inbox import schema
from outbox_relay.servers import Kafka
from tests.acceptance.inboxes import engine_of
from tests.conftest import Database
from tests.consumed import record
from tests.redis_server import RedisServer
from tests.waiting import eventually

GUIDE = (Path(__file__).parents[2] / "docs" / "inbox.md").read_text()


def examples(*names: str) -> dict[str, Any]:
    """What the code blocks that follow these remarks, ``<!-- tested: name -->``, define."""
    defined: dict[str, Any] = {}
    for name in names:
        match = re.search(rf"<!-- tested: {name} -->\n```python\n(.*?)\n```\n", GUIDE, re.DOTALL)
        assert match is not None, f"docs/inbox.md has no example {name!r}"
        exec(match[1], defined)
    return defined


def expression(argument: str) -> str:
    """What the guide has for an argument, in its text."""
    match = re.search(rf"`{argument}=(lambda.*?)`", GUIDE)
    assert match is not None
    return match[1]


@pytest.fixture
async def connection(database: Database) -> asyncpg.Connection:
    connection = await database.connect()
    await schema.apply(connection)
    await connection.execute("CREATE TABLE charge (order_id text)")
    return connection


async def orders_in(kafka: Kafka, ids: str, *, type_: bytes | None = None) -> str:
    """A new topic with a message for each character; the same one again has the same id."""
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for id_ in ids:
            headers = [("id", b"m" + id_.encode()), *([] if type_ is None else [("type", type_)])]
            await producer.send_and_wait(topic, b"{}", key=id_.encode(), headers=headers)
    return topic


def test_every_example_is_tested_here() -> None:
    assert set(re.findall(r"<!-- tested: (\w+) -->", GUIDE)) == {
        *("consumer", "batch", "prune", "runner", "asyncpg", "faststream", "offsets", "transform", "redis", "guard")
    }
    assert GUIDE.count("```python") == 10


def test_what_it_links_to_exists() -> None:
    docs = Path(__file__).parents[2] / "docs"
    links = re.findall(r"\]\(([^)#:]+)\)", GUIDE)
    assert links
    assert [link for link in links if not (docs / link).exists()] == []


@pytest.mark.parametrize("name", ["consume", "consume_in_batches"])
async def test_each_order_is_charged_once(
    database: Database, connection: asyncpg.Connection, kafka: Kafka, name: str
) -> None:
    topic = await orders_in(kafka, "1213234")
    defined = examples("consumer", "batch", "prune")
    async with (
        asyncpg.create_pool(database.url, min_size=1, max_size=1) as pool,
        AIOKafkaConsumer(
            topic,
            bootstrap_servers=kafka.bootstrap_servers,
            group_id=topic,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        ) as consumer,
    ):
        consuming = asyncio.create_task(defined[name](consumer, pool))
        everything = "SELECT EXISTS (SELECT FROM charge WHERE order_id = '4')"
        await eventually(lambda: connection.fetchval(everything), "the last is charged")
        consuming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consuming
    rows = await connection.fetch("SELECT order_id FROM charge ORDER BY order_id")
    assert [row["order_id"] for row in rows] == ["1", "2", "3", "4"]
    await connection.execute("UPDATE inbox SET handled_at = now() - interval '31 days' WHERE message_id = 'm1'")
    await defined["prune"](connection)
    assert await connection.fetchval("SELECT count(*) FROM inbox") == 3


async def test_the_runner_charges_each_order_once(
    database: Database, connection: asyncpg.Connection, kafka: Kafka
) -> None:
    topic = await orders_in(kafka, "1213", type_=b"order.placed")
    async with engine_of(database.url) as engine:
        sessions = async_sessionmaker(engine)
        consumer = examples("consumer", "runner")["payments"](kafka.bootstrap_servers, topic, sessions)
        running = asyncio.create_task(consumer.run())
        everything = "SELECT count(*) = 3 FROM charge"
        await eventually(lambda: connection.fetchval(everything), "all are charged")
        consumer.stop()
        await running
    rows = await connection.fetch("SELECT order_id FROM charge ORDER BY order_id")
    assert [row["order_id"] for row in rows] == ["1", "2", "3"]


async def test_the_runner_charges_each_order_once_on_asyncpg_alone(
    database: Database, connection: asyncpg.Connection, kafka: Kafka
) -> None:
    topic = await orders_in(kafka, "1213")
    defined = examples("consumer", "runner", "asyncpg")
    async with asyncpg.create_pool(database.url, min_size=1, max_size=4) as pool:
        consumer = defined["Consumer"](
            kafka.bootstrap_servers,
            topic,
            inbox=defined["inbox"],
            transaction=eval(expression("transaction"), defined | {"pool": pool}),
        )
        failures: list[Any] = []

        async def charge(message: Any, connection: asyncpg.Connection) -> None:
            await defined["charge"](connection, message)
            if not failures:  # what it did is rolled back, and it comes again
                failures.append(message)
                raise OSError

        consumer.handler(topic)(charge)
        running = asyncio.create_task(consumer.run())
        await eventually(lambda: connection.fetchval("SELECT count(*) = 3 FROM charge"), "all are charged")
        consumer.stop()
        await running
    rows = await connection.fetch("SELECT order_id FROM charge ORDER BY order_id")
    assert [row["order_id"] for row in rows] == ["1", "2", "3"]


async def test_with_faststream_each_order_is_charged_once(
    database: Database, connection: asyncpg.Connection, kafka: Kafka
) -> None:
    topic = await orders_in(kafka, "1213")
    async with engine_of(database.url) as engine:
        defined = examples("consumer", "runner", "faststream")
        async with defined["payments_broker"](kafka.bootstrap_servers, topic, async_sessionmaker(engine)) as broker:
            await broker.start()
            await eventually(lambda: connection.fetchval("SELECT count(*) = 3 FROM charge"), "all are charged")
    rows = await connection.fetch("SELECT order_id FROM charge ORDER BY order_id")
    assert [row["order_id"] for row in rows] == ["1", "2", "3"]


async def test_each_offset_is_charged_for_once(
    database: Database, connection: asyncpg.Connection, kafka: Kafka
) -> None:
    """By two, one after the other, of which the second goes on where the first ended."""
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic)
    defined = examples("consumer", "offsets")
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for number in (1, 2):
            await producer.send_and_wait(topic, b"{}", key=str(number).encode())
            async with (
                asyncpg.create_pool(database.url, min_size=1, max_size=1) as pool,
                AIOKafkaConsumer(
                    bootstrap_servers=kafka.bootstrap_servers,
                    group_id=f"payments-{uuid4().hex}",
                    enable_auto_commit=False,
                    auto_offset_reset="none",
                ) as consumer,
            ):
                consuming = asyncio.create_task(defined["consume_from_the_database"](consumer, pool, topic))
                charged = f"SELECT count(*) >= {number} FROM charge"
                await eventually(partial(connection.fetchval, charged), "the message is charged")
                consuming.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await consuming
    rows = await connection.fetch("SELECT order_id FROM charge ORDER BY order_id")
    assert [row["order_id"] for row in rows] == ["1", "2"]


async def test_each_order_becomes_one_invoice(kafka: Kafka) -> None:
    orders, invoices = f"orders-{uuid4().hex}", f"invoices-{uuid4().hex}"
    for topic in (orders, invoices):
        await kafka.create_topic(topic)
    async with (
        AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer,
        AIOKafkaConsumer(
            invoices,
            bootstrap_servers=kafka.bootstrap_servers,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
        ) as reader,
    ):
        for number in (b"1", b"2"):
            await producer.send_and_wait(orders, number, key=number)
        transformer = examples("transform")["invoices"](kafka.bootstrap_servers, orders, invoices)
        running = asyncio.create_task(transformer.run())
        async with asyncio.timeout(60):
            read = [(await reader.getone()).value for _ in range(2)]
        transformer.stop()
        await running
    assert read == [b"invoice for 1", b"invoice for 2"]


async def test_each_mail_is_sent_once() -> None:
    defined = examples("redis")
    sent = []

    async def send_mail(message: Any) -> None:
        sent.append(message.offset)
        if len(sent) == 1:
            raise OSError

    defined["send_mail"] = send_mail
    with RedisServer.start() as server:
        async with Redis.from_url(server.url) as redis:
            with pytest.raises(OSError):
                await defined["notify"](redis, record("m1"))
            assert [await defined["notify"](redis, record("m1")) for _ in range(3)] == [True] * 3
            await redis.hdel("inbox:mails:m1", "done")
            assert await defined["notify"](redis, record("m1")) is False
    assert len(sent) == 2


async def test_a_gap_is_raised_and_rolled_back(connection: asyncpg.Connection) -> None:
    defined = examples("guard")
    async with connection.transaction():
        await defined["handle"](connection, record(), 1)
    with pytest.raises(LookupError):
        async with connection.transaction():
            await defined["handle"](connection, record(), 3)
    assert await connection.fetchval("SELECT version FROM inbox_state") == 1
    assert defined["order"].before("paid") == ["placed"]
