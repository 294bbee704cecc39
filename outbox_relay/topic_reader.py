"""Reads whole topics back from Kafka, for the checker.

A reading covers every partition from its first offset to the end it had when the reading began; what
retention or compaction has removed by then can't be seen and counts as lost. What is removed during the
reading ends it with an error. It belongs to no consumer group, leaves no trace in Kafka and never creates a topic.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from outbox_relay.checker import Checker, Committed, Report, Seen
from outbox_relay.errors import CheckError

Isolation: TypeAlias = Literal["read_uncommitted", "read_committed"]

#: How long a topic may take to be known to the broker that is asked; one just made takes a moment.
_TOPIC_SECONDS = 5.0
_RETRY_SECONDS = 0.1
_STOP_SECONDS = 5.0
#: How long one wait for records lasts before the positions are looked at: a transaction's marker moves
#: the position without being a record.
_POLL_MILLISECONDS = 100


async def check_topics(
    committed: Iterable[Committed],
    bootstrap_servers: str,
    topics: Iterable[str],
    *,
    deadline_seconds: float,
    isolation: Isolation = "read_uncommitted",
    check_crcs: bool = True,
    examples_per_kind: int = 10,
) -> Report:
    """Read ``topics`` back and compare them with what was committed, partitioning included.

    The ledger and the topics should be at rest: what is published after the reading began counts as lost,
    and what is committed after the ledger was taken counts as invented. Other arguments and errors as for
    :func:`read_topics` and :class:`Checker`; CheckError also when the ledger has rows of a topic that isn't read.
    """
    deadline = asyncio.get_running_loop().time() + deadline_seconds
    async with _consumer(bootstrap_servers, topics, deadline, isolation, check_crcs) as (
        consumer,
        partitions,
    ):
        rows = _rows_of(partitions, committed)
        checker = Checker(rows, partitions=partitions, examples_per_kind=examples_per_kind)
        beginnings, ends = await _bounds(consumer, partitions, deadline)
        async for record in _records(consumer, beginnings, ends, deadline):
            checker.see(record)
    return replace(checker.report(), removed_offsets=sum(beginnings.values()))


def _rows_of(topics: Collection[str], committed: Iterable[Committed]) -> Iterator[Committed]:
    for row in committed:
        if row.topic not in topics:
            raise CheckError(
                f"the ledger has rows of topic {row.topic}, which isn't read, so they would all count as lost; "
                "read it too, or leave them out"
            )
        yield row


async def read_topics(
    bootstrap_servers: str,
    topics: Iterable[str],
    *,
    deadline_seconds: float,
    isolation: Isolation = "read_uncommitted",
    check_crcs: bool = True,
) -> AsyncIterator[Seen]:
    """Every record of ``topics``, in the order of each partition; partitions are mixed as they arrive.

    ``read_committed`` leaves out aborted transactions and ends before the first one that is still open.
    ``check_crcs=False`` is for librdkafka's mock cluster, which changes records without renewing their CRC.
    The deadline covers the whole reading, what the caller does with the records included. A caller that may
    stop early closes the iterator (``contextlib.aclosing``).

    Raises CheckError when Kafka can't be reached, a topic is missing, a record can't be read, or the end was
    not reached in time.
    """
    deadline = asyncio.get_running_loop().time() + deadline_seconds
    async with _consumer(bootstrap_servers, topics, deadline, isolation, check_crcs) as (
        consumer,
        partitions,
    ):
        beginnings, ends = await _bounds(consumer, partitions, deadline)
        async for record in _records(consumer, beginnings, ends, deadline):
            yield record


@contextlib.asynccontextmanager
async def _consumer(
    bootstrap_servers: str, topics: Iterable[str], deadline: float, isolation: Isolation, check_crcs: bool
) -> AsyncIterator[tuple[Any, Mapping[str, int]]]:
    """A connected consumer, and how many partitions each topic has."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap_servers,
        # A reading that retention overtakes must fail; silently skipping would look like loss.
        auto_offset_reset="none",
        enable_auto_commit=False,
        isolation_level=isolation,
        check_crcs=check_crcs,
        fetch_max_wait_ms=_POLL_MILLISECONDS,
    )
    try:
        with _as_check_error(lambda: f"Kafka at {bootstrap_servers} did not answer; is it up, and the address right?"):
            async with asyncio.timeout_at(deadline):
                await consumer.start()
                partitions = await _partition_counts(consumer, sorted(set(topics)))
        yield consumer, partitions
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                # A fetch that is backing off makes stop() end in CancelledError, with sockets still open.
                await asyncio.gather(consumer.stop(), return_exceptions=True)
                await consumer._client.close()


