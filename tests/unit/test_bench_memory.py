"""The bound of a relay's memory is what is stated, and who takes more is told."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.goals import goals
from bench.memory import EIGHT_KB, TIMES, TIMES_ALONE, Memory, Taken, bound_of_rows_mb
from bench.report import in_short, tables
from bench.summary import Result, summarise

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

TAKEN = Taken(row_bytes=8_192, peak_mb=90, bound_mb=100, rate=2_000, reason=None)
REFUSED = Taken(row_bytes=20_000_000, peak_mb=180, bound_mb=190, rate=None, reason="it is too large")


def result(*runs: Memory) -> Result:
    numbered = [{"round": number, **asdict(run)} for number, run in enumerate(runs, 1)]
    return {"workload": "memory", "arm": "mark", "ordered": True, "polling": True, "runs": numbered}


def reported(*runs: Memory) -> tuple[dict[str, tuple[str, str]], str]:
    """What the goals and the document say."""
    found = result(*runs)
    summary = summarise([found])
    return {name: (measured, met) for name, _, measured, met in goals(summary)}, tables([found], summary)


def test_the_bound_is_as_stated() -> None:
    text = OPERATIONS.read_text()
    claimed, alone = (
        re.search(rf"^\| {row}[^|]*\| up to (\d+) \W ", text, re.MULTILINE)
        for row in ("what it has claimed", "a single row that is larger")
    )
    assert claimed is not None
    assert alone is not None
    assert (int(claimed[1]), int(alone[1])) == (TIMES, TIMES_ALONE)


@pytest.mark.parametrize(
    ("size", "bound"),
    [(300, 40), (10 * 2**20 // 4, 40), (10 * 2**20 // 4 + 1, 17.5), (20 * 2**20, 140)],
    ids=["small", "the share of a claim", "larger than that", "large"],
)
def test_a_row_that_is_claimed_alone_has_a_bound_of_its_own(size: int, bound: float) -> None:
    assert bound_of_rows_mb(size) == pytest.approx(bound, rel=1e-6)


def test_a_relay_within_its_bounds() -> None:
    aims, text = reported(Memory(58.6, {EIGHT_KB: TAKEN, "large": REFUSED}))
    assert aims == {
        "memory with rows of 8 KB, MB": ("90", "reached"),
        "memory whatever the rows, of the stated bound": ("0.947", "reached"),
    }
    assert "| nothing to do | 59 |  |  |  |  | 1 |\n" in text
    assert f"| {EIGHT_KB} | 90 | 100 | yes | 2,000 | 16 | 1 |\n" in text
    assert "| large | 180 | 190 | yes |  |  | 1 |\n" in text
    assert "- large: parked with it is too large\n" in text


def test_whoever_takes_more_is_told_although_it_did_so_once() -> None:
    greedy = replace(TAKEN, peak_mb=130)
    aims, text = reported(*(Memory(60, {EIGHT_KB: one}) for one in (TAKEN, greedy, TAKEN)))
    assert aims["memory whatever the rows, of the stated bound"] == ("1.3", "missed")
    assert f"| {EIGHT_KB} | 90 [90, 130] | 100 | no | 2,000 | 16 | 3 |\n" in text
    aims, _ = reported(Memory(60, {EIGHT_KB: greedy}))
    assert aims["memory with rows of 8 KB, MB"] == ("130", "missed")


def test_a_run_is_said_in_one_line() -> None:
    assert in_short(asdict(Memory(60, {"some": TAKEN, "large": REFUSED}))) == "some: 90 of 100 MB; large: 180 of 190 MB"
