"""``outbox-relay explain``: why a row isn't sent, or when it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from outbox_relay import explain
from tests.acceptance.commands import invoke, outbox_relay
from tests.acceptance.parked import blocked, dead, insert, park, sent
from tests.conftest import Database

COMMANDS = Path(__file__).parents[2] / "docs" / "commands.md"

OWNED = """
WITH relay AS (
    INSERT INTO outbox_relay (name, lease_seconds, ready, direct) VALUES ('orders-1', 60, true, false)
    RETURNING relay_id
)
UPDATE outbox_slot SET owner = relay_id, taken_at = now() - interval '2 days' FROM relay
"""


async def said(database: Database, id_: int) -> str:
    """In words, with times left out."""
    told = await outbox_relay(database, "explain", str(id_))
    told = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "T", told)
    return re.sub(r"\d+\.\d s", "S", told)


async def answer(database: Database, id_: int) -> dict[str, object]:
    found: dict[str, object] = json.loads(await outbox_relay(database, "explain", str(id_), "--json"))
    return found


async def test_a_row_that_is_refused_and_what_waits_behind_it(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute(OWNED)
    first = await dead(connection, "orders", "ada")
    second = await blocked(connection, "orders", "ada")
    late = await insert(connection, "orders", "ada")  # not claimed yet
    other = await insert(connection, "payments", "ada")
    assert await said(outbox_database, first) == (
        "Kafka refused it 5 times, and it waits for somebody to decide, since T, for S.\n"
        "The last refusal: MessageSizeTooLargeError, too large.\n"
        "Mend the cause and `outbox-relay dead retry 1`, or `outbox-relay dead discard 1 --reason …`.\n"
    )
    behind = (
        "An earlier row of its topic and key waits: 1, which is dead: MessageSizeTooLargeError, too large."
        " `outbox-relay explain 1` says what to do.\n"
    )
    assert await said(outbox_database, second) == behind
    assert await said(outbox_database, late) == (
        f'{behind}No relay has put it behind that yet; where relay.followers is "skip", none will.\n'
    )
    found = await answer(outbox_database, second)
    assert (found["answer"], found["behind"], found["behind_state"]) == ("blocked", first, "dead")
    assert (await answer(outbox_database, other))["answer"] == "queued"

    await connection.execute("UPDATE outbox_parked SET state = 'retry', due_at = now() + interval '3 d' WHERE id = 1")
    assert await said(outbox_database, second) == (
        "An earlier row of its topic and key waits: 1, which Kafka refused: MessageSizeTooLargeError, too large;"
        " it is tried again in 3.0 d, at T.\n"
    )
    assert await said(outbox_database, first) == (
        "Kafka refused it, attempt 5: MessageSizeTooLargeError, too large. It is tried again in 3.0 d, at T.\n"
        f"It is for orders-1, which owns its slot, {await slot(outbox_database, first)}, since T, for 2.0 d.\n"
    )
    await connection.execute("UPDATE outbox_parked SET due_at = now() WHERE id = 1")
    assert "It is tried again as soon as its relay looks.\n" in await said(outbox_database, first)
    await connection.execute("UPDATE outbox_parked SET state = 'blocked' WHERE id = 1")
    assert (await said(outbox_database, first)).startswith(
        "What it waited for is done. It goes on as soon as its relay looks.\n"
    )
    await connection.execute("UPDATE outbox_parked SET state = 'trying'; UPDATE outbox SET parked_at = NULL")
    assert (await answer(outbox_database, first))["answer"] == "trying"
    assert (await said(outbox_database, first)).startswith("It waited, and is among those that are sent now. It is the")
    assert "which is being tried again now" in await said(outbox_database, late)


async def slot(database: Database, id_: int) -> int:
    connection = await database.connect()
    found: int = await connection.fetchval("SELECT bucket % 16 FROM outbox WHERE id = $1", id_)
    return found


async def test_topics(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute(OWNED)
    id_ = await insert(connection, "orders", "ada")
    await park(connection, id_, "topic", error="UnknownTopicOrPartitionError", reason="create the topic")
    behind = await insert(connection, "orders", "ada")
    assert await said(outbox_database, id_) == (
        "Its topic, orders, can't be written to, since T, for S: UnknownTopicOrPartitionError, create the topic.\n"
        "It goes on by itself when the topic takes rows again.\n"
    )
    assert "waits: 1, whose topic can't be written to, or is paused." in await said(outbox_database, behind)
    other = await insert(connection, "payments", "ada")
    await park(connection, other, "topic", error="TopicNotAllowed", reason="add it")
    assert await said(outbox_database, other) == (
        "Its topic, payments, can't be written to, since T, for S: TopicNotAllowed, add it.\n"
        "It goes on once its relay is restarted with the topic in kafka.allowed_topics.\n"
    )
    await outbox_relay(outbox_database, "pause", "orders", "--reason", "moved")
    for each in (id_, behind, await insert(connection, "orders", None)):
        assert await said(outbox_database, each) == (
            "Its topic, orders, was paused at T, S ago, for “moved”.\n`outbox-relay resume orders` lets it go on.\n"
        )
        assert (await answer(outbox_database, each))["paused_for"] == "moved"


async def test_what_is_decided(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    first = await sent(connection, "orders", "ada", "2026-01-31 18:00+00")
    told = await outbox_relay(outbox_database, "explain", str(first))
    assert told.startswith("It was sent at 2026-01-31 18:00:00 UTC, ")
    second = await dead(connection, "orders", "ada")
    await outbox_relay(outbox_database, "dead", "discard", str(second), "--reason", "a test order", "--yes")
    told = await said(outbox_database, second)
    assert re.fullmatch(
        r"It was discarded at T, S ago, and is never sent: by \S+@\S+ as postgres, for “a test order”\.\n", told
    )
    result = await invoke("explain", "99", "--database-url", outbox_database.url)
    assert (result.exit_code, result.output) == (1, "There is no row 99.\n")
    await connection.execute("UPDATE outbox_layout SET pruned_until = '2026-01-31 18:00+00'")
    result = await invoke("explain", "99", "--database-url", outbox_database.url)
    assert result.output.endswith(
        "Rows that were sent or discarded before 2026-01-31 18:00:00 UTC have been deleted.\n"
    )
    await connection.execute("UPDATE outbox_layout SET pruned_until = now() + interval '1 minute'")
    result = await invoke("explain", "99", "--database-url", outbox_database.url)
    assert result.output.endswith('what they have sent (relay.after_publish = "delete"): it may have been.\n')


async def test_what_somebody_deleted_while_it_waited(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    first = await dead(connection, "orders", "ada")
    second = await blocked(connection, "orders", "ada")
    await connection.execute("DELETE FROM outbox WHERE id = $1", first)
    assert f"`outbox-relay explain {first}` says what to do" in await said(outbox_database, second)
    result = await invoke("explain", str(first), "--database-url", outbox_database.url)
    assert result.output == (
        f"There is no row {first}.\nSomebody deleted it while it waited, and what is behind it waits still:"
        f" `outbox-relay dead discard {first} --reason …` lets that go on.\n"
    )
    await outbox_relay(outbox_database, "dead", "discard", str(first), "--reason", "deleted", "--yes")
    assert "What it waited for is done." in await said(outbox_database, second)


async def test_who_should_send_it(outbox_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = await outbox_database.connect()
    ids = [await insert(connection, "orders", "ada") for _ in range(4)]
    its = await slot(outbox_database, ids[0])
    assert await said(outbox_database, ids[0]) == (
        f"It is the next of its bucket.\nNo relay owns its slot, {its}: start one, or see `outbox-relay status`.\n"
    )
    assert (await answer(outbox_database, ids[0]))["answer"] == "no-owner"
    await connection.execute(OWNED)
    found = await answer(outbox_database, ids[3])
    assert (found["answer"], found["rows_before"], found["relay"]) == ("queued", 3, "orders-1")
    assert await said(outbox_database, ids[3]) == (
        f"3 rows of its bucket are before it.\nIt is for orders-1, which owns its slot, {its}, since T, for 2.0 d.\n"
    )
    monkeypatch.setattr(explain, "MOST_BEFORE", 2)
    assert (await said(outbox_database, ids[3])).startswith("2 or more rows of its bucket are before it.\n")
    await connection.execute("UPDATE outbox_relay SET ready = false")
    assert (await answer(outbox_database, ids[0]))["answer"] == "owner-not-ready"
    assert "doesn't reach Kafka: look at its log.\n" in await said(outbox_database, ids[0])
    await connection.execute("UPDATE outbox_relay SET renewed_at = now() - interval '3 h'")
    assert (await answer(outbox_database, ids[0]))["answer"] == "owner-lost"
    assert "wasn't heard of for 3.0 h: is it running?\n" in await said(outbox_database, ids[0])
    await connection.execute("DELETE FROM outbox_relay")
    assert "is gone: start one.\n" in await said(outbox_database, ids[0])


async def test_an_owner_whose_session_is_gone(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    id_ = await insert(connection, "orders", "ada")
    its = await slot(outbox_database, id_)
    await connection.execute(OWNED)
    relay_id = await connection.fetchval("UPDATE outbox_relay SET direct = true RETURNING relay_id")
    lock = "'outbox_relay'::regclass::oid::bigint::bit(32)::integer, $1::integer"
    await connection.execute(f"SELECT pg_advisory_lock({lock})", relay_id)
    assert (await answer(outbox_database, id_))["answer"] == "queued"
    await connection.execute(f"SELECT pg_advisory_unlock({lock})", relay_id)
    assert (await answer(outbox_database, id_))["answer"] == "owner-lost"
    assert await said(outbox_database, id_) == (
        "It is the next of its bucket.\n"
        f"orders-1, which owns its slot, {its}, since T, for 2.0 d, lost its session, and was heard of S ago: if it"
        " doesn't come back, another relay takes over within a few heartbeats. Is one running?\n"
    )


def test_every_answer_is_documented() -> None:
    section = COMMANDS.read_text("utf-8").partition("\n## explain\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
    answers = [answer for row in documented for answer in re.findall(r"`([a-z-]+)`", row)]
    assert sorted(answers) == sorted(["answer", *get_args(explain.Answer)])


async def test_pause_and_resume(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await outbox_relay(outbox_database, "pause", "orders", "--reason", "moved")
    assert await connection.fetchval("SELECT (topic, reason)::text FROM outbox_pause") == "(orders,moved)"
    result = await invoke("pause", "orders", "--reason", "again", "--database-url", outbox_database.url)
    assert result.exit_code == 1
    assert result.output.startswith("orders is paused already, since 2")
    await outbox_relay(outbox_database, "resume", "orders")
    assert not await connection.fetchval("SELECT count(*) FROM outbox_pause")
    result = await invoke("resume", "orders", "--database-url", outbox_database.url)
    assert (result.exit_code, result.output) == (1, "orders isn't paused\n")
    for arguments in (["no topic", "--reason", "r"], ["orders", "--reason", " "], ["orders"]):
        result = await invoke("pause", *arguments, "--database-url", outbox_database.url)
        assert result.exit_code == 2, arguments
    rows = await connection.fetch("SELECT command, selector, rows, reason FROM outbox_audit ORDER BY audit_id")
    assert [tuple(row) for row in rows] == [
        ("pause", "topic orders", 0, "moved"),
        ("resume", "topic orders", 0, None),
    ]
