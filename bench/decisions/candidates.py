"""The alternatives to the product's sticky slot, as sources that share all of its code that they can.

They claim with the product's statement, so what differs is ownership alone. Each has a patience, ``lease_seconds``:
how long a process that hangs, and so doesn't close its connection, keeps what it has.
"""

from __future__ import annotations

import contextlib
import time
from typing import cast

import asyncpg

from outbox_relay.config import Config
from outbox_relay.daemon import policies_of
from outbox_relay.errors import SourceUnavailableError
from outbox_relay.relay import Claim
from outbox_relay.schema import Layout
from outbox_relay.source.polling import PollingSource
from outbox_relay.source.session import Session
from outbox_relay.source.slots import Slots
from outbox_relay.telemetry import Telemetry


class _Alternative(PollingSource):
    """A source that does without ``outbox_slot``. ``slots`` is how many units of ownership there are."""

    def __init__(self, session: Session, config: Config, layout: Layout, slots: int, telemetry: Telemetry) -> None:
        super().__init__(
            session,
            cast(Slots, None),
            0,
            telemetry,
            layout_buckets=layout.buckets,
            layout_slots=slots,
            batch_rows=config.relay.batch_rows,
            policies=policies_of(config),
        )
        self._timeout = f"{int(config.database.statement_timeout_seconds * 1000)}ms"
        self._patience_seconds = config.relay.lease_seconds
        self._patience = f"{int(config.relay.lease_seconds * 1000)}ms"

    async def _command(self, command: str) -> None:
        connection = await self._session.connection()
        with self._session.unavailable(command.split()[0]):
            await connection.execute(command)


# -- candidate A

BUCKET_TABLE = """
-- bucket table
CREATE TABLE bench_bucket (bucket smallint PRIMARY KEY);
INSERT INTO bench_bucket SELECT generate_series(0, (SELECT buckets FROM outbox_layout) - 1);
"""

# Free buckets that have work, from a different one on each time. The LIMIT keeps the planner from turning the probe
# of each bucket into one scan of the whole index.
PICK = """
-- pick
WITH settings AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'on', true),
           set_config('idle_in_transaction_session_timeout', $4, true),
           set_config('enable_seqscan', 'off', true),
           set_config('enable_bitmapscan', 'off', true),
           set_config('plan_cache_mode', 'force_generic_plan', true),
           set_config('jit', 'off', true)
)
SELECT b.bucket
FROM settings, bench_bucket b
WHERE (SELECT true FROM outbox o
       WHERE (o.bucket, o.id) >= (b.bucket, -9223372036854775808)
         AND (o.bucket, o.id) < (b.bucket + 1, -9223372036854775808)
         AND o.sent_at IS NULL
       ORDER BY o.bucket, o.id LIMIT 1)
ORDER BY (b.bucket - $1::integer + $3::integer) % $3::integer
LIMIT $2
FOR UPDATE OF b SKIP LOCKED
"""

# The rows are locked already. num_nulls as in the product's statement, so that the primary key is used.
MARK = """
-- mark
UPDATE outbox SET sent_at = now() WHERE id = ANY ($1::bigint[]) AND num_nulls(sent_at) = 1
"""


