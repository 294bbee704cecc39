"""A TCP proxy in front of one server that can stand still, as a network does that loses everything, or refuse."""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass, field

_CHUNK_BYTES = 65_536


@dataclass
class TcpProxy:
    """Runs in the test's own event loop while the block is open."""

    host: str
    port: int  #: of the server
    #: A connection on which the server has said more stands still for good.
    most_bytes_of_answers: float = math.inf
    #: So many requests are passed on, then a connection stands still, and isn't closed, as if its client were frozen.
    #: Counts down.
    requests_until_frozen: float = math.inf
    #: How many came so far.
    requests: int = 0
    #: How often something had to wait because it stands still.
    held_up: int = 0
    _own_port: int = 0
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _listening: asyncio.Server | None = None

    @property
    def own_port(self) -> int:
        return self._own_port

    def stand_still(self) -> None:
        """Pass nothing on in either direction; connections are taken and stay open."""
        self._flowing.clear()

    def flow(self) -> None:
        """Go on with everything that waits."""
        self._flowing.set()

    async def refuse(self) -> None:
        """Close every connection and take none."""
        assert self._listening is not None
        self._listening.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def accept(self) -> None:
        """Take connections, at the same port as ever."""
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", self._own_port)
        self._own_port = self._listening.sockets[0].getsockname()[1]

    async def __aenter__(self) -> TcpProxy:
        self.flow()
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._connect(reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._may_pass()
        server_reader, server_writer = await asyncio.open_connection(self.host, self.port)
        pumps = [
            asyncio.ensure_future(self._pump_requests(reader, server_writer)),
            asyncio.ensure_future(self._pump(server_reader, writer, self.most_bytes_of_answers)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server_writer.transport.abort()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            self.requests += 1
            self.requests_until_frozen -= 1
            if self.requests_until_frozen < 0:
                self.held_up += 1
                await asyncio.Event().wait()
            await self._may_pass()
            writer.write(chunk)
            await writer.drain()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most_bytes: float) -> None:
        passed = 0
        while chunk := await reader.read(_CHUNK_BYTES):
            passed += len(chunk)
            if passed > most_bytes:
                self.held_up += 1
                await asyncio.Event().wait()
            await self._may_pass()
            writer.write(chunk)
            await writer.drain()

    async def _may_pass(self) -> None:
        if not self._flowing.is_set():
            self.held_up += 1
            await self._flowing.wait()
