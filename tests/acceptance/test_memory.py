"""What a relay has in its hands at a time is bounded by bytes, whatever its rows are like."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from outbox_relay.failures import Policies, Policy
from outbox_relay.message import Delivered, Record
from outbox_relay.retry import Backoff
from outbox_relay.servers import Kafka, Postgres
from outbox_relay.source.polling import PollingSource
from outbox_relay.source.statements import ROW_BYTES
from tests.acceptance.parked import states
from tests.acceptance.relays import RelayProcess, compare, new_topic, relay_process
from tests.conftest import Database
from tests.contract.sources import PostgresWorld
from tests.contract.test_source import check_no_gap
from tests.waiting import eventually

CLAIM_BYTES = 200_000
MEGABYTE = 1_000_000


@pytest.fixture
async def world(database: Database, postgres: Postgres) -> AsyncIterator[PostgresWorld]:
    world = await PostgresWorld.open(database, postgres.url)
    yield world
    await world.close()


@pytest.fixture
async def connection(world: PostgresWorld, database: Database) -> asyncpg.Connection:
    return await database.connect()


def size_of(records: Sequence[Record]) -> int:
    """At least, of what they hold."""
    return sum(
        ROW_BYTES
        + len(record.key or b"")
        + len(record.value or b"")
        + sum(len(value) for name, value in record.headers if name == "large")
        for record in records
    )


async def claims(source: PollingSource, rows: int) -> list[Sequence[Record]]:
    """All that it claims until there were so many rows, each delivered."""
    found: list[Sequence[Record]] = []

    async def all_() -> bool:
        claim = await source.claim()
        source.settle([Delivered(record) for record in claim.records])
        if claim.records:
            found.append(claim.records)
        return sum(map(len, found)) >= rows

    await eventually(all_, f"{rows} rows are claimed")
    return found


def check(found: Sequence[Sequence[Record]], *, most: float = CLAIM_BYTES) -> None:
    """No claim is too large, none needlessly small, and each has a key's rows without a gap."""
    rows = {record.id: record for records in found for record in records}
    done: set[int] = set()
    for records in found:
        assert size_of(records) <= most or len(records) == 1
        check_no_gap(records, rows, done)
        done.update(record.id for record in records)
    assert len(done) == sum(map(len, found))
    assert len(found) <= 2 * size_of(list(rows.values())) / CLAIM_BYTES + 3


TEXT = """CASE WHEN n % 3 = 0 THEN repeat('abcdefghij', size / 10)
               ELSE (SELECT string_agg(md5(n || '-' || i), '') FROM generate_series(0, size / 32) AS i) END"""
#: Of each type, a value of about this size; every third can be compressed. And what is allowed for its measure: what
#: is stored of jsonb is not quite what is printed.
PAYLOADS = {
    "bytea": (f"convert_to({TEXT}, 'UTF8')", 1.0),
    "text": (TEXT, 1.0),
    "varchar(1000000)": (TEXT, 1.0),
    "json": (f"to_json({TEXT})", 1.0),
    "jsonb": (f"to_jsonb({TEXT})", 1.1),
}


