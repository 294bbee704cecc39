"""Has messages repeat, as a producer may that lost an acknowledgement, and waits until a group has dealt with them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import NamedTuple

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from outbox_relay.errors import DemoError
from outbox_relay.servers import Kafka
from outbox_relay.topic_reader import read_topics

#: One record in so many is sent again.
_REPEATED_SHARE = 9

_LOOK_SECONDS = 0.05
_READING_SECONDS = 30.0
_SENDING_SECONDS = 30.0


class Repeats(NamedTuple):
    """``records`` were sent again; ``ends`` has the offset behind the last record of each partition."""

    records: int
    ends: Mapping[TopicPartition, int]


async def send_again(kafka: Kafka, topic: str) -> Repeats:
    """Send every ninth record of each partition again, as it is: partition, key, value and headers.

    Raises CheckError where the topic can't be read, DemoError where it can't be written to.
    """
    ends: dict[TopicPartition, int] = {}
    chosen = []
    async for record in read_topics(
        kafka.bootstrap_servers, [topic], deadline_seconds=_READING_SECONDS, check_crcs=not kafka.is_mock
    ):
        ends[TopicPartition(topic, record.partition)] = record.offset + 1
        if record.offset % _REPEATED_SHARE == 0:
            chosen.append(record)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, enable_idempotence=True)
    try:
        async with asyncio.timeout(_SENDING_SECONDS), producer:
            sent = await asyncio.gather(
                *[
                    await producer.send(
                        topic, each.value, each.key, partition=each.partition, headers=list(each.headers)
                    )
                    for each in chosen
                ]
            )
    except (KafkaError, TimeoutError) as error:
        raise DemoError(f"records could not be sent again: {error or type(error).__name__}") from error
    for acknowledged in sent:
        partition = TopicPartition(topic, acknowledged.partition)
        ends[partition] = max(ends[partition], acknowledged.offset + 1)
    return Repeats(len(chosen), ends)


async def until_finished(
    kafka: Kafka, group: str, ends: Mapping[TopicPartition, int], seconds: float, check: Callable[[], None]
) -> bool:
    """Whether the group has committed these offsets within so many seconds; ``check`` is called meanwhile."""
    deadline = time.monotonic() + seconds
    async with _admin(kafka.bootstrap_servers) as admin:
        while time.monotonic() < deadline:
            check()
            # Raised while the group's coordinator is being chosen or loads.
            with contextlib.suppress(KafkaError):
                # All by name, since librdkafka's mock doesn't answer for a group as a whole.
                committed = await admin.list_consumer_group_offsets(group, partitions=list(ends))
                if all(each in committed and committed[each].offset >= end for each, end in ends.items()):
                    return True
            await asyncio.sleep(_LOOK_SECONDS)
    return False


@contextlib.asynccontextmanager
async def _admin(bootstrap_servers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    try:
        await admin.start()
        yield admin
    except KafkaError as error:
        raise DemoError(f"Kafka can't be asked for offsets: {error}") from error
    finally:
        await admin.close()
