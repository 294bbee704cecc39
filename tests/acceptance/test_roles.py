"""roles.sql: an application and a relay do with these roles all that they have to, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url

from outbox_relay import cli, outbox, status
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka
from outbox_relay.source import session
from outbox_relay.source.statements import OUTBOX
from tests.acceptance.commands import invoke
from tests.acceptance.parked import dead, sent
from tests.acceptance.relays import compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.roles import roles_sql

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
async def users(outbox_database: Database) -> AsyncIterator[dict[str, str]]:
    """The urls of a writer and a relay that have these roles and nothing else."""
    connection = await outbox_database.connect()
    # Roles belong to the whole server: these are of this test alone.
    suffix = uuid4().hex[:12]
    names = ("outbox_writer", "outbox_relay", "outbox_pruner", "outbox_operator")
    groups = {name: f"{name}_{suffix}" for name in names}
    await connection.execute(roles_sql(suffix))
    url = make_url(outbox_database.url)
    urls = {}
    for name, group in groups.items():
        await connection.execute(f"CREATE ROLE {group}_user LOGIN PASSWORD 'word' IN ROLE {group}")
        urls[name] = url.set(username=f"{group}_user", password="word").render_as_string(hide_password=False)
    # As roles.sql says: a role besides the relay's.
    await connection.execute(f"GRANT {groups['outbox_relay']} TO {groups['outbox_pruner']}_user")
    yield urls
    for group in groups.values():
        await connection.execute(f"DROP OWNED BY {group}")
        await connection.execute(f"DROP ROLE {group}_user, {group}")


async def test_messages_flow_with_these_roles_alone(
    users: dict[str, str], outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    writer = await asyncpg.connect(users["outbox_writer"])
    with relay_process(users["outbox_relay"], kafka.bootstrap_servers) as relay:
        async with writer.transaction():
            await outbox.add_async(writer, *(Message(topic, {"n": n}, key=f"k{n % 7}") for n in range(500)))
        await writer.execute("INSERT INTO outbox (topic, key, type, payload) VALUES ($1, 'k', 't', 'x')", topic)
        connection = await outbox_database.connect()
        await drained(connection)
        # It leaves, and another comes: every statement of its life was run.
        assert await relay.stop() == 0
        relay.start()
        await relay.event("slots.taken", after=1)
        assert await relay.stop() == 0
    await writer.close()
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert (report.committed, report.duplicates) == (501, 0)
    assert relay.events(level="warning") == []


async def test_status_needs_no_more_than_the_relay(users: dict[str, str], outbox_database: Database) -> None:
    await (await outbox_database.connect()).execute("INSERT INTO outbox (topic, key, payload) VALUES ('t', 'k', 'x')")
    database = session.Database(users["outbox_relay"], 10.0, 10.0)
    found = await status.read(database, OUTBOX, lambda: asyncio.sleep(0))
    assert (found.backlog.rows, found.topics.most) == (1, [status.Topic("t", 1)])


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT payload FROM outbox",
        "INSERT INTO outbox (id, topic, payload) VALUES (-1, 't', '')",
        "INSERT INTO outbox (topic, payload, sent_at) VALUES ('t', '', now())",
        "UPDATE outbox SET sent_at = now()",
        "DELETE FROM outbox",
        "SELECT * FROM outbox_slot",
    ],
)
async def test_a_writer_can_only_add(statement: str, users: dict[str, str]) -> None:
    connection = await asyncpg.connect(users["outbox_writer"])
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute(statement)
    await connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO outbox (topic, payload) VALUES ('t', '')",
        "UPDATE outbox SET payload = ''",
        "UPDATE outbox SET topic = 'other'",
        "DELETE FROM outbox",
        "TRUNCATE outbox",
        "INSERT INTO outbox_slot (slot) VALUES (99)",
        "UPDATE outbox_layout SET slots = 1",
        "UPDATE outbox_layout SET pruned_until = now()",
    ],
)
async def test_a_relay_can_only_mark(statement: str, users: dict[str, str]) -> None:
    connection = await asyncpg.connect(users["outbox_relay"])
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute(statement)
    await connection.close()


async def test_an_operator_decides_with_this_role_alone(users: dict[str, str], outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    ids = [await dead(connection, "orders", f"k{number}") for number in range(3)]
    await sent(connection, "orders", "k", "2026-01-31 12:00+00")
    for arguments in (
        "dead list",
        f"dead show {ids[0]}",
        f"dead show {ids[0]} --payload",
        f"dead retry {ids[0]} --yes",
        f"dead retry {ids[1]} --edit --set-topic payments --set-header a=b --yes",
        f"dead discard {ids[2]} --reason r --yes",
        f"explain {ids[0]}",
        f"explain {ids[2]}",
        "pause orders --reason r",
        "resume orders",
        "replay --topic orders --since 2026-01-01T00:00Z --yes",
    ):
        result = await invoke(*arguments.split(), "--database-url", users["outbox_operator"])
        assert result.exit_code == 0, result.output
    assert {row["by_role"] for row in await connection.fetch("SELECT by_role FROM outbox_audit")} == {
        make_url(users["outbox_operator"]).username
    }


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE outbox SET sent_at = now()",
        "UPDATE outbox SET key = 'other'",
        "UPDATE outbox SET parked_at = NULL",
        "UPDATE outbox_parked SET bucket = 0",
        "DELETE FROM outbox_parked",
        "INSERT INTO outbox_parked (id, bucket, topic, state) VALUES (1, 0, 't', 'discarded')",
        "DELETE FROM outbox",
        "UPDATE outbox_slot SET owner = NULL",
        "UPDATE outbox_slot SET epoch = 0",
        "UPDATE outbox_audit SET reason = 'another'",
        "DELETE FROM outbox_audit",
        "UPDATE outbox_layout SET slots = 1",
    ],
)
async def test_an_operator_can_not_mark_nor_hide_what_was_done(statement: str, users: dict[str, str]) -> None:
    connection = await asyncpg.connect(users["outbox_operator"])
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute(statement)
    await connection.close()


def test_the_sql_is_printed() -> None:
    result = CliRunner().invoke(cli.main, ["schema", "print", "--roles"])
    assert result.output == (REPOSITORY / "roles.sql").read_text()
