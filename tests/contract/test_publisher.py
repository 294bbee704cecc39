"""What :class:`outbox_relay.relay.Publisher` promises, of the fake and of KafkaPublisher on Apache Kafka alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from outbox_relay.errors import PublisherUnavailableError
from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.relay import Publisher
from outbox_relay.servers import Kafka
from tests.contract.publishers import TOO_LARGE_BYTES, KafkaWorld, MemoryPublisherWorld, PublisherWorld
from tests.fakes import record
from tests.waiting import eventually

TOO_LARGE = bytes(2 * TOO_LARGE_BYTES)


@pytest.fixture
def memory() -> PublisherWorld:
    return MemoryPublisherWorld()


@pytest.fixture
async def apache_kafka(kafka: Kafka) -> AsyncIterator[PublisherWorld]:
    world = KafkaWorld(kafka)
    yield world
    await world.close()


@pytest.fixture(params=["memory", "apache_kafka"])
def world(request: pytest.FixtureRequest) -> PublisherWorld:
    world: PublisherWorld = request.getfixturevalue(request.param)
    return world


@pytest.fixture
async def publisher(world: PublisherWorld) -> Publisher:
    publisher = world.publisher()
    await publisher.connect()
    return publisher


def ours() -> bool:
    return True


def kinds(outcomes: Sequence[Outcome]) -> str:
    """One letter for each: delivered, retry, released or topic."""
    letters = {Delivered: "d", Released: "r"}
    return "".join(
        ("R" if outcome.scope is Scope.ROW else "T") if isinstance(outcome, Retry) else letters[type(outcome)]
        for outcome in outcomes
    )


def answered(outcomes: Sequence[Outcome], records: Sequence[Record]) -> str:
    """Each record has its outcome, in its place; of which kinds."""
    assert [outcome.record for outcome in outcomes] == list(records)
    return kinds(outcomes)


# -- ready, connect, close


async def test_it_is_ready_from_connect_to_close_and_can_be_connected_again(world: PublisherWorld) -> None:
    publisher = world.publisher()
    assert not publisher.ready
    for _ in range(2):
        await publisher.connect()
        assert publisher.ready
        await publisher.close()
        assert not publisher.ready
        await publisher.close()


async def test_before_connect_and_after_close_nothing_is_sent(world: PublisherWorld) -> None:
    topic = await world.topic()
    records = [record(1, topic=topic), record(2, topic=topic)]
    publisher = world.publisher()
    assert answered(await publisher.publish(records, ours), records) == "rr"
    await publisher.connect()
    await publisher.close()
    assert answered(await publisher.publish(records, ours), records) == "rr"
    assert not publisher.ready
    assert await world.written(topic) == []


async def test_connecting_without_a_broker_says_so_in_time(world: PublisherWorld) -> None:
    publisher = world.publisher()
    async with world.unreachable(), asyncio.timeout(10):
        with pytest.raises(PublisherUnavailableError):
            await publisher.connect()
        assert not publisher.ready
    await publisher.connect()
    assert publisher.ready


async def test_connecting_anew_loses_nothing(world: PublisherWorld, publisher: Publisher) -> None:
    topic = await world.topic()
    for id_ in (1, 2):
        await publisher.connect()
        assert kinds(await publisher.publish([record(id_, topic=topic)], ours)) == "d"
    assert await world.written(topic) == [1, 2]


# -- publish


async def test_what_is_delivered_is_in_the_topic_in_order(world: PublisherWorld, publisher: Publisher) -> None:
    topic = await world.topic()
    records = [record(id_, key=f"k{id_ % 2}" if id_ % 3 else None, topic=topic) for id_ in (-5, 3, 4, 9, 10, 11)]
    assert answered(await publisher.publish(records, ours), records) == "dddddd"
    assert await world.written(topic) == [-5, 3, 4, 9, 10, 11]
    assert answered(await publisher.publish([], ours), []) == ""


async def test_each_record_is_answered_in_its_place_and_a_refused_one_halts_its_key_alone(
    world: PublisherWorld, publisher: Publisher
) -> None:
    one, other, missing = await world.topic(), await world.topic(), "missing"
    records = [
        record(1, "a", one),
        record(2, "a", missing),
        record(3, "b", one, TOO_LARGE),
        record(4, "b", other),
        record(5, "b", one),
        record(6, None, one, TOO_LARGE),
        record(7, None, one),
        record(8, "a", one),
        record(9, "b", missing),
        record(10, "b", one, TOO_LARGE),
        record(11, "b", one, None),
    ]
    outcomes = await publisher.publish(records, ours)
    assert answered(outcomes, records) == "dTRdrRddTrr"
    for outcome in outcomes:
        if isinstance(outcome, Retry):
            assert outcome.error
            assert outcome.reason
    assert await world.written(one) == [1, 7, 8]
    assert await world.written(other) == [4]


async def test_a_refusal_holds_nothing_in_the_next_publication(world: PublisherWorld, publisher: Publisher) -> None:
    topic = await world.topic()
    assert (
        kinds(await publisher.publish([record(1, topic=topic, value=TOO_LARGE), record(2, topic=topic)], ours)) == "Rr"
    )
    assert kinds(await publisher.publish([record(1, topic=topic), record(2, topic=topic)], ours)) == "dd"
    assert await world.written(topic) == [1, 2]


async def test_what_is_not_ours_is_not_sent(world: PublisherWorld, publisher: Publisher) -> None:
    topic = await world.topic()
    records = [record(id_, topic=topic) for id_ in (1, 2)]
    assert answered(await publisher.publish(records, lambda: False), records) == "rr"
    assert publisher.ready
    assert await world.written(topic) == []


async def test_ownership_is_asked_before_each_send(world: PublisherWorld, publisher: Publisher) -> None:
    """In a real publisher that is before each round of batches; here a batch holds one record."""
    topic = await world.topic()
    records = [record(id_, topic=topic) for id_ in range(1, 7)]
    answers = iter([True, True, False])
    outcomes = await publisher.publish(records, lambda: next(answers, False))
    assert answered(outcomes, records) == "ddrrrr"
    assert await world.written(topic) == [1, 2]


async def test_a_silent_broker_is_nobodys_fault_and_order_holds_when_it_is_back(
    world: PublisherWorld, publisher: Publisher
) -> None:
    topic = await world.topic()
    records = [record(id_, topic=topic) for id_ in range(1, 7)]
    assert kinds(await publisher.publish([record(0, topic=topic)], ours)) == "d"
    async with world.unreachable(), asyncio.timeout(20):
        assert answered(await publisher.publish(records, ours), records) == "rrrrrr"
        assert not publisher.ready
        assert answered(await publisher.publish(records, ours), records) == "rrrrrr"

    async def connected() -> bool:
        try:
            await publisher.connect()
        except PublisherUnavailableError:
            return False
        return publisher.ready

    await eventually(connected, "the broker is back")
    assert answered(await publisher.publish(records, ours), records) == "dddddd"
    written = await world.written(topic)
    assert list(dict.fromkeys(written)) == [0, 1, 2, 3, 4, 5, 6]
    # Only what was under way when the broker fell silent may have arrived too: one batch, which holds one record.
    assert sorted(written) in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 2, 3, 4, 5, 6])


async def test_a_cancelled_publication_sends_nothing_more(world: PublisherWorld, publisher: Publisher) -> None:
    topic = await world.topic()
    records = [record(id_, topic=topic) for id_ in range(1, 7)]
    asked = 0

    def ours_until_cancelled() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            publishing.cancel()
        return True

    publishing = asyncio.create_task(publisher.publish(records, ours_until_cancelled))
    (done,) = await asyncio.gather(publishing, return_exceptions=True)
    assert isinstance(done, asyncio.CancelledError)
    assert not publisher.ready
    # Another publisher's record is behind whatever was sent.
    other = world.publisher()
    await other.connect()
    assert kinds(await other.publish([record(7, topic=topic)], ours)) == "d"
    written = await world.written(topic)
    assert [id_ for id_ in written if id_ != 7] in ([1, 2], [1, 2, 3])
