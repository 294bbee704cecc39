"""The state guard's table of transitions."""

from __future__ import annotations

import pytest

from outbox_relay.inbox.guard import Transitions, Verdict

ORDER: Transitions[str | None] = Transitions(
    {None: ["placed"], "placed": ["paid", "cancelled"], "paid": ["shipped", "cancelled"]}
)


@pytest.mark.parametrize(
    ("present", "wanted", "verdict"),
    [
        (None, "placed", Verdict.APPLY),
        ("placed", "paid", Verdict.APPLY),
        ("paid", "shipped", Verdict.APPLY),
        ("placed", "placed", Verdict.SEEN),
        ("shipped", "shipped", Verdict.SEEN),
        ("placed", "shipped", Verdict.NOT_ALLOWED),
        ("shipped", "paid", Verdict.NOT_ALLOWED),
        ("cancelled", "paid", Verdict.NOT_ALLOWED),
        ("placed", None, Verdict.NOT_ALLOWED),
        (None, "paid", Verdict.NOT_ALLOWED),
    ],
)
def test_the_table_says_what_becomes_of_a_message(present: str | None, wanted: str | None, verdict: Verdict) -> None:
    assert ORDER.judge(present, wanted) is verdict


def test_a_state_that_may_follow_itself_is_applied_again() -> None:
    assert Transitions({"open": ["open", "closed"]}).judge("open", "open") is Verdict.APPLY


def test_the_states_before_a_state() -> None:
    assert ORDER.before("cancelled") == ["placed", "paid"]
    assert ORDER.before("placed") == [None]
    assert ORDER.before(None) == []


def test_a_state_that_is_not_in_the_table_is_named() -> None:
    for act in (
        lambda: ORDER.judge("payed", "shipped"),
        lambda: ORDER.judge("paid", "payed"),
        lambda: ORDER.before("payed"),
    ):
        with pytest.raises(
            ValueError, match="'payed' isn't in the table of transitions, which has 'cancelled', 'paid'"
        ):
            act()
