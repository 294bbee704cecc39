"""Retention on real servers: what is deleted and what stays, and that nobody is kept waiting for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url

from outbox_relay import schema
from outbox_relay.adoption import adoption_sql
from outbox_relay.servers import Kafka, PostgresServer
from outbox_relay.source.pruning import Pruner
from outbox_relay.source.session import Database, Session
from outbox_relay.source.statements import OUTBOX, OutboxTable
from outbox_relay.telemetry import Telemetry
from tests.acceptance.relays import RelayProcess, compare, drained, new_topic, relay_process, shared_out
from tests.conftest import POSTGRES_SETTINGS
from tests.roles import roles_sql
from tests.waiting import eventually

MILLION = 1_000_000
#: Seconds.
LOCK_WAIT = 0.1
#: Seconds. A batch takes some milliseconds, and a million rows at once some seconds, on any machine.
TRANSACTION = 1.0

#: Thousands of ids a claim aren't looked at here.
QUIET = {"level": "info"}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """One in which autovacuum comes round each second instead of each minute, as everything here is quicker."""
    with PostgresServer.start({**POSTGRES_SETTINGS, "autovacuum_naptime": "1s"}) as server:
        yield server


@pytest.fixture
async def url(server: PostgresServer) -> AsyncIterator[str]:
    name = f"test_{uuid4().hex}"
    yield await asyncio.to_thread(server.create_database, name)
    admin = await asyncpg.connect(server.url())
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
async def connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    await schema.apply(connection)
    yield connection
    with contextlib.suppress(OSError, asyncpg.PostgresError):
        await connection.close(timeout=10)


class CountingSession(Session):
    """The product's, which counts the rows that are looked at, and the time in transactions."""

    looked_at = 0
    busy_seconds = 0.0

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        began = time.monotonic()
        async with super().transaction():
            yield
        self.busy_seconds += time.monotonic() - began

    async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        rows = await super().fetch(statement, *arguments)
        if rows and "looked_at" in rows[0].keys():  # noqa: SIM118 (of a record, `in` looks at the values)
            self.looked_at += rows[0]["looked_at"]
        return rows


def session_of(url: str) -> CountingSession:
    return CountingSession(Database(url, 10.0, 30.0), "retention")


def pruner_of(session: Session, *, retention_hours: float = 1.0, table: OutboxTable = OUTBOX) -> Pruner:
    return Pruner(session, Telemetry(), lambda: True, retention_hours=retention_hours, table=table)


def insert(rows: int, *, sent_hours_ago: float | None = 2.0) -> str:
    sent_at = "NULL" if sent_hours_ago is None else f"now() - interval '{sent_hours_ago} hours'"
    return (
        "INSERT INTO outbox (topic, key, payload, sent_at)"
        f" SELECT 'old', 'k' || n % 500, '{{}}', {sent_at} FROM generate_series(1, {rows}) AS n"
    )


async def rows_of(connection: asyncpg.Connection, where: str = "true") -> int:
    return int(await connection.fetchval(f"SELECT count(*) FROM outbox WHERE {where}"))


# -- what is deleted, and what stays


async def test_only_what_was_sent_or_discarded_long_ago_is_deleted(url: str, connection: asyncpg.Connection) -> None:
    ids = {}
    for name, sent, parked, state, decided in (
        ("sent long ago", "2 hours", None, None, None),
        ("sent lately", "30 minutes", None, None, None),
        ("unsent", None, None, None, None),
        ("discarded long ago", None, "3 hours", "discarded", "2 hours"),
        ("discarded lately", None, "3 hours", "discarded", "30 minutes"),
        *((state, None, "3 hours", state, "3 hours") for state in ("dead", "retry", "blocked", "topic")),
        ("trying", None, None, "trying", "3 hours"),
        ("sent long ago, behind all these", "2 hours", None, None, None),
    ):
        row = await connection.fetchrow(
            """
            INSERT INTO outbox (topic, key, payload, created_at, sent_at, parked_at)
            VALUES ('t', $1, '', now() - interval '4 hours', now() - $2::text::interval, now() - $3::text::interval)
            RETURNING id, bucket
            """,
            name,
            sent,
            parked,
        )
        ids[name] = row["id"]
        if state is not None:
            await connection.execute(
                """
                INSERT INTO outbox_parked (id, bucket, topic, key, state, parked_at)
                VALUES ($1, $2, 't', $3, $4, now() - $5::text::interval)
                """,
                row["id"],
                row["bucket"],
                name,
                state,
                decided,
            )
    await pruner_of(session_of(url)).sweep()
    kept = [row["key"] for row in await connection.fetch("SELECT key FROM outbox ORDER BY id")]
    waiting = [row["key"] for row in await connection.fetch("SELECT key FROM outbox_parked ORDER BY id")]
    assert waiting == ["discarded lately", "dead", "retry", "blocked", "topic", "trying"]
    assert kept == ["sent lately", "unsent", *waiting]


