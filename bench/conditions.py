"""What an outbox of ours looks like in bad times, for drains that shouldn't mind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from bench.arms import Run
from bench.stage import connected

SENT_ROWS = 10_000_000
PARKED_ROWS = 100_000
_SECONDS = 600.0
_KEYS = 1_000

_SENT = f"""
INSERT INTO outbox (topic, key, type, payload, sent_at)
SELECT $1, 'order-' || n % {_KEYS}, 'OrderPlaced', decode(repeat('2a', 100), 'hex'), now()
FROM generate_series(1, $2::bigint) AS n
"""

# One in ten was refused until it was dead, the others wait behind it.
_PARKED = """
WITH parked AS (
    INSERT INTO outbox (topic, key, type, payload, parked_at)
    SELECT $1, 'parked-' || n / 10, 'OrderPlaced', decode(repeat('2a', 100), 'hex'), now()
    FROM generate_series(0, $2::bigint - 1) AS n
    RETURNING id, bucket, topic, key
)
INSERT INTO outbox_parked (id, bucket, topic, key, state, attempts, error, reason)
SELECT id, bucket, topic, key, CASE WHEN first THEN 'dead' ELSE 'blocked' END, CASE WHEN first THEN 10 ELSE 0 END,
       CASE WHEN first THEN 'MessageSizeTooLargeError' END, CASE WHEN first THEN 'for a measurement' END
FROM (SELECT *, row_number() OVER (PARTITION BY key ORDER BY id) = 1 AS first FROM parked) AS numbered
"""


class Condition(Protocol):
    """Brings about a state of the run's tables; ``before`` the backlog is written, and ``during`` the drain."""

    async def before(self, run: Run) -> None: ...

    def during(self, run: Run) -> AbstractAsyncContextManager[None]: ...


class Clean:
    """Nothing special; what others are compared with."""

    async def before(self, run: Run) -> None:
        pass

    @asynccontextmanager
    async def during(self, run: Run) -> AsyncIterator[None]:
        yield


CLEAN = Clean()


class Sent(Clean):
    """Many rows were sent long ago."""

    def __init__(self, rows: int = SENT_ROWS) -> None:
        self._rows = rows

    async def before(self, run: Run) -> None:
        await _execute(run, _SENT, self._rows)


class Parked(Clean):
    """Many rows wait for somebody to decide, or behind such a row."""

    def __init__(self, rows: int = PARKED_ROWS) -> None:
        self._rows = rows

    async def before(self, run: Run) -> None:
        await _execute(run, _PARKED, self._rows)


class XminHeld(Clean):
    """Somebody's transaction keeps every dead row visible, until the drain is over."""

    @asynccontextmanager
    async def during(self, run: Run) -> AsyncIterator[None]:
        async with connected(run.database_url) as stranger, stranger.transaction(isolation="repeatable_read"):
            await stranger.fetchval("SELECT pg_current_xact_id()")
            yield


async def _execute(run: Run, statement: str, rows: int) -> None:
    async with connected(run.database_url) as connection:
        await connection.execute(statement, run.topic, rows, timeout=_SECONDS)
