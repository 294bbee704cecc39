"""Backoff, holds and fair shares: the arithmetic behind what waits and who gets what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.retry import Backoff
from outbox_relay.source.holds import Holds
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
    assert holds.clear("k")
    assert not holds.clear("k")
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
