"""What a claim costs beside a hundred thousand rows that wait, in buffers."""

from __future__ import annotations

from collections import Counter

import pytest

from outbox_relay.message import Released
from outbox_relay.source.parking import Parking
from tests.acceptance.test_plans import ExplainedSession, source_on
from tests.conftest import Database

PARKED = 100_000
READY = 2_000

# As relays leave them: lines of ten, a row that was refused and its followers; and what waits for a topic.
_PARK = f"""
WITH waiting AS (
    INSERT INTO outbox (topic, key, payload, parked_at)
    SELECT CASE n % 2 WHEN 0 THEN 'orders' ELSE 'missing' END, 'w' || n / 10, '{{}}', now()
    FROM generate_series(1, {PARKED}) AS n
    RETURNING id, bucket, topic, key
)
INSERT INTO outbox_parked (id, bucket, topic, key, state, attempts, due_at, error)
SELECT id, bucket, topic, key,
       CASE WHEN topic = 'missing' THEN 'topic' WHEN first THEN (ARRAY['dead', 'retry'])[1 + id % 2] ELSE 'blocked' END,
       first::integer, CASE WHEN topic = 'orders' AND first AND id % 2 = 1 THEN now() + '1 hour' END, 'SomeError'
FROM (SELECT *, row_number() OVER (PARTITION BY topic, key ORDER BY id) = 1 AS first FROM waiting) AS w
"""

_READY = f"""
INSERT INTO outbox (topic, key, payload) SELECT 'orders', 'k' || n % 1000, '{{}}' FROM generate_series(1, {READY}) AS n
"""


async def cost_of_a_claim(database: Database) -> Counter[str]:
    """By statement, the buffers of one claim of all that is ready, once everything is known."""
    session = ExplainedSession(database.url)
    async with source_on(session, database.url) as source:
        for _ in range(3):
            session.explained.clear()
            claim = await source.claim()
            assert len(claim.records) == READY
            source.settle([Released(each) for each in claim.records])
    cost: Counter[str] = Counter()
    for explained in session.explained:
        cost[explained.label] += explained.buffers
    return cost


async def test_a_hundred_thousand_parked_rows_change_a_claim_by_less_than_a_tenth(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await outbox_database.connect()
    await connection.execute(_READY)
    await connection.execute("VACUUM ANALYZE outbox")
    alone = await cost_of_a_claim(outbox_database)
    await connection.execute(_PARK)
    beside = await cost_of_a_claim(outbox_database)
    assert beside.total() < 1.1 * alone.total(), (alone, beside)
    await connection.execute("VACUUM ANALYZE outbox, outbox_parked")
    beside = await cost_of_a_claim(outbox_database)
    assert beside.total() < 1.1 * alone.total(), (alone, beside)
    # So it would be if each line of a claim were looked up.
    monkeypatch.setattr(Parking, "_may_be_behind", lambda *_: True)
    looked_up = await cost_of_a_claim(outbox_database)
    assert looked_up.total() > 1.1 * alone.total(), (alone, looked_up)
