"""What is concluded from two looks at a backlog, and how that is shown."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from outbox_relay import status
from outbox_relay.status import (
    Backlog,
    Counted,
    Forecast,
    Parked,
    Paused,
    Rates,
    Refused,
    RelayAlive,
    SlotsOwned,
    Status,
    Topic,
    Topics,
)

COMMANDS = Path(__file__).parents[2] / "docs" / "commands.md"
MANY = status.MOST_COUNTED + 1


def counted(at: float, rows: int, updated: int = 0, deleted: int = 0, deleted_until: float | None = None) -> Counted:
    return Counted(at, rows, 0, updated, deleted, deleted_until)


@pytest.mark.parametrize(
    ("before", "after", "new", "inserted", "sent"),
    [
        (counted(0, 0), counted(2, 0), 0, 0, 0),
        (counted(0, 100), counted(2, 40), 10, 5, 35),
        (counted(0, 100), counted(2, 140), 60, 30, 10),
        # Two rows were inserted before the first look and committed after it.
        (counted(0, 100), counted(2, 102), 0, 1, 0),
        # What isn't counted to its end grows by an unknown number.
        (counted(0, MANY, 500), counted(2, MANY, 900), 10, 5, 200),
        (counted(0, MANY, 500), counted(2, 40, 900), 10, 5, 200),
        # Relays delete what they have sent, also of what came since the first look.
        (counted(0, 100, deleted=50), counted(2, 40, deleted=150, deleted_until=60), 10, 20, 50),
        (counted(0, 0, deleted=50), counted(2, 0, deleted=150, deleted_until=60), 0, 50, 50),
        # The statistics are late.
        (counted(0, 100, deleted=50), counted(2, 40, deleted=50, deleted_until=60), 10, 5, 35),
        (counted(0, MANY, 500, 50), counted(2, MANY, 600, 350, 60), 10, 5, 200),
        # Retention deletes what was sent long ago.
        (counted(0, 100, deleted=50), counted(2, 40, deleted=950, deleted_until=-60), 10, 5, 35),
    ],
)
def test_rates(before: Counted, after: Counted, new: int, inserted: float, sent: float) -> None:
    assert status.rates_of(before, after, new) == Rates(2, inserted, sent)


@pytest.mark.parametrize(
    ("rows", "inserted", "sent", "forecast"),
    [
        (0, 5, 5, Forecast("empty", None)),
        (100, 5, 15, Forecast("shrinking", 10)),
        (100, 5, 5, Forecast("standing", None)),
        (100, 15, 5, Forecast("growing", None)),
    ],
)
def test_the_forecast(rows: int, inserted: float, sent: float, forecast: Forecast) -> None:
    assert status.forecast_of(rows, Rates(2, inserted, sent)) == forecast


BUSY = Status(
    Backlog(1280, is_exact=True, oldest_seconds=4.21),
    Topics(1280, [Topic("orders", 1200), Topic("pay\x1b[2Jments", 80)]),
    Parked(
        is_exact=True,
        retry=2,
        trying=0,
        blocked=1100,
        topic=0,
        dead=1,
        discarded=0,
        blocked_keys=2,
        oldest_seconds=33.0,
        oldest_dead_seconds=9.0,
    ),
    [Paused("bad\x1b[2J", 7200.0, "moved")],
    [Refused("payments", 80, 180.0, "UnknownTopicOrPartitionError", "create\x1b[2J the topic")],
    [
        RelayAlive(7, "orders-1", ready=True, connected=True, heartbeat_seconds=0.41, slots=[0, 1, 2, 4]),
        RelayAlive(8, "orders-2", ready=False, connected=None, heartbeat_seconds=130.0, slots=[]),
    ],
    SlotsOwned(16, [8, 9, 10, 15]),
    Rates(2.0, 310.0, 950.0),
    Forecast("shrinking", 7200.0),
)


def test_a_person_gets_tables() -> None:
    assert "\n".join(status.as_tables(BUSY)) == (
        "Backlog   1,280 rows, the oldest 4.2 s old\n"
        "Rates     310.0/s inserted, 950.0/s sent (over 2.0 s)\n"
        "Forecast  shrinking; gone in 2.0 h at these rates\n"
        "Parked    1,103 rows: 2 retry, 1,100 blocked, 1 dead; 2 keys are blocked; the oldest dead for 9.0 s\n"
        "Paused    bad\\x1b[2J, for 2.0 h: moved\n"
        "Refused   payments, 80 rows for 3.0 min: UnknownTopicOrPartitionError, create\\x1b[2J the topic\n"
        "Slots     12 of 16 owned; the rows of these wait: 8-10 15\n"
        "\n"
        "TOPIC            ROWS\n"
        "───────────────  ─────\n"
        "orders           1,200\n"
        "pay\\x1b[2Jments  80\n"
        "\n"
        "RELAY     ID  REACHES KAFKA  CONNECTED  HEARTBEAT    SLOTS\n"
        "────────  ──  ─────────────  ─────────  ───────────  ─────\n"
        "orders-1  7   yes            yes        0.4 s ago    0-2 4\n"
        "orders-2  8   no             pooled     2.2 min ago  -"
    )


NOTHING = Parked(
    is_exact=True,
    retry=0,
    trying=0,
    blocked=0,
    topic=0,
    dead=0,
    discarded=0,
    blocked_keys=0,
    oldest_seconds=None,
    oldest_dead_seconds=None,
)


@pytest.mark.parametrize(
    ("parked", "forecast", "said"),
    [
        ({}, "nothing waits", None),
        ({"topic": 1}, "nothing waits but what is parked", "1 row: 1 for a topic"),
        (
            {"topic": 2, "dead": 1, "blocked_keys": 1},
            "nothing waits but what is parked",
            "3 rows: 2 for a topic, 1 dead; 1 key is blocked",
        ),
        ({"discarded": 1}, "nothing waits", "1 row: 1 discarded"),
    ],
)
def test_a_row_that_waits_for_its_topic_is_no_topic_and_waits(
    parked: dict[str, Any], forecast: str, said: str | None
) -> None:
    idle = dataclasses.replace(
        BUSY,
        backlog=Backlog(0, is_exact=True, oldest_seconds=None),
        parked=dataclasses.replace(NOTHING, **parked),
        forecast=Forecast("empty", None),
    )
    lines = list(status.as_tables(idle))
    assert lines[2] == f"Forecast  {forecast}"
    assert [line for line in lines if line.startswith("Parked")] == ([] if said is None else [f"Parked    {said}"])


def test_what_is_estimated_says_so() -> None:
    huge = dataclasses.replace(BUSY, backlog=Backlog(999_000, is_exact=False, oldest_seconds=None), relays=[])
    lines = list(status.as_tables(huge))
    assert lines[0] == "Backlog   about 999,000 rows"
    assert lines[8] == "TOPIC            ROWS OF THE 1,280 LOOKED AT"
    assert lines[-1] == "No relay is alive."


def test_a_pipe_gets_a_fact_a_line_by_the_names_of_the_json() -> None:
    assert list(status.as_lines(BUSY)) == [
        "backlog.rows 1280",
        "backlog.is_exact yes",
        "backlog.oldest_seconds 4.2",
        "topics.rows_looked_at 1280",
        "topics.most.0.topic orders",
        "topics.most.0.rows 1200",
        "topics.most.1.topic pay\\x1b[2Jments",
        "topics.most.1.rows 80",
        "parked.is_exact yes",
        "parked.retry 2",
        "parked.trying 0",
        "parked.blocked 1100",
        "parked.topic 0",
        "parked.dead 1",
        "parked.discarded 0",
        "parked.blocked_keys 2",
        "parked.oldest_seconds 33.0",
        "parked.oldest_dead_seconds 9.0",
        "paused.0.topic bad\\x1b[2J",
        "paused.0.since_seconds 7200.0",
        "paused.0.reason moved",
        "refused.0.topic payments",
        "refused.0.rows 80",
        "refused.0.since_seconds 180.0",
        "refused.0.error UnknownTopicOrPartitionError",
        "refused.0.reason create\\x1b[2J the topic",
        "relays.0.relay_id 7",
        "relays.0.name orders-1",
        "relays.0.ready yes",
        "relays.0.connected yes",
        "relays.0.heartbeat_seconds 0.4",
        "relays.0.slots 0 1 2 4",
        "relays.1.relay_id 8",
        "relays.1.name orders-2",
        "relays.1.ready no",
        "relays.1.connected -",
        "relays.1.heartbeat_seconds 130.0",
        "relays.1.slots -",
        "slots.count 16",
        "slots.without_owner 8 9 10 15",
        "rates.over_seconds 2.0",
        "rates.inserted_per_second 310.0",
        "rates.sent_per_second 950.0",
        "forecast.state shrinking",
        "forecast.empty_in_seconds 7200.0",
    ]


def test_every_field_is_documented() -> None:
    section = COMMANDS.read_text("utf-8").partition("\n## status\n")[2].partition("\n## ")[0]
    documented = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+) \|$", section, re.MULTILINE))
    found = BUSY.as_dict()
    fields = [f"{table}.{field}" for table, fields in found.items() if isinstance(fields, dict) for field in fields] + [
        "relays",
        "paused",
        "refused",
    ]
    assert sorted(documented) == sorted(fields)
    for name, inner in (("relays", RelayAlive), ("topics.most", Topic), ("paused", Paused), ("refused", Refused)):
        mentioned = re.findall(r"`([a-z_]+)`", documented[name])
        assert mentioned == [field.name for field in dataclasses.fields(inner)]
