"""What a relay asks PostgreSQL while there is nothing to do, and that it notices when there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import make_url

from outbox_relay import outbox
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka
from outbox_relay.source import watch
from outbox_relay.source.session import Database as Server
from outbox_relay.source.session import Session
from tests.acceptance.relays import compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.pgbouncer import pgbouncer
from tests.tcp_proxy import TcpProxy
from tests.waiting import eventually

WINDOW_SECONDS = 5.0
MOST_REQUESTS_A_SECOND = 2


@pytest.fixture
async def proxy(outbox_database: Database) -> AsyncIterator[TcpProxy]:
    url = make_url(outbox_database.url)
    async with TcpProxy(url.host or "", url.port or 0) as proxy:
        yield proxy


def through(proxy: TcpProxy, database: Database) -> str:
    return make_url(database.url).set(port=proxy.own_port).render_as_string(hide_password=False)


async def quiet(proxy: TcpProxy) -> None:
    """Wait for some seconds with few requests; each statement takes one, and one more when it is new."""

    async def is_quiet() -> bool:
        before = proxy.requests
        await asyncio.sleep(WINDOW_SECONDS)
        return proxy.requests - before <= MOST_REQUESTS_A_SECOND * WINDOW_SECONDS

    await eventually(is_quiet, f"at most {MOST_REQUESTS_A_SECOND} requests a second", 60.0)


async def test_an_idle_relay_makes_two_statements_a_second_and_sees_what_comes(
    outbox_database: Database, kafka: Kafka, proxy: TcpProxy
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    # Each slot is somebody's: rows for all of them, one after the other, while both lanes rest.
    with relay_process(
        through(proxy, outbox_database), kafka.bootstrap_servers, heartbeat_seconds=1.0, poll_ceiling_seconds=0.5
    ) as relay:
        await relay.event("slots.taken")
        for _ in range(2):
            await quiet(proxy)
            for number in range(4):
                await outbox_add(connection, topic, f"k{number}")
                await drained(connection)
        assert await relay.stop() == 0
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.records == 8


async def outbox_add(connection: asyncpg.Connection, topic: str, key: str) -> None:
    async with connection.transaction():
        await outbox.add_async(connection, Message(topic, {}, key=key))


async def test_a_row_that_is_due_wakes_an_idle_relay(outbox_database: Database, kafka: Kafka, proxy: TcpProxy) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    with relay_process(
        through(proxy, outbox_database), kafka.bootstrap_servers, heartbeat_seconds=1.0, poll_ceiling_seconds=0.5
    ) as relay:
        await relay.event("slots.taken")
        await connection.execute(
            """
            WITH parked AS (
                INSERT INTO outbox (topic, key, payload, parked_at) VALUES ($1, 'k', '', now())
                RETURNING id, bucket, topic, key
            )
            INSERT INTO outbox_parked (id, bucket, topic, key, state, due_at)
            SELECT id, bucket, topic, key, 'retry', now() + interval '1 hour' FROM parked
            """,
            topic,
        )
        await quiet(proxy)
        await connection.execute("UPDATE outbox_parked SET due_at = now()")
        await drained(connection)
        assert await relay.stop() == 0


async def test_a_session_of_its_own_keeps_its_settings_and_asks_in_one_message(
    outbox_database: Database, proxy: TcpProxy
) -> None:
    session = Session(Server(through(proxy, outbox_database), 5.0, 7.0), "test", watch.SETTINGS)
    assert await settings(session) == ["7s", "7s", "7000", "off"]
    assert session.direct
    requests = proxy.requests
    await session.fetch(_SETTINGS)
    assert proxy.requests == requests + 1
    await session.close()


async def test_a_session_behind_a_pooler_sets_everything_for_each_transaction(outbox_database: Database) -> None:
    url = make_url(outbox_database.url)
    with pgbouncer("session", url.port or 0, url.username or "") as port:
        pooled = url.set(port=port).render_as_string(hide_password=False)
        session = Session(Server(pooled, 5.0, 7.0), "test", watch.SETTINGS)
        assert await settings(session) == ["7s", "7s", "7000", "off"]
        assert not session.direct
        connection = await session.connection()
        assert await connection.fetchval("SHOW statement_timeout") == "0", "left to whoever has the session next"
        await session.close()


_SETTINGS = """
SELECT current_setting(name) AS value FROM unnest(ARRAY[
    'statement_timeout', 'idle_in_transaction_session_timeout', 'tcp_user_timeout', 'enable_seqscan'
]) AS name
"""


async def settings(session: Session) -> list[str]:
    return [row["value"] for row in await session.fetch(_SETTINGS)]
