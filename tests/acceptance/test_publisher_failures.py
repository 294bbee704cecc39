"""The real publisher against Apache Kafka behind a proxy that stands still, swallows and lies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from io import BytesIO
from itertools import count
from typing import Any

import pytest
from aiokafka.protocol import produce

from outbox_relay.errors import PublisherUnavailableError
from outbox_relay.message import Delivered, Outcome, Released, Retry, Scope
from outbox_relay.partitioner import partition_for
from outbox_relay.publisher import KafkaPublisher
from outbox_relay.servers import Kafka
from outbox_relay.telemetry import Telemetry
from outbox_relay.topic_reader import read_topics
from tests.acceptance.relays import SECONDS, ids_in, new_topic
from tests.fakes import record
from tests.kafka_admin import Admin
from tests.kafka_proxy import API_VERSIONS, INIT_PRODUCER_ID, METADATA, PRODUCE, KafkaProxy
from tests.waiting import eventually

#: More than the sockets between here and the broker hold.
MANY_BYTES = 3_000_000
pytestmark = pytest.mark.usefixtures("quiet_aiokafka")


class Recorder(Telemetry):
    """Remembers when a deadline passed, and how long it was."""

    def __init__(self) -> None:
        super().__init__()
        self.abandoned: list[float] = []
        self.answered = 0

    def publish_abandoned(self, rows: int, waited_seconds: float) -> None:
        super().publish_abandoned(rows, waited_seconds)
        self.abandoned.append(waited_seconds)

    def publish_answered(self, rows: int, waited_seconds: float) -> None:
        super().publish_answered(rows, waited_seconds)
        self.answered += rows


@pytest.fixture
def quiet_aiokafka(caplog: pytest.LogCaptureFixture) -> None:
    """As in the relay's process."""
    caplog.set_level("CRITICAL", "aiokafka")


@pytest.fixture
async def proxy(kafka: Kafka) -> AsyncIterator[KafkaProxy]:
    async with KafkaProxy(kafka.bootstrap_servers) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def publisher_at(
    address: str, telemetry: Telemetry | None = None, **settings: Any
) -> AsyncIterator[KafkaPublisher]:
    usual: dict[str, Any] = {
        "client_id": "test",
        "compression": "none",
        "batch_bytes": 524_288,
        "connect_timeout_seconds": 10.0,
        "request_timeout_seconds": 20.0,
        "publish_warn_seconds": 5.0,
        "publish_deadline_seconds": 30.0,
    }
    publisher = KafkaPublisher([address], telemetry or Telemetry(), **{**usual, **settings})
    try:
        yield publisher
    finally:
        async with asyncio.timeout(10):
            await publisher.close()


def ours() -> bool:
    return True


def kinds(outcomes: Sequence[Outcome]) -> list[type[Outcome]]:
    return [type(outcome) for outcome in outcomes]


def key_of_partition(number: int, partitions: int) -> str:
    return next(key for n in range(1000) if partition_for((key := f"k{n}").encode(), partitions) == number)


async def connects(publisher: KafkaPublisher) -> bool:
    with contextlib.suppress(PublisherUnavailableError):
        await publisher.connect()
    return publisher.ready


# -- the abandoned producer


