"""In-memory stand-ins for both seams. ``tests/contract`` holds them to the same tests as the real adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.relay import Claim
from outbox_relay.retry import Backoff
from outbox_relay.source.holds import Holds


def record(
    id_: int, key: str | None = "k", topic: str = "t", value: bytes | None = b"v", event_id: str | None = None
) -> Record:
    """A record as a source makes it, without the row's own headers."""
    event_id = event_id or f"00000000-0000-0000-0000-{id_:012d}"
    headers = [("id", event_id.encode()), ("outbox-id", str(id_).encode())]
    return Record(id_, event_id, topic, None if key is None else key.encode(), value, headers)


def line(record: Record) -> tuple[str, bytes] | int:
    """What waits together."""
    return record.id if record.key is None else (record.topic, record.key)


@dataclass
class MemoryOutbox:
    """The table: rows by id, and those that are marked."""

    rows: dict[int, Record] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    owner: object = None

    def insert(self, *records: Record) -> None:
        for each in records:
            self.rows[each.id] = each


class MemorySource:
    """Claims from a :class:`MemoryOutbox`; all of it belongs to one source at a time."""

    def __init__(self, outbox: MemoryOutbox, *, batch_rows: int = 100, backoff: Backoff | None = None) -> None:
        self._outbox = outbox
        self._batch_rows = batch_rows
        self._published: list[int] = []
        self._held: Holds[object] = Holds(backoff or Backoff(0.01, 0.01))

    async def claim(self) -> Claim:
        self._write()
        if self._outbox.owner is None:
            self._outbox.owner = self
        if self._outbox.owner is not self:
            return Claim((), lambda: False, is_idle=True)
        held = set(self._held.active())
        records = [
            row
            for id_, row in sorted(self._outbox.rows.items())
            if id_ not in self._outbox.sent and row.topic not in held and line(row) not in held
        ][: self._batch_rows]
        return Claim(records, lambda: self._outbox.owner is self, is_idle=not records)

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        topics = set()
        for outcome in outcomes:
            if isinstance(outcome, Delivered):
                self._published.append(outcome.record.id)
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
        self._write()
        if self._outbox.owner is self:
            self._outbox.owner = None

    def _write(self) -> None:
        if self._outbox.owner is self:
            self._outbox.sent.update(self._published)
        self._published.clear()


@dataclass
class MemoryBroker:
    """Topics that exist, what was written to them, and what is refused."""

    topics: set[str] = field(default_factory=lambda: {"t"})
    written: list[Record] = field(default_factory=list)
    too_large_bytes: int = 1_000_000


class MemoryPublisher:
    """Publishes into a :class:`MemoryBroker`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._ready = False

    @property
    def ready(self) -> bool:
        return self._ready

    async def connect(self) -> None:
        self._ready = True

    async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
        halted: set[object] = set()
        outcomes: list[Outcome] = []
        for each in records:
            if not is_ours() or line(each) in halted:
                outcomes.append(Released(each))
            elif each.topic not in self._broker.topics:
                outcomes.append(Retry(each, Scope.TOPIC, "UnknownTopicOrPartitionError", "no such topic"))
            elif len(each.value or b"") > self._broker.too_large_bytes:
                outcomes.append(Retry(each, Scope.ROW, "MessageSizeTooLargeError", "too large"))
                halted.add(line(each))
            else:
                self._broker.written.append(each)
                outcomes.append(Delivered(each))
        return outcomes

    async def close(self) -> None:
        self._ready = False