async def test_it_is_written_down_until_when_rows_were_deleted(url: str, connection: asyncpg.Connection) -> None:
    async def pruned_hours() -> float | None:
        """How long before now."""
        seconds = "SELECT extract(epoch FROM clock_timestamp() - pruned_until)::float / 3600 FROM outbox_layout"
        return await connection.fetchval(seconds)  # type: ignore[no-any-return]

    await connection.execute(insert(10, sent_hours_ago=2))
    await pruner_of(session_of(url), retention_hours=3).sweep()
    assert (await rows_of(connection), await pruned_hours()) == (10, None)
    await pruner_of(session_of(url), retention_hours=1).sweep()
    hours = await pruned_hours()
    assert await rows_of(connection) == 0
    assert hours is not None
    assert 1 <= hours < 1.1
    # Kept for longer from now on: what was deleted before stays written down.
    await connection.execute(insert(10, sent_hours_ago=10))
    await pruner_of(session_of(url), retention_hours=9).sweep()
    hours = await pruned_hours()
    assert await rows_of(connection) == 0
    assert hours is not None
    assert 1 <= hours < 1.1


async def test_rows_of_a_mapped_table_are_deleted(url: str, connection: asyncpg.Connection) -> None:
    table = OutboxTable(
        "Outbox Events", id="Seq", event_id="id", key="k", headers="", created_at="", sent_at="Sent", parked_at="Waits"
    )
    await connection.execute('CREATE SCHEMA s; SET search_path = s; CREATE TABLE "Outbox Events" (id uuid, k text)')
    await connection.execute(adoption_sql(table, None))
    await connection.execute(
        """
        INSERT INTO "Outbox Events" (id, k, "Sent", "Waits")
        SELECT gen_random_uuid(), n, CASE WHEN n < 3 THEN now() - n * interval '40 minutes' END,
               CASE WHEN n = 3 THEN now() - interval '1 day' END
        FROM generate_series(0, 3) AS n;
        INSERT INTO outbox_parked (id, bucket, topic, state, parked_at)
        SELECT "Seq", bucket, k, 'discarded', now() - interval '2 hours' FROM "Outbox Events" WHERE k = '3'
        """
    )
    await pruner_of(Session(Database(url, 10.0, 30.0, schema="s"), "retention"), table=table).sweep()
    assert [row["k"] for row in await connection.fetch('SELECT k FROM "Outbox Events" ORDER BY "Seq"')] == ["0", "1"]
    assert await connection.fetchval("SELECT count(*) FROM outbox_parked") == 0


# -- how it walks


async def test_rows_that_stay_in_front_are_not_read_again_each_time(url: str, connection: asyncpg.Connection) -> None:
    await connection.execute(insert(20_000, sent_hours_ago=None))
    await connection.execute(insert(3_000))
    await connection.execute(insert(3_000, sent_hours_ago=0))
    session = session_of(url)
    pruner = pruner_of(session)
    await pruner.sweep()
    assert await rows_of(connection) == 23_000
    assert session.looked_at > 23_000
    session.looked_at = 0
    await pruner.sweep()
    assert session.looked_at <= 5_000
    # Those at the border grow old, and are found at once.
    await connection.execute("UPDATE outbox SET sent_at = sent_at - interval '2 hours' WHERE sent_at IS NOT NULL")
    await pruner.sweep()
    assert await rows_of(connection) == 20_000


async def test_what_was_passed_is_deleted_when_the_walk_starts_again(url: str, connection: asyncpg.Connection) -> None:
    await connection.execute(insert(2_000))
    stranger = await asyncpg.connect(url)
    await stranger.execute("BEGIN; SELECT FROM outbox WHERE id IN (7, 1500) FOR UPDATE")
    pruner = pruner_of(session_of(url), retention_hours=0.0003)
    async with asyncio.timeout(20):
        await pruner.sweep()
    assert [row["id"] for row in await connection.fetch("SELECT id FROM outbox ORDER BY id")] == [7, 1500]
    await stranger.execute("ROLLBACK")
    await stranger.close()

    async def deleted() -> bool:
        await pruner.sweep()
        return await rows_of(connection) == 0

    await eventually(deleted, "the rows that were locked are deleted")


