"""Messages are added through every kind of connection that the library takes, on a real PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest
from opentelemetry import trace
from opentelemetry.baggage import set_baggage
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy import create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from outbox_relay import outbox, tables
from outbox_relay.errors import NotInTransactionError
from outbox_relay.outbox import Message
from tests.conftest import Database


@dataclass
class Writer:
    """One kind of connection: ``add`` as the application calls it, and the statements that went out."""

    add: Callable[..., Awaitable[list[UUID]]]
    execute: Callable[[str], Awaitable[Any]]
    statements: list[str] = field(default_factory=list)


Open: TypeAlias = Callable[..., AbstractAsyncContextManager[Writer]]


class Rollback(Exception):
    """Ends a writer's transaction without a commit."""


def _url(url: str, driver: str) -> str:
    return make_url(url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)


@asynccontextmanager
async def _sync_engine(url: str) -> AsyncIterator[tuple[Any, list[str]]]:
    engine = create_engine(_url(url, "psycopg"))
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    try:
        yield engine, statements
    finally:
        engine.dispose()


@asynccontextmanager
async def _async_engine(url: str) -> AsyncIterator[tuple[Any, list[str]]]:
    engine = create_async_engine(_url(url, "asyncpg"))
    statements: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    try:
        yield engine, statements
    finally:
        await engine.dispose()


def _sync_writer(target: Any, raw: Any, statements: list[str]) -> Writer:
    async def add(*messages: Message) -> list[UUID]:
        return outbox.add(target, *messages)

    async def execute(sql: str) -> Any:
        return raw().exec_driver_sql(sql)

    return Writer(add, execute, statements)


def _async_writer(target: Any, raw: Any, statements: list[str]) -> Writer:
    async def add(*messages: Message) -> list[UUID]:
        return await outbox.add_async(target, *messages)

    async def execute(sql: str) -> Any:
        return await (await raw()).exec_driver_sql(sql)

    return Writer(add, execute, statements)


@asynccontextmanager
async def open_session(url: str, *, begin: bool = True) -> AsyncIterator[Writer]:
    async with _sync_engine(url) as (engine, statements):
        with Session(engine) as session:
            writer = _sync_writer(session, session.connection, statements)
            if begin:
                with session.begin():
                    yield writer
            else:
                yield writer


@asynccontextmanager
async def open_scoped_session(url: str, *, begin: bool = True) -> AsyncIterator[Writer]:
    async with _sync_engine(url) as (engine, statements):
        session = scoped_session(sessionmaker(engine))
        try:
            writer = _sync_writer(session, session.connection, statements)
            if begin:
                with session.begin():
                    yield writer
            else:
                yield writer
        finally:
            session.remove()


@asynccontextmanager
async def open_connection(url: str, *, begin: bool = True) -> AsyncIterator[Writer]:
    async with _sync_engine(url) as (engine, statements):
        with engine.connect() as connection:
            writer = _sync_writer(connection, lambda: connection, statements)
            if begin:
                with connection.begin():
                    yield writer
            else:
                yield writer


@asynccontextmanager
async def open_async_session(url: str, *, begin: bool = True) -> AsyncIterator[Writer]:
    async with _async_engine(url) as (engine, statements), AsyncSession(engine) as session:
        writer = _async_writer(session, session.connection, statements)
        if begin:
            async with session.begin():
                yield writer
        else:
            yield writer


@asynccontextmanager
async def open_async_scoped_session(url: str, *, begin: bool = True) -> AsyncIterator[Writer]:
    async with _async_engine(url) as (engine, statements):
        session = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: 1)
        try:
            writer = _async_writer(session, session.connection, statements)
            if begin:
                async with session.begin():
                    yield writer
            else:
                yield writer
        finally:
            await session.remove()


@asynccontextmanager
async def open_async_connection(url: str, *, begin: bool = True) -> AsyncIterator[Writer]:
    async with _async_engine(url) as (engine, statements), engine.connect() as connection:

        async def raw() -> Any:
            return connection

        writer = _async_writer(connection, raw, statements)
        if begin:
            async with connection.begin():
                yield writer
        else:
            yield writer


@asynccontextmanager
async def _asyncpg_writer(connection: Any, begin: bool) -> AsyncIterator[Writer]:
    async def add(*messages: Message) -> list[UUID]:
        return await outbox.add_async(connection, *messages)

    writer = Writer(add, connection.execute)

    if begin:
        async with connection.transaction():
            with connection.query_logger(lambda query: writer.statements.append(query.query)):
                yield writer
    else:
        yield writer


