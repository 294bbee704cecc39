"""The checker against relays with one classic mistake each, on real servers.

What happens in between is arranged, never left to chance. Each script also runs with the mistake mended, and then the
checker finds nothing: so it is the mistake that it finds.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from outbox_relay.checker import KINDS, Report
from outbox_relay.partitioner import partition_for
from outbox_relay.producer import Producer
from outbox_relay.servers import Kafka
from outbox_relay.topic_reader import read_topics
from tests.acceptance import broken_relays
from tests.acceptance.broken_relays import (
    BATCH_ROWS,
    CutsProducersOff,
    LeavesProducers,
    Relay,
    RelayWithSteps,
    cuts_keys_at_locked_rows,
    locks_slots_first,
    marks_then_publishes,
    partitions_by_crc32,
    publishes_after_the_transaction,
    publishes_inside_the_transaction,
    publishes_then_marks,
    puts_keys_of_refused_rows_off,
    puts_refused_rows_off,
    reads_on_behind_a_fence,
    reads_on_from_a_cursor,
    reencodes_json,
)
from tests.acceptance.relays import compare, new_topic
from tests.conftest import Database
from tests.kafka_proxy import PRODUCE, KafkaProxy
from tests.waiting import eventually

SECONDS = 30.0

INSERT = """-- insert
INSERT INTO outbox (topic, key, type, payload, headers) VALUES ($1, $2, 'OrderPlaced', $3, '{"source": "test"}')
RETURNING id"""

UNSENT = """-- unsent
SELECT count(*) FROM outbox WHERE sent_at IS NULL"""


class Gate:
    """Holds a relay at one step until it is opened."""

    def __init__(self, step: str) -> None:
        self._step = step
        self._opened = asyncio.Event()
        self.reached = asyncio.Event()

    async def __call__(self, step: str) -> None:
        if step == self._step:
            self.reached.set()
            await self._opened.wait()

    def open(self) -> None:
        self._opened.set()


async def insert(connection: asyncpg.Connection, topic: str, *rows: tuple[str, bytes]) -> list[int]:
    """Commit one row for each key and payload, in one transaction of their own or the connection's."""
    async with connection.transaction():
        return [await connection.fetchval(INSERT, topic, key, payload) for key, payload in rows]


async def held(
    relay: RelayWithSteps, connection: asyncpg.Connection, producer: AIOKafkaProducer, gate: Gate
) -> asyncio.Task[int]:
    """A poll that has come to the gate."""
    poll = asyncio.ensure_future(relay(connection, producer, gate))
    reached = asyncio.ensure_future(gate.reached.wait())
    await asyncio.wait([poll, reached], timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
    assert reached.done(), "the relay didn't come to the gate"
    return poll


async def drain(relay: Relay, connection: asyncpg.Connection, producer: AIOKafkaProducer) -> None:
    """Poll until every row is marked."""

    async def nothing_left() -> bool:
        await relay(connection, producer)
        return not await connection.fetchval(UNSENT)

    await eventually(nothing_left, "every row is marked as sent")


@asynccontextmanager
async def connected(bootstrap_servers: str, **settings: Any) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, acks="all", **settings)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@pytest.fixture
async def producer(kafka: Kafka) -> AsyncIterator[AIOKafkaProducer]:
    async with connected(kafka.bootstrap_servers, enable_idempotence=True) as producer:
        yield producer


def damage(report: Report) -> dict[str, int]:
    assert report.sound == (not any(getattr(report, kind) for kind in KINDS if kind != "duplicates"))
    return {kind: getattr(report, kind) for kind in KINDS if getattr(report, kind)}


@pytest.mark.parametrize(
    ("relay", "step", "found"),
    [
        pytest.param(marks_then_publishes, "marked", {"lost": BATCH_ROWS}, id="broken"),
        pytest.param(publishes_then_marks, "published", {"duplicates": BATCH_ROWS}, id="mended"),
    ],
)
async def test_rows_that_were_marked_before_a_crash_and_not_published_are_lost(
    relay: RelayWithSteps,
    step: str,
    found: dict[str, int],
    outbox_database: Database,
    kafka: Kafka,
    producer: AIOKafkaProducer,
) -> None:
    topic = await new_topic(kafka, 1)
    first, second = await outbox_database.connect(), await outbox_database.connect()
    await insert(first, topic, *[("a", b"%d" % n) for n in range(2 * BATCH_ROWS)])
    poll = await held(relay, first, producer, Gate(step))
    first.terminate()
    poll.cancel()
    await asyncio.gather(poll, return_exceptions=True)
    await drain(relay, second, producer)
    assert damage(await compare(second, kafka, topic)) == found


