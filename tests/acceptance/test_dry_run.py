"""``outbox-relay run --dry-run`` says what would be published, and leaves everything as it was."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition

from outbox_relay.servers import Kafka
from tests.acceptance.relays import SLOTS, new_topic, owned, relay_process
from tests.conftest import Database
from tests.waiting import eventually


def config(directory: Path, url: str, bootstrap_servers: str, more: str = "") -> Path:
    path = directory / "config.toml"
    path.write_text(f'[database]\nurl = "{url}"\n[kafka]\nbootstrap_servers = ["{bootstrap_servers}"]\n{more}')
    return path


async def dry_run(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outbox_relay", "run", "--dry-run", "--config", str(path)]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False, timeout=60)


async def everything(connection: asyncpg.Connection, kafka: Kafka, topic: str) -> list[Any]:
    """The outbox and its slots with every version of every row, and where the topic ends."""
    tables = [
        await connection.fetch(f"SELECT *, ctid, xmin, xmax FROM {table} ORDER BY 1")
        for table in ("outbox", "outbox_slot")
    ]
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers)
    await consumer.start()
    try:
        ends = await consumer.end_offsets([TopicPartition(topic, number) for number in range(2)])
    finally:
        await consumer.stop()
    return [*tables, ends]


async def test_it_says_what_is_next_and_touches_nothing(
    outbox_database: Database, kafka: Kafka, tmp_path: Path
) -> None:
    topic = await new_topic(kafka, 2)
    connection = await outbox_database.connect()
    await connection.executemany(
        "INSERT INTO outbox (id, topic, key, payload) VALUES ($1, $2, 'k', $3)",
        [(1, topic, b"12345"), (2, "no-such-topic", b""), (3, "private", b""), (4, topic, b"1234567")],
    )
    await connection.execute(
        "INSERT INTO outbox (id, topic, key, payload, sent_at) VALUES (5, $1, 'k', '', now())", topic
    )
    path = config(
        tmp_path, outbox_database.url, kafka.bootstrap_servers, f'allowed_topics = ["{topic}", "no-such-topic"]\n'
    )
    before = await everything(connection, kafka, topic)
    done = await dry_run(path)
    assert await everything(connection, kafka, topic) == before
    assert (done.returncode, done.stderr) == (0, "")
    heading, _, *rows = done.stdout.splitlines()
    assert heading.split() == ["TOPIC", "ROWS", "FIRST", "ID", "LAST", "ID", "BYTES", "LARGEST", "WOULD", "BE"]
    lines = [row.split(maxsplit=6) for row in rows]
    assert [line[:-1] for line in lines] == [
        [topic, "2", "1", "4", "14", "8"],
        ["no-such-topic", "1", "2", "2", "1", "1"],
        ["private", "1", "3", "3", "1", "1"],
    ]
    said = [line[-1] for line in lines]
    assert said[0] == "published"
    assert said[1].startswith("held: UnknownTopicOrPartitionError, create the topic")
    assert said[2] == "held: TopicNotAllowed, add it to kafka.allowed_topics, if it is meant, and restart the relay"


async def test_a_running_relay_keeps_its_slots(outbox_database: Database, kafka: Kafka, tmp_path: Path) -> None:
    topic = await new_topic(kafka, 2)
    connection = await outbox_database.connect()
    with relay_process(outbox_database.url, kafka.bootstrap_servers) as relay:
        await eventually(lambda: owned(relay) == SLOTS, "it has all slots")
        slots = await connection.fetch("SELECT * FROM outbox_slot ORDER BY slot")
        done = await dry_run(config(tmp_path, outbox_database.url, kafka.bootstrap_servers))
        assert (done.returncode, done.stdout, done.stderr) == (0, "Nothing waits.\n", "")
        await connection.execute("INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', '')", topic)
        await relay.event("claim.settled")
        assert await connection.fetch("SELECT * FROM outbox_slot ORDER BY slot") == slots
        assert await connection.fetchval("SELECT count(*) FROM outbox_relay") == 1


async def test_it_reads_no_more_than_a_batch(outbox_database: Database, kafka: Kafka, tmp_path: Path) -> None:
    topic = await new_topic(kafka, 2)
    connection = await outbox_database.connect()
    await connection.execute(
        "INSERT INTO outbox (topic, key, payload) SELECT $1, 'k' || n, '' FROM generate_series(1, 5000) AS n", topic
    )
    more = "[relay]\nbatch_rows = 640\n"
    done = await dry_run(config(tmp_path, outbox_database.url, kafka.bootstrap_servers, more))
    assert done.stdout.splitlines()[2].split()[1] == "640"


async def test_servers_are_not_waited_for(outbox_database: Database, kafka: Kafka, tmp_path: Path) -> None:
    for url, servers, said in (
        (outbox_database.url, "127.0.0.1:1", "connect to Kafka: no broker answers at 127.0.0.1:1"),
        ("postgresql://127.0.0.1:1/d", kafka.bootstrap_servers, "connect to the database: "),
    ):
        done = await dry_run(config(tmp_path, url, servers))
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (69, "", 1)
        assert done.stderr.startswith(said)
