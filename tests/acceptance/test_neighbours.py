"""Many rows that wait at once: they hold up their own keys or topic, and their neighbours go on."""

from __future__ import annotations

import asyncpg

from outbox_relay.servers import Kafka
from tests.acceptance.relays import new_topic, relay_process
from tests.conftest import Database
from tests.waiting import eventually

GOOD = 64


async def insert(connection: asyncpg.Connection, topic: str, rows: int, *, keys: bool) -> None:
    await connection.execute(
        """INSERT INTO outbox (topic, key, payload)
        SELECT $1, CASE WHEN $3 THEN 'k' || n END, 'x' FROM generate_series(1, $2::int) AS n""",
        topic,
        rows,
        keys,
    )


async def sent(connection: asyncpg.Connection, topic: str) -> int:
    count: int = await connection.fetchval(
        "SELECT count(*) FROM outbox WHERE topic = $1 AND sent_at IS NOT NULL", topic
    )
    return count


async def test_thousands_of_refused_rows_hold_up_no_other_topic(outbox_database: Database, kafka: Kafka) -> None:
    """A compacted topic takes no record without a key, and each such row is found by sending it alone."""
    bad, good = await new_topic(kafka, 1, {"cleanup.policy": "compact"}), await new_topic(kafka, 6)
    connection = await outbox_database.connect()
    await insert(connection, bad, 20_000, keys=False)
    await insert(connection, good, GOOD, keys=True)

    async def all_good() -> bool:
        return await sent(connection, good) == GOOD

    with relay_process(outbox_database.url, kafka.bootstrap_servers) as relay:
        await eventually(all_good, "the other topic's rows are sent", 60.0)
        refused = relay.events("topic.refused", topic=bad)
        assert refused
        assert await relay.stop() == 0
        # Twenty in half a minute, of those of a kind.
        assert len(relay.events(level="warning")) < 300
    assert await sent(connection, bad) == 0


async def test_thousands_of_locked_keys_hold_up_no_other_key(outbox_database: Database, kafka: Kafka) -> None:
    locked, good = await new_topic(kafka, 6), await new_topic(kafka, 6)
    connection = await outbox_database.connect()
    await insert(connection, locked, 50_000, keys=True)
    stranger = await outbox_database.connect()
    await stranger.execute("BEGIN")
    await stranger.execute("SELECT FROM outbox FOR UPDATE")
    await insert(connection, good, GOOD, keys=True)

    async def all_good() -> bool:
        return await sent(connection, good) == GOOD

    with relay_process(outbox_database.url, kafka.bootstrap_servers) as relay:
        await eventually(all_good, "the other keys' rows are sent", 60.0)
        await stranger.execute("ROLLBACK")
        assert await relay.stop() == 0


async def test_what_postgresql_says_of_a_row_is_not_logged(outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka, 1)
    connection = await outbox_database.connect()
    await connection.execute(
        "INSERT INTO outbox (topic, key, payload) VALUES ($1, 'key-5b0d', convert_to('payload-91aa', 'UTF8'))", topic
    )
    # Who marks the row writes it, and PostgreSQL shows it in the error's DETAIL.
    await connection.execute("ALTER TABLE outbox ADD CONSTRAINT strange CHECK (key <> 'key-5b0d') NOT VALID")
    with relay_process(outbox_database.url, kafka.bootstrap_servers) as relay:
        assert "strange" in (await relay.event("row.unmarkable"))["reason"]
        await connection.execute("ALTER TABLE outbox DROP CONSTRAINT strange")
        await relay.event("claim.settled")
        assert await relay.stop() == 0
        output = relay.output()
    assert "key-5b0d" not in output
    assert "payload-91aa" not in output
    assert b"payload-91aa".hex() not in output
