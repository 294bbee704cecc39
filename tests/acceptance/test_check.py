"""``outbox-relay check``: each finding provoked on real servers, and what is said of it to the letter.

What a case has to say is in ``tests/golden/check``, one file a case: what a pipe gets, and the exit code. Names that
differ from run to run are in braces there. ``WRITE_GOLDEN=1`` writes the files anew, to be read before they are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import trustme
from confluent_kafka.admin import AclOperation
from sqlalchemy import make_url

from outbox_relay import config, daemon, schema
from outbox_relay.checks import findings, server
from outbox_relay.checks.findings import EXIT_UNAVAILABLE, Kind
from outbox_relay.cli_failures import EXIT_CONFIG
from outbox_relay.servers import Kafka, PostgresServer, versions
from tests.acceptance.relays import toml
from tests.kafka_cluster import KafkaCluster
from tests.kafka_proxy import API_VERSIONS, INIT_PRODUCER_ID, METADATA, KafkaProxy
from tests.pgbouncer import pgbouncer
from tests.roles import roles_sql
from tests.tcp_proxy import TcpProxy
from tests.waiting import eventually

GOLDEN = Path(__file__).parents[1] / "golden" / "check"
COMMANDS = Path(__file__).parents[2] / "docs" / "commands.md"
PASSWORD, WRONG_PASSWORD = "pw-2b9f", "wrong-77ab"
KEY, PAYLOAD = "key-5d1f", b"payload-91c3"


@dataclass
class Stage:
    """A set-up in which nothing is wrong: roles with the least privileges, three replicas, a row that waits."""

    server: PostgresServer
    kafka: KafkaCluster
    owner_url: str
    owner: asyncpg.Connection
    #: Makes names of this test's own.
    suffix: str
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

    def url(self, port: int | None = None) -> str:
        """The relay's, at that port if it isn't the server's own."""
        url = make_url(self.owner_url).set(username=self.role)
        return (url if port is None else url.set(port=port)).render_as_string()

    async def execute(self, *statements: str) -> None:
        """Of the owner of the tables."""
        for statement in statements:
            await self.owner.execute(statement.format(role=self.role, topic=self.topic))

    async def insert(self, topic: str, key: str | None = KEY, payload: bytes = PAYLOAD) -> None:
        statement = "INSERT INTO outbox (topic, key, payload) VALUES ($1, $2, $3)"
        await self.owner.execute(statement, topic, key, payload)

    async def add_topic(self, *, replicas: int = 3, **settings: str) -> str:
        """One more that the relay's user may write to, and a row for it."""
        topic = f"{self.suffix}-more"
        names = {name.replace("_", "."): value for name, value in settings.items()}
        await self.kafka.create(topic, replicas, {"min.insync.replicas": "2", **names})
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
        found = (await daemon.check(config.load(path))).findings
        text = findings.as_lines(found)
        for name, here in sorted(self.names.items(), key=lambda item: -len(item[1])):
            text = text.replace(here, f"{{{name}}}")
        return re.sub(r"open for \d+ s", "open for {n} s", text), findings.exit_code(found)


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


@pytest.fixture(scope="module")
def topic(cluster: KafkaCluster) -> str:
    name = f"orders-{uuid4().hex[:12]}"
    asyncio.run(cluster.create(name, 3, {"min.insync.replicas": "2"}))
    cluster.allow("relay", name, AclOperation.WRITE, AclOperation.DESCRIBE_CONFIGS)
    return name


@pytest.fixture
async def stage(
    postgres_server: PostgresServer, cluster: KafkaCluster, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stage]:
    suffix = uuid4().hex[:12]
    url = await asyncio.to_thread(postgres_server.create_database, f"orders_{suffix}")
    owner = await asyncpg.connect(url)
    role = f"relay_{suffix}"
    await schema.apply(owner)
    await owner.execute(roles_sql(suffix))
    await owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}' IN ROLE outbox_relay_{suffix}")
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    async with contextlib.AsyncExitStack() as stack:
        stage = Stage(
            postgres_server,
            cluster,
            url,
            owner,
            suffix,
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
            names={"suffix": suffix, "topic": topic, "role": role},
        )
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
async def database_silent(stage: Stage) -> None:
    proxy = await stage.stack.enter_async_context(TcpProxy("127.0.0.1", stage.server.port))
    proxy.stand_still()
    stage.config["database"] |= {"url": stage.url(proxy.own_port), "connect_timeout_seconds": 0.5}


