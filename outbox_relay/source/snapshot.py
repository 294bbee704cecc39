"""A look at the outbox that locks and changes nothing, for commands that only tell."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from outbox_relay.source.session import Session

_SNAPSHOT = """
-- begin a snapshot
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY
"""

# As for a claim: statistics of a mostly empty outbox are stale when a burst comes.
_SETTINGS = """
-- choose plans
SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('jit', 'off', true)
"""

# The ``limit`` oldest unsent rows of each of $1 buckets, ``columns`` of them; a range of (bucket, id) as in a claim,
# for the same reason.
OLDEST_OF_BUCKETS = """generate_series(0, $1::integer - 1) AS every (bucket)
CROSS JOIN LATERAL (
    SELECT o.{{id}} AS id, {columns} FROM {{outbox}} o
    WHERE (o.{{bucket}}, o.{{id}}) >= (every.bucket, -9223372036854775808)
      AND (o.{{bucket}}, o.{{id}}) < (every.bucket + 1, -9223372036854775808)
      AND o.{{sent_at}} IS NULL AND o.{{parked_at}} IS NULL
    ORDER BY o.{{bucket}}, o.{{id}}
    LIMIT {limit}
) AS oldest
"""


@contextlib.asynccontextmanager
async def snapshot(session: Session) -> AsyncIterator[None]:
    """A read-only transaction in which every statement sees the same."""
    async with session.transaction():
        await session.fetch(_SNAPSHOT)
        await session.fetch(_SETTINGS)
        yield


async def one(session: Session, statement: str, *arguments: Any) -> asyncpg.Record:
    """The only row of the answer."""
    (row,) = await session.fetch(statement, *arguments)
    return row
