"""The table and the process of the arms that are a loop in one file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import ClassVar

from bench.arms import Run
from bench.arms.ours import count_in
from bench.arms.process import Process
from bench.stage import connected

TABLE = """
CREATE TABLE outbox (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic      text        NOT NULL,
    key        text        NOT NULL,
    payload    bytea       NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    sent_at    timestamptz
);
CREATE INDEX outbox_unsent ON outbox (id) WHERE sent_at IS NULL
"""

INSERT = """
INSERT INTO outbox (topic, key, payload)
SELECT '{topic}', rows.key, convert_to(rows.payload, 'UTF8') FROM {rows} ORDER BY rows.n
"""

UNSENT = "SELECT count(*) FROM outbox WHERE sent_at IS NULL"


class PlainLoop:
    """A module of this package, run as a process with the urls of both servers as its arguments."""

    module: ClassVar[str]
    ordered: ClassVar[bool] = True
    polling: ClassVar[bool] = True
    deletes: ClassVar[bool] = False
    slow: ClassVar[bool] = False

    def __init__(self) -> None:
        self._process: Process | None = None
        self._topic = ""

    async def prepare(self, run: Run) -> None:
        self._topic = run.topic
        async with connected(run.database_url) as connection:
            await connection.execute(TABLE)

    def insert(self, rows: str) -> str:
        return INSERT.format(topic=self._topic, rows=rows)

    async def start(self, run: Run) -> None:
        self._process = Process(self.module.rpartition(".")[2])
        await self._process.start(
            [sys.executable, "-m", self.module, run.database_url, run.bootstrap_servers],
            {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    @property
    def pids(self) -> Sequence[int]:
        return [self._process.pid] if self._process is not None else []

    async def unsettled(self, run: Run) -> int | None:
        return await count_in(run, UNSENT)

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.close()

    def log(self) -> str:
        return self._process.tail() if self._process is not None else ""
