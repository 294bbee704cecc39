"""Waiting for a condition, never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
async def eventually(condition: Callable[[], Awaitable[T | None]], what: str, deadline_seconds: float = ...) -> T: ...
@overload
async def eventually(condition: Callable[[], T | None], what: str, deadline_seconds: float = ...) -> T: ...
async def eventually(condition: Callable[[], Any], what: str, deadline_seconds: float = 30.0) -> Any:
    """The first truthy answer of ``condition``, which is asked again and again; AssertionError past the deadline."""
    ends = time.monotonic() + deadline_seconds
    while True:
        answer = condition()
        value = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        assert time.monotonic() < ends, f"not within {deadline_seconds:g} s: {what}"
        await asyncio.sleep(0.01)
