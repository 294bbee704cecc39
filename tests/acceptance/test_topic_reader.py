from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from outbox_relay import topic_reader
from outbox_relay.checker import Committed, Seen
from outbox_relay.errors import CheckError
from outbox_relay.partitioner import partition_for
from outbox_relay.topic_reader import check_topics, read_topics
from tests.acceptance.relays import relay_process
from tests.conftest import Database

SECONDS = 30.0


class Kafka(Protocol):
    @property
    def bootstrap_servers(self) -> str: ...

    async def create_topic(self, name: str, *, partitions: int) -> None: ...


@asynccontextmanager
async def producer(bootstrap_servers: str, **settings: Any) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, acks="all", enable_idempotence=True, **settings)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def new_topic(kafka: Kafka, partitions: int) -> str:
    name = f"reader-{uuid4()}"
    await kafka.create_topic(name, partitions=partitions)
    return name


async def write(producer: AIOKafkaProducer, record: Seen) -> None:
    await producer.send_and_wait(
        record.topic,
        record.value,
        key=record.key,
        partition=record.partition,
        headers=list(record.headers),
    )


async def records_of(kafka: Kafka, *topics: str, **settings: Any) -> list[Seen]:
    reading = read_topics(kafka.bootstrap_servers, topics, deadline_seconds=SECONDS, **settings)
    return sorted([record async for record in reading], key=lambda r: (r.topic, r.partition, r.offset))


def record(topic: str, partition: int, offset: int, value: bytes | None = b"value") -> Seen:
    return Seen(topic, partition, offset, b"key", value, (("id", b"1"), ("nothing", None), ("id", b"\xff")))


async def test_every_record_of_every_partition_is_read_as_it_was_written(kafka: Kafka) -> None:
    topics = [await new_topic(kafka, 3), await new_topic(kafka, 1)]
    written = [
        replace(record(topics[0], 0, 0), key=None),
        replace(record(topics[0], 0, 1), key=b"", headers=()),
        record(topics[0], 2, 0, None),
        record(topics[0], 2, 1, b""),
        record(topics[0], 2, 2, b"\x00\xff"),
        record(topics[1], 0, 0),
    ]
    async with producer(kafka.bootstrap_servers) as sending:
        for each in written:
            await write(sending, each)
    order = {topic: place for place, topic in enumerate(sorted(topics))}
    assert await records_of(kafka, *topics) == sorted(written, key=lambda r: (order[r.topic], r.partition, r.offset))


async def test_topic_without_records_reads_as_empty(kafka: Kafka) -> None:
    assert await records_of(kafka, await new_topic(kafka, 2)) == []


async def test_reading_ends_where_the_topic_ended_when_it_began(kafka: Kafka) -> None:
    topic = await new_topic(kafka, 2)
    async with producer(kafka.bootstrap_servers) as sending:
        for partition in (0, 1):
            for offset in range(3):
                await write(sending, record(topic, partition, offset))
        read: list[tuple[int, int]] = []
        reading = read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)
        async for each in reading:
            if not read:
                for partition in (0, 1):
                    await write(sending, record(topic, partition, 3))
            read.append((each.partition, each.offset))
    assert sorted(read) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert len(await records_of(kafka, topic)) == 8


async def test_aborted_and_open_transactions_are_read_only_uncommitted(kafka: Kafka) -> None:
    topic = await new_topic(kafka, 1)
    async with producer(kafka.bootstrap_servers, transactional_id=f"reader-{uuid4()}") as sending:
        for value, end in ((b"committed", "commit"), (b"aborted", "abort"), (b"open", None)):
            await sending.begin_transaction()
            await sending.send_and_wait(topic, value, partition=0)
            if end == "commit":
                await sending.commit_transaction()
            elif end == "abort":
                await sending.abort_transaction()
        uncommitted = await records_of(kafka, topic, isolation="read_uncommitted")
        committed = await records_of(kafka, topic, isolation="read_committed")
        await sending.abort_transaction()
    assert [r.value for r in uncommitted] == [b"committed", b"aborted", b"open"]
    assert [r.value for r in committed] == [b"committed"]
    # Now the log ends in a transaction's marker, which is no record and mustn't be waited for.
    ended = await records_of(kafka, topic, isolation="read_uncommitted")
    assert [r.value for r in ended] == [b"committed", b"aborted", b"open"]


