"""Relay processes while Kafka is away, stands still, refuses a topic or refuses a row."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import asyncpg
import pytest
from aiokafka.client import AIOKafkaClient

from outbox_relay import outbox
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka, KafkaServer
from tests.acceptance.relays import (
    SLOTS,
    Application,
    RelayProcess,
    busy,
    compare,
    drained,
    ids_in,
    in_flight,
    new_topic,
    owned,
    relay_process,
    repeated,
    shared_out,
)
from tests.conftest import Database, skipped_without_server
from tests.kafka_admin import Admin
from tests.kafka_proxy import KafkaProxy
from tests.waiting import eventually

#: So that what is held is offered again within the test.
SOON: dict[str, Any] = {"retry_first_seconds": 0.1, "retry_ceiling_seconds": 0.4}


@pytest.fixture(scope="module")
def server() -> Iterator[KafkaServer]:
    """A broker to be stopped, that creates whatever topic it is asked about, and that knows who may do what."""
    settings = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
    }
    with skipped_without_server():
        server = KafkaServer.start(settings, auto_create_topics=True)
    with server:
        yield server


@pytest.fixture
def own_kafka(server: KafkaServer) -> Kafka:
    return Kafka(server.bootstrap_servers, server)


@pytest.fixture
async def proxy(kafka: Kafka) -> AsyncIterator[KafkaProxy]:
    async with KafkaProxy(kafka.bootstrap_servers) as proxy:
        yield proxy


async def insert(connection: asyncpg.Connection, *messages: Message) -> None:
    async with connection.transaction():
        await outbox.add_async(connection, *messages)


async def unsent(connection: asyncpg.Connection) -> list[int]:
    return [row["id"] for row in await connection.fetch("SELECT id FROM outbox WHERE sent_at IS NULL ORDER BY id")]


async def is_there(admin: Admin, topic: str) -> bool:
    return topic in await admin.topics()


async def ask_about(bootstrap_servers: str, topic: str) -> None:
    """Ask for a topic by its name, as most clients do."""
    client = AIOKafkaClient(bootstrap_servers=bootstrap_servers)
    await client.bootstrap()
    try:
        await client.set_topics([topic])
    finally:
        await client.close()


# -- topics


@pytest.mark.parametrize("auto_create", [True, False], ids=["auto.create.topics", "no auto.create.topics"])
async def test_rows_of_a_missing_topic_wait_until_somebody_creates_it(
    auto_create: bool, outbox_database: Database, kafka: Kafka, own_kafka: Kafka
) -> None:
    kafka = own_kafka if auto_create else kafka
    admin = Admin(kafka.bootstrap_servers)
    present = await new_topic(kafka)
    missing, other_missing = f"{present}-missing", f"{present}-other"
    connection = await outbox_database.connect()
    with relay_process(outbox_database.url, kafka.bootstrap_servers, **SOON) as relay:
        both = (missing, present)
        await insert(connection, *(Message(topic, str(n), key=f"k{n % 5}") for n in range(50) for topic in both))
        await eventually(lambda: len(relay.ids("claim.settled")) == 50, "the other topic flows")
        refused = await relay.event("topic.refused", topic=missing, attempts=4)
        assert refused["error"] == "UnknownTopicOrPartitionError"
        assert refused["reason"].startswith("create the topic")
        assert len(await unsent(connection)) == 50
        assert not await is_there(admin, missing)
        # It would have been so easy.
        await ask_about(kafka.bootstrap_servers, other_missing)
        if auto_create:
            await eventually(lambda: is_there(admin, other_missing), "a topic that was asked about is created")
        else:
            assert not await is_there(admin, other_missing)
        await kafka.create_topic(missing, 3)
        await drained(connection)
        assert await relay.stop() == 0
    report = await compare(connection, kafka, present, missing)
    assert report.sound, report.describe()
    assert report.duplicates == 0


async def test_rows_of_a_topic_deleted_while_the_relay_runs_wait_until_it_is_created_again(
    outbox_database: Database, own_kafka: Kafka
) -> None:
    topic = await new_topic(own_kafka, 3)
    connection = await outbox_database.connect()
    with relay_process(outbox_database.url, own_kafka.bootstrap_servers, **SOON) as relay:
        await insert(connection, *(Message(topic, str(n), key="k") for n in range(10)))
        await drained(connection)
        await Admin(own_kafka.bootstrap_servers).delete(topic)
        await insert(connection, *(Message(topic, str(n), key="k") for n in range(10)))
        waiting = await unsent(connection)
        await relay.event("topic.refused", topic=topic, error="UnknownTopicOrPartitionError")
        assert await unsent(connection) == waiting
        await own_kafka.create_topic(topic, 1)
        await drained(connection)
        assert await relay.stop() == 0
    assert await ids_in(own_kafka, topic) == waiting


async def test_rows_of_a_forbidden_topic_wait_until_they_are_allowed(
    outbox_database: Database, own_kafka: Kafka
) -> None:
    admin = Admin(own_kafka.bootstrap_servers)
    forbidden, allowed = await new_topic(own_kafka), await new_topic(own_kafka)
    await admin.forbid_writing(forbidden)
    connection = await outbox_database.connect()
    with relay_process(outbox_database.url, own_kafka.bootstrap_servers, **SOON) as relay:
        await insert(
            connection, *(Message(t, str(n), key=f"k{n % 5}") for n in range(50) for t in (forbidden, allowed))
        )
        refused = await relay.event("topic.refused", topic=forbidden, attempts=3)
        assert refused["error"] == "TopicAuthorizationFailedError"
        assert refused["reason"] == "grant this relay's user Write on the topic"
        await eventually(lambda: len(relay.ids("claim.settled")) == 50, "the other topic flows")
        await admin.allow_writing(forbidden)
        await drained(connection)
        assert await relay.stop() == 0
    report = await compare(connection, own_kafka, forbidden, allowed)
    assert report.sound, report.describe()
    assert report.duplicates == 0


# -- rows


async def test_a_row_too_large_for_its_topic_holds_its_key_alone_until_the_limit_is_raised(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 6, {"max.message.bytes": "60000"})
    connection = await outbox_database.connect()
    with relay_process(
        outbox_database.url, kafka.bootstrap_servers, kafka={"batch_bytes": 50_000}, batch_rows=1000, **SOON
    ) as relay:
        bodies = [b"x" * (100_000 if n == 487 else 300) for n in range(1000)]
        await insert(connection, *(Message(topic, body, key=f"k{n % 20}") for n, body in enumerate(bodies)))
        ids = [row["id"] for row in await connection.fetch("SELECT id FROM outbox ORDER BY id")]
        bad, followers = ids[487], ids[507::20]
        await eventually(lambda: len(relay.ids("claim.settled")) == 999 - len(followers), "all other keys flow")
        refused = [await relay.event("row.refused", id=bad, attempts=n) for n in (1, 2, 3, 4)]
        for event, most_seconds in zip(refused, (0.1, 0.2, 0.4, 0.4), strict=True):
            assert most_seconds / 2 <= event["retry_in_seconds"] <= most_seconds
        assert {event["error"] for event in refused} == {"MessageSizeTooLargeError"}
        assert "max.message.bytes" in refused[0]["reason"]
        assert {event["id"] for event in relay.events("row.refused")} == {bad}
        assert await unsent(connection) == [bad, *followers]
        await Admin(kafka.bootstrap_servers).configure(topic, {"max.message.bytes": "200000"})
        await drained(connection)
        assert await relay.stop() == 0
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


async def test_a_row_without_a_key_waits_for_as_long_as_its_topic_is_compacted(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 1, {"cleanup.policy": "compact"})
    connection = await outbox_database.connect()
    with relay_process(outbox_database.url, kafka.bootstrap_servers, **SOON) as relay:
        await insert(connection, *(Message(topic, str(n), key=None if n == 5 else f"k{n}") for n in range(10)))
        refused = await relay.event("row.refused", attempts=2)
        assert refused["error"] == "InvalidRecordError"
        assert "a compacted topic refuses a record without a key" in refused["reason"]
        await eventually(lambda: len(relay.ids("claim.settled")) == 9, "rows with a key flow")
        assert await unsent(connection) == [refused["id"]]
        await Admin(kafka.bootstrap_servers).configure(topic, {"cleanup.policy": "delete"})
        await drained(connection)
        assert await relay.stop() == 0
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


# -- brokers


async def test_relays_wait_for_kafka_whether_they_were_draining_or_are_new(
    outbox_database: Database, own_kafka: Kafka, server: KafkaServer
) -> None:
    topic = await new_topic(own_kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    # Far shorter than the outage: a request may be given up and sent again, its batch may not.
    soon = {"request_timeout_seconds": 0.5}
    with (
        relay_process(outbox_database.url, server.bootstrap_servers, kafka=soon, batch_rows=100) as draining,
        relay_process(outbox_database.url, server.bootstrap_servers, start=False, batch_rows=100) as new,
    ):
        async with busy(application):
            await eventually(lambda: draining.ids("claim.settled"), "the relay drains")
            await asyncio.to_thread(server.stop)
            new.start()
            unavailable = await new.event("kafka.unavailable")
            assert unavailable["reason"].startswith(
                f"connect to Kafka: no broker answers at {server.bootstrap_servers}"
            )
            assert draining.events("kafka.unavailable") == [], "it knows that its batch may be written, and waits"
            await asyncio.to_thread(server.start_again)
            await new.event("kafka.available")
            await shared_out([draining, new])
            settled = [len(relay.ids("claim.settled")) for relay in (draining, new)]
            for relay, before in zip((draining, new), settled, strict=True):
                await eventually(lambda r=relay, b=before: len(r.ids("claim.settled")) > b, "both work")  # type: ignore[misc]
        await drained(connection)
        assert [await relay.stop() for relay in (draining, new)] == [0, 0]
        assert draining.events("publish.abandoned") == []
    report = await compare(connection, own_kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


async def test_a_pause_of_kafka_shorter_than_the_deadline_repeats_nothing(
    outbox_database: Database, own_kafka: Kafka, server: KafkaServer
) -> None:
    topic = await new_topic(own_kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    with relay_process(
        outbox_database.url, server.bootstrap_servers, kafka={"publish_warn_seconds": 0.3}, batch_rows=100
    ) as relay:
        async with busy(application):
            await paused_until_it_says(server, relay, "publish.slow")
            await relay.event("publish.answered")
        await drained(connection)
        assert await relay.stop() == 0
        assert relay.events("publish.abandoned") == []
    report = await compare(connection, own_kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


async def test_a_pause_of_kafka_longer_than_the_deadline_repeats_what_was_in_flight_at_most(
    outbox_database: Database, own_kafka: Kafka, server: KafkaServer
) -> None:
    topic = await new_topic(own_kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    impatient = {"publish_warn_seconds": 0.3, "publish_deadline_seconds": 1.0, "connect_timeout_seconds": 1.0}
    with relay_process(outbox_database.url, server.bootstrap_servers, kafka=impatient, batch_rows=100) as relay:
        async with busy(application):
            doubtful = await paused_until_it_says(server, relay, "kafka.unavailable")
            await relay.event("kafka.available")
        await drained(connection)
        assert await relay.stop() == 0
        abandoned = relay.events("publish.abandoned")
    assert {event["waited_seconds"] for event in abandoned} == {1.0}
    report = await compare(connection, own_kafka, topic)
    assert report.sound, report.describe()
    assert await repeated(connection, report) <= doubtful
    assert set(report.duplicate_ids.values()) <= {1}
    assert 1 <= sum(event["rows"] for event in abandoned) <= 400, "four claims of a hundred rows"


async def paused_until_it_says(server: KafkaServer, relay: RelayProcess, name: str) -> set[int]:
    """Pause Kafka while the relay drains, until its lanes say so; what is claimed and not marked by then."""
    await eventually(lambda: relay.ids("claim.settled"), "the relay drains")
    server.pause()
    try:
        await relay.event(name)
        return in_flight(relay)
    finally:
        server.resume()


# -- several relays


@pytest.mark.parametrize("how", ["is refused", "gets no answer"])
async def test_a_relay_that_cannot_reach_kafka_lets_go_of_its_share_until_it_can(
    how: str, outbox_database: Database, kafka: Kafka, proxy: KafkaProxy
) -> None:
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    impatient = {"publish_warn_seconds": 0.3, "publish_deadline_seconds": 1.0, "connect_timeout_seconds": 1.0}
    with ExitStack() as stack:
        # Were it for the lease, the other would take over within none of this test's deadlines.
        cut_off, other = (
            stack.enter_context(
                relay_process(outbox_database.url, address, kafka=impatient, batch_rows=100, lease_seconds=600)
            )
            for address in (proxy.address, kafka.bootstrap_servers)
        )
        await shared_out([cut_off, other])
        async with busy(application):
            await eventually(lambda: cut_off.ids("claim.settled"), "the relay is busy")
            if how == "is refused":
                await proxy.refuse()
            else:
                proxy.stand_still()
            await eventually(lambda: owned(other) == SLOTS, "the other relay takes over")
            doubtful = in_flight(cut_off)
            settled = len(other.ids("claim.settled"))
            await eventually(lambda: len(other.ids("claim.settled")) > settled + 200, "the other relay goes on")
            proxy.flow()
            await shared_out([cut_off, other])
            settled = len(cut_off.ids("claim.settled"))
            await eventually(lambda: len(cut_off.ids("claim.settled")) > settled, "the relay is busy again")
        await drained(connection)
        assert [await relay.stop() for relay in (cut_off, other)] == [0, 0]
        assert cut_off.events("kafka.available")
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert await repeated(connection, report) <= doubtful
