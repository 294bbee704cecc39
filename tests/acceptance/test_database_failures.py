"""What PostgreSQL can do to a relay: be away, restart, crash, refuse, hang, forget. Nothing is lost or invented by it.

On a server of this file's own, since others share theirs. An outage is one line at its begin and one at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url

from outbox_relay import outbox, schema
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka, PostgresServer
from tests.acceptance.relays import RelayProcess, compare, drained, new_topic, relay_process
from tests.tcp_proxy import TcpProxy
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("server")

LANES = 2
FOREVER = 600.0
#: Failures that time out do so soon.
IMPATIENT = {"connect_timeout_seconds": 2.0, "statement_timeout_seconds": 0.5}


@dataclass
class Database:
    """An empty database on a server that a test may maltreat."""

    server: PostgresServer
    url: str

    @contextlib.asynccontextmanager
    async def connection(self, **settings: str) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.url, server_settings=settings)
        try:
            yield connection
        finally:
            connection.terminate()

    async def execute(self, *statements: str, **settings: str) -> None:
        """Each in a transaction of its own."""
        async with self.connection(**settings) as connection:
            for statement in statements:
                await connection.execute(statement)

    async def write(self, topic: str, rows: int, *, keys: int = 10, **settings: str) -> None:
        async with self.connection(**settings) as connection, connection.transaction():
            messages = [Message(topic, {"n": number}, key=f"k{number % keys}") for number in range(rows)]
            await outbox.add_async(connection, *messages)

    async def stop(self) -> None:
        await asyncio.to_thread(self.server.stop, "fast")

    async def crash(self) -> None:
        await asyncio.to_thread(self.server.stop, "immediate")

    async def start(self) -> None:
        await asyncio.to_thread(self.server.start_again)

    async def drained(self) -> None:
        async with self.connection() as connection:
            await drained(connection, 60.0)

    async def sound(self, kafka: Kafka, topic: str) -> int:
        """Nothing lost, invented or out of order; the number of repeats."""
        async with self.connection() as connection:
            report = await compare(connection, kafka, topic)
        assert report.sound, report.describe()
        return report.duplicates


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer.start({"fsync": "off", "full_page_writes": "off"}) as server:
        yield server


@pytest.fixture
async def bare(server: PostgresServer) -> Database:
    return Database(server, await asyncio.to_thread(server.create_database, f"test_{uuid4().hex}"))


@pytest.fixture
async def database(bare: Database) -> Database:
    async with bare.connection() as connection:
        await schema.apply(connection)
    return bare


def outages(*relays: RelayProcess) -> list[tuple[int, int]]:
    """How often each relay has said that an outage began, and that it is over."""
    return [(len(relay.events("database.unavailable")), len(relay.events("database.available"))) for relay in relays]


async def settled(relay: RelayProcess, more: int = 1) -> None:
    before = len(relay.ids("claim.settled"))
    await eventually(lambda: len(relay.ids("claim.settled")) >= before + more, f"{relay.name} settles more")


# -- away from the start


async def test_a_relay_waits_for_the_database_and_then_for_the_schema(bare: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    await bare.stop()
    try:
        with relay_process(bare.url, kafka.bootstrap_servers) as relay:
            away = await relay.event("database.unavailable")
            assert (away["level"], away["error"]) == ("warning", "ConnectionRefusedError")
            await bare.start()
            missing = await relay.event("schema.unusable")
            assert "run `outbox-relay schema apply`" in missing["reason"]
            async with bare.connection() as connection:
                await schema.apply(connection)
            await bare.write(topic, 100)
            await bare.drained()
            assert await relay.stop() == 0
            assert outages(relay) == [(1, 1)]
            assert len(relay.events("schema.unusable")) == len(relay.events("schema.usable")) == 1
    finally:
        with contextlib.suppress(OSError):
            await bare.execute("SELECT 1")
    assert await bare.sound(kafka, topic) == 0


async def test_a_relay_that_is_too_old_for_the_schema_waits_and_says_so(database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    await database.execute("UPDATE outbox_layout SET schema_version = 99, oldest_relay = '99.1.0'")
    await database.write(topic, 100)
    with relay_process(database.url, kafka.bootstrap_servers) as relay:
        unusable = await relay.event("schema.unusable")
        assert "is too old: the database needs 99.1.0 or newer" in unusable["reason"]
        assert not relay.events("relay.registered")
        await database.execute("UPDATE outbox_layout SET oldest_relay = '0.1.0'")
        await database.drained()
        assert await relay.stop() == 0
        assert outages(relay) == [(0, 0)]
    assert await database.sound(kafka, topic) == 0


# -- a password


@contextlib.contextmanager
def asking_for_passwords(server: PostgresServer) -> Iterator[None]:
    """The server asks the user ``relay`` for one, whoever comes from now on."""
    rules = server.directory / "data" / "pg_hba.conf"
    usual = rules.read_text()
    rules.write_text("host all relay 127.0.0.1/32 scram-sha-256\n" + usual)
    try:
        yield
    finally:
        rules.write_text(usual)


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid", "two..dots"])
async def test_no_failure_to_connect_shows_the_password(
    host: str, database: Database, kafka: Kafka, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.write_text("s3cret-w0rd")
    await database.execute(
        "DO $$ BEGIN CREATE ROLE relay SUPERUSER LOGIN; EXCEPTION WHEN duplicate_object THEN END $$",
        "ALTER ROLE relay PASSWORD 'the-right-one'",
    )
    topic = await new_topic(kafka)
    await database.write(topic, 10)
    with asking_for_passwords(database.server):
        await database.execute("SELECT pg_reload_conf()")
        url = make_url(database.url).set(host=host, username="relay").render_as_string()
        in_the_clear = {"tls": "disable", "dangerously_allow_plaintext": True}
        settings = {"password": {"file": str(password)}, **in_the_clear}
        with relay_process(url, kafka.bootstrap_servers, database=settings) as relay:
            refused = await relay.event("database.unavailable")
            if host == "127.0.0.1":
                assert "password authentication failed" in refused["reason"]
                # Read for each connection, so a new one needs no restart.
                password.write_text("the-right-one")
                await database.drained()
            assert await relay.stop() == 0
            assert outages(relay) == [(1, int(host == "127.0.0.1"))]
            assert "s3cret-w0rd" not in relay.output()
            assert "the-right-one" not in relay.output()
    await database.execute("SELECT pg_reload_conf()")


# -- away in the middle


async def test_restarts_in_the_middle_of_a_drain_repeat_nothing(database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    with (
        relay_process(database.url, kafka.bootstrap_servers, batch_rows=100, heartbeat_seconds=1.0) as one,
        relay_process(database.url, kafka.bootstrap_servers, batch_rows=100, heartbeat_seconds=1.0) as other,
    ):
        for relay in (one, other):
            await relay.event("slots.taken")
        for restarts in range(1, 4):
            at_work = [asyncio.create_task(settled(relay)) for relay in (one, other)]
            await database.write(topic, 5_000, keys=200)
            await asyncio.gather(*at_work)
            await database.stop()
            for relay in (one, other):
                await relay.event("database.unavailable", after=restarts - 1)
            await database.start()
            for relay in (one, other):
                await relay.event("database.available", after=restarts - 1)
        await database.drained()
        assert [await relay.stop() for relay in (one, other)] == [0, 0]
        assert outages(one, other) == [(3, 3)] * 2
        for relay in (one, other):
            assert relay.events("slots.lost") == relay.events("claim.dropped") == []
    assert await database.sound(kafka, topic) == 0


async def test_backends_that_are_ended_again_and_again_cost_no_repeat(database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    ended = {"one": 0, "other": 0}
    with (
        relay_process(database.url, kafka.bootstrap_servers, batch_rows=50, name="one", heartbeat_seconds=0.5) as one,
        relay_process(
            database.url, kafka.bootstrap_servers, batch_rows=50, name="other", heartbeat_seconds=0.5
        ) as other,
    ):
        async with database.connection() as connection:
            for relay in (one, other):
                await relay.event("slots.taken")
            ended_at = {"one": await connection.fetchval("SELECT now()")}
            ended_at["other"] = ended_at["one"]
            while min(ended.values()) < 3 * (LANES + 1):
                if await connection.fetchval("SELECT count(*) < 500 FROM outbox WHERE sent_at IS NULL"):
                    await database.write(topic, 1_000, keys=200)
                for name in ended:
                    # Not before it has come back, heartbeat and all; else it is as good as dead.
                    if await connection.fetchval(
                        "SELECT max(renewed_at) > $2 FROM outbox_relay WHERE name = $1", name, ended_at[name]
                    ):
                        ended_at[name] = await connection.fetchval("SELECT now()")
                        ended[name] += await connection.fetchval(
                            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                            " WHERE datname = current_database() AND application_name LIKE $1",
                            f"outbox-relay {name} %",
                        )
        await database.drained()
        assert [await relay.stop() for relay in (one, other)] == [0, 0]
        for relay in (one, other):
            assert relay.events("slots.lost") == relay.events("claim.dropped") == []
    assert await database.sound(kafka, topic) == 0


# -- there, and not of use


async def test_a_database_that_became_read_only_is_waited_for(database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    await database.write(topic, 10)
    with relay_process(database.url, kafka.bootstrap_servers) as relay:
        await settled(relay, 10)
        await database.execute("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
        try:
            refused = await relay.event("database.unavailable")
            assert refused["error"] == "ReadOnlySQLTransactionError"
            await database.write(topic, 100, default_transaction_read_only="off")
        finally:
            await database.execute("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
        await database.drained()
        await relay.event("database.available")
        assert await relay.stop() == 0
        assert outages(relay) == [(1, 1)]
    assert await database.sound(kafka, topic) == 0


@pytest.mark.parametrize("table", ["outbox", "outbox_slot", "outbox_relay"])
async def test_a_locked_table_neither_hangs_the_relay_nor_piles_up_backends(
    table: str, database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    await database.write(topic, 10)
    with relay_process(database.url, kafka.bootstrap_servers, database=IMPATIENT) as relay:
        await settled(relay, 10)
        async with database.connection() as stranger, database.connection() as watcher:
            transaction = stranger.transaction()
            await transaction.start()
            await database.write(topic, 100)
            await stranger.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            backends: set[int] = set()
            most = 0

            async def has_tried_often() -> bool:
                nonlocal most
                rows = await watcher.fetch(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE $1",
                    f"outbox-relay {relay.name} %",
                )
                backends.update(row["pid"] for row in rows)
                most = max(most, len(rows))
                return len(backends) >= LANES + 1 + 4

            await eventually(has_tried_often, "it tries again and again")
            await transaction.rollback()
        # One that is just ending may be beside its successor.
        assert most <= 2 * (LANES + 1)
        # The server's deadline and the relay's own are the same.
        locked = relay.events("database.unavailable")[0]
        assert "statement timeout" in locked["reason"] or "no answer within 0.5 s" in locked["reason"]
        await database.drained()
        await relay.event("database.available")
        assert await relay.stop() == 0
        assert outages(relay) == [(1, 1)]
    assert await database.sound(kafka, topic) == 0


async def test_a_lost_table_of_relays_is_made_up_for(database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    with relay_process(
        database.url, kafka.bootstrap_servers, batch_rows=50, heartbeat_seconds=0.1, lease_seconds=0.5
    ) as relay:
        await relay.event("slots.taken")
        for lost in range(1, 4):
            await database.write(topic, 5_000, keys=200)
            await settled(relay)
            # One outage says more than once that it began, where another statement is the next to meet it.
            said = len(relay.events("database.unavailable"))
            await database.execute("ALTER TABLE outbox_relay RENAME TO lost")
            await relay.event("database.unavailable", after=said)
            await database.execute("TRUNCATE lost", "ALTER TABLE lost RENAME TO outbox_relay")
            await relay.event("database.available", after=lost - 1)
            await relay.event("relay.registered", after=lost)
        await database.drained()
        assert await relay.stop() == 0
    assert await database.sound(kafka, topic) == 0


# -- commits that may not last


async def waiting_for_a_standby(connection: asyncpg.Connection, relay: RelayProcess, kind: str) -> set[int]:
    rows = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE $1 AND wait_event = 'SyncRep'",
        f"outbox-relay {relay.name} {kind}%",
    )
    return {row["pid"] for row in rows}


@contextlib.asynccontextmanager
async def missing_standby(database: Database) -> AsyncIterator[None]:
    alone = {"synchronous_commit": "local"}
    await database.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()", **alone)
    try:
        yield
    finally:
        await database.execute("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()", **alone)


async def test_a_commit_whose_wait_for_a_standby_was_cancelled_publishes_nothing(
    database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    with relay_process(
        database.url, kafka.bootstrap_servers, database={"statement_timeout_seconds": FOREVER}, lease_seconds=FOREVER
    ) as relay:
        await relay.event("slots.taken")
        async with missing_standby(database), database.connection(synchronous_commit="local") as watcher:
            await database.write(topic, 100, synchronous_commit="local")
            cancelled: set[int] = set()

            async def new_lanes_wait() -> set[int]:
                waiting = await waiting_for_a_standby(watcher, relay, "lane") - cancelled
                return waiting if len(waiting) == LANES else set()

            # The first may have nothing in it yet, the later ones have the rows.
            for _ in range(4):
                waiting = await eventually(new_lanes_wait, "both lanes wait for the standby")
                await watcher.fetch("SELECT pg_cancel_backend(pid) FROM unnest($1::int[]) AS pid", list(waiting))
                cancelled |= waiting
            doubt = await relay.event("database.unavailable")
            assert "canceling wait for synchronous replication" in doubt["reason"]
            assert relay.ids("claim.made") == []
        await database.drained()
        assert await relay.stop() == 0
    assert await database.sound(kafka, topic) == 0


async def test_a_commit_that_timed_out_publishes_nothing(database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    with relay_process(database.url, kafka.bootstrap_servers, database=IMPATIENT, lease_seconds=FOREVER) as relay:
        await relay.event("slots.taken")
        async with missing_standby(database), database.connection(synchronous_commit="local") as watcher:
            await database.write(topic, 100, synchronous_commit="local")
            timed_out = await relay.event("database.unavailable")
            assert timed_out["reason"] == "commit: no answer within 0.5 s"
            seen: set[int] = set()

            async def has_tried_often() -> bool:
                rows = await watcher.fetch(
                    "SELECT pid FROM pg_stat_activity WHERE application_name LIKE $1",
                    f"outbox-relay {relay.name} lane%",
                )
                seen.update(row["pid"] for row in rows)
                # A backend that waits for a standby doesn't notice that its client has gone, and keeps its locks.
                assert len(rows) <= 3 * LANES
                return len(seen) >= LANES * 3

            await eventually(has_tried_often, "it tries again and again")
            assert relay.ids("claim.made") == []
        await database.drained()
        assert await relay.stop() == 0
    assert await database.sound(kafka, topic) == 0


@dataclass
class CarelessWriter:
    """Commits with ``synchronous_commit = off`` until it is told to stop, through crashes."""

    database: Database
    topic: str
    key: str
    acknowledged: set[str] = field(default_factory=set)  #: event ids of which COMMIT said that all is well

    async def write(self, done: asyncio.Event) -> None:
        while not done.is_set():
            with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                async with self.database.connection(synchronous_commit="off") as connection:
                    while not done.is_set():
                        event_id = await connection.fetchval(
                            "INSERT INTO outbox (topic, key, payload) VALUES ($1, $2, gen_random_uuid()::text::bytea)"
                            " RETURNING event_id::text",
                            self.topic,
                            self.key,
                        )
                        self.acknowledged.add(event_id)
                        await asyncio.sleep(0.002)
            await asyncio.sleep(0.05)


async def test_a_crash_takes_nothing_back_that_kafka_has(kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    # Only whoever commits synchronously flushes what others have committed.
    settings = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "fsync": "on"}
    with PostgresServer.start(settings) as server:
        database = Database(server, server.url())
        async with database.connection() as connection:
            await schema.apply(connection)
        writers = [CarelessWriter(database, topic, f"k{number}") for number in range(6)]
        done = asyncio.Event()
        writing = [asyncio.create_task(writer.write(done)) for writer in writers]
        with relay_process(database.url, kafka.bootstrap_servers, heartbeat_seconds=1.0) as relay:
            for _ in range(5):
                await settled(relay, 200)
                await database.crash()
                await database.start()
            await settled(relay, 200)
            done.set()
            await asyncio.gather(*writing)
            await database.drained()
            assert await relay.stop() == 0
        assert await database.sound(kafka, topic) <= 0
        async with database.connection() as connection:
            kept = {row["event_id"] for row in await connection.fetch("SELECT event_id::text FROM outbox")}
        lost = set().union(*(writer.acknowledged for writer in writers)) - kept
        assert lost, "else the crashes have shown nothing"


# -- a host that is lost


async def test_a_lost_host_does_not_keep_its_locks(database: Database, kafka: Kafka) -> None:
    """It is lost while the server sends it a claim that is more than the sockets on the way take."""
    topic = await new_topic(kafka)
    url = make_url(database.url)
    impatient = {"connect_timeout_seconds": 1.0, "statement_timeout_seconds": 1.0}
    async with TcpProxy("127.0.0.1", url.port or 0, most_bytes_of_answers=1_000_000) as proxy:
        through = url.set(port=proxy.own_port).render_as_string(hide_password=False)
        with (
            relay_process(through, kafka.bootstrap_servers, database=impatient, lease_seconds=1.0) as lost,
            relay_process(
                database.url, kafka.bootstrap_servers, start=False, database=impatient, lease_seconds=1.0
            ) as other,
        ):
            await lost.event("slots.taken")
            async with database.connection() as connection, connection.transaction():
                # One key, so one lane.
                messages = [Message(topic, b"x" * 500_000, key="k") for _ in range(50)]
                await outbox.add_async(connection, *messages)
            await eventually(lambda: proxy.held_up, "a claim is on its way")
            lost.signal(signal.SIGSTOP)
            other.start()
            async with database.connection() as connection:
                await drained(connection, 30.0)
            assert await other.stop() == 0
    assert await database.sound(kafka, topic) == 0
