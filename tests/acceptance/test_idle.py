"""What a relay asks PostgreSQL while there is nothing to do, and that it notices when there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url

from outbox_relay import outbox, roles, schema, wake_up
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka
from outbox_relay.source import watch
from outbox_relay.source.session import Database as Server
from outbox_relay.source.session import Session
from outbox_relay.source.statements import OutboxTable
from tests.acceptance.relays import compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.pgbouncer import pgbouncer
from tests.roles import roles_sql
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


async def test_while_nothing_comes_a_relay_looks_and_claims_nothing(
    outbox_database: Database, kafka: Kafka, proxy: TcpProxy
) -> None:
    """A claim is a transaction with a COMMIT to wait for; a look is one statement for all lanes."""
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    with relay_process(
        through(proxy, outbox_database), kafka.bootstrap_servers, heartbeat_seconds=1.0, claims_in_flight=4
    ) as relay:
        await relay.event("slots.taken")
        await outbox_add(connection, topic, "k")
        await drained(connection)
        await quiet(proxy)
        await relay.event("relay.progress", delivered=1)  # though nothing comes after it
        claims = relay.events("claim.made")
        assert await relay.stop() == 0
    # One when it has slots, one to mark what was published.
    assert sum(bool(claim["ids"]) for claim in claims) == 1
    assert len(claims) <= 3 * 4


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


async def test_a_look_that_finds_the_session_lost_announces_the_relay_anew(
    outbox_database: Database, kafka: Kafka, proxy: TcpProxy
) -> None:
    """The next heartbeat is far away; without its lock the relay would count as lost until then."""
    connection = await outbox_database.connect()
    with relay_process(
        through(proxy, outbox_database),
        kafka.bootstrap_servers,
        heartbeat_seconds=600.0,
        lease_seconds=1800.0,
        poll_ceiling_seconds=0.05,
    ) as relay:
        await relay.event("slots.taken")
        pid = await eventually(partial(connection.fetchval, LOCK_HOLDER), "it has its lock")
        assert await connection.fetchval("SELECT pg_terminate_backend($1, 30000)", pid)
        await eventually(partial(connection.fetchval, LOCK_HOLDER), "it has its lock again")
        assert await relay.stop() == 0


LOCK_HOLDER = """
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND granted AND classid = 'outbox_relay'::regclass
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


# -- woken by writers


