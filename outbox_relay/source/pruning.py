"""Retention: deletes rows that were sent, or discarded, longer ago than they are to be kept.

No index by ``sent_at`` says which these are: every writer would pay for it. Rows are walked in order of id instead,
from the first that was too young last time to where none is old, since ids and times ascend together, nearly. What is
passed on the way (unsent, parked, locked by somebody) is met again when the walk starts at the lowest id, as it does at
times. So a row is deleted at the latest after twice the time, and an hour.

It is nobody's burden: batches are small and each its own transaction, locked rows are skipped rather than waited for,
and between batches it rests for longer than they take. Relies on the unique index over ``id``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.retry import Backoff
from outbox_relay.source.deletions import MAY_DELETE
from outbox_relay.source.session import Session
from outbox_relay.source.statements import OUTBOX, OutboxTable, literal, quoted
from outbox_relay.telemetry import Telemetry

#: The most rows that are looked at, and deleted, in one transaction.
BATCH_ROWS = 5_000
#: The rest after a batch, by how long it took: a quarter of one connection's time is the most that is used.
_REST = 3.0
#: The most between two sweeps, and between two that start at the lowest id. Rows that are kept for less than that are
#: looked for sooner.
_SWEEP_SECONDS = 60.0
_RESTART_SECONDS = 3600.0
#: Until somebody owns the slot that it takes.
_IDLE_SECONDS = 1.0
_FAILED = Backoff(first_seconds=1.0, ceiling_seconds=60.0)

_LOWEST = -9223372036854775808

_BEGIN = """
-- begin to prune
SELECT now() - make_interval(secs => $1) AS cut,
       {may_delete} AS may_prune
"""

# A batch that a crash takes back is only deleted again, so nobody waits for a disk or a standby. The plan is as for
# claims: of a table whose statistics are of its quiet hours, the planner would read all for each batch.
_SETTINGS = """
-- settings to prune
SELECT set_config('synchronous_commit', 'off', true),
       set_config('enable_seqscan', 'off', true),
       set_config('enable_bitmapscan', 'off', true),
       set_config('jit', 'off', true)
"""

_LOOK = """
-- look for rows to prune
SELECT count(*) AS looked_at,
       max(o.id) AS last_id,
       array_agg(o.id) FILTER (WHERE o.sent_at < $2) AS sent,
       array_agg(o.id) FILTER (WHERE o.is_discarded) AS discarded,
       min(o.id) FILTER (WHERE o.sent_at >= $2) AS first_young_id
FROM (
    SELECT o.{id} AS id, o.{sent_at} AS sent_at,
           o.{sent_at} IS NULL AND o.{parked_at} < $2 AND EXISTS (
               SELECT FROM outbox_parked p WHERE p.id = o.{id} AND p.state = 'discarded' AND p.parked_at < $2
           ) AS is_discarded
    FROM {outbox} o
    WHERE o.{id} > $1
    ORDER BY o.{id}
    LIMIT $3
) AS o
"""

# Whoever sees that a row is gone sees this too.
_NOTED = "noted AS (UPDATE outbox_layout SET pruned_until = $2 WHERE pruned_until IS NULL OR pruned_until < $2)"

_PRUNE_SENT = """
-- prune sent rows
WITH {noted}, pruned AS (
    DELETE FROM {outbox} AS old
    WHERE old.{id} = ANY (ARRAY(
        SELECT o.{id} FROM {outbox} o WHERE o.{id} = ANY ($1::bigint[]) AND o.{sent_at} < $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING old.{id}
)
SELECT count(*) AS rows FROM pruned
"""

# Without the lock of their slots: nothing is published because of a row that is discarded, nor kept back by it.
_PRUNE_DISCARDED = """
-- prune discarded rows
WITH {noted}, discarded AS MATERIALIZED (
    SELECT p.id FROM {outbox} o JOIN outbox_parked p ON p.id = o.{id}
    WHERE o.{id} = ANY ($1::bigint[]) AND p.state = 'discarded' AND p.parked_at < $2
    FOR UPDATE SKIP LOCKED
), unparked AS (
    DELETE FROM outbox_parked WHERE id = ANY (ARRAY(SELECT d.id FROM discarded d))
), pruned AS (
    DELETE FROM {outbox} AS old WHERE old.{id} = ANY (ARRAY(SELECT d.id FROM discarded d)) RETURNING old.{id}
)
SELECT count(*) AS rows FROM pruned
"""


@dataclass(frozen=True, slots=True)
class _Batch:
    """``is_last``: there is nothing more to look at, or only what is too young."""

    pruned: int
    last_id: int
    first_young_id: int | None
    is_last: bool


class Pruner:
    """Deletes old rows while ``is_ours`` says so: one relay of many. Two at once do no harm, and no good."""

    def __init__(
        self,
        session: Session,
        telemetry: Telemetry,
        is_ours: Callable[[], bool],
        *,
        retention_hours: float,
        table: OutboxTable = OUTBOX,
    ) -> None:
        self._session = session
        self._telemetry = telemetry
        self._is_ours = is_ours
        self._keep_seconds = retention_hours * 3600
        self._sweep_seconds = min(_SWEEP_SECONDS, self._keep_seconds / 10)
        self._restart_seconds = min(_RESTART_SECONDS, self._keep_seconds)
        self._after_id = _LOWEST
        self._restart_at = 0.0
        names = {name: quoted(getattr(table, name)) for name in ("id", "sent_at", "parked_at")}
        names["outbox"] = quoted(table.name)
        self._begin = _BEGIN.format(may_delete=MAY_DELETE.format(outbox_text=literal(names["outbox"])))
        self._look = _LOOK.format(**names)
        self._prune_sent = _PRUNE_SENT.format(noted=_NOTED, **names)
        self._prune_discarded = _PRUNE_DISCARDED.format(noted=_NOTED, **names)
        session.prepares([_SETTINGS, self._look, self._prune_sent, self._prune_discarded])

    async def run(self) -> None:
        """Sweep until cancelled. What keeps it from deleting is reported and waited out."""
        failures = 0
        while True:
            rest = self._sweep_seconds
            try:
                if self._is_ours():
                    await self.sweep()
                else:
                    rest = min(rest, _IDLE_SECONDS)
                self._telemetry.retention_resumed()
                failures = 0
            except SourceUnavailableError as error:
                self._telemetry.retention_stalled(error)
                failures += 1
                rest = _FAILED.delay_seconds(failures)
            await asyncio.sleep(rest)

    async def sweep(self) -> None:
        """Delete what is old enough, from where the last sweep stopped on. Raises SourceUnavailableError."""
        began = time.monotonic()
        if began >= self._restart_at:
            self._after_id = _LOWEST
            self._restart_at = began + self._restart_seconds
        pruned = 0
        try:
            (row,) = await self._session.fetch(self._begin, self._keep_seconds)
            if not row["may_prune"]:
                raise SourceUnavailableError(
                    "relay.retention_hours is set, and the relay's role may not delete rows: grant it outbox_pruner,"
                    " or what that role has in `outbox-relay schema print --roles`"
                )
            after_id, first_young_id = self._after_id, None
            while self._is_ours():
                batch_began = time.monotonic()
                batch = await self._batch(after_id, row["cut"])
                pruned += batch.pruned
                after_id = batch.last_id
                if first_young_id is None:
                    first_young_id = batch.first_young_id
                    self._after_id = after_id if first_young_id is None else first_young_id - 1
                if batch.is_last:
                    break
                await asyncio.sleep(_REST * (time.monotonic() - batch_began))
        finally:
            if pruned:
                self._telemetry.pruned(pruned, time.monotonic() - began)
        # There is a minute until the next: nobody's connection is taken for that.
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._session.close()

    async def _batch(self, after_id: int, cut: datetime) -> _Batch:
        """Delete what is old among the next rows."""
        pruned = 0
        async with self._session.transaction():
            await self._session.fetch(_SETTINGS)
            (looked,) = await self._session.fetch(self._look, after_id, cut, BATCH_ROWS)
            old = [(self._prune_sent, looked["sent"]), (self._prune_discarded, looked["discarded"])]
            old = [(statement, ids) for statement, ids in old if ids]
            for statement, ids in old:
                (row,) = await self._session.fetch(statement, ids, cut)
                pruned += row["rows"]
        first_young_id = looked["first_young_id"]
        return _Batch(
            pruned,
            after_id if looked["last_id"] is None else looked["last_id"],
            first_young_id,
            is_last=looked["looked_at"] < BATCH_ROWS or (first_young_id is not None and not old),
        )
