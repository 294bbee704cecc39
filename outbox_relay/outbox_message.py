"""One message for the outbox: checked, and its payload encoded, when it is made.

In a module of its own without SQLAlchemy: the relay and its commands check topics and headers alike, and loading
SQLAlchemy for that would be most of their start, and 22 MB of a relay's memory.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID, uuid4

from outbox_relay.errors import InvalidMessageError
from outbox_relay.message import COPY_HEADERS, RESERVED_HEADERS

_LEGAL_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


@dataclass(frozen=True, slots=True)
class Message:
    """One message on its way into the outbox. Checked, and its payload encoded, when it is made.

    ``topic``: 1 to 249 of ``a-z A-Z 0-9 . _ -``. ``key``: the Kafka key; messages of one ``(topic, key)`` stay in
    order, without a key no order is promised. ``type`` becomes the header ``type``, ``event_id`` the header ``id`` by
    which consumers de-duplicate. ``headers``: text to text, without the relay's own names (``id``, ``type``,
    ``outbox-id``, ``created_at``, ``replay-of``, ``dead-letter-of``).

    ``payload`` becomes the Kafka value, and reads as ``bytes | None`` afterwards:

    - bytes, bytearray, memoryview: as they are.
    - str: its UTF-8 bytes as they are, so text that is JSON already stays JSON. It is not quoted.
    - None: a tombstone, which needs a key.
    - dict, list, dataclass instance: compact JSON in UTF-8. Inside, too: UUID and Decimal as text; datetime, date and
      time in ISO 8601 (a naive datetime has no offset); an Enum as its value; tuples as arrays; dataclasses; pydantic
      models. NaN and infinities are refused. A set, bytes or any other object inside is refused.
    - pydantic model: its own ``model_dumpas_json()``.

    Raises InvalidMessageError for what the table or Kafka would refuse, and for a payload of any other kind.
    """

    topic: str
    payload: Any = field(repr=False)
    _: KW_ONLY
    key: str | None = None
    type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    event_id: UUID = field(default_factory=uuid4)

    def __post_init__(self) -> None:
        _check_topic(self.topic)
        for name, text in (("key", self.key), ("type", self.type)):
            if text is not None:
                _check_text(name, text)
        if not isinstance(self.event_id, UUID):
            raise InvalidMessageError(f"event_id must be a uuid.UUID, not {kind_of(self.event_id)}: pass UUID(…)")
        headers = _checked_headers(self.headers)
        payload = _encode(self.payload)
        if payload is None and self.key is None:
            raise InvalidMessageError("payload None is a tombstone, which deletes a key: give the key it deletes")
        # Copies, so that what the caller changes later can't undo the checks.
        object.__setattr__(self, "headers", headers)
        object.__setattr__(self, "payload", payload)


def _check_topic(topic: object) -> None:
    if not isinstance(topic, str):
        raise InvalidMessageError(f"topic must be a str, not {kind_of(topic)}")
    if not _LEGAL_TOPIC.fullmatch(topic) or topic in (".", ".."):
        raise InvalidMessageError(
            f"topic {topic[:250]!r} is no name that Kafka takes: use 1 to 249 of a-z A-Z 0-9 . _ -, and not . or .."
        )


def _checked_headers(headers: object) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise InvalidMessageError(f"headers must be a mapping of str to str, not {kind_of(headers)}")
    for name, value in headers.items():
        _check_text("a header's name", name)
        if name in RESERVED_HEADERS or name in COPY_HEADERS:
            raise InvalidMessageError(f"header {name!r} is one that the relay writes itself: choose another name")
        _check_text(f"header {name!r}", value)
    return dict(headers)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidMessageError(f"{what} must be a str, not {kind_of(text)}: pass its text, as str(…) or .decode()")
    if "\0" in text:
        raise InvalidMessageError(f"{what} contains a NUL character, which PostgreSQL can't store: remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessageError(
            f"{what} contains a lone surrogate at position {error.start}, which is no text: repair or remove it"
        ) from error


def _encode(payload: object) -> bytes | None:
    """The Kafka value."""
    if payload is None:
        return None
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return bytes(payload)
    try:
        if isinstance(payload, str):
            return payload.encode()
        if (dump := _method(payload, "model_dump_json")) is not None:
            return str(dump()).encode()
        if isinstance(payload, (dict, list)) or _is_dataclass_instance(payload):
            return as_json(payload).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessageError(f"payload can't be encoded: {error}") from error
    raise InvalidMessageError(
        f"payload can't be {kind_of(payload)}: pass bytes, str, dict, list, a dataclass instance, a pydantic model, or"
        " None for a tombstone; encode anything else to bytes yourself"
    )


def as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)


def _plain(value: object) -> object:
    """What JSON has no form for, as something it has."""
    if isinstance(value, Decimal) and not value.is_finite():
        raise ValueError(f"Decimal {value} has no form in JSON: use None or text")
    if isinstance(value, (UUID, Decimal)):
        return str(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    if (dump := _method(value, "model_dump")) is not None:
        return dump(mode="json")
    if _is_dataclass_instance(value):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}  # type: ignore[arg-type]
    raise TypeError(f"{kind_of(value)} has no form in JSON: turn it into text, a number, a dict or a list first")


def _method(value: object, name: str) -> Any:
    """The method, of an instance and not of a class itself, or None."""
    return None if isinstance(value, type) else getattr(value, name, None)


def _is_dataclass_instance(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def kind_of(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
