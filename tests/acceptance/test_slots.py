"""What a relay says of its slots when PostgreSQL's answer doesn't come."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.relay import Poll
from outbox_relay.source import session
from outbox_relay.source.session import Session
from outbox_relay.source.slots import TAKE, Slots
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


async def test_slots_whose_taking_was_not_answered_are_owned_and_said_to_be(outbox_database: Database) -> None:
    database = session.Database(outbox_database.url, 5.0, 5.0)
    with capture_logs() as logs:
        slots = Slots(
            LosesTheAnswerOfTake(database, "outbox-relay heartbeat"),
            Telemetry(),
            name="test",
            lanes=1,
            lease_seconds=60.0,
            heartbeat_seconds=0.05,
            poll=Poll(0.05, 0.05),
            layout_buckets=BUCKETS,
            layout_slots=SLOTS,
        )
        slots.set_ready(0, True)
        with pytest.raises(SourceUnavailableError):
            await slots.beat()
        await slots.beat()
        assert len(slots.of_lane(0)) == SLOTS
        await slots.leave()
    assert [(log["slots"], log["owned"]) for log in logs if log["event"] == "slots.taken"] == [
        (list(range(SLOTS)), SLOTS)
    ]
