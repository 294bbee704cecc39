"""Waiting for a condition, never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(condition: Callable[[], T | Awaitable[T]], what: str, deadline_seconds: float = 30.0) -> T:
    """The first truthy answer of ``condition``, which is asked again and again; AssertionError past the deadline."""
    ends = time.monotonic() + deadline_seconds
    while True:
        answer = condition()
        value: T = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        assert time.monotonic() < ends, f"not within {deadline_seconds:g} s: {what}"
        await asyncio.sleep(0.01)
