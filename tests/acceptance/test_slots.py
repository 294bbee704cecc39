"""What a relay says of its slots when PostgreSQL's answer doesn't come, and which of its lanes have them."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.relay import Poll
from outbox_relay.source import session
from outbox_relay.source import slots as slots_module
from outbox_relay.source.session import Session
from outbox_relay.source.slot_statements import TAKE
from outbox_relay.source.slots import Slots
from outbox_relay.source.statements import RELEASE
from outbox_relay.tables import BUCKETS, SLOTS
from outbox_relay.telemetry import Telemetry
from tests.conftest import Database


class LosesTheAnswerOfTake(Session):
    """The first TAKE is committed, and the client isn't told so."""

    lost = False

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        rows = await super().fetch(statement, *arguments)
        connection = await self.connection()
        if statement == TAKE and not self.lost and not connection.is_in_transaction():
            self.lost = True
            self.drop()
            raise SourceUnavailableError("take: no answer")
        return rows


def connected_to(database: Database) -> session.Database:
    return session.Database(database.url, 5.0, 5.0)


def slots_of(session: Session, *, lanes: int, all_open: bool = False) -> Slots:
    """Of a relay that is ready in all its lanes."""
    slots = Slots(
        session,
        Telemetry(),
        name="test",
        lanes=lanes,
        lease_seconds=60.0,
        heartbeat_seconds=0.05,
        poll=Poll(0.05, 0.05),
        layout_buckets=BUCKETS,
        layout_slots=SLOTS,
        all_open=all_open,
    )
    for lane in range(lanes):
        slots.set_ready(lane, True)
    return slots


def shares(slots: Slots, lanes: int) -> list[int]:
    return [len(slots.of_lane(lane)) for lane in range(lanes)]


async def let_go_of_surplus(slots: Slots, session: Session, lanes: int) -> None:
    """As each lane does when nothing there is unsettled."""
    for lane in range(lanes):
        if leaving := slots.surplus & slots.of_lane(lane).keys():
            await session.fetch(RELEASE, list(leaving))
            slots.released(leaving)


async def test_slots_whose_taking_was_not_answered_are_owned_and_said_to_be(outbox_database: Database) -> None:
    with capture_logs() as logs:
        slots = slots_of(LosesTheAnswerOfTake(connected_to(outbox_database), "outbox-relay heartbeat"), lanes=1)
        with pytest.raises(SourceUnavailableError):
            await slots.beat()
        await slots.beat()
        assert len(slots.of_lane(0)) == SLOTS
        await slots.leave()
    assert [(log["slots"], log["owned"]) for log in logs if log["event"] == "slots.taken"] == [
        (list(range(SLOTS)), SLOTS)
    ]


async def test_a_backlog_opens_all_lanes_until_it_is_over(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart = Session(connected_to(outbox_database), "outbox-relay heartbeat")
    with capture_logs() as logs:
        slots = slots_of(heart, lanes=4)
        await slots.beat()
        assert shares(slots, 4) == [8, 8, 0, 0]
        before = slots.of_lane(0) | slots.of_lane(1)

        slots.backlog()
        # Its lane has a slot until it has let go of it, and claims no more there.
        assert shares(slots, 4) == [8, 8, 0, 0]
        moving = set(slots.surplus)
        assert len(moving) == 8
        await let_go_of_surplus(slots, heart, 4)
        await slots.beat()
        assert shares(slots, 4) == [4, 4, 4, 4]
        assert not slots.surplus
        # What the lane that had it may still hold is void.
        for slot, epoch in (slots.of_lane(2) | slots.of_lane(3)).items():
            assert slot in moving
            assert epoch > before[slot]

        await slots.beat()
        assert not slots.surplus  # the backlog isn't over
        monkeypatch.setattr(slots_module, "_BACKLOG_SECONDS", 0.0)
        slots.backlog()
        await slots.beat()
        assert slots.surplus == slots.of_lane(2).keys() | slots.of_lane(3).keys()
        await let_go_of_surplus(slots, heart, 4)
        await slots.beat()
        assert shares(slots, 4) == [8, 8, 0, 0]
        await slots.leave()
    # Who looks at night isn't told of slots that stay here.
    assert [log["slots"] for log in logs if log["event"].startswith("slots.")] == [list(range(SLOTS))]


async def test_lanes_that_drain_once_are_open_from_the_start(outbox_database: Database) -> None:
    slots = slots_of(Session(connected_to(outbox_database), "outbox-relay heartbeat"), lanes=4, all_open=True)
    await slots.beat()
    assert shares(slots, 4) == [4, 4, 4, 4]
    await slots.beat()
    assert not slots.surplus
    await slots.leave()


async def test_a_slot_on_its_way_to_another_lane_that_another_relay_takes_is_said_to_be_released(
    outbox_database: Database,
) -> None:
    heart, other_heart = (Session(connected_to(outbox_database), f"outbox-relay heartbeat {n}") for n in range(2))
    with capture_logs() as logs:
        slots = slots_of(heart, lanes=4)
        await slots.beat()
        slots.backlog()
        await let_go_of_surplus(slots, heart, 4)
        other = slots_of(other_heart, lanes=1)
        await other.beat()
        assert shares(other, 1) == [8]
        await slots.beat()
        assert sum(shares(slots, 4)) == 8
        assert not slots.surplus
        await other.leave()
        await slots.leave()
    told = [log for log in logs if log["event"] == "slots.released"]
    assert [(len(log["slots"]), log["owned"]) for log in told] == [(8, 8)]
