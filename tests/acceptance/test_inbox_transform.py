"""From topic to topic on real Kafka: a reader of what is committed sees each output once, in order per key, although
the consumer is killed between each pair of steps, frozen and replaced, or loses its partitions.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import ProducerFenced

from outbox_relay.errors import OffsetGoneError
from outbox_relay.inbox.runner import PermanentError
from outbox_relay.inbox.transform import Output, Transformer
from outbox_relay.retry import Backoff
from outbox_relay.servers import Kafka
from tests.acceptance.inbox_transform_process import STEPS
from tests.kafka_admin import Admin
from tests.waiting import eventually

KEYS = ("a", "b", "a", "b", "a", "b", "a")
AT = 4
ALL = {"a": ["0", "2", "4", "6"], "b": ["1", "3", "5"]}


@pytest.fixture
async def topic(kafka: Kafka) -> str:
    """With a message for each of the keys, in one partition."""
    name = f"orders-{uuid4().hex}"
    await kafka.create_topic(name)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for key in KEYS:
            await producer.send_and_wait(name, b"{}", key=key.encode(), partition=0)
    return name


@pytest.fixture
async def outputs(kafka: Kafka) -> str:
    name = f"outputs-{uuid4().hex}"
    await kafka.create_topic(name, 2)
    return name


async def committed_in(kafka: Kafka, topic: str) -> list[Any]:
    """All messages of the topic that are committed; none is in a transaction that is still open."""
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, isolation_level="read_committed", auto_offset_reset="earliest"
    ) as reader:
        await reader._client._wait_on_metadata(topic)
        partitions = [TopicPartition(topic, number) for number in sorted(reader.partitions_for_topic(topic) or ())]
        reader.assign(partitions)
        async with AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers) as uncommitted:
            ends = await uncommitted.end_offsets(partitions)
        assert await reader.end_offsets(partitions) == ends, "a transaction is open"
        messages: list[Any] = []
        for partition in partitions:
            while await reader.position(partition) < ends[partition]:
                messages += (await reader.getmany(partition, timeout_ms=100)).get(partition, [])
    return messages


async def values_by_key(kafka: Kafka, topic: str) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for message in await committed_in(kafka, topic):
        values.setdefault(message.key.decode(), []).append(message.value.decode())
    return values


# -- processes that are killed and frozen


@asynccontextmanager
async def process(
    kafka: Kafka, topic: str, outputs: str, group: str, variant: str = "right", *stop: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Killed at the end, if it is still there."""
    arguments = [kafka.bootstrap_servers, topic, outputs, group, variant, *stop]
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.acceptance.inbox_transform_process", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        async with asyncio.timeout(120):
            yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def says(started: asyncio.subprocess.Process, what: str) -> str:
    """The first line with the text."""
    assert started.stdout is not None
    while line := (await started.stdout.readline()).decode():
        if what in line:
            return line
    raise AssertionError(f"it ended without saying {what!r}")


async def outputs_after_a_kill(kafka: Kafka, topic: str, outputs: str, step: str, variant: str) -> dict[str, list[str]]:
    group = f"enrich-{uuid4().hex}"
    async with process(kafka, topic, outputs, group, variant, step, str(AT), "wait") as killed:
        await says(killed, "stopped")
        killed.kill()
        await killed.wait()
    async with process(kafka, topic, outputs, group) as next_one:
        await says(next_one, "done")
    return await values_by_key(kafka, outputs)


@pytest.mark.parametrize("step", STEPS)
async def test_each_output_is_there_once_although_the_process_is_killed(
    kafka: Kafka, topic: str, outputs: str, step: str
) -> None:
    assert await outputs_after_a_kill(kafka, topic, outputs, step, "right") == ALL


async def test_offsets_outside_the_transaction_are_caught(kafka: Kafka, topic: str, outputs: str) -> None:
    assert await outputs_after_a_kill(kafka, topic, outputs, "offset", "offsets_outside") == {
        "a": ["0", "2", "6"],
        "b": ["1"],
    }


async def test_a_frozen_process_that_was_replaced_commits_nothing(kafka: Kafka, topic: str, outputs: str) -> None:
    group = f"enrich-{uuid4().hex}"
    async with process(kafka, topic, outputs, group, "right", "offset", str(AT), "freeze") as frozen:
        await says(frozen, "stopped")
        async with process(kafka, topic, outputs, group) as next_one:
            await says(next_one, "done")
        frozen.send_signal(signal.SIGCONT)
        assert "ProducerFenced" in await says(frozen, "transaction.failed")
    assert await values_by_key(kafka, outputs) == ALL


# -- in this process


def transformer_of(
    kafka: Kafka,
    topic: str,
    outputs: str,
    *,
    kind: type[Transformer] = Transformer,
    transform: Callable[[Any], Awaitable[list[Output]]] | None = None,
    **options: Any,
) -> Transformer:
    async def to_output(message: Any) -> list[Output]:
        return [Output(outputs, str(message.offset).encode(), message.key)]

    return kind(
        kafka.bootstrap_servers,
        topic,
        topics=[topic],
        transform=transform or to_output,
        **{"backoff": Backoff(0.01, 0.1), **options},
    )


