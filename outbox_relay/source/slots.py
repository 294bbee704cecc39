"""Who owns which slot.

A slot is a share of the outbox (every bucket ``b`` with ``b % slots == slot``) and belongs to one relay at a time.
Relays announce themselves in ``outbox_relay`` and renew their row with each heartbeat. Slots without a living owner
are taken, up to a fair share; what a relay has above its share it lets go once its claim there is settled.

An owner is dead when its lease ran out, or, if it is connected directly, when the advisory lock that its session
held is gone and it wasn't heard of for two heartbeats since. PostgreSQL drops the lock with the connection, so a
killed relay is replaced long before its lease runs out, while one that only lost its connection, as all do when
PostgreSQL is restarted, keeps its slots. The lock only saves waiting. What keeps two relays apart is the slot's
``epoch``, which every claim checks under lock (see ``polling.py``), so nothing here has to be timely for order to hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass
from datetime import datetime

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.relay import Poll
from outbox_relay.source import watch
from outbox_relay.source.session import Session
from outbox_relay.source.statements import OUTBOX, OutboxTable, literal, quoted
from outbox_relay.source.watch import Watch
from outbox_relay.telemetry import Telemetry

# The class of the advisory lock is the oid of this very table, so that a stranger's number doesn't meet it.
_LOCK_CLASS = "'outbox_relay'::regclass::oid::bigint::bit(32)::integer"

#: A living relay that lost its connection has its lock again after one heartbeat, or a little more.
_MISSED_HEARTBEATS = 2

#: With more NOTIFYs than this between two heartbeats a relay doesn't ask for them until all its lanes are idle.
_MOST_WORDS = 20

# $3 is who this relay was before its row was lost: slots that nobody has taken since are still its own.
REGISTER = """
-- register
WITH me AS (
    INSERT INTO outbox_relay (name, lease_seconds, ready, direct) VALUES ($1, $2, false, false) RETURNING relay_id
), kept AS (
    UPDATE outbox_slot SET owner = me.relay_id FROM me WHERE owner = $3
)
SELECT relay_id FROM me
"""

# Behind a pooler the process id that the connection was told isn't the backend's: no lock, for it would be
# somebody else's soon.
LOCK = f"""
-- lock
SELECT CASE WHEN pg_backend_pid() = $2
            THEN pg_try_advisory_lock({_LOCK_CLASS}, ($1::bigint & 2147483647)::integer)
            ELSE false END AS direct
"""

#: That nobody has the advisory lock of relay ``r``.
UNLOCKED = """NOT EXISTS (
        SELECT FROM pg_locks l
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
          AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
          AND l.classid = 'outbox_relay'::regclass::oid
          AND l.objid::bigint = r.relay_id & 2147483647
    )"""

# $1 is the asking relay, which is alive by asking. {missed} and {renewed_at} are those whose lock has been missed for
# long enough, with when they were heard of last.
_ALIVE = f"""peers AS MATERIALIZED (
    SELECT r.relay_id, r.ready, r.renewed_at, r.direct AND {UNLOCKED} AS unlocked
    FROM outbox_relay r
    WHERE r.relay_id <> $1 AND r.renewed_at > now() - make_interval(secs => r.lease_seconds)
), alive AS MATERIALIZED (
    SELECT p.relay_id, p.ready FROM peers p
    WHERE NOT p.unlocked OR (p.relay_id, p.renewed_at) NOT IN (
        SELECT m.relay_id, m.renewed_at FROM unnest({{missed}}::bigint[], {{renewed_at}}::timestamptz[])
            AS m (relay_id, renewed_at))
)"""

# $6 are the buckets that idle lanes wait for; what is found there is told in the same breath.
_HEARTBEAT = f"""
-- heartbeat
WITH renewed AS (
    UPDATE outbox_relay SET renewed_at = now(), ready = $2, direct = $3, listens = $7 WHERE relay_id = $1
    RETURNING relay_id
), {_ALIVE.format(missed="$4", renewed_at="$5")}
SELECT EXISTS (SELECT FROM renewed) AS registered,
       ARRAY(SELECT a.relay_id FROM alive a WHERE a.ready) AS ready_peers,
       ARRAY(SELECT p.relay_id FROM peers p WHERE p.unlocked ORDER BY p.relay_id) AS unlocked_peers,
       ARRAY(SELECT p.renewed_at FROM peers p WHERE p.unlocked ORDER BY p.relay_id) AS unlocked_renewed_at,
       ARRAY(SELECT s.slot FROM outbox_slot s WHERE s.owner = $1 ORDER BY s.slot) AS owned,
       ARRAY(SELECT s.epoch FROM outbox_slot s WHERE s.owner = $1 ORDER BY s.slot) AS epochs,
       ARRAY(SELECT s.slot FROM outbox_slot s
             WHERE s.owner IS NULL
                OR (s.owner <> $1 AND s.owner NOT IN (SELECT a.relay_id FROM alive a))) AS free,
       (SELECT count(*) FROM outbox_slot) AS slots,
       ARRAY(SELECT paused.topic FROM outbox_pause paused) AS paused_topics,{{look}} AS look