@case
async def database_password_wrong(stage: Stage) -> None:
    rules = stage.server.directory / "data" / "pg_hba.conf"
    usual = rules.read_text()

    async def set_rules(text: str) -> None:
        rules.write_text(text)
        await stage.owner.execute("SELECT pg_reload_conf()")

    stage.stack.push_async_callback(set_rules, usual)
    await set_rules(f"host all {stage.role} 127.0.0.1/32 scram-sha-256\n{usual}")
    wrong = stage.directory / "wrong"
    wrong.write_text(WRONG_PASSWORD)
    stage.config["database"]["password"] = {"file": str(wrong)}

    async def asked() -> bool:
        try:
            (await asyncpg.connect(stage.url(), password=WRONG_PASSWORD)).terminate()
        except asyncpg.InvalidPasswordError:
            return True
        return False

    await eventually(asked, "the server asks for a password")


@case
async def database_without_tls(stage: Stage) -> None:
    stage.config["database"]["tls"] = "verify-full"
    stage.names["server"] = f"127.0.0.1:{stage.server.port}"


@case
async def database_not_believed(stage: Stage) -> None:
    await old_server(stage)
    trustme.CA().cert_pem.write_to_path(stage.directory / "another-ca.pem")
    stage.config["database"] |= {"tls": "verify-full", "tls_ca_file": str(stage.directory / "another-ca.pem")}


@case
async def old_postgresql(stage: Stage) -> None:
    await old_server(stage)
    stage.config["database"] |= {"tls": "verify-full", "tls_ca_file": str(stage.directory / "ca.pem")}


async def old_server(stage: Stage) -> None:
    """PostgreSQL 13, with TLS and nothing in it."""
    stage.monkeypatch.setitem(versions.POSTGRES, "13", "13.22.0")
    server = await asyncio.to_thread(PostgresServer.start, version="13")
    stage.stack.callback(server.close)
    ca = trustme.CA()
    ca.cert_pem.write_to_path(stage.directory / "ca.pem")
    certificate = server.directory / "data" / "server.pem"
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    owner = (server.directory / "data").stat()
    os.chown(certificate, owner.st_uid, owner.st_gid)
    certificate.chmod(0o600)
    connection = await asyncpg.connect(server.url())
    for name, value in (("ssl_cert_file", "server.pem"), ("ssl_key_file", "server.pem"), ("ssl", "on")):
        await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
    await connection.execute("SELECT pg_reload_conf()")
    await eventually(lambda: connection.fetchval("SELECT current_setting('ssl') = 'on'"), "TLS is on")
    await connection.close()
    stage.config["database"]["url"] = server.url()


@case
async def table_locked(stage: Stage) -> None:
    connection = await asyncpg.connect(stage.owner_url)
    stage.stack.callback(connection.terminate)
    await connection.execute("BEGIN; LOCK TABLE outbox")


@case
async def catalog_closed(stage: Stage) -> None:
    await stage.execute("REVOKE EXECUTE ON FUNCTION pg_catalog.row_security_active(oid) FROM PUBLIC")


@case
async def pooler_in_session_mode(stage: Stage) -> None:
    pooled(stage, "session")


@case
async def pooler_in_transaction_mode(stage: Stage) -> None:
    pooled(stage, "transaction")


@case
async def pooler_in_statement_mode(stage: Stage) -> None:
    pooled(stage, "statement")


