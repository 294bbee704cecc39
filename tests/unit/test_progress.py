"""How much a relay says that it sends."""

from __future__ import annotations

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


def test_the_rate_is_of_the_time_in_which_there_was_something_to_send(clock: Clock) -> None:
    with capture_logs() as lines:
        said = Telemetry()
        for _ in range(2):
            clock.now += 3600  # idle
            for _ in range(5):
                said.claimed(ROWS)
                clock.now += 2
                said.published([Delivered(row) for row in ROWS])
    progress = [line for line in lines if line["event"] == "relay.progress"]
    assert [(line["delivered"], line["seconds"], line["per_second"]) for line in progress] == [(500, 10.0, 50.0)] * 2


def test_a_burst_ends_with_its_last_row(clock: Clock) -> None:
    with capture_logs() as lines:
        said = Telemetry()
        for _ in range(3):
            said.claimed(ROWS)
            clock.now += 2
            said.published([Delivered(row) for row in ROWS])
            clock.now += 3600  # idle
        said.stopped(0)
    progress = [line for line in lines if line["event"] == "relay.progress"]
    assert [(line["delivered"], line["seconds"], line["per_second"]) for line in progress] == [(100, 2.0, 50.0)] * 3


def test_what_is_left_is_said_in_the_end(clock: Clock) -> None:
    with capture_logs() as lines:
        said = Telemetry()
        said.claimed(ROWS)
        clock.now += 4
        said.published([Delivered(row) for row in ROWS])
        said.stopped(0)
        Telemetry().stopped(0)
    progress = [line for line in lines if line["event"] == "relay.progress"]
    assert [(line["delivered"], line["seconds"], line["per_second"]) for line in progress] == [(100, 4.0, 25.0)]
