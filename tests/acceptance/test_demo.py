"""The demo as a person starts it: what it shows, that it finds damage, and that it leaves nothing, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from outbox_relay.servers import Kafka, Postgres
from tests.processes import family_of, is_alive
from tests.waiting import eventually

SECONDS = 90.0
UNHARMED = "Nothing was lost, invented or out of order, and each order was charged once"

#: A relay that is broken in the way that BROKEN names: it wraps the real publisher, in the relay's process alone.
BROKEN_RELAY = """
import os, sys
if "run" in sys.orig_argv:
    from dataclasses import replace
    from uuid import uuid4
    from outbox_relay.message import Delivered
    from outbox_relay.publisher import KafkaPublisher

    publish = KafkaPublisher.publish

    async def loses(self, records, is_ours):
        kept = [record for record in records if record.id % 7]
        await publish(self, kept, is_ours)
        return [Delivered(record) for record in records]

    async def reorders(self, records, is_ours):
        return list(reversed(await publish(self, records[::-1], is_ours)))

    async def invents(self, records, is_ours):
        outcomes = await publish(self, records, is_ours)
        again = [replace(record, headers=[("id", str(uuid4()).encode()), *record.headers[1:]]) for record in records]
        await publish(self, again[:1], is_ours)
        return outcomes

    KafkaPublisher.publish = {"lost": loses, "out_of_order": reorders, "invented": invents}[os.environ["BROKEN"]]
"""

#: A payment service that takes every message for a new one, as without the inbox.
FORGETFUL_PAYMENTS = """
import sys
if "outbox_relay.demo_payments" in sys.orig_argv:
    from outbox_relay.inbox.postgres import Inbox

    async def accept(self, connection, message):
        return True

    async def accept_batch(self, connection, messages):
        return list(messages)

    Inbox.accept, Inbox.accept_batch = accept, accept_batch
"""


class Demo:
    """One ``outbox-relay demo`` in a session of its own, as from a shell."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "outbox_relay", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self.said = ""

    def until(self, text: str) -> None:
        """Read on until it says this."""
        while text not in self.said:
            assert self._read(), f"the demo never said {text!r}:\n{self.said}"

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        return self.process.wait(SECONDS)

    def _read(self) -> bool:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], SECONDS)[0], f"the demo stands still:\n{self.said}"
        came = os.read(self.process.stdout.fileno(), 65_536)
        self.said += came.decode()
        return bool(came)


@contextlib.contextmanager
def demo(*arguments: str, **environment: str) -> Iterator[Demo]:
    started = Demo(*arguments, **environment)
    with started.process:
        try:
            yield started
        finally:
            started.process.kill()


@pytest.fixture
def own_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing is named in the environment."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)


@pytest.fixture
def named_servers(postgres: Postgres, kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres.url)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers)


async def left_behind(postgres: Postgres, kafka: Kafka) -> list[str]:
    """Databases and topics of demos."""
    connection = await asyncpg.connect(postgres.url)
    names = await connection.fetch("SELECT datname FROM pg_database WHERE datname LIKE 'outbox_demo%'")
    await connection.close()
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    topics = await admin.list_topics()
    await admin.close()
    return [*(name for (name,) in names), *(topic for topic in topics if topic.startswith("demo-"))]


async def test_the_whole_story_on_servers_of_its_own(own_servers: None, kafka: Kafka) -> None:
    """``kafka`` only for its skip, where Apache Kafka isn't to be had."""
    with demo("--json") as started:
        started.until("relay started")
        family = family_of(started.process.pid)
        assert started.end() == 0
    lines = started.said.splitlines()
    numbers = json.loads(lines[-1])
    assert list(numbers) == [
        *("committed", "rolled_back", "published_at_kill", "published"),
        *("lost", "invented", "duplicates", "out_of_order", "charged", "seconds"),
    ]
    assert numbers["committed"] + numbers["rolled_back"] == 1000
    assert numbers["committed"] == numbers["published"] == numbers["charged"]
    assert numbers["rolled_back"] >= 50
    assert 100 <= numbers["published_at_kill"] <= 900
    assert (numbers["lost"], numbers["invented"], numbers["out_of_order"]) == (0, 0, 0)
    # The kill came while orders were still to be placed.
    killed = re.search(
        r"relay killed \(kill -9\): (\d+) orders placed, (\d+) of them rolled back; (\d+) rows marked as sent",
        started.said,
    )
    assert killed is not None
    placed, rolled_back, sent = map(int, killed.groups())
    assert 0 < rolled_back < placed < 1000
    assert sent == numbers["published_at_kill"]
    read_back = re.search(r"read back: (\d+) records, (\d+) of them sent again by the relay", started.said)
    assert read_back is not None
    assert [int(number) for number in read_back.groups()] == [
        numbers["published"] + numbers["duplicates"],
        numbers["duplicates"],
    ]
    repeats = re.search(r"(\d+) of them, every ninth of each partition, are sent again on purpose", started.said)
    assert repeats is not None
    assert 90 <= int(repeats[1]) <= 110
    assert len(family) > 5  # the demo, and a guard and a process at least for PostgreSQL and Kafka
    await eventually(lambda: not any(map(is_alive, family)), "the end of all that it started", SECONDS)