async def run_to_the_end(kafka: Kafka, topic: str, transformer: Transformer, end: int = len(KEYS)) -> None:
    running = asyncio.create_task(transformer.run())
    partition = TopicPartition(topic, 0)
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=topic, enable_auto_commit=False
    ) as watcher:
        watcher.assign([partition])

        async def is_committed() -> bool:
            assert not running.done(), running.exception()
            return bool(await watcher.committed(partition) == end)

        await eventually(is_committed, "all is committed")
    transformer.stop()
    await running


@asynccontextmanager
async def last_owner(kafka: Kafka, topic: str, outputs: str) -> AsyncIterator[AIOKafkaProducer]:
    """One that has sent the outputs of the first two messages, and is about to send the offset and to commit."""
    async with AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, transactional_id=f"{topic}:{topic}:0"
    ) as producer:
        await producer.begin_transaction()
        for offset in (0, 1):
            await producer.send_and_wait(outputs, str(offset).encode(), key=KEYS[offset].encode())
        yield producer


async def commit_of_two(producer: AIOKafkaProducer, topic: str) -> None:
    await producer.send_offsets_to_transaction({TopicPartition(topic, 0): 2}, topic)
    await producer.commit_transaction()


class OneIdForEachProcess(Transformer):
    """Broken: an owner of the partition doesn't fence the one before."""

    def _transactional_id(self, partition: TopicPartition) -> str:
        return f"{self._group}-{uuid4()}"


@pytest.mark.parametrize("kind", [Transformer, OneIdForEachProcess])
async def test_the_last_owner_commits_nothing_once_there_is_another(
    kafka: Kafka, topic: str, outputs: str, kind: type[Transformer]
) -> None:
    async with last_owner(kafka, topic, outputs) as producer:
        await run_to_the_end(kafka, topic, transformer_of(kafka, topic, outputs, kind=kind))
        if kind is Transformer:
            with pytest.raises(ProducerFenced):
                await commit_of_two(producer, topic)
        else:
            await commit_of_two(producer, topic)
    values = await values_by_key(kafka, outputs)
    assert (values == ALL) is (kind is Transformer), values