class ClaimTransaction(_Alternative):
    """Candidate A: the transaction that claims stays open until the rows are published and marked.

    Buckets are picked anew for each claim, at most a lane's share of them. PostgreSQL ends a transaction that idles
    longer than the patience.
    """

    def __init__(
        self, session: Session, config: Config, layout: Layout, telemetry: Telemetry, *, lane: int, lanes: int
    ) -> None:
        super().__init__(session, config, layout, layout.buckets, telemetry)
        self._share = -(-layout.buckets // lanes)
        self._turn = lane * self._share
        self._open: asyncpg.Connection | None = None

    async def claim(self) -> Claim:
        await self._finish()
        connection = await self._session.connection()
        await self._command(self._session._begin())
        self._open = connection
        ends = time.monotonic() + self._patience_seconds
        buckets = await self._session.fetch(PICK, self._turn, self._share, self._layout_buckets, self._patience)
        self._turn = (self._turn + self._share) % self._layout_buckets
        epochs = {row["bucket"]: 0 for row in buckets}
        rows = await self._read(epochs)
        if not rows:
            await self._finish()
        records = self._records(rows, epochs)
        self._telemetry.claimed(records)
        return Claim(records, lambda: not connection.is_closed() and time.monotonic() < ends, is_idle=not rows)

    async def release(self) -> None:
        with contextlib.suppress(SourceUnavailableError):
            await self._finish()

    async def _finish(self) -> None:
        """Mark what was published, and commit."""
        connection, self._open = self._open, None
        ids, self._published = set(self._published), {}
        if connection is None:
            return
        if connection.is_closed():
            if ids:
                self._telemetry.claim_dropped(len(ids), "published, but PostgreSQL has ended the claim's transaction")
            return
        if ids:
            await self._session.fetch(MARK, list(ids))
        await self._command("COMMIT")
        self._committed(ids, ())


# -- candidate B, owned by a lock alone

# What the product sets in each transaction is set for the session: a pooler is out of the question here.
JOIN = """
-- join
SELECT set_config('synchronous_commit', 'on', false),
       set_config('idle_session_timeout', $1, false),
       set_config('enable_seqscan', 'off', false),
       set_config('enable_bitmapscan', 'off', false),
       set_config('plan_cache_mode', 'force_generic_plan', false),
       set_config('jit', 'off', false),
       pg_try_advisory_lock('outbox_relay'::regclass::oid::integer, pg_backend_pid())
"""

LOOK_AROUND = """
-- look around
WITH held AS MATERIALIZED (
    SELECT l.classid, l.objid::bigint AS number
    FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
)
SELECT (SELECT count(*) FROM held h WHERE h.classid = 'outbox_relay'::regclass::oid) AS members,
       ARRAY(SELECT s.slot FROM outbox_slot s
             WHERE s.slot NOT IN (SELECT h.number FROM held h WHERE h.classid = 'outbox_slot'::regclass::oid)) AS free
"""

LOCK = """
-- lock
SELECT f.slot FROM unnest($1::integer[]) AS f (slot)
WHERE pg_try_advisory_lock('outbox_slot'::regclass::oid::integer, f.slot)
LIMIT $2
"""

UNLOCK = """
-- unlock
SELECT pg_advisory_unlock('outbox_slot'::regclass::oid::integer, f.slot) FROM unnest($1::integer[]) AS f (slot)
"""


class AdvisorySlots(_Alternative):
    """Candidate B with slots owned by session-level advisory locks, held by the very session that claims.

    Every lane is a member by itself. PostgreSQL ends a session that idles longer than the patience, and a lane idles
    while it publishes.
    """

    def __init__(self, session: Session, config: Config, layout: Layout, telemetry: Telemetry) -> None:
        super().__init__(session, config, layout, layout.slots, telemetry)
        self._heartbeat_seconds = config.relay.heartbeat_seconds
        self._connection: asyncpg.Connection | None = None
        self._sessions = 0
        self._owned: dict[int, int] = {}  # by slot, since which of our sessions
        self._surplus: set[int] = set()
        self._looked_at = 0.0

    async def join(self) -> None:
        """Be counted. Whatever an earlier session held is lost."""
        self._owned, self._surplus, self._looked_at = {}, set(), 0.0
        self._connection = await self._session.connection()
        self._sessions += 1
        await self._ask(JOIN, self._patience)

    async def claim(self) -> Claim:
        if self._connection is None or self._connection.is_closed():
            await self.join()
        if time.monotonic() >= self._looked_at + self._heartbeat_seconds:
            await self._look_around()
        connection, owned = self._connection, dict(self._owned)
        assert connection is not None
        self._drop_published_outside(owned)
        if not owned:
            return Claim((), lambda: False, is_idle=True)
        async with self._session.transaction():
            settled = await self._settle(owned)
            epochs = {slot: session for slot, session in owned.items() if slot not in self._surplus}
            rows = await self._read(epochs, settled)
        ends = time.monotonic() + self._patience_seconds
        leaving = (self._surplus & owned.keys()) - self._unsettled_slots(settled)
        self._committed(settled, ())
        await self._unlock(leaving)
        records = self._records(rows, epochs)
        self._telemetry.claimed(records)
        return Claim(records, lambda: not connection.is_closed() and time.monotonic() < ends, is_idle=not rows)

    async def release(self) -> None:
        if self._owned and self._connection is not None and not self._connection.is_closed():
            with contextlib.suppress(SourceUnavailableError):
                async with self._session.transaction():
                    settled = await self._settle(self._owned)
                self._committed(settled, ())
                await self._unlock(set(self._owned))

    async def _look_around(self) -> None:
        """Take what is free and due, and learn what is above the share."""
        self._looked_at = time.monotonic()
        (row,) = await self._ask(LOOK_AROUND)
        share = -(-self._layout_slots // max(1, row["members"]))
        self._surplus = set(sorted(self._owned)[share:])
        wanted = share - len(self._owned)
        if wanted > 0 and row["free"]:
            taken = await self._ask(LOCK, row["free"], wanted)
            self._owned |= {slot["slot"]: self._sessions for slot in taken}

    async def _unlock(self, slots: set[int]) -> None:
        if slots:
            await self._ask(UNLOCK, list(slots))
            self._owned = {slot: session for slot, session in self._owned.items() if slot not in slots}

    async def _ask(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """One statement that needs no transaction around it."""
        assert self._connection is not None
        with self._session.unavailable(statement.lstrip("\n- ").partition("\n")[0]):
            rows: list[asyncpg.Record] = await self._connection.fetch(statement, *arguments)
            return rows