@pytest.mark.parametrize(
    "request_timeout_seconds", [20.0, 0.4], ids=["its own connection open", "its own connection closed before"]
)
async def test_an_abandoned_producer_sends_nothing_more_when_kafka_goes_on(
    request_timeout_seconds: float, kafka: Kafka, proxy: KafkaProxy
) -> None:
    """aiokafka closes a connection by itself at the request timeout, which may come before the deadline or not."""
    topic = await new_topic(kafka, 6, {"max.message.bytes": str(2 * MANY_BYTES)})
    timeouts = {"publish_warn_seconds": 0.3, "publish_deadline_seconds": 1.0, "connect_timeout_seconds": 0.5}
    records = [record(n, key_of_partition(n, 6), topic, bytes(MANY_BYTES)) for n in range(6)]
    recorder = Recorder()
    async with publisher_at(
        proxy.address, recorder, batch_bytes=MANY_BYTES, request_timeout_seconds=request_timeout_seconds, **timeouts
    ) as publisher:
        await eventually(lambda: connects(publisher), "connects")
        assert kinds(await publisher.publish([record(100, topic=topic)], ours)) == [Delivered]
        proxy.stand_still()
        seen = len(proxy.requests)
        assert kinds(await publisher.publish(records, ours)) == [Released] * 6
        assert recorder.abandoned == [1.0]
        proxy.flow()
        # What was in the sockets comes through, and then the connection ends in the middle of the request.
        await eventually(lambda: proxy.idle, "every connection of the abandoned producer has ended")
        late = [request for request in proxy.requests[seen:] if request.api_key == PRODUCE]
        assert late
        assert not any(request.complete for request in late)
        assert await ids_in(kafka, topic) == [100]
        # Whoever takes over sends all, and nothing comes between.
        await eventually(lambda: connects(publisher), "connects again")
        assert kinds(await publisher.publish(records, ours)) == [Delivered] * 6
        assert sorted(await ids_in(kafka, topic)) == [0, 1, 2, 3, 4, 5, 100]


# -- what is bounded


def garbage(_: int, body: bytes) -> bytes:
    return b"\x7f" * len(body)


def unauthorized(_: int, body: bytes) -> bytes:
    """InitProducerId, up to version 1: throttle time, error code, producer id and epoch."""
    return body[:4] + (31).to_bytes(2, "big") + body[6:]


def turned_versions(_: int, body: bytes) -> bytes:
    """ApiVersions, version 0: an error code, and an array of API key, lowest and highest version."""
    apis = [body[at : at + 6] for at in range(6, len(body), 6)]
    return body[:6] + b"".join(api[:2] + api[4:6] + api[2:4] for api in apis)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (KafkaProxy.stand_still, "no broker answers at 127.0.0.1"),
        (lambda proxy: setattr(proxy, "refusing", True), "no broker answers at 127.0.0.1"),
        (lambda proxy: proxy.swallowed.add(METADATA), "no broker answers at 127.0.0.1"),
        (lambda proxy: proxy.swallowed.add(INIT_PRODUCER_ID), "no answer within 1 s"),
        (lambda proxy: proxy.lies.update({API_VERSIONS: garbage}), "127.0.0.1"),
        (lambda proxy: proxy.lies.update({API_VERSIONS: turned_versions}), "an answer makes no sense"),
        (lambda proxy: proxy.lies.update({METADATA: garbage}), "127.0.0.1"),
        (lambda proxy: proxy.lies.update({INIT_PRODUCER_ID: garbage}), "UnknownError"),
        (lambda proxy: proxy.lies.update({INIT_PRODUCER_ID: unauthorized}), "grant this relay's user"),
    ],
    ids=[
        "answers nothing",
        "refuses",
        "swallows metadata requests",
        "swallows InitProducerId",
        "answers ApiVersions with garbage",
        "answers ApiVersions with nonsense",
        "answers metadata with garbage",
        "answers InitProducerId with garbage",
        "doesn't let us write",
    ],
)
async def test_connecting_and_closing_end_in_time_whatever_the_broker_does(
    spoil: Callable[[KafkaProxy], None], reason: str, proxy: KafkaProxy
) -> None:
    spoil(proxy)
    async with publisher_at(proxy.address, connect_timeout_seconds=1.0, request_timeout_seconds=60.0) as publisher:
        async with asyncio.timeout(10):
            with pytest.raises(PublisherUnavailableError, match=f"^connect to Kafka: .*{reason}"):
                await publisher.connect()
        assert not publisher.ready
    proxy.flow()
    await eventually(lambda: proxy.idle, "no connection is left open")


async def test_closing_ends_in_time_in_the_middle_of_a_publish(kafka: Kafka, proxy: KafkaProxy) -> None:
    topic = await new_topic(kafka, 1)
    async with publisher_at(proxy.address) as publisher:
        await publisher.connect()
        proxy.stand_still()
        publishing = asyncio.ensure_future(publisher.publish([record(1, topic=topic)], ours))
        await eventually(lambda: proxy.of(PRODUCE), "the batch is on its way")
        publishing.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait([publishing])
        assert publishing.cancelled()
        assert not publisher.ready


