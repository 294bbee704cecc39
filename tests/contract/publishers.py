"""Publishers with what stands behind them, so that one suite can hold the fake and the real one to the protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol
from uuid import uuid4

import pytest

from outbox_relay.publisher import KafkaPublisher
from outbox_relay.relay import Publisher
from outbox_relay.servers import Kafka, KafkaServer
from outbox_relay.telemetry import Telemetry
from outbox_relay.topic_reader import read_topics
from tests.fakes import MemoryBroker, MemoryPublisher

#: The most that a topic of these worlds takes in one record.
TOO_LARGE_BYTES = 4000


class PublisherWorld(Protocol):
    """A broker, its topics, and who publishes there."""

    async def topic(self) -> str:
        """A new topic that refuses records above TOO_LARGE_BYTES; of one partition."""
        ...

    async def written(self, topic: str) -> list[int]:
        """The outbox ids of what the topic holds, in its order, repeats included."""
        ...

    def publisher(self) -> Publisher:
        """One that isn't connected, and sends at most one of the tests' records in a batch."""
        ...

    def unreachable(self) -> contextlib.AbstractAsyncContextManager[None]:
        """The broker answers nobody."""
        ...

    async def close(self) -> None: ...


class MemoryPublisherWorld:
    """The fake."""

    def __init__(self) -> None:
        self._broker = MemoryBroker(topics=set(), too_large_bytes=TOO_LARGE_BYTES)

    async def topic(self) -> str:
        topic = uuid4().hex
        self._broker.topics.add(topic)
        return topic

    async def written(self, topic: str) -> list[int]:
        return [each.id for each in self._broker.written if each.topic == topic]

    def publisher(self) -> Publisher:
        return MemoryPublisher(self._broker)

    @contextlib.asynccontextmanager
    async def unreachable(self) -> AsyncIterator[None]:
        self._broker.reachable = False
        yield
        self._broker.reachable = True

    async def close(self) -> None:
        pass


class KafkaWorld:
    """KafkaPublisher on Apache Kafka."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._publishers: list[KafkaPublisher] = []

    async def topic(self) -> str:
        topic = f"contract-{uuid4().hex}"
        await self._kafka.create_topic(topic, 1, {"max.message.bytes": str(TOO_LARGE_BYTES)})
        return topic

    async def written(self, topic: str) -> list[int]:
        reading = read_topics(self._kafka.bootstrap_servers, [topic], deadline_seconds=30)
        return [int(dict(seen.headers)["outbox-id"] or b"") async for seen in reading]

    def publisher(self) -> Publisher:
        self._publishers.append(
            KafkaPublisher(
                [self._kafka.bootstrap_servers],
                Telemetry(),
                client_id="contract",
                compression="none",
                batch_bytes=300,
                connect_timeout_seconds=1.0,
                request_timeout_seconds=1.0,
                publish_warn_seconds=1.0,
                publish_deadline_seconds=2.0,
            )
        )
        return self._publishers[-1]

    @contextlib.asynccontextmanager
    async def unreachable(self) -> AsyncIterator[None]:
        if not isinstance(self._kafka.server, KafkaServer):
            pytest.skip("only a Kafka that was started for the tests can be paused")
        self._kafka.server.pause()
        try:
            yield
        finally:
            self._kafka.server.resume()

    async def close(self) -> None:
        await asyncio.gather(*(publisher.close() for publisher in self._publishers))
