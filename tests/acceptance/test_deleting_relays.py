"""Relays that delete what they have sent: the same guarantees, held against a ledger that the writers keep.

Nothing is left in the table to compare with, so a trigger writes each row once more, in its writer's own transaction.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url

from outbox_relay.message import Delivered
from outbox_relay.servers import Kafka, Postgres
from outbox_relay.source import deletions
from tests.acceptance.parked import dead, states
from tests.acceptance.relays import (
    Application,
    busy,
    compare,
    drained,
    ids_in,
    in_flight,
    new_topic,
    relay_process,
    repeated,
    shared_out,
)
from tests.acceptance.test_kills import Killer, keep_writing
from tests.conftest import Database
from tests.contract.sources import PostgresWorld
from tests.fakes import record
from tests.roles import roles_sql
from tests.waiting import eventually

KILLS = 6

#: In a schema of its own, where it is called as the table is.
KEEP = """
CREATE SCHEMA kept;
CREATE TABLE kept.outbox (LIKE outbox);
CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO kept.outbox SELECT NEW.*;
    RETURN NULL;
END $$;
CREATE TRIGGER keep AFTER INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION keep();
"""

#: A row that goes before that was said can't be deleted.
SAID_BEFORE = """
CREATE FUNCTION said_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT coalesce(pruned_until, '-infinity') FROM outbox_layout) < now() THEN
        RAISE EXCEPTION 'nobody has said that rows go';
    END IF;
    RETURN OLD;
