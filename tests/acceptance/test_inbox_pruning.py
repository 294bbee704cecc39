"""What of the inbox is deleted and what stays, and that nobody waits for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest

from outbox_relay.errors import InTransactionError
from outbox_relay.inbox import postgres
from outbox_relay.inbox.postgres import PRUNE_ROWS, Inbox, Pruned
from tests.acceptance.inboxes import engine_of, prepare, waits_for_another
from tests.conftest import Database
from tests.consumed import record

HOUR = 3600.0
INBOX = Inbox("payments")

Target: TypeAlias = Callable[[str], AbstractAsyncContextManager[Any]]


@pytest.fixture
async def inbox_database(database: Database) -> Database:
    await prepare(database)
    return database


@pytest.fixture
async def connection(inbox_database: Database) -> asyncpg.Connection:
    return await inbox_database.connect()


@asynccontextmanager
async def on_engine(url: str) -> AsyncIterator[Any]:
    async with engine_of(url) as engine:
        yield engine


@asynccontextmanager
async def on_connection(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close(timeout=10)


@asynccontextmanager
async def on_pool(url: str) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        yield connection


async def handled(connection: asyncpg.Connection, rows: int, hours_ago: float, consumer: str = "payments") -> None:
    """Messages that were handled one after the other, the last of them so long ago."""
    await connection.execute(
        "INSERT INTO inbox SELECT $1, gen_random_uuid(), now() - make_interval(secs => $2 * 3600 + n / 1000.0)"
        " FROM generate_series(1, $3) AS n",
        consumer,
        hours_ago,
        rows,
    )


async def left(connection: asyncpg.Connection, consumer: str = "payments") -> int:
    return int(await connection.fetchval("SELECT count(*) FROM inbox WHERE consumer = $1", consumer))


@pytest.mark.parametrize("open_target", [on_engine, on_connection, on_pool])
async def test_what_was_handled_long_ago_is_deleted_of_this_consumer_alone(
    open_target: Target, inbox_database: Database, connection: asyncpg.Connection
) -> None:
    await handled(connection, 2_500, hours_ago=2)
    await handled(connection, 700, hours_ago=0.5)
    await handled(connection, 300, hours_ago=2, consumer="mails")
    async with open_target(inbox_database.url) as target:
        assert await INBOX.prune(target, keep_seconds=HOUR) == Pruned(2_500, is_all=True)
        assert await INBOX.prune(target, keep_seconds=HOUR) == Pruned(0, is_all=True)
    assert (await left(connection), await left(connection, "mails")) == (700, 300)


async def test_a_repeat_is_skipped_as_long_as_its_id_is_kept_and_new_after_that(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await INBOX.accept(connection, record("m1"))
    await connection.execute("UPDATE inbox SET handled_at = now() - interval '30 minutes'")
    for keep_seconds, expected in ((HOUR, False), (HOUR / 4, True)):
        await INBOX.prune(connection, keep_seconds=keep_seconds)
        async with connection.transaction():
            assert await INBOX.accept(connection, record("m1")) is expected


async def test_no_batch_is_begun_after_the_deadline(connection: asyncpg.Connection) -> None:
    await handled(connection, 2 * PRUNE_ROWS + 1, hours_ago=2)
    found = [await INBOX.prune(connection, keep_seconds=HOUR, deadline_seconds=0.0) for _ in range(3)]
    assert found == [Pruned(PRUNE_ROWS, is_all=False)] * 2 + [Pruned(1, is_all=True)]


async def test_rows_that_somebody_has_locked_are_passed_and_nobody_waits(
    inbox_database: Database, connection: asyncpg.Connection
) -> None:
    await handled(connection, 1_500, hours_ago=2)
    stranger = await inbox_database.connect()
    async with stranger.transaction():
        locked = await stranger.fetch("SELECT FROM inbox ORDER BY handled_at LIMIT 40 FOR KEY SHARE")
        assert len(locked) == 40
        async with asyncio.timeout(30):
            assert await INBOX.prune(connection, keep_seconds=HOUR) == Pruned(1_460, is_all=True)
    assert await INBOX.prune(connection, keep_seconds=HOUR) == Pruned(40, is_all=True)


async def test_several_at_once_delete_each_row_once(inbox_database: Database, connection: asyncpg.Connection) -> None:
    await handled(connection, 5_000, hours_ago=2)
    pruners = [await inbox_database.connect() for _ in range(4)]
    async with asyncio.timeout(60):
        found = await asyncio.gather(*(INBOX.prune(pruner, keep_seconds=HOUR) for pruner in pruners))
    assert sum(pruned.rows for pruned in found) == 5_000
    assert await left(connection) == 0


async def test_handling_goes_on_beside_pruning(inbox_database: Database, connection: asyncpg.Connection) -> None:
    """Open transactions neither hold pruning up nor lose what they are about to commit."""
    await handled(connection, 3_000, hours_ago=2)
    handler, repeater = [await inbox_database.connect() for _ in range(2)]
    async with handler.transaction():
        new = [record(uuid4().hex) for _ in range(100)]
        assert len(await INBOX.accept_batch(handler, new)) == 100
        async with asyncio.timeout(30):
            assert (await INBOX.prune(connection, keep_seconds=HOUR)).rows == 3_000
    async with repeater.transaction():
        assert await INBOX.accept_batch(repeater, new) == []


async def test_a_repeat_that_comes_while_its_id_is_pruned_has_one_effect(
    inbox_database: Database, connection: asyncpg.Connection
) -> None:
    """It comes too late, so it is new; but it is still one, though two sessions have it at once."""
    old = uuid4().hex
    await connection.execute("INSERT INTO inbox VALUES ('payments', $1, now() - interval '2 hours')", old)
    pruner, *handlers = [await inbox_database.connect() for _ in range(3)]

    async def handle(handler: asyncpg.Connection) -> bool:
        async with handler.transaction():
            return await INBOX.accept(handler, record(old))

    async with pruner.transaction():
        await pruner.execute("DELETE FROM inbox")
        repeats = []
        for handler in handlers:
            repeats.append(asyncio.create_task(handle(handler)))
            await waits_for_another(connection, handler.get_server_pid())
    async with asyncio.timeout(30):
        assert sorted(await asyncio.gather(*repeats)) == [False, True]


async def test_in_a_transaction_nothing_is_pruned(connection: asyncpg.Connection) -> None:
    await handled(connection, 10, hours_ago=2)
    async with connection.transaction():
        with pytest.raises(InTransactionError, match="each batch is to be one of its own"):
            await INBOX.prune(connection, keep_seconds=HOUR)
    assert await left(connection) == 10


@pytest.mark.parametrize("keep_seconds", [0.0, -1.0, float("nan")])
async def test_a_time_that_keeps_nothing_is_refused(connection: asyncpg.Connection, keep_seconds: float) -> None:
    with pytest.raises(ValueError, match="keep_seconds must be above 0"):
        await INBOX.prune(connection, keep_seconds=keep_seconds)


async def test_the_rights_that_inbox_sql_names_are_enough(connection: asyncpg.Connection) -> None:
    role = f"pruner_{uuid4().hex}"
    await handled(connection, 10, hours_ago=2)
    await connection.execute(
        f"CREATE ROLE {role}; GRANT SELECT, UPDATE (handled_at), DELETE ON inbox TO {role}; SET ROLE {role}"
    )
    try:
        assert await INBOX.prune(connection, keep_seconds=HOUR) == Pruned(10, is_all=True)
    finally:
        await connection.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


# -- plans


async def nodes_of(connection: asyncpg.Connection, statement: str, *arguments: Any) -> list[dict[str, Any]]:
    """The plan's nodes with what really happened in each; the statement is rolled back."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(postgres._PRUNE_SETTINGS)
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement.format(schema='')}"
        (found,) = json.loads(await connection.fetchval(explain, *arguments))
    finally:
        await transaction.rollback()

    def walk(node: dict[str, Any]) -> list[dict[str, Any]]:
        return [node, *(each for child in node.get("Plans", []) for each in walk(child))]

    return walk(found["Plan"])


