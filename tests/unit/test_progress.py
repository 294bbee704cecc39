"""How much a relay says that it sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from outbox_relay import telemetry
from outbox_relay.message import Delivered, Record
from outbox_relay.telemetry import Telemetry

ROWS = [Record(n, "e", "orders", None, b"", ()) for n in range(100)]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    return clock


def said_of(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    progress = [line for line in lines if line["event"] == "relay.progress"]
    return [(line["delivered"], line["seconds"], line["per_second"]) for line in progress]


def publish(said: Telemetry, clock: Clock, seconds: float) -> None:
    """A claim of all rows, and the one after it, which marks them and finds nothing."""
    said.claimed(ROWS)
    clock.now += seconds
    said.published([Delivered(row) for row in ROWS])
    said.claimed([])


def test_the_rate_is_of_the_time_in_which_there_was_something_to_send(clock: Clock) -> None:
    with capture_logs() as lines:
        said = Telemetry()
        for _ in range(2):
            clock.now += 3600  # idle
            said.claimed([])
            said.progress()
            for _ in range(5):
                publish(said, clock, 2)
            said.progress()
    assert said_of(lines) == [(500, 10.0, 50.0)] * 2


def test_a_burst_ends_with_its_last_row(clock: Clock) -> None:
    with capture_logs() as lines:
        said = Telemetry()
        for _ in range(3):
            publish(said, clock, 2)
            clock.now += 7  # idle
            said.progress()
            clock.now += 3600
            said.progress()
        said.stopped(0)
    assert said_of(lines) == [(100, 2.0, 50.0)] * 3


def test_a_claim_that_is_out_when_a_line_is_said_counts_from_its_beginning(clock: Clock) -> None:
    with capture_logs() as lines:
        said = Telemetry()
        publish(said, clock, 2)
        clock.now += 4  # idle
        said.claimed(ROWS)
        clock.now += 3
        said.progress()
        clock.now += 2
        said.published([Delivered(row) for row in ROWS])
        said.progress()
    assert said_of(lines) == [(100, 2.0, 50.0), (100, 5.0, 20.0)]


def test_lines_of_lanes_beside_each_other_leave_no_time_out(clock: Clock) -> None:
    with capture_logs() as lines:
        said = Telemetry()
        said.claimed(ROWS)
        for _ in range(2):
            said.claimed(ROWS)  # another lane's
            clock.now += 2
            said.published([Delivered(row) for row in ROWS])
            clock.now += 1
            said.progress()
    assert said_of(lines) == [(100, 2.0, 50.0), (100, 3.0, 33.3)]


def test_what_is_left_is_said_in_the_end(clock: Clock) -> None:
    with capture_logs() as lines:
        said = Telemetry()
        publish(said, clock, 4)
        said.stopped(0)
        Telemetry().stopped(0)
    assert said_of(lines) == [(100, 4.0, 25.0)]