END $$;
CREATE TRIGGER said_before BEFORE DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION said_before();
"""


@pytest.fixture
async def connection(outbox_database: Database) -> asyncpg.Connection:
    connection = await outbox_database.connect()
    await connection.execute(KEEP + SAID_BEFORE)
    return connection


@pytest.fixture
async def kept(connection: asyncpg.Connection, outbox_database: Database) -> asyncpg.Connection:
    """Finds the ledger where others find the table."""
    kept = await outbox_database.connect()
    await kept.execute("SET search_path = kept")
    return kept


async def left(connection: asyncpg.Connection) -> set[int]:
    return {row["id"] for row in await connection.fetch("SELECT id FROM outbox")}


async def test_two_relays_that_are_killed_lose_nothing_and_repeat_what_was_in_flight_alone(
    outbox_database: Database, connection: asyncpg.Connection, kept: asyncpg.Connection, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    killer = Killer(await outbox_database.connect())
    with ExitStack() as stack:
        relays = [
            stack.enter_context(
                relay_process(
                    outbox_database.url, kafka.bootstrap_servers, start=False, batch_rows=100, after_publish="delete"
                )
            )
            for _ in range(2)
        ]
        for relay in relays:
            killer.starts(relay)
        done = asyncio.Event()
        writing = asyncio.create_task(keep_writing(application, done))
        for number in range(KILLS):
            victim = relays[number % 2]
            await killer.until_it_works(victim)
            kill = killer.kill_before_the_mark if number % 4 < 2 else killer.kill_in_the_middle
            await kill(victim)
            killer.starts(victim)
        done.set()
        await writing
        await drained(connection)
        for relay in relays:
            await killer.until_it_listens(relay)
        assert [await relay.stop() for relay in relays] == [0, 0]
        for relay in relays:
            assert not relay.events("row.unmarkable")
    assert await left(connection) == set()
    report = await compare(kept, kafka, topic)
    assert report.sound, report.describe()
    assert report.committed == application.committed_rows > 1_000
    assert application.rolled_back_rows > 1_000
    assert killer.between_publish_and_mark > 0
    assert report.duplicates > 0
    ids = {str(row["event_id"]): row["id"] for row in await kept.fetch("SELECT event_id, id FROM outbox")}
    repeats = {ids[event_id]: extra for event_id, extra in report.duplicate_ids.items()}
    assert not {id_: extra for id_, extra in repeats.items() if extra > killer.in_flight[id_]}


async def test_of_two_relays_with_different_settings_each_does_as_it_is_told(
    outbox_database: Database, connection: asyncpg.Connection, kept: asyncpg.Connection, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    with (
        relay_process(outbox_database.url, kafka.bootstrap_servers, after_publish="mark") as marks,
        relay_process(outbox_database.url, kafka.bootstrap_servers, after_publish="delete") as deletes,
    ):
        await shared_out([marks, deletes])
        await application.write(2_000)
        await drained(connection)
        assert [await relay.stop() for relay in (marks, deletes)] == [0, 0]
        assert in_flight(marks) == in_flight(deletes) == set()
        assert len(deletes.ids("claim.settled")) > 100
        assert await left(connection) == set(marks.ids("claim.settled"))
    report = await compare(kept, kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


async def test_a_takeover_repeats_nothing_that_was_deleted(
    outbox_database: Database, connection: asyncpg.Connection, kept: asyncpg.Connection, kafka: Kafka
) -> None:
    """The first marks, and is taken over by one that deletes."""
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(
                relay_process(outbox_database.url, kafka.bootstrap_servers, batch_rows=100, after_publish=how)
            )
            for how in ("mark", "delete")
        )
        await shared_out([first, second])
        async with busy(application):
            await eventually(lambda: first.ids("claim.settled"), "the first is busy")
            first.kill()
            claimed = in_flight(first)
            await eventually(lambda: len(second.events("slots.taken")) > 1, "the second takes over")
        await drained(connection)
        assert await second.stop() == 0
    report = await compare(kept, kafka, topic)
    assert report.sound, report.describe()
    assert await repeated(kept, report) <= claimed


async def test_it_is_said_before_rows_go_and_again_before_that_is_over(
    outbox_database: Database, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletions, "_AHEAD_SECONDS", 1.0)
    monkeypatch.setattr(deletions, "_LEFT_SECONDS", 0.8)
    world = await PostgresWorld.open(outbox_database, postgres.url, deletes_sent=True)
    connection = await outbox_database.connect()
    await connection.execute(SAID_BEFORE)
    sources = [await world.source(batch_rows=5) for _ in range(2)]
    said: set[object] = set()
    rows = 0

    async def said_again() -> bool:
        nonlocal rows
        rows += 10
        await world.insert(*(record(id_, f"k{id_}") for id_ in range(rows, rows + 10)))
        for source in sources:
            claim = await source.claim()
            source.settle([Delivered(each) for each in claim.records])
        said.add(await connection.fetchval("SELECT pruned_until FROM outbox_layout"))
        return len(said) > 4

    await eventually(said_again, "it was said several times")

    async def all_deleted() -> bool:
        for source in sources:
            claim = await source.claim()
            source.settle([Delivered(each) for each in claim.records])
        return await left(connection) == set()

    await eventually(all_deleted, "all is deleted")
    await world.close()


async def test_a_role_that_may_not_delete_publishes_nothing_and_says_why(
    outbox_database: Database, connection: asyncpg.Connection, kept: asyncpg.Connection, kafka: Kafka
) -> None:
    suffix = uuid4().hex[:12]
    await connection.execute(roles_sql(suffix))
    await connection.execute(f"CREATE ROLE relay_{suffix} LOGIN IN ROLE outbox_relay_{suffix}")
    topic = await new_topic(kafka, 1)
    await connection.execute(
        "INSERT INTO outbox (topic, key, payload) SELECT $1, 'k', 'x' FROM generate_series(1, 50)", topic
    )
    url = make_url(outbox_database.url).set(username=f"relay_{suffix}").render_as_string()
    with relay_process(url, kafka.bootstrap_servers, after_publish="delete") as relay:
        told = await relay.event("database.unavailable")
        assert 'relay.after_publish is "delete"' in told["reason"]
        assert "grant it outbox_pruner" in told["reason"]
        assert relay.events("claim.made") == []
        await connection.execute(f"GRANT outbox_pruner_{suffix} TO relay_{suffix}")
        await drained(connection)
        await relay.event("database.available")
        assert await relay.stop() == 0
    assert await left(connection) == set()
    assert await ids_in(kafka, topic) == list(range(1, 51))


async def test_retention_goes_on_with_what_was_discarded_or_marked_before(
    outbox_database: Database, connection: asyncpg.Connection, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 1)
    discarded, waits = [await dead(connection, topic, key) for key in ("a", "b")]
    await connection.execute("UPDATE outbox SET parked_at = now() - interval '2 hours' WHERE id = $1", discarded)
    await connection.execute(
        "UPDATE outbox_parked SET state = 'discarded', parked_at = now() - interval '2 hours' WHERE id = $1", discarded
    )
    insert = "INSERT INTO outbox (topic, key, payload, sent_at) VALUES ($1, 'c', 'x', $2)"
    long_ago = await connection.fetchval("SELECT now() - interval '2 hours'")
    await connection.execute(insert, topic, long_ago)
    await connection.execute(insert, topic, None)
    with relay_process(
        outbox_database.url, kafka.bootstrap_servers, after_publish="delete", retention_hours=1
    ) as relay:
        assert (await relay.event("rows.pruned"))["rows"] == 2
        await drained_but(connection, {waits})
        assert await relay.stop() == 0
    assert await states(connection) == {waits: "dead"}
    # What retention says never takes back what was said of the rows that are deleted at once.
    assert await connection.fetchval("SELECT pruned_until > now() - interval '30 minutes' FROM outbox_layout")


async def drained_but(connection: asyncpg.Connection, ids: set[int]) -> None:
    async def only_these() -> bool:
        return await left(connection) == ids

    await eventually(only_these, f"only {ids} are left")