@pytest.mark.parametrize(
    ("relay", "found"),
    [
        pytest.param(publishes_then_marks, {"out_of_order": BATCH_ROWS}, id="broken"),
        pytest.param(locks_slots_first, {}, id="mended"),
    ],
)
async def test_rows_of_a_key_that_two_relays_share_by_row_locks_are_out_of_order(
    relay: RelayWithSteps, found: dict[str, int], outbox_database: Database, kafka: Kafka, producer: AIOKafkaProducer
) -> None:
    topic = await new_topic(kafka, 1)
    first, second = await outbox_database.connect(), await outbox_database.connect()
    await insert(first, topic, *[("a", b"%d" % n) for n in range(2 * BATCH_ROWS)])
    gate = Gate("claimed")
    poll = await held(relay, first, producer, gate)
    await relay(second, producer)
    gate.open()
    assert await poll == BATCH_ROWS
    await drain(relay, second, producer)
    assert damage(await compare(second, kafka, topic)) == found


@pytest.mark.parametrize(
    ("relay", "found"),
    [
        pytest.param(locks_slots_first, {"out_of_order": 1}, id="broken"),
        pytest.param(cuts_keys_at_locked_rows, {}, id="mended"),
    ],
)
async def test_row_that_a_stranger_had_locked_while_its_followers_went_is_out_of_order(
    relay: Relay, found: dict[str, int], outbox_database: Database, kafka: Kafka, producer: AIOKafkaProducer
) -> None:
    topic = await new_topic(kafka, 1)
    relays, strangers = await outbox_database.connect(), await outbox_database.connect()
    ids = await insert(relays, topic, ("a", b"1"), ("a", b"2"), ("a", b"3"), ("b", b"4"))
    async with strangers.transaction():
        await strangers.execute("SELECT FROM outbox WHERE id = $1 FOR KEY SHARE", ids[1])
        published = await relay(relays, producer)
    assert published == (3 if found else 2), "the other key flows"
    await drain(relay, relays, producer)
    assert damage(await compare(relays, kafka, topic)) == found


@pytest.mark.parametrize(
    ("relay", "found"),
    [
        pytest.param(reads_on_from_a_cursor, {"lost": 1}, id="broken"),
        pytest.param(reads_on_behind_a_fence, {}, id="mended"),
    ],
)
async def test_row_that_was_committed_after_a_cursor_had_passed_its_id_is_lost(
    relay: Relay, found: dict[str, int], outbox_database: Database, kafka: Kafka, producer: AIOKafkaProducer
) -> None:
    topic = await new_topic(kafka, 1)
    relays, late, early = [await outbox_database.connect() for _ in range(3)]
    await relays.execute(broken_relays.CURSOR)
    async with late.transaction():
        await insert(late, topic, ("late", b"1"))
        await insert(early, topic, ("early", b"2"), ("early", b"3"))
        await relay(relays, producer)
    await insert(early, topic, ("early", b"4"))
    published = [record async for record in read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)]
    assert len(published) == (2 if found else 0), "nothing behind the fence goes before the late one"

    async def to_the_last() -> bool:
        await relay(relays, producer)
        return bool(await relays.fetchval("SELECT max(outbox.id) = cursor.id FROM outbox, cursor GROUP BY cursor.id"))

    await eventually(to_the_last, "the cursor is at the last row")
    assert damage(await compare(relays, kafka, topic)) == found


