"""docs/semantics.md: some cells of its table, measured again by what has measured them."""

from __future__ import annotations

import pytest

from outbox_relay.servers import Kafka, Postgres
from tests.semantics import document
from tests.semantics.faults import FAULTS, HALF, KILLED_AT
from tests.semantics.measure import NAMES, measure

TABLE = document.read()

#: Those that kill no server, since others use them, too, and whose figures leave nothing to chance.
CELLS = [
    ("idempotent", "relay killed"),
    ("topic-to-topic", "relay killed"),
    ("at-most-once", "consumer killed"),
    ("at-least-once", "consumer killed"),
    ("idempotent", "consumer killed"),
    ("topic-to-topic", "consumer killed"),
]


def test_the_table_has_every_cell() -> None:
    assert TABLE.keys() == {(mode, fault) for mode in NAMES for fault in FAULTS}


def test_it_says_that_broken_modes_lose_and_repeat() -> None:
    """So that measuring that counts nothing can't pass."""
    assert TABLE["at-most-once", "consumer killed"] == (len(KILLED_AT), 0)
    assert TABLE["at-least-once", "consumer killed"] == (0, len(KILLED_AT))
    assert TABLE["topic-to-topic", "relay killed"] == (0, HALF)
    assert {TABLE["idempotent", fault] for fault in FAULTS} == {(0, 0)}


@pytest.mark.parametrize(("mode", "fault"), CELLS)
async def test_it_says_what_is_measured(postgres: Postgres, kafka: Kafka, mode: str, fault: str) -> None:
    cell = await measure(mode, fault, postgres, kafka)
    assert cell.committed == 2 * HALF
    assert cell.effects == cell.committed - cell.lost + cell.repeated
    assert (cell.lost, cell.repeated) == TABLE[mode, fault]
