"""The finished prefix of a partition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.inbox.progress import Progress


@given(
    st.sets(st.integers(0, 60), min_size=1, max_size=12)
    .map(sorted)
    .flatmap(lambda o: st.tuples(st.just(o), st.permutations(o)))
)
def test_what_is_committed_never_passes_an_unfinished_message(drawn: tuple[list[int], list[int]]) -> None:
    offsets, order = drawn
    progress = Progress()
    for offset in offsets:
        progress.begin(offset)
    left = set(offsets)
    for offset in order:
        progress.finish(offset)
        left.remove(offset)
        before = [each for each in offsets if each < min(left, default=1_000)]
        assert progress.to_commit() == (before[-1] + 1 if before else None)
    assert progress.unfinished == 0


def test_an_offset_is_committed_once() -> None:
    progress = Progress()
    progress.begin(4)
    progress.finish(4)
    progress.committed(5)
    assert progress.to_commit() is None


def test_an_offset_that_goes_back_is_a_defect() -> None:
    progress = Progress()
    progress.begin(4)
    with pytest.raises(ValueError, match="offset 4 came after 4"):
        progress.begin(4)
