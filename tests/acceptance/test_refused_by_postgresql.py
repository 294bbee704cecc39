"""Rows that PostgreSQL doesn't let be marked, parked or read: their neighbours flow, and only they cost attempts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from typing import Any

import asyncpg
import pytest
import structlog

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.failures import Policies, Policy
from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.retry import Backoff
from outbox_relay.servers import Postgres
from outbox_relay.source import polling
from outbox_relay.source.polling import PollingSource
from tests.acceptance.parked import broken_rules, states
from tests.conftest import Database
from tests.contract.sources import PostgresWorld
from tests.fakes import record
from tests.waiting import eventually

QUICK = Backoff(0.01, 0.01)
THREE = Policies(QUICK, Policy(max_attempts=3))

Wrong = Callable[[Record], Retry | None]
Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def deletes_sent() -> bool:
    return False


@pytest.fixture
async def world(database: Database, postgres: Postgres, deletes_sent: bool) -> AsyncIterator[PostgresWorld]:
    world = await PostgresWorld.open(database, postgres.url, deletes_sent=deletes_sent)
    yield world
    await world.close()


@pytest.fixture
async def connection(world: PostgresWorld, database: Database) -> asyncpg.Connection:
    return await database.connect()


@pytest.fixture
def logs() -> Iterator[Logs]:
    with structlog.testing.capture_logs() as logs:
        yield logs


def said(logs: Logs, event: str) -> list[int]:
    return [line["id"] for line in logs if line["event"] == event]


def too_large(*ids: int) -> Wrong:
    return lambda each: Retry(each, Scope.ROW, "MessageSizeTooLargeError", "") if each.id in ids else None


async def step(source: PollingSource, wrong: Wrong = lambda _: None) -> list[int]:
    """One claim, handed back; the ids that were delivered."""
    claim = await source.claim()
    failed: set[bytes | None] = set()
    outcomes: list[Outcome] = []
    for each in claim.records:
        retry = wrong(each)
        if each.key in failed:
            outcomes.append(Released(each))
        else:
            outcomes.append(retry or Delivered(each))
            failed.update([each.key] if retry and each.key is not None else ())
    source.settle(outcomes)
    return [outcome.record.id for outcome in outcomes if isinstance(outcome, Delivered)]


async def until(
    source: PollingSource, condition: Callable[[list[int]], Any], what: str, wrong: Wrong = lambda _: None
) -> list[int]:
    """Claim until the condition holds of all that was delivered; it. Each row once, or it fails."""
    delivered: list[int] = []

    async def reached() -> bool:
        delivered.extend(await step(source, wrong))
        assert len(delivered) == len(set(delivered)), "sent twice"
        value = condition(delivered)
        return bool(await value if hasattr(value, "__await__") else value)

    await eventually(reached, what)
    return delivered


async def trigger(connection: asyncpg.Connection, condition: str, *, deferred: bool = False) -> None:
    """UPDATE raises where the condition holds, or the COMMIT after it, with a message that quotes the row."""
    await connection.execute(
        f"""
        CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF {condition} THEN RAISE EXCEPTION 'not with me: %', NEW.payload; END IF;
            RETURN NEW;
        END $$
        """
    )
    kind = "CONSTRAINT TRIGGER refuse AFTER" if deferred else "TRIGGER refuse BEFORE"
    when = "DEFERRABLE INITIALLY DEFERRED" if deferred else ""
    await connection.execute(f"CREATE {kind} UPDATE ON outbox {when} FOR EACH ROW EXECUTE FUNCTION refuse()")


async def no_trigger(connection: asyncpg.Connection) -> None:
    await connection.execute("DROP TRIGGER refuse ON outbox")


# -- marking


@pytest.mark.parametrize("how", ["trigger", "deferred trigger", "constraint"])
async def test_a_row_that_cannot_be_marked_is_not_sent_again_and_holds_nobody(
    how: str, world: PostgresWorld, connection: asyncpg.Connection, logs: Logs
) -> None:
    if "trigger" in how:
        await trigger(connection, "NEW.sent_at IS NOT NULL AND NEW.id = 7", deferred=how != "trigger")
    else:
        await connection.execute("ALTER TABLE outbox ADD CONSTRAINT refuse CHECK (sent_at IS NULL OR id <> 7)")
    await world.insert(*(record(id_, f"k{id_ % 3}") for id_ in range(1, 21)))
    source = await world.source()

    async def all_but_one(_: list[int]) -> bool:
        return await world.sent() == {*range(1, 21)} - {7}

    assert await until(source, all_but_one, "its neighbours are marked") == list(range(1, 21))
    await world.insert(*(record(id_, f"k{id_ % 3}") for id_ in range(21, 31)))

    async def those_after_it(_: list[int]) -> bool:
        return await world.sent() == {*range(1, 31)} - {7}

    assert await until(source, those_after_it, "later ones flow") == list(range(21, 31))
    assert said(logs, "row.unmarkable") == [7]
    assert "not with me" not in str(logs)
    await connection.execute(
        "DROP TRIGGER refuse ON outbox" if "trigger" in how else "ALTER TABLE outbox DROP CONSTRAINT refuse"
    )

    async def all_marked(_: list[int]) -> bool:
        return await world.sent() == {*range(1, 31)}

    assert await until(source, all_marked, "it is marked when it can be") == []
    assert await states(connection) == {}


async def test_a_row_that_cannot_be_marked_is_sent_once_more_by_the_next_relay_which_need_not_wait(
    world: PostgresWorld, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "_LAST_SETTLE_SECONDS", 3_600.0)
    await trigger(connection, "NEW.sent_at IS NOT NULL AND NEW.id = 2")
    await world.insert(*(record(id_, "k") for id_ in range(1, 4)))
    first = await world.source()
    await until(first, lambda sent: sent == [1, 2, 3], "sent")
    async with asyncio.timeout(20):
        await first.release()
    assert await world.sent() == {1, 3}
    second = await world.source()
    assert await until(second, lambda sent: sent, "the next relay has it") == [2]


async def test_where_nothing_can_be_marked_what_is_sent_meanwhile_is_bounded(
    world: PostgresWorld, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "_MOST_UNMARKABLE", 15)
    await trigger(connection, "NEW.sent_at IS NOT NULL")
    await world.insert(*(record(id_, f"k{id_}") for id_ in range(1, 101)))
    source = await world.source(batch_rows=10)
    delivered = await until(source, lambda sent: len(sent) >= 15, "as many are sent as may be")
    for _ in range(20):
        delivered += await step(source)
    assert len(delivered) <= 15 + 2 * 10
    await no_trigger(connection)

    async def all_marked(_: list[int]) -> bool:
        return len(await world.sent()) == 100

    delivered += await until(source, all_marked, "all is marked")
    assert sorted(delivered) == list(range(1, 101))


@pytest.mark.parametrize("deletes_sent", [True])
async def test_a_row_that_cannot_be_deleted_is_not_sent_again_and_holds_nobody(
    world: PostgresWorld, connection: asyncpg.Connection, logs: Logs
) -> None:
    """An application's table refers to it."""
    await connection.execute("CREATE TABLE note (outbox_id bigint CONSTRAINT note_of_message REFERENCES outbox)")
    await world.insert(*(record(id_, f"k{id_ % 3}") for id_ in range(1, 21)))
    await connection.execute("INSERT INTO note VALUES (7)")
    source = await world.source()

    async def all_but_one(_: list[int]) -> bool:
        return await world.sent() == {*range(1, 21)} - {7}

    assert await until(source, all_but_one, "its neighbours are deleted") == list(range(1, 21))
    await world.insert(*(record(id_, f"k{id_ % 3}") for id_ in range(21, 31)))

    async def those_after_it(_: list[int]) -> bool:
        return await world.sent() == {*range(1, 31)} - {7}

    assert await until(source, those_after_it, "later ones flow") == list(range(21, 31))
    (line,) = [line for line in logs if line["event"] == "row.unmarkable"]
    assert (line["id"], line["error"]) == (7, "ForeignKeyViolationError")
    assert "doesn't let it be deleted (SQLSTATE 23503, constraint note_of_message)" in line["reason"]
    await connection.execute("DELETE FROM note")

    async def all_deleted(_: list[int]) -> bool:
        return await world.sent() == {*range(1, 31)}

    assert await until(source, all_deleted, "it is deleted when it can be") == []