async def test_a_passed_deadline_doubles_the_topic_s_next_and_each_quick_answer_halves_it(
    kafka: Kafka, proxy: KafkaProxy
) -> None:
    topic = await new_topic(kafka, 1)
    recorder = Recorder()
    async with publisher_at(proxy.address, recorder, publish_deadline_seconds=0.2) as publisher:
        await publisher.connect()
        proxy.swallowed.add(PRODUCE)
        for _ in range(5):
            (outcome,) = await publisher.publish([record(1, topic=topic)], ours)
            # Kafka is there, and says nothing about this topic.
            assert isinstance(outcome, Retry)
            assert (outcome.scope, outcome.error) == (Scope.TOPIC, "TimeoutError")
        assert recorder.abandoned == [0.2, 0.4, 0.8, 1.6, 1.6]
        proxy.swallowed.clear()
        assert kinds(await publisher.publish([record(1, topic=topic)], ours)) == [Delivered]
        proxy.swallowed.add(PRODUCE)
        await publisher.publish([record(2, topic=topic)], ours)
        # One answer doesn't show that Kafka is quick again.
        assert recorder.abandoned[5:] == [0.8]
        # Nor does an answer about another topic.
        other = await new_topic(kafka, 1)
        proxy.swallowed.clear()
        assert kinds(await publisher.publish([record(3, topic=other)], ours)) == [Delivered]
        proxy.swallowed.add(PRODUCE)
        await publisher.publish([record(2, topic=topic)], ours)
        assert recorder.abandoned[6:] == [1.6]
    assert await ids_in(kafka, topic) == [1]


@pytest.mark.parametrize("how", ["garbage", "not a word about the batch"])
async def test_an_answer_without_sense_acknowledges_nothing(how: str, kafka: Kafka, proxy: KafkaProxy) -> None:
    topic = await new_topic(kafka, 1)
    recorder = Recorder()
    async with publisher_at(proxy.address, recorder, publish_deadline_seconds=0.5) as publisher:
        await publisher.connect()
        # An answer about no topic: an empty array, and the throttle time behind it.
        proxy.lies[PRODUCE] = garbage if how == "garbage" else lambda _, body: bytes(4) + body[-4:]
        assert kinds(await publisher.publish([record(1, topic=topic), record(2, topic=topic)], ours)) == [Retry] * 2
        assert recorder.abandoned == [0.5]
        proxy.lies.clear()
        assert kinds(await publisher.publish([record(1, topic=topic), record(2, topic=topic)], ours)) == [Delivered] * 2
    # The broker had written it each time; that is why it is said to be in doubt.
    assert list(dict.fromkeys(await ids_in(kafka, topic))) == [1, 2]


async def test_a_broker_that_goes_away_is_not_asked_in_a_tight_loop(kafka: Kafka, proxy: KafkaProxy) -> None:
    topic = await new_topic(kafka, 1)
    async with publisher_at(proxy.address, publish_deadline_seconds=2.0) as publisher:
        await publisher.connect()
        before = proxy.connections
        await proxy.refuse()
        assert kinds(await publisher.publish([record(1, topic=topic)], ours)) == [Released]
        assert proxy.connections - before <= 2.0 * 25


# -- topics and rows at fault


def says(code: int, topic: str) -> Callable[[int, bytes], bytes]:
    """An answer to Produce that says this of each partition of the topic."""

    def lie(version: int, body: bytes) -> bytes:
        schema = getattr(produce, f"ProduceResponse_v{version}").SCHEMA
        topics, throttle_ms = schema.decode(BytesIO(body))
        said = [
            (name, [(number, code if name == topic else true, *rest) for number, true, *rest in partitions])
            for name, partitions in topics
        ]
        return bytes(schema.encode([said, throttle_ms]))

    return lie