@asynccontextmanager
async def open_asyncpg(url: str, *, begin: bool = True) -> AsyncIterator[Writer]:
    connection = await asyncpg.connect(url)
    try:
        async with _asyncpg_writer(connection, begin) as writer:
            yield writer
    finally:
        await connection.close(timeout=10)


@asynccontextmanager
async def open_asyncpg_pool(url: str, *, begin: bool = True) -> AsyncIterator[Writer]:
    async with (
        asyncpg.create_pool(url, min_size=1, max_size=1) as pool,
        pool.acquire() as connection,
        _asyncpg_writer(connection, begin) as writer,
    ):
        yield writer


@pytest.fixture(
    params=[
        open_session,
        open_scoped_session,
        open_connection,
        open_async_session,
        open_async_scoped_session,
        open_async_connection,
        open_asyncpg,
        open_asyncpg_pool,
    ],
    ids=lambda opener: opener.__name__.removeprefix("open_"),
)
def open_writer(request: pytest.FixtureRequest) -> Open:
    opener: Open = request.param
    return opener


@pytest.fixture
def span() -> Iterator[trace.Span]:
    """An active span, for as long as the test lasts."""
    started = TracerProvider().get_tracer("test").start_span("order")
    with trace.use_span(started, end_on_exit=True):
        yield started


def traceparent_of(span: trace.Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


async def rows_of(database: Database) -> list[asyncpg.Record]:
    """All committed rows, in the order of their ids."""
    connection = await database.connect()
    rows: list[asyncpg.Record] = await connection.fetch("SELECT * FROM outbox ORDER BY id")
    return rows


async def headers_of(database: Database) -> list[dict[str, str]]:
    return [json.loads(row["headers"]) for row in await rows_of(database)]


async def test_what_a_message_says_is_what_the_row_holds(open_writer: Open, outbox_database: Database) -> None:
    event_id = uuid4()
    full = Message("orders", b"\x00\xff", key="kéy", type="OrderPaid", headers={"a": 'é"\\', "": ""}, event_id=event_id)
    tombstone = Message("orders", None, key="")
    bare = Message("orders", {"n": 1})
    async with open_writer(outbox_database.url) as writer:
        assert await writer.add(full, tombstone, bare) == [event_id, tombstone.event_id, bare.event_id]
    rows = await rows_of(outbox_database)
    columns = ("event_id", "topic", "key", "type", "payload", "sent_at")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        (event_id, "orders", "kéy", "OrderPaid", b"\x00\xff", None),
        (tombstone.event_id, "orders", "", None, None, None),
        (bare.event_id, "orders", None, None, b'{"n":1}', None),
    ]
    assert [json.loads(row["headers"]) for row in rows] == [{"a": 'é"\\', "": ""}, {}, {}]


async def test_nothing_stays_when_the_transaction_rolls_back(open_writer: Open, outbox_database: Database) -> None:
    async def add_and_roll_back() -> None:
        async with open_writer(outbox_database.url) as writer:
            await writer.add(Message("orders", b"never"))
            raise Rollback

    with pytest.raises(Rollback):
        await add_and_roll_back()
    assert await rows_of(outbox_database) == []


async def test_nothing_is_visible_to_others_before_the_commit(open_writer: Open, outbox_database: Database) -> None:
    async with open_writer(outbox_database.url) as writer:
        await writer.add(Message("orders", b"later"))
        assert await rows_of(outbox_database) == []
    assert [row["payload"] for row in await rows_of(outbox_database)] == [b"later"]


async def test_adding_outside_a_transaction_is_refused(open_writer: Open, outbox_database: Database) -> None:
    async with open_writer(outbox_database.url, begin=False) as writer:
        for messages in ([Message("orders", b"x")], []):
            with pytest.raises(NotInTransactionError, match="in no transaction"):
                await writer.add(*messages)
        assert writer.statements == []
    assert await rows_of(outbox_database) == []


async def test_a_thousand_messages_get_ids_in_their_order(open_writer: Open, outbox_database: Database) -> None:
    # Random event ids and falling keys: no other order could pass for this one.
    messages = [Message("orders", str(n), key=str(10_000 - n), type=f"T{n % 7}") for n in range(1_000)]
    async with open_writer(outbox_database.url) as writer:
        ids = await writer.add(*messages)
    rows = await rows_of(outbox_database)
    assert ids == [message.event_id for message in messages]
    assert [row["event_id"] for row in rows] == ids
    assert [row["payload"] for row in rows] == [str(n).encode() for n in range(1_000)]


