"""The lanes of one relay process over any of the candidates, put together as the product's daemon does it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum

from bench.decisions.candidates import AdvisorySlots, ClaimTransaction
from bench.decisions.outboxes import connected
from outbox_relay import daemon, schema
from outbox_relay.config import Config
from outbox_relay.message import Delivered, Outcome, Record
from outbox_relay.relay import Poll, Publisher, Relay
from outbox_relay.source.polling import PollingSource
from outbox_relay.source.session import Database, Session
from outbox_relay.source.slots import Slots
from outbox_relay.telemetry import Telemetry


class Candidate(StrEnum):
    CLAIM_TRANSACTION = "claim transaction"
    STICKY_SLOT = "sticky slot"  #: the product
    ADVISORY_LOCK = "advisory lock"


class Watch(Telemetry):
    """Counts what it is told, and says nothing."""

    def __init__(self, on_claimed: Callable[[Sequence[Record]], None] = lambda _: None) -> None:
        super().__init__(relay="bench")
        self._on_claimed = on_claimed
        self.claims = 0  #: with rows
        self.delivered = 0
        self.settled_rows = 0
        self.first_claimed = 0.0  #: monotonic seconds, as the next
        self.last_settled = 0.0

    def claimed(self, records: Sequence[Record]) -> None:
        if records:
            self.first_claimed = self.first_claimed or time.monotonic()
            self.claims += 1
            self._on_claimed(records)

    def published(self, outcomes: Sequence[Outcome]) -> None:
        self.delivered += sum(isinstance(outcome, Delivered) for outcome in outcomes)

    def settled(self, ids: Collection[int]) -> None:
        self.settled_rows += len(ids)
        self.last_settled = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.last_settled - self.first_claimed


class AtOnce:
    """A publisher that acknowledges everything at once."""

    ready = True

    def __init__(self, *_: object) -> None:
        pass

    async def connect(self) -> None:
        pass

    async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
        return [Delivered(record) for record in records]

    async def close(self) -> None:
        pass


@asynccontextmanager
async def opened(
    candidate: Candidate, config: Config, telemetry: Telemetry, *, processes: int = 1
) -> AsyncIterator[Sequence[PollingSource]]:
    """A source for each lane of one of so many processes; within the block they can own what they claim from."""
    async with connected(config.database.url) as connection:
        layout = await schema.verify(connection)
    relay = config.relay
    database = Database(
        config.database.url, config.database.connect_timeout_seconds, config.database.statement_timeout_seconds
    )
    lanes = range(relay.claims_in_flight)
    slots = Slots(
        Session(database, "bench heartbeat"),
        telemetry,
        name=relay.name,
        lanes=len(lanes),
        lease_seconds=relay.lease_seconds,
        heartbeat_seconds=relay.heartbeat_seconds,
        poll=Poll(relay.poll_floor_seconds, relay.poll_ceiling_seconds),
        layout_buckets=layout.buckets,
        layout_slots=layout.slots,
        all_open=True,
    )

    def source(lane: int) -> PollingSource:
        if candidate is Candidate.STICKY_SLOT:
            return daemon._source(config, layout, database, slots, lane, telemetry)
        session = Session(database, "bench lane")
        if candidate is Candidate.ADVISORY_LOCK:
            return AdvisorySlots(session, config, layout, telemetry)
        return ClaimTransaction(session, config, layout, telemetry, lane=lane, lanes=len(lanes) * processes)

    sources = [source(lane) for lane in lanes]
    heartbeat = asyncio.create_task(slots.run()) if candidate is Candidate.STICKY_SLOT else None
    try:
        # All before any claims, or the first would take everything.
        for member in sources:
            if isinstance(member, AdvisorySlots):
                await member.join()
        yield sources
    finally:
        if heartbeat is not None:
            heartbeat.cancel()
            await asyncio.wait([heartbeat])
            await slots.leave()
        for closing in sources:
            await closing.close()


async def relay_all(
    sources: Sequence[PollingSource],
    config: Config,
    telemetry: Telemetry,
    *,
    once: bool,
    publisher: Callable[[Config, Telemetry], Publisher] = daemon._publisher,
) -> None:
    """Relay; with ``once`` until nothing is left to claim, else until cancelled."""
    poll = Poll(config.relay.poll_floor_seconds, config.relay.poll_ceiling_seconds)
    async with asyncio.TaskGroup() as lanes:
        for source in sources:
            lanes.create_task(Relay(source, publisher(config, telemetry), poll, telemetry, once=once).run())
