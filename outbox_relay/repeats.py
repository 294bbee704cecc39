"""Keeps a log readable while the same goes wrong a thousand times: what repeats is logged some times, then counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Of what is the same, so many lines in so many seconds.
MOST_LINES = 20
INTERVAL_SECONDS = 30.0

#: What is the same may differ in row, relay, text and time. Of other libraries it is what one line of code logs.
_SAME = ("event", "topic", "partition", "error")
_MOST_KNOWN = 1_000


@dataclass(slots=True)
class _Known:
    since: float
    lines: int = 0
    not_logged: int = 0


class Repeats(logging.Filter):
    """For a handler. Of the relay's own lines warnings and errors are limited, of others every line.

    The first line after some that weren't logged says how many, in ``not_logged``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._known: dict[tuple[Any, ...], _Known] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        own = record.msg if isinstance(record.msg, dict) else None
        if own is not None and record.levelno < logging.WARNING:
            return True
        same = (record.pathname, record.lineno) if own is None else tuple(own.get(name) for name in _SAME)
        known = self._still_known((record.name, record.levelno, *same))
        if known.lines == MOST_LINES:
            known.not_logged += 1
            return False
        known.lines += 1
        if known.not_logged:
            if own is not None:
                own["not_logged"] = known.not_logged
            else:
                record.msg, record.args = f"{record.getMessage()} (and {known.not_logged} like it, not logged)", ()
            known.not_logged = 0
        return True

    def _still_known(self, key: tuple[Any, ...]) -> _Known:
        now = self._clock()
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[key] = _Known(now)
        elif now - known.since >= INTERVAL_SECONDS:
            known.since, known.lines = now, 0
        return known
