"""What the demo waits by: several things at once, and work in threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def together(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """As gather, but when one fails the others have ended before the error is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run what blocks in a thread that nobody has to wait for: a Ctrl-C doesn't wait for a download."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(how: Callable[[Any], None], what: object) -> None:
        if not future.cancelled():
            how(what)

    def work() -> None:
        try:
            outcome: tuple[Callable[[Any], None], object] = future.set_result, call()
        except Exception as error:
            outcome = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return future
