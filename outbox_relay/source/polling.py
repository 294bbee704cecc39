"""The polling source: claims unsent rows of the slots that a relay owns, and marks them when they are published.

One short transaction settles the last claim and makes the next; no transaction is open while Kafka is asked.

Why order holds: the transaction first locks the rows of its slots and checks their epochs (``OWN``), so it is ordered
with every hand-over. The *next* statement (``CLAIM``) therefore has a snapshot that contains whatever an earlier
owner marked. It reads each bucket from its lowest unsent row; where a row can't be locked, that row's key is cut from
there on. So a claim holds a gapless prefix of every key in it. A row that turns up late, below ids that are sent
already, is simply unsent and found; nothing here remembers a position.

Why nothing is published that a crash takes back: the claim locked the rows, so it has a transaction id, and its
COMMIT under ``synchronous_commit = on`` flushes, and replicates, everything that it saw.

The claim relies on the index ``outbox_unsent (bucket, id) WHERE sent_at IS NULL`` and on the primary key. Statistics of
a mostly empty outbox are stale when a burst comes, and a plan made before it is kept. So each statement is written such
that it has one sensible plan whatever the statistics, and the planner is told to scan nothing else;
``tests/acceptance/test_plans.py`` states what a row may cost.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Sequence
from typing import TypeAlias

import asyncpg

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.message import Delivered, Header, Outcome, Record, Retry, Scope
from outbox_relay.relay import Claim
from outbox_relay.retry import Backoff
from outbox_relay.source.holds import Holds
from outbox_relay.source.session import Session
from outbox_relay.source.slots import Slots
from outbox_relay.telemetry import Telemetry

# The settings are the transaction's own, so they hold behind a transaction pooler too. A plan is made once, since
# planning costs as much as a small claim and would find the same; and never compiled, which takes a second each claim.
OWN = """
-- own
WITH settings AS MATERIALIZED (
    SELECT set_config('synchronous_commit',
                      CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
                      true),
           set_config('enable_seqscan', 'off', true),
           set_config('enable_bitmapscan', 'off', true),
           set_config('plan_cache_mode', 'force_generic_plan', true),
           set_config('jit', 'off', true)
)
SELECT s.slot
FROM settings, outbox_slot s
JOIN unnest($1::smallint[], $2::bigint[]) AS mine (slot, epoch) ON mine.slot = s.slot AND mine.epoch = s.epoch
FOR NO KEY UPDATE OF s
"""

# Rows that a stranger has locked are left for later rather than waited for. num_nulls(…) = 1 is IS NULL in words from
# which the planner can't conclude that outbox_unsent would do: without a bucket all of that index is searched for an
# id, which looks cheap while it is small.
SETTLE = """
-- settle
UPDATE outbox SET sent_at = now()
WHERE id = ANY (ARRAY(
    SELECT o.id FROM outbox o WHERE o.id = ANY ($1::bigint[]) AND num_nulls(o.sent_at) = 1 FOR UPDATE SKIP LOCKED
))
RETURNING id
"""

UNSETTLED = """
-- unsettled
SELECT o.id FROM outbox o WHERE o.id = ANY ($1::bigint[]) AND num_nulls(o.sent_at) = 1
"""

# The epoch grows here too: a slot and an epoch together name one ownership for good.
RELEASE = """
-- release
UPDATE outbox_slot SET owner = NULL, epoch = epoch + 1 WHERE slot = ANY ($1::smallint[])
"""

# A bucket's rows from one on, in order, without those that wait. A range of (bucket, id), since with `bucket = b` and
# an order by id the planner walks the primary key instead. What waits is a hashed subquery; <> ALL (…) would compare
# each row with each thing that waits.
_UNSENT = """
        SELECT o.id, o.bucket, o.topic, o.key
        FROM outbox o
        WHERE (o.bucket, o.id) {start}
          AND (o.bucket, o.id) < ({bucket} + 1, -9223372036854775808)
          AND o.sent_at IS NULL
          AND o.id NOT IN (SELECT held.id FROM unnest($4::bigint[]) AS held (id))
          AND o.topic NOT IN (SELECT held.topic FROM unnest($5::text[]) AS held (topic))
          AND (o.key IS NULL OR (o.topic, o.key) NOT IN (
                   SELECT held.topic, held.key FROM unnest($6::text[], $7::text[]) AS held (topic, key)))
        ORDER BY o.bucket, o.id
        LIMIT {limit}"""

# The smallest bigint, since an application may choose its own ids.
_FIRST = _UNSENT.format(start=">= (owned.bucket, -9223372036854775808)", bucket="owned.bucket", limit="$2")
_NEXT = _UNSENT.format(start="> (deep.bucket, deep.last_id)", bucket="deep.bucket", limit="$3")

# RFC 3339. Printed by PostgreSQL, whose calendar is longer than Python's: an infinite created_at, or one of the year
# 10000, isn't worth stopping for, and arrives as PostgreSQL prints it.
CREATED_AT = """
           CASE WHEN o.created_at >= '0001-01-01 00:00Z' AND o.created_at < '10000-01-01 00:00Z'
                THEN to_char(o.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
                ELSE o.created_at::text END"""

# Each bucket is read on its own, so that no backlog of a bucket that isn't ours is stepped over. Each gives its share
# of the batch, so that none waits for another's backlog, and the room that is left goes to those that have more, the
# one with the oldest rows first. So hardly more is read than is taken, however the backlog is spread. Locked in order
# of id, since neighbours by id are neighbours on disk.
# A candidate without a row beside it couldn't be locked, or was changed meanwhile: there its key is cut.
CLAIM = f"""
-- claim
WITH share AS MATERIALIZED (
    SELECT c.id, c.bucket, c.topic, c.key
    FROM unnest($1::smallint[]) AS owned (bucket)
    CROSS JOIN LATERAL ({_FIRST}
    ) AS c
), room AS MATERIALIZED (
    SELECT c.id, c.bucket, c.topic, c.key
    FROM (SELECT s.bucket, max(s.id) AS last_id FROM share s
          GROUP BY s.bucket HAVING count(*) = $2 ORDER BY last_id) AS deep
    CROSS JOIN LATERAL ({_NEXT}
    ) AS c
    LIMIT greatest(0, $3 - (SELECT count(*) FROM share))
)
SELECT c.id, c.bucket, c.topic, c.key,
       locked.event_id, locked.type, locked.payload, locked.headers, locked.created_at
FROM (
    SELECT s.id, s.bucket, s.topic, s.key FROM share s
    UNION ALL
    SELECT r.id, r.bucket, r.topic, r.key FROM room r
    ORDER BY id
    LIMIT $3
) AS c
LEFT JOIN LATERAL (
    SELECT o.event_id::text, o.type, {{payload}} AS payload, o.headers::text, {CREATED_AT} AS created_at
    FROM outbox o
    WHERE o.bucket = c.bucket AND o.id = c.id AND o.sent_at IS NULL
      AND o.topic = c.topic AND o.key IS NOT DISTINCT FROM c.key
    FOR UPDATE SKIP LOCKED
) AS locked ON true
ORDER BY c.id
"""

# A payload goes through as PostgreSQL prints it, and is never decoded here.
_PAYLOAD = {"bytea": "o.payload", "other": "convert_to(o.payload::text, 'UTF8')"}

PAYLOAD_TYPE = """
-- payload type
SELECT CASE WHEN a.atttypid = 'bytea'::regtype THEN 'bytea' ELSE 'other' END AS payload
FROM pg_attribute a WHERE a.attrelid = 'outbox'::regclass AND a.attname = 'payload'
"""

# Another session's lock is usually gone soon, and looking again costs little.
_LOCKED = Backoff(first_seconds=0.05, ceiling_seconds=1.0)

# How long a last settle waits for a stranger's lock before the row is left to be published again.
_LAST_SETTLE_SECONDS = 5.0

#: What waits together: a ``(topic, key)``, or a row without a key by its id.
Line: TypeAlias = tuple[str, str] | int

#: ``(slot, epoch)``: what a row was claimed under.
Ownership: TypeAlias = tuple[int, int]


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
        backoff: Backoff,
    ) -> None:
        self._session = session
        self._slots = slots
        self._lane = lane
        self._telemetry = telemetry
        self._layout_buckets = layout_buckets
        self._layout_slots = layout_slots
        self._batch_rows = batch_rows
        self._statement: str | None = None
        self._claimed: dict[int, Ownership] = {}  # by id, the claim that is out
        self._published: dict[int, Ownership] = {}  # by id, acknowledged by Kafka and not marked yet
        self._held_topics: Holds[str] = Holds(backoff)
        self._held: Holds[Line] = Holds(backoff)
        self._locked: Holds[Line] = Holds(_LOCKED)

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
        async with self._session.transaction():
            epochs = await self._own(epochs)
            settled = await self._settle(epochs)
            leaving = (self._slots.surplus & epochs.keys()) - self._unsettled_slots(settled)
            await self._release(leaving)
            epochs = {slot: epoch for slot, epoch in epochs.items() if slot not in self._slots.surplus}
            rows = await self._read(epochs, settled)
        self._committed(settled, leaving)
        records = self._records(rows, epochs)
        self._telemetry.claimed(records)
        return Claim(records, lambda: self._slots.held(epochs), is_idle=not rows)

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        refused_topics: dict[str, Retry] = {}
        for outcome in outcomes:
            ownership = self._claimed.pop(outcome.record.id)
            if isinstance(outcome, Delivered):
                self._published[outcome.record.id] = ownership
                if self._held or self._held_topics:
                    self._held.clear(_line(outcome.record))
                    self._held_topics.clear(outcome.record.topic)
            elif isinstance(outcome, Retry):
                if outcome.scope is Scope.TOPIC:
                    refused_topics.setdefault(outcome.record.topic, outcome)
                else:
                    self._telemetry.refused(outcome, *self._held.hold(_line(outcome.record)))
        for topic, retry in refused_topics.items():
            self._telemetry.refused(retry, *self._held_topics.hold(topic))

    async def release(self) -> None:
        self._slots.set_ready(self._lane, False)
        patience_ends = time.monotonic() + _LAST_SETTLE_SECONDS
        while epochs := self._slots.of_lane(self._lane):
            try:
                async with self._session.transaction():
                    epochs = await self._own(epochs)
                    settled = await self._settle(epochs)
                    waiting = self._unsettled_slots(settled) if time.monotonic() < patience_ends else set()
                    leaving = epochs.keys() - waiting
                    await self._release(leaving)
            except SourceUnavailableError as error:
                self._telemetry.database_unavailable(error, self)
                return
            self._committed(settled, leaving)
            if waiting:
                await asyncio.sleep(_LOCKED.ceiling_seconds / 4)
        self._drop_published_outside({})

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
        """Mark what Kafka acknowledged; the ids that need nothing more."""
        ids = [id_ for id_, (slot, epoch) in self._published.items() if epochs.get(slot) == epoch]
        if not ids:
            return set()
        settled = {row["id"] for row in await self._session.fetch(SETTLE, ids)}
        missed = [id_ for id_ in ids if id_ not in settled]
        if missed:
            locked = {row["id"] for row in await self._session.fetch(UNSETTLED, missed)}
            # Neither marked by us nor unsent: somebody deleted the row or marked it.
            settled.update(id_ for id_ in missed if id_ not in locked)
            if locked:
                self._telemetry.settle_postponed(sorted(locked))
        return settled

    def _unsettled_slots(self, settled: set[int]) -> set[int]:
        return {slot for id_, (slot, _) in self._published.items() if id_ not in settled}

    async def _release(self, slots: Collection[int]) -> None:
        if slots:
            await self._session.fetch(RELEASE, list(slots))

    async def _read(self, epochs: dict[int, int], settled: Collection[int] = ()) -> list[asyncpg.Record]:
        """Candidates in order of id; those that couldn't be locked have no ``event_id``.

        ``settled`` are known to be marked, in this very transaction or before.
        """
        buckets = [b for b in range(self._layout_buckets) if b % self._layout_slots in epochs]
        if not buckets:
            return []
        if self._statement is None:
            ((kind,),) = await self._session.fetch(PAYLOAD_TYPE)
            self._statement = CLAIM.format(payload=_PAYLOAD[kind])
        held = {*self._held.active(), *self._locked.active()}
        keys = [line for line in held if isinstance(line, tuple)]
        return await self._session.fetch(
            self._statement,
            buckets,
            max(1, self._batch_rows // len(buckets)),
            self._batch_rows,
            [*(self._published.keys() - settled), *(line for line in held if isinstance(line, int))],
            self._held_topics.active(),
            [topic for topic, _ in keys],
            [key for _, key in keys],
        )

    # -- after the commit

    def _committed(self, settled: set[int], leaving: Collection[int]) -> None:
        for id_ in settled:
            self._published.pop(id_, None)
        if settled:
            self._telemetry.settled(sorted(settled))
        if leaving:
            self._slots.released(leaving)

    def _records(self, rows: Sequence[asyncpg.Record], epochs: dict[int, int]) -> list[Record]:
        """The rows that may be published: each key's up to the first that couldn't be locked."""
        records: list[Record] = []
        self._claimed = {}
        cut: set[Line] = set()
        for row in rows:
            line: Line = row["id"] if row["key"] is None else (row["topic"], row["key"])
            if line in cut:
                continue
            if row["event_id"] is None:
                cut.add(line)
                attempts, _ = self._locked.hold(line)
                if attempts == 1:
                    self._telemetry.key_locked(row["id"], row["topic"])
                continue
            records.append(_record(row))
            slot = row["bucket"] % self._layout_slots
            self._claimed[row["id"]] = (slot, epochs[slot])
        return records

    def _drop_published_outside(self, epochs: dict[int, int]) -> None:
        """What belongs to a slot that isn't ours any more is its new owner's to publish and to mark."""
        dropped = [id_ for id_, (slot, epoch) in self._published.items() if epochs.get(slot) != epoch]
        for id_ in dropped:
            del self._published[id_]
        if dropped:
            self._telemetry.claim_dropped(len(dropped), "published, but the slots were lost before they were marked")


def _line(record: Record) -> Line:
    """What waits together with this record: its ``(topic, key)``, or the row alone."""
    return record.id if record.key is None else (record.topic, record.key.decode())


def _record(row: asyncpg.Record) -> Record:
    headers: list[Header] = [("id", row["event_id"].encode())]
    if row["type"] is not None:
        headers.append(("type", row["type"].encode()))
    headers.append(("outbox-id", b"%d" % row["id"]))
    headers.append(("created_at", row["created_at"].encode()))
    if row["headers"] != "{}":
        headers.extend((name, value.encode()) for name, value in json.loads(row["headers"]).items())
    key = row["key"]
    return Record(
        id=row["id"],
        event_id=row["event_id"],
        topic=row["topic"],
        key=None if key is None else key.encode(),
        value=row["payload"],
        headers=headers,
    )
