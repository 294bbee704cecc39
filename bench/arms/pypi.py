"""What arms from PyPI have in common: a program as the peer's documentation has it, in an environment of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from bench.arms import ArmUnavailableError, Run
from bench.arms.ours import count_in
from bench.arms.process import Process
from bench.peers.environments import interpreter, program
from outbox_relay.errors import ServerError

_SCHEMA_SECONDS = 60.0


class PypiArm:
    """``python program.py schema`` makes its table, ``python program.py relay`` relays until SIGTERM."""

    polling: ClassVar[bool] = True
    peer: ClassVar[str]  #: its directory in bench/peers
    pending: ClassVar[str]  #: counts the rows that aren't sent, or aren't marked
    more_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._process: Process | None = None

    async def prepare(self, run: Run) -> None:
        self.run = run
        try:
            self._python = await asyncio.to_thread(interpreter, self.peer)
        except ServerError as error:
            raise ArmUnavailableError(str(error)) from error
        self._process = Process(self.peer)
        await self._process.start(self._command("schema"))
        if (code := await self._process.ended(_SCHEMA_SECONDS)) != 0:
            raise ServerError(f"{self.peer} could not make its table ({code}):\n{self._process.tail()}")

    async def start(self, run: Run) -> None:
        assert self._process is not None
        await self._process.start(self._command("relay"))

    @property
    def pids(self) -> Sequence[int]:
        return [self._process.pid] if self._process else []

    async def unsettled(self, run: Run) -> int | None:
        return await count_in(run, self.pending)

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.close()

    def log(self) -> str:
        return self._process.tail() if self._process else ""

    def _command(self, what: str) -> list[str]:
        arguments = [what, self.run.database_url, self.run.bootstrap_servers, self.run.topic, *self.more_arguments]
        return [str(self._python), str(program(self.peer)), *arguments]