async def test_servers_that_are_named_are_used_and_left_as_they_were(
    named_servers: None, postgres: Postgres, kafka: Kafka
) -> None:
    with demo() as started:
        assert started.end() == 0
    assert "using PostgreSQL of DATABASE_URL" in started.said
    assert "using Kafka of KAFKA_BOOTSTRAP_SERVERS" in started.said
    assert started.said.splitlines()[-1] == UNHARMED + "."
    assert await left_behind(postgres, kafka) == []


@pytest.mark.parametrize("damage", ["lost", "invented", "out_of_order"])
async def test_damage_is_found_and_the_exit_code_says_so(damage: str, named_servers: None, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_RELAY)
    with demo("--json", PYTHONPATH=str(tmp_path), BROKEN=damage) as started:
        assert started.end() == 1
    numbers = json.loads(started.said.splitlines()[-1])
    assert numbers[damage] > 0
    assert "The relay did damage" in started.said


async def test_orders_that_are_charged_twice_are_found(named_servers: None, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FORGETFUL_PAYMENTS)
    with demo("--json", PYTHONPATH=str(tmp_path)) as started:
        assert started.end() == 1
    numbers = json.loads(started.said.splitlines()[-1])
    assert numbers["charged"] > numbers["committed"] == numbers["published"]
    assert "Not each order was charged once" in started.said
    assert "The relay did damage" not in started.said


async def test_where_maven_cannot_be_reached_the_mock_plays_kafka(own_servers: None, fake_tools: Path) -> None:
    with demo() as started:
        assert started.end() == 0
    mock = [line for line in started.said.splitlines() if "using librdkafka's mock instead of Apache Kafka" in line]
    assert len(mock) == 1
    assert started.said.splitlines()[-1].startswith(f"{UNHARMED} (on a mock of Kafka")


@pytest.mark.parametrize("when", ["starting", "relay started", "sent again on purpose"])
async def test_ctrl_c_ends_everything(when: str, own_servers: None, kafka: Kafka) -> None:
    with demo() as started:
        started.until(when)
        family = family_of(started.process.pid)
        os.killpg(started.process.pid, signal.SIGINT)
        assert started.end() == 130
    assert started.said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in started.said
    await eventually(lambda: not any(map(is_alive, family)), "the end of all that it started", SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_demo_leaves_named_servers_as_they_were(
    number: signal.Signals, named_servers: None, postgres: Postgres, kafka: Kafka
) -> None:
    with demo() as started:
        started.until("relay killed")
        started.process.send_signal(number)
        assert started.end() == 130
    assert await left_behind(postgres, kafka) == []


async def test_a_killed_demo_leaves_no_process(own_servers: None, kafka: Kafka) -> None:
    with demo() as started:
        started.until("relay started")
        family = family_of(started.process.pid)
        started.process.kill()
        started.process.wait(SECONDS)
        assert len(family) > 5
        await eventually(lambda: not any(map(is_alive, family)), "the end of all that it started", SECONDS)


def test_a_terminal_shows_a_table(named_servers: None) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "outbox_relay", "demo"],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # EIO is how a terminal says that the other side is gone
            while came := os.read(ours, 65_536):
                said += came
        assert process.wait(SECONDS) == 0
    os.close(ours)
    assert "╭" in said.decode()
    assert "orders placed" in said.decode()
