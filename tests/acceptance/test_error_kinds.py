"""Errors as real servers say them: whose fault each is, and whether it costs an attempt."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
from collections.abc import AsyncIterator, Callable, Iterator

import asyncpg
import pytest
from aiokafka import errors as kafka_errors

from outbox_relay import blame
from outbox_relay.blame import Fault
from outbox_relay.servers import Kafka, KafkaServer
from outbox_relay.source import sqlstate
from tests.acceptance.relays import drained, new_topic, relay_process
from tests.conftest import Database, skipped_without_server
from tests.kafka_admin import Admin
from tests.waiting import eventually

#: By kind, the test that provokes it, where it isn't one of this file.
ELSEWHERE = {
    "a topic that is deleted in flight": (
        "test_publisher_failures",
        "test_a_topic_that_is_deleted_meanwhile_is_missed_without_a_tight_loop",
    ),
    "a topic that is not granted": (
        "test_kafka_security",
        "test_a_missing_acl_holds_the_topic_until_it_is_granted",
    ),
    "a wrong password for Kafka": (
        "test_kafka_security",
        "test_a_wrong_password_is_told_and_a_right_one_is_used_without_a_restart",
    ),
    "a broker that stopped": (
        "test_outages",
        "test_outages_in_the_middle_of_a_drain_cost_no_attempt_no_step_by_hand_and_no_order",
    ),
    "a broker that stands still": (
        "test_kafka_failures",
        "test_a_pause_of_kafka_longer_than_the_deadline_repeats_what_was_in_flight_at_most",
    ),
    "a wrong password for PostgreSQL": (
        "test_postgres_security",
        "test_a_wrong_password_is_told_and_a_right_one_is_used_without_a_restart",
    ),
    "a restart of PostgreSQL": (
        "test_outages",
        "test_outages_in_the_middle_of_a_drain_cost_no_attempt_no_step_by_hand_and_no_order",
    ),
    "a failover of PostgreSQL": (
        "test_postgres_security",
        "test_of_several_hosts_the_one_that_can_be_written_to_is_used_also_after_a_failover",
    ),
    "a privilege that was revoked": (
        "test_postgres_security",
        "test_a_privilege_that_is_revoked_is_told_and_the_rows_wait_until_it_is_granted_again",
    ),
    "a row that can't be read": (
        "test_refused_by_postgresql",
        "test_a_row_that_cannot_be_read_is_parked_with_its_attempts_and_only_its_key_waits",
    ),
    "a row that can't be marked": (
        "test_refused_by_postgresql",
        "test_a_row_that_cannot_be_marked_is_not_sent_again_and_holds_nobody",
    ),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_what_is_provoked_elsewhere_is_provoked_there(kind: str) -> None:
    module, name = ELSEWHERE[kind]
    assert callable(getattr(importlib.import_module(f"tests.acceptance.{module}"), name))


# -- Kafka


@pytest.fixture(scope="module")
def server() -> Iterator[KafkaServer]:
    settings = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
    }
    with skipped_without_server():
        server = KafkaServer.start(settings)
    with server:
        yield server


MIB = 1024 * 1024
#: By kind: the topic's settings, a payload and a key, and what Kafka says.
ROWS: dict[str, tuple[dict[str, str], bytes, str | None, type[Exception]]] = {
    "larger than a message may be": (
        {"max.message.bytes": "2000"}, bytes(5_000), "k", kafka_errors.MessageSizeTooLargeError
    ),
    "larger than a segment": (
        {"max.message.bytes": str(4 * MIB), "segment.bytes": str(MIB)},
        os.urandom(2 * MIB), "k", kafka_errors.RecordListTooLargeError,
    ),
    "of a time that the topic doesn't take": (
        {"message.timestamp.before.max.ms": "0"}, b"", "k", kafka_errors.InvalidTimestampError
    ),
    "without a key, and the topic is compacted": (
        {"cleanup.policy": "compact"}, b"", None, blame.InvalidRecordError
    ),
}  # fmt: skip
TOPICS: dict[str, type[Exception]] = {
    "missing": kafka_errors.UnknownTopicOrPartitionError,
    "not granted": kafka_errors.TopicAuthorizationFailedError,
}


async def test_what_kafka_has_against_a_row_costs_it_attempts_and_what_it_has_against_a_topic_nobody(
    outbox_database: Database, server: KafkaServer
) -> None:
    kafka = Kafka(server.bootstrap_servers, server)
    topics = {kind: await new_topic(kafka, 1, ROWS[kind][0] if kind in ROWS else None) for kind in (*ROWS, *TOPICS)}
    await Admin(server.bootstrap_servers).delete(topics["missing"])
    await Admin(server.bootstrap_servers).forbid_writing(topics["not granted"])
    good = await new_topic(kafka, 1)
    connection = await outbox_database.connect()
    for kind, topic in topics.items():
        _, payload, key, _ = ROWS.get(kind, ({}, b"", "k", Exception))
        # A record may be stamped and taken within one millisecond, so there are several.
        for n in range(5):
            row_key = None if key is None else f"{key}{n}"
            await connection.execute(
                "INSERT INTO outbox (topic, key, payload) VALUES ($1, $2, $3)", topic, row_key, payload
            )
    await connection.execute("INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', '')", good)
    settings = {"retry_first_seconds": 0.1, "retry_ceiling_seconds": 0.2, "max_attempts": 1_000}
    with relay_process(outbox_database.url, server.bootstrap_servers, **settings) as relay:  # type: ignore[arg-type]
        for kind, error in {**{kind: row[3] for kind, row in ROWS.items()}, **TOPICS}.items():
            fault = blame.fault_of(error())
            event = "row.refused" if kind in ROWS else "topic.refused"
            assert fault is (Fault.ROW if kind in ROWS else Fault.TOPIC)
            await relay.event(event, topic=topics[kind], error=error.__name__, attempts=2)
        # Until those of a topic are parked, so that there is something to look at.
        await eventually(lambda: parked(connection, *(topics[kind] for kind in TOPICS)), "they are parked")
        for kind in ROWS:
            most = await connection.fetchval("SELECT max(attempts) FROM outbox_parked WHERE topic = $1", topics[kind])
            assert most >= 2, kind
        for kind in TOPICS:
            assert relay.events("row.refused", topic=topics[kind]) == []
            attempts = await connection.fetchval(
                "SELECT sum(attempts) FROM outbox_parked WHERE topic = $1", topics[kind]
            )
            assert attempts == 0, kind
        assert not await connection.fetchval(
            "SELECT EXISTS (SELECT FROM outbox WHERE topic = $1 AND sent_at IS NULL)", good
        )
        assert await relay.stop() == 0


async def parked(connection: asyncpg.Connection, *topics: str) -> bool:
    found = await connection.fetchval("SELECT count(DISTINCT topic) FROM outbox_parked WHERE topic = ANY ($1)", topics)
    return bool(found == len(topics))


# -- PostgreSQL


END_BACKENDS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'outbox-relay %'
"""


