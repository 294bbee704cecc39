"""What waits before it is offered again: keys, rows and topics that failed, in memory, with a backoff each."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from outbox_relay.retry import Backoff

_SECONDS_FOR_EACH = 0.001

W = TypeVar("W", bound=Hashable)


@dataclass(slots=True)
class _Hold:
    until: float
    attempts: int


class Holds(Generic[W]):
    """Things of one kind that wait. A thing that waited once and never failed again is forgotten."""

    def __init__(self, backoff: Backoff, clock: Callable[[], float] = time.monotonic) -> None:
        self._backoff = backoff
        self._clock = clock
        self._holds: dict[W, _Hold] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def hold(self, what: W) -> tuple[int, float]:
        """Hold it once more: ``(failures in a row, seconds until it is offered again)``."""
        hold = self._holds.setdefault(what, _Hold(0.0, 0))
        hold.attempts += 1
        # Where many wait, each is offered less often: else those that are due again would fill every claim for ever.
        delay_seconds = max(self._backoff.delay_seconds(hold.attempts), len(self._holds) * _SECONDS_FOR_EACH)
        hold.until = self._clock() + delay_seconds
        return hold.attempts, delay_seconds

    def clear(self, what: W) -> bool:
        """It works again; whether it had been held."""
        return self._holds.pop(what, None) is not None

    def is_active(self, what: W) -> bool:
        """Whether it is still waiting now."""
        hold = self._holds.get(what)
        return hold is not None and hold.until > self._clock()

    def failures(self, what: W) -> int:
        """How often in a row it failed."""
        hold = self._holds.get(what)
        return 0 if hold is None else hold.attempts

    def active(self) -> list[W]:
        """What is still waiting now."""
        now = self._clock()
        # A failure long past doesn't count as the first of a row.
        forgotten = [what for what, hold in self._holds.items() if hold.until + 60.0 < now]
        for what in forgotten:
            del self._holds[what]
        return [what for what, hold in self._holds.items() if hold.until > now]