@pytest.mark.parametrize("is_analyzed", [False, True])
async def test_a_batch_reads_only_what_it_deletes(connection: asyncpg.Connection, is_analyzed: bool) -> None:
    await connection.execute("ALTER TABLE inbox SET (autovacuum_enabled = off)")
    await handled(connection, 5_000, hours_ago=2)
    await handled(connection, 100_000, hours_ago=0.5)
    await handled(connection, 20_000, hours_ago=2, consumer="mails")
    if is_analyzed:
        await connection.execute("ANALYZE inbox")
    nodes = await nodes_of(connection, postgres._PRUNE, "payments", None, HOUR, PRUNE_ROWS)
    (scan,) = [node for node in nodes if node.get("Index Name")]
    assert (scan["Index Name"], scan["Actual Rows"]) == ("inbox_handled", PRUNE_ROWS)
    assert "Seq Scan" not in {node["Node Type"] for node in nodes}


async def test_what_a_batch_deleted_is_not_stepped_over_by_the_next(connection: asyncpg.Connection) -> None:
    await connection.execute("ALTER TABLE inbox SET (autovacuum_enabled = off)")
    await handled(connection, 50_000, hours_ago=2)
    arguments: list[tuple[Any, ...]] = []
    with connection.query_logger(lambda query: arguments.append(query.args or ())):
        assert (await INBOX.prune(connection, keep_seconds=HOUR)).rows == 50_000
    after = [each[1] for each in arguments if len(each) == 4]
    assert len(after) == 51
    assert after[0] is None
    assert after[1:] == sorted(set(after[1:]))
