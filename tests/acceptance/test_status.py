"""``outbox-relay status``: what it says is so, and asking costs and changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from outbox_relay import status
from outbox_relay.errors import SourceUnavailableError
from outbox_relay.servers import Kafka
from outbox_relay.source import session
from outbox_relay.source.statements import OUTBOX, OutboxTable
from outbox_relay.status import Forecast, Status, Topic
from tests.acceptance import parked
from tests.acceptance.relays import SLOTS, drained, new_topic, owned, relay_process
from tests.acceptance.test_existing_tables import COLUMNS, DEBEZIUM, adopt, write_config
from tests.conftest import Database
from tests.waiting import eventually

NOWHERE = "postgresql://127.0.0.1:1/d"


def insert(topic: str, rows: int, keys: int = 100) -> str:
    return (
        "INSERT INTO outbox (topic, key, payload)"
        f" SELECT '{topic}', 'k' || n % {keys}, 'x' FROM generate_series(1, {rows}) AS n"
    )


async def read(database: Database, *meanwhile: str, table: OutboxTable = OUTBOX, schema: str = "") -> Status:
    """The status, with these statements between the two looks."""

    async def window() -> None:
        connection = await database.connect()
        for statement in meanwhile:
            await connection.execute(statement)

    return await status.read(session.Database(database.url, 10.0, 10.0, schema=schema), table, window)


async def test_a_backlog_and_its_course(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    nothing = await read(outbox_database)
    assert (nothing.backlog.rows, nothing.backlog.is_exact, nothing.backlog.oldest_seconds) == (0, True, None)
    assert (nothing.topics.most, nothing.relays, nothing.forecast) == ([], [], Forecast("empty", None))
    assert nothing.slots.without_owner == list(range(SLOTS))

    await connection.execute(insert("orders", 300))
    await connection.execute(insert("payments", 40))
    await connection.execute("UPDATE outbox SET created_at = now() - interval '1 hour' WHERE id = 7")
    mark = "UPDATE outbox SET sent_at = now() WHERE id IN (SELECT id FROM outbox WHERE sent_at IS NULL {} LIMIT {})"
    draining = await read(outbox_database, insert("orders", 30), mark.format("AND id <> 7", 80))
    assert draining.backlog.rows == 290
    assert draining.backlog.oldest_seconds == pytest.approx(3600, abs=60)
    seconds = draining.rates.over_seconds
    assert draining.rates.inserted_per_second * seconds == pytest.approx(30)
    assert draining.rates.sent_per_second * seconds == pytest.approx(80)
    assert draining.forecast.state == "shrinking"
    assert draining.forecast.empty_in_seconds == pytest.approx(290 / 50 * seconds)
    assert sum(topic.rows for topic in draining.topics.most) == draining.topics.rows_looked_at == 290
    assert [topic.topic for topic in draining.topics.most] == ["orders", "payments"]

    growing = await read(outbox_database, insert("payments", 10))
    assert growing.forecast == Forecast("growing", None)
    # What is rolled back was never there.
    standing = await read(outbox_database, "BEGIN", insert("orders", 50), "ROLLBACK")
    assert (standing.forecast, standing.rates.inserted_per_second) == (Forecast("standing", None), 0)


async def test_a_backlog_too_large_to_be_counted_is_estimated(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "MOST_COUNTED", 1_000)
    monkeypatch.setattr(status, "MOST_LOOKED_AT", 3_200)
    monkeypatch.setattr(status, "WINDOW_IDS", 20)
    connection = await outbox_database.connect()
    # Most of it is one key's; and long before it, a row that waits from times when all else was sent.
    await connection.execute(insert("old", 100_000))
    await connection.execute("UPDATE outbox SET sent_at = now() WHERE id <> 5")
    await connection.execute(insert("hot", 15_000, keys=1))
    await connection.execute(insert("cold", 5_000, keys=5_000))
    found = await read(outbox_database, insert("cold", 200))
    assert not found.backlog.is_exact
    assert found.backlog.rows == pytest.approx(20_201, rel=0.1)
    assert found.topics.rows_looked_at <= 3_200
    assert found.rates.inserted_per_second * found.rates.over_seconds == pytest.approx(200)
    # The next key's rows, near by one another but in one bucket alone.
    await connection.execute("UPDATE outbox SET sent_at = now() WHERE topic = 'cold' OR id = 5")
    assert (await read(outbox_database)).backlog.rows == pytest.approx(15_000, rel=0.1)


FLUSH = "SELECT pg_stat_force_next_flush()"


def skip_without_flush(connection: asyncpg.Connection) -> None:
    if connection.get_server_version() < (15,):
        pytest.skip("before PostgreSQL 15 a session can't be told to hand in its statistics at once")


async def test_sent_rows_of_a_large_backlog_are_those_updated(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "MOST_COUNTED", 1_000)
    connection = await outbox_database.connect()
    skip_without_flush(connection)
    await connection.execute(insert("orders", 5_000))
    found = await read(outbox_database, "UPDATE outbox SET sent_at = now() WHERE id <= 700", FLUSH)
    assert found.rates.sent_per_second * found.rates.over_seconds == pytest.approx(700)
    assert found.forecast.state == "shrinking"


async def test_what_came_and_was_deleted_between_the_looks_counts_as_sent(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    skip_without_flush(connection)
    await connection.execute(insert("orders", 300))
    # As a relay says it before it deletes anything.
    await connection.execute("UPDATE outbox_layout SET pruned_until = now() + interval '1 minute'")
    found = await read(outbox_database, insert("orders", 80), "DELETE FROM outbox WHERE id > 250", FLUSH)
    assert found.rates.inserted_per_second * found.rates.over_seconds == pytest.approx(80)
    assert found.rates.sent_per_second * found.rates.over_seconds == pytest.approx(130)
    assert found.forecast.state == "shrinking"


async def test_rows_that_wait_are_no_backlog(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute(insert("orders", 40, keys=4))
    park = """WITH parked AS (UPDATE outbox SET parked_at = now() WHERE id BETWEEN $2::int AND $3::int RETURNING *)
        INSERT INTO outbox_parked (id, bucket, topic, key, state, parked_at)
        SELECT id, bucket, topic, key, $1, now() - make_interval(mins => $4) FROM parked"""
    for state, first, last, minutes in (
        ("retry", 1, 2, 5),  # of two keys
        ("blocked", 5, 6, 4),  # of the same two
        ("dead", 3, 3, 3),
        ("topic", 8, 9, 2),
        ("discarded", 12, 12, 60),
    ):
        await connection.execute(park, state, first, last, minutes)
    await connection.execute(
        "INSERT INTO outbox_pause (topic, paused_at, reason) VALUES ('orders', now() - interval '1 hour', 'moved')"
    )
    found = await read(outbox_database)
    assert (found.backlog.rows, found.topics.most) == (32, [Topic("orders", 32)])
    assert found.parked.oldest_dead_seconds == pytest.approx(180, abs=60)
    assert [(paused.topic, paused.reason) for paused in found.paused] == [("orders", "moved")]
    assert found.paused[0].since_seconds == pytest.approx(3600, abs=60)
    assert found.parked.oldest_seconds == pytest.approx(300, abs=60)
    counts = {name: getattr(found.parked, name) for name in status._STATES}
    assert counts == {"retry": 2, "trying": 0, "blocked": 2, "topic": 2, "dead": 1, "discarded": 1}
    assert (found.parked.is_exact, found.parked.blocked_keys) == (True, 3)


async def test_topics_that_wait_are_told_with_why(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    for topic, error, reason in (
        ("orders", None, None),  # parked for the topic, without an error of its own
        ("orders", "UnknownTopicOrPartitionError", "create the topic"),
        ("payments", "TopicAuthorizationFailedError", "allow it"),
        ("stopped", None, None),
    ):
        row = await parked.insert(connection, topic, "k")
        await parked.park(connection, row, "topic", error=error, reason=reason)
    await parked.dead(connection, "orders", "k")
    await connection.execute("INSERT INTO outbox_pause (topic, reason) VALUES ('stopped', 'moved')")
    found = await read(outbox_database)
    assert [(one.topic, one.rows, one.error, one.reason) for one in found.refused] == [
        ("orders", 2, "UnknownTopicOrPartitionError", "create the topic"),
        ("payments", 1, "TopicAuthorizationFailedError", "allow it"),
    ]
    assert [paused.topic for paused in found.paused] == ["stopped"]


async def test_relays_and_what_they_own(outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    await (await outbox_database.connect()).execute(insert(topic, 100))
    url, nowhere = outbox_database.url, "127.0.0.1:1"
    # The lease is that of a test which never sees it run out, and then one which does.
    with (
        relay_process(url, kafka.bootstrap_servers, lease_seconds=600) as working,
        relay_process(url, nowhere, lease_seconds=2) as waiting,
    ):
        await eventually(lambda: owned(working) == SLOTS, "the one that reaches Kafka has all slots")
        await waiting.event("relay.registered")
        await drained(await outbox_database.connect())
        first, second = sorted((await read(outbox_database)).relays, key=lambda relay: relay.name != working.name)
        assert (first.name, first.ready, first.connected, first.slots) == (working.name, True, True, list(range(SLOTS)))
        assert (second.name, second.ready, second.connected, second.slots) == (waiting.name, False, True, [])
        assert 0 <= first.heartbeat_seconds < 60

        working.kill()
        waiting.kill()

        async def one_is_left() -> Status | None:
            found = await read(outbox_database)
            return found if len(found.relays) == 1 and not found.relays[0].connected else None

        found = await eventually(one_is_left, "the lease of the other runs out")
        assert (found.relays[0].name, found.slots.without_owner) == (working.name, [])
        await (await outbox_database.connect()).execute(
            "UPDATE outbox_relay SET renewed_at = renewed_at - interval '1h'"
        )
        found = await read(outbox_database)
        assert (found.relays, found.slots.without_owner) == ([], list(range(SLOTS)))


async def test_a_table_with_names_of_its_own(database: Database, tmp_path: Path) -> None:
    connection = await database.connect()
    await connection.execute(DEBEZIUM.format(payload_type="jsonb"))
    await adopt(connection, write_config(tmp_path / "c.toml", database.url, "t"))
    values = "(aggregatetype, aggregateid, type, payload) VALUES ('order', '42', 'OrderPlaced', '1')"
    await connection.execute(f'INSERT INTO "Order Service".outboxevent {values}')
    table = OutboxTable("outboxevent", "outbox.event.{aggregatetype}", **COLUMNS)
    found = await read(
        database, f'INSERT INTO "Order Service".outboxevent {values}', table=table, schema="Order Service"
    )
    assert (found.backlog.rows, found.backlog.oldest_seconds, found.forecast.state) == (2, None, "growing")
    assert found.topics.most == [Topic("outbox.event.order", 2)]


async def test_a_table_that_is_locked_is_waited_for_only_so_long(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "MOST_SECONDS", 0.3)
    connection = await outbox_database.connect()
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(SourceUnavailableError, match="count the backlog"):
            await read(outbox_database)


# -- the command


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outbox_relay", "status", "--config", str(path), "--window-seconds", "0.1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=60)


def config(directory: Path, url: str) -> Path:
    path = directory / "config.toml"
    path.write_text(f'[database]\nurl = "{url}"\n[kafka]\nbootstrap_servers = ["localhost:1"]\n')
    return path


async def test_json_text_and_tables(outbox_database: Database, tmp_path: Path) -> None:
    connection = await outbox_database.connect()
    await connection.execute(insert("orders", 12))
    before = await connection.fetch("SELECT *, xmin, ctid FROM outbox ORDER BY id")
    path = config(tmp_path, outbox_database.url)
    done = await asyncio.to_thread(run, path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["backlog"]["rows"], found["topics"]["most"]) == (12, [{"topic": "orders", "rows": 12}])
    assert 0.1 <= found["rates"]["over_seconds"] < 60
    done = await asyncio.to_thread(run, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("backlog.rows 12\nbacklog.is_exact yes\n")
    shown = await asyncio.to_thread(on_a_terminal, path)
    assert shown.startswith("Backlog   12 rows, the oldest ")
    assert await connection.fetch("SELECT *, xmin, ctid FROM outbox ORDER BY id") == before


async def test_the_database_is_named_as_for_operators_commands(
    outbox_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "outbox_relay", "status", "--window-seconds", "0.1", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout or done.stderr

    elsewhere = str(config(tmp_path, NOWHERE))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    code, text = await asyncio.to_thread(said)
    assert (code, text) == (78, "which database is meant? Give --config or --database-url, or set DATABASE_URL\n")
    for arguments in (
        ["--database-url", outbox_database.url],
        ["--database-url", outbox_database.url, "--config", elsewhere],
    ):
        code, text = await asyncio.to_thread(said, *arguments)
        assert (code, text.splitlines()[0]) == (0, "backlog.rows 0")
    monkeypatch.setenv("DATABASE_URL", outbox_database.url)
    code, text = await asyncio.to_thread(said)
    assert (code, text.splitlines()[0]) == (0, "backlog.rows 0")
    code, _ = await asyncio.to_thread(said, "--config", elsewhere)
    assert code == 69


def on_a_terminal(path: Path) -> str:
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", "outbox_relay", "status", "--config", str(path), "--window-seconds", "0.1"]
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
        os.close(theirs)
        assert process.wait(60) == 0
        return os.read(ours, 65536).decode()
    finally:
        os.close(ours)


async def test_what_is_not_there_is_said_in_a_line(database: Database, tmp_path: Path) -> None:
    done = await asyncio.to_thread(run, config(tmp_path, database.url))
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith("there is no outbox schema in this database")
    done = await asyncio.to_thread(run, config(tmp_path, NOWHERE))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (69, "", 1)
    done = await asyncio.to_thread(run, config(tmp_path, "nonsense"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (78, "", 1)


async def test_open_transactions_are_not_waited_for(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    async with connection.transaction():
        await connection.execute(insert("orders", 3))
        await connection.execute("SELECT FROM outbox_slot FOR UPDATE")
        assert (await read(outbox_database)).backlog.rows == 0
    assert (await read(outbox_database)).backlog.rows == 3
