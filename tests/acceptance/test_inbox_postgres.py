"""Each message has one effect, whatever comes twice, fails or dies. The effects are counted in a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest

from outbox_relay.errors import MissingMessageIdError, NotInTransactionError
from outbox_relay.inbox import postgres
from outbox_relay.inbox.postgres import Inbox
from tests.acceptance.inboxes import (
    OPENERS,
    Open,
    Opened,
    charges_of,
    open_async_connection,
    open_async_session,
    open_asyncpg,
    open_psycopg,
    prepare,
    waits_for_another,
)
from tests.conftest import Database
from tests.consumed import record
from tests.waiting import eventually

INBOX = Inbox("payments")


class HandlerFailed(Exception):
    """What a handler raises."""


@pytest.fixture
async def inbox_database(database: Database) -> Database:
    await prepare(database)
    return database


@pytest.fixture(params=OPENERS, ids=lambda opener: opener.__name__.removeprefix("open_"))
def open_handler(request: pytest.FixtureRequest) -> Open:
    opener: Open = request.param
    return opener


async def handle(opened: Opened, id_: str, inbox: Inbox = INBOX) -> bool:
    """As a handler does, in a transaction that is open: charge, if the message is new."""
    if new := await inbox.accept(opened.connection, record(id_)):
        await opened.charge(id_)
    return new


# -- one after the other


async def test_a_message_that_comes_again_is_skipped(open_handler: Open, inbox_database: Database) -> None:
    for expected in (True, False, False):
        async with open_handler(inbox_database.url) as opened:
            assert await handle(opened, "m1") is expected
    assert await charges_of(inbox_database) == {"m1": 1}


async def test_a_message_that_comes_again_in_the_same_transaction_is_skipped(
    open_handler: Open, inbox_database: Database
) -> None:
    async with open_handler(inbox_database.url) as opened:
        assert [await handle(opened, "m1"), await handle(opened, "m1")] == [True, False]
    assert await charges_of(inbox_database) == {"m1": 1}


async def test_a_message_whose_handler_failed_is_new_again(open_handler: Open, inbox_database: Database) -> None:
    async def fail() -> None:
        async with open_handler(inbox_database.url) as opened:
            assert await handle(opened, "m1")
            raise HandlerFailed

    for _ in range(2):
        with pytest.raises(HandlerFailed):
            await fail()
        assert await charges_of(inbox_database) == {}
    async with open_handler(inbox_database.url) as opened:
        assert await handle(opened, "m1")
    assert await charges_of(inbox_database) == {"m1": 1}


async def test_each_consumer_handles_a_message_for_itself(inbox_database: Database) -> None:
    for consumer in ("payments", "mails", "payments"):
        async with open_asyncpg(inbox_database.url) as opened:
            await handle(opened, "m1", Inbox(consumer))
    assert await charges_of(inbox_database) == {"m1": 2}


async def test_the_id_is_what_the_callable_says(inbox_database: Database) -> None:
    inbox = Inbox("payments", message_id=lambda message: f"{message.topic}/{message.partition}/{message.offset}")
    async with open_asyncpg(inbox_database.url) as opened:
        assert await inbox.accept(opened.connection, record(offset=1))
        assert not await inbox.accept(opened.connection, record("another", offset=1))
        assert await inbox.accept(opened.connection, record(offset=2))


async def test_a_message_without_an_id_is_no_new_one_and_no_repeat(inbox_database: Database) -> None:
    async with open_asyncpg(inbox_database.url) as opened:
        with pytest.raises(MissingMessageIdError, match="offset 17 of orders, partition 3"):
            await INBOX.accept(opened.connection, record())
        with pytest.raises(MissingMessageIdError, match="offset 18"):
            await INBOX.accept_batch(opened.connection, [record("m1"), record(offset=18)])
        assert await opened.connection.fetchval("SELECT count(*) FROM inbox") == 0


async def test_the_longest_name_and_id_fit_into_the_index(inbox_database: Database) -> None:
    # Random, so that PostgreSQL can't compress them.
    name, id_ = ("".join(uuid4().hex for _ in range(32))[:size] for size in (200, 1_000))
    async with open_asyncpg(inbox_database.url) as opened:
        assert await Inbox(name).accept(opened.connection, record(id_))


@pytest.mark.parametrize("name", ["", "x" * 201, "é" * 101, "a\0b"])
def test_a_name_that_can_be_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="consumer must be text of 1 to 200 bytes"):
        Inbox(name)


# -- the transaction is the handler's


async def test_nothing_is_committed_before_the_handler_commits(open_handler: Open, inbox_database: Database) -> None:
    watcher = await inbox_database.connect()
    async with open_handler(inbox_database.url) as opened:
        await INBOX.accept(opened.connection, record("m1"))
        assert await watcher.fetchval("SELECT count(*) FROM inbox") == 0
    assert await watcher.fetchval("SELECT count(*) FROM inbox") == 1


async def test_outside_a_transaction_nothing_is_accepted(open_handler: Open, inbox_database: Database) -> None:
    async with open_handler(inbox_database.url, begin=False) as opened:
        with pytest.raises(NotInTransactionError, match="in no transaction"):
            await INBOX.accept(opened.connection, record("m1"))
        with pytest.raises(NotInTransactionError, match="in no transaction"):
            await INBOX.accept_batch(opened.connection, [])
    watcher = await inbox_database.connect()
    assert await watcher.fetchval("SELECT count(*) FROM inbox") == 0


@pytest.mark.parametrize("open_handler", [open_async_session, open_async_connection, open_psycopg])
async def test_where_each_statement_commits_itself_nothing_is_accepted(
    open_handler: Open, inbox_database: Database
) -> None:
    async with open_handler(inbox_database.url, isolation_level="AUTOCOMMIT") as opened:
        with pytest.raises(NotInTransactionError, match="AUTOCOMMIT"):
            await INBOX.accept(opened.connection, record("m1"))


async def test_what_is_no_connection_is_named() -> None:
    with pytest.raises(TypeError, match="takes an AsyncSession, AsyncConnection or asyncpg connection, not object"):
        await INBOX.accept(object(), record("m1"))


async def test_a_savepoint_takes_the_id_back_with_the_effects(inbox_database: Database) -> None:
    async with open_asyncpg(inbox_database.url) as opened:
        with contextlib.suppress(HandlerFailed):
            async with opened.connection.transaction():
                assert await handle(opened, "m1")
                raise HandlerFailed
        assert await handle(opened, "m1")
    assert await charges_of(inbox_database) == {"m1": 1}


async def test_the_table_is_found_by_search_path(open_handler: Open, inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    await connection.execute('CREATE SCHEMA "of payments"; ALTER TABLE inbox SET SCHEMA "of payments"')
    async with open_handler(inbox_database.url) as opened:
        await opened.execute('SET LOCAL search_path = "of payments"')
        assert await INBOX.accept(opened.connection, record("m1"))
    assert await connection.fetchval('SELECT count(*) FROM "of payments".inbox') == 1


async def test_schema_translate_map_is_honoured(inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    await connection.execute('CREATE SCHEMA "of ""us"""; ALTER TABLE inbox SET SCHEMA "of ""us"""')
    options = {"schema_translate_map": {None: 'of "us"'}}
    async with open_async_session(inbox_database.url, execution_options=options) as opened:
        assert await INBOX.accept(opened.connection, record("m1"))
    assert await connection.fetchval('SELECT count(*) FROM "of ""us""".inbox') == 1