async def _partition_counts(consumer: Any, topics: list[str]) -> dict[str, int]:
    loop = asyncio.get_running_loop()
    give_up = loop.time() + _TOPIC_SECONDS
    while True:
        # All topics at once, because asking for one by its name may create it.
        cluster = await consumer._client.fetch_all_metadata()
        found = {topic: cluster.partitions_for_topic(topic) for topic in topics}
        missing = [topic for topic, partitions in found.items() if not partitions]
        if not missing:
            return {topic: len(partitions) for topic, partitions in found.items()}
        if loop.time() > give_up:
            raise CheckError(f"Kafka has no topic {', '.join(missing)}; create it, or correct its name")
        await asyncio.sleep(_RETRY_SECONDS)


async def _bounds(
    consumer: Any, counts: Mapping[str, int], deadline: float
) -> tuple[Mapping[TopicPartition, int], Mapping[TopicPartition, int]]:
    """The first offset of each partition, and the one behind its last."""
    partitions = [TopicPartition(topic, number) for topic, count in counts.items() for number in range(count)]
    with _as_check_error(
        lambda: "where Kafka's topics begin and end could not be learned; does every partition have a leader?"
    ):
        async with asyncio.timeout_at(deadline):
            ends = await consumer.end_offsets(partitions)
            return await consumer.beginning_offsets(partitions), ends


async def _records(
    consumer: Any, beginnings: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], deadline: float
) -> AsyncIterator[Seen]:
    positions = dict(beginnings)
    unfinished = [partition for partition, end in ends.items() if positions[partition] < end]
    if not unfinished:
        return
    consumer.assign(unfinished)
    for partition in unfinished:
        consumer.seek(partition, positions[partition])
    while unfinished:
        with _as_check_error(lambda: _progress(positions, ends)):
            async with asyncio.timeout_at(deadline):
                batches = await consumer.getmany(timeout_ms=_POLL_MILLISECONDS)
                for partition in unfinished:
                    positions[partition] = await consumer.position(partition)
        for partition, batch in batches.items():
            for record in batch:
                # Beyond the end lies what was written after the reading began.
                if record.offset < ends[partition]:
                    yield Seen(
                        record.topic,
                        record.partition,
                        record.offset,
                        record.key,
                        record.value,
                        record.headers,
                    )
        finished = [partition for partition in unfinished if positions[partition] >= ends[partition]]
        consumer.pause(*finished)
        unfinished = [partition for partition in unfinished if partition not in finished]


def _progress(positions: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]) -> str:
    unread = [
        f"{partition.topic} partition {partition.partition} (at {positions[partition]} of {end})"
        for partition, end in ends.items()
        if positions[partition] < end
    ]
    return (
        f"not read to the end: {', '.join(unread)}; "
        "allow more time, read again if retention removed what was still to be read, or look at the broker"
    )


@contextlib.contextmanager
def _as_check_error(what: Callable[[], str]) -> Iterator[None]:
    """Say what went wrong in terms of the check. A record that can't be decoded comes as a ValueError."""
    try:
        yield
    except TimeoutError as error:
        raise CheckError(f"{what()}: the deadline passed") from error
    except (KafkaError, OSError, ValueError) as error:
        raise CheckError(f"{what()}: {error!r}") from error
