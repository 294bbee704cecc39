"""Rows that wait: parked with their reason, tried again when they are due, and their followers after them.

Everything here happens within the transaction of a claim, which holds the lock of its slots; the four rules that it
keeps are in ``docs/decisions/0009-where-waiting-rows-are-kept.md``. What is remembered here only saves looking: lines
that have nothing parked aren't looked up. It has at least what is in the database, since nobody but the owner of a slot
parks rows of it; but for a row whose topic an operator has changed, which waits for nobody, nor anybody for it. It is
what the transaction that is open has made of it, and all of it is learnt anew unless that was committed for sure.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import asyncpg

from outbox_relay.failures import Policies
from outbox_relay.message import Record, Retry
from outbox_relay.retry import Backoff
from outbox_relay.source.holds import Holds
from outbox_relay.source.parking_statements import (
    COPY_DEAD,
    DONE,
    DUE,
    FIRST_PARKED,
    FOLLOWERS,
    FREE,
    LEARN,
    MAKE_NEXT_DUE,
    NOT_DUE,
    OF_TOPIC,
    POSTPONE,
    ParkingStatements,
)
from outbox_relay.source.row_by_row import RowByRow
from outbox_relay.source.session import Session
from outbox_relay.source.sqlstate import why
from outbox_relay.source.statements import OutboxTable
from outbox_relay.telemetry import Telemetry

#: ``(slot, epoch)``: what a row was claimed under.
Ownership: TypeAlias = tuple[int, int]

#: What waits together: a ``(topic, key)``, or a row alone by its id.
Line: TypeAlias = tuple[str, str] | int

#: A row that PostgreSQL doesn't let be parked, or be put back, is tried again this seldom.
_STUCK = Backoff(first_seconds=1.0, ceiling_seconds=60.0)

#: So often a topic is tried with all its rows, which are left where they are; then they are parked, and one is tried.
_TRIES_BEFORE_PARKING = 3

#: A row that is due and that somebody has locked is tried again so much later.
_POSTPONED_SECONDS = 1.0

# What is due is looked for this often, and less often while nothing is.
_LOOK_SECONDS = 0.25
_LOOK_CEILING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Wait:
    """Why a row is parked."""

    id: int
    line: Line
    state: str
    error: str | None = None
    reason: str | None = None
    max_attempts: int = 0


@dataclass(frozen=True, slots=True)
class _Refused:
    retry: Retry
    ownership: Ownership


@dataclass(frozen=True, slots=True)
class _Tried:
    slot: int
    refused_before: bool  #: by Kafka, for a fault of its own


class Parking:
    """What waits in the slots of one lane."""

    def __init__(
        self,
        session: Session,
        rows: RowByRow,
        telemetry: Telemetry,
        policies: Policies,
        table: OutboxTable,
        *,
        layout_slots: int,
        batch_rows: int,
    ) -> None:
        self._session = session
        self._rows = rows
        self._telemetry = telemetry
        self._policies = policies
        self._statements = ParkingStatements(table)
        session.prepares(self._statements.all())
        self._layout_slots = layout_slots
        self._batch_rows = batch_rows
        self._epochs: dict[int, int] = {}  # the slots of which all is known, by slot
        # By slot, a hash of each line that has parked rows, or had; rows without a key count as one line.
        self._lines: dict[int, set[int]] = defaultdict(set)
        self._trying: dict[int, _Tried] = {}  # by id
        self._freed: list[asyncpg.Record] = []  # lines with followers that needn't wait any more
        self._refused: dict[int, _Refused] = {}  # by id, to be parked
        self._topics: set[str] = set()  # those that have rows parked for their sake
        self._unproven: dict[str, Retry | None] = {}  # topics that took nothing since they refused everything
        self._holds: Holds[str] = Holds(policies.backoff)
        self._paused: Collection[str] = ()
        self._stuck: Holds[Line] = Holds(_STUCK)  # rows that PostgreSQL doesn't let be changed, and what waits for them
        self._look_at = 0.0
        self._look_seconds = _LOOK_SECONDS
        self._parked: list[asyncpg.Record] = []  # in the transaction that is open
        self._is_sure = True  # no transaction is open, and the last one was committed

    # -- what became of rows

    @property
    def awaits_deliveries(self) -> bool:
        """Whether :meth:`delivered` has anything to learn."""
        return bool(self._trying or self._unproven)

    def delivered(self, record: Record, *, topic_refused: bool) -> None:
        """``topic_refused``: one partition of the topic may answer while another doesn't."""
        if (tried := self._trying.get(record.id)) and tried.refused_before:
            self._telemetry.row_accepted(record)
        if record.topic in self._unproven and not topic_refused:
            del self._unproven[record.topic]
            if self._holds.clear(record.topic):
                self._telemetry.topic_accepted(record.topic)

    def row_refused(self, retry: Retry, ownership: Ownership) -> None:
        """``ownership``: what its row was claimed under."""
        self._refused[retry.record.id] = _Refused(_without_contents(retry), ownership)

    def topic_refused(self, retry: Retry) -> None:
        topic = retry.record.topic
        self._unproven[topic] = _without_contents(retry)
        self._telemetry.refused(retry, *self._holds.hold(topic))

    def row_stuck(self, id_: int, line: Line, error: BaseException) -> float:
        """PostgreSQL doesn't let the row be changed; the seconds until it is tried again."""
        attempts, delay_seconds = self._stuck.hold(line)
        if attempts == 1:
            self._telemetry.row_stuck(id_, error, why(error))
        return delay_seconds

    def is_suspect(self, topic: str) -> bool:
        """Whether the topic took nothing since it was refused as a whole, and is tried with all its rows."""
        return topic in self._unproven and not self._is_parked(topic)

    # -- what a claim leaves out

    @property
    def refused_ids(self) -> Collection[int]:
        """Rows that are to be parked and aren't yet: somebody had them locked, or it comes in this transaction."""
        return self._refused.keys()

    def stuck(self) -> list[Line]:
        """What is left where it is, since PostgreSQL doesn't let it be parked."""
        return self._stuck.active()

    def waits_as(self, id_: int, topic: str, key: str | None) -> Line:
        """What waits with a row: all of its ``(topic, key)``, or the row alone."""
        return (topic, key) if key is not None and self._policies.of(topic).block else id_

    def refused_lines(self) -> list[tuple[str, str]]:
        """Their ``(topic, key)``, as far as followers wait for them."""
        records = (refused.retry.record for refused in self._refused.values())
        return [
            (record.topic, record.key.decode())
            for record in records
            if record.key is not None and self._policies.of(record.topic).block
        ]

    @property
    def waits_for_time(self) -> bool:
        """Whether something is to be tried that is neither among the rows that can be sent nor due."""
        return bool(self._freed or self._topics or self._unproven)

    def held_topics(self) -> list[str]:
        """Topics whose rows are left where they are for now."""
        return [topic for topic in self._holds.active() if not self._is_parked(topic)]

    # -- steps of the transaction

    async def learn(self, epochs: Mapping[int, int], buckets: Sequence[int]) -> None:
        """Know all that is parked in these slots, and nothing of others."""
        if not self._is_sure:
            self._epochs.clear()
            self._lines.clear()
            self._trying.clear()
            self._freed.clear()
        self._is_sure = False
        for slot in [slot for slot, epoch in self._epochs.items() if epochs.get(slot) != epoch]:
            self._forget(slot)
        for id_, refused in list(self._refused.items()):
            slot, epoch = refused.ownership
            if epochs.get(slot) != epoch:
                del self._refused[id_]  # its new owner tries it
        for slot in epochs.keys() - self._epochs.keys():
            # One at a time, since millions may wait.
            await self._learn(slot, [bucket for bucket in buckets if bucket % self._layout_slots == slot])
            self._look_at = 0.0
        self._epochs.update(epochs)

    async def _learn(self, slot: int, buckets: Sequence[int]) -> None:
        for row in await self._session.fetch(LEARN, buckets):
            topic = row["topic"]
            self._lines[slot].add(_line(topic, row["key"]))
            self._trying.update(dict.fromkeys(row["trying"] or (), _Tried(slot, row["refused"])))
            if row["for_topic"]:
                self._topics.add(topic)
                self._unproven.setdefault(topic, None)
            if row["blocked"] and not self._policies.of(topic).block:
                self._freed.append(row)

    def _forget(self, slot: int) -> None:
        del self._epochs[slot]
        self._lines.pop(slot, None)
        self._trying = {id_: tried for id_, tried in self._trying.items() if tried.slot != slot}
        self._freed = [line for line in self._freed if line["bucket"] % self._layout_slots != slot]

    async def settle(self, settled: Collection[int]) -> None:
        """What was sent is done waiting, so that its followers are due; what was refused is parked."""
        self._parked = []
        if done := [id_ for id_ in settled if id_ in self._trying]:
            await self._make_next_due(await self._session.fetch(DONE, done))
            for id_ in done:
                del self._trying[id_]
        await self._park(
            [
                _Wait(
                    id_,
                    self._line_of(refused.retry.record),
                    "retry",
                    refused.retry.error,
                    refused.retry.reason,
                    self._policies.of(refused.retry.record.topic).max_attempts,
                )
                for id_, refused in self._refused.items()
            ]
        )
        parked = {row["id"] for row in self._parked}
        if missed := [id_ for id_ in self._refused if id_ not in parked]:
            locked = {row["id"] for row in await self._session.fetch(self._statements.unparked, missed)}
            # Somebody deleted the others, or marked them as sent; or they are parked, by a commit that was in doubt.
            self._refused = {id_: refused for id_, refused in self._refused.items() if id_ in parked | locked}

    async def release_due(self, buckets: Sequence[int]) -> None:
        """Put rows that are due back among those that can be sent."""
        # Also where nothing is remembered: an operator may have given a row another topic, and so another line.
        if time.monotonic() < self._look_at:
            return
        await self._free()
        # Some that are being tried, or are due, may be gone: deleted, or marked by somebody.
        gone = set(self._trying)
        room = self._batch_rows - len(self._trying)
        ids = [] if room <= 0 else await self._due(buckets, room)
        if ids:
            rows, refused = await self._rows.run(
                ids, lambda some: self._session.fetch(self._statements.try_again, some)
            )
            tried = {row["id"]: _Tried(row["bucket"] % self._layout_slots, row["attempts"] > 0) for row in rows}
            self._trying.update(tried)
            # Those that are somebody's, locked, or stuck. They aren't looked at all the time, nor keep others from it.
            later = {id_: _POSTPONED_SECONDS for id_ in ids if id_ not in tried}
            later |= {id_: self.row_stuck(id_, id_, error) for id_, error in refused.items()}
            if later:
                await self._session.fetch(POSTPONE, list(later), list(later.values()))
            gone |= later.keys()
        if gone:
            forgotten = await self._session.fetch(self._statements.forget_gone, list(gone))
            for row in forgotten:
                self._trying.pop(row["id"], None)
            await self._make_next_due(forgotten)
        self._look_seconds = _LOOK_SECONDS if ids else min(_LOOK_CEILING_SECONDS, self._look_seconds * 2)
        self._look_at = 0.0 if ids or self._freed else time.monotonic() + self._look_seconds

    async def hold_back(self, rows: Sequence[asyncpg.Record]) -> set[int]:
        """Park those of a claim that may not be sent now; their ids."""
        # Mostly nothing waits, and then this is to cost a row nothing.
        waits: list[_Wait] = []
        if self._paused or self._topics or self._unproven:
            waits = [wait for row in rows if (wait := self._waits_for_topic(row)) is not None]
        waiting = {wait.id for wait in waits}
        asked: list[asyncpg.Record] = []
        if any(self._lines.values()):
            asked = [row for row in rows if row["id"] not in waiting and self._may_be_behind(row)]
        if asked:
            lines = list(dict.fromkeys((row["bucket"], row["topic"], row["key"]) for row in asked))
            first = await self._session.fetch(FIRST_PARKED, *map(list, zip(*lines, strict=True)))
            parked = {line: row["id"] for line, row in zip(lines, first, strict=True)}
            for (bucket, topic, key), id_ in parked.items():
                if id_ is None:
                    self._lines[bucket % self._layout_slots].discard(_line(topic, key))
            for row in asked:
                before = parked[row["bucket"], row["topic"], row["key"]]
                if before is not None and before < row["id"]:
                    waits.append(_Wait(row["id"], self._line_of_row(row), "blocked"))
        await self._park(waits)
        return {wait.id for wait in waits}

    def committed(self) -> None:
        """The transaction is durable."""
        self._is_sure = True
        parked = 0
        for row in self._parked:
            refused = self._refused.pop(row["id"], None)
            if refused is None:
                parked += 1
            elif row["state"] == "dead":
                self._telemetry.dead(refused.retry, row["attempts"])
            else:
                self._telemetry.refused(refused.retry, row["attempts"], row["due_seconds"])
        if parked:
            self._telemetry.parked(parked)
        self._parked = []

    def pause(self, topics: Collection[str]) -> None:
        """Topics that an operator has paused."""
        self._paused = topics

    # -- pieces

    async def _free(self) -> None:
        """Some of the followers that needn't wait, so that a claim doesn't take long."""
        lines, most = self._freed[-self._batch_rows :], self._batch_rows
        if lines and len(await self._session.fetch(FREE, *_columns(lines), most)) < most:
            del self._freed[-len(lines) :]

    async def _due(self, buckets: Sequence[int], room: int) -> list[int]:
        each = max(1, room // max(1, len(buckets)))
        due = await self._session.fetch(DUE, buckets, each)
        ids = [row["id"] for row in due if row["state"] != "blocked"]
        if lines := [row for row in due if row["state"] == "blocked"]:
            followers = await self._session.fetch(FOLLOWERS, *_columns(lines), max(1, room // len(lines)))
            ids += [row["id"] for row in followers]
            if behind := {row["id"] for row in lines} - set(ids):
                await self._session.fetch(NOT_DUE, list(behind))
        held = set(self._holds.active())
        for topic in sorted(self._topics):
            if topic in held or topic in self._paused:
                continue
            most = 1 if topic in self._unproven else room
            of_topic = await self._session.fetch(OF_TOPIC, buckets, topic, each, most)
            if not of_topic:
                self._topics.discard(topic)
                self._unproven.pop(topic, None)
            ids += [row["id"] for row in of_topic]
        return ids

    async def _park(self, waits: Sequence[_Wait]) -> None:
        backoff = self._policies.backoff
        parked, refused = await self._rows.run(
            waits,
            lambda some: self._session.fetch(
                self._statements.park,
                [wait.id for wait in some],
                [wait.state for wait in some],
                [wait.error for wait in some],
                [wait.reason for wait in some],
                [wait.max_attempts for wait in some],
                backoff.first_seconds,
                backoff.ceiling_seconds,
            ),
        )
        for wait, error in refused.items():
            self._refused.pop(wait.id, None)
            self.row_stuck(wait.id, wait.line, error)
        for row in parked:
            self._trying.pop(row["id"], None)
            self._lines[row["bucket"] % self._layout_slots].add(_line(row["topic"], row["key"]))
        self._parked += parked
        for row in parked:
            if row["state"] == "dead":
                await self._copy(row["id"], self._policies.of(row["topic"]).dead_letter_topic(row["topic"]))

    async def _copy(self, id_: int, topic: str | None) -> None:
        """Also where the table refuses it the row is dead, and the others go on."""
        if topic is not None:
            _, refused = await self._rows.run([id_], lambda ids: self._session.fetch(COPY_DEAD, *ids, topic))
            for error in refused.values():
                self._telemetry.row_uncopied(id_, topic, error, why(error))

    async def _make_next_due(self, lines: Sequence[Any]) -> None:
        if lines:
            await self._session.fetch(MAKE_NEXT_DUE, *_columns(lines))
            self._look_at = 0.0

    def _waits_for_topic(self, row: asyncpg.Record) -> _Wait | None:
        topic = row["topic"]
        if row["event_id"] is None:
            return None
        if topic in self._paused:
            self._topics.add(topic)
            return _Wait(row["id"], self._line_of_row(row), "topic", "Paused", "resume the topic")
        # Once refused, one that was tried waits as the others do.
        if row["id"] in self._trying and not self._holds.is_active(topic):
            return None
        # Where nothing holds followers back, those of a topic that takes rows again still come after the parked ones.
        after_others = topic in self._topics and not self._policies.of(topic).block
        if not self._is_parked(topic) and not after_others:
            return None
        self._topics.add(topic)
        retry = self._unproven.get(topic)
        error, reason = (None, None) if retry is None else (retry.error, retry.reason)
        return _Wait(row["id"], self._line_of_row(row), "topic", error, reason)

    def _line_of_row(self, row: asyncpg.Record) -> Line:
        return self.waits_as(row["id"], row["topic"], row["key"])

    def _line_of(self, record: Record) -> Line:
        return self.waits_as(record.id, record.topic, None if record.key is None else record.key.decode())

    def _is_parked(self, topic: str) -> bool:
        tried_enough = self._holds.failures(topic) > _TRIES_BEFORE_PARKING
        return topic in self._unproven and (topic in self._topics or tried_enough)

    def _may_be_behind(self, row: asyncpg.Record) -> bool:
        return (
            row["event_id"] is not None
            and row["key"] is not None
            and _line(row["topic"], row["key"]) in self._lines.get(row["bucket"] % self._layout_slots, ())
            and self._policies.of(row["topic"]).block
        )


def _without_contents(retry: Retry) -> Retry:
    """What is remembered while a row waits, which may be long, and large."""
    return replace(retry, record=replace(retry.record, value=None, headers=()))


def _line(topic: str, key: str | None) -> int:
    return hash((topic, key))


def _columns(lines: Sequence[Any]) -> list[list[Any]]:
    return [[line[name] for line in lines] for name in ("bucket", "line", "topic", "key")]
