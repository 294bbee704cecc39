"""Backoff, holds, fair shares and read depth: the arithmetic behind what waits and who gets what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.retry import Backoff
from outbox_relay.source.holds import Holds
from outbox_relay.source.polling import next_rows_per_bucket, rows_per_bucket
from outbox_relay.source.slots import fair_share


def test_backoff_doubles_up_to_its_ceiling_and_never_overflows() -> None:
    backoff = Backoff(0.5, 10.0)
    assert [backoff.delay_seconds(n) for n in (1, 2, 3, 6)] == [0.5, 1.0, 2.0, 10.0]
    assert backoff.delay_seconds(100_000) == 10.0


def test_a_hold_ends_with_its_backoff_and_grows_with_each_failure() -> None:
    now = 100.0
    holds: Holds[str] = Holds(Backoff(1.0, 8.0), clock=lambda: now)
    assert holds.hold("k") == (1, 1.0)
    assert holds.active() == ["k"]
    now = 101.0
    assert holds.active() == []
    assert holds.hold("k") == (2, 2.0)
    holds.clear("k")
    assert holds.hold("k") == (1, 1.0)


def test_a_hold_long_past_is_forgotten() -> None:
    now = 100.0
    holds: Holds[str] = Holds(Backoff(1.0, 8.0), clock=lambda: now)
    holds.hold("k")
    now = 200.0
    holds.active()
    assert not holds
    assert holds.hold("k") == (1, 1.0)


@given(st.integers(1, 64), st.sets(st.integers(1, 1000), min_size=1, max_size=80))
def test_fair_shares_add_up_to_all_slots_and_differ_by_one_at_most(slots: int, relays: set[int]) -> None:
    shares = [fair_share(slots, relays - {me}, me) for me in relays]
    assert sum(shares) == slots
    assert max(shares) - min(shares) <= 1


@given(
    st.lists(st.integers(0, 100_000), min_size=1, max_size=64),
    st.integers(1, 10_000),
)
def test_read_depth_settles_where_a_claim_is_full_and_little_is_read_in_vain(
    backlogs: list[int], batch_rows: int
) -> None:
    depth = 1
    for _ in range(40):
        depth = rows_per_bucket(depth, len(backlogs), batch_rows)
        read = [min(backlog, depth) for backlog in backlogs]
        # Ids are spread evenly, so a claim that is cut at batch_rows takes the same share of each.
        rows = min(batch_rows, sum(read))
        deepest = max(read) if sum(read) <= batch_rows else -(-max(read) * batch_rows // sum(read))
        depth = next_rows_per_bucket(depth, deepest, rows, batch_rows)
    depth = rows_per_bucket(depth, len(backlogs), batch_rows)
    reads = sum(min(backlog, depth) for backlog in backlogs)
    # Either the claim is full, or everything there is is read, within one doubling.
    assert reads * 2 >= min(batch_rows, sum(backlogs))
    assert depth <= max(batch_rows, 1)