def pooled(stage: Stage, mode: str) -> None:
    port = stage.stack.enter_context(pgbouncer(mode, stage.server.port, stage.role))
    stage.config["database"]["url"] = stage.url(port)


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
async def short_transaction_timeout(stage: Stage) -> None:
    if await stage.owner.fetchval("SELECT current_setting('server_version_num')::integer") < 170_000:
        pytest.skip("PostgreSQL has it since 17")
    await stage.execute("ALTER ROLE {role} SET transaction_timeout = '25s'")


@case
async def long_transaction(stage: Stage) -> None:
    await stage.execute("GRANT pg_read_all_stats TO {role}")
    stage.monkeypatch.setattr(server, "LONG_TRANSACTION_SECONDS", 0)
    connection = await asyncpg.connect(stage.owner_url)
    stage.stack.callback(connection.terminate)
    await connection.execute("BEGIN; SELECT pg_current_xact_id()")
    stage.names["pid"] = str(connection.get_server_pid())


# -- the tables


@case
async def no_schema(stage: Stage) -> None:
    await stage.execute("DROP TABLE outbox, outbox_layout")


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
    other = await asyncpg.connect(stage.owner_url)
    stage.stack.callback(other.terminate)
    await stage.execute("DROP INDEX outbox_unsent")
    await other.execute("BEGIN; INSERT INTO outbox (topic, key) VALUES ('t', 'k')")
    await stage.owner.execute("SET statement_timeout = '200ms'")
    index = "CREATE INDEX CONCURRENTLY outbox_unsent ON outbox (bucket, id) WHERE sent_at IS NULL AND parked_at IS NULL"
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
        f"REVOKE UPDATE (parked_at) ON outbox FROM {group}",
        f"REVOKE DELETE ON outbox_relay FROM {group}",
        f"REVOKE UPDATE (epoch) ON outbox_slot FROM {group}",
        "GRANT SELECT (id, event_id, topic, key, type, headers, created_at, sent_at, parked_at, bucket)"
        f" ON outbox TO {group}",
    )


@case
async def too_many_privileges(stage: Stage) -> None:
    await stage.execute(
        "GRANT INSERT, DELETE, UPDATE (payload, topic) ON outbox TO {role}", "GRANT ALL ON outbox_layout TO {role}"
    )


@case
async def too_few_privileges_to_delete(stage: Stage) -> None:
    stage.config["relay"] = {"retention_hours": 24}


@case
async def too_few_privileges_to_delete_at_once(stage: Stage) -> None:
    """Then nothing is published: more than old rows that stay."""
    stage.config["relay"] = {"retention_hours": 24, "after_publish": "delete"}


@case
async def deleting_at_once(stage: Stage) -> None:
    stage.config["relay"] = {"after_publish": "delete"}
    await stage.execute(f"GRANT outbox_pruner_{stage.suffix} TO {{role}}")


@case
async def deleting_what_was_sent(stage: Stage) -> None:
    """Allowed, for a relay that has relay.retention_hours, and all that it needs for that."""
    stage.config["relay"] = {"retention_hours": 24}
    await stage.execute(f"GRANT outbox_pruner_{stage.suffix} TO {{role}}")


@case
async def too_few_privileges_to_copy(stage: Stage) -> None:
    stage.config["relay"] = {"dead_letter_topic": "{topic}.dead"}


@case
async def copying_what_is_dead(stage: Stage) -> None:
    """Allowed, for a relay that has relay.dead_letter_topic."""
    stage.config["relay"] = {"dead_letter_topic": "{topic}.dead"}
    await stage.execute(f"GRANT outbox_writer_{stage.suffix} TO {{role}}")


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
    (stage.directory / "password").write_text(WRONG_PASSWORD)
    stage.names["broker"] = stage.kafka.sasl[0]


@case
async def kafka_silent(stage: Stage) -> None:
    proxy = await proxied(stage)
    proxy.stand_still()
    stage.config["kafka"]["connect_timeout_seconds"] = 0.5
    stage.names["proxy"] = proxy.address


@case
async def kafka_that_does_not_answer(stage: Stage) -> None:
    proxy = await proxied(stage)
    proxy.swallowed = {INIT_PRODUCER_ID}
    stage.config["kafka"]["request_timeout_seconds"] = 2.0


