"""What a message costs, in figures that are the same on every machine: statements, WAL, objects in memory.

Time is never held to anything here; ``make bench`` measures it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from uuid import uuid4

import pytest

from bench.decisions.draining import drain
from bench.decisions.lanes import AtOnce, Candidate, Watch, opened
from bench.decisions.outboxes import connected, create_outbox, refill
from outbox_relay.config import Config
from outbox_relay.message import Delivered
from outbox_relay.relay import Claim
from outbox_relay.servers import Postgres
from outbox_relay.source.polling import PollingSource

ROWS, KEYS = 20_000, 1_000
BATCH = 2_000
TOPIC = "orders"


#: By what becomes of a sent row: the most WAL in bytes. A new version of the row with its index entries, and the lock,
#: take 526; its end and the lock 174. Both without images of whole pages.
WAL_BYTES = {"mark": 560, "delete": 210}


@pytest.fixture(params=WAL_BYTES)
async def after_publish(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def config(postgres: Postgres, after_publish: str) -> Config:
    if postgres.server is None:
        pytest.skip("WAL is counted on a server of our own, where nobody else writes")
    url = await create_outbox(postgres.server, f"cost_{uuid4().hex[:12]}")
    return Config.model_validate(
        {
            "database": {"url": url},
            "kafka": {"bootstrap_servers": ["127.0.0.1:1"]},
            "relay": {"name": "cost", "batch_rows": BATCH, "claims_in_flight": 1, "after_publish": after_publish},
        }
    )


async def test_statements_and_wal_of_a_message(postgres: Postgres, config: Config, after_publish: str) -> None:
    assert postgres.server is not None
    found = await drain(postgres.server, Candidate.STICKY_SLOT, config, TOPIC, ROWS, KEYS, AtOnce)
    # Six statements a claim of 2,000, and one for each slot when it is taken: 3.9.
    assert found.statements * 1000 <= 5, f"statements of a claim: {found.a_claim}"
    assert found.wal_bytes <= WAL_BYTES[after_publish]


async def test_objects_that_a_message_in_flight_keeps(config: Config) -> None:
    async with connected(config.database.url) as connection:
        await refill(connection, TOPIC, ROWS, KEYS)
    async with opened(Candidate.STICKY_SLOT, config, Watch()) as (source,):
        first = await _claimed(source)  # so that all that is made once is there already
        source.settle([Delivered(record) for record in first.records])
        del first
        gc.collect()
        blocks = sys.getallocatedblocks()
        claim = await _claimed(source)
        gc.collect()
        objects = (sys.getallocatedblocks() - blocks) / len(claim.records)
    assert len(claim.records) == BATCH
    # The record, its id, key, value and headers, and to whom it belongs: 15.1.
    assert objects <= 18


async def _claimed(source: PollingSource) -> Claim:
    claim = await source.claim()
    while not claim.records:
        await asyncio.sleep(0.01)  # until the slots are its own
        claim = await source.claim()
    return claim