@contextlib.asynccontextmanager
async def ended_backends(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Again and again, for one that is ended while it idles is replaced without a word."""
    done = asyncio.Event()

    async def end() -> None:
        while not done.is_set():
            await connection.execute(END_BACKENDS)
            await asyncio.sleep(0.01)

    ending = asyncio.create_task(end())
    yield
    done.set()
    await ending


@contextlib.asynccontextmanager
async def read_only(connection: asyncpg.Connection) -> AsyncIterator[None]:
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await connection.execute(END_BACKENDS)
    yield
    await connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")


@contextlib.asynccontextmanager
async def locked_table(connection: asyncpg.Connection) -> AsyncIterator[None]:
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        yield


@contextlib.asynccontextmanager
async def missing_table(connection: asyncpg.Connection) -> AsyncIterator[None]:
    await connection.execute("ALTER TABLE outbox RENAME TO lost")
    yield
    await connection.execute("ALTER TABLE lost RENAME TO outbox")


Trouble = Callable[[asyncpg.Connection], contextlib.AbstractAsyncContextManager[None]]


#: What a session says that the server has ended; the last is what asyncpg says to the next statement.
LOST = {"AdminShutdownError", "ConnectionDoesNotExistError", "InternalClientError"}


@pytest.mark.parametrize(
    ("trouble", "errors", "fault"),
    [
        (ended_backends, LOST, sqlstate.Fault.INFRASTRUCTURE),
        (read_only, {"TargetServerAttributeNotMatched", *LOST}, sqlstate.Fault.INFRASTRUCTURE),
        (locked_table, {"QueryCanceledError", "TimeoutError"}, sqlstate.Fault.INFRASTRUCTURE),
        (missing_table, {"UndefinedTableError"}, sqlstate.Fault.CONFIGURATION),
    ],
)
async def test_what_postgresql_has_against_everybody_costs_nobody_an_attempt(
    trouble: Trouble, errors: set[str], fault: sqlstate.Fault, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 1)
    connection, operator = await outbox_database.connect(), await outbox_database.connect()
    insert = "INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', '')"
    impatient = {"connect_timeout_seconds": 2.0, "statement_timeout_seconds": 0.5}
    with relay_process(outbox_database.url, kafka.bootstrap_servers, database=impatient, max_attempts=1) as relay:
        await connection.execute(insert, topic)
        await drained(connection)
        async with trouble(operator):
            unavailable = await relay.event("database.unavailable")
            assert unavailable["error"] in errors
            error = getattr(asyncpg, unavailable["error"], TimeoutError)
            assert sqlstate.fault_of(error("")) is fault
        await connection.execute(insert, topic)
        await drained(connection)
        await relay.event("database.available")
        assert await connection.fetchval("SELECT count(*) FROM outbox_parked") == 0
        assert [relay.events(name) for name in ("row.refused", "row.dead", "row.stuck", "row.unmarkable")] == [[]] * 4
        assert await relay.stop() == 0