class LastOwnerCommits(Transformer):
    """The last owner commits when this one takes over."""

    def __init__(self, *arguments: Any, producer: AIOKafkaProducer, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._last_owner: AIOKafkaProducer | None = producer

    async def _let_it_commit(self) -> None:
        if (producer := self._last_owner) is not None:
            self._last_owner = None
            await commit_of_two(producer, self._group)

    async def _start(self, producer: Any, partition: TopicPartition) -> int:
        await self._let_it_commit()
        return await super()._start(producer, partition)


class PositionBeforeTheFence(LastOwnerCommits):
    """Broken: what the last owner commits in between is transformed again."""

    async def _start(self, producer: Any, partition: TopicPartition) -> int:
        async with AIOKafkaConsumer(
            bootstrap_servers=self._consumer_settings["bootstrap_servers"],
            group_id=self._group,
            enable_auto_commit=False,
        ) as consumer:
            consumer.assign([partition])
            position = await consumer.committed(partition) or 0
        await self._let_it_commit()
        await producer.start()
        return position


@pytest.mark.parametrize("kind", [LastOwnerCommits, PositionBeforeTheFence])
async def test_what_the_last_owner_commits_before_it_is_fenced_is_not_transformed_again(
    kafka: Kafka, topic: str, outputs: str, kind: type[LastOwnerCommits]
) -> None:
    async with last_owner(kafka, topic, outputs) as producer:
        await run_to_the_end(kafka, topic, transformer_of(kafka, topic, outputs, kind=kind, producer=producer))
    values = await values_by_key(kafka, outputs)
    assert (values == ALL) is (kind is LastOwnerCommits), values


class AnswersUnread(Transformer):
    """Broken: aiokafka commits a transaction although Kafka refused a part of it."""

    async def _send(self, producer: Any, outputs: Sequence[Output]) -> None:
        for output in outputs:
            await producer.send(output.topic, output.value, output.key)


@pytest.mark.parametrize("kind", [Transformer, AnswersUnread])
async def test_a_refused_output_takes_back_all_of_its_transaction(
    kafka: Kafka, topic: str, outputs: str, kind: type[Transformer]
) -> None:
    narrow = f"narrow-{uuid4().hex}"
    await kafka.create_topic(narrow, 1, {"max.message.bytes": "1000"})
    large = [b"x" * 2000]

    async def transform(message: Any) -> list[Output]:
        value = str(message.offset).encode()
        return [
            Output(outputs, value, message.key),
            Output(narrow, large.pop() if large else value, message.key),
        ]

    await run_to_the_end(kafka, topic, transformer_of(kafka, topic, outputs, kind=kind, transform=transform))
    assert await values_by_key(kafka, outputs) == ALL
    assert (await values_by_key(kafka, narrow) == ALL) is (kind is Transformer)


async def test_a_message_that_fails_is_tried_again_and_buried_in_its_transaction(
    kafka: Kafka, topic: str, outputs: str
) -> None:
    dead = f"dead-{uuid4().hex}"
    await kafka.create_topic(dead)
    failing: dict[int, list[Exception]] = {1: [ValueError("try again")] * 2, 2: [OSError("away")] * 5}
    tried: list[int] = []

    async def transform(message: Any) -> list[Output]:
        tried.append(message.offset)
        if message.offset == 3:
            raise PermanentError("never")
        if message.offset == 5:
            raise ValueError("whatever")
        if errors := failing.get(message.offset):
            raise errors.pop()
        if message.offset == 6:
            return []
        return [Output(outputs, str(message.offset).encode(), message.key)]

    options: dict[str, Any] = {"dead_letter_topic": dead, "max_attempts": 3}
    await run_to_the_end(kafka, topic, transformer_of(kafka, topic, outputs, transform=transform, **options))
    assert await values_by_key(kafka, outputs) == {"a": ["0", "2", "4"], "b": ["1"]}
    assert tried == [0, 1, 1, 1, *[2] * 6, 3, 4, 5, 5, 5, 6]
    letters = [dict(letter.headers) for letter in await committed_in(kafka, dead)]
    assert [(each["dead-offset"], each["dead-attempts"]) for each in letters] == [(b"3", b"1"), (b"5", b"3")]
    assert letters[0]["dead-reason"] == b"PermanentError: never"


async def test_without_a_dead_letter_topic_it_is_tried_on_and_what_is_before_it_is_committed(
    kafka: Kafka, topic: str, outputs: str
) -> None:
    tries = []

    async def transform(message: Any) -> list[Output]:
        if message.offset == 2:
            tries.append(message.offset)
            raise PermanentError("never")
        return [Output(outputs, str(message.offset).encode(), message.key)]

    options: dict[str, Any] = {"max_attempts": 2, "backoff": Backoff(0.01, 0.01)}
    await run_to_the_end(kafka, topic, transformer_of(kafka, topic, outputs, transform=transform, **options), end=2)
    await eventually(lambda: tries, "it is tried")
    assert await values_by_key(kafka, outputs) == {"a": ["0"], "b": ["1"]}


async def test_each_output_is_there_once_although_partitions_change_hands(kafka: Kafka, outputs: str) -> None:
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic, 2)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def produce() -> None:
        async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
            for number in range(20):
                partition = number % 2
                await producer.send_and_wait(topic, b"{}", key=str(partition).encode(), partition=partition)

    async def transform(message: Any) -> list[Output]:
        begun.set()
        await go_on.wait()
        return [Output(outputs, str(message.offset).encode(), message.key)]

    await produce()
    members = [transformer_of(kafka, topic, outputs, transform=transform, most_at_once=4) for _ in range(2)]
    first = asyncio.create_task(members[0].run())
    await begun.wait()
    second = asyncio.create_task(members[1].run())
    await eventually(
        lambda: any(closing.is_set() for closing, _ in members[0]._partitions.values()), "partitions are revoked"
    )
    go_on.set()
    await eventually(lambda: all(len(member._partitions) == 1 for member in members), "each has one")
    await produce()

    async def is_all_there() -> bool:
        values = await watcher.getmany(timeout_ms=10)
        seen.extend(message for messages in values.values() for message in messages)
        return len(seen) >= 40

    seen: list[Any] = []
    async with AIOKafkaConsumer(
        outputs,
        bootstrap_servers=kafka.bootstrap_servers,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
    ) as watcher:
        await eventually(is_all_there, "all is transformed")
    for member in members:
        member.stop()
    await asyncio.gather(first, second)
    expected = [str(offset) for offset in range(20)]
    assert await values_by_key(kafka, outputs) == {"0": expected, "1": expected}


@pytest.mark.parametrize(("committed", "deleted"), [(1, 3), (9, 0)], ids=["deleted", "of a longer topic"])
async def test_messages_that_kafka_does_not_have_are_an_error_and_not_passed_over(
    kafka: Kafka, topic: str, outputs: str, committed: int, deleted: int
) -> None:
    partition = TopicPartition(topic, 0)
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=topic, enable_auto_commit=False
    ) as watcher:
        watcher.assign([partition])
        await watcher.commit({partition: committed})
    if deleted:
        await Admin(kafka.bootstrap_servers).delete_records(topic, 0, deleted)

    async def transform(message: Any) -> list[Output]:
        return [Output(outputs, b"", key=message.key)]

    with pytest.raises(OffsetGoneError, match=f"{topic}-0 {committed}"):
        await Transformer(kafka.bootstrap_servers, topic, topics=[topic], transform=transform).run()
    assert await committed_in(kafka, outputs) == []
