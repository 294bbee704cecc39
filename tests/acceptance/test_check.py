"""``outbox-relay check``: each finding provoked on real servers, and what is said of it to the letter.

What a case has to say is in ``tests/golden/check``, one file a case: what a pipe gets, and the exit code. Names that
differ from run to run are in braces there. ``WRITE_GOLDEN=1`` writes the files anew, to be read before they are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from confluent_kafka.admin import AclOperation
from sqlalchemy import make_url

from outbox_relay import config, daemon, schema
from outbox_relay.checks import findings, server
from outbox_relay.servers import Kafka, PostgresServer
from tests.acceptance.relays import toml
from tests.kafka_cluster import KafkaCluster
from tests.waiting import eventually

GOLDEN = Path(__file__).parents[1] / "golden" / "check"
PASSWORD = "pw-2b9f"


@dataclass
class Stage:
    """A set-up in which nothing is wrong: roles with the least privileges, three replicas, a row that waits."""

    server: PostgresServer
    kafka: KafkaCluster
    owner: asyncpg.Connection
    role: str
    user: str
    topic: str
    directory: Path
    config: dict[str, dict[str, Any]]
    monkeypatch: pytest.MonkeyPatch
    #: What is undone after the check.
    stack: contextlib.AsyncExitStack
    #: What golden files have in braces, by what it is here.
    names: dict[str, str] = field(default_factory=dict)

    async def execute(self, *statements: str) -> None:
        """Of the owner of the tables."""
        for statement in statements:
            await self.owner.execute(statement.format(role=self.role, topic=self.topic))

    async def insert(self, topic: str, key: str | None = "k", payload: bytes = b"x") -> None:
        statement = "INSERT INTO outbox (topic, key, payload) VALUES ($1, $2, $3)"
        await self.owner.execute(statement, topic, key, payload)

    async def add_topic(self, *, replicas: int = 3, **settings: str) -> str:
        """One more that the relay's user may write to, and a row for it."""
        topic = f"{self.topic}-more"
        names = {name.replace("_", "."): value for name, value in settings.items()}
        await asyncio.to_thread(self.kafka.create, topic, replicas, {"min.insync.replicas": "2", **names})
        await self.grant(topic)
        await self.insert(topic)
        return topic

    async def grant(self, topic: str, *operations: AclOperation) -> None:
        usual = (AclOperation.WRITE, AclOperation.DESCRIBE_CONFIGS)
        await asyncio.to_thread(self.kafka.allow, self.user, topic, *(operations or usual))

    async def check(self) -> tuple[str, int]:
        """What a pipe gets, and the exit code."""
        path = self.directory / "config.toml"
        path.write_text(toml(self.config))
        found = await daemon.check(config.load(path))
        text = findings.as_lines(found)
        for name, here in sorted(self.names.items(), key=lambda item: -len(item[1])):
            text = text.replace(here, f"{{{name}}}")
        return re.sub(r"\b\d+ s\b", "{n} s", text), findings.exit_code(found)


Case = Callable[[Stage], Awaitable[None]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Makes the finding that the golden file of that name has."""
    CASES[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[PostgresServer]:
    with PostgresServer.start() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(kafka: Kafka) -> Iterator[KafkaCluster]:
    """``kafka`` only for its skip, where Apache Kafka isn't to be had."""
    with KafkaCluster() as cluster:
        cluster.add_user("relay", PASSWORD)
        yield cluster


@pytest.fixture
async def stage(
    postgres_server: PostgresServer, cluster: KafkaCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stage]:
    suffix = uuid4().hex[:12]
    url = await asyncio.to_thread(postgres_server.create_database, f"orders_{suffix}")
    owner = await asyncpg.connect(url)
    role, topic = f"relay_{suffix}", f"orders-{suffix}"
    await schema.apply(owner)
    await owner.execute(re.sub(r"\b(ROLE|TO) (outbox_\w+)", rf"\1 \2_{suffix}", schema.read_roles_sql()))
    await owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}' IN ROLE outbox_relay_{suffix}")
    await asyncio.to_thread(cluster.create, topic, 3, {"min.insync.replicas": "2"})
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    async with contextlib.AsyncExitStack() as stack:
        stage = Stage(
            postgres_server,
            cluster,
            owner,
            role,
            "relay",
            topic,
            tmp_path,
            {
                "database": {"url": make_url(url).set(username=role).render_as_string()},
                "kafka": {
                    "bootstrap_servers": list(cluster.sasl),
                    "security_protocol": "SASL_PLAINTEXT",
                    "sasl_mechanism": "SCRAM-SHA-256",
                    "sasl_username": "relay",
                    "sasl_password": {"file": str(password)},
                },
            },
            monkeypatch,
            stack,
            {"topic": topic, "role": role},
        )
        await stage.grant(topic)
        await stage.insert(topic)
        yield stage
    await owner.close(timeout=10)