async def test_any_number_of_messages_is_one_statement(open_writer: Open, outbox_database: Database) -> None:
    async with open_writer(outbox_database.url) as writer:
        await writer.execute("SELECT 1")  # whatever the driver asks on a new connection is asked now
        await writer.add()
        await writer.add(Message("orders", b"one"))
        await writer.add(*(Message("orders", b"many") for _ in range(300)))
    added = writer.statements[writer.statements.index("SELECT 1") + 1 :]
    assert [statement.removeprefix("-- add to outbox").split()[:3] for statement in added] == [
        ["INSERT", "INTO", "outbox"]
    ] * 2
    assert len(await rows_of(outbox_database)) == 301


async def test_the_right_to_insert_is_enough(open_writer: Open, outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    role = f"writer_{uuid4().hex}"
    await connection.execute(f"CREATE ROLE {role}; GRANT INSERT ON outbox TO {role}")
    try:
        async with open_writer(outbox_database.url) as writer:
            await writer.execute(f"SET LOCAL ROLE {role}")
            await writer.add(Message("orders", b"one"))
            await writer.add(Message("orders", b"two"), Message("orders", b"three"))
        assert [row["payload"] for row in await rows_of(outbox_database)] == [b"one", b"two", b"three"]
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_more_messages_than_a_statement_may_have_parameters(open_writer: Open, outbox_database: Database) -> None:
    async with open_writer(outbox_database.url) as writer:
        await writer.add(*(Message("orders", b"x") for _ in range(11_000)))
    connection = await outbox_database.connect()
    assert await connection.fetchval("SELECT count(*) FROM outbox") == 11_000


async def test_the_table_is_found_by_search_path(open_writer: Open, outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute('CREATE SCHEMA "of the shop"')
    for table in ("outbox", "outbox_relay", "outbox_slot", "outbox_layout"):
        await connection.execute(f'ALTER TABLE {table} SET SCHEMA "of the shop"')
    async with open_writer(outbox_database.url) as writer:
        await writer.execute('SET LOCAL search_path = "of the shop"')
        await writer.add(Message("orders", b"x"))
    assert await connection.fetchval('SELECT count(*) FROM "of the shop".outbox') == 1


async def test_schema_translate_map_is_honoured(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute("CREATE SCHEMA shop; ALTER TABLE outbox SET SCHEMA shop")
    async with _sync_engine(outbox_database.url) as (engine, _):
        with Session(engine.execution_options(schema_translate_map={None: "shop"})) as session, session.begin():
            outbox.add(session, Message("orders", b"x"))
    assert await connection.fetchval("SELECT count(*) FROM shop.outbox") == 1


async def test_the_current_trace_goes_into_the_headers(
    open_writer: Open, outbox_database: Database, span: trace.Span
) -> None:
    async with open_writer(outbox_database.url) as writer:
        await writer.add(Message("orders", b"x", headers={"a": "b"}))
    assert await headers_of(outbox_database) == [{"a": "b", "traceparent": traceparent_of(span)}]


async def test_tracestate_goes_along_and_baggage_does_not(outbox_database: Database) -> None:
    context = trace.SpanContext(
        1, 2, is_remote=False, trace_flags=trace.TraceFlags(1), trace_state=trace.TraceState([("vendor", "x")])
    )
    token = attach(set_baggage("customer", "private"))
    try:
        with trace.use_span(trace.NonRecordingSpan(context)):
            async with open_asyncpg(outbox_database.url) as writer:
                await writer.add(Message("orders", b"x"))
    finally:
        detach(token)
    assert await headers_of(outbox_database) == [
        {"traceparent": traceparent_of(trace.NonRecordingSpan(context)), "tracestate": "vendor=x"}
    ]


async def test_a_message_keeps_the_trace_that_it_brings(open_writer: Open, outbox_database: Database) -> None:
    own = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-00"}
    context = trace.SpanContext(1, 2, is_remote=False, trace_state=trace.TraceState([("vendor", "x")]))
    with trace.use_span(trace.NonRecordingSpan(context)):
        async with open_writer(outbox_database.url) as writer:
            await writer.add(Message("orders", b"x", headers=own))
    assert await headers_of(outbox_database) == [own]


async def test_without_an_active_span_nothing_is_added(open_writer: Open, outbox_database: Database) -> None:
    async with open_writer(outbox_database.url) as writer:
        await writer.add(Message("orders", b"x"))
    assert await headers_of(outbox_database) == [{}]


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "shop_order"
    id: Mapped[int] = mapped_column(primary_key=True)


async def test_pending_objects_are_not_flushed(outbox_database: Database) -> None:
    async with _sync_engine(outbox_database.url) as (engine, statements):
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(Order(id=1))
            statements.clear()
            # A pending object has begun the session's transaction, so the message may be added.
            outbox.add(session, Message("orders", b"x"))
            assert [statement.split()[:3] for statement in statements] == [["INSERT", "INTO", "outbox"]]
            assert [type(pending) for pending in session.new] == [Order]
            session.commit()
    assert len(await rows_of(outbox_database)) == 1


async def test_pending_objects_are_not_flushed_by_an_async_session(outbox_database: Database) -> None:
    async with _async_engine(outbox_database.url) as (engine, statements):
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            session.add(Order(id=1))
            statements.clear()
            await outbox.add_async(session, Message("orders", b"x"))
            assert [statement.split()[:3] for statement in statements] == [["INSERT", "INTO", "outbox"]]
            assert [type(pending) for pending in session.new] == [Order]
            await session.commit()
    assert len(await rows_of(outbox_database)) == 1


async def test_a_savepoint_takes_its_messages_with_it(outbox_database: Database) -> None:
    async with _sync_engine(outbox_database.url) as (engine, _):
        with Session(engine) as session, session.begin():
            outbox.add(session, Message("orders", b"kept"))
            with session.begin_nested() as savepoint:
                outbox.add(session, Message("orders", b"gone"))
                savepoint.rollback()
    assert [row["payload"] for row in await rows_of(outbox_database)] == [b"kept"]


async def test_a_session_bound_by_table_uses_the_engine_of_the_outbox(outbox_database: Database) -> None:
    async with _sync_engine(outbox_database.url) as (engine, _):
        with Session(binds={tables.outbox: engine}) as session, session.begin():
            outbox.add(session, Message("orders", b"x"))
    assert len(await rows_of(outbox_database)) == 1


async def test_autocommit_is_refused_on_a_sync_connection(outbox_database: Database) -> None:
    async with _sync_engine(outbox_database.url) as (engine, _):
        with (
            Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session,
            session.begin(),
            pytest.raises(NotInTransactionError, match="AUTOCOMMIT"),
        ):
            outbox.add(session, Message("orders", b"x"))
    assert await rows_of(outbox_database) == []


async def test_autocommit_is_refused_on_an_async_connection(outbox_database: Database) -> None:
    async with (
        _async_engine(outbox_database.url) as (engine, _),
        engine.execution_options(isolation_level="AUTOCOMMIT").begin() as connection,
    ):
        with pytest.raises(NotInTransactionError, match="AUTOCOMMIT"):
            await outbox.add_async(connection, Message("orders", b"x"))
    assert await rows_of(outbox_database) == []


async def test_a_jsonb_codec_of_the_application_does_not_spoil_the_headers(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    async with connection.transaction():
        await outbox.add_async(connection, Message("orders", b"x", headers={"a": "b"}))
    assert await headers_of(outbox_database) == [{"a": "b"}]


async def test_the_wrong_kind_of_connection_is_named(outbox_database: Database) -> None:
    wrong: Any
    async with (
        _sync_engine(outbox_database.url) as (engine, _),
        _async_engine(outbox_database.url) as (async_engine, _),
        asyncpg.create_pool(outbox_database.url, min_size=0) as pool,
    ):
        message = Message("orders", b"x")
        async with AsyncSession(async_engine) as wrong:
            with pytest.raises(TypeError, match=r"AsyncSession is asynchronous: use `await outbox\.add_async"):
                outbox.add(wrong, message)
        with pytest.raises(TypeError, match="not Engine"):
            outbox.add(engine, message)
        with Session(engine) as wrong, pytest.raises(TypeError, match=r"not Session; .*`outbox\.add"):
            await outbox.add_async(wrong, message)
        with pytest.raises(TypeError, match="not Pool"):
            await outbox.add_async(pool, message)