# -- reading


async def unreadable(connection: asyncpg.Connection, *ids: int) -> None:
    """Their times are no times, in a column that an adopted table may have."""
    await connection.execute("ALTER TABLE outbox ALTER created_at DROP DEFAULT, ALTER created_at TYPE text")
    await connection.execute("UPDATE outbox SET created_at = 's3cret' WHERE id = ANY ($1)", list(ids))


async def test_a_row_that_cannot_be_read_is_parked_with_its_attempts_and_only_its_key_waits(
    world: PostgresWorld, connection: asyncpg.Connection, logs: Logs
) -> None:
    await world.insert(*(record(id_, f"k{id_ % 3}") for id_ in range(1, 21)), record(100, None), record(101, None))
    await unreadable(connection, 7, 100)
    source = await world.source(policies=THREE)
    expected = {7: "dead", 100: "dead"} | dict.fromkeys((10, 13, 16, 19), "blocked")

    async def dead(_: list[int]) -> bool:
        assert await broken_rules(connection) == {}
        return await states(connection) == expected

    delivered = await until(source, dead, "dead in the end")
    assert delivered == [id_ for id_ in [*range(1, 21), 101] if id_ not in expected]
    row = await connection.fetchrow("SELECT attempts, error, reason FROM outbox_parked WHERE id = 7")
    assert tuple(row) == (
        3,
        "InvalidDatetimeFormatError",
        "it can't be read from the table (SQLSTATE 22007): correct the row",
    )
    assert "s3cret" not in str(logs)
    await connection.execute("UPDATE outbox SET created_at = now()::text WHERE id = ANY ($1)", [7, 100])
    await connection.execute("UPDATE outbox_parked SET state = 'retry', due_at = now() WHERE state = 'dead'")

    async def sent(_: list[int]) -> bool:
        return not await states(connection)

    delivered = await until(source, sent, "corrected, all go")
    assert [id_ for id_ in delivered if id_ < 100] == [7, 10, 13, 16, 19]
    assert 100 in delivered


