"""Rows that wait: parked as a relay would, and the rules that hold whenever nobody has a slot locked."""

from __future__ import annotations

from typing import Any

import asyncpg

_PARK = """
WITH marked AS (
    UPDATE outbox SET parked_at = CASE WHEN $2 = 'trying' THEN NULL ELSE now() END WHERE id = $1
    RETURNING id, bucket, topic, key
)
INSERT INTO outbox_parked (id, bucket, topic, key, state, attempts, due_at, error, reason)
SELECT id, bucket, topic, key, $2, $3, now() + make_interval(secs => $4), $5, $6 FROM marked
"""

# As decision 0009 numbers them. By a hash of topic and key, which is what a line is.
_BROKEN = {
    "1: parked in both tables or in none": """
        SELECT id FROM outbox o FULL JOIN outbox_parked p USING (id)
        WHERE (o.parked_at IS NOT NULL) IS DISTINCT FROM (p.id IS NOT NULL AND p.state <> 'trying')
           OR (p.id IS NOT NULL AND o.sent_at IS NOT NULL)
    """,
    "3: the first of a line isn't blocked without being due": """
        SELECT id FROM (
            SELECT DISTINCT ON (bucket, line) id, state, due_at FROM outbox_parked WHERE state <> 'discarded'
            ORDER BY bucket, line, id
        ) AS first WHERE state = 'blocked' AND due_at IS NULL
    """,
}


async def insert(connection: asyncpg.Connection, topic: str, key: str | None, **columns: Any) -> int:
    """The id of a new row."""
    columns = {"topic": topic, "key": key, "payload": b"x", **columns}
    numbers = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    id_: int = await connection.fetchval(
        f"INSERT INTO outbox ({', '.join(columns)}) VALUES ({numbers}) RETURNING id", *columns.values()
    )
    return id_


async def park(
    connection: asyncpg.Connection,
    id_: int,
    state: str,
    *,
    attempts: int = 0,
    due_in_seconds: float | None = None,
    error: str | None = None,
    reason: str | None = None,
) -> int:
    """Park a row that is there; its id."""
    assert await connection.execute(_PARK, id_, state, attempts, due_in_seconds, error, reason) == "INSERT 0 1"
    return id_


async def dead(connection: asyncpg.Connection, topic: str, key: str | None, **columns: Any) -> int:
    """A new row that was refused too often."""
    id_ = await insert(connection, topic, key, **columns)
    return await park(connection, id_, "dead", attempts=5, error="MessageSizeTooLargeError", reason="too large")


async def blocked(connection: asyncpg.Connection, topic: str, key: str | None) -> int:
    """A new row behind another."""
    return await park(connection, await insert(connection, topic, key), "blocked")


async def sent(connection: asyncpg.Connection, topic: str, key: str | None, at: str, **columns: Any) -> int:
    """A new row that was sent at that time."""
    id_ = await insert(connection, topic, key, **columns)
    await connection.execute("UPDATE outbox SET sent_at = $2::text::timestamptz WHERE id = $1", id_, at)
    return id_


async def broken_rules(connection: asyncpg.Connection) -> dict[str, list[int]]:
    """By rule, the rows that break it; empty where all is well. Each rule is looked at in one snapshot."""
    found = {rule: [row["id"] for row in await connection.fetch(sql)] for rule, sql in _BROKEN.items()}
    return {rule: ids for rule, ids in found.items() if ids}


async def states(connection: asyncpg.Connection) -> dict[int, str]:
    """By id, the state of each row of ``outbox_parked``."""
    return {row["id"]: row["state"] for row in await connection.fetch("SELECT id, state FROM outbox_parked")}
