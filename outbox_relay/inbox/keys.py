"""Order per key while keys run in parallel: one task a key that has messages, which handles them one after another."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from itertools import islice
from typing import Generic, TypeVar

M = TypeVar("M")


class KeyQueues(Generic[M]):
    """Of one partition. A message without a key waits for none and none waits for it.

    ``handle`` gets up to ``most_at_once`` messages of a key that wait, in their order.
    """

    def __init__(self, handle: Callable[[list[M]], Awaitable[None]], *, most_at_once: int = 1) -> None:
        self._handle, self._most_at_once = handle, most_at_once
        self._waiting: dict[Hashable, deque[M]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.defect: BaseException | None = None  #: what ``handle`` has raised, which it shouldn't

    def add(self, key: Hashable | None, message: M) -> None:
        """Handle the message once those before it of its key are."""
        if key is not None and key in self._waiting:
            self._waiting[key].append(message)
            return
        queue = deque([message])
        if key is not None:
            self._waiting[key] = queue
        task = asyncio.create_task(self._run(key, queue))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self.defect = self.defect or task.exception()
        elif not self._closing:
            self.defect = RuntimeError("a handler's task was cancelled, and not by the consumer")

    async def _run(self, key: Hashable | None, queue: deque[M]) -> None:
        while queue and not self._closing:
            messages = list(islice(queue, self._most_at_once))
            for _ in messages:
                queue.popleft()
            await self._handle(messages)
        self._waiting.pop(key, None)

    async def close(self, grace_seconds: float) -> None:
        """What is in work is finished within the grace, or cancelled; what waits isn't begun.

        Nothing runs after it but a handler that doesn't let itself be cancelled, which is waited for as long again.
        """
        self._closing = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=grace_seconds)
