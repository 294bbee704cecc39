"""Tables that were there before the relay: Debezium's outbox through the mapping, and names that need quotes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner

from outbox_relay import cli, tables
from outbox_relay.checker import Seen
from outbox_relay.servers import Kafka
from outbox_relay.topic_reader import read_topics
from tests.acceptance.relays import SECONDS, drained, new_topic, relay_process
from tests.conftest import Database

#: As Debezium's outbox event router asks for it.
DEBEZIUM = """
CREATE SCHEMA "Order Service";
CREATE TABLE "Order Service".outboxevent (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    aggregatetype varchar(255) NOT NULL,
    aggregateid varchar(255) NOT NULL,
    type varchar(255) NOT NULL,
    payload {payload_type}
)
"""

TABLE = {"schema": "Order Service", "name": "outboxevent", "topic": "{topic}.{{aggregatetype}}"}
COLUMNS = {"id": "seq", "event_id": "id", "key": "aggregateid", "headers": "", "created_at": ""}


def write_config(path: Path, url: str, topic: str, **columns: str) -> Path:
    lines = [
        f"[database]\nurl = {json.dumps(url)}",
        '[kafka]\nbootstrap_servers = ["localhost:1"]',
        "[table]",
        *(f"{key} = {json.dumps(value.format(topic=topic))}" for key, value in TABLE.items()),
        "[table.columns]",
        *(f"{key} = {json.dumps(value)}" for key, value in {**COLUMNS, **columns}.items()),
    ]
    path.write_text("\n".join(lines))
    return path


async def adopt(connection: asyncpg.Connection, path: Path, *arguments: str) -> None:
    result = CliRunner().invoke(cli.main, ["schema", "adopt", "--config", str(path), *arguments])
    assert result.exit_code == 0, result.output
    await connection.execute(result.output)


def table_of(topic: str) -> dict[str, Any]:
    return {
        "table": {key: value.format(topic=topic) for key, value in TABLE.items()},
        "table.columns": COLUMNS,
    }


async def read(kafka: Kafka, topic: str) -> list[Seen]:
    return [seen async for seen in read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)]


PAYLOADS = {
    "bytea": (r"'\x00ff7b'", b"\x00\xff{"),
    "text": ("' {\"a\":1}  ü '", ' {"a":1}  ü '.encode()),
    "json": (
        '\'{"b": 12345678901234567890.10, "a":1, "a":2, "u":"\\ud800"}\'',
        b'{"b": 12345678901234567890.10, "a":1, "a":2, "u":"\\ud800"}',
    ),
    "jsonb": ('\'{"b":1.10,   "a":1}\'', b'{"a": 1, "b": 1.10}'),
}


@pytest.mark.parametrize("payload_type", PAYLOADS)
async def test_debezium_s_table_is_relayed_through_the_mapping(
    payload_type: str, database: Database, kafka: Kafka, tmp_path: Path
) -> None:
    topic = await new_topic(kafka, 1)
    await kafka.create_topic(f"{topic}.order", 1)
    connection = await database.connect()
    await connection.execute(DEBEZIUM.format(payload_type=payload_type))
    literal, payload = PAYLOADS[payload_type]
    insert = f"""
        INSERT INTO "Order Service".outboxevent (aggregatetype, aggregateid, type, payload)
        VALUES ('order', '42', 'OrderPlaced', {literal}), ('order', '42', 'OrderPaid', {literal})"""
    await connection.execute(insert)
    await adopt(connection, write_config(tmp_path / "c.toml", database.url, topic), "--order-by", "type")
    await connection.execute(insert)
    with relay_process(database.url, kafka.bootstrap_servers, "--once", tables=table_of(topic)) as relay:
        assert await relay.exit_code() == 0
    records = await read(kafka, f"{topic}.order")
    rows = await connection.fetch('SELECT * FROM "Order Service".outboxevent ORDER BY seq')
    # The relay's own tables came with it, and autovacuum that keeps up.
    options = await connection.fetchval("SELECT reloptions FROM pg_class WHERE relname = 'outboxevent'")
    assert options == [f"{name}={value}" for name, value in tables.OUTBOX_STORAGE.items()]
    own = "SELECT count(*) FROM pg_tables WHERE schemaname = 'Order Service' AND tablename LIKE 'outbox\\_%'"
    assert await connection.fetchval(own) == len(tables.metadata.tables) - 1
    # What was there is ordered by the column that was named, and what came later follows.
    assert [row["type"] for row in rows] == ["OrderPaid", "OrderPlaced", "OrderPlaced", "OrderPaid"]
    assert all(row["sent_at"] is not None for row in rows)
    assert [(record.key, record.value) for record in records] == [(b"42", payload)] * 4
    assert [dict(record.headers) for record in records] == [
        {"id": str(row["id"]).encode(), "type": row["type"].encode(), "outbox-id": str(row["seq"]).encode()}
        for row in rows
    ]


async def test_rows_of_which_no_order_is_known_are_not_adopted(database: Database, tmp_path: Path) -> None:
    connection = await database.connect()
    await connection.execute(DEBEZIUM.format(payload_type="jsonb"))
    config = write_config(tmp_path / "c.toml", database.url, "t")
    insert = """INSERT INTO "Order Service".outboxevent (aggregatetype, aggregateid, type) VALUES ('o', '1', 't')"""
    await connection.execute(insert)
    with pytest.raises(asyncpg.RaiseError, match="the table has rows: drain it first, or say with --order-by"):
        await adopt(connection, config)
    await connection.execute('ROLLBACK; RESET search_path; DELETE FROM "Order Service".outboxevent')
    await adopt(connection, config)
    await connection.execute(insert)
    assert await connection.fetchval('SELECT seq FROM "Order Service".outboxevent') == 1


async def test_a_row_whose_topic_is_null_waits_and_says_so(database: Database, kafka: Kafka, tmp_path: Path) -> None:
    topic = await new_topic(kafka, 1)
    await kafka.create_topic(f"{topic}.order", 1)
    connection = await database.connect()
    await connection.execute(
        DEBEZIUM.format(payload_type="jsonb").replace("aggregatetype varchar(255) NOT NULL", "aggregatetype text")
    )
    await adopt(connection, write_config(tmp_path / "c.toml", database.url, topic))
    await connection.execute(
        """INSERT INTO "Order Service".outboxevent (aggregatetype, aggregateid, type, payload)
        VALUES (NULL, '1', 't', '1'), ('order', '1', 't', '2')"""
    )
    with relay_process(database.url, kafka.bootstrap_servers, tables=table_of(topic)) as relay:
        refused = await relay.event("topic.refused")
        assert (refused["topic"], refused["error"]) == (f"{topic}.", "UnknownTopicOrPartitionError")
        await relay.event("claim.settled")
        assert [record.value for record in await read(kafka, f"{topic}.order")] == [b"2"]


async def test_topics_are_confined_to_those_allowed(outbox_database: Database, kafka: Kafka) -> None:
    allowed, prefixed, other = [await new_topic(kafka, 1) for _ in range(3)]
    connection = await outbox_database.connect()
    await connection.executemany(
        "INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', 'x')", [(other,), (allowed,), (prefixed,)]
    )
    settings = {"allowed_topics": [allowed, f"{prefixed[:-3]}*"], "publish_warn_seconds": 5.0}
    with relay_process(outbox_database.url, kafka.bootstrap_servers, kafka=settings) as relay:
        refused = await relay.event("topic.refused")
        assert (refused["topic"], refused["error"]) == (other, "TopicNotAllowed")
        assert "kafka.allowed_topics" in refused["reason"]
        await relay.event("claim.settled")
        assert await relay.stop() == 0
    assert [len(await read(kafka, topic)) for topic in (allowed, prefixed, other)] == [1, 1, 0]
    # Once it is allowed, nothing is lost.
    with relay_process(outbox_database.url, kafka.bootstrap_servers) as relay:
        await drained(connection)
    assert len(await read(kafka, other)) == 1
