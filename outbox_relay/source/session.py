"""One PostgreSQL connection that is dropped on the first doubt and rebuilt on the next use.

Every call has a deadline, and every failure becomes :class:`SourceUnavailableError`: an error in the middle of a
transaction, a demoted primary (25006), a restart (57P01) and a silent network all end in a new connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import asyncpg
from asyncpg.prepared_stmt import PreparedStatement

from outbox_relay.errors import SourceRefusedError, SourceUnavailableError
from outbox_relay.source import handshake
from outbox_relay.source.sqlstate import Fault, fault_of
from outbox_relay.source.statements import quoted
from outbox_relay.tls import Tls, tls_problem

_PORT = 5432

#: What a lost database looks like. OSError and TimeoutError come from sockets, UnicodeError for a host that can't be
#: one, the rest from asyncpg, the last one too: so it answers a statement on a session that the server has ended, after
#: idling in a transaction for example.
FAILURES = (
    OSError,
    TimeoutError,
    UnicodeError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class RowRefusedError(SourceUnavailableError):
    """PostgreSQL refused what was tried within a savepoint, for what may be a row's fault; all but that stands."""

    def __init__(self, error: Exception) -> None:
        super().__init__(what_it_says(error))
        self.error = error


class RefusalError(ConnectionError):
    """A certificate, or a file that a connection needs, keeps it from being made."""


def _is_refusal(error: BaseException) -> bool:
    """Whether it isn't over by itself: somebody has to mend it."""
    return isinstance(error, RefusalError) or fault_of(error) is Fault.CONFIGURATION


@dataclass(frozen=True, slots=True)
class Database:
    """Where PostgreSQL is, and how long one connect and one statement may take, in seconds.

    ``password`` is asked for each connection; without, it is looked for as libpq does. Without ``tls`` all is sent in
    the clear. ``schema`` has the outbox's tables; empty: the ``search_path`` of the role finds them.
    """

    url: str
    connect_timeout_seconds: float
    statement_timeout_seconds: float
    password: Callable[[], str] | None = None
    tls: Tls | None = None
    schema: str = ""

    async def connect(self, application_name: str, *, statement_cache_size: int = 100) -> asyncpg.Connection:
        """A new connection to a server that can be written to: of several hosts to the first such.

        Each has ``connect_timeout_seconds``, so one that never answers doesn't keep the others from being tried.
        Raises what is among ``FAILURES``.
        """
        urls = _each_host(self.url)
        failures: list[Exception] = []
        for url in urls:
            try:
                return await self._connect(url, application_name, statement_cache_size)
            except FAILURES as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        reasons = "; ".join(f"{_host(url)}: {what_it_says(error)}" for url, error in zip(urls, failures, strict=True))
        if any(_is_refusal(error) for error in failures):
            raise RefusalError(reasons) from failures[0]
        if all(isinstance(error, asyncpg.TargetServerAttributeNotMatched) for error in failures):
            raise asyncpg.TargetServerAttributeNotMatched(reasons) from failures[0]
        raise ConnectionError(reasons) from failures[0]

    async def _connect(self, url: str, application_name: str, statement_cache_size: int) -> asyncpg.Connection:
        try:
            # Both as they are now, for a certificate or a password may have been renewed.
            ssl_context = False if self.tls is None else self.tls.context()
            password = None if self.password is None else self.password()
        except (OSError, UnicodeError) as error:
            raise RefusalError(str(error)) from error
        try:
            return await asyncpg.connect(
                url,
                password=password,
                ssl=ssl_context,
                # A standby is told apart here, before anything is tried on it.
                target_session_attrs="read-write",
                timeout=self.connect_timeout_seconds,
                command_timeout=self.statement_timeout_seconds,
                statement_cache_size=statement_cache_size,
                server_settings={"application_name": application_name},
            )
        except asyncpg.TargetServerAttributeNotMatched as error:
            problem = "read-only: a standby, or default_transaction_read_only is on"
            raise asyncpg.TargetServerAttributeNotMatched(problem) from error
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"no answer within {self.connect_timeout_seconds:g} s") from error
        except ssl.SSLError as error:
            raise RefusalError(f"the server {tls_problem(error)}") from error
        except (ConnectionError, asyncpg.ConnectionDoesNotExistError) as error:
            if reason := await self._tls_refusal(url):
                raise RefusalError(f"the server {reason}") from error
            raise

    async def _tls_refusal(self, url: str) -> str | None:
        parts = urlsplit(url)
        if self.tls is None or parts.hostname is None:
            return None
        host = unquote(parts.hostname)
        return await handshake.refusal(host, parts.port or _PORT, self.tls, self.connect_timeout_seconds)

    async def connect_to_schema(self, application_name: str) -> asyncpg.Connection:
        """As :meth:`connect`, for a session that finds the tables by itself."""
        connection = await self.connect(application_name)
        if self.schema:
            await connection.execute(f"SET search_path = {quoted(self.schema)}")
        return connection


