"""Why a server refuses TLS. Under TLS 1.3 it says so after the handshake, when asyncpg is already speaking to it and
may only notice that the connection is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct

from outbox_relay.tls import Tls, tls_refusal

#: PostgreSQL's request for TLS, in the clear; ``S`` is a yes.
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)


async def refusal(host: str, port: int, tls: Tls, timeout_seconds: float) -> str | None:
    """Ask once more, say nothing, and listen. None where that is no matter of TLS."""
    with contextlib.suppress(OSError):
        async with asyncio.timeout(timeout_seconds):
            return await tls_refusal(_handshake(host, port, tls))
    return None


async def _handshake(host: str, port: int, tls: Tls) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_SSL_REQUEST)
        if await reader.read(1) != b"S":
            raise ConnectionError("the server has no TLS")
        await writer.start_tls(tls.context(), server_hostname=host)
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer
