"""The vocabulary: what a record is, and what may become of it. Imports nothing of the project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

Header: TypeAlias = tuple[str, bytes]

#: Header names that the relay writes itself; a row's own headers may not use them.
RESERVED_HEADERS = ("id", "type", "outbox-id", "created_at")

#: Marks a copy that a replay made; its value is the original's outbox id. An application leaves it to the relay.
REPLAY_HEADER = "replay-of"

#: Marks the copy of a dead row in a dead-letter topic; its value is the original's outbox id.
DEAD_LETTER_HEADER = "dead-letter-of"

#: Of copies alone, so the table can't refuse them; an application leaves them to the relay.
COPY_HEADERS = (REPLAY_HEADER, DEAD_LETTER_HEADER)

#: The ``error`` of rows whose topic the relay itself isn't to write to.
TOPIC_NOT_ALLOWED = "TopicNotAllowed"


# Nobody changes a Record or a Delivered. They aren't frozen, since there is one of each a message, and a frozen one
# takes two to four times as long to make.


@dataclass(slots=True)
class Record:
    """One outbox row on its way to Kafka.

    ``id`` is the outbox row's id: unique, and ascending within a ``(topic, key)``.
    ``headers`` are complete: the relay's own come first, then the row's.
    """

    id: int
    event_id: str
    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header]


@dataclass(slots=True)
class Delivered:
    """Kafka acknowledged the record."""

    record: Record


class Scope(Enum):
    """How far a refusal reaches."""

    ROW = "row"  #: the record itself was refused: its key waits, every other key flows
    TOPIC = "topic"  #: the topic can't be written to: it waits, every other topic flows


@dataclass(frozen=True, slots=True)
class Retry:
    """Kafka refused the record; it is offered again later, and nothing behind it goes first."""

    record: Record
    scope: Scope
    error: str  #: the error's class, for logs: ``MessageSizeTooLargeError``
    reason: str  #: what an operator can do with: one sentence


@dataclass(frozen=True, slots=True)
class Released:
    """The record is nobody's fault and free again: never sent, or sent without a known answer."""

    record: Record


Outcome: TypeAlias = Delivered | Retry | Released
