"""Idle lanes don't ask for rows each by itself: one look is made for all of them, and wakes those it finds some for.

A look is one statement that locks and writes nothing, while a claim is a transaction with a COMMIT to wait for.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from outbox_relay.relay import Poll
from outbox_relay.source.statements import OutboxTable, quoted

#: Plans as for a claim: statistics of a mostly empty outbox are stale when a burst comes.
SETTINGS = {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"}

# Which of these buckets have a row that can be sent, or one that is due to be tried again. What waits for anything else
# isn't seen here.
_LOOK = """
       ARRAY(
           SELECT b.bucket FROM unnest({buckets}::smallint[]) AS b (bucket)
           WHERE EXISTS (
               SELECT FROM {outbox} o
               WHERE (o.{bucket}, o.{id}) >= (b.bucket, -9223372036854775808)
                 AND (o.{bucket}, o.{id}) < (b.bucket + 1, -9223372036854775808)
                 AND o.{sent_at} IS NULL AND o.{parked_at} IS NULL
           ) OR EXISTS (SELECT FROM outbox_parked p WHERE p.bucket = b.bucket AND p.due_at <= now())
       )"""

# Where a NOTIFY comes when a row is written.
FIND_WAKE_UP = """
-- find the wake-up
SELECT 'outbox_' || t.tgrelid AS channel FROM pg_trigger t
WHERE t.tgrelid = {outbox_text}::regclass AND t.tgname = 'outbox_wake' AND t.tgenabled IN ('O', 'A')
"""


@dataclass(slots=True)
class _Waiting:
    pause_seconds: float  #: before the next look
    look_at: float  #: when that is due, by the monotonic clock
    not_before: float  #: the lane isn't looked for until then
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Watch:
    """Who waits for rows, and when to look for some. A lane that waits is woken by :meth:`wake`.

    ``sooner`` is called when a look is due sooner than :attr:`look_at` has said.
    """

    def __init__(self, poll: Poll, sooner: Callable[[], None]) -> None:
        self._poll = poll
        self._sooner = sooner
        self._waiting: dict[int, _Waiting] = {}
        self.words = 0  #: from writers, since it was set to 0

    @property
    def lanes(self) -> Collection[int]:
        """Those that wait."""
        return self._waiting.keys()

    @property
    def looked_for(self) -> Collection[int]:
        """Those that wait and may be woken by a look."""
        now = time.monotonic()
        return {lane for lane, waiting in self._waiting.items() if waiting.not_before <= now}

    @property
    def look_at(self) -> float:
        """When the next look is due, by the monotonic clock."""
        return min((one.look_at for one in self._waiting.values() if not one.woken.is_set()), default=math.inf)

    @property
    def is_calm(self) -> bool:
        """Whether looks are as seldom as they ever are."""
        return all(waiting.pause_seconds >= self._poll.ceiling_seconds for waiting in self._waiting.values())

    async def wait(self, lane: int, seconds: float) -> None:
        """Until there may be something to claim; the first look is made after so long.

        More than the floor means that the last claim was in vain, and so was what woke the lane: a row that can't be
        claimed is seen by every look. So none that is made for others wakes it before.
        """
        look_at = time.monotonic() + seconds
        not_before = look_at if seconds > self._poll.floor_seconds else 0.0
        is_sooner = look_at < self.look_at
        waiting = self._waiting[lane] = _Waiting(seconds, look_at, not_before)
        if is_sooner:
            self._sooner()
        try:
            await waiting.woken.wait()
        finally:
            del self._waiting[lane]

    def looked(self) -> None:
        """A look was made, for whomever it was due: the next is a pause away, and for those a longer one."""
        now = time.monotonic()
        for waiting in self._waiting.values():
            if waiting.not_before <= now:
                if waiting.look_at <= now:
                    waiting.pause_seconds = self._poll.next_seconds(waiting.pause_seconds)
                waiting.look_at = now + waiting.pause_seconds

    def wake(self, lanes: Collection[int] | None = None) -> None:
        """These, or all; those that don't wait aren't concerned."""
        for lane, waiting in self._waiting.items():
            if lanes is None or lane in lanes:
                waiting.woken.set()

    def word(self) -> None:
        """A writer says that it has written something."""
        self.words += 1
        self.wake()


def look(table: OutboxTable, buckets: str) -> str:
    """An expression: those of the ``buckets``, an argument, in which there may be something to claim."""
    names = {name: quoted(getattr(table, name)) for name in ("id", "sent_at", "parked_at", "bucket")}
    return _LOOK.format(outbox=quoted(table.name), buckets=buckets, **names)
