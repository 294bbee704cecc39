"""The application side: add messages to the outbox, in the transaction of the domain rows they tell of.

    with Session(engine) as session, session.begin():
        order = session.get_one(Order, 42, with_for_update=True)
        order.status = "paid"
        outbox.add(session, Message("orders", {"id": 42, "status": "paid"}, key="42", type="OrderPaid"))

The message is published if that transaction commits, and never if it doesn't. Nothing here commits, flushes or
begins a transaction.

**Order.** Messages of one ``(topic, key)`` are published in the order of their outbox ids, which are handed out when
the INSERT runs, not at COMMIT. So two transactions that write the same key must take turns *before* they add: each
locks the aggregate's row (``SELECT … FOR UPDATE``, or the UPDATE itself), or reads the version that it will compare,
in an **earlier statement** than ``add``. An ORM's flush order doesn't give that: ``add`` inserts at once, while a
changed object is written by the next flush, so either load it ``with_for_update`` or flush it before.

The tables are found by ``search_path``. SQLAlchemy's ``schema_translate_map`` works too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import Connection, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from outbox_relay import tables
from outbox_relay.errors import InvalidMessageError, NotInTransactionError
from outbox_relay.message import COPY_HEADERS, RESERVED_HEADERS

try:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    _trace_context = None
else:
    _trace_context = TraceContextTextMapPropagator()

SyncTarget: TypeAlias = Session | Connection | scoped_session[Any]
AsyncTarget: TypeAlias = (
    AsyncSession | AsyncConnection | async_scoped_session[Any] | asyncpg.Connection | PoolConnectionProxy
)

_LEGAL_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")

# Run with executemany: the server takes the rows in their order, so that their ids ascend in it, and the driver waits
# once for all. Arrays and unnest are faster from a dozen messages on, but asyncpg has to look their types up first, on
# every new connection. Headers travel as text, because a connection may have a jsonb codec of the application's own.
_INSERT = """\
-- add to outbox
INSERT INTO outbox (event_id, topic, key, type, payload, headers)
VALUES ($1, $2, $3, $4, $5, $6::text::jsonb)
"""

# Inline, because RETURNING, which SQLAlchemy would add, asks for more than the right to insert.
_CORE_INSERT = insert(tables.outbox).inline()


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
    - pydantic model: its own ``model_dump_json()``.

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
            raise InvalidMessageError(f"event_id must be a uuid.UUID, not {_kind(self.event_id)}: pass UUID(…)")
        headers = _checked_headers(self.headers)
        payload = _encode(self.payload)
        if payload is None and self.key is None:
            raise InvalidMessageError("payload None is a tombstone, which deletes a key: give the key it deletes")
        # Copies, so that what the caller changes later can't undo the checks.
        object.__setattr__(self, "headers", headers)
        object.__setattr__(self, "payload", payload)


def add(session: SyncTarget, *messages: Message) -> list[UUID]:
    """Insert the messages in one round trip, in their order; their event ids.

    ``session`` is a SQLAlchemy ``Session``, ``scoped_session`` or ``Connection`` in a transaction. Pending ORM objects
    are not flushed. The current W3C trace context goes into the headers, where OpenTelemetry is installed and a span
    is active; a message with a ``traceparent`` of its own keeps it.

    Raises NotInTransactionError where no transaction is active, or the driver commits each statement by itself.
    """
    if isinstance(session, scoped_session):
        session = session()
    if isinstance(session, (AsyncSession, AsyncConnection, async_scoped_session)):
        raise TypeError(f"{type(session).__name__} is asynchronous: use `await outbox.add_async(…)`")
    if not isinstance(session, (Session, Connection)):
        raise TypeError(f"add takes a SQLAlchemy Session or Connection, not {_kind(session)}")
    if not session.in_transaction():
        raise NotInTransactionError(
            f"this {type(session).__name__} is in no transaction yet: begin one (`with session.begin():`), or write"
            " the domain rows first, so that they and the message are committed together"
        )
    # A Session's connection, not its execute(), which could flush or run the application's event hooks.
    connection = session.connection({"clause": tables.outbox}) if isinstance(session, Session) else session
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise NotInTransactionError(
            "this connection has isolation level AUTOCOMMIT, so the message would be published even if the domain rows"
            " are rolled back: use one without it"
        )
    if messages:
        connection.execute(_CORE_INSERT, _rows(messages))
    return [message.event_id for message in messages]


async def add_async(connection: AsyncTarget, *messages: Message) -> list[UUID]:
    """As :func:`add`, for an asynchronous connection in a transaction.

    ``connection`` is a SQLAlchemy ``AsyncSession``, ``async_scoped_session`` or ``AsyncConnection``, or an asyncpg
    connection, also one acquired from a pool.
    """
    if isinstance(connection, async_scoped_session):
        connection = connection()
    if isinstance(connection, (AsyncSession, AsyncConnection)):
        return await connection.run_sync(add, *messages)
    if not isinstance(connection, (asyncpg.Connection, PoolConnectionProxy)):
        hint = "; for a synchronous one use `outbox.add(…)`" if isinstance(connection, (Session, Connection)) else ""
        raise TypeError(
            f"add_async takes an AsyncSession, AsyncConnection or asyncpg connection, not {_kind(connection)}{hint}"
        )
    if not connection.is_in_transaction():
        raise NotInTransactionError(
            "this asyncpg connection is in no transaction: write the domain rows and add the message inside one"
            " `async with connection.transaction():`, so that they are committed together"
        )
    if messages:
        rows = [{**row, "headers": _json(row["headers"])} for row in _rows(messages)]
        await connection.executemany(_INSERT, [tuple(row.values()) for row in rows])
    return [message.event_id for message in messages]


def _rows(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The rows to insert, with the columns in the order of ``_INSERT``."""
    trace_headers: dict[str, str] = {}
    if _trace_context is not None:
        _trace_context.inject(trace_headers)
    return [
        {
            "event_id": message.event_id,
            "topic": message.topic,
            "key": message.key,
            "type": message.type,
            "payload": message.payload,
            "headers": _with_trace(message.headers, trace_headers),
        }
        for message in messages
    ]


