"""PostgreSQL and then Kafka go away in the middle of the work: nobody's fault, and nobody's work to mend.

On servers of this file's own. ``OUTAGE_SECONDS`` is how long Kafka is away; a minute was run by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import asyncpg
import pytest

from outbox_relay import schema
from outbox_relay.servers import Kafka, KafkaServer, PostgresServer
from outbox_relay.source.session import FAILURES
from tests.acceptance.relays import Application, RelayProcess, compare, drained, new_topic, relay_process
from tests.conftest import skipped_without_server
from tests.waiting import eventually

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "15"))
#: Far more than a claim takes; what ends one that hangs (``statement_timeout_seconds``) is six times as long.
CLAIM_SECONDS = 5.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer.start({"fsync": "off", "full_page_writes": "off"}) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[KafkaServer]:
    with skipped_without_server():
        server = KafkaServer.start()
    with server:
        yield server


@dataclass
class Watched:
    """What was seen in ``pg_stat_activity`` and in ``outbox_parked``."""

    samples: int = 0
    oldest_transaction_seconds: float = 0.0
    most_attempts: int = 0


@contextlib.asynccontextmanager
async def watched(url: str) -> AsyncIterator[Watched]:
    """Look again and again at the relays' transactions, through restarts."""
    seen, done = Watched(), asyncio.Event()

    async def look() -> None:
        while not done.is_set():
            with contextlib.suppress(*FAILURES):
                connection = await asyncpg.connect(url, timeout=5)
                try:
                    while not done.is_set():
                        oldest, attempts = await connection.fetchrow(
                            """
                            SELECT (SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8
                                    FROM pg_stat_activity WHERE application_name LIKE 'outbox-relay %'),
                                   (SELECT coalesce(max(attempts), 0) FROM outbox_parked)
                            """
                        )
                        seen.samples += 1
                        seen.oldest_transaction_seconds = max(seen.oldest_transaction_seconds, oldest)
                        seen.most_attempts = max(seen.most_attempts, attempts)
                        await asyncio.sleep(0.02)
                finally:
                    connection.terminate()
            await asyncio.sleep(0.05)

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        done.set()
        await looking


@dataclass
class Writers:
    """An application that loses its connections, begins anew, and writes until it is told to stop."""

    application: Application

    @contextlib.asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        done = asyncio.Event()

        async def write() -> None:
            while not done.is_set():
                with contextlib.suppress(*FAILURES):
                    await self.application.write(20, writers=1)
                await asyncio.sleep(0.05)

        writing = [asyncio.create_task(write()) for _ in range(4)]
        try:
            yield
        finally:
            done.set()
            await asyncio.gather(*writing)


async def go_on(*relays: RelayProcess) -> None:
    """Each marks something more."""

    async def goes_on(relay: RelayProcess) -> None:
        before = len(relay.ids("claim.settled"))
        await eventually(lambda: len(relay.ids("claim.settled")) > before, f"{relay.name} goes on", 90.0)

    await asyncio.gather(*(goes_on(relay) for relay in relays))


async def test_outages_in_the_middle_of_a_drain_cost_no_attempt_no_step_by_hand_and_no_order(
    postgres: PostgresServer, server: KafkaServer
) -> None:
    kafka = Kafka(server.bootstrap_servers, server)
    topic = await new_topic(kafka)
    url = postgres.url()
    connection = await asyncpg.connect(url)
    await schema.apply(connection)
    application = Application(url, topic)
    await application.prepare()
    await application.write(5_000)
    await connection.close()
    settings: dict[str, Any] = {"batch_rows": 100, "max_attempts": 1}
    with (
        relay_process(url, server.bootstrap_servers, **settings) as one,
        relay_process(url, server.bootstrap_servers, **settings) as other,
    ):
        relays = (one, other)
        async with watched(url) as seen, Writers(application).busy():
            await go_on(*relays)
            await asyncio.to_thread(postgres.stop)
            for relay in relays:
                await relay.event("database.unavailable")
            await asyncio.to_thread(postgres.start_again)
            for relay in relays:
                await relay.event("database.available")
            await go_on(*relays)
            await asyncio.to_thread(server.stop)
            stopped_at = time.monotonic()
            samples = seen.samples
            await asyncio.sleep(OUTAGE_SECONDS)  # the outage itself
            assert seen.samples - samples > OUTAGE_SECONDS, "the database was looked at meanwhile"
            await asyncio.to_thread(server.start_again)
            away_seconds = time.monotonic() - stopped_at
            await go_on(*relays)
        connection = await asyncpg.connect(url)
        await drained(connection)
        assert [await relay.stop() for relay in relays] == [0, 0]
        for relay in relays:
            began, over = relay.events("database.unavailable"), relay.events("database.available")
            assert [line["since_seconds"] for line in began] == [0]
            assert len(over) == 1
            assert over[0]["after_seconds"] > 0
            # Who had a batch out waits for its answer; who had none, or waited too long, says that Kafka is away.
            began = relay.events("publish.slow") + relay.events("kafka.unavailable")
            over = relay.events("publish.answered") + relay.events("kafka.available")
            assert began
            assert over
            assert any(OUTAGE_SECONDS * 0.9 < line["after_seconds"] < away_seconds + 60 for line in over), over
            assert relay.events("row.refused") == relay.events("row.dead") == relay.events("row.stuck") == []
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert seen.most_attempts == 0
    assert await connection.fetchval("SELECT count(*) FROM outbox_parked") == 0
    assert seen.oldest_transaction_seconds <= CLAIM_SECONDS
    await connection.close()
    figures = {"Kafka away": round(away_seconds, 1), "repeats": report.duplicates, **asdict(seen)}
    logging.getLogger(__name__).info("%s", figures)