@pytest.mark.parametrize("payload_type", PAYLOADS)
async def test_a_claim_takes_as_many_rows_as_fit_in_order_and_a_larger_one_alone(
    payload_type: str, world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    value, inexact = PAYLOADS[payload_type]
    await connection.execute(
        f"ALTER TABLE outbox ALTER payload TYPE {payload_type} USING NULL::{payload_type};"
        "SELECT setseed(0.5);"
        f"""
        INSERT INTO outbox (topic, key, payload)
        SELECT 't', 'k' || n % 7, {value}
        FROM (SELECT n, (ARRAY[10, 500, 30000, 90000, 300000])[1 + floor(random() * 5)::int] AS size
              FROM generate_series(1, 150) AS n) AS sized
        """
    )
    found = await claims(await world.source(batch_rows=50, claim_bytes=CLAIM_BYTES), 150)
    check(found, most=CLAIM_BYTES * inexact)
    assert max(len(records) for records in found) > 2
    assert any(size_of(records) > CLAIM_BYTES for records in found)


async def test_headers_and_keys_count(world: PostgresWorld, connection: asyncpg.Connection) -> None:
    await connection.execute(
        """
        INSERT INTO outbox (topic, key, payload, headers)
        SELECT 't', 'k' || n || CASE WHEN n % 2 = 0 THEN repeat('k', 2000) ELSE '' END, 'x',
               CASE WHEN n % 3 = 0 THEN jsonb_build_object('large', repeat('x', 60000)) ELSE '{}' END
        FROM generate_series(1, 100) AS n
        """
    )
    check(await claims(await world.source(claim_bytes=CLAIM_BYTES), 100))


async def test_many_small_rows_count_for_what_the_relay_keeps_of_each(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "INSERT INTO outbox (topic, key, payload) SELECT 't', 'k', 'x' FROM generate_series(1, 1000)"
    )
    found = await claims(await world.source(batch_rows=100_000, claim_bytes=CLAIM_BYTES), 1_000)
    check(found)


async def test_so_it_is_where_a_row_can_not_be_read(world: PostgresWorld, connection: asyncpg.Connection) -> None:
    """Then the claim is made in parts."""
    await connection.execute(
        "INSERT INTO outbox (topic, key, payload)"
        " SELECT 't', 'k' || n % 7, convert_to(repeat('x', 30000), 'UTF8') FROM generate_series(1, 60) AS n"
    )
    await connection.execute("ALTER TABLE outbox ALTER created_at DROP DEFAULT, ALTER created_at TYPE text")
    await connection.execute("UPDATE outbox SET created_at = 'never' WHERE id % 5 = 0")
    policies = Policies(Backoff(0.01, 0.01), Policy(max_attempts=1, block=False))
    source = await world.source(batch_rows=100, claim_bytes=CLAIM_BYTES, policies=policies)
    check(await claims(source, 48))
    await source.claim()
    assert await states(connection) == dict.fromkeys(range(5, 61, 5), "dead")


# -- the process


def peak(relay: RelayProcess) -> float:
    """The most memory that it ever had, in megabytes."""
    status = Path(f"/proc/{relay.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1000


#: A process takes so many times what it may have in its hands: as read, in batches, in requests. Measured: 3.6.
TIMES = 4
#: Of a single row that is larger, so many times its size: PostgreSQL's answer is in parts first. Measured: 5.9.
TIMES_ALONE = 7
#: What else may differ from one process to the next, in megabytes.
SPREAD = 30


def insert(topic: str, rows: int, size: int, keys: int) -> str:
    return (
        f"INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'k' || n % {keys},"
        f" convert_to(repeat('x', {size}), 'UTF8') FROM generate_series(1, {rows}) AS n"
    )


async def peak_draining(database: Database, kafka: Kafka, **settings: Any) -> float:
    """Of a relay that ends when all is sent, or waits for somebody to decide."""
    connection = await database.connect()
    with relay_process(database.url, kafka.bootstrap_servers, log={"level": "info"}, **settings) as relay:

        async def nothing_left() -> bool:
            left = "SELECT EXISTS (SELECT FROM outbox WHERE sent_at IS NULL AND parked_at IS NULL)"
            return not await connection.fetchval(left)

        await eventually(nothing_left, "all is sent or parked", 120.0)
        reached = peak(relay)
        assert await relay.stop() == 0
        for dead in relay.events("row.dead"):
            assert dead["error"] == "MessageSizeTooLargeError"
            assert "max.message.bytes" in dead["reason"]
    return reached


async def test_a_process_is_as_small_whatever_it_carries(outbox_database: Database, kafka: Kafka) -> None:
    """Large rows, in all 15 times what it may have; many small ones of one key; one that Kafka refuses as too large."""
    connection = await outbox_database.connect()
    topic = await new_topic(kafka, 12)
    most = 8 * MEGABYTE
    await connection.execute(insert(topic, 200, 100, 50))
    base = await peak_draining(outbox_database, kafka)
    allowed = base + SPREAD + TIMES * most / MEGABYTE
    await connection.execute(insert(topic, 120, MEGABYTE, 50))
    assert await peak_draining(outbox_database, kafka, max_in_flight_bytes=most) <= allowed
    await connection.execute(insert(topic, 20_000, 100, 1))
    assert await peak_draining(outbox_database, kafka, max_in_flight_bytes=most, batch_rows=20_000) <= allowed
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()

    await connection.execute(insert(topic, 1, 20 * MEGABYTE, 1))
    alone = await peak_draining(outbox_database, kafka, max_in_flight_bytes=most, max_attempts=1)
    assert alone <= base + SPREAD + TIMES_ALONE * 20
    assert list((await states(connection)).values()) == ["dead"]