async def test_missing_topic_is_named_and_not_created(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_reader, "_TOPIC_SECONDS", 0.5)
    present, missing = await new_topic(kafka, 1), f"missing-{uuid4()}"
    with pytest.raises(CheckError, match=f"no topic {missing}; create it"):
        await records_of(kafka, present, missing)
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers)
    await consumer.start()
    try:
        topics = await consumer.topics()
    finally:
        await consumer.stop()
    assert present in topics
    assert missing not in topics


async def test_reading_that_stops_early_can_be_closed(kafka: Kafka) -> None:
    topic = await new_topic(kafka, 1)
    async with producer(kafka.bootstrap_servers) as sending:
        for offset in range(3):
            await write(sending, record(topic, 0, offset))
    reading = read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)
    async with aclosing(reading) as records:  # type: ignore[type-var]
        assert (await anext(records)).offset == 0


@asynccontextmanager
async def remover(kafka: Kafka) -> AsyncIterator[Callable[[str, int, int], Awaitable[None]]]:
    """Removes a partition's records below an offset, as retention does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()

    async def remove(topic: str, partition: int, before_offset: int) -> None:
        position = TopicPartition(topic, partition)
        assert await admin.delete_records({position: RecordsToDelete(before_offset)}) == {position: before_offset}

    try:
        yield remove
    finally:
        await admin.close()


async def test_reading_that_retention_overtakes_is_an_error_and_not_a_loss(kafka: Kafka) -> None:
    topic = await new_topic(kafka, 1)
    large = record(topic, 0, 0, b"x" * 500_000)  # more than a consumer fetches ahead
    async with producer(kafka.bootstrap_servers) as sending, remover(kafka) as remove:
        for _ in range(12):
            await write(sending, large)
        reading = read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)
        assert (await anext(reading)).offset == 0
        await remove(topic, 0, 11)
        with pytest.raises(CheckError, match=r"at \d+ of 12.*read again if retention.*OffsetOutOfRangeError"):
            _ = [each async for each in reading]


async def test_check_says_how_much_retention_had_removed_before_it(kafka: Kafka) -> None:
    topic = await new_topic(kafka, 2)
    ledger = [Committed(n, str(uuid4()), topic, b"key", b"value") for n in range(1, 6)]
    home = partition_for(b"key", 2)
    log = [written_as(row, home) for row in ledger]
    assert (await check_of(kafka, ledger, topic, log))["removed_offsets"] == 0
    async with remover(kafka) as remove:
        await remove(topic, home, 3)
        assert {k: v for k, v in (await check_of(kafka, ledger, topic, [])).items() if v} == {
            "records": 2,
            "removed_offsets": 3,
            "lost": 3,
        }
        await remove(topic, home, 5)
        emptied = await check_of(kafka, ledger, topic, [])
    assert (emptied["records"], emptied["removed_offsets"], emptied["lost"]) == (0, 5, 5)


async def test_check_refuses_a_ledger_with_rows_of_a_topic_that_is_not_read(kafka: Kafka) -> None:
    read, other = await new_topic(kafka, 1), await new_topic(kafka, 1)
    ledger = [Committed(n, str(uuid4()), topic, b"key", b"value") for n, topic in enumerate((read, other))]
    with pytest.raises(CheckError, match=f"topic {other}, which isn't read.*leave them out"):
        await check_of(kafka, ledger, read, [])


async def check_of(kafka: Kafka, ledger: list[Committed], topic: str, log: list[Seen]) -> dict[str, Any]:
    async with producer(kafka.bootstrap_servers) as sending:
        for each in log:
            await write(sending, each)
    report = await check_topics(ledger, kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)
    return {k: v for k, v in report.as_dict().items() if k not in ("examples", "committed", "published")}


def written_as(row: Committed, partition: int) -> Seen:
    headers = (
        ("id", row.event_id.encode()),
        ("outbox-id", str(row.outbox_id).encode()),
        ("created_at", b"2024-01-01T00:00:00Z"),
    )
    return Seen(row.topic, partition, 0, row.key, row.value, headers)


async def test_check_of_a_topic_finds_it_sound_or_says_what_is_wrong(kafka: Kafka) -> None:
    topic = await new_topic(kafka, 4)
    ledger = [
        Committed(n, str(uuid4()), topic, b"key-%d" % (n % 7), None if n % 5 == 0 else b"%d" % n) for n in range(1, 41)
    ]
    correct = [written_as(row, partition_for(row.key or b"", 4)) for row in ledger]
    nothing = dict.fromkeys(("lost", "invented", "duplicates", "out_of_order", "corrupted", "misplaced"), 0)
    everything = {"records": 40, "removed_offsets": 0}
    assert await check_of(kafka, ledger, topic, correct) == {"sound": True, **everything, **nothing}

    late = replace(ledger[0], outbox_id=0, event_id=str(uuid4()))
    missing = replace(late, outbox_id=50, event_id=str(uuid4()))
    elsewhere = replace(late, outbox_id=51, event_id=str(uuid4()))
    home = correct[0].partition
    damaged = [
        written_as(late, home),
        correct[1],
        replace(correct[2], headers=()),
        replace(correct[3], value=b"other"),
        written_as(elsewhere, (home + 1) % 4),
    ]
    assert await check_of(kafka, [*ledger, late, missing, elsewhere], topic, damaged) == {
        "sound": False,
        "records": 45,
        "removed_offsets": 0,
        "lost": 1,
        "invented": 1,
        "duplicates": 2,
        "out_of_order": 1,
        "corrupted": 1,
        "misplaced": 1,
    }


async def test_topic_of_librdkafkas_mock_cluster_is_read_without_checking_crcs() -> None:
    confluent_kafka = pytest.importorskip("confluent_kafka")
    mock = confluent_kafka.Producer({"bootstrap.servers": "unused", "test.mock.num.brokers": 1})
    brokers = mock.list_topics(timeout=SECONDS).brokers
    (address,) = [f"{broker.host}:{broker.port}" for broker in brokers.values()]
    for value in (b"one", b"two"):
        mock.produce("mocked", value, key=b"key", partition=0, headers=[("id", b"1")])
    assert mock.flush(SECONDS) == 0
    reading = read_topics(address, ["mocked"], deadline_seconds=SECONDS, check_crcs=False)
    assert [(r.offset, r.key, r.value, r.headers) async for r in reading] == [
        (0, b"key", b"one", (("id", b"1"),)),
        (1, b"key", b"two", (("id", b"1"),)),
    ]


GUIDE = Path(__file__).parents[2] / "docs" / "checker.md"

INSERT = """-- insert
INSERT INTO outbox (topic, key, type, payload) VALUES ($1, $2, 'OrderPlaced', $3)"""


async def run_example(database: Database, kafka: Kafka) -> tuple[int | None, list[str]]:
    """The exit code and the lines of the guide's example."""
    example = re.search(r"<!-- tested: check.py -->\n```python\n(.*?)```\n", GUIDE.read_text(), re.DOTALL)
    assert example is not None
    environment = {
        **os.environ,
        "DATABASE_URL": database.url,
        "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", example[1], env=environment, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode().splitlines()


async def test_example_of_the_guide_checks_what_a_relay_published(outbox_database: Database, kafka: Kafka) -> None:
    topics = [await new_topic(kafka, 3), await new_topic(kafka, 1)]
    connection = await outbox_database.connect()
    await connection.executemany(INSERT, [(topics[n % 2], f"key-{n % 7}", b"%d" % n) for n in range(40)])
    with relay_process(outbox_database.url, kafka.bootstrap_servers, "--once") as relay:
        assert await relay.exit_code() == 0
    code, lines = await run_example(outbox_database, kafka)
    assert (code, lines[0]) == (0, "sound: 40 committed, 40 published, 40 records")
    await connection.execute(INSERT, topics[0], "key", b"")
    code, lines = await run_example(outbox_database, kafka)
    assert (code, lines[:2]) == (1, ["DAMAGED: 41 committed, 40 published, 40 records", "lost                  1"])
