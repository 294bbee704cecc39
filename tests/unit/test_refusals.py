"""When rows that are refused one by one make their topic wait."""

from __future__ import annotations

from collections.abc import Iterable

from outbox_relay.message import Delivered, Outcome, Record, Retry, Scope
from outbox_relay.source.refusals import MANY_REFUSED, RefusedTopics


def record(id_: int, topic: str = "orders") -> Record:
    return Record(id_, f"event-{id_}", topic, None, b"{}", ())


def refused(ids: Iterable[int], topic: str = "orders") -> list[Outcome]:
    return [Retry(record(id_, topic), Scope.ROW, "InvalidRecordError", "no key") for id_ in ids]


def never(_: str) -> bool:
    return False


def test_rows_are_counted_across_claims_however_few_are_found_in_each() -> None:
    topics = RefusedTopics()
    for id_ in range(MANY_REFUSED - 1):
        assert not topics.among(refused([id_]), never)
    assert topics.among(refused([99]), never).keys() == {"orders"}


def test_a_row_that_is_tried_again_counts_once() -> None:
    topics = RefusedTopics()
    for _ in range(3 * MANY_REFUSED):
        assert not topics.among(refused([1]), never)


def test_a_topic_that_takes_a_row_meanwhile_goes_on() -> None:
    topics = RefusedTopics()
    for id_ in range(3 * MANY_REFUSED):
        assert not topics.among([*refused([id_, id_ + 1000]), Delivered(record(id_ + 2000))], never)
        # In a claim without any refused row, too.
        assert not topics.among(refused([id_ + 3000]), never)
        assert not topics.among([Delivered(record(id_ + 4000))], never)


def test_each_topic_is_counted_for_itself() -> None:
    topics = RefusedTopics()
    for id_ in range(MANY_REFUSED - 1):
        assert not topics.among([*refused([id_]), *refused([id_ + 1000], "payments")], never)
    assert topics.among(refused([99], "payments"), never).keys() == {"payments"}
    assert topics.among(refused([98]), never).keys() == {"orders"}


def test_one_row_is_enough_of_a_topic_that_has_waited_already() -> None:
    assert RefusedTopics().among(refused([1]), lambda topic: topic == "orders").keys() == {"orders"}
    assert not RefusedTopics().among(refused([1], "payments"), lambda topic: topic == "orders")


def test_a_topic_that_cannot_be_written_to_waits_at_once() -> None:
    retry = Retry(record(1), Scope.TOPIC, "NotEnoughReplicasError", "too few")
    assert RefusedTopics().among([retry, *refused([2])], never) == {"orders": retry}


def test_a_topic_that_has_waited_is_counted_anew() -> None:
    topics = RefusedTopics()
    assert topics.among(refused(range(MANY_REFUSED)), never)
    for id_ in range(MANY_REFUSED - 1):
        assert not topics.among(refused([1000 + id_]), never)