@pytest.mark.parametrize(
    ("relay", "found"),
    [
        pytest.param(puts_refused_rows_off, {"out_of_order": 1}, id="broken"),
        pytest.param(puts_keys_of_refused_rows_off, {}, id="mended"),
    ],
)
async def test_row_that_was_refused_and_tried_again_behind_its_followers_is_out_of_order(
    relay: Relay, found: dict[str, int], outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 1, {"max.message.bytes": "1000"})
    connection = await outbox_database.connect()
    await insert(connection, topic, ("a", b"1"), ("a", b"2" * 2_000), ("a", b"3"), ("b", b"4"))
    # Not idempotent: after a refusal aiokafka's idempotent producer sends nothing to that partition any more.
    async with connected(kafka.bootstrap_servers) as producer:
        assert await relay(connection, producer) == (3 if found else 2), "the other key flows"
        await allow_larger_messages(kafka, topic)
        await drain(relay, connection, producer)
    assert damage(await compare(connection, kafka, topic)) == found


async def allow_larger_messages(kafka: Kafka, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        resource = ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": "100000"})
        (response,) = await admin.alter_configs([resource])
        assert response.resources[0][0] == 0
    finally:
        await admin.close()


class Producers:
    """The first goes through a proxy, the next straight to Kafka; none is there any more when it ends."""

    def __init__(self, kafka: Kafka, proxy: KafkaProxy, **settings: Any) -> None:
        self._addresses = iter([proxy.address, kafka.bootstrap_servers])
        self._settings = settings
        self._started: list[Producer] = []

    async def connect(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(bootstrap_servers=next(self._addresses), acks="all", **self._settings)
        await producer.start()
        self._started.append(Producer(producer, connect_timeout_seconds=SECONDS))
        return producer

    async def __aenter__(self) -> Producers:
        return self

    async def __aexit__(self, *_: object) -> None:
        for producer in self._started:
            await producer.abandon()


#: Two of them don't fit into one of aiokafka's batches, which take 16 KB.
LARGE = b"x" * 10_000


async def records_in(kafka: Kafka, topic: str) -> int:
    reading = read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)
    return len([record async for record in reading])


async def sends_a_batch(relay: LeavesProducers, connection: asyncpg.Connection, proxy: KafkaProxy) -> asyncio.Task[int]:
    """A poll whose first batch is with the proxy."""
    before = len(proxy.of(PRODUCE))
    poll = asyncio.ensure_future(relay.poll(connection))
    await eventually(lambda: len(proxy.of(PRODUCE)) > before, "a batch is sent")
    return poll


async def deadline_passes(relay: LeavesProducers, poll: asyncio.Task[int]) -> None:
    relay.deadline.reschedule(asyncio.get_running_loop().time())
    assert await poll == 0


@pytest.mark.parametrize(
    ("make_relay", "found"),
    [
        pytest.param(LeavesProducers, {"duplicates": 2}, id="broken"),
        pytest.param(CutsProducersOff, {}, id="mended"),
    ],
)
async def test_rows_that_an_abandoned_producer_sends_behind_the_new_one_are_duplicates(
    make_relay: type[LeavesProducers], found: dict[str, int], outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 1)
    connection = await outbox_database.connect()
    async with (
        KafkaProxy(kafka.bootstrap_servers) as proxy,
        Producers(kafka, proxy, enable_idempotence=True) as producers,
    ):
        relay = make_relay(producers.connect)
        await insert(connection, topic, ("a", b"1"))
        assert await relay.poll(connection) == 1
        await insert(connection, topic, ("a", LARGE), ("a", LARGE))
        proxy.stand_still()
        await deadline_passes(relay, await sends_a_batch(relay, connection, proxy))
        assert await relay.poll(connection) == 2
        # The network works again; what it was carrying is gone.
        await proxy.refuse()
        proxy.flow()
        if found:
            await eventually(lambda: all_sent(kafka, topic, 5), "the abandoned producer has sent its rows")
    assert damage(await compare(connection, kafka, topic)) == found


async def all_sent(kafka: Kafka, topic: str, records: int) -> bool:
    return await records_in(kafka, topic) == records


@pytest.mark.parametrize(
    ("make_relay", "found"),
    [
        pytest.param(LeavesProducers, {"duplicates": 1, "out_of_order": 1}, id="broken"),
        pytest.param(CutsProducersOff, {}, id="mended"),
    ],
)
async def test_row_that_an_abandoned_producer_sends_before_the_new_one_sends_those_ahead_of_it_is_out_of_order(
    make_relay: type[LeavesProducers], found: dict[str, int], outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 1)
    connection = await outbox_database.connect()
    async with (
        KafkaProxy(kafka.bootstrap_servers) as proxy,
        # As aiokafka makes them by default: not idempotent, so that a batch is given up when its time is over.
        Producers(kafka, proxy, request_timeout_ms=2_000) as producers,
    ):
        relay = make_relay(producers.connect)
        await insert(connection, topic, ("a", b"1"))
        assert await relay.poll(connection) == 1
        await insert(connection, topic, ("a", LARGE), ("a", LARGE))
        proxy.swallowed.add(PRODUCE)
        poll = await sends_a_batch(relay, connection, proxy)
        proxy.swallowed.clear()
        await deadline_passes(relay, poll)
        if found:
            await eventually(lambda: all_sent(kafka, topic, 2), "the abandoned producer has sent the last row")
        assert await relay.poll(connection) == 2
    assert damage(await compare(connection, kafka, topic)) == found


@pytest.mark.parametrize(
    ("place", "found"),
    [
        pytest.param(publishes_inside_the_transaction, {"invented": 1}, id="broken"),
        pytest.param(publishes_after_the_transaction, {}, id="mended"),
    ],
)
async def test_row_that_was_published_before_its_transaction_was_refused_at_commit_is_invented(
    place: Callable[[Callable[[], Awaitable[None]], asyncpg.Connection, AIOKafkaProducer], Awaitable[None]],
    found: dict[str, int],
    outbox_database: Database,
    kafka: Kafka,
    producer: AIOKafkaProducer,
) -> None:
    topic = await new_topic(kafka, 1)
    connection = await outbox_database.connect()
    await connection.execute("CREATE TABLE orders (number int UNIQUE DEFERRABLE INITIALLY DEFERRED)")

    async def write() -> None:
        await insert(connection, topic, ("a", b"order 1"))
        await connection.execute("INSERT INTO orders VALUES (1)")

    await place(write, connection, producer)
    with pytest.raises(asyncpg.UniqueViolationError):
        await place(write, connection, producer)
    report = await compare(connection, kafka, topic)
    assert report.committed == 1
    assert damage(report) == found


@pytest.mark.parametrize(
    ("relay", "broken"),
    [pytest.param(partitions_by_crc32, True, id="broken"), pytest.param(publishes_then_marks, False, id="mended")],
)
async def test_keys_in_partitions_that_another_hash_chose_are_misplaced(
    relay: Relay, broken: bool, outbox_database: Database, kafka: Kafka, producer: AIOKafkaProducer
) -> None:
    topic = await new_topic(kafka, 3)
    connection = await outbox_database.connect()
    keys = [f"key-{n}" for n in range(9)]
    await insert(connection, topic, *[(key, b"1") for key in keys], *[(key, b"2") for key in keys])
    await drain(relay, connection, producer)
    elsewhere = [
        key for key in keys if partition_for(key.encode(), 3) != broken_relays.crc32_partition(key.encode(), 3)
    ]
    assert 0 < len(elsewhere) < len(keys)
    assert damage(await compare(connection, kafka, topic)) == ({"misplaced": len(elsewhere)} if broken else {})


@pytest.mark.parametrize(
    ("relay", "found"),
    [
        pytest.param(reencodes_json, {"corrupted": 4}, id="broken"),
        pytest.param(publishes_then_marks, {}, id="mended"),
    ],
)
async def test_payloads_that_were_decoded_and_encoded_again_are_corrupted(
    relay: Relay, found: dict[str, int], outbox_database: Database, kafka: Kafka, producer: AIOKafkaProducer
) -> None:
    topic = await new_topic(kafka, 1)
    connection = await outbox_database.connect()
    unchanged = json.dumps({"order": 1, "lines": []}).encode()
    changed = [b'{"order":1}', b'{"total": 12.30}', b'{"n": 1, "n": 2}', '{"name": "Ada \u00dc"}'.encode()]
    await insert(connection, topic, *[("a", payload) for payload in (unchanged, *changed)])
    await drain(relay, connection, producer)
    assert damage(await compare(connection, kafka, topic)) == found
