"""Which message it is: headers, a callable, and what is no id."""

from __future__ import annotations

from typing import Any

import pytest

from outbox_relay.errors import MissingMessageIdError
from outbox_relay.inbox import message_id
from outbox_relay.inbox.ids import id_of
from tests.consumed import record


def test_the_header_id_is_the_id() -> None:
    assert message_id(record("0190d7a4-5c6f-7b3a-9f00-0123456789ab")) == "0190d7a4-5c6f-7b3a-9f00-0123456789ab"


def test_the_header_of_cloudevents_is_the_id_where_there_is_no_other() -> None:
    assert message_id(record(headers=[("ce_id", b"A-1")])) == "A-1"
    assert message_id(record(headers=[("ce_id", b"A-1"), ("id", b"B-2")])) == "B-2"
    assert message_id(record(headers=[("id", None), ("ce_id", b"A-1")])) == "A-1"


def test_ids_are_taken_as_they_are() -> None:
    for text in ("1", " a ", "É", "e\u0301", "x" * 1_000, "日本"):
        assert message_id(record(text)) == text


def test_a_header_that_comes_twice_counts_with_its_last_value() -> None:
    assert message_id(record("first", headers=[("id", b"last"), ("type", b"OrderPaid")])) == "last"


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ([], "it has none of the headers 'id' and 'ce_id'"),
        ([("ID", b"x"), ("outbox-id", b"7")], "it has none of the headers 'id' and 'ce_id'"),
        ([("id", None)], "it has none of the headers 'id' and 'ce_id'"),
        ([("id", b"")], "its header 'id' is empty"),
        # An empty id isn't passed over for another: whoever wrote it meant something.
        ([("id", b""), ("ce_id", b"x")], "its header 'id' is empty"),
        ([("ce_id", b"\xff")], "its header 'ce_id' is no text in UTF-8"),
        ([("id", b"a\0b")], "its header 'id' contains a NUL character"),
        ([("id", "é".encode() * 501)], "its header 'id' has 1,002 bytes, and 1,000 are the most"),
    ],
)
def test_a_message_without_an_id_that_can_be_used_is_refused(headers: list[tuple[str, bytes]], why: str) -> None:
    with pytest.raises(MissingMessageIdError) as caught:
        message_id(record(headers=headers))
    told = str(caught.value)
    assert told.startswith("the message at offset 17 of orders, partition 3, can't be told from its repeats: ")
    assert why in told
    assert told.endswith("Have its producer write the header 'id', or say where its id is: message_id=…")


def test_a_callable_says_the_id_instead_of_the_headers() -> None:
    message = record("header", value=b"body")
    assert id_of(message, lambda m: m.value.decode()) == "body"
    assert id_of(message, lambda m: f"{m.topic}/{m.partition}/{m.offset}") == "orders/3/17"
    assert id_of(message, None) == "header"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, "is None"),
        ("", "is empty"),
        (b"x", "is of type bytes, not str"),
        (7, "is of type int, not str"),
        ("\ud800", "contains a lone surrogate"),
        ("\0", "contains a NUL"),
        ("x" * 1_001, "has 1,001 bytes"),
    ],
)
def test_what_a_callable_says_is_checked_too(said: Any, why: str) -> None:
    with pytest.raises(MissingMessageIdError, match=f"what the callable message_id returned {why}"):
        id_of(record("header"), lambda _: said)
