"""What the dead-letter topic gets: the message as it came, and what became of it in further headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LONGEST_REASON = 1_000


@dataclass(frozen=True, slots=True)
class Letter:
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


def letter(message: Any, error: Exception, attempts: int) -> Letter:
    """``dead-reason`` has the error's text, 1,000 characters at most."""
    about = {
        "dead-reason": f"{type(error).__name__}: {error}"[:_LONGEST_REASON],
        "dead-attempts": str(attempts),
        "dead-topic": message.topic,
        "dead-partition": str(message.partition),
        "dead-offset": str(message.offset),
    }
    headers = [*message.headers, *((name, text.encode("utf-8", "replace")) for name, text in about.items())]
    # A message with neither key nor value can't be sent by aiokafka.
    value = b"" if message.value is None and message.key is None else message.value
    return Letter(message.key, value, headers)
