"""What the polling source makes of rows that are unusual: late, locked, of another payload type, of another's slot."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer
from sqlalchemy import make_url

from outbox_relay import outbox
from outbox_relay.errors import SourceUnavailableError
from outbox_relay.message import Delivered, Record, Retry, Scope
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka, Postgres
from outbox_relay.source import session
from outbox_relay.source.polling import PollingSource
from tests.acceptance.relays import compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.contract.sources import PostgresWorld
from tests.fakes import record
from tests.tcp_proxy import TcpProxy
from tests.waiting import eventually


@pytest.fixture
async def world(database: Database, postgres: Postgres) -> AsyncIterator[PostgresWorld]:
    world = await PostgresWorld.open(database, postgres.url)
    yield world
    await world.close()


async def delivered(source: PollingSource) -> list[int]:
    """One claim, all of it published; its ids."""
    claim = await source.claim()
    source.settle([Delivered(each) for each in claim.records])
    return [each.id for each in claim.records]


async def ready(source: PollingSource, world: PostgresWorld) -> None:
    """Wait until it has every slot: one row in each."""
    rows = [record(id_, None) for id_ in range(-16, 0)]
    await world.insert(*rows)

    async def all_sent() -> bool:
        await delivered(source)
        return await world.sent() == {each.id for each in rows}

    await eventually(all_sent, "the source has every slot")


async def test_many_rows_of_a_locked_key_do_not_starve_their_neighbours_in_the_bucket(
    world: PostgresWorld, database: Database
) -> None:
    connection = await database.connect()
    source = await world.source(batch_rows=50)
    await ready(source, world)
    (bucket, locked, *neighbours) = await connection.fetchrow(
        """
        SELECT bucket, keys[1], keys[2], keys[3]
        FROM (SELECT hashtextextended(key, 0) & 63 AS bucket, array_agg(key) AS keys
              FROM (SELECT 'k' || n AS key FROM generate_series(1, 400) AS n) AS k GROUP BY 1) AS b
        WHERE cardinality(keys) >= 3
        LIMIT 1
        """
    )
    await world.insert(*(record(id_, locked) for id_ in range(1, 1001)))
    expected: list[int] = []
    claims = 0
    async with world.locked([1]):
        for number in range(20):
            first = 2000 + 64 * 3 * number
            new = [record(first, neighbours[0]), record(first + 1, neighbours[1]), record(first + 64 + bucket, None)]
            await world.insert(*new)
            got: list[int] = []
            while len(got) < 3:
                got += await delivered(source)
                claims += 1
                assert claims <= 2 * (number + 1), "a claim for the locked key at most, and one for the others"
            assert sorted(got) == sorted(each.id for each in new)
            expected += got

    async def all_sent() -> bool:
        expected.extend(await delivered(source))
        return await world.sent() >= set(range(1, 1001))

    await eventually(all_sent, "the locked key goes on")
    assert [id_ for id_ in expected if id_ <= 1000] == list(range(1, 1001))


async def test_whoever_lost_a_slot_without_knowing_claims_and_marks_nothing_there(world: PostgresWorld) -> None:
    source = await world.source()
    await ready(source, world)
    await world.insert(record(1), record(2, "b"))
    claim = await source.claim()
    assert [each.id for each in claim.records] == [1, 2]
    await world.freeze_heartbeats()
    await world.take_away()
    source.settle([Delivered(each) for each in claim.records])
    before = await world.sent()
    assert not (await source.claim()).records
    assert not claim.is_ours()
    assert await world.sent() == before


_MANY = 1_000


async def test_wherever_a_relay_is_frozen_its_locks_end_with_the_statement_timeout(
    world: PostgresWorld, database: Database
) -> None:
    connection = await database.connect()
    url = make_url(database.url)
    async with TcpProxy(url.host or "", url.port or 0) as proxy:
        through = url.set(port=proxy.own_port).render_as_string(hide_password=False)
        source = await world.source(lane_database=session.Database(through, 5.0, 0.5))
        await ready(source, world)
        # At every request of a claim on a new connection, from the last on: the first ones connect and prepare.
        requests, frozen = _MANY, 0
        for number in itertools.count():
            rows = [record(10 * number, "delivered"), record(10 * number + 1, f"refused {number}")]
            await world.insert(*rows)
            claim = await eventually(partial(claim_of, source, rows), "both rows are claimed")
            source.settle([settled(each) for each in claim])
            await source.close()
            proxy.requests_until_frozen = requests - number
            if number > min(requests, 20):
                break
            try:
                await source.claim()
                requests -= int(proxy.requests_until_frozen) if not number else 0
            except SourceUnavailableError:
                frozen += 1
            proxy.requests_until_frozen = math.inf
            await eventually(partial(slots_are_free, connection), f"nobody locks a slot, {number} requests missing")
    assert frozen > 6, "at begin, own, settle, park, claim and commit"


def settled(each: Record) -> Delivered | Retry:
    return Retry(each, Scope.ROW, "E", "too large") if b"refused" in (each.key or b"") else Delivered(each)


async def claim_of(source: PollingSource, rows: Sequence[Record]) -> Sequence[Record]:
    """A claim with both, if it has; others in it are delivered."""
    with contextlib.suppress(SourceUnavailableError):
        claim = await source.claim()
        if {each.id for each in rows} <= {each.id for each in claim.records}:
            return claim.records
        source.settle([Delivered(each) for each in claim.records])
    return ()


async def slots_are_free(connection: asyncpg.Connection) -> bool:
    with contextlib.suppress(asyncpg.LockNotAvailableError):
        await connection.execute("SELECT FROM outbox_slot FOR UPDATE NOWAIT")
        return True
    return False


async def test_a_row_that_becomes_visible_long_after_later_ones_were_sent_is_sent(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    connection, long_running = await outbox_database.connect(), await outbox_database.connect()
    async with long_running.transaction():
        await outbox.add_async(long_running, *(Message(topic, {}, key=key) for key in ("late", "late", None)))
        await connection.execute(
            "INSERT INTO outbox (id, topic, key, payload) SELECT n, $1, 'own ids ' || n % 3, ''"
            " FROM (VALUES (-9223372036854775808), (-7), (0), (1000000), (9223372036854775807)) AS own (n)",
            topic,
        )
        with relay_process(outbox_database.url, kafka.bootstrap_servers, "--once") as relay:
            assert await relay.exit_code() == 0
        await drained(connection, 0.0)
    with relay_process(outbox_database.url, kafka.bootstrap_servers) as relay:
        await drained(connection)
        await connection.execute("INSERT INTO outbox (id, topic, payload) VALUES (-8, $1, '')", topic)
        await drained(connection)
        assert await relay.stop() == 0
        assert sorted(relay.ids("claim.settled")) == [-8, 1, 2, 3]
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.records == 9


# -- what a record holds


async def set_time_zone(connection: asyncpg.Connection, time_zone: str) -> None:
    """For sessions of the database that begin from now on."""
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET TimeZone = '{time_zone}'")


async def published(database: Database, kafka: Kafka, topic: str) -> dict[int, Any]:
    """Drain; what Kafka holds of the topic's one partition, by outbox id."""
    with relay_process(database.url, kafka.bootstrap_servers, "--once") as relay:
        assert await relay.exit_code() == 0
    await drained(await database.connect(), 0.0)
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        (partition,) = await eventually(consumer.assignment, "the topic's partition is assigned")
        count = (await consumer.end_offsets([partition]))[partition]
        records = [await consumer.getone() for _ in range(count)]
    finally:
        await consumer.stop()
    return {int(dict(each.headers)["outbox-id"]): each for each in records}


