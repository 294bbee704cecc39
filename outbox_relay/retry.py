"""How long to wait before something is tried again. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential: ``first_seconds``, then twice as long each time, never above ``ceiling_seconds``."""

    first_seconds: float
    ceiling_seconds: float

    def delay_seconds(self, attempts: int) -> float:
        """The wait after the ``attempts``-th failure in a row, counted from 1."""
        # The exponent is bounded so that a thousand failures don't overflow a float.
        return min(self.ceiling_seconds, self.first_seconds * 2.0 ** min(attempts - 1, 62))
