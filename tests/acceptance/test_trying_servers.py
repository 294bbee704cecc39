"""``python -m outbox_relay.servers``: servers for a newcomer to try things on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from outbox_relay import config
from outbox_relay.servers import Kafka
from tests.processes import family_of, is_alive
from tests.waiting import eventually

SECONDS = 90.0
COMMAND = [sys.executable, "-m", "outbox_relay.servers"]


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)


async def test_both_run_until_they_are_interrupted(kafka: Kafka, tmp_path: Path) -> None:
    """``kafka`` only for its skip, where Apache Kafka isn't to be had."""
    path = tmp_path / "config.toml"
    command = [*COMMAND, "--config", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:  # noqa: ASYNC220
        try:
            assert process.stdout is not None
            exported: dict[str, str] = {}
            while len(exported) < 2:
                match = re.fullmatch(r"export (\w+)=(.+)\n", process.stdout.readline())
                assert match is not None
                exported[match[1]] = match[2]
            # The configuration that it wrote is of the same servers.
            settings = config.load(path)
            assert settings.database.url == exported["DATABASE_URL"]
            assert ",".join(settings.kafka.bootstrap_servers) == exported["KAFKA_BOOTSTRAP_SERVERS"]
            assert settings.kafka.allowed_topics == ["orders"]
            assert path.read_text().splitlines()[0].endswith("writes it anew each time: copy it before you change it.")
            connection = await asyncpg.connect(exported["DATABASE_URL"])
            await connection.close()
            made = run("topic", "orders", **exported)
            assert made.returncode == 0
            assert made.stdout == (
                f"made the topic orders with 3 partitions on {exported['KAFKA_BOOTSTRAP_SERVERS']}\n"
            )
            again = run("topic", "orders", "--partitions", "5", **exported)
            assert (again.returncode, again.stderr) == (0, "")
            assert again.stdout == (
                f"the topic orders is there already on {exported['KAFKA_BOOTSTRAP_SERVERS']}, and stays as it is\n"
            )
            admin = AIOKafkaAdminClient(bootstrap_servers=exported["KAFKA_BOOTSTRAP_SERVERS"])
            await admin.start()
            assert "orders" in await admin.list_topics()
            await admin.close()
            family = family_of(process.pid)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(SECONDS) == 0
            await eventually(lambda: not any(map(is_alive, family)), "the end of both", SECONDS)
        finally:
            process.kill()


async def test_of_the_two_only_what_is_missing_is_started() -> None:
    environment = {**os.environ, "KAFKA_BOOTSTRAP_SERVERS": "localhost:1"}
    with subprocess.Popen(  # noqa: ASYNC220
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline().startswith("export DATABASE_URL=postgresql://")
            said = ""
            while "Ctrl-C" not in said:
                said = process.stderr.readline()
                assert said
            assert said == "PostgreSQL runs until Ctrl-C, which deletes its data\n"
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


def test_nothing_is_started_where_both_are_set() -> None:
    ended = run(DATABASE_URL="postgresql://localhost:1/db", KAFKA_BOOTSTRAP_SERVERS="localhost:1")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == (
        "both are set already; nothing to start. Unset them to have servers of your own here:\n"
        "unset DATABASE_URL KAFKA_BOOTSTRAP_SERVERS\n"
    )


def test_no_configuration_of_somebody_s_own_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[database]\n")
    ended = run("--config", str(path))
    assert ended.returncode == 2
    assert "is there already, and wasn't written here" in ended.stderr
    assert path.read_text() == "[database]\n"
    ended = run("--config", str(tmp_path / "other.toml"), KAFKA_BOOTSTRAP_SERVERS="localhost:1")
    assert ended.returncode == 2
    assert "unset KAFKA_BOOTSTRAP_SERVERS" in ended.stderr
    ended = run("--config", str(tmp_path / "other.toml"), DATABASE_URL="x", KAFKA_BOOTSTRAP_SERVERS="localhost:1")
    assert ended.returncode == 2
    assert "so nothing was written: unset DATABASE_URL KAFKA_BOOTSTRAP_SERVERS" in ended.stderr
    assert not (tmp_path / "other.toml").exists()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=SECONDS
    )