@case
async def clean(_: Stage) -> None:
    """Nothing is wrong."""


# -- the server and the role


@case
async def database_down(stage: Stage) -> None:
    stage.config["database"]["url"] = "postgresql://relay@127.0.0.1:1/orders"


@case
async def database_read_only(stage: Stage) -> None:
    await stage.execute("ALTER ROLE {role} SET default_transaction_read_only = on")


@case
async def superuser(stage: Stage) -> None:
    await stage.execute("ALTER ROLE {role} SUPERUSER")


@case
async def connection_limits(stage: Stage) -> None:
    await stage.execute("ALTER ROLE {role} CONNECTION LIMIT 2")


@case
async def settings_that_endanger(stage: Stage) -> None:
    async def reload(*statements: str) -> None:
        for statement in statements:
            await stage.owner.execute(statement)
        await stage.owner.execute("SELECT pg_reload_conf()")
        settings = "SELECT current_setting('fsync') = current_setting('full_page_writes')"
        wanted = "on" if "RESET" in statements[0] else "off"
        await eventually(
            lambda: stage.owner.fetchval(f"{settings} AND current_setting('autovacuum') = '{wanted}'"), "reloaded"
        )

    names = ("fsync", "full_page_writes", "autovacuum")
    stage.stack.push_async_callback(reload, *(f"ALTER SYSTEM RESET {name}" for name in names))
    await reload(*(f"ALTER SYSTEM SET {name} = off" for name in names))


@case
async def asynchronous_commit(stage: Stage) -> None:
    await stage.execute("ALTER ROLE {role} SET synchronous_commit = off")


@case
async def short_timeouts(stage: Stage) -> None:
    await stage.execute(
        "ALTER ROLE {role} SET idle_session_timeout = '20s'", "ALTER ROLE {role} SET lock_timeout = '100ms'"
    )


@case
async def long_transaction(stage: Stage) -> None:
    await stage.execute("GRANT pg_read_all_stats TO {role}")
    stage.monkeypatch.setattr(server, "LONG_TRANSACTION_SECONDS", 0)
    connection = await asyncpg.connect(stage.server.url(await stage.owner.fetchval("SELECT current_database()")))
    stage.stack.callback(connection.terminate)
    await connection.execute("BEGIN; SELECT pg_current_xact_id()")
    stage.names["pid"] = str(connection.get_server_pid())


# -- the tables


@case
async def no_schema(stage: Stage) -> None:
    await stage.execute("DROP TABLE outbox, outbox_relay, outbox_slot, outbox_layout")


@case
async def schema_elsewhere(stage: Stage) -> None:
    await stage.execute("ALTER SCHEMA public RENAME TO shop")


@case
async def schema_not_usable(stage: Stage) -> None:
    await stage.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")


@case
async def newer_schema(stage: Stage) -> None:
    await stage.execute("UPDATE outbox_layout SET schema_version = 99, oldest_relay = '99.1.0'")


@case
async def another_table(stage: Stage) -> None:
    stage.config["table"] = {"name": "Outbox Events"}


@case
async def another_column(stage: Stage) -> None:
    stage.config["table.columns"] = {"key": "aggregateid"}


@case
async def column_types(stage: Stage) -> None:
    await stage.execute(
        "ALTER TABLE outbox DROP CONSTRAINT outbox_headers_are_flat_strings",
        "ALTER TABLE outbox DROP CONSTRAINT outbox_headers_are_not_reserved",
        "ALTER TABLE outbox DROP COLUMN headers, ADD COLUMN headers text[]",
        "ALTER TABLE outbox ALTER type TYPE bytea USING NULL",
    )


@case
async def nullable_event_id(stage: Stage) -> None:
    await stage.execute("ALTER TABLE outbox ALTER event_id DROP NOT NULL")


@case
async def missing_indexes(stage: Stage) -> None:
    await stage.execute("DROP INDEX outbox_unsent", "ALTER TABLE outbox DROP CONSTRAINT outbox_pkey")


@case
async def invalid_index(stage: Stage) -> None:
    # As a CREATE INDEX CONCURRENTLY leaves it that is cancelled while it waits for a transaction.
    other = await asyncpg.connect(stage.server.url(await stage.owner.fetchval("SELECT current_database()")))
    stage.stack.callback(other.terminate)
    await stage.execute("DROP INDEX outbox_unsent")
    await other.execute("BEGIN; INSERT INTO outbox (topic, key) VALUES ('t', 'k')")
    await stage.owner.execute("SET statement_timeout = '200ms'")
    index = "CREATE INDEX CONCURRENTLY outbox_unsent ON outbox (bucket, id) WHERE sent_at IS NULL"
    with pytest.raises(asyncpg.QueryCanceledError):
        await stage.owner.execute(index)
    await stage.owner.execute("RESET statement_timeout")
    await other.execute("ROLLBACK")


