from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import CorruptRecordException, OffsetOutOfRangeError

from outbox_relay.errors import CheckError
from outbox_relay.topic_reader import _bounds, _records, check_topics, read_topics


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """Accepts connections and never answers; gives its address."""
    released = asyncio.Event()

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        released.set()
        server.close()
        await server.wait_closed()


async def test_broker_that_never_answers_ends_the_reading_at_its_deadline() -> None:
    async with silent_server() as address, asyncio.timeout(30):
        with pytest.raises(CheckError, match=f"{address} did not answer.*deadline passed"):
            _ = [record async for record in read_topics(address, ["orders"], deadline_seconds=0.2)]


async def test_check_keeps_the_deadline_too() -> None:
    async with silent_server() as address, asyncio.timeout(30):
        with pytest.raises(CheckError, match=f"{address} did not answer.*deadline passed"):
            await check_topics([], address, ["orders"], deadline_seconds=0.2)


async def test_address_where_nobody_listens_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(CheckError, match=f"{address} did not answer.*KafkaConnectionError"):
            _ = [record async for record in read_topics(address, ["orders"], deadline_seconds=20)]


class StuckConsumer:
    """Has read one of two records of partition 1 when the rest fails to come."""

    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure
        self.read = 0

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return {partition: 2 * partition.partition for partition in partitions}

    def assign(self, partitions: list[TopicPartition]) -> None:
        assert [partition.partition for partition in partitions] == [1], "partition 0 is empty"

    def seek(self, partition: TopicPartition, offset: int) -> None:
        assert offset == 0

    def pause(self, *partitions: TopicPartition) -> None:
        assert not partitions

    async def position(self, partition: TopicPartition) -> int:
        return self.read

    async def getmany(self, *, timeout_ms: int) -> dict[TopicPartition, list[ConsumerRecord]]:
        if self.read == 0:
            self.read = 1
            record = ConsumerRecord("orders", 1, 0, 0, 0, None, b"", None, -1, 0, ())
            return {TopicPartition("orders", 1): [record]}
        if self.failure is not None:
            raise self.failure
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (None, "the deadline passed"),
        (CorruptRecordException("Invalid CRC"), "CorruptRecordException.*Invalid CRC"),
        (OffsetOutOfRangeError({}), "OffsetOutOfRangeError"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
    ],
)
async def test_reading_that_gets_stuck_names_the_partition_and_the_reason(
    failure: Exception | None, reason: str
) -> None:
    deadline = asyncio.get_running_loop().time() + 0.2
    consumer = StuckConsumer(failure)
    reading = _records(consumer, *await _bounds(consumer, {"orders": 2}, deadline), deadline)
    assert (await anext(reading)).offset == 0
    with pytest.raises(CheckError, match=rf"orders partition 1 \(at 1 of 2\);.*{reason}"):
        await anext(reading)