#: Values as an application writes them, and the bytes that Kafka must hold.
PAYLOADS: dict[str, list[tuple[str | bytes, bytes]]] = {
    "bytea": [(b"", b""), (b"\x00\xff\xfe{", b"\x00\xff\xfe{"), (b'{"a":  1}', b'{"a":  1}')],
    "text": [("", b""), ("no json \\u00e9 \\", b"no json \\u00e9 \\"), ("zażółć 🦉\r\n", "zażółć 🦉\r\n".encode())],
    "json": [
        ("null", b"null"),
        # Python would make one key of two, another number of this one, and nothing at all of what isn't a character.
        ('{"b": 1,  "a":\n12345678901234567890.10, "b": 2}', b'{"b": 1,  "a":\n12345678901234567890.10, "b": 2}'),
        (r'{"e": "\u00e9", "half": "\ud800", "nul": "\u0000"}', rb'{"e": "\u00e9", "half": "\ud800", "nul": "\u0000"}'),
        ("[1e400, -0.0]", b"[1e400, -0.0]"),
    ],
    "jsonb": [
        ("null", b"null"),
        ('{"bb": 1,"a":12345678901234567890.10}', b'{"a": 12345678901234567890.10, "bb": 1}'),
        (r'{"e": "\u00e9\n", "n": 9007199254740993}', '{"e": "é\\n", "n": 9007199254740993}'.encode()),
    ],
}


@pytest.mark.parametrize("type_", PAYLOADS)
async def test_a_payload_arrives_byte_for_byte_as_postgresql_prints_it(
    type_: str, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, partitions=1)
    connection = await outbox_database.connect()
    if type_ != "bytea":
        await connection.execute(
            f"ALTER TABLE outbox ALTER payload TYPE {type_} USING convert_from(payload, 'UTF8')::{type_}"
        )
    insert = "INSERT INTO outbox (id, topic, key, payload) VALUES ($1, $2, 'k', $3)"
    for id_, (written, _) in enumerate(PAYLOADS[type_]):
        await connection.execute(insert, id_, topic, written)
    await connection.execute(insert, 100, topic, None)
    records = await published(outbox_database, kafka, topic)
    assert [records[id_].value for id_ in range(len(PAYLOADS[type_]))] == [read for _, read in PAYLOADS[type_]]
    assert records[100].value is None
    assert len(records) == len(PAYLOADS[type_]) + 1


async def test_a_record_has_the_headers_that_are_documented_and_the_time_of_publishing(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, partitions=1)
    connection = await outbox_database.connect()
    await set_time_zone(connection, "Asia/Kolkata")
    await connection.execute(
        "INSERT INTO outbox (id, event_id, topic, key, type, payload, headers, created_at) VALUES"
        " (1, 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11', $1, 'ключ', 'OrderPlaced', '',"
        """  '{"tenant": "nörth", "Empty": "", "escaped": "\\u0041\\"\\n", "traceparent": "00-0af7"}',"""
        "  '2001-02-03 04:05:06.000007+02'),"
        " (2, 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12', $1, '', NULL, '', '{}', '2001-02-03 04:05:06 UTC')",
        topic,
    )
    before = time.time() * 1000
    records = await published(outbox_database, kafka, topic)
    after = time.time() * 1000
    assert records[1].headers[:4] == (
        ("id", b"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("type", b"OrderPlaced"),
        ("outbox-id", b"1"),
        ("created_at", b"2001-02-03T02:05:06.000007Z"),
    )
    assert sorted(records[1].headers[4:]) == [
        ("Empty", b""), ("escaped", b'A"\n'), ("tenant", "nörth".encode()), ("traceparent", b"00-0af7")
    ]  # fmt: skip
    assert records[2].headers == (
        ("id", b"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12"),
        ("outbox-id", b"2"),
        ("created_at", b"2001-02-03T04:05:06.000000Z"),
    )
    assert (records[1].key, records[2].key) == ("ключ".encode(), b"")
    for each in records.values():
        assert before - 1 <= each.timestamp <= after


async def test_no_created_at_stops_the_relay(outbox_database: Database, kafka: Kafka) -> None:
    """PostgreSQL's calendar is longer than Python's, and than RFC 3339's."""
    topic = await new_topic(kafka, partitions=1)
    connection = await outbox_database.connect()
    await set_time_zone(connection, "UTC")
    times = {
        "0001-01-01 00:00:00 UTC": b"0001-01-01T00:00:00.000000Z",
        "9999-12-31 23:59:59.999999 UTC": b"9999-12-31T23:59:59.999999Z",
        "infinity": b"infinity",
        "-infinity": b"-infinity",
        "10000-01-01 00:00:00 UTC": b"10000-01-01 00:00:00+00",
        "0044-03-15 12:00:00 UTC BC": b"0044-03-15 12:00:00+00 BC",
    }
    for id_, created_at in enumerate(times):
        await connection.execute(
            f"INSERT INTO outbox (id, topic, payload, created_at) VALUES ($1, $2, '', '{created_at}')", id_, topic
        )
    records = await published(outbox_database, kafka, topic)
    assert [dict(records[id_].headers)["created_at"] for id_ in range(len(times))] == list(times.values())