async def test_writers_wake_a_relay_that_neither_looks_nor_beats_for_long(
    outbox_database: Database, kafka: Kafka, proxy: TcpProxy
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    await connection.execute(wake_up.read_sql())
    with relay_process(
        through(proxy, outbox_database), kafka.bootstrap_servers, heartbeat_seconds=600.0, lease_seconds=1800.0
    ) as relay:
        assert (await relay.event("relay.registered"))["wake_up"]
        for number in range(3):
            await eventually(partial(connection.fetchval, LISTENS), "it listens")
            await outbox_add(connection, topic, f"k{number}")
            await drained(connection, 30.0)
        assert await relay.stop() == 0


#: Each as soon as the one before is marked, which its relay may not have been told yet.
ONE_AFTER_THE_OTHER = """
CREATE PROCEDURE one_after_the_other(topic text, rows integer) LANGUAGE plpgsql AS $$
BEGIN
    FOR row IN 1 .. rows LOOP
        INSERT INTO outbox (topic, key, payload) VALUES (topic, 'k', '');
        COMMIT;
        WHILE EXISTS (SELECT FROM outbox WHERE sent_at IS NULL) LOOP
            PERFORM pg_sleep(0.0002);
        END LOOP;
    END LOOP;
END $$
"""


async def test_what_is_written_while_a_lane_makes_its_last_claim_is_seen(
    outbox_database: Database, kafka: Kafka
) -> None:
    """Its NOTIFY may come before the lane waits, and then wakes nobody; the next heartbeat is far away."""
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    await connection.execute(wake_up.read_sql())
    with relay_process(
        outbox_database.url, kafka.bootstrap_servers, heartbeat_seconds=600.0, lease_seconds=1800.0
    ) as relay:
        await eventually(partial(connection.fetchval, LISTENS), "it listens")
        await connection.execute(ONE_AFTER_THE_OTHER)
        await connection.execute(f"CALL one_after_the_other('{topic}', 150)", timeout=90)
        await drained(connection, 30.0)
        assert await relay.stop() == 0


async def test_a_relay_that_is_woken_often_listens_no_more_until_it_is_idle(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    await connection.execute(wake_up.read_sql())
    with relay_process(outbox_database.url, kafka.bootstrap_servers, heartbeat_seconds=2.0) as relay:
        for _ in range(2):
            await eventually(partial(connection.fetchval, LISTENS), "it listens")

            async def listens_no_more() -> bool:
                for number in range(50):
                    await outbox_add(connection, topic, f"k{number}")
                return not await connection.fetchval(LISTENS)

            await eventually(listens_no_more, "it listens no more")
            await drained(connection)
        assert await relay.stop() == 0


async def test_what_comes_without_a_word_is_seen_by_the_next_heartbeat(
    outbox_database: Database, kafka: Kafka, proxy: TcpProxy
) -> None:
    """As from a writer whose INSERT was before the relay listens and whose COMMIT is after."""
    topic = await new_topic(kafka)
    connection, early = await outbox_database.connect(), await outbox_database.connect()
    await connection.execute(wake_up.read_sql())
    with relay_process(
        through(proxy, outbox_database), kafka.bootstrap_servers, heartbeat_seconds=1.0, start=False
    ) as relay:
        async with early.transaction():
            await outbox.add_async(early, Message(topic, {}, key="k"))
            relay.start()
            await eventually(partial(connection.fetchval, LISTENS), "it listens")
        await drained(connection)
        assert await relay.stop() == 0


async def test_writers_say_a_word_a_transaction_and_only_while_a_relay_listens(outbox_database: Database) -> None:
    owner, listener = await outbox_database.connect(), await outbox_database.connect()
    suffix = uuid4().hex[:8]
    await roles.apply(owner, roles_sql(suffix))
    await owner.execute(wake_up.read_sql())
    words: list[str] = []
    channel = await owner.fetchval("SELECT 'outbox_' || 'outbox'::regclass::oid")
    await listener.add_listener(channel, lambda *word: words.append(word[3]))
    await owner.execute("INSERT INTO outbox_relay (name, lease_seconds, ready, direct) VALUES ('r', 1, true, true)")

    async def write() -> None:
        async with owner.transaction():
            # Who may write messages, and nothing else.
            await owner.execute(f"SET LOCAL ROLE outbox_writer_{suffix}")
            for _ in range(3):
                await outbox.add_async(owner, Message("t", {}, key="k"), Message("t", {}, key="l"))
        await listener.execute("SELECT")

    await write()
    assert words == []
    await owner.execute("UPDATE outbox_relay SET listens = true")
    await write()
    assert words == [""]
    await write()
    assert words == ["", ""]


async def test_the_wake_up_of_a_table_of_another_name_in_a_schema(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute('CREATE SCHEMA "of orders"; SET search_path = "of orders"')
    await schema.apply(connection)
    await connection.execute("ALTER TABLE outbox RENAME TO \"the 'messages'\"; SET search_path = public")
    table = OutboxTable(name="the 'messages'")
    await wake_up.apply(connection, wake_up.wake_up_sql(table, "of orders"))
    await wake_up.apply(connection, wake_up.wake_up_sql(table, "of orders"))
    await connection.execute("INSERT INTO \"of orders\".\"the 'messages'\" (topic, key, payload) VALUES ('t', 'k', '')")
    woken_by = "SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname = 'outbox_wake'"
    assert await connection.fetchval(woken_by) == '"of orders"."the \'messages\'"'


LISTENS = "SELECT EXISTS (SELECT FROM outbox_relay WHERE listens)"


async def test_nobody_wakes_a_relay_behind_a_pooler_or_that_is_told_not_to_be(
    outbox_database: Database, kafka: Kafka
) -> None:
    connection = await outbox_database.connect()
    await connection.execute(wake_up.read_sql())
    url = make_url(outbox_database.url)
    with pgbouncer("session", url.port or 0, url.username or "") as port:
        pooled = url.set(port=port).render_as_string(hide_password=False)
        with (
            relay_process(pooled, kafka.bootstrap_servers) as behind,
            relay_process(outbox_database.url, kafka.bootstrap_servers, wake_up=False) as told,
        ):
            for relay, direct in ((behind, False), (told, True)):
                registered = await relay.event("relay.registered")
                assert (registered["direct"], registered["wake_up"]) == (direct, False)
            assert [await relay.stop() for relay in (behind, told)] == [0, 0]


# -- sessions


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
