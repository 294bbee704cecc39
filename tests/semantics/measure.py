"""One cell: a mode and a fault, counted against the ledger of what was committed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from outbox_relay.servers import Kafka, Postgres
from tests.semantics.faults import FAULTS
from tests.semantics.place import place

#: For one cell, all included.
CELL_SECONDS = 240.0

#: The modes of the service, as the table calls them.
NAMES = {
    "at-most-once": "at most once",
    "at-least-once": "at least once",
    "idempotent": "at least once + idempotent consumer",
    "topic-to-topic": "exactly once, topic to topic",
}


@dataclass(frozen=True)
class Cell:
    """Numbers of messages, and in ``effects`` of effects; ``repeated`` are the effects beyond each message's first."""

    mode: str
    fault: str
    committed: int
    lost: int
    repeated: int
    effects: int


def count(mode: str, fault: str, ledger: Iterable[str], effects: Counter[str]) -> Cell:
    """Raises AssertionError where something has effects that nobody committed."""
    committed = set(ledger)
    assert not effects.keys() - committed, f"{mode}, {fault}: effects of what was rolled back"
    return Cell(
        NAMES[mode],
        fault,
        len(committed),
        len(committed - effects.keys()),
        sum(number - 1 for number in effects.values()),
        effects.total(),
    )


async def measure(mode: str, fault: str, postgres: Postgres, kafka: Kafka) -> Cell:
    async with asyncio.timeout(CELL_SECONDS), place(mode, postgres, kafka) as here:
        await FAULTS[fault](here)
        return count(mode, fault, here.ledger, await here.effects())