async def test_it_rests_for_longer_than_it_works(url: str, connection: asyncpg.Connection) -> None:
    await connection.execute(insert(20_000))
    session = session_of(url)
    began = time.monotonic()
    await pruner_of(session).sweep()
    assert session.busy_seconds < (time.monotonic() - began) / 2


async def test_two_at_once_do_no_harm(url: str, connection: asyncpg.Connection) -> None:
    await connection.execute(insert(20_000))
    async with asyncio.timeout(60):
        await asyncio.gather(*(pruner_of(session_of(url)).sweep() for _ in range(2)))
    assert await rows_of(connection) == 0


# -- in a relay


def failures(relay: RelayProcess) -> int:
    return len(relay.events("retention.stalled"))


async def test_a_role_that_may_not_delete_is_told_so_and_relays_on(
    url: str, connection: asyncpg.Connection, kafka: Kafka
) -> None:
    suffix = uuid4().hex[:12]
    await connection.execute(roles_sql(suffix))
    await connection.execute(f"CREATE ROLE relay_{suffix} LOGIN IN ROLE outbox_relay_{suffix}")
    await connection.execute(insert(100))
    topic = await new_topic(kafka)
    await connection.execute("INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', '')", topic)
    relay_url = make_url(url).set(username=f"relay_{suffix}").render_as_string()
    with relay_process(relay_url, kafka.bootstrap_servers, retention_hours=1) as relay:
        stalled = await relay.event("retention.stalled")
        assert "grant it outbox_pruner" in stalled["reason"]
        await drained(connection)
        assert await rows_of(connection) == 101
        await connection.execute(f"GRANT outbox_pruner_{suffix} TO relay_{suffix}")
        await relay.event("retention.resumed")
        assert await rows_of(connection) == 1
        assert failures(relay) == 1
        assert await relay.stop() == 0


async def test_an_outage_is_told_once_and_waited_out(
    url: str, connection: asyncpg.Connection, kafka: Kafka, server: PostgresServer
) -> None:
    topic = await new_topic(kafka)
    with relay_process(url, kafka.bootstrap_servers, retention_hours=0.001) as relay:
        await connection.execute("INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', '')", topic)
        await relay.event("rows.pruned")
        await asyncio.to_thread(server.stop)
        try:
            await relay.event("retention.stalled")
        finally:
            await asyncio.to_thread(server.start_again)
        await relay.event("retention.resumed")
        connection = await asyncpg.connect(url)
        await connection.execute("INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', '')", topic)
        await relay.event("rows.pruned", after=1)
        await connection.close()
        assert failures(relay) == 1
        assert await relay.stop() == 0


# -- a million rows, while everybody works

# Who waits for a lock, for how long, and how old the transaction of retention is.
SAMPLE = """
SELECT a.application_name AS who, l.locktype, l.mode, l.relation::regclass::text AS relation,
       extract(epoch FROM clock_timestamp() - l.waitstart)::float AS seconds
FROM pg_stat_activity a JOIN pg_locks l USING (pid)
WHERE a.datname = current_database() AND a.wait_event_type = 'Lock' AND NOT l.granted
UNION ALL
SELECT a.application_name, 'transaction', NULL, NULL, extract(epoch FROM clock_timestamp() - a.xact_start)::float
FROM pg_stat_activity a WHERE a.datname = current_database() AND a.application_name LIKE '%retention'
"""


@contextlib.asynccontextmanager
async def sampled(url: str) -> AsyncIterator[list[asyncpg.Record]]:
    """What ``SAMPLE`` says, fifty times a second."""
    connection = await asyncpg.connect(url)
    rows: list[asyncpg.Record] = []

    async def sample() -> None:
        while True:
            rows.extend(row for row in await connection.fetch(SAMPLE) if row["seconds"] is not None)
            await asyncio.sleep(0.02)

    sampling = asyncio.create_task(sample())
    try:
        yield rows
    finally:
        sampling.cancel()
        await asyncio.wait([sampling])
        await connection.close()


