"""The check of a bench run finds what a relay did wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from bench.ledger import Row, Seen, Verdict, compare, row_of

LEDGER = {n: Row(n, k=1 + (n - 1) % 2, v=1 + (n - 1) // 2) for n in range(1, 9)}
CLEAN = [Seen(row.k, 0, row) for row in LEDGER.values()]


def verdict(records: Iterable[Seen], *, complete: bool = True, ordered: bool = True) -> Verdict:
    return compare(LEDGER, records, complete=complete, ordered=ordered)


def test_a_clean_run_is_a_result() -> None:
    assert verdict(CLEAN) == Verdict(rows=8, records=8)
    assert verdict(CLEAN).problem(ordered=True) is None


def test_a_lost_record_is_found() -> None:
    found = verdict(CLEAN[:3] + CLEAN[4:])
    assert found == Verdict(rows=8, records=7, lost=1)
    assert found.problem(ordered=False) == "of 8 messages: 1 lost"


def test_a_run_that_was_cut_off_has_lost_what_is_missing_before_a_later_one_of_its_key() -> None:
    assert verdict(CLEAN[:5], complete=False).lost == 0
    one, two, _, four, five = CLEAN[:5]  # in the middle is the first key's second
    assert verdict([one, two, four], complete=False).lost == 0, "it may be still to come"
    assert verdict([one, two, four, five], complete=False).lost == 1
    assert verdict([one, two, four, five], complete=False, ordered=False).lost == 0


def test_a_repeated_record_is_counted_and_not_held_against_the_run() -> None:
    found = verdict([*CLEAN, CLEAN[0]])
    assert found == Verdict(rows=8, records=9, repeated=1)
    assert found.problem(ordered=True) is None


def test_a_record_behind_a_later_one_of_its_key_is_found() -> None:
    found = verdict([CLEAN[0], CLEAN[1], CLEAN[4], CLEAN[2], CLEAN[3], *CLEAN[5:]])
    assert found == Verdict(rows=8, records=8, reordered=1)
    assert found.problem(ordered=True) == "of 8 messages: 1 out of order"
    assert found.problem(ordered=False) is None, "where an arm offers no order"


@pytest.mark.parametrize(
    "row",
    [None, Row(9, 1, 1), Row(1, 2, 1), Row(1, 1, 2)],
    ids=["unreadable", "unwritten", "other key", "other version"],
)
def test_a_record_that_was_not_written_so_is_found(row: Row | None) -> None:
    found = verdict([*CLEAN, Seen(1, 0, row)])
    assert found == Verdict(rows=8, records=9, invented=1)
    assert found.problem(ordered=False) == "of 8 messages: 1 invented"


def test_a_key_in_two_partitions_is_found() -> None:
    found = verdict([*CLEAN[:-1], CLEAN[-1]._replace(partition=7)])
    assert found == replace(Verdict(rows=8, records=8), moved=1)
    assert found.problem(ordered=True) == "of 8 messages: 1 in another partition than their key"


@pytest.mark.parametrize(
    "value",
    [
        b'{"n": 17, "k": 4, "v": 2, "x": "filler"}',
        b'{"n":17,"k":4,"v":2,"x":"filler"}',
        rb'"{\"n\": 17, \"k\": 4, \"v\": 2, \"x\": \"filler\"}"',
        b'{"k": 4, "n": 17, "v": 2, "x": "filler"}',  # as jsonb prints it
        rb'"{\"k\": 4, \"n\": 17, \"v\": 2}"',
    ],
)
def test_a_payload_says_which_message_it_is_however_it_arrives(value: bytes) -> None:
    assert row_of(value) == Row(n=17, k=4, v=2)


@pytest.mark.parametrize(
    "value", [None, b"", b"\xff", b"17", b"[17, 4, 2]", b'{"n": 17}', b'{"n": "17", "k": 4, "v": 2}']
)
def test_what_is_no_payload_of_ours_is_told_apart(value: bytes | None) -> None:
    assert row_of(value) is None
