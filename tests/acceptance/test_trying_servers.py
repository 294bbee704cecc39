"""``python -m outbox_relay.servers``: servers for a newcomer to try things on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from outbox_relay.servers import Kafka
from tests.processes import family_of, is_alive
from tests.waiting import eventually

SECONDS = 90.0
COMMAND = [sys.executable, "-m", "outbox_relay.servers"]


async def test_both_run_until_they_are_interrupted(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """``kafka`` only for its skip, where Apache Kafka isn't to be had."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:  # noqa: ASYNC220
        try:
            assert process.stdout is not None
            exported: dict[str, str] = {}
            while len(exported) < 2:
                match = re.fullmatch(r"export (\w+)=(.+)\n", process.stdout.readline())
                assert match is not None
                exported[match[1]] = match[2]
            connection = await asyncpg.connect(exported["DATABASE_URL"])
            await connection.close()
            made = subprocess.run([*COMMAND, "topic", "orders"], env={**os.environ, **exported}, timeout=SECONDS)  # noqa: ASYNC221
            assert made.returncode == 0
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
