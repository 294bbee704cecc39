"""A TCP proxy in front of one Kafka broker that sees each request, and that can stand still, refuse, swallow or lie."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PRODUCE, METADATA, API_VERSIONS, INIT_PRODUCER_ID = 0, 3, 18, 22
_CHUNK_BYTES = 65_536


@dataclass
class Request:
    """One request as far as it was received. ``began`` is in monotonic seconds."""

    api_key: int
    version: int
    size: int
    began: float
    received: int = 0

    @property
    def complete(self) -> bool:
        return self.received == self.size


@dataclass
class KafkaProxy:
    """Clients that come through here stay here: the broker's address in its answers is replaced by this one's."""

    bootstrap_servers: str
    requests: list[Request] = field(default_factory=list)
    #: How many connections were tried, those refused among them.
    connections: int = 0
    #: Every connection is cut, and each new one at once.
    refusing: bool = False
    #: Requests of these API keys are neither passed on nor answered.
    swallowed: set[int] = field(default_factory=set)
    #: Changes an answer to a request of that API key, given the version and the bytes behind the correlation id.
    lies: dict[int, Callable[[int, bytes], bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        host, port = self.bootstrap_servers.rsplit(":", 1)
        self._broker = (host, int(port))
        self._port = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def of(self, api_key: int) -> list[Request]:
        return [request for request in self.requests if request.api_key == api_key]

    @property
    def idle(self) -> bool:
        """Whether no connection is open."""
        return not self._tasks

    # -- what it can do

    def stand_still(self) -> None:
        """Pass nothing on in either direction; connections are taken and stay open."""
        self._flowing.clear()

    async def refuse(self) -> None:
        """Cut every connection, whatever it still carries, and take none until :meth:`flow`."""
        self.refusing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def flow(self) -> None:
        """Work again; what stood still goes on."""
        self.refusing = False
        self._flowing.set()

    async def __aenter__(self) -> KafkaProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.refuse()

    # -- how

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                if not self.refusing:
                    await self._connect(reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        broker_reader, broker_writer = await asyncio.open_connection(*self._broker)
        asked: dict[int, Request] = {}
        pumps = [
            asyncio.ensure_future(self._pass_requests(reader, broker_writer, asked)),
            asyncio.ensure_future(self._pass_answers(broker_reader, writer, asked)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            broker_writer.transport.abort()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pass_requests(
        self, reader: asyncio.StreamReader, broker: asyncio.StreamWriter, asked: dict[int, Request]
    ) -> None:
        while True:
            piece = await reader.readexactly(12)
            size, api_key, version, correlation_id = struct.unpack(">ihhi", piece)
            request = Request(api_key, version, size + 4, time.monotonic(), len(piece))
            self.requests.append(request)
            asked[correlation_id] = request
            swallowed = api_key in self.swallowed
            while True:
                await self._flowing.wait()
                if not swallowed:
                    broker.write(piece)
                    await broker.drain()
                if request.complete:
                    break
                piece = await reader.read(min(_CHUNK_BYTES, request.size - request.received))
                request.received += len(piece)
                if not piece:
                    return

    async def _pass_answers(
        self, broker: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[int, Request]
    ) -> None:
        mine = b"127.0.0.1" + struct.pack(">i", self._port)
        theirs = b"127.0.0.1" + struct.pack(">i", self._broker[1])
        while True:
            (size,) = struct.unpack(">i", await broker.readexactly(4))
            answer = await broker.readexactly(size)
            request = asked.pop(int.from_bytes(answer[:4], "big"))
            body = answer[4:].replace(theirs, mine)
            if lie := self.lies.get(request.api_key):
                body = lie(request.version, body)
            await self._flowing.wait()
            writer.write(struct.pack(">i", 4 + len(body)) + answer[:4] + body)
            await writer.drain()
