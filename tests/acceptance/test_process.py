"""How the process ends: told to, forced to, or by a defect; with servers that answer, refuse or stand still.

Timeouts that play no part are made so long that no test would live to see them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url

from outbox_relay import outbox
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka
from outbox_relay.servers.ports import free_port
from tests.acceptance.relays import RelayProcess, compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.kafka_proxy import KafkaProxy
from tests.tcp_proxy import TcpProxy
from tests.waiting import eventually

#: Longer than any test.
FOREVER = 600.0
PATIENT_DATABASE = {"connect_timeout_seconds": FOREVER, "statement_timeout_seconds": FOREVER}
PATIENT_KAFKA = {
    "connect_timeout_seconds": FOREVER,
    "publish_warn_seconds": FOREVER,
    "publish_deadline_seconds": FOREVER,
}
#: What "ends" means, with room for a busy machine; far below FOREVER.
ENDS_SECONDS = 20.0
NOWHERE = "127.0.0.1:1"


@contextlib.asynccontextmanager
async def proxied(database_url: str) -> AsyncIterator[tuple[TcpProxy, str]]:
    """A proxy before the database, and the url that leads through it."""
    url = make_url(database_url)
    async with TcpProxy(url.host or "127.0.0.1", url.port or 5432) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.own_port)
        yield proxy, through.render_as_string(hide_password=False)


async def write(connection: asyncpg.Connection, topic: str, rows: int, keys: int = 10) -> None:
    async with connection.transaction():
        messages = [Message(topic, {"n": number}, key=f"k{number % keys}") for number in range(rows)]
        await outbox.add_async(connection, *messages)


def last_words(relay: RelayProcess) -> list[str]:
    """The events from the signal on, but those of rows and slots."""
    names = [event["event"] for event in relay.events()]
    after = names[names.index("relay.stopping") :]
    return [name for name in after if name.partition(".")[0] == "relay" and name != "relay.progress"]


async def ended(relay: RelayProcess) -> int:
    code = await relay.exit_code(ENDS_SECONDS)
    assert relay.events("relay.stopped")[-1]["exit_code"] == code
    assert all(line.startswith("{") for line in relay.output().splitlines()), "stderr is in there too"
    return code


async def stopped(relay: RelayProcess) -> int:
    relay.signal(signal.SIGTERM)
    return await ended(relay)


# -- told to


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_in_the_middle_of_a_drain_finishes_what_is_in_flight_and_repeats_nothing(
    number: signal.Signals, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    await write(connection, topic, 20_000)
    with relay_process(outbox_database.url, kafka.bootstrap_servers, batch_rows=100) as relay:
        await eventually(lambda: relay.ids("claim.settled"), "it drains")
        relay.signal(number)
        assert await ended(relay) == 0
        assert last_words(relay) == ["relay.stopping", "relay.stopped"]
        assert sorted(relay.ids("claim.made")) == sorted(relay.ids("claim.settled"))
        assert len(relay.ids("claim.settled")) < 20_000, "in the middle"
        assert await connection.fetchval("SELECT count(*) FROM outbox_slot WHERE owner IS NOT NULL") == 0
        assert await connection.fetchval("SELECT count(*) FROM outbox_relay") == 0
        relay.start()
        await drained(connection)
        assert await stopped(relay) == 0
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.records == 20_000


async def test_once_drains_and_ends(outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    await write(connection, topic, 1_000)
    with relay_process(outbox_database.url, kafka.bootstrap_servers, "--once", batch_rows=100) as relay:
        assert await ended(relay) == 0
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.records == 1_000
    await drained(connection, 0)


@pytest.mark.parametrize("arguments", [(), ("--once",)])
async def test_a_stop_ends_the_wait_for_a_database_that_refuses(arguments: tuple[str, ...]) -> None:
    with relay_process(f"postgresql://relay@{NOWHERE}/orders", NOWHERE, *arguments) as relay:
        await relay.event("database.unavailable")
        assert await stopped(relay) == 0
        assert last_words(relay) == ["relay.stopping", "relay.stopped"]


async def test_a_stop_ends_the_wait_for_a_database_that_never_answers(outbox_database: Database) -> None:
    async with proxied(outbox_database.url) as (proxy, url):
        proxy.stand_still()
        with relay_process(url, NOWHERE, database=PATIENT_DATABASE, shutdown_grace_seconds=FOREVER) as relay:
            await eventually(lambda: proxy.held_up, "it connects")
            assert await stopped(relay) == 0


async def test_a_stop_ends_although_the_database_has_fallen_silent(outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    await write(connection, topic, 100)
    async with proxied(outbox_database.url) as (proxy, url):
        with relay_process(
            url,
            kafka.bootstrap_servers,
            database=PATIENT_DATABASE,
            shutdown_grace_seconds=FOREVER,
        ) as relay:
            await drained(connection)
            await eventually(lambda: len(relay.ids("claim.settled")) == 100, "it knows that all is marked")
            proxy.stand_still()
            await eventually(lambda: proxy.held_up, "the heartbeat waits")
            assert await stopped(relay) == 0
            assert last_words(relay) == ["relay.stopping", "relay.stopped"]


async def test_a_stop_ends_the_wait_for_a_kafka_that_refuses(outbox_database: Database) -> None:
    with relay_process(outbox_database.url, f"127.0.0.1:{free_port()}", shutdown_grace_seconds=FOREVER) as relay:
        await relay.event("relay.registered")
        await relay.event("kafka.unavailable")
        assert await stopped(relay) == 0
        assert last_words(relay) == ["relay.stopping", "relay.stopped"]


async def test_a_stop_ends_the_wait_for_a_kafka_that_never_answers(outbox_database: Database, kafka: Kafka) -> None:
    host, port = kafka.bootstrap_servers.split(":")
    async with TcpProxy(host, int(port)) as proxy:
        proxy.stand_still()
        with relay_process(
            outbox_database.url, f"127.0.0.1:{proxy.own_port}", kafka=PATIENT_KAFKA, shutdown_grace_seconds=FOREVER
        ) as relay:
            await relay.event("relay.registered")
            await eventually(lambda: proxy.held_up >= 2, "both lanes connect")
            assert await stopped(relay) == 0
            assert last_words(relay) == ["relay.stopping", "relay.stopped"]


NAME_SERVER_IS_AWAY = """
import socket, sys, time
from outbox_relay.cli import main
socket.getaddrinfo = lambda *_, **__: [print("asked", flush=True), time.sleep(600)]
main(["run", "--config", sys.argv[1]])
"""


async def test_a_stop_ends_the_wait_for_a_name_server_that_never_answers(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        f'[database]\nurl = "postgresql://relay@db.example/orders"\n[kafka]\nbootstrap_servers = ["{NOWHERE}"]\n'
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NAME_SERVER_IS_AWAY, str(path), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(ENDS_SECONDS):
            while await process.stdout.readline() != b"asked\n":
                pass
            process.terminate()
            *_, last = (await process.stdout.read()).splitlines()
            assert await process.wait() == 0
        assert json.loads(last)["event"] == "relay.stopped"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# -- forced to


async def publish_hangs(relay: RelayProcess, connection: asyncpg.Connection, topic: str, proxy: KafkaProxy) -> None:
    """Ten rows are claimed and Kafka doesn't answer."""
    await write(connection, topic, 1)
    await eventually(lambda: relay.ids("claim.settled"), "it is at work")
    proxy.stand_still()
    await write(connection, topic, 10, keys=1)
    await eventually(lambda: len(relay.ids("claim.made")) == 11, "it has claimed")