async def test_followers_of_a_row_that_cannot_be_read_may_skip_it(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"), record(3, "b"))
    await unreadable(connection, 1)
    source = await world.source(policies=Policies(QUICK, Policy(max_attempts=2, block=False)))

    async def dead(_: list[int]) -> bool:
        return await states(connection) == {1: "dead"}

    assert await until(source, dead, "dead in the end") == [2, 3]


async def test_text_that_is_no_text_is_its_rows_fault_alone(database: Database, postgres: Postgres) -> None:
    """In a database without an encoding, where anything is stored."""
    admin = await database.connect()
    name = f"{await admin.fetchval('SELECT current_database()')}_ascii"
    await admin.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'")
    ascii_database = Database(postgres.url.rpartition("/")[0] + f"/{name}")
    try:
        world = await PostgresWorld.open(ascii_database, postgres.url)
        connection = await ascii_database.connect()
        await world.insert(*(record(id_, f"k{id_}") for id_ in range(1, 11)))
        await connection.execute("UPDATE outbox SET type = convert_from('\\xff', 'SQL_ASCII') WHERE id = 4")
        await connection.execute("UPDATE outbox SET key = convert_from('\\xff', 'SQL_ASCII') WHERE id = 6")
        source = await world.source(policies=THREE)

        async def dead(_: list[int]) -> bool:
            return await states(connection) == {4: "dead"}

        with structlog.testing.capture_logs() as logs:
            delivered = await until(source, dead, "what can be read flows")
        assert delivered == [1, 2, 3, 5, 7, 8, 9, 10]
        assert said(logs, "row.stuck") == [6]
        await world.close()
    finally:
        await ascii_database.close()
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.mark.parametrize(
    "headers", ['{"a": "\\ud800"}', "no json", "[" * 100_000], ids=["half a character", "no JSON", "too deep"]
)
async def test_headers_that_are_no_json_are_their_rows_fault_alone(
    headers: str, world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    for constraint in ("outbox_headers_are_flat_strings", "outbox_headers_are_not_reserved"):
        await connection.execute(f"ALTER TABLE outbox DROP CONSTRAINT {constraint}")
    await connection.execute("ALTER TABLE outbox ALTER headers TYPE text")
    await world.insert(*(record(id_, f"k{id_ % 2}") for id_ in range(1, 7)))
    await connection.execute("UPDATE outbox SET headers = CASE id WHEN 3 THEN $1 ELSE '{}' END", headers)
    source = await world.source(policies=THREE)

    async def dead(_: list[int]) -> bool:
        return await states(connection) == {3: "dead", 5: "blocked"}

    assert await until(source, dead, "dead in the end") == [1, 2, 4, 6]


async def test_where_no_row_can_be_read_none_is_blamed(world: PostgresWorld, connection: asyncpg.Connection) -> None:
    await world.insert(*(record(id_, f"k{id_}") for id_ in range(1, 31)))
    await unreadable(connection, *range(1, 31))
    source = await world.source(policies=THREE)
    refused: list[str] = []

    async def often() -> bool:
        try:
            await source.claim()
        except SourceUnavailableError as error:
            refused.append(str(error))
        return len(refused) >= 5

    await eventually(often, "the database is of no use")
    assert set(refused) == {"read: none of the rows can be read (SQLSTATE 22007)"}
    assert await states(connection) == {}


# -- parking


async def test_rows_that_can_neither_be_sent_nor_parked_wait_in_memory_and_hold_their_key_alone(
    world: PostgresWorld, connection: asyncpg.Connection, logs: Logs
) -> None:
    await world.insert(*(record(id_, f"k{id_ % 4}") for id_ in range(1, 21)))
    await unreadable(connection, 3)
    await trigger(connection, "NEW.id IN (2, 3)")
    source = await world.source(policies=THREE)
    wrong = too_large(2)

    async def others(_: list[int]) -> bool:
        return await world.sent() == {id_ for id_ in range(1, 21) if id_ % 4 in (0, 1)}

    await until(source, others, "other keys flow", wrong)
    for _ in range(10):
        await step(source, wrong)
    assert sorted(said(logs, "row.stuck")) == [2, 3]
    assert await states(connection) == {}
    await no_trigger(connection)
    await connection.execute("UPDATE outbox SET created_at = now()::text")
    delivered = await until(source, lambda sent: len(sent) == 10, "all go when they can be changed")
    for key in (2, 3):
        of_key = [id_ for id_ in delivered if id_ % 4 == key]
        assert of_key == sorted(of_key)


async def test_a_row_that_cannot_be_parked_for_its_topics_sake_does_not_keep_others_from_it(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    source = await world.source(policies=THREE)
    await connection.execute("INSERT INTO outbox_pause (topic, reason) VALUES ('t', 'a bad deployment')")
    await world.paused({"t"})
    await trigger(connection, "NEW.id = 3")
    await world.insert(*(record(id_, f"k{id_ % 2}") for id_ in range(1, 7)), record(10, "k1", topic="other"))

    async def parked(_: list[int]) -> bool:
        return await states(connection) == dict.fromkeys((1, 2, 4, 5, 6), "topic")

    assert await until(source, parked, "those that can be are parked") == [10]
    await no_trigger(connection)
    await connection.execute("DELETE FROM outbox_pause")
    await world.paused(set())
    delivered = await until(source, lambda sent: len(sent) == 6, "all go")
    assert [id_ for id_ in delivered if id_ % 2] == [1, 3, 5]
    assert [id_ for id_ in delivered if not id_ % 2] == [2, 4, 6]


async def test_a_parked_row_that_cannot_be_put_back_does_not_keep_others_from_it(
    world: PostgresWorld, connection: asyncpg.Connection, logs: Logs
) -> None:
    await world.insert(*(record(id_, f"k{id_}") for id_ in range(1, 5)))
    source = await world.source(policies=Policies(Backoff(0.2, 0.2)))

    async def waiting(_: list[int]) -> bool:
        return await states(connection) == {1: "retry", 2: "retry"}

    assert await until(source, waiting, "two wait", too_large(1, 2)) == [3, 4]
    await trigger(connection, "NEW.parked_at IS NULL AND NEW.id = 1")

    async def put_back(_: list[int]) -> bool:
        return await states(connection) == {1: "retry"}

    assert await until(source, put_back, "the other is sent") == [2]
    assert said(logs, "row.stuck") == [1]
    await no_trigger(connection)
    assert await until(source, lambda sent: sent, "then it is too") == [1]


async def test_a_refusal_that_is_no_rows_stops_all_and_quotes_no_row(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"))
    source = await world.source(policies=THREE)

    async def waiting(_: list[int]) -> bool:
        return bool(await states(connection))

    await until(source, waiting, "it waits", too_large(1))
    await connection.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'not with me: %', OLD.key; END $$;
        CREATE TRIGGER refuse BEFORE DELETE ON outbox_parked FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    refused: list[str] = []

    async def often() -> bool:
        try:
            await step(source)
        except SourceUnavailableError as error:
            refused.append(str(error))
        return len(refused) >= 3

    await eventually(often, "what was sent can't be done with waiting")
    assert set(refused) == {"done: SQLSTATE P0001"}
    await connection.execute("DROP TRIGGER refuse ON outbox_parked")

    async def sent(_: list[int]) -> bool:
        return await world.sent() == {1}

    await until(source, sent, "all goes on")
