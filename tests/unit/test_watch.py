"""When to look for rows, and whom a look wakes."""

from __future__ import annotations

import asyncio
import math
import time
from typing import cast

import pytest

from outbox_relay.relay import Poll
from outbox_relay.source.session import Session
from outbox_relay.source.slots import Slots
from outbox_relay.source.watch import Watch
from outbox_relay.telemetry import Telemetry

FAR = 1_000.0


class Asked:
    """How often a sooner look was asked for."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


async def waiting(watch: Watch, *lanes: tuple[int, float]) -> list[asyncio.Task[None]]:
    """Lanes that wait, each with the seconds after which it wants a look."""
    tasks = [asyncio.create_task(watch.wait(lane, seconds)) for lane, seconds in lanes]
    await asyncio.sleep(0)
    return tasks


async def ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_nobody_waits_so_nothing_is_looked_for() -> None:
    watch = Watch(Poll(1.0, 2.0), Asked())
    assert watch.look_at == math.inf
    watch.looked()
    assert watch.look_at == math.inf
    watch.wake()


async def test_the_first_look_is_for_whoever_wants_it_soonest() -> None:
    asked = Asked()
    watch = Watch(Poll(100.0, FAR), asked)
    tasks = await waiting(watch, (0, 500.0), (1, 900.0), (2, 100.0))
    assert watch.look_at == pytest.approx(time.monotonic() + 100.0, abs=50.0)
    assert asked.times == 2  # not for lane 1
    assert set(watch.lanes) == {0, 1, 2}
    await ended(tasks)
    assert not watch.lanes


async def test_looks_grow_rare_until_the_ceiling() -> None:
    watch = Watch(Poll(100.0, 200.0), Asked())
    tasks = await waiting(watch, (0, 100.0))
    pauses: list[float] = []
    for _ in range(3):
        assert watch.is_calm == (bool(pauses) and pauses[-1] >= 200.0)
        watch._waiting[0].look_at = 0.0  # it is due
        watch.looked()
        pauses.append(round(watch.look_at - time.monotonic(), -1))
    assert pauses == [150.0, 200.0, 200.0]
    assert watch.is_calm
    await ended(tasks)


async def test_lanes_that_are_looked_for_at_once_are_looked_for_together_from_then_on() -> None:
    watch = Watch(Poll(100.0, 100.0), Asked())
    tasks = await waiting(watch, (0, 100.0), (1, 100.0))
    watch._waiting[0].look_at = 0.0
    watch.looked()
    assert {round(one.look_at - time.monotonic(), -1) for one in watch._waiting.values()} == {100.0}
    await ended(tasks)


async def test_a_lane_whose_claim_was_in_vain_is_not_looked_for_before_its_time() -> None:
    watch = Watch(Poll(100.0, FAR), Asked())
    tasks = await waiting(watch, (0, 100.0), (1, 150.0))
    assert watch.looked_for == {0}
    watch._waiting[1].not_before = 0.0  # its time has come
    assert watch.looked_for == {0, 1}
    await ended(tasks)


async def test_those_for_whom_there_is_something_are_woken_and_others_wait() -> None:
    watch = Watch(Poll(100.0, FAR), Asked())
    tasks = await waiting(watch, (0, 100.0), (1, 400.0), (2, FAR))
    watch.wake([0])
    assert watch.look_at == pytest.approx(time.monotonic() + 400.0, abs=50.0)
    await tasks[0]
    assert set(watch.lanes) == {1, 2}
    watch.word()
    assert watch.words == 1
    await asyncio.gather(*tasks)
    assert not watch.lanes


async def test_a_relay_that_listens_looks_on_until_all_is_calm() -> None:
    """What was written while a lane made its last claim sent a word that found nobody waiting."""
    slots = Slots(
        cast(Session, None),
        Telemetry(),
        name="relay",
        lanes=1,
        lease_seconds=60.0,
        heartbeat_seconds=20.0,
        poll=Poll(100.0, 200.0),
        layout_buckets=64,
        layout_slots=16,
    )
    slots._listens = True
    tasks = await waiting(slots.watch, (0, 100.0))
    assert slots._looks_at == pytest.approx(time.monotonic() + 100.0, abs=50.0)
    slots.watch._waiting[0].pause_seconds = 200.0
    assert slots._looks_at == math.inf
    await ended(tasks)