def _with_trace(headers: Mapping[str, str], trace_headers: Mapping[str, str]) -> Mapping[str, str]:
    # A tracestate belongs to its traceparent: beside a message's own, ours would be another trace's.
    return headers if "traceparent" in headers else {**trace_headers, **headers}


def _check_topic(topic: object) -> None:
    if not isinstance(topic, str):
        raise InvalidMessageError(f"topic must be a str, not {_kind(topic)}")
    if not _LEGAL_TOPIC.fullmatch(topic) or topic in (".", ".."):
        raise InvalidMessageError(
            f"topic {topic[:250]!r} is no name that Kafka takes: use 1 to 249 of a-z A-Z 0-9 . _ -, and not . or .."
        )


def _checked_headers(headers: object) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise InvalidMessageError(f"headers must be a mapping of str to str, not {_kind(headers)}")
    for name, value in headers.items():
        _check_text("a header's name", name)
        if name in RESERVED_HEADERS or name in COPY_HEADERS:
            raise InvalidMessageError(f"header {name!r} is one that the relay writes itself: choose another name")
        _check_text(f"header {name!r}", value)
    return dict(headers)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidMessageError(f"{what} must be a str, not {_kind(text)}: pass its text, as str(…) or .decode()")
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
            return _json(payload).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessageError(f"payload can't be encoded: {error}") from error
    raise InvalidMessageError(
        f"payload can't be {_kind(payload)}: pass bytes, str, dict, list, a dataclass instance, a pydantic model, or"
        " None for a tombstone; encode anything else to bytes yourself"
    )


def _json(value: object) -> str:
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
    raise TypeError(f"{_kind(value)} has no form in JSON: turn it into text, a number, a dict or a list first")


def _method(value: object, name: str) -> Any:
    """The method, of an instance and not of a class itself, or None."""
    return None if isinstance(value, type) else getattr(value, name, None)


def _is_dataclass_instance(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
