"""What goes wrong a thousand times leaves a bounded number of lines, and a count of the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from outbox_relay import logs, repeats
from outbox_relay.errors import SourceRefusedError, SourceUnavailableError
from outbox_relay.message import Record, Retry, Scope
from outbox_relay.repeats import INTERVAL_SECONDS, MOST_LINES, Repeats
from outbox_relay.servers.ports import free_port
from outbox_relay.source.session import Database, Session
from outbox_relay.telemetry import Telemetry


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The time that repeats are counted by, in a process that logs."""
    clock = Clock()
    monkeypatch.setattr(logs, "Repeats", lambda: Repeats(clock))
    root, asyncio, aiokafka = logging.getLogger(), logging.getLogger("asyncio"), logging.getLogger("aiokafka")
    before = root.handlers[:], root.level, asyncio.filters[:], aiokafka.level
    yield clock
    root.handlers[:], asyncio.filters[:] = before[0], before[2]
    root.setLevel(before[1])
    aiokafka.setLevel(before[3])
    logging.getLogger("outbox_relay").setLevel(logging.NOTSET)
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(number: int, topic: str = "orders") -> Retry:
    record = Record(number, "e", topic, b"k", b"v", [])
    return Retry(record, Scope.ROW, "MessageSizeTooLargeError", "too large")


def test_a_row_refused_a_thousand_times(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "json")
    telemetry = Telemetry(relay="r")
    for attempts in range(1, 1001):
        telemetry.refused(refused(7), attempts, 1.0)
    assert [line["attempts"] for line in lines(capsys)] == list(range(1, MOST_LINES + 1))
    # Another topic's is another matter, and a thousand rows of one topic aren't.
    for number in range(1000):
        telemetry.refused(refused(number, "payments"), 1, 1.0)
    assert len(lines(capsys)) == MOST_LINES
    clock.now += INTERVAL_SECONDS
    telemetry.refused(refused(7), 1001, 1.0)
    telemetry.refused(refused(7), 1002, 1.0)
    first, second = lines(capsys)
    assert first["not_logged"] == 1000 - MOST_LINES
    assert "not_logged" not in second


def test_an_outage_met_a_thousand_times(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    telemetry = Telemetry(relay="r")
    for number in range(1000):
        telemetry.database_unavailable(SourceUnavailableError(f"no answer to {number}"), by="lane")
        telemetry.kafka_unavailable(SourceUnavailableError(f"no answer to {number}"))
    assert [line["event"] for line in lines(capsys)] == ["database.unavailable", "kafka.unavailable"]


def test_what_somebody_has_to_mend_is_said_at_once_and_once_an_outage(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "json")
    telemetry = Telemetry(relay="r")
    for _ in range(2):
        telemetry.database_unavailable(SourceUnavailableError("the connection is lost"), by="lane")
        for _ in range(1000):
            telemetry.database_unavailable(SourceRefusedError("the certificate has expired"), by="lane")
        telemetry.database_available(by="lane")
    assert [line.get("reason") for line in lines(capsys)] == 2 * [
        "the connection is lost",
        "the certificate has expired",
        None,
    ]
    for number in range(1000):
        telemetry.database_unavailable(SourceRefusedError(f"refused for the {number}th time"), by="lane")
    assert len(lines(capsys)) <= MOST_LINES


async def failed_connect() -> SourceUnavailableError:
    """Each with another text."""
    session = Session(Database(f"postgresql://127.0.0.1:{free_port()}/orders", 5.0, 5.0), "lane")
    with pytest.raises(SourceUnavailableError) as failed:
        await session.connection()
    return failed.value


async def test_what_was_asked_before_an_outage_ended_does_not_begin_another(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """One lane tries to connect while the certificate is still wrong, and is told so when another has connected."""
    logs.configure("info", "json")
    telemetry = Telemetry(relay="r")
    before = await failed_connect()
    telemetry.database_unavailable(SourceRefusedError("the certificate has expired"), by="heartbeat")
    telemetry.database_available(by="heartbeat")
    after = await failed_connect()
    telemetry.database_unavailable(before, by="lane")
    telemetry.database_unavailable(after, by="lane")
    reasons = [line["reason"] for line in lines(capsys) if line["event"] == "database.unavailable"]
    assert reasons == ["the certificate has expired", str(after)]


def test_what_another_library_repeats(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "json")
    stranger = logging.getLogger("somebody.else")

    def complain(number: int) -> None:
        stranger.warning(f"unable to do {number}")

    for number in range(1000):
        complain(number)
    stranger.warning("something else")
    assert [line["event"] for line in lines(capsys)] == [
        *(f"unable to do {number}" for number in range(MOST_LINES)),
        "something else",
    ]
    clock.now += INTERVAL_SECONDS
    complain(5)
    assert [line["event"] for line in lines(capsys)] == [
        f"unable to do 5 (and {1000 - MOST_LINES} like it, not logged)"
    ]


def test_what_is_no_mistake_is_logged_each_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "json")
    telemetry = Telemetry(relay="r")
    for number in range(100):
        telemetry.slots_taken([number], 1)
        telemetry.settled([number])
    assert len(lines(capsys)) == 200


def test_what_is_remembered_is_bounded(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    telemetry = Telemetry(relay="r")
    for number in range(3 * repeats._MOST_KNOWN):
        telemetry.refused(refused(number, f"topic-{number}"), 1, 1.0)
    (limit,) = (filter_ for filter_ in logging.getLogger().handlers[0].filters if isinstance(filter_, Repeats))
    assert len(limit._known) <= repeats._MOST_KNOWN
    assert len(lines(capsys)) == 3 * repeats._MOST_KNOWN