@contextlib.asynccontextmanager
async def written(url: str, topic: str) -> AsyncIterator[None]:
    """Four writers, each with keys of its own, so that none waits for another."""

    async def write(name: str) -> None:
        statement = "INSERT INTO outbox (topic, key, payload) SELECT $1, $2 || n, '{}' FROM generate_series(1, 5) AS n"
        connection = await asyncpg.connect(url)
        try:
            for n in range(10_000):
                await connection.execute(statement, topic, f"{name}-{n % 20}-")
                await asyncio.sleep(0.01)
        finally:
            connection.terminate()

    writing = [asyncio.create_task(write(f"w{n}")) for n in range(4)]
    try:
        yield
    finally:
        for writer in writing:
            writer.cancel()
        await asyncio.wait(writing)


async def test_a_million_rows_are_deleted_and_nobody_waits(
    url: str, connection: asyncpg.Connection, kafka: Kafka
) -> None:
    # A million rows are sooner there without what only a writer meets, and by several.
    for name in ("outbox_headers_are_flat_strings", "outbox_headers_are_not_reserved"):
        await connection.execute(f"ALTER TABLE outbox DROP CONSTRAINT {name}")
    async with asyncpg.create_pool(url, min_size=4, max_size=4) as pool:
        await asyncio.gather(*(pool.execute(insert(MILLION // 4)) for _ in range(4)))
    # Somebody reads old rows under a lock all the while, as a job that copies them elsewhere may.
    stranger = await asyncpg.connect(url)
    await stranger.execute("BEGIN; SELECT FROM outbox WHERE id IN (1000, 600000) FOR UPDATE")
    topic = await new_topic(kafka)
    with (
        relay_process(url, kafka.bootstrap_servers, start=False, log=QUIET, retention_hours=1) as first,
        relay_process(url, kafka.bootstrap_servers, start=False, log=QUIET, retention_hours=1) as second,
    ):
        async with sampled(url) as samples, written(url, topic):
            first.start()
            second.start()
            await shared_out([first, second])
            samples.clear()
            await eventually(lambda: first.events("rows.pruned") or second.events("rows.pruned"), "all deleted", 120)
        await stranger.close()
        await drained(connection)
        pruned = [sum(event["rows"] for event in relay.events("rows.pruned")) for relay in (first, second)]
        assert sorted(pruned) == [0, MILLION - 2], "by the one that owns the first slot"
        assert await connection.execute("DELETE FROM outbox WHERE topic = 'old'") == "DELETE 2"
        assert [await relay.stop() for relay in (first, second)] == [0, 0]
    waits = [dict(row) for row in samples if row["locktype"] != "transaction" and row["seconds"] > LOCK_WAIT]
    assert waits == []
    transactions = [row["seconds"] for row in samples if row["locktype"] == "transaction"]
    assert 0 < max(transactions) < TRANSACTION
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()


async def test_the_table_stops_growing(url: str, connection: asyncpg.Connection, kafka: Kafka) -> None:
    """Twenty messages a second for an hour, compressed into eight rounds. Rows are kept for a second."""
    topic = await new_topic(kafka)

    async def deleted() -> bool:
        return await rows_of(connection) == 0

    async def vacuums() -> int:
        count = "SELECT autovacuum_count FROM pg_stat_user_tables WHERE relname = 'outbox'"
        return int(await connection.fetchval(count))

    async def vacuumed_again(before: int) -> bool:
        return await vacuums() > before

    sizes = []
    with (
        relay_process(url, kafka.bootstrap_servers, log=QUIET, retention_hours=0.0003),
        relay_process(url, kafka.bootstrap_servers, log=QUIET, retention_hours=0.0003),
    ):
        for _ in range(8):
            before = await vacuums()
            await connection.execute(
                "INSERT INTO outbox (topic, key, payload)"
                " SELECT $1, 'k' || n % 500, repeat('x', 200)::bytea FROM generate_series(1, 9000) AS n",
                topic,
            )
            await eventually(deleted, "all rows are sent and deleted", 60)
            await eventually(partial(vacuumed_again, before), "autovacuum has been there", 60)
            sizes.append(await connection.fetchval("SELECT pg_total_relation_size('outbox')"))
    # At most twice, if a round finds nothing vacuumed of the one before. Without deleting it would be five times as
    # large, and seven times without vacuuming.
    assert max(sizes) < 3 * sizes[0], sizes
