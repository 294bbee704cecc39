"""A relay's process, that ends with the bench however that ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from outbox_relay.servers.guarded import Guarded


class Process:
    """Started once, in a directory of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._guarded = Guarded(name)
        self._last_words: str | None = None

    @property
    def directory(self) -> Path:
        """For its configuration; deleted by :meth:`close`."""
        return self._guarded.directory

    @property
    def pid(self) -> int:
        """0 until it is started."""
        return self._guarded.pid

    async def start(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Start it with ``environment`` added to that of the bench; its output goes to a file."""
        await asyncio.to_thread(self._guarded.start, command, {**os.environ, **(environment or {})})

    async def ended(self, seconds: float) -> int | None:
        """Its exit code, or None when it still runs after so many seconds."""
        return await asyncio.to_thread(self._guarded.wait, seconds)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if that doesn't help. Idempotent."""
        if self.pid and self._last_words is None:
            await asyncio.to_thread(self._guarded.stop, signal.SIGTERM)

    def output(self) -> str:
        """All that it wrote."""
        return self._guarded.output()

    def tail(self) -> str:
        """The last lines of it, also once it is closed."""
        return self._guarded.tail() if self._last_words is None else self._last_words

    async def close(self) -> None:
        """End it as :meth:`stop` does, and delete its directory. Idempotent."""
        await self.stop()
        self._last_words = self.tail()
        await asyncio.to_thread(self._guarded.close)
