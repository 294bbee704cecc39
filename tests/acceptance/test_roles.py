"""roles.sql: an application and a relay do with these roles all that they have to, and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url

from outbox_relay import cli, config, daemon, outbox, roles, schema, status
from outbox_relay.checks.findings import Finding, Kind
from outbox_relay.errors import SourceRefusedError
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka
from outbox_relay.source import session
from outbox_relay.source.statements import OUTBOX
from tests.acceptance.commands import invoke
from tests.acceptance.parked import dead, sent
from tests.acceptance.relays import compare, drained, new_topic, relay_process, toml
from tests.conftest import Database
from tests.roles import roles_sql, suffixed

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
    "arguments",
    [
        "dead list",
        "dead show 1",
        "dead retry 1 --yes",
        "dead retry 1 --edit --set-header a=b --yes",
        "dead discard 1 --reason r --yes",
        "explain 1",
        "pause orders --reason r",
        "resume orders",
        "replay --topic orders --since 2026-01-01T00:00Z --yes",
    ],
)
@pytest.mark.parametrize("role", ["outbox_writer", "outbox_relay"])
async def test_who_may_not_is_told_as_whom_to_log_in(
    role: str, arguments: str, users: dict[str, str], outbox_database: Database
) -> None:
    connection = await outbox_database.connect()
    await dead(connection, "orders", "k")
    await sent(connection, "orders", "k", "2026-01-31 12:00+00")
    result = await invoke(*arguments.split(), "--database-url", users[role])
    # The relay may look, and has no business to decide.
    if role == "outbox_relay" and arguments in ("dead list", "explain 1"):
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 77, result.output
    assert re.fullmatch(
        r"permission denied for \w+ \w+: log in as a member of outbox_operator"
        r" \(`outbox-relay schema print --roles`\): --database-url postgresql://…\n",
        result.stderr,
    ), result.stderr
    assert await connection.fetchval("SELECT count(*) FROM outbox_audit") == 0


async def test_who_may_not_read_the_status_is_told_what_says_why(users: dict[str, str]) -> None:
    database = session.Database(users["outbox_writer"], 10.0, 10.0)
    with pytest.raises(SourceRefusedError) as refused:
        await status.read(database, OUTBOX, lambda: asyncio.sleep(0))
    assert str(refused.value) == (
        "read outbox_layout: permission denied for table outbox_layout; `outbox-relay check` says what the role lacks"
    )


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


async def test_another_database_of_the_server_may_have_the_roles_already(
    users: dict[str, str], outbox_database: Database
) -> None:
    suffix = make_url(users["outbox_writer"]).username.split("_")[2]  # type: ignore[union-attr]
    connection = await outbox_database.connect()
    await connection.execute("CREATE SCHEMA other; SET search_path = other")
    await schema.apply(connection)
    await connection.execute(roles_sql(suffix))
    granted = "SELECT has_table_privilege($1, 'other.outbox_parked', 'DELETE')"
    assert await connection.fetchval(granted, f"outbox_relay_{suffix}")


#: A table of somebody's own, in a schema that no search_path has.
OWN = """
CREATE SCHEMA "Order Service";
CREATE TABLE "Order Service"."Events" (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), kind text NOT NULL, "order" text, payload jsonb
)
"""
OWN_SETTINGS = {
    "table": {"schema": "Order Service", "name": "Events", "topic": "orders.{kind}"},
    "table.columns": {
        "id": "seq", "event_id": "id", "key": "order", "type": "kind", "headers": "", "created_at": "",
    },
}  # fmt: skip


def own_config(url: str) -> str:
    return toml({"database": {"url": url}, "kafka": {"bootstrap_servers": ["localhost:1"]}, **OWN_SETTINGS})


@pytest.fixture
async def own(database: Database, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """As by ``schema adopt`` and ``schema print --roles``, run in a session of no particular search_path; the urls of
    the users, and the configuration that the commands had."""
    connection = await database.connect()
    await connection.execute(OWN)
    suffix = uuid4().hex[:12]
    path = tmp_path / "config.toml"
    path.write_text(own_config(database.url))
    for command in (["schema", "adopt"], ["schema", "print", "--roles"]):
        printed = await invoke(*command, "--config", str(path))
        assert printed.exit_code == 0, printed.output
        await connection.execute(suffixed(printed.output, suffix))
    urls = {"config": str(path), "suffix": suffix}
    url = make_url(database.url)
    for name in roles.ROLES:
        await connection.execute(f"CREATE ROLE {name}_{suffix}_user LOGIN PASSWORD 'word' IN ROLE {name}_{suffix}")
        urls[name] = url.set(username=f"{name}_{suffix}_user", password="word").render_as_string(hide_password=False)
    yield urls
    for name in roles.ROLES:
        await connection.execute(f"DROP OWNED BY {name}_{suffix}_user, {name}_{suffix}")
        await connection.execute(f"DROP ROLE {name}_{suffix}_user, {name}_{suffix}")


async def test_the_roles_of_a_table_and_a_schema_that_are_named_are_enough(
    own: dict[str, str], database: Database, kafka: Kafka, tmp_path: Path
) -> None:
    kind = uuid4().hex
    await kafka.create_topic(f"orders.{kind}")
    writer = await asyncpg.connect(own["outbox_writer"])
    insert = 'INSERT INTO "Order Service"."Events" (kind, "order", payload) VALUES ($1, $2, $3)'
    await writer.execute(insert, kind, "42", "{}")
    await writer.close()
    with relay_process(own["outbox_relay"], kafka.bootstrap_servers, "--once", tables=OWN_SETTINGS) as relay:
        assert await relay.exit_code() == 0
    sent = 'SELECT count(*) FROM "Order Service"."Events" WHERE sent_at IS NOT NULL'
    assert await (await database.connect()).fetchval(sent) == 1
    for arguments in ("dead list", "explain 1", "pause orders.x --reason r", "resume orders.x"):
        result = await invoke(*arguments.split(), "--config", own["config"], "--database-url", own["outbox_operator"])
        assert result.exit_code == 0, result.output


async def test_what_check_says_to_run_is_run_as_it_stands(own: dict[str, str], database: Database) -> None:
    connection = await database.connect()
    group, user = f"outbox_relay_{own['suffix']}", make_url(own["outbox_relay"]).username
    path = Path(own["config"])
    path.write_text(own_config(own["outbox_relay"]))

    async def findings() -> list[Finding]:
        found = (await daemon.check(config.load(path))).findings
        return [one for one in found if one not in known]

    known: list[Finding] = []  # of the server that the tests have
    known = await findings()
    await connection.execute(f"""
        REVOKE SELECT ON "Order Service"."Events", "Order Service".outbox_slot FROM {group};
        ALTER SEQUENCE "Order Service"."Events_seq_seq" CACHE 20;
        DROP INDEX "Order Service".outbox_unsent;
    """)
    found = await findings()
    assert {one.kind.code for one in found} == {"privilege-missing", "identity-cache", "index-missing"}
    for one in found:
        await connection.execute(one.advice.partition(", or see")[0])
    assert await findings() == []
    # What it says of the role is of the role that logs in.
    assert all(f" TO {user}" in one.advice for one in found if one.kind is Kind.PRIVILEGE_MISSING)


async def test_schema_apply_makes_the_roles_too(database: Database) -> None:
    connection = await database.connect()
    known = {row["rolname"] for row in await connection.fetch("SELECT rolname FROM pg_roles")}
    try:
        for version in ("created the outbox schema, version 1", "the outbox schema is at version 1 already"):
            result = await invoke("schema", "apply", "--roles", "--database-url", database.url)
            assert (result.exit_code, result.output.splitlines()) == (
                0,
                [version, f"the roles {', '.join(roles.ROLES)} have their rights; GRANT them to users that log in"],
            )
        assert await connection.fetchval("SELECT has_table_privilege('outbox_relay', 'outbox_parked', 'DELETE')")
    finally:
        for name in set(roles.ROLES) - known:
            await connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_who_may_not_make_roles_is_told_who_may(users: dict[str, str]) -> None:
    result = await invoke("schema", "apply", "--roles", "--database-url", users["outbox_relay"])
    assert result.exit_code == 69
    assert "permission denied" in result.output
    assert "log in as the owner of the tables, who may make roles (CREATEROLE): --database-url" in result.output
