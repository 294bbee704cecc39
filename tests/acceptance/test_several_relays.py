"""Several relay processes share the work, under writers, and under ``kill -9``."""

from __future__ import annotations

import signal
from contextlib import ExitStack

import pytest

from outbox_relay.servers import Kafka
from tests.acceptance.relays import (
    SLOTS,
    Application,
    busy,
    compare,
    drained,
    in_flight,
    new_topic,
    owned,
    relay_process,
    repeated,
    shared_out,
)
from tests.conftest import Database
from tests.waiting import eventually

ROWS = 20_000


@pytest.mark.parametrize("count", [2, 4])
async def test_relays_share_the_work_and_repeat_nothing(count: int, outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    with ExitStack() as stack:
        relays = [
            stack.enter_context(relay_process(outbox_database.url, kafka.bootstrap_servers, batch_rows=100))
            for _ in range(count)
        ]
        await shared_out(relays)
        await application.write(ROWS)
        assert [len(relay.ids("claim.settled")) > 0 for relay in relays] == [True] * count, "drained while writing"
        await drained(connection)
        assert [await relay.stop() for relay in relays] == [0] * count
        settled = [len(relay.ids("claim.settled")) for relay in relays]
    assert max(len(event["ids"]) for relay in relays for event in relay.events("claim.made")) <= 100
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.committed == report.records == ROWS
    assert application.rolled_back_rows >= 0.9 * ROWS
    assert sum(settled) == ROWS
    assert min(settled) >= ROWS / 10, settled


async def test_a_second_relay_gets_its_share_of_a_busy_first_one(outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    with (
        relay_process(outbox_database.url, kafka.bootstrap_servers, batch_rows=100) as first,
        relay_process(outbox_database.url, kafka.bootstrap_servers, start=False, batch_rows=100) as second,
    ):
        async with busy(application):
            await eventually(lambda: owned(first) == SLOTS, "the first relay has everything")
            await eventually(lambda: first.ids("claim.settled"), "the first relay is busy")
            second.start()
            await shared_out([first, second])
            settled = [len(relay.ids("claim.settled")) for relay in (first, second)]
            for relay, before in zip((first, second), settled, strict=True):
                await eventually(lambda r=relay, b=before: len(r.ids("claim.settled")) > b + 100, "both work")  # type: ignore[misc]
        await drained(connection)
        assert [await relay.stop() for relay in (first, second)] == [0, 0]
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == 0


async def test_a_killed_relay_is_replaced_long_before_its_lease_runs_out(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    with ExitStack() as stack:
        # Were it for the lease, nobody would take over within this test's deadlines.
        killed, other = (
            stack.enter_context(relay_process(outbox_database.url, kafka.bootstrap_servers, lease_seconds=600))
            for _ in range(2)
        )
        await shared_out([killed, other])
        async with busy(application):
            await eventually(lambda: killed.ids("claim.settled"), "the relay is busy")
            killed.kill()
            await eventually(lambda: owned(other) == SLOTS, "the other relay takes over")
        await drained(connection)
        assert await other.stop() == 0
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()


async def test_a_frozen_relay_is_replaced_when_its_lease_runs_out_and_does_no_harm_when_it_wakes(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    with ExitStack() as stack:
        # It may be frozen within a transaction, whose locks end with the statement timeout.
        frozen, other = (
            stack.enter_context(
                relay_process(
                    outbox_database.url,
                    kafka.bootstrap_servers,
                    database={"statement_timeout_seconds": 2.0},
                    batch_rows=100,
                    lease_seconds=2.0,
                )
            )
            for _ in range(2)
        )
        await shared_out([frozen, other])
        async with busy(application):
            await eventually(lambda: frozen.ids("claim.settled"), "the relay is busy")
            frozen.signal(signal.SIGSTOP)
            await eventually(lambda: owned(other) == SLOTS, "the other relay takes over")
            claimed = in_flight(frozen)
            frozen.signal(signal.SIGCONT)
            await shared_out([frozen, other])
        await drained(connection)
        assert [await relay.stop() for relay in (frozen, other)] == [0, 0]
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert await repeated(connection, report) <= claimed
    assert set(report.duplicate_ids.values()) <= {1}
