"""A password, a message's key and its payload are shown nowhere: in no log at any level, no error, no traceback and no
answer of a command, however the relay fails.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url

from outbox_relay import cli
from outbox_relay.servers import Kafka, Postgres
from tests.acceptance.relays import new_topic, relay_process
from tests.acceptance.test_kafka_security import Secured, secured
from tests.conftest import Database

__all__ = ["secured"]  # a fixture

KEY, PAYLOAD = "canary-key-8f3a", "canary-payload-5d21"
DATABASE_PASSWORD, KAFKA_PASSWORD = "canary-database-77b0", "canary-kafka-e4c9"
CANARIES = (KEY, PAYLOAD, DATABASE_PASSWORD, KAFKA_PASSWORD)

NOWHERE = "127.0.0.1:1"


def assert_silent(said: str) -> None:
    """None of them is in there, in no spelling that PostgreSQL, Python or Kafka has for it."""
    assert said, "nothing was said at all"
    for canary in CANARIES:
        for spelling in (canary, canary.encode().hex(), base64.b64encode(canary.encode()).decode()[:-4]):
            place = said.find(spelling)
            assert place < 0, f"{canary} is in: …{said[max(0, place - 300) : place + 100]}…"


async def insert(connection: asyncpg.Connection, topic: str, payload: bytes = PAYLOAD.encode()) -> None:
    await connection.execute("INSERT INTO outbox (topic, key, payload) VALUES ($1, $2, $3)", topic, KEY, payload)


@pytest.fixture(autouse=True)
def _passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD_OF_THE_TEST", DATABASE_PASSWORD)
    monkeypatch.setenv("KAFKA_PASSWORD_OF_THE_TEST", KAFKA_PASSWORD)


WITH_PASSWORD = {"password": {"env": "DATABASE_PASSWORD_OF_THE_TEST"}}


@pytest.fixture
async def guarded(postgres: Postgres, outbox_database: Database) -> AsyncIterator[str]:
    """The url of a user whom PostgreSQL asks for a password, which is another than the relay's."""
    if postgres.server is None:
        pytest.skip("the server's pg_hba.conf is out of reach")
    rules, user = postgres.server.directory / "data" / "pg_hba.conf", f"canary_{uuid4().hex[:12]}"
    connection = await outbox_database.connect()
    usual = rules.read_text()
    await connection.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'another'")
    rules.write_text(f"host all {user} 127.0.0.1/32 scram-sha-256\n{usual}")
    await connection.execute("SELECT pg_reload_conf()")
    yield make_url(outbox_database.url).set(username=user).render_as_string()
    rules.write_text(usual)
    await connection.execute("SELECT pg_reload_conf()")
    await connection.execute(f"DROP ROLE {user}")


# -- a relay that works, and one that can't


@pytest.mark.parametrize("format_", ["json", "console"])
async def test_rows_that_are_sent_and_rows_that_are_refused(
    format_: str, outbox_database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka, 1, {"max.message.bytes": "2000"})
    connection = await outbox_database.connect()
    await insert(connection, topic)
    await insert(connection, topic, PAYLOAD.encode() * 300)
    await insert(connection, f"{topic}-missing")
    with relay_process(
        outbox_database.url,
        kafka.bootstrap_servers,
        "--once",
        database=WITH_PASSWORD,
        log={"format": format_},
    ) as relay:
        assert await relay.exit_code() == 0
        for event in ("claim.settled", "row.refused", "topic.refused"):
            assert event in relay.output()
        assert_silent(relay.output())