async def test_a_topic_with_too_few_replicas_waits_and_others_flow(kafka: Kafka, proxy: KafkaProxy) -> None:
    """Said by the proxy: on one broker Kafka asks for no more replicas in sync than there are."""
    poor, rich = await new_topic(kafka, 1), await new_topic(kafka, 1)
    records = [record(1, topic=poor), record(2, topic=rich), record(3, topic=poor)]
    recorder = Recorder()
    async with publisher_at(proxy.address, recorder, publish_deadline_seconds=10.0) as publisher:
        await publisher.connect()
        proxy.lies[PRODUCE] = says(19, poor)
        for _ in range(3):
            outcomes = await publisher.publish(records, ours)
            assert kinds(outcomes) == [Retry, Delivered, Retry]
            assert isinstance(outcomes[0], Retry)
            assert (outcomes[0].scope, outcomes[0].error) == (Scope.TOPIC, "NotEnoughReplicasError")
            assert "min.insync.replicas" in outcomes[0].reason
            assert recorder.abandoned == [], "long before the deadline"
        proxy.lies.clear()
        assert kinds(await publisher.publish(records, ours)) == [Delivered] * 3


async def test_a_batch_that_may_be_written_though_replicas_are_missing_is_waited_for(
    kafka: Kafka, proxy: KafkaProxy
) -> None:
    """NotEnoughReplicasAfterAppend: sent anew by the same producer it is no repeat, by another it were."""
    topic = await new_topic(kafka, 1)
    async with publisher_at(proxy.address) as publisher:
        await publisher.connect()
        proxy.lies[PRODUCE] = says(20, topic)
        publishing = asyncio.ensure_future(publisher.publish([record(1, topic=topic)], ours))
        await eventually(lambda: len(proxy.of(PRODUCE)) >= 3, "it is sent again")
        proxy.lies[PRODUCE] = says(19, topic)
        sent = len(proxy.of(PRODUCE))
        # Longer than it takes to give up a topic with too few replicas.
        await eventually(lambda: len(proxy.of(PRODUCE)) >= sent + 10, "it is sent again and again")
        proxy.lies.clear()
        assert kinds(await publishing) == [Delivered]
    assert await ids_in(kafka, topic) == [1]


async def test_a_topic_that_is_deleted_meanwhile_is_missed_without_a_tight_loop(
    kafka: Kafka, proxy: KafkaProxy
) -> None:
    deleted, other = await new_topic(kafka, 1), await new_topic(kafka, 1)
    async with publisher_at(proxy.address) as publisher:
        await publisher.connect()
        await Admin(kafka.bootstrap_servers).delete(deleted)
        before = len(proxy.of(METADATA))
        outcomes = await publisher.publish([record(1, topic=deleted), record(2, topic=other)], ours)
        assert kinds(outcomes) == [Retry, Delivered]
        assert isinstance(outcomes[0], Retry)
        assert outcomes[0].error == "UnknownTopicOrPartitionError"
        assert len(proxy.of(METADATA)) - before <= 15
        # It isn't made by asking for it.
        assert deleted not in await Admin(kafka.bootstrap_servers).topics()


async def test_partitions_that_a_topic_grew_are_used_as_soon_as_they_are_noticed(kafka: Kafka) -> None:
    """From then on a key may be in another partition: the order of what is in both is lost to consumers."""
    topic = await new_topic(kafka, 1)
    ids = count(1)
    async with publisher_at(kafka.bootstrap_servers, metadata_max_age_seconds=0.2) as publisher:

        async def publish() -> None:
            records = [record(next(ids), f"k{n}", topic) for n in range(20)]
            assert kinds(await publisher.publish(records, ours)) == [Delivered] * 20

        async def notices() -> bool:
            await publish()
            assert publisher._producer is not None
            return publisher._producer.partition_count(topic) == 4

        await publisher.connect()
        await publish()
        await Admin(kafka.bootstrap_servers).grow(topic, 4)
        await eventually(notices, "four partitions are known")
        await publish()
    written = [seen async for seen in read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)]
    for number in range(4):
        inside = [seen for seen in written if seen.partition == number]
        assert inside
        assert all(partition_for(seen.key or b"", 4) == number for seen in inside if number)
        positions = [int(dict(seen.headers)["outbox-id"] or b"") for seen in inside]
        assert positions == sorted(positions), "in order within a partition"