"""

_LOOK = """
-- look
SELECT{look} AS look
"""

TAKE = f"""
-- take
WITH {_ALIVE.format(missed="$4", renewed_at="$5")}
UPDATE outbox_slot SET owner = $1, epoch = epoch + 1, taken_at = now()
WHERE slot = ANY (ARRAY(
    SELECT s.slot FROM outbox_slot s
    WHERE s.slot = ANY ($2::smallint[])
      AND (s.owner IS NULL OR (s.owner <> $1 AND s.owner NOT IN (SELECT a.relay_id FROM alive a)))
    ORDER BY s.slot
    LIMIT $3
    FOR UPDATE SKIP LOCKED
))
RETURNING slot, epoch
"""

# In a statement of its own: who writes a row once this is seen wakes the relay, and what was written before is seen by
# the look that follows.
LISTEN = """
-- listen
UPDATE outbox_relay SET listens = true WHERE relay_id = $1
"""

# Long dead relays are only history; a lease is what makes one dead.
FORGET = """
-- forget
DELETE FROM outbox_relay
WHERE relay_id <> $1 AND renewed_at < now() - make_interval(secs => 60 * lease_seconds)
"""

LEAVE = """
-- leave
WITH freed AS (UPDATE outbox_slot SET owner = NULL, epoch = epoch + 1 WHERE owner = $1)
DELETE FROM outbox_relay WHERE relay_id = $1
"""


def fair_share(slots: int, ready_peers: Collection[int], me: int) -> int:
    """How many of ``slots`` belong to relay ``me``: even, and those left over go to the oldest relays."""
    relays = sorted({*ready_peers, me})
    share, left_over = divmod(slots, len(relays))
    return share + (relays.index(me) < left_over)


@dataclass(slots=True)
class _Owned:
    epoch: int
    lane: int


class Slots:
    """The slots of one relay process, spread over its lanes.

    The database is the truth: each heartbeat replaces what is known here. A lane asks :meth:`of_lane` before
    a claim and :meth:`held` before each send.
    """

    def __init__(
        self,
        session: Session,
        telemetry: Telemetry,
        *,
        name: str,
        lanes: int,
        lease_seconds: float,
        heartbeat_seconds: float,
        poll: Poll,
        layout_buckets: int,
        layout_slots: int,
        table: OutboxTable = OUTBOX,
        wake_up: bool = True,
    ) -> None:
        self._session = session
        self._telemetry = telemetry
        self._name = name
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._layout_buckets = layout_buckets
        self._layout_slots = layout_slots
        self._heartbeat = _HEARTBEAT.format(look=watch.look(table, "$6"))
        self._look = _LOOK.format(look=watch.look(table, "$1"))
        self._find_wake_up = watch.FIND_WAKE_UP.format(outbox_text=literal(quoted(table.name)))
        self._wake_up = wake_up
        self._is_woken = False  # by a NOTIFY, on the session of now
        self._listens = False  # and has said so: it looks no more between heartbeats
        self._nudge = asyncio.Event()  # to beat at once, or to look sooner
        self._beats_at = 0.0
        self.watch = Watch(poll, self._nudge.set)  #: where idle lanes wait
        self._relay_id: int | None = None
        self._former_id: int | None = None  # announced last; its row may be lost since
        self._direct = False
        self._releases = 0
        self._owned: dict[int, _Owned] = {}
        self._surplus: set[int] = set()
        # Peers whose lock is missed, by id and when they were heard of last.
        self._unlocked_since: dict[tuple[int, datetime], float] = {}
        self._ready = [False] * lanes
        self.paused_topics: frozenset[str] = frozenset()  #: whose rows wait until an operator resumes them
        self._valid_until = 0.0
        self._first_beat = asyncio.Event()

    # -- what lanes ask

    async def known(self) -> bool:
        """Whether slots were shared out since the start; waits for it as long as a heartbeat takes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._heartbeat_seconds):
                await self._first_beat.wait()
        return self._first_beat.is_set()

    def of_lane(self, lane: int) -> dict[int, int]:
        """``{slot: epoch}`` that this lane holds, surplus included."""
        return {slot: owned.epoch for slot, owned in self._owned.items() if owned.lane == lane}

    @property
    def surplus(self) -> Set[int]:
        """Slots above the fair share: not claimed from, and let go once nothing there is unsettled."""
        return self._surplus

    def held(self, epochs: dict[int, int]) -> bool:
        """Whether these slots are still ours, as far as can be known without asking PostgreSQL."""
        return self.in_lease() and all(
            (owned := self._owned.get(slot)) is not None and owned.epoch == epoch for slot, epoch in epochs.items()
        )

    def owns(self, slot: int) -> bool:
        """Whether the slot is ours, as far as can be known without asking PostgreSQL."""
        return self.in_lease() and slot in self._owned

    def in_lease(self) -> bool:
        """Whether the last heartbeat is recent enough that no other relay can take us for dead."""
        return time.monotonic() < self._valid_until

    # -- what lanes report

    def set_ready(self, lane: int, ready: bool) -> None:
        """Whether the lane can publish. A relay that isn't ready in every lane takes no further slots."""
        if self._ready[lane] != ready:
            self._ready[lane] = ready
            self._beat_at_once()

    def released(self, slots: Iterable[int]) -> None:
        self._releases += 1
        gone = {slot for slot in slots if self._owned.pop(slot, None) is not None}
        self._surplus -= gone
        if gone:
            self._telemetry.slots_released(gone, len(self._owned))

    def lost(self, slots: Iterable[int], reason: str) -> None:
        gone = {slot for slot in slots if self._owned.pop(slot, None) is not None}
        self._surplus -= gone
        if gone:
            self._telemetry.slots_lost(gone, len(self._owned), reason)

    # -- the heartbeat

    async def run(self) -> None:
        """Beat until cancelled, and look for rows in between. A database out of reach is reported and waited for."""
        while True:
            self._nudge.clear()
            now = time.monotonic()
            beats, looks = now >= self._beats_at, now >= self._looks_at
            try:
                if beats:  # which looks, too
                    self._beats_at = now + self._heartbeat_seconds
                    await self.beat()
                    self._telemetry.database_available(self)
                elif looks:
                    await self._listen_if_idle()
                    await self.look()
            except SourceUnavailableError as error:
                self._telemetry.database_unavailable(error, self)
                # Who loses the database with us gets as long as we do to come back.
                self._unlocked_since.clear()
                # Lanes that wait find out now whether they lost it too, rather than when there is something to send.
                self.watch.wake()
            if beats or looks:
                # Also where it failed, or it would be made again at once.
                self.watch.looked()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(self._beats_at, self._looks_at) - time.monotonic())):
                    await self._nudge.wait()

    @property
    def _looks_at(self) -> float:
        # What was written while a lane made its last claim had nobody to wake, so it is looked for until all is calm.
        return math.inf if self._listens and self.watch.is_calm else self.watch.look_at

    def _beat_at_once(self) -> None:
        self._beats_at = 0.0
        self._nudge.set()

    async def _listen_if_idle(self) -> None:
        relay_id = await self._announced()
        if self._is_woken and self.watch.is_calm and len(self.watch.lanes) == len(self._ready):
            await self._session.fetch(LISTEN, relay_id)
            self._listens = True

    async def look(self) -> None:
        """Wake the lanes that wait for what is there."""
        if buckets := self._awaited_buckets():
            await self._announced()
            (row,) = await self._session.fetch(self._look, buckets)
            self._wake(row["look"])

    def _awaited_buckets(self) -> list[int]:
        lanes = self.watch.looked_for
        slots = {slot for slot, owned in self._owned.items() if owned.lane in lanes}
        return [bucket for bucket in range(self._layout_buckets) if bucket % self._layout_slots in slots]

    def _wake(self, buckets: Collection[int]) -> None:
        slots = {bucket % self._layout_slots for bucket in buckets}
        self.watch.wake({owned.lane for slot, owned in self._owned.items() if slot in slots})

    async def beat(self) -> None:
        """Renew, learn who lives and who owns what, and take what is free and due."""
        relay_id = await self._announced()
        ready = all(self._ready)
        asked_at = time.monotonic()
        releases = self._releases
        missed_since = asked_at - _MISSED_HEARTBEATS * self._heartbeat_seconds
        missed = [peer for peer, since in self._unlocked_since.items() if since <= missed_since]
        gone = [relay_id for relay_id, _ in missed], [renewed_at for _, renewed_at in missed]
        # Each NOTIFY costs all writers. Where many write, lanes find something soon anyway.
        self._listens = self._listens and self.watch.words <= _MOST_WORDS
        self.watch.words = 0
        beat = (relay_id, ready, self._direct, *gone, self._awaited_buckets(), self._listens)
        (row,) = await self._session.fetch(self._heartbeat, *beat)
        if not row["registered"]:
            self._relay_id = None
            self._beat_at_once()
            return
        self._valid_until = asked_at + self._lease_seconds
        paused_topics = frozenset(row["paused_topics"])
        if paused_topics != self.paused_topics:
            self.paused_topics = paused_topics
            self.watch.wake()
        self._wake(row["look"])
        unlocked = zip(row["unlocked_peers"], row["unlocked_renewed_at"], strict=True)
        self._unlocked_since = {peer: self._unlocked_since.get(peer, asked_at) for peer in unlocked}
        # What was read before a release that has happened meanwhile must not bring the slot back.
        self._adopt(dict(zip(row["owned"], row["epochs"], strict=True)), new=releases == self._releases)
        if not ready:
            return
        share = fair_share(row["slots"], row["ready_peers"], relay_id)
        self._surplus = set(sorted(self._owned)[share:])
        if self._surplus:
            self.watch.wake()  # to let go of them
        wanted = share - len(self._owned)
        if wanted > 0 and row["free"]:
            taken = await self._session.fetch(TAKE, relay_id, row["free"], wanted, *gone)
            self._adopt(self._epochs() | {slot["slot"]: slot["epoch"] for slot in taken}, new=True)
        self._first_beat.set()

    async def _announced(self) -> int:
        """This relay's id, with the advisory lock on the session of now.

        A lost session doesn't lose the slots by itself: who takes them meanwhile raises their epoch.
        """
        if self._relay_id is not None and self._session.connected:
            return self._relay_id
        connection = await self._session.connection()
        relay_id = self._relay_id
        if relay_id is None:
            (row,) = await self._session.fetch(REGISTER, self._name, self._lease_seconds, self._former_id)
            relay_id = self._relay_id = row["relay_id"]
            await self._session.fetch(FORGET, relay_id)
        (row,) = await self._session.fetch(LOCK, relay_id, connection.get_server_pid())
        self._direct = row["direct"]
        self._listens = False
        self._is_woken = self._wake_up and self._direct and await self._hear_writers()
        if relay_id != self._former_id:
            self._former_id = relay_id
            self._telemetry.registered(relay_id, self._direct, self._is_woken)
        return relay_id

    async def _hear_writers(self) -> bool:
        """Be woken by writers, if wake_up.sql was applied."""
        channels = await self._session.fetch(self._find_wake_up)
        for row in channels:
            await self._session.listen(row["channel"], self.watch.word)
        return bool(channels)

    def _epochs(self) -> dict[int, int]:
        return {slot: owned.epoch for slot, owned in self._owned.items()}

    def _adopt(self, epochs: dict[int, int], *, new: bool) -> None:
        """Make what is known here what the database says; with ``new``, also about slots not known yet."""
        gone = [slot for slot, owned in self._owned.items() if epochs.get(slot) != owned.epoch]
        self.lost(gone, "another relay has taken them")
        # Also what an earlier beat took without being told so, when its answer was lost.
        gained = [slot for slot in epochs if slot not in self._owned] if new else []
        for slot in gained:
            self._owned[slot] = _Owned(epochs[slot], self._emptiest_lane())
        if gained:
            self.watch.wake()
            self._telemetry.slots_taken(gained, len(self._owned))

    def _emptiest_lane(self) -> int:
        lanes = [owned.lane for owned in self._owned.values()]
        return min(range(len(self._ready)), key=lambda lane: (not self._ready[lane], lanes.count(lane)))

    async def leave(self) -> None:
        """Give back every slot and the name. Bounded; without a database the lease runs out instead."""
        if self._relay_id is not None:
            try:
                await self._session.fetch(LEAVE, self._relay_id)
            except SourceUnavailableError as error:
                self._telemetry.database_unavailable(error, self)
        self._owned.clear()
        await self._session.close()