@case
async def cached_identity(stage: Stage) -> None:
    await stage.execute("ALTER SEQUENCE outbox_id_seq CACHE 20")


@case
async def autovacuum_off_for_the_table(stage: Stage) -> None:
    await stage.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")


# -- privileges


@case
async def too_few_privileges(stage: Stage) -> None:
    group = stage.role.replace("relay", "outbox_relay")
    await stage.execute(
        f"REVOKE SELECT ON outbox, outbox_layout FROM {group}",
        f"REVOKE UPDATE (sent_at) ON outbox FROM {group}",
        f"REVOKE DELETE ON outbox_relay FROM {group}",
        f"REVOKE UPDATE (epoch) ON outbox_slot FROM {group}",
        f"GRANT SELECT (id, event_id, topic, key, type, headers, created_at, sent_at, bucket) ON outbox TO {group}",
    )


@case
async def too_many_privileges(stage: Stage) -> None:
    await stage.execute(
        "GRANT INSERT, DELETE, UPDATE (payload, topic) ON outbox TO {role}", "GRANT ALL ON outbox_layout TO {role}"
    )


@case
async def owner_of_the_table(stage: Stage) -> None:
    await stage.execute("ALTER TABLE outbox OWNER TO {role}")


@case
async def rows_hidden(stage: Stage) -> None:
    await stage.execute("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")


# -- Kafka


@case
async def kafka_down(stage: Stage) -> None:
    stage.config["kafka"]["bootstrap_servers"] = ["127.0.0.1:1", "localhost:2"]


@case
async def wrong_kafka_password(stage: Stage) -> None:
    (stage.directory / "password").write_text("wrong-77ab")
    stage.names["broker"] = stage.kafka.sasl[0]


@case
async def everything_down(stage: Stage) -> None:
    await database_down(stage)
    await kafka_down(stage)


@case
async def topic_that_is_missing(stage: Stage) -> None:
    await stage.grant(f"{stage.topic}-none")
    await stage.insert(f"{stage.topic}-none")


@case
async def topic_that_is_not_allowed(stage: Stage) -> None:
    stage.config["kafka"]["allowed_topics"] = [stage.topic, f"{stage.topic}-other*"]
    await stage.insert(f"{stage.topic}-secret")


@case
async def topic_that_is_allowed_and_missing(stage: Stage) -> None:
    await stage.grant(f"{stage.topic}-later")
    stage.config["kafka"]["allowed_topics"] = [f"{stage.topic}-later", f"{stage.topic}*"]


@case
async def topic_that_is_illegal(stage: Stage) -> None:
    await stage.execute("ALTER TABLE outbox DROP CONSTRAINT outbox_topic_is_legal")
    await stage.insert("orders of today")


@case
async def topics_that_are_forbidden(stage: Stage) -> None:
    seen, unseen = f"{stage.topic}-seen", f"{stage.topic}-unseen"
    for topic in (seen, unseen):
        await asyncio.to_thread(stage.kafka.create, topic, 3, {"min.insync.replicas": "2"})
        await stage.insert(topic)
    await stage.grant(seen, AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS)


@case
async def nothing_may_be_written(stage: Stage) -> None:
    password = stage.directory / "password"
    await asyncio.to_thread(stage.kafka.add_user, "reader", PASSWORD)
    stage.config["kafka"] |= {"sasl_username": "reader", "sasl_password": {"file": str(password)}}


@case
async def topic_that_can_not_be_described(stage: Stage) -> None:
    topic = f"{stage.topic}-dim"
    await asyncio.to_thread(stage.kafka.create, topic)
    await stage.grant(topic, AclOperation.WRITE)
    await stage.insert(topic)


@case
async def large_message(stage: Stage) -> None:
    topic = await stage.add_topic(max_message_bytes="600000")
    await stage.insert(topic, payload=b"x" * 600_000)


@case
async def large_batches(stage: Stage) -> None:
    await stage.add_topic(max_message_bytes="100000")


@case
async def compacted_topic(stage: Stage) -> None:
    topic = await stage.add_topic(cleanup_policy="compact,delete")
    await stage.insert(topic, key=None)


@case
async def one_replica(stage: Stage) -> None:
    await stage.add_topic(replicas=1)


@case
async def one_replica_in_sync(stage: Stage) -> None:
    await stage.add_topic(min_insync_replicas="1")


@case
async def unclean_election(stage: Stage) -> None:
    await stage.add_topic(unclean_leader_election_enable="true")


# -- what is said of them


def golden(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", CASES)
async def test_each_finding_is_provoked_and_told(name: str, stage: Stage) -> None:
    await CASES[name](stage)
    text, code = await stage.check()
    said = f"{text}\nexit code {code}\n"
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.mkdir(parents=True, exist_ok=True)
        (GOLDEN / f"{name}.txt").write_text(said)
    assert said == golden(name)


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)
