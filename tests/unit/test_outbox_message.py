from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from outbox_relay.errors import InvalidMessageError
from outbox_relay.message import COPY_HEADERS, RESERVED_HEADERS
from outbox_relay.outbox import Message

ID = UUID("0190d7a4-5c6f-7b3a-9f00-0123456789ab")


class Colour(Enum):
    RED = "red"


class Size(IntEnum):
    LARGE = 3


class State(StrEnum):
    PAID = "paid"


@dataclass
class Line:
    article: str
    price: Decimal


@dataclass
class Order:
    id: UUID
    lines: list[Line]


class OrderModel(BaseModel):
    id: UUID
    at: datetime
    note: str | None = None


def payload_of(value: object) -> bytes | None:
    encoded: bytes | None = Message("orders", value, key="k").payload
    return encoded


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x00\xff not text", bytearray(b"\x00\xff"), memoryview(b"\x00\xff"), memoryview(b"abcdef")[::2]],
)
def test_bytes_pass_through_untouched(payload: bytes | bytearray | memoryview) -> None:
    assert payload_of(payload) == bytes(payload)
    assert type(payload_of(payload)) is bytes


def test_a_str_becomes_its_utf8_bytes_without_quotes() -> None:
    assert payload_of('{"a": "é"}') == '{"a": "é"}'.encode()
    assert payload_of("") == b""
    assert payload_of("a\0b") == b"a\0b"


def test_none_is_a_tombstone_which_needs_a_key() -> None:
    assert payload_of(None) is None
    assert Message("orders", None, key="").payload is None
    with pytest.raises(InvalidMessageError, match="tombstone"):
        Message("orders", None)


def test_a_dict_or_list_becomes_compact_json_in_utf8() -> None:
    assert payload_of({"name": "Zoë", "n": [1, 2.5, None, True]}) == '{"name":"Zoë","n":[1,2.5,null,true]}'.encode()
    assert payload_of([]) == b"[]"
    assert payload_of({}) == b"{}"


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (ID, f'"{ID}"'),
        (Decimal("1.10"), '"1.10"'),
        (datetime(2024, 2, 29, 12, 30, tzinfo=UTC), '"2024-02-29T12:30:00+00:00"'),
        (datetime(2024, 2, 29, 12, 30, 0, 1), '"2024-02-29T12:30:00.000001"'),
        (date(2024, 2, 29), '"2024-02-29"'),
        (time(12, 30), '"12:30:00"'),
        (Colour.RED, '"red"'),
        (Size.LARGE, "3"),
        (State.PAID, '"paid"'),
        ((1, 2), "[1,2]"),
        ("a\0b", r'"a\u0000b"'),
        (Line("pen", Decimal("0.30")), '{"article":"pen","price":"0.30"}'),
        (
            OrderModel(id=ID, at=datetime(2024, 1, 1, tzinfo=UTC)),
            f'{{"id":"{ID}","at":"2024-01-01T00:00:00Z","note":null}}',
        ),
    ],
)
def test_values_that_json_has_no_form_for_are_written_as_documented(value: object, encoded: str) -> None:
    assert payload_of({"v": [value]}) == f'{{"v":[{encoded}]}}'.encode()


def test_a_dataclass_becomes_json_with_what_is_inside() -> None:
    assert payload_of(Order(ID, [Line("pen", Decimal("0.30"))])) == (
        f'{{"id":"{ID}","lines":[{{"article":"pen","price":"0.30"}}]}}'.encode()
    )


def test_a_pydantic_model_writes_its_own_json() -> None:
    model = OrderModel(id=ID, at=datetime(2024, 1, 1, tzinfo=UTC), note="é")
    assert payload_of(model) == model.model_dump_json().encode()


def test_whatever_has_model_dump_json_counts_as_a_pydantic_model() -> None:
    class LooksLikeAModel:
        def model_dump_json(self) -> str:
            return '{"a":1}'

    assert payload_of(LooksLikeAModel()) == b'{"a":1}'


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"])),
            st.lists,
            max_leaves=5,
        ),
    )
)
def test_json_reads_back_as_it_was_given(value: dict[str, object]) -> None:
    encoded = payload_of(value)
    assert encoded is not None
    assert json.loads(encoded) == value


CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)

DEEP: list[object] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"x": float("nan")}, "JSON compliant"),
        ({"x": float("-inf")}, "JSON compliant"),
        ({"x": Decimal("NaN")}, "Decimal NaN has no form in JSON"),
        ({"x": {1, 2}}, "set has no form in JSON"),
        ({"x": b"raw"}, "bytes has no form in JSON"),
        ({"x": timedelta(1)}, "timedelta has no form in JSON"),
        ({"x": object()}, "object has no form in JSON"),
        ({"x": Line}, "the class Line has no form in JSON"),
        ({ID: 1}, "keys must be str"),
        ({"x": "\ud800"}, "surrogates not allowed"),
        ("\ud800", "surrogates not allowed"),
        (CIRCLE, "[Cc]ircular"),
        (DEEP, "recursion"),
        (1, "payload can't be int: pass bytes, str, dict"),
        (1.5, "payload can't be float"),
        (True, "payload can't be bool"),
        ((1, 2), "payload can't be tuple"),
        ({1}, "payload can't be set"),
        (ID, "payload can't be UUID"),
        (Order, "payload can't be the class Order"),
        (OrderModel, "payload can't be the class OrderModel"),
        (object(), "payload can't be object.*encode anything else"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else type(value).__name__,
)
def test_a_payload_that_has_no_clear_form_is_refused(payload: object, reason: str) -> None:
    with pytest.raises(InvalidMessageError, match=reason):
        Message("orders", payload, key="k")