async def test_the_rights_that_inbox_sql_names_are_enough(open_handler: Open, inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    role = f"consumer_{uuid4().hex}"
    await connection.execute(f"CREATE ROLE {role}; GRANT SELECT, INSERT ON inbox TO {role}")
    try:
        for expected in (True, False):
            async with open_handler(inbox_database.url) as opened:
                await opened.execute(f"SET LOCAL ROLE {role}")
                assert await INBOX.accept(opened.connection, record("m1")) is expected
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


# -- at once


async def test_a_repeat_waits_for_the_first_and_is_skipped_once_that_commits(
    open_handler: Open, inbox_database: Database
) -> None:
    watcher = await inbox_database.connect()
    async with open_handler(inbox_database.url) as second:
        async with open_handler(inbox_database.url) as first:
            assert await handle(first, "m1")
            repeat = asyncio.create_task(handle(second, "m1"))
            await waits_for_another(watcher, second.pid)
            assert not repeat.done()
        async with asyncio.timeout(30):
            assert not await repeat
    assert await charges_of(inbox_database) == {"m1": 1}


async def test_a_repeat_waits_for_the_first_and_is_handled_once_that_rolls_back(
    open_handler: Open, inbox_database: Database
) -> None:
    watcher = await inbox_database.connect()
    async with open_handler(inbox_database.url) as second:
        with contextlib.suppress(HandlerFailed):
            async with open_handler(inbox_database.url) as first:
                assert await handle(first, "m1")
                repeat = asyncio.create_task(handle(second, "m1"))
                await waits_for_another(watcher, second.pid)
                raise HandlerFailed
        async with asyncio.timeout(30):
            assert await repeat
    assert await charges_of(inbox_database) == {"m1": 1}


async def test_a_repeat_is_handled_once_the_first_has_lost_its_connection(inbox_database: Database) -> None:
    first, second, watcher = [await inbox_database.connect() for _ in range(3)]
    await first.execute("BEGIN")
    assert await INBOX.accept(first, record("m1"))
    async with second.transaction():
        repeat = asyncio.create_task(INBOX.accept(second, record("m1")))
        await waits_for_another(watcher, second.get_server_pid())
        await watcher.execute("SELECT pg_terminate_backend($1)", first.get_server_pid())
        async with asyncio.timeout(30):
            assert await repeat


#: A COMMIT takes as long as somebody holds the lock.
SLOW_COMMIT = """
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON charge
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold();
"""


async def test_a_repeat_is_skipped_where_the_first_never_heard_that_it_was_committed(inbox_database: Database) -> None:
    first, second, watcher = [await inbox_database.connect() for _ in range(3)]
    await watcher.execute(SLOW_COMMIT)
    await watcher.execute("SELECT pg_advisory_lock(7)")
    handling = first.transaction()
    await handling.start()
    assert await INBOX.accept(first, record("m1"))
    await first.execute("INSERT INTO charge VALUES ('m1')")
    pid = first.get_server_pid()
    committing = asyncio.create_task(handling.commit())
    await waits_for_another(watcher, pid)
    first.terminate()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await committing
    async with second.transaction():
        repeat = asyncio.create_task(INBOX.accept(second, record("m1")))
        await waits_for_another(watcher, second.get_server_pid())
        await watcher.execute("SELECT pg_advisory_unlock(7)")
        async with asyncio.timeout(30):
            assert not await repeat
    assert await charges_of(inbox_database) == {"m1": 1}


async def test_other_messages_wait_for_nobody(inbox_database: Database) -> None:
    async with open_asyncpg(inbox_database.url) as first, open_asyncpg(inbox_database.url) as second:
        assert await handle(first, "m1")
        async with asyncio.timeout(30):
            assert await handle(second, "m2")
            assert await INBOX.accept_batch(second.connection, [record("m3"), record("m4")])
            assert await Inbox("mails").accept(second.connection, record("m1"))


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_a_repeat_under_a_stricter_isolation_fails_and_is_skipped_when_it_tries_again(
    inbox_database: Database, isolation: Any
) -> None:
    first, second, watcher = [await inbox_database.connect() for _ in range(3)]
    transaction = second.transaction(isolation=isolation)
    await transaction.start()
    await second.fetch("SELECT FROM charge")  # whereby the transaction has its snapshot
    async with first.transaction():
        assert await INBOX.accept(first, record("m1"))
        repeat = asyncio.create_task(INBOX.accept(second, record("m1")))
        await waits_for_another(watcher, second.get_server_pid())
    with pytest.raises(asyncpg.SerializationError):
        await repeat
    await transaction.rollback()
    async with second.transaction(isolation=isolation):
        assert not await INBOX.accept(second, record("m1"))


async def test_an_inbox_that_is_partitioned_by_arrival_is_refused(inbox_database: Database) -> None:
    """Each of its partitions has unique ids of its own, so a repeat across a boundary would be new."""
    connection = await inbox_database.connect()
    await connection.execute(
        """
        ALTER TABLE inbox RENAME TO ours;
        CREATE TABLE inbox (
            consumer text, message_id text, handled_at timestamptz DEFAULT now(),
            PRIMARY KEY (consumer, message_id, handled_at)
        ) PARTITION BY RANGE (handled_at);
        CREATE TABLE inbox_of_all_days PARTITION OF inbox DEFAULT;
        """
    )
    async with connection.transaction():
        with pytest.raises(asyncpg.InvalidColumnReferenceError, match="no unique or exclusion constraint matching"):
            await INBOX.accept(connection, record("m1"))


# -- batches


def ids_of(messages: list[Any]) -> list[str]:
    return [dict(message.headers)["id"].decode() for message in messages]


async def test_a_batch_returns_what_is_new_in_its_order_and_once_each(
    open_handler: Open, inbox_database: Database
) -> None:
    async with open_handler(inbox_database.url) as opened:
        assert await INBOX.accept(opened.connection, record("m5"))
    # An order that no sorting could give; offsets tell the occurrences of one id apart.
    batch = [record(id_, offset=n) for n, id_ in enumerate(["m9", "m5", "m2", "m9", "m7", "m2", "m1", "m5"])]
    async with open_handler(inbox_database.url) as opened:
        new = await INBOX.accept_batch(opened.connection, batch)
    assert [(message.offset, *ids_of([message])) for message in new] == [(0, "m9"), (2, "m2"), (4, "m7"), (6, "m1")]
    async with open_handler(inbox_database.url) as opened:
        assert await INBOX.accept_batch(opened.connection, batch) == []
        assert await INBOX.accept_batch(opened.connection, []) == []


async def test_any_number_of_messages_is_one_statement(open_handler: Open, inbox_database: Database) -> None:
    batch = [record(uuid4().hex) for _ in range(10_000)]
    async with open_handler(inbox_database.url) as opened:
        await opened.execute("SELECT 1")  # whatever the driver asks on a new connection is asked now
        assert len(await INBOX.accept_batch(opened.connection, batch)) == 10_000
    sent = opened.statements[opened.statements.index("SELECT 1") + 1 :] if opened.statements else []
    assert [statement.splitlines()[0] for statement in sent if not statement.startswith(("COMMIT", "ROLLBACK"))] == [
        "-- accept messages"
    ]


async def test_batches_that_overlap_take_each_message_once(inbox_database: Database) -> None:
    ids = [f"m{n}" for n in range(300)]

    async def take(batch: list[str]) -> None:
        async with open_asyncpg(inbox_database.url) as opened:
            for message in ids_of(await INBOX.accept_batch(opened.connection, [record(id_) for id_ in batch])):
                await opened.charge(message)

    async with asyncio.timeout(60):
        await asyncio.gather(*(take(ids[n * 20 : n * 20 + 120][:: -1 if n % 2 else 1]) for n in range(10)))
    assert await charges_of(inbox_database) == dict.fromkeys(sorted(ids), 1)


async def _two_batches_in_opposite_orders(database: Database) -> list[BaseException | list[Any]]:
    """Both wait for a third that holds what is in the middle of each; it lets go once both wait."""
    third, first, second, watcher = [await database.connect() for _ in range(4)]
    batch = [record(id_) for id_ in ("a", "b", "c")]

    async def take(connection: asyncpg.Connection, messages: list[Any]) -> list[Any]:
        async with connection.transaction():
            return await INBOX.accept_batch(connection, messages)

    holding = third.transaction()
    await holding.start()
    await INBOX.accept(third, record("b"))
    takes = []
    for connection, messages in ((first, batch), (second, batch[::-1])):
        takes.append(asyncio.create_task(take(connection, messages)))
        await waits_for_another(watcher, connection.get_server_pid())
    await holding.rollback()
    async with asyncio.timeout(30):
        return await asyncio.gather(*takes, return_exceptions=True)


async def test_batches_in_opposite_orders_do_not_deadlock(inbox_database: Database) -> None:
    taken = await _two_batches_in_opposite_orders(inbox_database)
    assert sorted(len(new) for new in taken if isinstance(new, list)) == [0, 3]


async def test_batches_that_are_not_sorted_are_caught(
    inbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "sorted", list, raising=False)
    taken = await _two_batches_in_opposite_orders(inbox_database)
    assert [type(new) for new in taken].count(asyncpg.DeadlockDetectedError) == 1


# -- handling that is broken off after each step

#: Handles a message and says, after each step, that it was done.
Handler: TypeAlias = Callable[[asyncpg.Connection, str, Callable[[str], Awaitable[None]]], Awaitable[None]]

STEPS = ("begun", "accepted", "charged", "committed")


async def by_the_book(connection: asyncpg.Connection, id_: str, done: Callable[[str], Awaitable[None]]) -> None:
    async with connection.transaction():
        await done("begun")
        if await INBOX.accept(connection, record(id_)):
            await done("accepted")
            await connection.execute("INSERT INTO charge VALUES ($1)", id_)
            await done("charged")
    await done("committed")


async def id_before_the_handler(
    connection: asyncpg.Connection, id_: str, done: Callable[[str], Awaitable[None]]
) -> None:
    """Broken: the message counts as handled before it is."""
    await done("begun")
    async with connection.transaction():
        new = await INBOX.accept(connection, record(id_))
    if new:
        await done("accepted")
        await connection.execute("INSERT INTO charge VALUES ($1)", id_)
        await done("charged")
    await done("committed")


async def id_after_the_handler(
    connection: asyncpg.Connection, id_: str, done: Callable[[str], Awaitable[None]]
) -> None:
    """Broken: looked up, handled, and only then noted."""
    await done("begun")
    if not await connection.fetchval("SELECT true FROM inbox WHERE message_id = $1", id_):
        await done("accepted")
        await connection.execute("INSERT INTO charge VALUES ($1)", id_)
        await done("charged")
        async with connection.transaction():
            await INBOX.accept(connection, record(id_))
    await done("committed")


async def _raises(connection: asyncpg.Connection, watcher: asyncpg.Connection) -> None:
    raise HandlerFailed


async def _loses_its_connection(connection: asyncpg.Connection, watcher: asyncpg.Connection) -> None:
    await watcher.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
    await eventually(connection.is_closed, "the client hears of it")


FAULTS = {"the handler raises": _raises, "the connection is lost": _loses_its_connection}


async def charges_after(database: Database, handler: Handler, fault: str, step: str) -> int:
    """How often a message is charged for that is broken off after a step, and then comes twice more."""
    watcher = await database.connect()
    id_ = uuid4().hex

    async def broken_off(done: str) -> None:
        if done == step:
            await FAULTS[fault](first, watcher)

    async def undisturbed(_: str) -> None:
        pass

    first = await database.connect()
    with contextlib.suppress(HandlerFailed, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        await handler(first, id_, broken_off)
    for _ in range(2):
        await handler(await database.connect(), id_, undisturbed)
    return (await charges_of(database)).get(id_, 0)


@pytest.fixture(params=[(fault, step) for fault in FAULTS for step in STEPS], ids="after it has {0[1]}: {0[0]}".format)
def broken_off(request: pytest.FixtureRequest) -> tuple[str, str]:
    fault, step = request.param
    return fault, step


async def test_a_message_is_charged_for_once_wherever_its_handling_is_broken_off(
    inbox_database: Database, broken_off: tuple[str, str]
) -> None:
    assert await charges_after(inbox_database, by_the_book, *broken_off) == 1


@pytest.mark.parametrize("handler", [id_before_the_handler, id_after_the_handler])
async def test_a_handler_that_is_not_atomic_is_caught(inbox_database: Database, handler: Handler) -> None:
    found = {
        (fault, step): await charges_after(inbox_database, handler, fault, step) for fault in FAULTS for step in STEPS
    }
    wrong = {"accepted": 0} if handler is id_before_the_handler else {"charged": 2}
    assert found == {(fault, step): wrong.get(step, 1) for fault in FAULTS for step in STEPS}


async def test_handlers_at_once_that_look_and_then_write_are_caught(inbox_database: Database) -> None:
    both_looked = asyncio.Barrier(2)

    async def done(step: str) -> None:
        if step == "accepted":
            await both_looked.wait()

    connections = [await inbox_database.connect() for _ in range(2)]
    async with asyncio.timeout(30):
        await asyncio.gather(*(id_after_the_handler(connection, "m1", done) for connection in connections))
    assert await charges_of(inbox_database) == {"m1": 2}
