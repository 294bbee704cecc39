"""Idle lanes don't ask for rows each by itself: one look is made for all of them, and wakes those it finds some for."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

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


class Watch:
    """Who waits for rows. A lane that does is woken by :meth:`wake`."""

    def __init__(self, look_seconds: float) -> None:
        self.look_seconds = look_seconds  #: between two looks
        self.words = 0  #: from writers, since it was set to 0
        self._waiting: dict[int, asyncio.Event] = {}

    @property
    def lanes(self) -> Collection[int]:
        """Those that wait."""
        return self._waiting.keys()

    async def wait(self, lane: int) -> None:
        """Until there may be something to claim."""
        woken = self._waiting[lane] = asyncio.Event()
        try:
            await woken.wait()
        finally:
            del self._waiting[lane]

    def wake(self, lanes: Collection[int] | None = None) -> None:
        """These, or all; those that don't wait aren't concerned."""
        for lane, woken in self._waiting.items():
            if lanes is None or lane in lanes:
                woken.set()

    def word(self) -> None:
        """A writer says that it has written something."""
        self.words += 1
        self.wake()


def look(table: OutboxTable, buckets: str) -> str:
    """An expression: those of the ``buckets``, an argument, in which there may be something to claim."""
    names = {name: quoted(getattr(table, name)) for name in ("id", "sent_at", "parked_at", "bucket")}
    return _LOOK.format(outbox=quoted(table.name), buckets=buckets, **names)
