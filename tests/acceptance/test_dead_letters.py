"""``outbox-relay dead``: what is said of rows that wait, and what becomes of them, with no relay running."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from outbox_relay import audit, dead_letters
from outbox_relay.dead_letters import DISCARDED, DeadLetters, Edit, Selector
from outbox_relay.errors import RefusedError, SourceUnavailableError
from outbox_relay.source.session import Session
from outbox_relay.source.statements import OutboxTable
from tests.acceptance.commands import invoke, outbox_relay, session_on
from tests.acceptance.parked import blocked, broken_rules, dead, insert, park
from tests.acceptance.test_existing_tables import COLUMNS, DEBEZIUM, adopt, write_config
from tests.conftest import Database

ERROR = "MessageSizeTooLargeError"


async def states(connection: asyncpg.Connection) -> dict[int, str]:
    """By id, the state, and a star where it is due."""
    rows = await connection.fetch("SELECT id, state, due_at <= now() AS is_due FROM outbox_parked ORDER BY id")
    return {row["id"]: row["state"] + ("*" if row["is_due"] else "") for row in rows}


async def audited(connection: asyncpg.Connection) -> list[tuple[Any, ...]]:
    rows = await connection.fetch("SELECT * FROM outbox_audit ORDER BY audit_id")
    assert all(row["by_role"] == "postgres" and "@" in row["by_whom"] for row in rows)
    return [tuple(row[name] for name in ("command", "selector", "rows", "ids", "reason")) for row in rows]


def on(database: Database, table: OutboxTable | None = None, schema: str = "") -> tuple[Session, DeadLetters]:
    opened = session_on(database, schema)
    return opened, DeadLetters(opened, table) if table is not None else DeadLetters(opened)


# -- looking


async def test_list_and_show(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    assert await outbox_relay(outbox_database, "dead", "list") == "none\n"
    first = await dead(
        connection, "orders", "ada", type="OrderPlaced", headers='{"tenant": "north"}', payload=b"secret"
    )
    for _ in range(3):
        await blocked(connection, "orders", "ada")
    second = await dead(connection, "payments", None)
    await park(
        connection, await insert(connection, "orders", "bo"), "retry", attempts=2, due_in_seconds=259_200, error="E"
    )
    await connection.execute("UPDATE outbox_parked SET parked_at = now() - interval '3 hours'")
    shown = await outbox_relay(outbox_database, "dead", "list", "--state", "all")
    assert shown == (
        "ID  TOPIC     STATE    ATTEMPTS  PARKED     DUE       BEHIND  ERROR\n"
        "──  ────────  ───────  ────────  ─────────  ────────  ──────  ────────────────────────\n"
        "1   orders    dead     5         3.0 h ago  -         3       MessageSizeTooLargeError\n"
        "2   orders    blocked  0         3.0 h ago  -         2       -\n"
        "3   orders    blocked  0         3.0 h ago  -         1       -\n"
        "4   orders    blocked  0         3.0 h ago  -         0       -\n"
        "5   payments  dead     5         3.0 h ago  -         0       MessageSizeTooLargeError\n"
        "6   orders    retry    2         3.0 h ago  in 3.0 d  0       E\n"
    )
    found = json.loads(await outbox_relay(outbox_database, "dead", "list", "--json"))
    assert [row["id"] for row in found["rows"]] == [first, second]
    assert not found["more"]
    assert "ada" not in shown + json.dumps(found)

    shown = await outbox_relay(outbox_database, "dead", "show", str(first))
    facts = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert facts["key"] == "ada"
    assert facts["headers"] == '{"tenant": "north"}'
    assert (facts["payload_bytes"], facts["behind"], facts["state"]) == ("6", "3", "dead")
    assert (facts["error"], facts["reason"]) == (ERROR, "too large")
    assert "secret" not in shown
    assert await outbox_relay(outbox_database, "dead", "show", str(first), "--payload") == "secret"
    assert json.loads(
        await outbox_relay(outbox_database, "dead", "show", str(first), "--json")
    ).keys() == facts.keys() | {"history"}


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ([], [1, 2, 3]),
        (["--id", "1", "--id", "3"], [1, 3]),
        (["--key", "ada"], [1]),
        (["--topic", "payments"], [2, 3]),
        (["--error", "OtherError"], [3]),
        (["--topic", "payments", "--error", ERROR], [2]),
        (["--limit", "2"], [1, 2]),
        (["--state", "blocked"], [4]),
        (["--state", "all"], [1, 2, 3, 4]),
    ],
)
async def test_what_is_listed_can_be_chosen(filters: list[str], ids: list[int], outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await dead(connection, "orders", "ada")
    await dead(connection, "payments", None)
    await dead(connection, "payments", "bo")
    await connection.execute("UPDATE outbox_parked SET error = 'OtherError' WHERE id = 3")
    await blocked(connection, "payments", "bo")
    found = json.loads(await outbox_relay(outbox_database, "dead", "list", "--json", *filters))
    assert [row["id"] for row in found["rows"]] == ids
    assert found["more"] is ("--limit" in filters)
    if "--limit" in filters:
        shown = await outbox_relay(outbox_database, "dead", "list", *filters)
        assert shown.endswith("and more: these are the oldest 2; --limit shows more\n")


# -- deciding


async def test_retry_is_due_at_once_and_leaves_followers_where_they_are(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    first = await dead(connection, "orders", "ada")
    behind = await blocked(connection, "orders", "ada")
    waits = await park(connection, await insert(connection, "orders", "bo"), "retry", attempts=3, due_in_seconds=3600)
    said = await outbox_relay(outbox_database, "dead", "retry", str(first), str(waits), "--yes")
    assert said == "2 rows tried again\n"
    assert await states(connection) == {first: "retry*", behind: "blocked", waits: "retry*"}
    assert await connection.fetchval("SELECT max(attempts) FROM outbox_parked") == 0
    # Rows of two slots, so two transactions.
    assert sorted(await audited(connection)) == [
        ("dead retry", f"id {first} {waits}", 1, [first], None),
        ("dead retry", f"id {first} {waits}", 1, [waits], None),
    ]
    assert await broken_rules(connection) == {}


@pytest.mark.parametrize("state", ["blocked", "topic", "discarded", "trying"])
async def test_only_what_was_refused_is_tried_again(state: str, outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    id_ = await park(connection, await insert(connection, "orders", "ada"), state, due_in_seconds=3600)
    result = await invoke("dead", "retry", str(id_), "99", "--yes", "--database-url", outbox_database.url)
    assert (result.exit_code, result.stdout) == (1, "0 rows tried again\n")
    assert f"aren't in a state for it: {id_} 99;" in result.stderr
    assert await states(connection) == {id_: state}
    assert await audited(connection) == []


async def test_discard_lets_the_next_of_the_line_go_on(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    first = await dead(connection, "orders", "ada")
    second, third = [await blocked(connection, "orders", "ada") for _ in range(2)]
    other = await dead(connection, "payments", "ada")
    follower = await blocked(connection, "payments", "ada")
    await outbox_relay(outbox_database, "dead", "discard", str(first), "--reason", "test order", "--yes")
    assert await states(connection) == {
        first: "discarded",
        second: "blocked*",
        third: "blocked",
        other: "dead",
        follower: "blocked",
    }
    assert await audited(connection) == [("dead discard", f"id {first}", 1, [first], "test order")]
    # In the middle of a line: nobody is freed, and nobody is stranded later.
    await outbox_relay(outbox_database, "dead", "discard", str(follower), "--reason", "r", "--yes")
    await outbox_relay(outbox_database, "dead", "discard", str(second), "--reason", "r", "--yes")
    assert (await states(connection))[third] == "blocked*"
    assert await broken_rules(connection) == {}
    shown = await outbox_relay(outbox_database, "dead", "show", str(first))
    assert re.search(r"dead discard by \S+@\S+ as postgres: test order\n$", shown)


async def test_a_row_behind_one_that_is_being_tried_is_not_let_go(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    tried = await park(connection, await insert(connection, "orders", "ada"), "trying", attempts=1)
    first, second = [await blocked(connection, "orders", "ada") for _ in range(2)]
    await outbox_relay(outbox_database, "dead", "discard", str(first), "--reason", "r", "--yes")
    assert await states(connection) == {tried: "trying", first: "discarded", second: "blocked"}


async def test_many_rows_are_changed_in_bounded_transactions(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "MOST_ROWS_AT_ONCE", 10)
    connection = await outbox_database.connect()
    ids = [await dead(connection, "orders", f"k{number % 8}") for number in range(60)]
    kept = await dead(connection, "other", "k0")
    said = await outbox_relay(outbox_database, "dead", "discard", "--topic", "orders", "--reason", "r", "--yes")
    assert said == "60 rows discarded\n"
    deeds = await audited(connection)
    assert sorted(id_ for deed in deeds for id_ in deed[3]) == ids
    assert all(deed[1] == "topic orders" and deed[2] == len(deed[3]) <= 10 for deed in deeds)
    assert set((await states(connection)).items()) == {*((id_, "discarded") for id_ in ids), (kept, "dead")}
    said = await outbox_relay(outbox_database, "dead", "discard", "--all", "--reason", "r", "--yes")
    assert said == "1 row discarded\n"


async def test_rows_that_changed_since_they_were_chosen_are_left_alone(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    id_ = await dead(connection, "orders", "ada")
    opened, letters = on(outbox_database)
    chosen = await letters.choose(DISCARDED, Selector())
    await connection.execute("UPDATE outbox_parked SET state = 'trying'; UPDATE outbox SET parked_at = NULL")
    assert await letters.discard(chosen, "all", "r") == 0
    await opened.close()
    assert await states(connection) == {id_: "trying"}
    assert await audited(connection) == []


async def test_a_slot_that_is_locked_is_waited_for_only_so_long(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await outbox_database.connect()
    id_ = await dead(connection, "orders", "ada")
    opened, letters = on(outbox_database)
    chosen = await letters.choose(DISCARDED, Selector())
    async with connection.transaction():
        await connection.execute("SELECT FROM outbox_slot FOR NO KEY UPDATE")
        # Waited for, as a relay's transaction is.
        discarding = asyncio.create_task(letters.discard(chosen, "all", "r"))
        other = await outbox_database.connect()
        while not await other.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):
            assert not discarding.done()
    assert await discarding == 1
    assert await states(connection) == {id_: "discarded"}

    monkeypatch.setattr(audit, "LOCK_SECONDS", 0.1)
    async with connection.transaction():
        await connection.execute("SELECT FROM outbox_slot FOR NO KEY UPDATE")
        with pytest.raises(
            SourceUnavailableError, match=r"was locked by its relay for 0.1 s.*; 0 of 1 rows were changed"
        ):
            await letters.discard(chosen, "all", "r")
    await opened.close()


# -- correcting


async def test_a_row_is_corrected_and_tried_again(outbox_database: Database, tmp_path: Path) -> None:
    connection = await outbox_database.connect()
    id_ = await dead(connection, "orders", "ada", headers='{"a": "1", "b": "2"}', payload=b"large")
    behind = await blocked(connection, "orders", "ada")
    (tmp_path / "payload").write_bytes(b"\x00small\xff")
    said = await outbox_relay(
        outbox_database,
        *("dead", "retry", str(id_), "--edit", "--payload-file", str(tmp_path / "payload")),
        *("--set-header", "a=x=y", "--set-header", "c=", "--remove-header", "b", "--yes"),
    )
    assert said == "1 row tried again\n"
    row = await connection.fetchrow("SELECT * FROM outbox WHERE id = $1", id_)
    assert (row["topic"], row["payload"], json.loads(row["headers"])) == (
        "orders",
        b"\x00small\xff",
        {"a": "x=y", "c": ""},
    )
    assert await states(connection) == {id_: "retry*", behind: "blocked"}
    assert await audited(connection) == [
        ("dead retry --edit", f"id {id_}", 1, [id_], "corrected: header a, header b, header c, payload")
    ]
    await outbox_relay(
        outbox_database, "dead", "retry", str(id_), "--edit", "--payload-file", "-", "--yes", input=b"piped"
    )
    assert await connection.fetchval("SELECT payload FROM outbox WHERE id = $1", id_) == b"piped"


async def test_a_corrected_topic_moves_the_row_to_another_line(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    id_ = await dead(connection, "orders", "ada")
    behind = await blocked(connection, "orders", "ada")
    await outbox_relay(outbox_database, "dead", "retry", str(id_), "--edit", "--set-topic", "payments", "--yes")
    assert await states(connection) == {id_: "retry*", behind: "blocked*"}
    lines = "SELECT p.topic, o.topic, count(*) OVER (PARTITION BY p.line) FROM outbox_parked p JOIN outbox o USING (id)"
    assert [tuple(row) for row in await connection.fetch(f"{lines} ORDER BY id")] == [
        ("payments", "payments", 1),
        ("orders", "orders", 1),
    ]
    assert await broken_rules(connection) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1", "--edit"], "--edit goes with --set-topic"),
        (["1", "--set-topic", "t"], "--edit goes with --set-topic"),
        (["1", "2", "--edit", "--set-topic", "t"], "--edit corrects one row"),
        (["--key", "k", "--edit", "--set-topic", "t"], "--edit corrects one row"),
        (["1", "--edit", "--set-topic", "no topic"], "no name that Kafka takes"),
        (["1", "--edit", "--set-header", "outbox-id=1"], "outbox-id"),
        (["1", "--edit", "--set-header", "noequals"], "--set-header takes NAME=VALUE"),
        ([], "which rows? Give an ID, --key, --topic or --error, or --all"),
        (["1", "--all"], "--all is all"),
        (["1"], "Try again 1 dead? Nothing was changed: this is no terminal to ask on, so add --yes to go on."),
    ],
)
async def test_what_can_not_be_meant_changes_nothing(
    arguments: list[str], message: str, outbox_database: Database
) -> None:
    connection = await outbox_database.connect()
    await dead(connection, "orders", "ada")
    result = await invoke("dead", "retry", *arguments, "--database-url", outbox_database.url)
    assert result.exit_code == 2
    assert message in re.sub(r"\s*\n\s*", " ", result.stderr)
    # How the command is used isn't the question where nothing is wrong but that there is nobody to ask.
    assert ("Usage:" in result.stderr) == ("no terminal" not in message)
    assert await states(connection) == {1: "dead"}


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "Missing option '--reason'"), (["--reason", " "], "--reason is empty")]
)
async def test_discarding_asks_for_a_reason(arguments: list[str], message: str, outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await dead(connection, "orders", "ada")
    result = await invoke("dead", "discard", "1", *arguments, "--yes", "--database-url", outbox_database.url)
    assert result.exit_code == 2
    assert message in result.stderr
    assert await states(connection) == {1: "dead"}


async def test_what_was_done_to_a_row_that_was_sent_is_still_shown(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    id_ = await dead(connection, "orders", "ada")
    await outbox_relay(outbox_database, "dead", "retry", str(id_), "--edit", "--set-header", "a=b", "--yes")
    # As the relay does.
    await connection.execute("DELETE FROM outbox_parked; UPDATE outbox SET parked_at = NULL, sent_at = now()")
    result = await invoke("dead", "show", str(id_), "--database-url", outbox_database.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(
        rf"row {id_} isn't parked; `outbox-relay explain {id_}` says what became of it; what was done to it:"
        r" dead retry --edit by \S+@\S+ as \w+ at [0-9: -]{19} UTC for “corrected: header a”\n",
        result.stderr,
    ), result.stderr


async def test_what_is_being_tried_can_not_be_corrected(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    id_ = await park(connection, await insert(connection, "orders", "ada"), "trying")
    opened, letters = on(outbox_database)
    with pytest.raises(RefusedError, match=rf"row {id_} is trying, and only a row that is dead"):
        await letters.edit(id_, Edit(payload=b"y"))
    with pytest.raises(RefusedError, match=r"row 99 isn't parked"):
        await letters.edit(99, Edit(payload=b"y"))
    with pytest.raises(RefusedError, match=r"row 99 isn't parked"):
        await letters.show(99)
    with pytest.raises(RefusedError, match=r"no row 99"):
        await letters.payload(99)
    await opened.close()
    assert await connection.fetchval("SELECT payload FROM outbox") == b"x"


async def test_a_row_that_a_stranger_has_locked_is_not_waited_for(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    id_ = await dead(connection, "orders", "ada")
    opened, letters = on(outbox_database)
    async with connection.transaction():
        await connection.execute("SELECT FROM outbox FOR UPDATE")
        with pytest.raises(RefusedError, match="another session has the row locked"):
            await letters.edit(id_, Edit(payload=b"y"))
    await letters.edit(id_, Edit(payload=b"y"))
    await opened.close()
    assert await connection.fetchval("SELECT payload FROM outbox") == b"y"


# -- a table with names of its own


async def test_a_table_with_names_of_its_own(database: Database, tmp_path: Path) -> None:
    connection = await database.connect()
    await connection.execute(DEBEZIUM.format(payload_type="jsonb"))
    await adopt(connection, write_config(tmp_path / "c.toml", database.url, "t"))
    await connection.execute('SET search_path = "Order Service"')
    await connection.execute(
        "INSERT INTO outboxevent (aggregatetype, aggregateid, type, payload) VALUES ('order', '42', 'T', '{\"n\": 1}')"
    )
    await connection.execute(
        "UPDATE outboxevent SET parked_at = now();"
        "INSERT INTO outbox_parked (id, bucket, topic, key, state)"
        " SELECT seq, bucket, 'outbox.event.order', '42', 'dead' FROM outboxevent"
    )
    opened, letters = on(
        database, OutboxTable("outboxevent", "outbox.event.{aggregatetype}", **COLUMNS), "Order Service"
    )
    shown = await letters.show(1)
    assert (shown["topic"], shown["key"], shown["type"], shown["headers"]) == ("outbox.event.order", "42", "T", None)
    assert await letters.payload(1) == b'{"n": 1}'
    with pytest.raises(RefusedError, match=r"put together from columns"):
        await letters.edit(1, Edit(topic="other"))
    with pytest.raises(RefusedError, match=r"no headers"):
        await letters.edit(1, Edit(set_headers={"a": "b"}))
    with pytest.raises(
        RefusedError, match=r"the table doesn't take this correction: edit: invalid input syntax for type json"
    ):
        await letters.edit(1, Edit(payload=b"no json"))
    await letters.edit(1, Edit(payload=b'{"n": 2}'))
    assert await letters.payload(1) == b'{"n": 2}'
    await opened.close()
    assert await states(connection) == {1: "retry*"}


# -- the command


async def test_a_person_is_asked(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await dead(connection, "orders", "ada")
    said = await asyncio.to_thread(on_a_terminal, outbox_database.url, b"n\n")
    assert said.endswith("Discard 1 dead? [y/N]: Aborted!\n")
    assert await states(connection) == {1: "dead"}
    said = await asyncio.to_thread(on_a_terminal, outbox_database.url, b"y\n")
    assert said.endswith("1 row discarded\n")
    assert await states(connection) == {1: "discarded"}


def on_a_terminal(url: str, answer: bytes) -> str:
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", "outbox_relay", "dead", "discard", "--all", "--reason", "r"]
        process = subprocess.Popen([*command, "--database-url", url], stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        os.write(ours, answer)
        process.wait(60)
        return os.read(ours, 65536).decode().replace("\r\n", "\n")
    finally:
        os.close(ours)


async def test_which_database_is_meant(
    outbox_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    result = await invoke("dead", "list")
    assert (result.exit_code, result.stderr) == (
        78,
        "which database is meant? Give --config or --database-url, or set DATABASE_URL\n",
    )
    nowhere = tmp_path / "nowhere.toml"
    nowhere.write_text('[database]\nurl = "postgresql://127.0.0.1:1/d"\n[kafka]\nbootstrap_servers = ["localhost:1"]\n')
    # The file's, whatever is in the environment; the command line's before the file's.
    monkeypatch.setenv("DATABASE_URL", outbox_database.url)
    assert (await invoke("dead", "list", "--config", str(nowhere))).exit_code == 69
    assert await outbox_relay(outbox_database, "dead", "list", "--config", str(nowhere)) == "none\n"
    assert (await invoke("dead", "list")).output == "none\n"
