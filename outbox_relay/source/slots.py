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
from outbox_relay.source.slot_statements import FORGET, HEARTBEAT, LEAVE, LISTEN, LOCK, LOOK, REGISTER, TAKE
from outbox_relay.source.statements import OUTBOX, OutboxTable, literal, quoted
from outbox_relay.source.watch import Watch
from outbox_relay.telemetry import Telemetry

#: A living relay that lost its connection has its lock again after one heartbeat, or a little more.
_MISSED_HEARTBEATS = 2

#: Lanes that are open while there is no backlog. More would share the same rows, in more and smaller claims.
_LANES_WITHOUT_BACKLOG = 2

#: A backlog is over when no claim was full for so long.
_BACKLOG_SECONDS = 10.0

#: With more NOTIFYs than this between two heartbeats a relay doesn't ask for them until all its lanes are idle.
_MOST_WORDS = 20


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

    Not all lanes are open, which is to say have slots, unless there is a backlog or ``all_open``. A slot goes to
    another lane as it does to another relay: let go of, and taken again with a new epoch.
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
        all_open: bool = False,
    ) -> None:
        self._session = session
        self._telemetry = telemetry
        self._name = name
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._layout_buckets = layout_buckets
        self._layout_slots = layout_slots
        self._heartbeat = HEARTBEAT.format(look=watch.look(table, "$6"))
        self._look = LOOK.format(look=watch.look(table, "$1"))
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
        self._all_open = all_open
        self._open = lanes if all_open else min(lanes, _LANES_WITHOUT_BACKLOG)
        self._backlog_until = 0.0
        self._moving: set[int] = set()  # to other lanes: let go of, or to be; not yet taken again
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
        """Slots for other relays or lanes: not claimed from, and let go once nothing there is unsettled."""
        return self._surplus | (self._moving & self._owned.keys())

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

    def backlog(self) -> None:
        """A claim was full: all lanes are opened."""
        self._backlog_until = time.monotonic() + _BACKLOG_SECONDS
        if self._open < len(self._ready) and all(self._ready):
            self._open_lanes(len(self._ready))

    def released(self, slots: Iterable[int]) -> None:
        self._releases += 1
        gone = {slot for slot in slots if self._owned.pop(slot, None) is not None}
        self._surplus -= gone
        if gone & self._moving:
            self._beat_at_once()  # to take them again
        if gone - self._moving:
            self._telemetry.slots_released(gone - self._moving, self._count)

    def lost(self, slots: Iterable[int], reason: str) -> None:
        gone = {slot for slot in slots if self._owned.pop(slot, None) is not None}
        self._surplus -= gone
        self._moving -= gone
        if gone:
            self._telemetry.slots_lost(gone, self._count, reason)

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
        on_their_way = self._moving - self._owned.keys()
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
        if not self._all_open and asked_at > self._backlog_until and self._open > _LANES_WITHOUT_BACKLOG:
            self._open_lanes(_LANES_WITHOUT_BACKLOG)
        wanted = share - len(self._owned)
        if wanted > 0 and row["free"]:
            taken = await self._session.fetch(TAKE, relay_id, row["free"], wanted, *gone)
            self._adopt(self._epochs() | {slot["slot"]: slot["epoch"] for slot in taken}, new=True)
        if taken_by_others := on_their_way - self._owned.keys():
            self._moving -= taken_by_others
            self._telemetry.slots_released(taken_by_others, self._count)
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

    @property
    def _count(self) -> int:
        """How many slots are ours, with those on their way from lane to lane."""
        return len(self._owned.keys() | self._moving)

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
        new_here = [slot for slot in gained if slot not in self._moving]
        self._moving.difference_update(gained)
        if new_here:
            self._telemetry.slots_taken(new_here, self._count)

    def _emptiest_lane(self) -> int:
        lanes = [owned.lane for owned in self._owned.values()]
        return min(range(self._open), key=lambda lane: (not self._ready[lane], lanes.count(lane)))

    def _open_lanes(self, count: int) -> None:
        """Let the first so many lanes share the slots."""
        self._open = count
        most = math.ceil(len(self._owned) / count)
        for lane in range(len(self._ready)):
            theirs = sorted(self.of_lane(lane).keys() - self._surplus)
            self._moving.update(theirs[most if lane < count else 0 :])
        self.watch.wake()
        self._telemetry.lanes_open(count)

    async def leave(self) -> None:
        """Give back every slot and the name. Bounded; without a database the lease runs out instead."""
        if self._relay_id is not None:
            try:
                await self._session.fetch(LEAVE, self._relay_id)
            except SourceUnavailableError as error:
                self._telemetry.database_unavailable(error, self)
        self._owned.clear()
        await self._session.close()
