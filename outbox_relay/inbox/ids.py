"""Which message it is: the id that is the same each time the message comes, however often its producer sent it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from outbox_relay.errors import MissingMessageIdError

#: Where a message's id is looked for: the relay and Debezium write ``id``, CloudEvents in binary mode ``ce_id``.
ID_HEADERS = ("id", "ce_id")

#: The longest id, in bytes. PostgreSQL's index takes no more than some 2,700 bytes of an id and a consumer's name.
MAX_ID_BYTES = 1_000


class ConsumedMessage(Protocol):
    """What is asked of a message; aiokafka's ``ConsumerRecord`` has it.

    ``headers`` are pairs of a name and its bytes, in the order of the record.
    """

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> Any: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


#: Says a message's id, where no header does. It gets the message as it came. None or an empty text: it has none.
MessageId: TypeAlias = Callable[[Any], str | None]


def message_id(message: ConsumedMessage) -> str:
    """The id in the header ``id``, or else in ``ce_id``: text of 1 to 1,000 bytes.

    A header that comes more than once counts with its last value, as in Kafka's own client.

    Raises MissingMessageIdError where there is none, or it is empty, too long, or no text in UTF-8.
    """
    for name in ID_HEADERS:
        value = header(message, name)
        if value is None:
            continue
        try:
            return checked_id(message, value.decode(), f"its header {name!r}")
        except UnicodeDecodeError as error:
            raise _unusable(message, f"its header {name!r} is no text in UTF-8") from error
    raise _unusable(message, f"it has none of the headers {' and '.join(map(repr, ID_HEADERS))}")


def id_of(message: ConsumedMessage, by: MessageId | None) -> str:
    """The id that ``by`` says, or without one :func:`message_id`. Raises MissingMessageIdError."""
    if by is None:
        return message_id(message)
    return checked_id(message, by(message), "what the callable message_id returned")


def checked_id(message: ConsumedMessage, value: object, what: str) -> str:
    """The value, if it can be an id; ``what`` names it. Raises MissingMessageIdError."""
    if value is None:
        raise _unusable(message, f"{what} is None")
    if not isinstance(value, str):
        raise _unusable(message, f"{what} is of type {type(value).__name__}, not str")
    if not value:
        raise _unusable(message, f"{what} is empty")
    if "\0" in value:
        raise _unusable(message, f"{what} contains a NUL character, which PostgreSQL can't store")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise _unusable(message, f"{what} contains a lone surrogate, which is no text") from error
    if size > MAX_ID_BYTES:
        raise _unusable(message, f"{what} has {size:,} bytes, and {MAX_ID_BYTES:,} are the most")
    return value


def header(message: ConsumedMessage, name: str) -> bytes | None:
    """The last value of a header; None where it isn't there, or null."""
    for each, value in reversed(message.headers):
        if each == name:
            return value
    return None


def _unusable(message: ConsumedMessage, why: str) -> MissingMessageIdError:
    return MissingMessageIdError(
        f"the message at offset {message.offset} of {message.topic}, partition {message.partition}, can't be told from"
        f" its repeats: {why}. Have its producer write the header 'id', or say where its id is: message_id=…"
    )
