"""In-memory stand-ins for both seams. ``tests/contract`` holds them to the same tests as the real adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outbox_relay.errors import PublisherUnavailableError, SourceUnavailableError
from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.relay import Claim
from outbox_relay.retry import Backoff
from outbox_relay.source.holds import Holds


def record(
    id_: int, key: str | None = "k", topic: str = "t", value: bytes | None = b"v", event_id: str | None = None
) -> Record:
    """A record as a source makes it, without the row's own headers."""
    event_id = event_id or f"00000000-0000-0000-0000-{id_ % 10**12:012d}"
    headers = [("id", event_id.encode()), ("outbox-id", str(id_).encode())]
    return Record(id_, event_id, topic, None if key is None else key.encode(), value, headers)


def line(record: Record) -> tuple[str, bytes] | int:
    """What waits together."""
    return record.id if record.key is None else (record.topic, record.key)


@dataclass
class MemoryOutbox:
    """The table: rows by id, and those that are marked. All of it belongs to one source at a time."""

    rows: dict[int, Record] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    locked: set[int] = field(default_factory=set)  #: by other sessions
    reachable: bool = True
    owner: object = None
    epoch: int = 0

    def insert(self, *records: Record) -> None:
        for each in records:
            self.rows[each.id] = each

    def give_to(self, owner: object) -> None:
        self.owner = owner
        self.epoch += 1


class MemorySource:
    """Claims from a :class:`MemoryOutbox`, and insists that a claim is handed back, whole, before the next."""

    def __init__(self, outbox: MemoryOutbox, *, batch_rows: int = 100, backoff: Backoff | None = None) -> None:
        self._outbox = outbox
        self._batch_rows = batch_rows
        self._claimed: Sequence[Record] = ()
        self._claimed_under = 0
        self._published: dict[int, int] = {}  # by id, the epoch it was claimed under
        self._held: Holds[object] = Holds(backoff or Backoff(0.01, 0.01))

    async def claim(self) -> Claim:
        assert not self._claimed, "the last claim was not handed back"
        outbox = self._outbox
        self._mark()
        if outbox.owner is None:
            outbox.give_to(self)
        if outbox.owner is not self:
            return Claim((), lambda: False, is_idle=True)
        epoch = self._claimed_under = outbox.epoch
        self._published = {id_: under for id_, under in self._published.items() if under == epoch}
        candidates = self._candidates()
        self._claimed = self._up_to_locked(candidates)[: self._batch_rows]
        return Claim(self._claimed, lambda: outbox.owner is self and outbox.epoch == epoch, is_idle=not candidates)

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        assert [outcome.record for outcome in outcomes] == list(self._claimed), "not the records of the last claim"
        self._claimed = ()
        topics = set()
        for outcome in outcomes:
            if isinstance(outcome, Delivered):
                self._published[outcome.record.id] = self._claimed_under
                self._held.clear(line(outcome.record))
                self._held.clear(outcome.record.topic)
            elif isinstance(outcome, Retry):
                if outcome.scope is Scope.TOPIC:
                    topics.add(outcome.record.topic)
                else:
                    self._held.hold(line(outcome.record))
        for topic in topics:
            self._held.hold(topic)

    async def release(self) -> None:
        with contextlib.suppress(SourceUnavailableError):
            self._mark()
            if self._outbox.owner is self:
                self._outbox.give_to(None)

    def _mark(self) -> None:
        """Mark what is published and can be marked now."""
        outbox = self._outbox
        if not outbox.reachable:
            raise SourceUnavailableError("out of reach")
        if outbox.owner is self:
            due = {id_ for id_, epoch in self._published.items() if epoch == outbox.epoch} - outbox.locked
            outbox.sent |= due
            for id_ in due:
                del self._published[id_]

    def _candidates(self) -> list[Record]:
        """What is unsent and doesn't wait, in order."""
        held = set(self._held.active())
        done = self._outbox.sent | self._published.keys()
        return [
            row
            for id_, row in sorted(self._outbox.rows.items())
            if id_ not in done and row.topic not in held and line(row) not in held
        ]

    def _up_to_locked(self, rows: Sequence[Record]) -> list[Record]:
        """The rows without those that are locked, and what is behind them in their keys."""
        cut = set()
        free = []
        for row in rows:
            if row.id in self._outbox.locked:
                cut.add(line(row))
            if line(row) not in cut:
                free.append(row)
        return free


@dataclass
class MemoryBroker:
    """Topics that exist, what was written to them, and what is refused."""

    topics: set[str] = field(default_factory=lambda: {"t"})
    written: list[Record] = field(default_factory=list)
    too_large_bytes: int = 1_000_000
    reachable: bool = True


class MemoryPublisher:
    """Publishes into a :class:`MemoryBroker`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._ready = False

    @property
    def ready(self) -> bool:
        return self._ready

    async def connect(self) -> None:
        self._ready = self._broker.reachable
        if not self._ready:
            raise PublisherUnavailableError("out of reach")

    async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
        try:
            outcomes = []
            halted: set[object] = set()
            for each in records:
                outcome = self._send(each) if self.ready and line(each) not in halted and is_ours() else Released(each)
                if not isinstance(outcome, Delivered):
                    halted.add(line(each))
                outcomes.append(outcome)
                await asyncio.sleep(0)  # as a real one waits here
        except BaseException:
            self._ready = False
            raise
        return outcomes

    def _send(self, each: Record) -> Outcome:
        if not self._broker.reachable:
            self._ready = False
            return Released(each)
        if each.topic not in self._broker.topics:
            return Retry(each, Scope.TOPIC, "UnknownTopicOrPartitionError", "no such topic")
        if len(each.value or b"") > self._broker.too_large_bytes:
            return Retry(each, Scope.ROW, "MessageSizeTooLargeError", "too large")
        self._broker.written.append(each)
        return Delivered(each)

    async def close(self) -> None:
        self._ready = False
