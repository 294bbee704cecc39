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

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import Connection, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from outbox_relay import tables
from outbox_relay.errors import NotInTransactionError
from outbox_relay.outbox_message import Message, as_json, kind_of

__all__ = ["AsyncTarget", "Message", "SyncTarget", "add", "add_async"]

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
        raise TypeError(f"add takes a SQLAlchemy Session or Connection, not {kind_of(session)}")
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
            f"add_async takes an AsyncSession, AsyncConnection or asyncpg connection, not {kind_of(connection)}{hint}"
        )
    if not connection.is_in_transaction():
        raise NotInTransactionError(
            "this asyncpg connection is in no transaction: write the domain rows and add the message inside one"
            " `async with connection.transaction():`, so that they are committed together"
        )
    if messages:
        rows = [{**row, "headers": as_json(row["headers"])} for row in _rows(messages)]
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
