"""A row that no broker takes, among a thousand others, from the table to the topics and the operator's command."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer
from click.testing import CliRunner

from outbox_relay import cli, outbox
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka
from tests.acceptance.parked import broken_rules, states
from tests.acceptance.relays import RelayProcess, compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.kafka_admin import Admin
from tests.waiting import eventually

KEYS = 20
POISON = 487
SOON: Mapping[str, Any] = {"retry_first_seconds": 0.1, "retry_ceiling_seconds": 0.2, "max_attempts": 3}


async def write(connection: asyncpg.Connection, topic: str) -> tuple[int, list[int]]:
    """A thousand rows of 20 keys, one of them too large: its id, and those of its followers."""
    bodies = [b"x" * (100_000 if n == POISON else 300) for n in range(1000)]
    async with connection.transaction():
        await outbox.add_async(connection, *(Message(topic, body, key=f"k{n % KEYS}") for n, body in enumerate(bodies)))
    ids = [row["id"] for row in await connection.fetch("SELECT id FROM outbox ORDER BY id")]
    return ids[POISON], ids[POISON + KEYS :: KEYS]


async def command(relay: RelayProcess, *arguments: str) -> str:
    """One command line, as an operator gives it."""
    config = str(relay.directory / "config.toml")
    result = await asyncio.to_thread(CliRunner().invoke, cli.main, [*arguments, "--config", config])
    assert result.exit_code == 0, result.output
    return result.output


async def test_it_dies_alone_its_key_waits_and_after_a_retry_its_followers_go_in_order(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 6, {"max.message.bytes": "60000"})
    connection = await outbox_database.connect()
    with relay_process(
        outbox_database.url, kafka.bootstrap_servers, kafka={"batch_bytes": 50_000}, batch_rows=300, **SOON
    ) as relay:
        poison, followers = await write(connection, topic)
        dead = await relay.event("row.dead", id=poison)
        assert (dead["attempts"], dead["error"]) == (3, "MessageSizeTooLargeError")
        waiting = {poison: "dead"} | dict.fromkeys(followers, "blocked")

        async def all_but_these() -> bool:
            unsent = await connection.fetch("SELECT id FROM outbox WHERE sent_at IS NULL")
            return {row["id"] for row in unsent} == waiting.keys() and await states(connection) == waiting

        await eventually(all_but_these, "all other keys arrive, and its own waits")
        assert await broken_rules(connection) == {}
        assert str(poison) in await command(relay, "dead", "list")
        assert f"waits: {poison}, which is dead" in await command(relay, "explain", str(followers[0]))
        await Admin(kafka.bootstrap_servers).configure(topic, {"max.message.bytes": "200000"})
        await command(relay, "dead", "retry", str(poison), "--yes")
        await drained(connection)
        assert await relay.stop() == 0
    assert await states(connection) == {}
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


@pytest.mark.parametrize("dead_letter_topic", [None, "{topic}.dead"])
async def test_where_followers_skip_it_dies_alone(
    dead_letter_topic: str | None, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 6, {"max.message.bytes": "60000"})
    letters = await new_topic(kafka, 1, {"max.message.bytes": "200000"}, name=f"{topic}.dead")
    connection = await outbox_database.connect()
    settings: dict[str, Any] = {} if dead_letter_topic is None else {"dead_letter_topic": dead_letter_topic}
    with relay_process(
        outbox_database.url,
        kafka.bootstrap_servers,
        kafka={"batch_bytes": 50_000},
        batch_rows=300,
        followers_of={f"{topic[:6]}*": "skip"},
        **SOON,
        **settings,
    ) as relay:
        poison, _ = await write(connection, topic)
        await relay.event("row.dead", id=poison)

        async def all_but_it() -> bool:
            unsent = await connection.fetch("SELECT id FROM outbox WHERE sent_at IS NULL")
            return [row["id"] for row in unsent] == [poison]

        await eventually(all_but_it, "its followers go on")
        assert await states(connection) == {poison: "dead"}
        assert await relay.stop() == 0
    if dead_letter_topic is not None:
        event_id = await connection.fetchval("SELECT event_id::text FROM outbox WHERE id = $1", poison)
        async with AIOKafkaConsumer(
            letters, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
        ) as consumer:
            letter = await asyncio.wait_for(consumer.getone(), 30)
        headers = {name: value.decode() for name, value in letter.headers}
        assert (letter.key, len(letter.value)) == (f"k{POISON % KEYS}".encode(), 100_000)
        assert (headers["id"], headers["dead-letter-of"], headers["dead-letter-error"]) == (
            event_id,
            str(poison),
            "MessageSizeTooLargeError",
        )
