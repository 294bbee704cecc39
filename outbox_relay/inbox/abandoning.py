"""Ends a producer of aiokafka in bounded time, whatever it has in hand.

Its own ``stop`` flushes first, and without a broker never ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

_SECONDS = 5.0


async def abandon(producer: Any) -> None:
    """What it has and hasn't sent is never sent; what was sent and isn't answered is in doubt."""
    producer._closed = True
    sender = producer._sender.sender_task
    ends = time.monotonic() + _SECONDS
    # More than once, since it waits for its requests when it is cancelled.
    while sender is not None and not sender.done() and time.monotonic() < ends:
        sender.cancel()
        await asyncio.wait({sender}, timeout=0.1)
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_SECONDS):
            await producer.client.close()
    waiter = producer._txn_manager and producer._txn_manager._transaction_waiter
    if waiter is not None and waiter.done() and not waiter.cancelled():
        waiter.exception()  # or asyncio says at length that nobody asked
