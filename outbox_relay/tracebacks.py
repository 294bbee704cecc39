"""Tracebacks that hold no data: where each error came from and what it is, and its text only where that can be shown.

What PostgreSQL, a codec or a lookup says of a failure may quote the row that it failed at.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from outbox_relay.errors import OutboxRelayError

#: Whose texts tell of the program, not of what it was working on; the project's own are made to be shown.
_SHOWN = (OutboxRelayError, ArithmeticError, AttributeError, ImportError, NameError, TypeError, RecursionError)


def without_data(error: BaseException) -> str:
    """The traceback of an error and of what led to it."""
    return "".join(_lines(error, set())).rstrip()


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _lines(before, seen)
        yield "\nThat led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    text = str(error) if isinstance(error, _SHOWN) else "(a text that may hold a row's data)"
    yield f"{type(error).__qualname__}: {text}\n"
    for inner in getattr(error, "exceptions", ()):
        yield from _lines(inner, seen)