@pytest.mark.parametrize("topic", ["a", "orders.v1_x-Y9", "...", ".a", "a" * 249])
def test_a_legal_topic_is_taken(topic: str) -> None:
    assert Message(topic, b"").topic == topic


@pytest.mark.parametrize(
    "topic", ["", ".", "..", "a" * 250, "a b", "a\n", "é", "a/b", "٣", "a\0", "\ud800", None, b"orders"]
)
def test_a_topic_that_kafka_refuses_is_refused(topic: Any) -> None:
    with pytest.raises(InvalidMessageError, match="topic"):
        Message(topic, b"")


@pytest.mark.parametrize("name", [*RESERVED_HEADERS, *COPY_HEADERS])
def test_a_header_that_the_relay_writes_is_refused(name: str) -> None:
    with pytest.raises(InvalidMessageError, match=f"header '{name}'.*choose another name"):
        Message("orders", b"", headers={name: "x"})
    assert Message("orders", b"", headers={name.upper(): "x"}).headers == {name.upper(): "x"}


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"attempt": 1}, "header 'attempt' must be a str, not int"),
        ({"a": None}, "header 'a' must be a str, not NoneType"),
        ({"a": b"b"}, "header 'a' must be a str, not bytes"),
        ({1: "a"}, "header's name must be a str, not int"),
        ({"a": "b\0"}, "header 'a' contains a NUL"),
        ({"a\0": "b"}, "header's name contains a NUL"),
        ({"a": "b\udfff"}, "header 'a' contains a lone surrogate at position 1"),
        ([("a", "b")], "headers must be a mapping of str to str, not list"),
        (None, "headers must be a mapping of str to str, not NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers_other_than_text_to_text_are_refused(headers: Any, reason: str) -> None:
    with pytest.raises(InvalidMessageError, match=reason):
        Message("orders", b"", headers=headers)


@pytest.mark.parametrize("field", ["key", "type"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (42, "must be a str, not int"),
        (ID, "must be a str, not UUID"),
        (b"42", "must be a str, not bytes"),
        ("a\0b", "contains a NUL character"),
        ("ab\ud800", "contains a lone surrogate at position 2"),
    ],
    ids=["int", "UUID", "bytes", "NUL", "surrogate"],
)
def test_a_key_or_type_that_postgresql_cannot_store_is_refused(field: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidMessageError, match=f"{field} {reason}"):
        Message("orders", b"", **{field: value})


def test_an_event_id_as_text_is_refused() -> None:
    wrong: Any = str(ID)
    with pytest.raises(InvalidMessageError, match=r"event_id must be a uuid\.UUID, not str"):
        Message("orders", b"", event_id=wrong)


def test_each_message_gets_an_event_id_of_its_own() -> None:
    assert Message("orders", b"").event_id != Message("orders", b"").event_id
    assert Message("orders", b"", event_id=ID).event_id == ID


def test_later_changes_to_what_was_given_do_not_reach_the_message() -> None:
    headers, body, raw = {"a": "b"}, {"n": 1}, bytearray(b"raw")
    message, untouched = Message("orders", body, headers=headers), Message("orders", raw)
    headers["id"] = "1"
    body["n"] = 2
    raw[0] = 0
    assert message.headers == {"a": "b"}
    assert message.payload == b'{"n":1}'
    assert untouched.payload == b"raw"


def test_any_mapping_serves_as_headers() -> None:
    class Environment(Mapping[str, str]):
        def __getitem__(self, name: str) -> str:
            return name.upper()

        def __iter__(self) -> Any:
            return iter(["a"])

        def __len__(self) -> int:
            return 1

    assert Message("orders", b"", headers=Environment()).headers == {"a": "A"}


def test_a_message_is_frozen_and_can_be_replaced_and_hashed() -> None:
    message = Message("orders", {"n": 1}, key="k", event_id=ID)
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.key = "other"  # type: ignore[misc]
    other = dataclasses.replace(message, key="other")
    assert (other.key, other.payload, other.event_id) == ("other", b'{"n":1}', ID)
    assert len({message, other, dataclasses.replace(message)}) == 2


def test_repr_keeps_the_payload_out_of_logs() -> None:
    assert "secret" not in repr(Message("orders", "secret"))


def test_key_type_headers_and_event_id_are_given_by_name() -> None:
    positional: Any = Message
    with pytest.raises(TypeError, match="positional"):
        positional("orders", b"", "key")


def test_the_module_needs_no_opentelemetry_and_no_pydantic() -> None:
    probe = (
        "import sys; sys.modules['opentelemetry'] = sys.modules['pydantic'] = None\n"
        "from outbox_relay.outbox import Message\n"
        "print(Message('orders', {'a': 1}).payload)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("b'{\"a\":1}'\n", "")
