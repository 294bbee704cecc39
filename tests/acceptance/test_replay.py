"""``outbox-relay replay``: which rows are sent again, what their copies are, and what is refused."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from outbox_relay import replay
from outbox_relay.errors import RefusedError
from outbox_relay.replay import Range, Replay
from outbox_relay.servers import Kafka
from outbox_relay.source.statements import OutboxTable
from outbox_relay.topic_reader import read_topics
from tests.acceptance.commands import invoke, outbox_relay, session_on
from tests.acceptance.parked import dead, insert, sent
from tests.acceptance.relays import compare, drained, new_topic, relay_process
from tests.acceptance.test_existing_tables import COLUMNS, DEBEZIUM, adopt, write_config
from tests.conftest import Database

SINCE, UNTIL = "2026-01-31T12:00:00Z", "2026-01-31T13:00:00Z"
WITHIN = "2026-01-31 12:30+00"
ALL_DAY = ("--since", "2026-01-31T00:00Z", "--until", "2026-02-01T00:00:00+01:00")


async def copies(connection: asyncpg.Connection) -> list[int]:
    """The originals of the copies, in the order of the copies."""
    rows = await connection.fetch(
        "SELECT headers->>'replay-of' AS id FROM outbox WHERE headers ? 'replay-of' ORDER BY outbox.id"
    )
    return [int(row["id"]) for row in rows]


async def test_copies_are_their_originals_but_for_the_mark(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    given = {"type": "OrderPlaced", "headers": '{"tenant": "north"}', "payload": b"\x00\xff"}
    created_at = datetime(2026, 1, 30, tzinfo=UTC)
    first = await sent(connection, "orders", "ada", WITHIN, created_at=created_at, **given)
    await connection.execute("ALTER TABLE outbox ADD COLUMN tenant text, ADD COLUMN n int GENERATED ALWAYS AS IDENTITY")
    await connection.execute("UPDATE outbox SET tenant = 'north'")
    before = await connection.fetchrow("SELECT * FROM outbox")
    waiting = await insert(connection, "orders", "ada")
    said = await outbox_relay(outbox_database, "replay", "--topic", "orders", *ALL_DAY, "--yes")
    assert said == "1 row copied; they are sent behind what waits already\n"
    original, live, copy = await connection.fetch("SELECT * FROM outbox ORDER BY id")
    assert original == before
    assert live["id"] == waiting < copy["id"]
    assert json.loads(copy["headers"]) == {"tenant": "north", "replay-of": str(first)}
    assert (copy["sent_at"], copy["parked_at"]) == (None, None)
    left_out = {"id", "n", "headers", "sent_at"}
    assert [item for item in copy.items() if item[0] not in left_out] == [
        item for item in original.items() if item[0] not in left_out
    ]
    (deed,) = await connection.fetch("SELECT * FROM outbox_audit")
    assert (deed["command"], deed["rows"], deed["ids"]) == ("replay", 1, [first])
    assert deed["selector"] == ("topic orders, sent from 2026-01-31T00:00:00+00:00 until 2026-02-01T00:00:00+01:00")


@pytest.mark.parametrize(
    ("arguments", "originals"),
    [
        (["--topic", "orders", *ALL_DAY], [1, 2, 3, 4]),
        (["--topic", "orders", "--since", SINCE, "--until", UNTIL], [2, 3]),
        (["--topic", "orders", "--since", SINCE], [2, 3, 4]),
        (["--topic", "orders", "--key", "bo", *ALL_DAY], [3]),
        (["--topic", "orders", "--after", "2", *ALL_DAY], [3, 4]),
        (["--topic", "payments", *ALL_DAY], [5]),
        (["--topic", "other", *ALL_DAY], []),
    ],
)
async def test_which_rows(
    arguments: list[str], originals: list[int], outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "ROWS_A_STEP", 2)
    monkeypatch.setattr(replay, "MOST_ROWS_AT_ONCE", 2)
    connection = await outbox_database.connect()
    await sent(connection, "orders", "ada", "2026-01-31 11:59:59+00")
    await sent(connection, "orders", "ada", "2026-01-31 12:00+00")
    await sent(connection, "orders", "bo", WITHIN)
    await sent(connection, "orders", None, "2026-01-31 13:00+00")
    await sent(connection, "payments", "ada", WITHIN)
    await insert(connection, "orders", "ada")
    await dead(connection, "orders", "bo")
    await outbox_relay(outbox_database, "replay", *arguments, "--yes")
    assert await copies(connection) == originals
    # What is a copy isn't copied, sent or not.
    await connection.execute(
        "UPDATE outbox SET sent_at = $1 WHERE headers ? 'replay-of'", datetime(2026, 1, 31, 12, 30, tzinfo=UTC)
    )
    await outbox_relay(outbox_database, "replay", *arguments, "--yes")
    assert sorted(await copies(connection)) == sorted(originals * 2)


async def test_nobody_is_there_to_agree(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await sent(connection, "orders", "ada", WITHIN)
    await sent(connection, "orders", "ada", WITHIN)
    result = await invoke("replay", "--topic", "orders", *ALL_DAY, "--database-url", outbox_database.url)
    assert result.exit_code == 2
    assert "Send 2 rows again, sent from 2026-01-31 " in result.output
    assert "add --yes to go on" in result.output
    assert await copies(connection) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--since", "2026-01-31T12:00"], "must say its time zone"),
        (["--since", "yesterday"], "must be a time such as"),
        (["--since", UNTIL, "--until", SINCE], "--since must be before --until"),
        (["--since", SINCE, "--rate", "0"], "0.0 is not in the range"),
    ],
)
async def test_what_can_not_be_meant(arguments: list[str], message: str, outbox_database: Database) -> None:
    result = await invoke("replay", "--topic", "t", *arguments, "--database-url", outbox_database.url)
    assert result.exit_code == 2
    assert message in result.output


async def test_the_rate_is_kept(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    for _ in range(12):
        await sent(connection, "orders", "ada", WITHIN)
    began = time.monotonic()
    await outbox_relay(outbox_database, "replay", "--topic", "orders", *ALL_DAY, "--rate", "20", "--yes")
    # Three batches of four: the last begins when the first two have had their time.
    assert time.monotonic() - began > 0.4
    assert [row["rows"] for row in await connection.fetch("SELECT rows FROM outbox_audit")] == [4, 4, 4]


def range_(**changes: Any) -> Range:
    given = {
        "topic": "orders",
        "key": None,
        "since": datetime.fromisoformat(SINCE),
        "until": datetime.fromisoformat(UNTIL),
    }
    return Range(**{**given, **changes})


async def test_where_rows_were_deleted_it_is_refused(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    ids = [await sent(connection, "orders", "ada", WITHIN) for _ in range(3)]
    session = session_on(outbox_database)
    replaying = Replay(session, range_())
    found = await replaying.find()
    # Retention comes between the look and the copies.
    await connection.execute("UPDATE outbox_layout SET pruned_until = '2026-01-31 12:45+00'")
    with pytest.raises(RefusedError, match=r"may have been deleted.*; 0 of 3 rows were copied before$"):
        await replaying.copy(found, 1000)
    with pytest.raises(RefusedError, match=r"before 2026-01-31T12:45:00\+00:00 may have been deleted"):
        await replaying.find()
    # So do relays that delete what they have sent.
    await connection.execute("UPDATE outbox_layout SET pruned_until = now() + interval '1 minute'")
    with pytest.raises(RefusedError, match=r"relays delete what they have sent .*relay.after_publish"):
        await replaying.find()
    # So do others, who say nothing.
    await connection.execute("UPDATE outbox_layout SET pruned_until = $1", datetime.fromisoformat(SINCE))
    await connection.execute("DELETE FROM outbox WHERE id = $1", ids[1])
    with pytest.raises(RefusedError, match=r"rows were deleted meanwhile"):
        await replaying.copy(found, 1000)
    assert await copies(connection) == []
    await replaying.copy(await replaying.find(), 1000)
    assert await copies(connection) == [ids[0], ids[2]]
    await session.close()


async def test_what_is_interrupted_says_where_to_go_on(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST_ROWS_AT_ONCE", 1)
    connection = await outbox_database.connect()
    first, second = [await sent(connection, "orders", "ada", WITHIN) for _ in range(2)]
    session = session_on(outbox_database)
    replaying = Replay(session, range_())
    found = await replaying.find()
    await connection.execute("DELETE FROM outbox WHERE id = $1", second)
    with pytest.raises(RefusedError, match=rf"; 1 of 2 rows were copied before: go on with --after {first}$"):
        await replaying.copy(found, 1000)
    assert await copies(connection) == [first]
    await session.close()


async def test_a_table_with_names_of_its_own(database: Database, tmp_path: Path) -> None:
    connection = await database.connect()
    await connection.execute(DEBEZIUM.format(payload_type="json"))
    await adopt(connection, write_config(tmp_path / "c.toml", database.url, "t"))
    await connection.execute('SET search_path = "Order Service"')
    await connection.execute(
        "INSERT INTO outboxevent (aggregatetype, aggregateid, type, payload, sent_at)"
        f" VALUES ('order', '42', 'T', '{{\"n\": 1}}', '{WITHIN}')"
    )
    topic = "outbox.event.{aggregatetype}"
    session = session_on(database, "Order Service")
    meant = range_(topic="outbox.event.order")
    with pytest.raises(RefusedError, match=r"this table has no headers"):
        await Replay(session, meant, OutboxTable("outboxevent", topic, **COLUMNS)).find()
    await connection.execute("ALTER TABLE outboxevent ADD COLUMN more json")
    replaying = Replay(session, meant, OutboxTable("outboxevent", topic, **{**COLUMNS, "headers": "more"}))
    found = await replaying.find()
    assert found.ids.tolist() == [1]
    with pytest.raises(RefusedError, match=r"outboxevent_pkey lets a row be there only once"):
        await replaying.copy(found, 1000)
    await connection.execute("ALTER TABLE outboxevent DROP CONSTRAINT outboxevent_pkey")
    await replaying.copy(found, 1000)
    await session.close()
    original, copy = await connection.fetch("SELECT *, payload::text AS payload FROM outboxevent ORDER BY seq")
    assert (copy["seq"], copy["id"], copy["payload"]) == (2, original["id"], '{"n": 1}')
    assert (json.loads(copy["more"]), original["more"]) == ({"replay-of": "1"}, None)


async def test_copies_are_sent_in_order_behind_live_rows(outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    connection = await outbox_database.connect()
    with relay_process(outbox_database.url, kafka.bootstrap_servers):
        await connection.execute(
            "INSERT INTO outbox (topic, key, payload) SELECT $1, 'k' || n % 7, 'x' FROM generate_series(1, 200) AS n",
            topic,
        )
        await drained(connection)
        originals = await connection.fetch("SELECT id, sent_at FROM outbox ORDER BY id")
        since = ("--since", "2000-01-01T00:00Z")
        await outbox_relay(outbox_database, "replay", "--topic", topic, *since, "--rate", "100000", "--yes")
        await drained(connection)
    assert await connection.fetch("SELECT id, sent_at FROM outbox WHERE id <= 200 ORDER BY id") == originals
    seen: dict[bytes | None, list[tuple[int, str | None]]] = {}
    async for record in read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=60):
        headers = {name: (value or b"").decode() for name, value in record.headers}
        seen.setdefault(record.key, []).append((int(headers["outbox-id"]), headers.get("replay-of")))
    for records in seen.values():
        live = [id_ for id_, original in records if original is None]
        replayed = [int(original) for _, original in records if original is not None]
        assert replayed == live == sorted(live)
        assert [id_ for id_, _ in records] == sorted(id_ for id_, _ in records)
    assert sum(map(len, seen.values())) == 400
    report = await compare(connection, kafka, topic)
    assert (report.sound, report.committed, report.duplicates) == (True, 400, 0), report.describe()
