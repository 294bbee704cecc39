"""The polling source: claims unsent rows of the slots that a relay owns, and marks or deletes them when they are
published.

One short transaction settles the last claim and makes the next; no transaction is open while Kafka is asked.

Why order holds: the transaction first locks the rows of its slots and checks their epochs (``OWN``), so it is ordered
with every hand-over. The *next* statement (the claim) therefore has a snapshot that contains whatever an earlier
owner marked. It reads each bucket from its lowest unsent row; where a row can't be locked, that row's key is cut from
there on. So a claim holds a gapless prefix of every key in it. A row that turns up late, below ids that are sent
already, is simply unsent and found; nothing here remembers a position.

Why nothing is published that a crash takes back: the claim locked the rows, so it has a transaction id, and its
COMMIT under ``synchronous_commit = on`` flushes, and replicates, everything that it saw.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import asyncpg

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.failures import Policies
from outbox_relay.message import RESERVED_HEADERS, Delivered, Header, Outcome, Record, Retry, Scope
from outbox_relay.relay import Claim
from outbox_relay.retry import Backoff
from outbox_relay.source.deletions import Deletions
from outbox_relay.source.holds import Holds
from outbox_relay.source.parking import Line, Ownership, Parking
from outbox_relay.source.refusals import RefusedTopics
from outbox_relay.source.row_by_row import RowByRow
from outbox_relay.source.session import Session
from outbox_relay.source.slots import Slots
from outbox_relay.source.sqlstate import why
from outbox_relay.source.statements import OUTBOX, OWN, RELEASE, OutboxTable, Statements
from outbox_relay.telemetry import Telemetry

# Another session's lock is usually gone soon, and looking again costs little.
_LOCKED = Backoff(first_seconds=0.05, ceiling_seconds=1.0)

# How long a last settle waits for a stranger's lock before the row is left to be published again.
_LAST_SETTLE_SECONDS = 5.0

#: Where so many can't be read, and none can, it isn't the rows' fault.
_MANY_UNREADABLE = 20

#: The most bytes in one claim, unless a single row has more.
CLAIM_BYTES = 5 * 1024 * 1024

#: A row that PostgreSQL doesn't let be marked, or deleted, is tried again this seldom.
_UNMARKABLE = Backoff(first_seconds=1.0, ceiling_seconds=60.0)
#: With so many of them nothing more is claimed: when this relay ends they are published once more.
_MOST_UNMARKABLE = 100


class PollingSource:
    """One lane of the polling source; see :class:`outbox_relay.relay.Source`."""

    def __init__(
        self,
        session: Session,
        slots: Slots,
        lane: int,
        telemetry: Telemetry,
        *,
        layout_buckets: int,
        layout_slots: int,
        batch_rows: int,
        policies: Policies,
        claim_bytes: int = CLAIM_BYTES,
        table: OutboxTable = OUTBOX,
        deletes_sent: bool = False,
    ) -> None:
        self._session = session
        self._slots = slots
        self._lane = lane
        self._telemetry = telemetry
        self._layout_buckets = layout_buckets
        self._layout_slots = layout_slots
        self._batch_rows = batch_rows
        self._claim_bytes = claim_bytes
        self._most_rows = batch_rows  # of the next claim
        self._statements = Statements(table, deletes_sent=deletes_sent)
        session.prepares(self._statements.untyped())
        self._deletions = Deletions(session, table) if deletes_sent else None
        self._payload_type: str | None = None
        self._claimed: dict[int, Ownership] = {}  # by id, the claim that is out
        self._published: dict[int, Ownership] = {}  # by id, acknowledged by Kafka and not marked yet
        self._postponed: set[int] = set()  # of the published, those that a stranger had locked when last looked at
        self._locked: Holds[Line] = Holds(_LOCKED)
        self._unmarkable: Holds[int] = Holds(
            _UNMARKABLE
        )  # of the published, those that PostgreSQL doesn't let be marked
        self._refused_topics = RefusedTopics()
        self._rows = RowByRow(session)
        self._parking = Parking(
            session, self._rows, telemetry, policies, table, layout_slots=layout_slots, batch_rows=batch_rows
        )

    # -- the three verbs

    async def claim(self) -> Claim:
        self._slots.set_ready(self._lane, True)
        if not await self._slots.known():
            return Claim((), lambda: False, is_idle=False)
        if not self._slots.in_lease():
            raise SourceUnavailableError("heartbeat: the lease ran out and could not be renewed")
        epochs = self._slots.of_lane(self._lane)
        self._drop_published_outside(epochs)
        if not epochs:
            return Claim((), lambda: False, is_idle=True)
        return await self._rows.transact(lambda: self._claim_of(epochs))

    async def _claim_of(self, epochs: dict[int, int]) -> Claim:
        if self._deletions is not None and (self._published or not self._deletions.announced):
            await self._deletions.announce()
        if self._payload_type is None:
            ((self._payload_type,),) = await self._session.fetch(self._statements.payload_type)
            self._session.prepares(self._statements.typed(self._payload_type))
        async with self._session.transaction():
            epochs = await self._own(epochs)
            settled = await self._settle(epochs)
            leaving = (self._slots.surplus & epochs.keys()) - self._unsettled_slots(settled)
            await self._release(leaving)
            epochs = {slot: epoch for slot, epoch in epochs.items() if slot not in self._slots.surplus}
            await self._parking.release_due(self._buckets(epochs))
            rows = await self._read(epochs, settled)
            parked = await self._parking.hold_back(rows)
        self._committed(settled, leaving)
        records = self._records([row for row in rows if row["id"] not in parked], epochs)
        self._telemetry.claimed(records)
        return Claim(records, lambda: self._slots.held(epochs), is_idle=not rows)

    async def wait(self, seconds: float) -> None:
        # What a look doesn't find is asked for by claims.
        if self._parking.waits_for_time or self._slots.surplus:
            await asyncio.sleep(seconds)
        else:
            await self._slots.watch.wait(self._lane, seconds)

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        refused_topics = self._refused_topics.among(outcomes, self._parking.is_suspect)
        awaits_deliveries = self._parking.awaits_deliveries
        for outcome in outcomes:
            ownership = self._claimed.pop(outcome.record.id)
            if isinstance(outcome, Delivered):
                self._published[outcome.record.id] = ownership
                if awaits_deliveries:
                    self._parking.delivered(outcome.record, topic_refused=outcome.record.topic in refused_topics)
            elif isinstance(outcome, Retry) and outcome.scope is Scope.ROW:
                self._parking.row_refused(outcome, ownership)
        for retry in refused_topics.values():
            self._parking.topic_refused(replace(retry, scope=Scope.TOPIC))

    async def release(self) -> None:
        self._slots.set_ready(self._lane, False)
        patience_ends = time.monotonic() + _LAST_SETTLE_SECONDS
        while self._slots.of_lane(self._lane):
            patient = time.monotonic() < patience_ends
            try:
                waiting = await self._rows.transact(lambda: self._release_settled(patient=patient))  # noqa: B023
            except SourceUnavailableError as error:
                self._telemetry.database_unavailable(error, self)
                return
            if waiting:
                await asyncio.sleep(_LOCKED.ceiling_seconds / 4)
        self._drop_published_outside({})

    async def _release_settled(self, *, patient: bool) -> Collection[int]:
        """Let go of the slots, but if ``patient`` not of those with rows that may yet be marked; these."""
        if self._deletions is not None and self._published:
            await self._deletions.announce()
        async with self._session.transaction():
            epochs = await self._own(self._slots.of_lane(self._lane))
            settled = await self._settle(epochs)
            waiting = self._unsettled_slots(settled | set(self._unmarkable.active())) if patient else set()
            leaving = epochs.keys() - waiting
            await self._release(leaving)
        self._committed(settled, leaving)
        return waiting

    @property
    def in_flight(self) -> int:
        """How many rows are out to be published, or were published and aren't marked yet."""
        return len(self._claimed) + len(self._published)

    async def close(self) -> None:
        """Close the connection."""
        await self._session.close()

    # -- steps of the transaction

    async def _own(self, epochs: dict[int, int]) -> dict[int, int]:
        """Lock the slots and find out which are really ours; the others are lost."""
        rows = await self._session.fetch(OWN, list(epochs), list(epochs.values()))
        ours = {row["slot"]: epochs[row["slot"]] for row in rows}
        if len(ours) < len(epochs):
            self._slots.lost(epochs.keys() - ours.keys(), "another relay has taken them")
            self._drop_published_outside(ours)
        return ours

    async def _settle(self, epochs: dict[int, int]) -> set[int]:
        """Mark what Kafka acknowledged, park what it refused; the ids that need nothing more."""
        self._parking.pause(self._slots.paused_topics)
        await self._parking.learn(epochs, self._buckets(epochs))
        settled = await self._mark(epochs)
        await self._parking.settle(settled)
        return settled

    async def _mark(self, epochs: dict[int, int]) -> set[int]:
        held = set(self._unmarkable.active())
        ids = [id_ for id_, (slot, epoch) in self._published.items() if epochs.get(slot) == epoch and id_ not in held]
        counts, refused = await self._rows.run(ids, self._mark_some)
        for id_, error in refused.items():
            attempts, _ = self._unmarkable.hold(id_)
            if attempts == 1:
                self._telemetry.row_unmarkable(id_, error, why(error), deleting=self._deletions is not None)
        if sum(counts) == len(ids):
            return set(ids)
        # What is unsent is locked, refused, or wasn't tried. What is neither was deleted or marked by somebody.
        unsent = {row["id"] for row in await self._session.fetch(self._statements.unsettled, ids)}
        if not self._rows.careful:
            if new := unsent - self._postponed:
                self._telemetry.settle_postponed(sorted(new))
            self._postponed = unsent
        return set(ids) - unsent

    async def _mark_some(self, ids: Sequence[int]) -> list[int]:
        return [await self._session.change(self._statements.settle, ids)]

    def _unsettled_slots(self, settled: set[int]) -> set[int]:
        return {slot for id_, (slot, _) in self._published.items() if id_ not in settled}

    async def _release(self, slots: Collection[int]) -> None:
        if slots:
            await self._session.fetch(RELEASE, list(slots))

    async def _read(self, epochs: dict[int, int], settled: Collection[int] = ()) -> list[asyncpg.Record]:
        """Candidates in order of id; those that couldn't be locked have no ``event_id``.

        ``settled`` are known to be marked, in this very transaction or before.
        """
        buckets = self._buckets(epochs)
        if not buckets or len(self._unmarkable) >= _MOST_UNMARKABLE:
            return []
        assert self._payload_type is not None
        held = [*self._locked.active(), *self._parking.stuck()]
        lines = [*(line for line in held if isinstance(line, tuple)), *self._parking.refused_lines()]
        alone = (line for line in held if isinstance(line, int))
        arguments = (
            buckets,
            max(1, self._most_rows // len(buckets)),
            self._most_rows,
            [*(self._published.keys() - settled), *alone, *self._parking.refused_ids],
            self._parking.held_topics(),
            [topic for topic, _ in lines],
            [key for _, key in lines],
            self._claim_bytes,
        )
        if self._rows.careful:
            candidates = await self._session.fetch(self._statements.candidates, *arguments)
            return await self._read_each(await self._fitting([row["id"] for row in candidates]), epochs)
        rows = await self._session.fetch(self._statements.claim[self._payload_type], *arguments)
        # Where rows are large few of them fit, and no more are looked at than may.
        is_full = bool(rows) and 2 * rows[-1]["bytes"] > self._claim_bytes
        if is_full or 2 * len(rows) > self._most_rows:
            self._slots.backlog()
        self._most_rows = min(self._batch_rows, 2 * len(rows)) if is_full else self._batch_rows
        return rows

    async def _fitting(self, ids: Sequence[int]) -> Sequence[int]:
        """The first that fit into a claim, and one at least. What can't be measured isn't read either."""
        assert self._payload_type is not None
        statement = self._statements.sizes[self._payload_type]
        rows, refused = await self._rows.run(ids, lambda some: self._session.fetch(statement, some))
        sizes = {**{row["id"]: row["size"] for row in rows}, **dict.fromkeys(refused, 0)}
        left = self._claim_bytes
        for count, id_ in enumerate(ids):
            left -= sizes.get(id_, left + 1)
            if left < 0 and count:
                return ids[:count]
        return ids

    async def _read_each(self, ids: Sequence[int], epochs: Mapping[int, int]) -> list[asyncpg.Record]:
        """The candidates that can be read. Others are to be parked, and what waits for them is left out."""
        assert self._payload_type is not None
        read, identify = self._statements.read[self._payload_type], self._statements.identify
        rows, refused = await self._rows.run(ids, lambda some: self._session.fetch(read, some))
        if len(refused) >= _MANY_UNREADABLE and not rows:
            # A cast or a mapping that suits none of them.
            error = next(iter(refused.values()))
            raise SourceUnavailableError(f"read: none of the rows can be read ({why(error)})") from error
        known, unknown = await self._rows.run(list(refused), lambda some: self._session.fetch(identify, some))
        for id_, error in unknown.items():
            self._parking.row_stuck(id_, id_, error)
        behind: dict[Line, int] = {}
        for row in known:
            error = refused[row["id"]]
            self._unreadable(row, epochs, error, why(error))
            behind.setdefault(self._parking.waits_as(row["id"], row["topic"], row["key"]), row["id"])
        return [row for row in rows if row["id"] < behind.get((row["topic"], row["key"]), row["id"] + 1)]

    def _unreadable(self, row: asyncpg.Record, epochs: Mapping[int, int], error: BaseException, because: str) -> None:
        slot = row["bucket"] % self._layout_slots
        key = None if row["key"] is None else row["key"].encode()
        record = Record(row["id"], row["event_id"], row["topic"], key, None, ())
        reason = f"it can't be read from the table ({because}): correct the row"
        self._parking.row_refused(Retry(record, Scope.ROW, type(error).__name__, reason), (slot, epochs[slot]))

    def _buckets(self, epochs: Mapping[int, int]) -> list[int]:
        return [bucket for bucket in range(self._layout_buckets) if bucket % self._layout_slots in epochs]

    # -- after the commit

    def _committed(self, settled: set[int], leaving: Collection[int]) -> None:
        for id_ in settled:
            self._published.pop(id_, None)
        if self._unmarkable:
            for id_ in settled:
                self._unmarkable.clear(id_)
        self._parking.committed()
        if settled:
            self._telemetry.settled(settled)
        if leaving:
            self._slots.released(leaving)

    def _records(self, rows: Sequence[asyncpg.Record], epochs: dict[int, int]) -> list[Record]:
        """The rows that may be published: each key's up to the first that couldn't be locked."""
        records: list[Record] = []
        self._claimed = {}
        cut: set[Line] = set()
        ownerships = {slot: (slot, epoch) for slot, epoch in epochs.items()}
        for row in rows:
            # By position, since by name it is twice as dear; see _LOCKED.
            id_, bucket, topic, key, _, event_id, type_, payload, headers, created_at = row
            if cut and _line(id_, topic, key) in cut:
                continue
            if event_id is None:
                line = _line(id_, topic, key)
                cut.add(line)
                attempts, _ = self._locked.hold(line)
                if attempts == 1:
                    self._telemetry.key_locked(id_, topic)
                continue
            try:
                record = _record(id_, event_id, topic, key, type_, payload, headers, created_at)
            except (ValueError, RecursionError) as error:
                # Headers of an adopted table may be any text.
                self._unreadable(row, epochs, error, "its headers are no JSON of Unicode text")
                cut.add(self._parking.waits_as(id_, topic, key))
                continue
            records.append(record)
            self._claimed[id_] = ownerships[bucket % self._layout_slots]
        return records

    def _drop_published_outside(self, epochs: dict[int, int]) -> None:
        """What belongs to a slot that isn't ours any more is its new owner's to publish and to mark."""
        dropped = [id_ for id_, (slot, epoch) in self._published.items() if epochs.get(slot) != epoch]
        for id_ in dropped:
            del self._published[id_]
        if dropped:
            self._telemetry.claim_dropped(len(dropped), "published, but the slots were lost before they were marked")


def _line(id_: int, topic: str, key: str | None) -> Line:
    return id_ if key is None else (topic, key)


def _record(
    id_: int,
    event_id: str,
    topic: str,
    key: str | None,
    type_: str | None,
    payload: bytes | None,
    own_headers: str | None,
    created_at: str | None,
) -> Record:
    headers: list[Header] = [("id", event_id.encode())]
    if type_ is not None:
        headers.append(("type", type_.encode()))
    headers.append(("outbox-id", b"%d" % id_))
    if created_at is not None:
        headers.append(("created_at", created_at.encode()))
    if own_headers is not None and own_headers != "{}":
        headers.extend(_own_headers(json.loads(own_headers)))
    return Record(id_, event_id, topic, None if key is None else key.encode(), payload, headers)


def _own_headers(headers: Any) -> Iterator[Header]:
    """A row's own headers; where no constraint holds them to a flat object of text, what isn't text goes as JSON."""
    for name, value in headers.items() if isinstance(headers, dict) else [("headers", headers)]:
        if name not in RESERVED_HEADERS:
            yield name, (value if isinstance(value, str) else json.dumps(value)).encode()