@case
async def old_kafka(stage: Stage) -> None:
    """As brokers before 2.3 say of themselves."""

    def older(_: int, body: bytes) -> bytes:
        size = struct.calcsize(">hhh")
        apis = [struct.unpack(">hhh", body[at : at + size]) for at in range(6, len(body) - size + 1, size)]
        return body[:6] + b"".join(
            struct.pack(">hhh", key, lowest, min(highest, 7) if key == METADATA else highest)
            for key, lowest, highest in apis
        )

    proxy = await proxied(stage)
    proxy.lies[API_VERSIONS] = older
    stage.names["proxy"] = proxy.address


@case
async def broker_advertised_wrongly(stage: Stage) -> None:
    proxy = await proxied(stage)
    here = b"127.0.0.1" + struct.pack(">i", int(proxy.address.rpartition(":")[2]))
    proxy.lies[METADATA] = lambda _, body: body.replace(here, b"127.0.0.1" + struct.pack(">i", 1))


async def proxied(stage: Stage) -> KafkaProxy:
    proxy = await stage.stack.enter_async_context(KafkaProxy(stage.kafka.sasl[0]))
    stage.config["kafka"]["bootstrap_servers"] = [proxy.address]
    return proxy


@case
async def everything_down(stage: Stage) -> None:
    await database_down(stage)
    await kafka_down(stage)


@case
async def topic_that_is_missing(stage: Stage) -> None:
    await stage.grant(f"{stage.suffix}-none")
    await stage.insert(f"{stage.suffix}-none")


@case
async def topic_that_is_not_allowed(stage: Stage) -> None:
    stage.config["kafka"]["allowed_topics"] = [stage.topic, f"{stage.suffix}-other*"]
    await stage.insert(f"{stage.suffix}-secret")


@case
async def topic_that_is_allowed_and_missing(stage: Stage) -> None:
    await stage.grant(f"{stage.suffix}-later")
    stage.config["kafka"]["allowed_topics"] = [f"{stage.suffix}-later", stage.topic]


@case
async def topic_that_is_illegal(stage: Stage) -> None:
    await stage.execute("ALTER TABLE outbox DROP CONSTRAINT outbox_topic_is_legal")
    await stage.insert("orders of today")


@case
async def topics_that_are_forbidden(stage: Stage) -> None:
    seen, unseen = f"{stage.suffix}-seen", f"{stage.suffix}-unseen"
    for topic in (seen, unseen):
        await stage.kafka.create(topic, 3, {"min.insync.replicas": "2"})
        await stage.insert(topic)
    await stage.grant(seen, AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS)


@case
async def nothing_may_be_written(stage: Stage) -> None:
    password = stage.directory / "password"
    await asyncio.to_thread(stage.kafka.add_user, "reader", PASSWORD)
    stage.config["kafka"] |= {"sasl_username": "reader", "sasl_password": {"file": str(password)}}


@case
async def topic_that_can_not_be_described(stage: Stage) -> None:
    topic = f"{stage.suffix}-dim"
    await stage.kafka.create(topic)
    await stage.grant(topic, AclOperation.WRITE)
    await stage.insert(topic)


@case
async def large_message(stage: Stage) -> None:
    topic = await stage.add_topic(max_message_bytes="600000")
    await stage.insert(topic, payload=PAYLOAD * 50_000)


@case
async def large_message_that_is_parked(stage: Stage) -> None:
    topic = await stage.add_topic(max_message_bytes="600000")
    await stage.insert(topic, payload=PAYLOAD * 50_000)
    await stage.execute(
        "UPDATE outbox SET parked_at = now() WHERE octet_length(payload) = 600000",
        "INSERT INTO outbox_parked (id, bucket, topic, key, state)"
        " SELECT id, bucket, topic, key, 'dead' FROM outbox WHERE parked_at IS NOT NULL",
    )


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
    assert not any(secret in said for secret in (PASSWORD, WRONG_PASSWORD, KEY, PAYLOAD.decode()))