async def test_a_row_that_can_not_be_marked(outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka, 1)
    connection = await outbox_database.connect()
    await insert(connection, topic)
    await connection.execute(
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'not this one'
                USING DETAIL = row_to_json(NEW), HINT = NEW.key, ERRCODE = 'integrity_constraint_violation';
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION refuse()"""
    )
    with relay_process(outbox_database.url, kafka.bootstrap_servers, shutdown_grace_seconds=1.0) as relay:
        await relay.event("row.unmarkable")
        await relay.stop()
        assert_silent(relay.output())


@pytest.mark.parametrize("what", ["database", "kafka"])
async def test_a_server_that_is_down(what: str, outbox_database: Database, kafka: Kafka) -> None:
    await insert(await outbox_database.connect(), "orders")
    url = f"postgresql://relay@{NOWHERE}/d" if what == "database" else outbox_database.url
    servers = NOWHERE if what == "kafka" else kafka.bootstrap_servers
    with relay_process(url, servers, database=WITH_PASSWORD, kafka=sasl("PLAIN") if what == "kafka" else {}) as relay:
        await relay.event(f"{what}.unavailable")
        assert await relay.stop() == 0
        assert_silent(relay.output())


def sasl(mechanism: str, **settings: Any) -> dict[str, Any]:
    return {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": mechanism,
        "sasl_username": "relay",
        "sasl_password": {"env": "KAFKA_PASSWORD_OF_THE_TEST"},
        **settings,
    }


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_a_wrong_password_for_kafka(mechanism: str, outbox_database: Database, secured: Secured) -> None:
    settings = sasl(mechanism, **secured.tls())
    with relay_process(outbox_database.url, secured.sasl_ssl, kafka=settings) as relay:
        unavailable = await relay.event("kafka.unavailable")
        assert "refuses to authenticate" in unavailable["reason"]
        assert await relay.stop() == 0
        assert_silent(relay.output())


async def test_a_wrong_password_for_the_database(guarded: str, kafka: Kafka, tmp_path: Path) -> None:
    with relay_process(guarded, kafka.bootstrap_servers, database=WITH_PASSWORD) as relay:
        unavailable = await relay.event("database.unavailable")
        assert "password authentication failed" in unavailable["reason"]
        assert await relay.stop() == 0
        assert_silent(relay.output())
    path = write(tmp_path, guarded, kafka.bootstrap_servers)
    for command in (["status"], ["check"], ["run", "--dry-run"], ["schema", "apply"]):
        done = await outbox_relay(*command, "--config", str(path))
        assert done.returncode == 69
        assert_silent(done.stdout + done.stderr)


# -- a defect

DEFECT = """
import asyncio, gc, sys
from outbox_relay.source.polling import PollingSource
from outbox_relay.cli import main
settle, claim = PollingSource.settle, PollingSource.claim
def broken(self, outcomes):
    record = outcomes[0].record
    {defect}
PollingSource.settle = broken
main(["run", "--config", sys.argv[1]])
"""

DEFECTS = {
    "lookup": "{}[(record.topic, record.key.decode())]",
    "value": "int(record.value)",
    "codec": r"(record.value + b'\xff').decode()",
    "several": "raise ExceptionGroup(record.key.decode(), [ValueError(record), KeyError(record.key)])",
    "led to another": """
    try:
        raise ValueError(record.key)
    except ValueError as error:
        raise TypeError("what came of it") from error""",
    "in a task that nobody asks": """
    async def fail():
        raise ValueError(record.key, record.value)
    task = asyncio.ensure_future(fail())
    del task
    asyncio.get_running_loop().call_later(0.1, gc.collect)
    asyncio.get_running_loop().call_later(0.2, asyncio.get_running_loop().call_soon, lambda: int(record.value))
    asyncio.get_running_loop().call_later(0.5, lambda: __import__("os").kill(__import__("os").getpid(), 15))""",
}


@pytest.mark.parametrize("defect", DEFECTS)
async def test_a_defect(defect: str, outbox_database: Database, kafka: Kafka, tmp_path: Path) -> None:
    topic = await new_topic(kafka, 1)
    await insert(await outbox_database.connect(), topic)
    path = write(
        tmp_path,
        outbox_database.url,
        kafka.bootstrap_servers,
        '[relay]\nshutdown_grace_seconds = 0.1\n[log]\nlevel = "debug"\nformat = "json"\n',
    )
    program = DEFECT.format(defect=DEFECTS[defect])
    done = await execute("-c", program, str(path))
    assert_silent(done.stdout + done.stderr)
    tracebacks = [event["exception"] for line in done.stdout.splitlines() if "exception" in (event := json.loads(line))]
    assert any("in broken" in said or "in fail" in said for said in tracebacks), done.stdout
    assert (done.returncode == 70) == (defect != "in a task that nobody asks")


# -- commands


def write(directory: Path, url: str, bootstrap_servers: str, more: str = "") -> Path:
    path = directory / "config.toml"
    path.write_text(
        f'[database]\nurl = "{url}"\npassword = {{ env = "DATABASE_PASSWORD_OF_THE_TEST" }}\n'
        f'[kafka]\nbootstrap_servers = ["{bootstrap_servers}"]\n{more}'
    )
    return path


async def execute(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


async def outbox_relay(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await execute("-m", "outbox_relay", *arguments)


async def test_what_commands_say_of_an_outbox(outbox_database: Database, kafka: Kafka, tmp_path: Path) -> None:
    topic = await new_topic(kafka, 1)
    await insert(await outbox_database.connect(), topic)
    path = write(tmp_path, outbox_database.url, kafka.bootstrap_servers)
    for command in (
        ["validate"],
        ["status"],
        ["status", "--json"],
        ["check"],
        ["check", "--json"],
        ["run", "--dry-run"],
        ["schema", "apply"],
        ["schema", "adopt"],
    ):
        done = await outbox_relay(*command, "--config", str(path))
        assert done.returncode in (0, 1), done.stderr
        assert_silent(done.stdout + done.stderr)


BAD_FILES = {
    "in a line that is no TOML": '[database]\npassword = { env = "{0}" \nurl = "postgresql://u:{0}@h/d"\n',
    "in an unfinished text": '[database]\npassword = "{0}\n',
    "as a bare word": "[database]\npassword = {0}\n",
    "in the url": '[database]\nurl = "postgresql://u:{0}@h/d"\n',
    "in a url that is none": '[database]\nurl = "postgresql://u:{0}@h:port/d"\n',
    "in a query": '[database]\nurl = "postgresql://u@h/d?password={0}"\n',
    "instead of its place": '[database]\npassword = "{0}"\n',
    "of the wrong type": '[database]\npassword = ["{0}"]\n[kafka]\nsasl_password = {{ env = 5, word = "{0}" }}\n',
    "twice": '[database]\npassword = "{0}"\npassword = "{0}"\n',
    "instead of a table": 'database = "{0}"\n',
    "instead of a number": '[relay]\nbatch_rows = "{0}"\n',
    "instead of a word": '[log]\nlevel = "{0}"\n',
}


@pytest.mark.parametrize("where", BAD_FILES)
def test_a_password_where_it_does_not_belong(where: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(BAD_FILES[where].replace("{{", "{").replace("}}", "}").replace("{0}", DATABASE_PASSWORD))
    for command in ("validate", "run", "status", "check"):
        result = CliRunner().invoke(cli.main, [command, "--config", str(path)])
        assert result.exit_code == 78
        assert_silent(result.output)