@pytest.mark.parametrize("insisting", [True, False], ids=["second signal", "the grace ran out"])
async def test_a_stop_that_can_not_finish_says_what_stays_unmarked(
    insisting: bool, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    async with KafkaProxy(kafka.bootstrap_servers) as proxy:
        with relay_process(
            outbox_database.url,
            proxy.address,
            kafka=PATIENT_KAFKA,
            shutdown_grace_seconds=FOREVER if insisting else 0.5,
        ) as relay:
            await publish_hangs(relay, connection, topic, proxy)
            relay.signal(signal.SIGTERM)
            await relay.event("relay.stopping")
            if insisting:
                relay.signal(signal.SIGTERM)
            assert await ended(relay) == 1
            assert last_words(relay) == ["relay.stopping", "relay.forced", "relay.left_unsettled", "relay.stopped"]
            (forced,) = relay.events("relay.forced")
            assert forced["reason"] == ("second signal" if insisting else "the grace ran out")
            (left,) = relay.events("relay.left_unsettled")
            assert left["rows"] == 10
            assert await connection.fetchval("SELECT count(*) FROM outbox_slot WHERE owner IS NOT NULL") == 0
            proxy.flow()
            relay.start()
            await drained(connection)
            assert await stopped(relay) == 0
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert set(report.duplicate_ids.values()) <= {1}
    assert report.duplicates <= 10


@pytest.mark.parametrize("mended", [True, False])
async def test_rows_that_could_not_be_marked_before_the_stop_are_marked_within_the_grace(
    mended: bool, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    async with KafkaProxy(kafka.bootstrap_servers) as proxy, proxied(outbox_database.url) as (before_database, url):
        with relay_process(
            url, proxy.address, kafka=PATIENT_KAFKA, shutdown_grace_seconds=FOREVER if mended else 1.0
        ) as relay:
            await publish_hangs(relay, connection, topic, proxy)
            await before_database.refuse()
            await relay.event("database.unavailable")
            relay.signal(signal.SIGTERM)
            await relay.event("relay.stopping")
            proxy.flow()
            await eventually(lambda: len(relay.ids("claim.published")) == 11, "Kafka has them")
            if mended:
                await before_database.accept()
                assert await ended(relay) == 0
                assert last_words(relay) == ["relay.stopping", "relay.stopped"]
            else:
                assert await ended(relay) == 1
                (left,) = relay.events("relay.left_unsettled")
                assert left["rows"] == 10
                await before_database.accept()
                relay.start()
                await drained(connection)
                assert await stopped(relay) == 0
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.duplicates == (0 if mended else 10)


async def test_a_second_signal_ends_the_goodbye_to_a_database_that_never_answers(
    outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    async with KafkaProxy(kafka.bootstrap_servers) as proxy, proxied(outbox_database.url) as (before_database, url):
        with relay_process(
            url, proxy.address, database=PATIENT_DATABASE, kafka=PATIENT_KAFKA, shutdown_grace_seconds=FOREVER
        ) as relay:
            await publish_hangs(relay, connection, topic, proxy)
            before_database.stand_still()
            relay.signal(signal.SIGTERM)
            await relay.event("relay.stopping")
            relay.signal(signal.SIGTERM)
            assert await ended(relay) == 1


# -- by a defect

DEFECT = """
import sys
from {module} import {type}
async def broken(self):
    raise ZeroDivisionError("of the test")
{type}.{method} = broken
from outbox_relay.cli import main
main(["run", "--config", sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("module", "type_", "method"),
    [
        ("outbox_relay.source.polling", "PollingSource", "claim"),
        ("outbox_relay.source.slots", "Slots", "beat"),
        ("outbox_relay.source.session", "Session", "connection"),
    ],
)
async def test_a_defect_is_one_line_and_an_exit_code_of_its_own(
    module: str, type_: str, method: str, outbox_database: Database, kafka: Kafka, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        f'[database]\nurl = "{outbox_database.url}"\n[kafka]\nbootstrap_servers = ["{kafka.bootstrap_servers}"]\n'
    )
    program = DEFECT.format(module=module, type=type_, method=method)
    done = subprocess.run(  # noqa: ASYNC221
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=ENDS_SECONDS, check=False
    )
    assert done.returncode == 70
    assert done.stderr == ""
    events: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    (failed,) = [event for event in events if event["level"] == "error"]
    assert (failed["event"], failed["error"]) == ("relay.failed", "ZeroDivisionError")
    assert "Traceback" in failed["exception"]
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("relay.stopped", 70)
    connection = await outbox_database.connect()
    assert await connection.fetchval("SELECT count(*) FROM outbox_slot WHERE owner IS NOT NULL") == 0