def test_every_finding_has_a_case_and_is_documented() -> None:
    codes = {(kind.level.value, kind.code) for kind in Kind}
    lines = "\n".join(golden(name) for name in CASES)
    assert set(re.findall(r"^(error|warning) ([a-z-]+): ", lines, re.MULTILINE)) == codes
    table = re.findall(r"^\| `([a-z-]+)` \| (error|warning) \|", COMMANDS.read_text(), re.MULTILINE)
    assert {(level, code) for code, level in table} == codes


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


# -- the command itself


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "outbox_relay", "check", "--config", str(path), *arguments]


@pytest.fixture
def unreachable(tmp_path: Path) -> Path:
    """A configuration in which both servers are down."""
    path = tmp_path / "config.toml"
    path.write_text(
        '[database]\nurl = "postgresql://relay@127.0.0.1:1/orders"\n[kafka]\nbootstrap_servers = ["127.0.0.1:1"]\n'
    )
    return path


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


async def test_a_sound_set_up_exits_0_and_one_with_an_error_1(stage: Stage) -> None:
    path = stage.directory / "config.toml"
    path.write_text(toml(stage.config))
    done = await asyncio.to_thread(run, *command(path))
    looked_at = f"topics looked at: {stage.topic}"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{looked_at}\n0 errors, 0 warnings\n", "")
    await stage.insert("another")
    done = await asyncio.to_thread(run, *command(path, "--json"))
    assert json.loads(done.stdout)["topics"] == sorted(["another", stage.topic])
    done = await asyncio.to_thread(run, *command(path))
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[1].startswith("error topic-forbidden: ")


async def test_that_no_topic_was_looked_at_is_said(stage: Stage) -> None:
    path = stage.directory / "config.toml"
    path.write_text(toml(stage.config))
    await stage.execute("DELETE FROM outbox")
    done = await asyncio.to_thread(run, *command(path))
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        ["topics looked at: none; name them in kafka.allowed_topics", "0 errors, 0 warnings"],
    )


def test_servers_that_are_down_are_findings_on_stdout(unreachable: Path) -> None:
    done = run(*command(unreachable))
    assert (done.returncode, done.stderr) == (EXIT_UNAVAILABLE, "")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "error database-unreachable",
        "error kafka-unreachable",
        "2 errors, 0 warnings",
    ]


def test_json(unreachable: Path) -> None:
    done = run(*command(unreachable, "--json"))
    assert (done.returncode, done.stderr) == (EXIT_UNAVAILABLE, "")
    assert json.loads(done.stdout)["topics"] is None
    found = json.loads(done.stdout)["findings"]
    assert [(one["level"], one["code"]) for one in found] == [
        ("error", "database-unreachable"),
        ("error", "kafka-unreachable"),
    ]
    assert found[1]["found"] == "no broker answers at 127.0.0.1:1"
    assert found[1]["what_to_do"].startswith("start Kafka if it is down")


def test_a_table_on_a_terminal(unreachable: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100"}
    process = subprocess.Popen(command(unreachable), stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # so Linux says that the other end is closed
        while piece := os.read(ours, 65_536):
            said += piece
    os.close(ours)
    assert process.wait(60) == EXIT_UNAVAILABLE
    assert said.decode().replace("\r\n", "\n") == TABLE


TABLE = """\
error    database-unreachable  [Errno 111] Connect call failed ('127.0.0.1', 1).
                               → start PostgreSQL if it is down, and compare the url, the password
                               and the tls keys in [database] with it.
error    kafka-unreachable     no broker answers at 127.0.0.1:1.
                               → start Kafka if it is down, and compare the addresses and the
                               security settings in [kafka] with it.
2 errors, 0 warnings
"""


def test_a_mistake_in_the_configuration_exits_78(unreachable: Path) -> None:
    unreachable.write_text(unreachable.read_text() + "nonsense = 1\n")
    done = run(*command(unreachable))
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, "")
    assert done.stderr.startswith(f"{unreachable}:5: kafka.nonsense")
