"""Rows that other sessions have locked: what is behind them waits, and nothing else does."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from outbox_relay import outbox
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka, KafkaServer
from tests.acceptance.relays import compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.waiting import eventually

#: How another session comes to lock an outbox row.
LOCKS = {
    "an open UPDATE": "UPDATE outbox SET type = 'Corrected' WHERE id = $1",
    "a foreign key": "INSERT INTO receipt VALUES ($1)",
    "a SELECT FOR SHARE": "SELECT FROM outbox WHERE id = $1 FOR SHARE",
}


@pytest.fixture(params=LOCKS)
def lock(request: pytest.FixtureRequest) -> str:
    return LOCKS[request.param]


@contextlib.asynccontextmanager
async def locked(database: Database, lock: str, id_: int) -> AsyncIterator[None]:
    """Another session has the row locked until the block is left; then it commits."""
    stranger = await database.connect()
    await stranger.execute("CREATE TABLE IF NOT EXISTS receipt (outbox_id bigint REFERENCES outbox)")
    async with stranger.transaction():
        await stranger.execute(lock, id_)
        yield


@contextlib.contextmanager
def paused(kafka: Kafka) -> Iterator[None]:
    """Kafka answers nothing until the block is left."""
    if not isinstance(kafka.server, KafkaServer):
        pytest.skip("only a Kafka that was started for the tests can be paused")
    kafka.server.pause()
    try:
        yield
    finally:
        kafka.server.resume()


async def insert(connection: asyncpg.Connection, topic: str, *keys: str | None) -> list[int]:
    """One row for each key; their ids."""
    async with connection.transaction():
        await outbox.add_async(connection, *(Message(topic, {"for": key}, key=key) for key in keys))
        rows = await connection.fetch("SELECT id FROM outbox ORDER BY id DESC LIMIT $1", len(keys))
    return [row["id"] for row in reversed(rows)]


async def sent(connection: asyncpg.Connection, ids: list[int]) -> list[int]:
    """Which of these rows are marked."""
    rows = await connection.fetch("SELECT id FROM outbox WHERE id = ANY ($1) AND sent_at IS NOT NULL ORDER BY id", ids)
    return [row["id"] for row in rows]


async def all_sent(connection: asyncpg.Connection, ids: list[int]) -> None:
    async def are() -> bool:
        return await sent(connection, ids) == ids

    await eventually(are, f"rows {ids} are marked as sent")


async def test_a_row_locked_while_its_claim_is_in_flight_is_marked_later_and_not_repeated(
    lock: str, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    with relay_process(outbox_database.url, kafka.bootstrap_servers, claims_in_flight=1) as relay:
        await relay.event("slots.taken")
        async with contextlib.AsyncExitStack() as until_the_end:
            with paused(kafka):
                ids = await insert(connection, topic, "a", "b", "a", "c", "a", "b")
                await relay.event("claim.made", ids=ids)
                await until_the_end.enter_async_context(locked(outbox_database, lock, ids[2]))
            others = [id_ for id_ in ids if id_ != ids[2]]
            await all_sent(connection, others)
            # It was acknowledged, so what comes after it in its key needn't wait for the mark.
            for _ in range(3):
                await all_sent(connection, await insert(connection, topic, "a", "d"))
            assert await sent(connection, ids) == others
            postponed = relay.events("settle.postponed")
            assert {(event["rows"], event["first_id"]) for event in postponed} == {(1, ids[2])}
        await drained(connection)
        assert await relay.stop() == 0
        assert relay.ids("claim.made").count(ids[2]) == 1
    # The UPDATE came after the row was published, so it is the one thing that Kafka doesn't have.
    await connection.execute("UPDATE outbox SET type = NULL WHERE type = 'Corrected'")
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


async def test_behind_a_locked_row_its_key_waits_alone_and_then_goes_on_in_order(
    lock: str, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    ids = await insert(connection, topic, "a", "a", "b", "a", "c", "a", None)
    ahead, waiting = ids[0], [ids[1], ids[3], ids[5]]
    with relay_process(outbox_database.url, kafka.bootstrap_servers, batch_rows=3, start=False) as relay:
        async with locked(outbox_database, lock, waiting[0]):
            relay.start()
            await all_sent(connection, [ahead, ids[2], ids[4], ids[6]])
            for _ in range(5):
                later = await insert(connection, topic, "a", "b", "c", None)
                waiting.append(later[0])
                await all_sent(connection, later[1:])
            assert await sent(connection, waiting) == []
            assert relay.events("key.locked", id=waiting[0], topic=topic)
        await drained(connection)
        assert await relay.stop() == 0
        assert [id_ for id_ in relay.ids("claim.settled") if id_ in waiting] == waiting
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


async def test_once_leaves_what_is_locked_or_refused_drains_the_rest_and_exits_0(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, config={"max.message.bytes": "2000"})
    connection = await outbox_database.connect()
    async with connection.transaction():
        await outbox.add_async(
            connection,
            Message(topic, {}, key="locked"),
            Message(topic, bytes(4000), key="too large"),
            *(Message(topic, {"n": n}, key=key) for n in range(200) for key in ("locked", "too large", "a", "b", None)),
        )
    async with locked(outbox_database, LOCKS["an open UPDATE"], 1):
        with relay_process(
            outbox_database.url, kafka.bootstrap_servers, "--once", batch_rows=50, retry_first_seconds=600.0,
            retry_ceiling_seconds=600.0,
        ) as relay:  # fmt: skip
            assert await relay.exit_code() == 0
            assert [event["id"] for event in relay.events("row.refused")] == [2]
    left = await connection.fetch("SELECT key, count(*) AS rows FROM outbox WHERE sent_at IS NULL GROUP BY key")
    assert {row["key"]: row["rows"] for row in left} == {"locked": 201, "too large": 201}
    await connection.execute("DELETE FROM outbox WHERE sent_at IS NULL")
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.records == 600