def _each_host(url: str) -> list[str]:
    """A url of one host for each."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    if "," not in hosts:
        return [url]
    return [urlunsplit(parts._replace(netloc=f"{user}{at}{host}")) for host in hosts.split(",") if host]


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _name(statement: str) -> str:
    """The comment that it begins with."""
    return statement.lstrip("\n- ").partition("\n")[0]


def what_it_says(error: BaseException) -> str:
    """The first sentence of PostgreSQL's answer alone: its DETAIL may hold the row, with its key and payload."""
    return str(error.args[0] if isinstance(error, asyncpg.PostgresError) and error.args else error)


class Session:
    """A connection of its own, opened at first use, with these settings of PostgreSQL. Not for two tasks at once."""

    def __init__(self, database: Database, application_name: str, settings: Mapping[str, str] | None = None) -> None:
        self._database = database
        # The server has the deadlines too: one that only the client has leaves a backend behind that waits on for a
        # lock, and one more with each new try. Neither ends a backend that is sending rows to a host that is lost or
        # frozen, locks in hand; tcp_user_timeout does.
        timeout_ms = int(database.statement_timeout_seconds * 1000)
        self._settings = {
            "statement_timeout": str(timeout_ms),
            "idle_in_transaction_session_timeout": str(timeout_ms),
            "tcp_user_timeout": str(timeout_ms),
            **(settings or {}),
        }
        if database.schema:
            self._settings["search_path"] = quoted(database.schema)
        self._direct = False
        self._application_name = application_name
        self._connection: asyncpg.Connection | None = None
        # By statement; None until it is prepared on the connection of now.
        self._prepared: dict[str, PreparedStatement[asyncpg.Record] | None] = {}
        self._warnings: list[str] = []
        self._in_savepoint = False

    def prepares(self, statements: Iterable[str]) -> None:
        """Have these ready before a transaction begins, as all must be that follow a lock in one.

        asyncpg sends a statement that is new in two parts, and in between neither of the server's deadlines ends a
        transaction: a process that is frozen there would keep every lock for as long as it lives.
        """
        for statement in statements:
            self._prepared.setdefault(statement, None)

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    @property
    def direct(self) -> bool:
        """Whether this session is the server's own, with no pooler in between, as far as is known."""
        return self.connected and self._direct

    async def connection(self) -> asyncpg.Connection:
        """The live connection, made anew if there is none."""
        if self._connection is None or self._connection.is_closed():
            with self.unavailable("connect to the database"):
                self._connection = await self._database.connect(self._application_name)
                self._connection.add_log_listener(self._remember_warning)
                # A pooler tells process ids of its own, and forgets what is set for a session, or leaves it to others.
                pid = await self._connection.fetchval("SELECT pg_backend_pid()")
                self._direct = pid == self._connection.get_server_pid()
                if self._direct:
                    await self._connection.execute(self._set("SET"))
            self._prepared = dict.fromkeys(self._prepared)
        return self._connection

    async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run one statement; outside :meth:`transaction` it is one of its own."""
        connection = await self.connection()
        if connection.is_in_transaction():
            return await self._fetch(connection, statement, arguments)
        if self._direct:
            self._warnings.clear()
            rows = await self._fetch(connection, statement, arguments)
            self._refuse_doubt()
            return rows
        async with self.transaction():
            return await self._fetch(connection, statement, arguments)

    async def _fetch(
        self, connection: asyncpg.Connection, statement: str, arguments: Sequence[Any]
    ) -> list[asyncpg.Record]:
        with self.unavailable(_name(statement)):
            prepared = self._prepared.get(statement)
            rows: list[asyncpg.Record] = (
                await connection.fetch(statement, *arguments) if prepared is None else await prepared.fetch(*arguments)
            )
            return rows

    async def change(self, statement: str, *arguments: Any) -> int:
        """Run one that returns no rows, within :meth:`transaction`; how many rows it changed."""
        connection = await self.connection()
        with self.unavailable(_name(statement)):
            prepared = self._prepared.get(statement)
            if prepared is None:
                done = await connection.execute(statement, *arguments)
            else:
                await prepared.fetch(*arguments)
                done = prepared.get_statusmsg()
            return int(done.rpartition(" ")[2])

    async def listen(self, channel: str, notified: Callable[[], None]) -> None:
        """Have ``notified`` called for each NOTIFY, for as long as this connection lives."""
        connection = await self.connection()
        with self.unavailable("listen"):
            await connection.add_listener(channel, lambda *_: notified())

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """A transaction that is known to be durable when the block is left without an error.

        A COMMIT that timed out, or that came with a warning (*canceling wait for synchronous replication*: it is
        committed here, but a standby may not have it), doesn't count: SourceUnavailableError, the session is gone.
        """
        connection = await self.connection()
        if new := [statement for statement, prepared in self._prepared.items() if prepared is None]:
            # In a transaction of their own, whose search_path is the right one.
            with self.unavailable("prepare statements"):
                await connection.execute(self._begin())
                for statement in new:
                    self._prepared[statement] = await connection.prepare(statement)
                await connection.execute("COMMIT")
        with self.unavailable("begin"):
            await connection.execute(self._begin())
        try:
            yield
        except BaseException:
            # Not rolled back politely: whatever went wrong, a closed socket rolls back for sure.
            self.drop()
            raise
        self._warnings.clear()
        with self.unavailable("commit"):
            await connection.execute("COMMIT")
        self._refuse_doubt()

    def _begin(self) -> str:
        """READ COMMITTED, since each statement is to see what was committed before it. Settings in the same message."""
        begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
        return begin if self._direct else f"{begin};{self._set('SET LOCAL')}"

    def _set(self, how: str) -> str:
        return ";".join(f"{how} {name} = {value}" for name, value in self._settings.items())

    def _refuse_doubt(self) -> None:
        if self._warnings:
            self.drop()
            raise SourceUnavailableError(f"commit is in doubt: {self._warnings[0]}")

    @contextlib.asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """Within a transaction: what may be a row's fault undoes the block alone, RowRefusedError."""
        connection = await self.connection()
        with self.unavailable("savepoint"):
            # Else what is deferred would be refused at COMMIT, with all of the transaction.
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE; SAVEPOINT part")
        self._in_savepoint = True
        try:
            yield
        except RowRefusedError:
            self._in_savepoint = False
            with self.unavailable("roll back to savepoint"):
                await connection.execute("ROLLBACK TO SAVEPOINT part")
            raise
        finally:
            self._in_savepoint = False
        with self.unavailable("release savepoint"):
            await connection.execute("RELEASE SAVEPOINT part")

    def drop(self) -> None:
        """Close the socket at once; the server rolls back what was open."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def close(self) -> None:
        """Say goodbye; bounded by the connect timeout."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=self._database.connect_timeout_seconds)
            except FAILURES:
                connection.terminate()

    def _remember_warning(self, _: Any, message: asyncpg.PostgresLogMessage) -> None:
        if message.severity_en == "WARNING":
            self._warnings.append(message.message)

    @contextlib.contextmanager
    def unavailable(self, doing: str) -> Iterator[None]:
        """Turn any failure of the database within the block into SourceUnavailableError, and drop the session."""
        asked_at = time.monotonic()
        try:
            yield
        except FAILURES as error:
            if self._in_savepoint and fault_of(error) is Fault.ROW:
                raise RowRefusedError(error) from error
            self.drop()
            detail = what_it_says(error) or f"no answer within {self._database.statement_timeout_seconds} s"
            if isinstance(error, asyncpg.InsufficientPrivilegeError):
                detail += "; `outbox-relay check` says what the role lacks"
            kind = SourceRefusedError if _is_refusal(error) else SourceUnavailableError
            unavailable = kind(f"{doing}: {detail}")
            unavailable.asked_at = asked_at
            raise unavailable from error
        except asyncio.CancelledError:
            # A statement cancelled half-way may leave its backend holding locks.
            self.drop()
            raise
