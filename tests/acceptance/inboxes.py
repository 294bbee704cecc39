"""What the inbox's tests have in common: a database with effects to count, and handlers on each kind of connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import asyncpg
from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

from outbox_relay.inbox import schema
from tests.conftest import Database
from tests.waiting import eventually


async def prepare(database: Database) -> None:
    """The inbox, and the effects: no constraint keeps the same charge from being made twice."""
    connection = await database.connect()
    await schema.apply(connection)
    await connection.execute("CREATE TABLE charge (message text NOT NULL)")


async def charges_of(database: Database) -> dict[str, int]:
    """How often each message was charged for; committed charges alone."""
    connection = await database.connect()
    rows = await connection.fetch("SELECT message, count(*) FROM charge GROUP BY message ORDER BY message")
    return dict(map(tuple, rows))


async def waits_for_another(watcher: asyncpg.Connection, pid: int) -> None:
    """Until the session waits for another's transaction."""
    await eventually(
        lambda: watcher.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid), f"session {pid} waits"
    )


@dataclass
class Opened:
    """A connection of one kind, as the inbox takes it; ``statements`` went out on it."""

    connection: Any
    execute: Callable[[str], Awaitable[Any]]
    pid: int = 0
    statements: list[str] = field(default_factory=list)

    async def charge(self, message: str) -> None:
        await self.execute(f"INSERT INTO charge (message) VALUES ('{message}')")


Open: TypeAlias = Callable[..., AbstractAsyncContextManager[Opened]]

_PID = "SELECT pg_backend_pid()"


@asynccontextmanager
async def engine_of(url: str, driver: str = "asyncpg", **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"), **options)
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def _of_core(connection: Any, raw: Any, begin: bool) -> AsyncIterator[Opened]:
    async def execute(sql: str) -> Any:
        return await (await raw()).exec_driver_sql(sql)

    opened = Opened(connection, execute)
    if not begin:
        yield opened
        return
    async with connection.begin():
        opened.pid = (await execute(_PID)).scalar_one()
        engine = (await raw()).sync_connection.engine
        event.listen(engine, "before_cursor_execute", lambda *args: opened.statements.append(args[2]))
        yield opened


@asynccontextmanager
async def open_async_session(url: str, *, begin: bool = True, **options: Any) -> AsyncIterator[Opened]:
    async with (
        engine_of(url, **options) as engine,
        AsyncSession(engine) as session,
        _of_core(session, session.connection, begin) as opened,
    ):
        yield opened


@asynccontextmanager
async def open_async_scoped_session(url: str, *, begin: bool = True, **options: Any) -> AsyncIterator[Opened]:
    async with engine_of(url, **options) as engine:
        session = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: 1)
        try:
            async with _of_core(session, session.connection, begin) as opened:
                yield opened
        finally:
            await session.remove()


@asynccontextmanager
async def _open_async_connection(url: str, driver: str, begin: bool, options: Any) -> AsyncIterator[Opened]:
    async with engine_of(url, driver, **options) as engine, engine.connect() as connection:

        async def raw() -> Any:
            return connection

        async with _of_core(connection, raw, begin) as opened:
            yield opened


@asynccontextmanager
async def open_async_connection(url: str, *, begin: bool = True, **options: Any) -> AsyncIterator[Opened]:
    async with _open_async_connection(url, "asyncpg", begin, options) as opened:
        yield opened


@asynccontextmanager
async def open_psycopg(url: str, *, begin: bool = True, **options: Any) -> AsyncIterator[Opened]:
    """Through SQLAlchemy, as any other asynchronous driver."""
    async with _open_async_connection(url, "psycopg", begin, options) as opened:
        yield opened


@asynccontextmanager
async def _of_asyncpg(connection: Any, begin: bool) -> AsyncIterator[Opened]:
    opened = Opened(connection, connection.execute, connection.get_server_pid())
    if not begin:
        yield opened
        return
    async with connection.transaction():
        with connection.query_logger(lambda query: opened.statements.append(query.query)):
            yield opened


@asynccontextmanager
async def open_asyncpg(url: str, *, begin: bool = True) -> AsyncIterator[Opened]:
    connection = await asyncpg.connect(url)
    try:
        async with _of_asyncpg(connection, begin) as opened:
            yield opened
    finally:
        await connection.close(timeout=10)


@asynccontextmanager
async def open_asyncpg_pool(url: str, *, begin: bool = True) -> AsyncIterator[Opened]:
    async with (
        asyncpg.create_pool(url, min_size=1, max_size=1) as pool,
        pool.acquire() as connection,
        _of_asyncpg(connection, begin) as opened,
    ):
        yield opened


OPENERS: list[Open] = [
    open_async_session,
    open_async_scoped_session,
    open_async_connection,
    open_psycopg,
    open_asyncpg,
    open_asyncpg_pool,
]
