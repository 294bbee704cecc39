"""outbox-relay itself, as processes of their own, with the settings it ships with."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bench.arms import ArmUnavailableError, Run
from bench.arms.process import Process
from bench.stage import connected
from outbox_relay import schema, wake_up
from outbox_relay.config import RelayConfig
from outbox_relay.source.statements import OUTBOX

INSERT = """
INSERT INTO outbox (topic, key, type, payload)
SELECT '{topic}', rows.key, 'OrderPlaced', convert_to(rows.payload, 'UTF8') FROM {rows} ORDER BY rows.n
"""

UNSENT = "SELECT count(*) FROM outbox WHERE sent_at IS NULL AND parked_at IS NULL"


class Ours:
    """What all modes share."""

    ordered: ClassVar[bool] = True
    polling: ClassVar[bool] = True
    slow: ClassVar[bool] = False
    note: ClassVar[str] = ""
    processes: ClassVar[int] = 1
    #: Of ``[relay]``, what differs from the defaults.
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self) -> None:
        self._processes: list[Process] = []
        self._topic = ""

    async def prepare(self, run: Run) -> None:
        if unknown := self.settings.keys() - RelayConfig.model_fields.keys():
            raise ArmUnavailableError(f"this release has no setting {', '.join(sorted(unknown))}")
        self._topic = run.topic
        await create_outbox(run)

    def insert(self, rows: str) -> str:
        return INSERT.format(topic=self._topic, rows=rows)

    async def start(self, run: Run) -> None:
        for number in range(1, self.processes + 1):
            process = Process("relay")
            self._processes.append(process)
            path = process.directory / "config.toml"
            path.write_text(_toml(self._config(run, number)))
            command = [sys.executable, "-m", "outbox_relay", "run", "--config", str(path)]
            await process.start(command, {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})

    @property
    def pids(self) -> Sequence[int]:
        return [process.pid for process in self._processes]

    async def unsettled(self, run: Run) -> int | None:
        return await count_in(run, UNSENT)

    async def stop(self) -> None:
        for process in self._processes:
            await process.close()

    def log(self) -> str:
        return "\n".join(process.tail() for process in self._processes)

    def _config(self, run: Run, number: int) -> Mapping[str, Mapping[str, Any]]:
        return {
            "database": {"url": run.database_url},
            "kafka": {"bootstrap_servers": [run.bootstrap_servers]},
            "relay": {"name": f"bench-{number}", **self.settings},
            "log": {"format": "json"},
        }


class Mark(Ours):
    """A sent row stays, and is marked."""

    name: ClassVar[str] = "mark"
    deletes: ClassVar[bool] = False


class Woken(Mark):
    """The same, and writers wake it while it is idle."""

    name: ClassVar[str] = "mark, woken"
    note: ClassVar[str] = "with the trigger by which writers wake an idle relay (`schema apply --wake-up`)"

    async def prepare(self, run: Run) -> None:
        await super().prepare(run)
        async with connected(run.database_url) as connection:
            await wake_up.apply(connection, wake_up.wake_up_sql(OUTBOX))


class FourProcesses(Mark):
    """Four relays share the outbox."""

    name: ClassVar[str] = "mark, 4 processes"
    processes: ClassVar[int] = 4


class Delete(Ours):
    """A sent row is deleted."""

    name: ClassVar[str] = "delete"
    deletes: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, Any]] = {"after_publish": "delete"}


async def create_outbox(run: Run) -> None:
    """The product's schema, as it is shipped."""
    async with connected(run.database_url) as connection:
        await schema.apply(connection)


async def count_in(run: Run, statement: str) -> int:
    """What a statement counts in the run's database."""
    async with connected(run.database_url) as connection:
        return int(await connection.fetchval(statement, timeout=60))


def _toml(config: Mapping[str, Mapping[str, Any]]) -> str:
    # A string, a number, a boolean and a list of strings are written alike in JSON and in TOML.
    return "\n".join(
        "\n".join([f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in keys.items())])
        for table, keys in config.items()
    )
