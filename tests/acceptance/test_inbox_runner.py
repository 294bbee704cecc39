"""The runner on real servers: one effect each, in order per key, poison to the dead-letter topic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from outbox_relay.inbox import message_id
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.runner import Consumer, PermanentError
from outbox_relay.retry import Backoff
from outbox_relay.servers import Kafka
from tests.acceptance.inboxes import charges_of, engine_of, prepare
from tests.conftest import Database
from tests.waiting import eventually


async def test_effects_come_once_in_order_and_poison_is_buried(database: Database, kafka: Kafka) -> None:
    await prepare(database)
    topic, dead = f"orders-{uuid4().hex}", f"dead-{uuid4().hex}"
    await kafka.create_topic(topic)
    await kafka.create_topic(dead)
    sent = [("a", "m1"), ("b", "m2"), ("a", "m3"), ("a", "m1"), ("b", "poison"), ("b", "m4"), ("c", "")]
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for key, id_ in sent:
            headers = [("id", id_.encode())] if id_ else []
            await producer.send_and_wait(topic, b"{}", key=key.encode(), headers=headers, partition=0)
    failed: list[str] = []
    handled: list[str] = []

    async with asyncpg.create_pool(database.url, min_size=1, max_size=4) as pool:

        @asynccontextmanager
        async def transaction() -> AsyncIterator[Any]:
            async with pool.acquire() as connection, connection.transaction():
                yield connection

        async def charge(message: Any, connection: Any) -> None:
            id_ = message_id(message)
            await connection.execute("INSERT INTO charge VALUES ($1)", id_)
            if id_ == "poison":
                raise PermanentError("never")
            if id_ == "m1" and len(failed) < 2:
                failed.append(id_)
                raise ValueError("try again")
            handled.append(id_)

        async def run_until(group: str, offset: int) -> None:
            consumer = Consumer(
                kafka.bootstrap_servers,
                group,
                inbox=Inbox("payments"),
                transaction=transaction,
                dead_letter_topic=dead,
                backoff=Backoff(0.01, 0.01),
                most_waiting=2,
            )
            consumer.handler(topic)(charge)
            running = asyncio.create_task(consumer.run())
            partition = TopicPartition(topic, 0)
            async with AIOKafkaConsumer(
                bootstrap_servers=kafka.bootstrap_servers, group_id=group, enable_auto_commit=False
            ) as watcher:
                watcher.assign([partition])

                async def is_committed() -> bool:
                    assert not running.done(), running.exception()
                    return bool(await watcher.committed(partition) == offset)

                await eventually(is_committed, "everything is committed")
            consumer.stop()
            await running

        await run_until(topic, len(sent))
        await run_until(f"{topic}-again", len(sent))
    assert await charges_of(database) == {"m1": 1, "m2": 1, "m3": 1, "m4": 1}
    assert [id_ for id_ in handled if id_ in ("m1", "m3")] == ["m1", "m3"]
    async with AIOKafkaConsumer(
        dead, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
    ) as reader:
        letters = [dict((await reader.getone()).headers) for _ in range(2)]
    assert {letter["dead-offset"] for letter in letters} == {b"4", b"6"}
    assert any(letter["dead-reason"] == b"PermanentError: never" for letter in letters)


async def test_an_outage_of_the_database_buries_nothing(database: Database, kafka: Kafka) -> None:
    await prepare(database)
    topic, dead = f"orders-{uuid4().hex}", f"dead-{uuid4().hex}"
    await kafka.create_topic(topic)
    await kafka.create_topic(dead)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        await producer.send_and_wait(topic, b"{}", headers=[("id", b"m1")])
    tries = 0

    async with engine_of(database.url) as engine:

        @asynccontextmanager
        async def transaction() -> AsyncIterator[Any]:
            nonlocal tries
            tries += 1
            async with AsyncSession(engine) as session, session.begin():
                yield session

        consumer = Consumer(
            kafka.bootstrap_servers,
            topic,
            inbox=Inbox("payments"),
            transaction=transaction,
            dead_letter_topic=dead,
            max_attempts=1,
            backoff=Backoff(0.01, 0.01),
        )

        @consumer.handler(topic)
        async def charge(message: Any, session: AsyncSession) -> None:
            if tries <= 5:
                # As by an administrator, or a server that stops.
                await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            await session.execute(text("INSERT INTO charge VALUES ('m1')"))

        running = asyncio.create_task(consumer.run())

        async def is_charged() -> bool:
            assert not running.done(), running.exception()
            return await charges_of(database) == {"m1": 1}

        await eventually(is_charged, "it is charged once the database is back")
        consumer.stop()
        await running
    assert tries > 5
    async with AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers) as reader:
        assert await reader.end_offsets([TopicPartition(dead, 0)]) == {TopicPartition(dead, 0): 0}


async def test_without_a_dead_letter_topic_a_failing_key_waits_and_its_partition_is_paused(kafka: Kafka) -> None:
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for key in ("ok", "bad", "bad", "ok", *["bad"] * 20):
            await producer.send_and_wait(topic, b"{}", key=key.encode(), partition=0)
    consumer = Consumer(
        kafka.bootstrap_servers, topic, backoff=Backoff(0.01, 0.01), max_attempts=2, most_waiting=4, at_once=1
    )
    tries: list[tuple[bytes, int]] = []

    @consumer.handler(topic)
    async def handle(message: Any) -> None:
        tries.append((message.key, message.offset))
        if message.key == b"bad":
            raise PermanentError("never")

    running = asyncio.create_task(consumer.run())
    partition = TopicPartition(topic, 0)
    await eventually(lambda: len(tries) > 10 and partition in consumer._kafka.paused(), "it is tried on, and paused")
    assert {offset for key, offset in tries if key == b"ok"} == {0, 3}
    assert {offset for key, offset in tries if key == b"bad"} == {1}
    assert consumer._partitions[partition].progress.unfinished <= 8
    consumer.stop()
    await running
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=topic, enable_auto_commit=False
    ) as watcher:
        watcher.assign([partition])
        assert await watcher.committed(partition) == 1


async def test_work_is_finished_and_committed_before_its_partition_is_anothers(kafka: Kafka) -> None:
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic, 2)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for partition in (0, 1):
            await producer.send_and_wait(topic, b"{}", key=b"k", partition=partition)
    handled: list[int] = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handle(message: Any) -> None:
        begun.set()
        await go_on.wait()
        handled.append(message.partition)

    members = [Consumer(kafka.bootstrap_servers, topic) for _ in range(2)]
    for member in members:
        member.handler(topic)(handle)
    first = asyncio.create_task(members[0].run())
    await begun.wait()
    second = asyncio.create_task(members[1].run())
    await eventually(
        lambda: any(state.closing.is_set() for state in members[0]._partitions.values()), "partitions are revoked"
    )
    go_on.set()
    await eventually(lambda: all(len(member._partitions) == 1 for member in members), "each has one")
    for member in members:
        member.stop()
    await asyncio.gather(first, second)
    assert sorted(handled) == [0, 1]
