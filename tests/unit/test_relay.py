"""The spine on in-memory fakes: what it does when either side fails, and when it is told to stop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from outbox_relay.errors import PublisherUnavailableError, SourceUnavailableError
from outbox_relay.message import Outcome, Record, Released
from outbox_relay.relay import Claim, Poll, Relay
from outbox_relay.telemetry import Telemetry
from tests.fakes import MemoryBroker, MemoryOutbox, MemoryPublisher, MemorySource, record
from tests.waiting import eventually


def relay_of(source: MemorySource, publisher: MemoryPublisher, *, once: bool = False) -> Relay:
    return Relay(source, publisher, Poll(0.001, 0.01), Telemetry(), once=once)


def outbox_of(count: int) -> MemoryOutbox:
    outbox = MemoryOutbox()
    outbox.insert(*(record(id_, key=f"k{id_ % 3}") for id_ in range(1, count + 1)))
    return outbox


async def test_once_drains_everything_in_order_and_returns() -> None:
    outbox, broker = outbox_of(250), MemoryBroker()
    await relay_of(MemorySource(outbox), MemoryPublisher(broker), once=True).run()
    assert [each.id for each in broker.written] == list(range(1, 251))
    assert outbox.sent == set(range(1, 251))
    assert outbox.owner is None


async def test_a_stop_settles_what_is_in_flight_and_claims_nothing_more() -> None:
    outbox, broker = outbox_of(5), MemoryBroker()

    class StopsWhilePublishing(MemoryPublisher):
        async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
            outbox.insert(record(99))
            relay.stop()
            return await super().publish(records, is_ours)

    relay = relay_of(MemorySource(outbox), StopsWhilePublishing(broker))
    await relay.run()
    assert outbox.sent == {1, 2, 3, 4, 5}
    assert outbox.owner is None


async def test_nothing_of_a_claim_is_kept_while_the_next_is_made() -> None:
    outbox, broker = outbox_of(50), MemoryBroker()
    kept: list[weakref.ref[Kept]] = []

    class Kept(list[Any]):
        """A list that can be watched."""

    def watched(items: Sequence[Any]) -> Kept:
        own = Kept(items)
        kept.append(weakref.ref(own))
        return own

    class Claims(MemorySource):
        async def claim(self) -> Claim:
            assert all(each() is None for each in kept)
            claim = await super().claim()
            return replace(claim, records=watched(claim.records))

    class Publishes(MemoryPublisher):
        async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
            return watched(await super().publish(records, is_ours))

    await relay_of(Claims(outbox, batch_rows=10), Publishes(broker), once=True).run()
    assert len(kept) > 10


async def test_a_source_that_is_out_of_reach_is_asked_again() -> None:
    outbox, broker = outbox_of(5), MemoryBroker()

    class FailsTwice(MemorySource):
        failures = 2

        async def claim(self) -> Claim:
            if self.failures:
                self.failures -= 1
                raise SourceUnavailableError("down")
            return await super().claim()

    await relay_of(FailsTwice(outbox), MemoryPublisher(broker), once=True).run()
    assert outbox.sent == {1, 2, 3, 4, 5}


async def test_a_publisher_that_is_out_of_reach_keeps_no_rows_from_others() -> None:
    outbox, broker = outbox_of(5), MemoryBroker()

    class LosesKafka(MemoryPublisher):
        async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
            self._ready = False
            return [Released(each) for each in records]

        async def connect(self) -> None:
            if outbox.owner is not None:
                raise AssertionError("connects while it still owns rows")
            if lost.is_set():
                raise PublisherUnavailableError("down")
            lost.set()
            self._ready = True

    lost = asyncio.Event()
    without = relay_of(MemorySource(outbox), LosesKafka(broker))
    running = asyncio.create_task(without.run())
    await lost.wait()
    await eventually(lambda: outbox.owner is None, "the relay without Kafka lets go")
    await relay_of(MemorySource(outbox), MemoryPublisher(broker), once=True).run()
    assert outbox.sent == {1, 2, 3, 4, 5}
    without.stop()
    await running


async def test_a_stop_ends_the_wait_for_a_source_that_never_comes() -> None:
    class Down(MemorySource):
        async def claim(self) -> Claim:
            asked.set()
            raise SourceUnavailableError("down")

    asked = asyncio.Event()
    relay = relay_of(Down(MemoryOutbox()), MemoryPublisher(MemoryBroker()))
    running = asyncio.create_task(relay.run())
    await asked.wait()
    relay.stop()
    async with asyncio.timeout(5):
        await running


async def test_a_defect_in_the_source_ends_the_relay_and_closes_kafka() -> None:
    class Broken(MemorySource):
        async def claim(self) -> Claim:
            raise ZeroDivisionError

    publisher = MemoryPublisher(MemoryBroker())
    with pytest.raises(ZeroDivisionError):
        await relay_of(Broken(MemoryOutbox()), publisher).run()
    assert not publisher.ready


def test_the_poll_grows_by_half_from_floor_to_ceiling() -> None:
    poll = Poll(0.1, 0.3)
    pauses = [0.0]
    for _ in range(5):
        pauses.append(poll.next_seconds(pauses[-1]))
    assert pauses[1:] == pytest.approx([0.1, 0.15, 0.225, 0.3, 0.3])
