"""What goes wrong around the runner's handlers: none of it loses a message, and none buries one that isn't to blame."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from structlog.testing import capture_logs

from outbox_relay.errors import ClaimLostError, OffsetGoneError
from outbox_relay.inbox import handling, message_id, telemetry
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.redis import Claimed, Done
from outbox_relay.inbox.runner import Consumer, PermanentError
from outbox_relay.retry import Backoff
from outbox_relay.servers import Kafka
from tests.acceptance.inboxes import charges_of, prepare
from tests.conftest import Database
from tests.kafka_admin import Admin
from tests.waiting import eventually

FAST = Backoff(0.01, 0.01)


async def topic_with(kafka: Kafka, ids: Sequence[str], value: bytes = b"{}") -> str:
    """All in partition 0, with keys that are the first letters of their ids."""
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic)
    async with AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, acks="all", max_request_size=8_000_000
    ) as producer:
        for id_ in ids:
            await producer.send_and_wait(topic, value, key=id_[:1].encode(), headers=[("id", id_.encode())])
    return topic


async def committed(kafka: Kafka, topic: str) -> int | None:
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=topic, enable_auto_commit=False
    ) as watcher:
        watcher.assign([TopicPartition(topic, 0)])
        offset: int | None = await watcher.committed(TopicPartition(topic, 0))
        return offset


@asynccontextmanager
async def running(consumer: Consumer) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(consumer.run())
    try:
        yield task
    finally:
        consumer.stop()
        await task


def transactions(pool: asyncpg.Pool) -> Callable[[], Any]:
    @asynccontextmanager
    async def transaction() -> AsyncIterator[Any]:
        async with pool.acquire() as connection, connection.transaction():
            yield connection

    return transaction


async def until_committed(kafka: Kafka, topic: str, offset: int) -> None:
    async def is_committed() -> bool:
        return await committed(kafka, topic) == offset

    await eventually(is_committed, f"{offset} is committed")


async def charge(message: Any, connection: Any) -> None:
    await connection.execute("INSERT INTO charge VALUES ($1)", message_id(message))


async def letters_of(kafka: Kafka, dead: str, count: int) -> list[Any]:
    async with AIOKafkaConsumer(
        dead, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
    ) as reader:
        return [await asyncio.wait_for(reader.getone(), 30) for _ in range(count)]


async def test_a_batch_is_one_transaction_and_falls_back_to_single_messages(database: Database, kafka: Kafka) -> None:
    await prepare(database)
    ids = [f"{'abc'[number % 3]}{number}" for number in range(60)]
    ids[20] = "poison"
    topic = await topic_with(kafka, [*ids, *ids[:30]])
    dead = await topic_with(kafka, [])
    transactions_of: dict[str, list[Any]] = {}
    async with asyncpg.create_pool(database.url, min_size=1, max_size=4) as pool:
        consumer = Consumer(
            kafka.bootstrap_servers,
            topic,
            inbox=Inbox("payments"),
            transaction=transactions(pool),
            dead_letter_topic=dead,
            backoff=FAST,
            batch_size=40,
        )

        @consumer.handler(topic)
        async def handle(message: Any, connection: Any) -> None:
            transaction = await connection.fetchval("SELECT pg_current_xact_id()::text")
            transactions_of.setdefault(message_id(message), []).append(transaction)
            await charge(message, connection)
            if message_id(message) == "poison":
                raise PermanentError("never")

        with capture_logs() as logs:
            async with running(consumer):
                await until_committed(kafka, topic, 90)
    assert await charges_of(database) == {id_: 1 for id_ in ids if id_ != "poison"}
    assert [line["event"] for line in logs].count("message.dead") == 2, "the repeat of a dead one is dead, too"
    assert any(line["event"] == "batch.failed" and line["error"] == "PermanentError" for line in logs)
    # Those behind the batch that failed shared transactions.
    assert len({transactions_of[id_][-1] for id_ in ids[40:]}) < 10


async def swallow(message: Any, connection: Any) -> None:
    await charge(message, connection)
    with suppress(asyncpg.PostgresError):
        await connection.execute("SELECT 1 / 0")


@pytest.mark.parametrize("batch_size", [1, 10])
async def test_what_postgresql_rolls_back_without_an_error_is_not_finished(
    database: Database, kafka: Kafka, batch_size: int
) -> None:
    letters = await letters_of_what_is_swallowed(database, kafka, batch_size)
    assert all(dict(each.headers)["dead-reason"].startswith(b"InFailedSQLTransactionError") for each in letters)
    assert len(letters) == 2


async def letters_of_what_is_swallowed(database: Database, kafka: Kafka, batch_size: int) -> list[Any]:
    await prepare(database)
    topic, dead = await topic_with(kafka, ["m1", "m2"]), await topic_with(kafka, [])
    async with asyncpg.create_pool(database.url, min_size=1, max_size=4) as pool:
        consumer = Consumer(
            kafka.bootstrap_servers,
            topic,
            inbox=Inbox("payments"),
            transaction=transactions(pool),
            dead_letter_topic=dead,
            max_attempts=2,
            backoff=FAST,
            batch_size=batch_size,
        )
        consumer.handler(topic)(swallow)
        async with running(consumer):
            await until_committed(kafka, topic, 2)
    async with AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers) as reader:
        count = (await reader.end_offsets([TopicPartition(dead, 0)]))[TopicPartition(dead, 0)]
    return await letters_of(kafka, dead, count)


async def test_the_broken_variant_that_does_not_look_loses_it(
    database: Database, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unasked(connection: Any) -> None: ...

    monkeypatch.setattr(handling, "require_unbroken", unasked)
    assert await letters_of_what_is_swallowed(database, kafka, 1) == []
    assert await charges_of(database) == {}


async def test_what_fails_before_the_handler_buries_nothing(database: Database, kafka: Kafka) -> None:
    topic, dead = await topic_with(kafka, ["m1"]), await topic_with(kafka, [])
    await prepare(database)
    async with asyncpg.create_pool(database.url, min_size=1, max_size=4) as pool:
        await pool.execute("ALTER TABLE inbox RENAME TO away")
        consumer = Consumer(
            kafka.bootstrap_servers,
            topic,
            inbox=Inbox("payments"),
            transaction=transactions(pool),
            dead_letter_topic=dead,
            max_attempts=1,
            backoff=FAST,
        )
        consumer.handler(topic)(charge)
        with capture_logs() as logs:
            async with running(consumer):
                await eventually(
                    lambda: sum(line.get("error") == "UndefinedTableError" for line in logs) > 3,
                    "the inbox's table is missed",
                )
                await pool.execute("ALTER TABLE away RENAME TO inbox")
                await until_committed(kafka, topic, 1)
    assert await charges_of(database) == {"m1": 1}
    assert {line["attempts"] for line in logs if line["event"] == "message.failed"} == {0}


async def test_a_large_message_that_fails_is_buried(kafka: Kafka) -> None:
    admin = Admin(kafka.bootstrap_servers)
    topic, dead = await topic_with(kafka, []), await topic_with(kafka, [])
    for each in (topic, dead):
        await admin.configure(each, {"max.message.bytes": "4000000"})
    async with AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, acks="all", max_request_size=8_000_000
    ) as producer:
        await producer.send_and_wait(topic, b"x" * 2_000_000)
    consumer = Consumer(kafka.bootstrap_servers, topic, dead_letter_topic=dead, max_attempts=1, backoff=FAST)

    @consumer.handler(topic)
    async def handle(message: Any) -> None:
        raise ValueError

    async with running(consumer):
        (letter,) = await letters_of(kafka, dead, 1)
    assert len(letter.value) == 2_000_000


async def test_messages_that_kafka_has_deleted_are_an_error_and_not_passed_over(kafka: Kafka) -> None:
    topic = await topic_with(kafka, ["m1", "m2", "m3", "m4"])
    handled: list[int] = []

    def consumer() -> Consumer:
        new = Consumer(kafka.bootstrap_servers, topic)

        @new.handler(topic)
        async def handle(message: Any) -> None:
            handled.append(message.offset)

        return new

    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=topic, enable_auto_commit=False
    ) as watcher:
        watcher.assign([TopicPartition(topic, 0)])
        await watcher.commit({TopicPartition(topic, 0): 1})
    await Admin(kafka.bootstrap_servers).delete_records(topic, 0, 3)
    with pytest.raises(OffsetGoneError, match=f"{topic}-0 1, the first is 3"):
        await consumer().run()
    assert (handled, await committed(kafka, topic)) == ([], 1)
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=topic, enable_auto_commit=False
    ) as watcher:
        watcher.assign([TopicPartition(topic, 0)])
        # As of a topic that was longer before it was made anew.
        await watcher.commit({TopicPartition(topic, 0): 9})
    with pytest.raises(OffsetGoneError, match=f"{topic}-0 9"):
        await consumer().run()
    assert (handled, await committed(kafka, topic)) == ([], 9)


async def test_a_group_that_is_new_begins_at_the_first_message_that_is_there(kafka: Kafka) -> None:
    topic = await topic_with(kafka, ["m1", "m2", "m3"])
    await Admin(kafka.bootstrap_servers).delete_records(topic, 0, 2)
    consumer = Consumer(kafka.bootstrap_servers, topic)
    handled: list[int] = []

    @consumer.handler(topic)
    async def handle(message: Any) -> None:
        handled.append(message.offset)

    async with running(consumer):
        await until_committed(kafka, topic, 3)
    assert handled == [2]


async def test_it_stops_although_its_topic_is_not_there_yet(kafka: Kafka) -> None:
    consumer = Consumer(kafka.bootstrap_servers, "missing", consumer_settings={"metadata_max_age_ms": 100})

    @consumer.handler(f"missing-{uuid4().hex}")
    async def handle(message: Any) -> None: ...

    async with running(consumer) as task:
        await eventually(lambda: consumer._kafka is not None, "it has begun")
        assert not task.done()


async def test_it_stops_although_kafka_no_longer_answers(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox_relay.inbox.runner._COMMIT_SECONDS", 0.2)
    monkeypatch.setattr("outbox_relay.inbox.runner._CLOSE_SECONDS", 0.2)
    topic = await topic_with(kafka, ["m1"])
    consumer = Consumer(kafka.bootstrap_servers, topic)
    handled = asyncio.Event()

    @consumer.handler(topic)
    async def handle(message: Any) -> None:
        # From now on the client waits for answers that don't come.
        async def silent(*arguments: Any, **options: Any) -> None:
            await asyncio.Event().wait()

        consumer._kafka._client.send = silent
        handled.set()

    with capture_logs() as logs:
        async with running(consumer):
            await handled.wait()
    events = [line["event"] for line in logs]
    assert "offsets.uncommitted" in events
    assert "consumer.not_closed" in events


async def test_a_handler_whose_task_is_cancelled_ends_the_consumer_and_finishes_nothing(kafka: Kafka) -> None:
    topic = await topic_with(kafka, ["m1"])
    consumer = Consumer(kafka.bootstrap_servers, topic)

    @consumer.handler(topic)
    async def handle(message: Any) -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="was cancelled"):
        await consumer.run()
    assert await committed(kafka, topic) is None


class _Redis:
    """Answers of a ``RedisInbox`` that can't be provoked of a real one at the right moment."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.claims = self.marks = 0

    async def claim(self, message: Any) -> Claimed | Done:
        self.claims += 1
        return Claimed(self.claims, "m1", "m1")

    async def done(self, claim: Claimed) -> None:
        self.marks += 1
        if (answer := self.answers.pop(0)) is not None:
            raise answer


