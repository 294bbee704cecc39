"""The handler's transaction, on whichever kind of connection: statements run in it, and nothing begins or ends it.

Statements are written once, for asyncpg: ``$1`` is the first argument, and each is cast to its type, since other
drivers don't ask PostgreSQL what type it expects. ``{schema}`` stands before the name of each table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import Any, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import Connection as CoreConnection
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session

from outbox_relay.errors import NotInTransactionError

#: What a handler's transaction is open on; of asyncpg also a connection that was acquired from a pool.
Connection: TypeAlias = (
    AsyncSession | AsyncConnection | async_scoped_session[Any] | asyncpg.Connection | PoolConnectionProxy
)

#: Opens a connection in a transaction, and commits it at its end, or rolls back what raised.
Transaction: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]

_ARGUMENT = re.compile(r"\$(\d+)")


async def fetch(connection: Connection, statement: str, *arguments: Any) -> Sequence[Sequence[Any]]:
    """Run the statement in the transaction that is open; its rows. Raises NotInTransactionError."""
    if isinstance(connection, async_scoped_session):
        connection = connection()
    if isinstance(connection, (AsyncSession, AsyncConnection)):
        return await connection.run_sync(_fetch, statement, arguments)
    await require(connection)
    rows: Sequence[Sequence[Any]] = await connection.fetch(statement.format(schema=""), *arguments)
    return rows


async def require_unbroken(connection: Connection) -> None:
    """Raises the driver's error where a statement has failed: PostgreSQL answers COMMIT with a rollback, and no error.

    To be asked before COMMIT, in case whoever ran the statement has caught what it raised.
    """
    await fetch(connection, "SELECT 1")


async def require(connection: Connection) -> None:
    """Raises NotInTransactionError where no transaction is open, and TypeError for what is no connection."""
    if isinstance(connection, async_scoped_session):
        connection = connection()
    if isinstance(connection, (AsyncSession, AsyncConnection)):
        await connection.run_sync(_require)
    elif not isinstance(connection, (asyncpg.Connection, PoolConnectionProxy)):
        hint = ": a synchronous one blocks the consumer" if isinstance(connection, (Session, CoreConnection)) else ""
        raise TypeError(
            "the inbox takes an AsyncSession, AsyncConnection or asyncpg connection, not"
            f" {type(connection).__name__}{hint}"
        )
    elif not connection.is_in_transaction():
        raise NotInTransactionError(
            "this asyncpg connection is in no transaction: ask the inbox and handle the message inside one"
            " `async with connection.transaction():`, so that the message's id and its effects are committed together"
        )


def _require(target: Session | CoreConnection) -> None:
    if not target.in_transaction():
        raise NotInTransactionError(
            f"this Async{type(target).__name__} is in no transaction: ask the inbox and handle the message inside one"
            f" `async with {'session' if isinstance(target, Session) else 'connection'}.begin():`, so that the"
            " message's id and its effects are committed together"
        )
    if getattr(_core(target).connection.dbapi_connection, "autocommit", False):
        raise NotInTransactionError(
            "this connection has isolation level AUTOCOMMIT, so the message would count as handled even if its effects"
            " are rolled back: use one without it"
        )


def _fetch(target: Session | CoreConnection, statement: str, arguments: Sequence[Any]) -> Sequence[Sequence[Any]]:
    _require(target)
    connection = _core(target)
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    parameters = {f"a{number}": argument for number, argument in enumerate(arguments, 1)}
    return connection.execute(_as_text(statement, schemas.get(None)), parameters).fetchall()


def _core(target: Session | CoreConnection) -> CoreConnection:
    # A Session's connection, not its execute(), which could flush or run the application's event hooks.
    return target.connection() if isinstance(target, Session) else target


@lru_cache
def _as_text(statement: str, schema: str | None = None) -> TextClause:
    """The statement for SQLAlchemy, its tables in this schema, or without one found by ``search_path``."""
    qualified = "" if schema is None else '"' + schema.replace('"', '""') + '".'
    return text(_ARGUMENT.sub(r":a\1", statement.format(schema=qualified)))
