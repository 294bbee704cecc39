"""Several relay processes share the work, under writers, and under ``kill -9``."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from outbox_relay.servers import Kafka
from tests.acceptance.relays import Application, RelayProcess, compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.waiting import eventually

ROWS = 20_000
SLOTS = 16


async def shared_out(relays: list[RelayProcess]) -> None:
    """Wait until every relay has an even share of the slots."""

    def owned(relay: RelayProcess) -> int:
        events = [event for event in relay.events() if event["event"] in ("slots.taken", "slots.released")]
        return int(events[-1]["owned"]) if events else 0

    await eventually(lambda: all(owned(relay) == SLOTS // len(relays) for relay in relays), "even shares")


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