@pytest.mark.parametrize(
    ("answers", "is_marked"),
    [([OSError(), OSError(), None], True), ([ClaimLostError()], False), ([OSError()] * 5, False)],
    ids=["away for a while", "claimed by another", "away for long"],
)
async def test_an_effect_that_can_not_be_marked_on_redis_is_not_made_again(
    kafka: Kafka, answers: list[Exception | None], is_marked: bool
) -> None:
    topic = await topic_with(kafka, ["m1"])
    redis = _Redis(*answers)
    consumer = Consumer(kafka.bootstrap_servers, topic, inbox=redis, backoff=FAST)  # type: ignore[arg-type]
    handled: list[int] = []

    @consumer.handler(topic)
    async def handle(message: Any) -> None:
        handled.append(message.offset)

    with capture_logs() as logs:
        async with running(consumer):
            await until_committed(kafka, topic, 1)
    assert (handled, redis.claims, redis.marks) == ([0], 1, len(answers))
    assert ("message.unmarked" not in [line["event"] for line in logs]) is is_marked


async def test_progress_is_one_line_an_interval(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_PROGRESS_SECONDS", 0.1)
    topic = await topic_with(kafka, ["a1", "b1", "b2", "b3"])
    consumer = Consumer(kafka.bootstrap_servers, topic, backoff=Backoff(3600, 3600))

    @consumer.handler(topic)
    async def handle(message: Any) -> None:
        if message.key == b"b":
            raise ValueError

    with capture_logs() as logs:
        async with running(consumer):
            lines = await eventually(lambda: [line for line in logs if line["event"] == "consumer.progress"], "a line")
            await until_committed(kafka, topic, 1)
    assert sum(line["handled"] for line in lines) == 1
    assert sum(line["failed"] for line in lines) <= 1
    assert lines[-1]["lag"] in (3, 4)


async def test_what_was_handled_since_the_last_line_is_said_at_the_stop(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_PROGRESS_SECONDS", 3600)
    topic = await topic_with(kafka, ["a1", "a2", "b1", "b2"])
    consumer = Consumer(kafka.bootstrap_servers, topic, backoff=Backoff(3600, 3600))
    begun = asyncio.Event()

    @consumer.handler(topic)
    async def handle(message: Any) -> None:
        if message.key == b"b":
            raise ValueError
        if message.offset == 1:
            begun.set()
            await consumer._stopping.wait()  # in work when it is told to stop

    with capture_logs() as logs:
        async with running(consumer):
            await begun.wait()
            await eventually(lambda: any(line["event"] == "message.failed" for line in logs), "the third has failed")
    (line,) = (line for line in logs if line["event"] == "consumer.progress")
    assert (line["handled"], line["repeated"], line["failed"], line["dead"], line["lag"]) == (2, 0, 1, 0, 2)


def refused() -> list[tuple[dict[str, Any], type[Exception], str]]:
    return [
        ({"batch_size": 2}, ValueError, "batch_size above 1 needs an Inbox"),
        ({"at_once": 0}, ValueError, "1 or more"),
        ({"settings": {"sasl_mechanisms": "PLAIN"}}, TypeError, "sasl_mechanisms"),
        ({"dead_letter_topic": "dead", "producer_settings": {"ack": 1}}, TypeError, "ack"),
        ({"dead_letter_topic": "dead", "settings": {"session_timeout_ms": 1}}, TypeError, "session_timeout_ms"),
    ]


@pytest.mark.parametrize(("arguments", "error", "text"), refused())
async def test_what_it_can_not_be_made_with_is_said_at_once(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Consumer("localhost:9092", "payments", **arguments)
