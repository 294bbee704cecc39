"""A TCP proxy in front of one Kafka broker that sees each request, and that can stand still, refuse, swallow or lie."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PRODUCE, METADATA, INIT_PRODUCER_ID = 0, 3, 22
_CHUNK_BYTES = 65_536


@dataclass
class Request:
    """One request as far as it was received; ``began`` and ``ended`` are monotonic seconds."""

    connection: int
    api_key: int
    version: int
    size: int
    began: float
    received: int = 0
    ended: float = 0.0

    @property
    def complete(self) -> bool:
        return self.received == self.size


@dataclass
class KafkaProxy:
    """Clients that come through here stay here: the broker's address in its answers is replaced by this one's."""

    bootstrap_servers: str
    requests: list[Request] = field(default_factory=list)
    #: Requests of these API keys are neither passed on nor answered.
    swallowed: set[int] = field(default_factory=set)
    #: Changes an answer to a request of that API key, given the version and the bytes behind the correlation id.
    lies: dict[int, Callable[[int, bytes], bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        host, port = self.bootstrap_servers.rsplit(":", 1)
        self._broker = (host, int(port))
        self._port = 0
        self._connections = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def of(self, api_key: int) -> list[Request]:
        return [request for request in self.requests if request.api_key == api_key]

    # -- what it can do

    def stand_still(self) -> None:
        """Pass nothing on in either direction; connections are taken and stay open."""
        self._flowing.clear()

    def flow(self) -> None:
        """Go on with everything that waits."""
        self._flowing.set()

    async def refuse(self) -> None:
        """Close every connection and take none."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def accept(self) -> None:
        """Take connections, at the same address as ever."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def __aenter__(self) -> KafkaProxy:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()

    # -- how

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._connections += 1
        try:
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                await self._connect(self._connections, reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _connect(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        broker_reader, broker_writer = await asyncio.open_connection(*self._broker)
        asked: dict[int, Request] = {}
        pumps = [
            asyncio.ensure_future(self._requests(number, reader, broker_writer, asked)),
            asyncio.ensure_future(self._answers(broker_reader, writer, asked)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            broker_writer.transport.abort()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _requests(
        self, number: int, reader: asyncio.StreamReader, broker: asyncio.StreamWriter, asked: dict[int, Request]
    ) -> None:
        while True:
            head = await reader.readexactly(12)
            size, api_key, version, correlation_id = struct.unpack(">ihhi", head)
            request = Request(number, api_key, version, size + 4, time.monotonic(), len(head))
            self.requests.append(request)
            asked[correlation_id] = request
            swallowed = api_key in self.swallowed
            piece = head
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
            request.ended = time.monotonic()

    async def _answers(
        self, broker: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[int, Request]
    ) -> None:
        mine = struct.pack(">i", self._port)
        theirs = struct.pack(">i", self._broker[1])
        while True:
            (size,) = struct.unpack(">i", await broker.readexactly(4))
            answer = await broker.readexactly(size)
            request = asked.pop(int.from_bytes(answer[:4], "big"))
            body = answer[4:].replace(b"127.0.0.1" + theirs, b"127.0.0.1" + mine)
            if lie := self.lies.get(request.api_key):
                body = lie(request.version, body)
            await self._flowing.wait()
            writer.write(struct.pack(">i", 4 + len(body)) + answer[:4] + body)
            await writer.drain()
