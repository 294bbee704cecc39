"""Real servers, shared by the whole run; each test has a database of its own, and topics that it names itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import asyncpg
import hypothesis
import pytest
from sqlalchemy import make_url

from outbox_relay import schema
from outbox_relay.servers import Kafka, MavenUnreachableError, Postgres, PostgresServer, open_kafka, open_postgres

# pytest-asyncio remembers "the loop of before" and thereby makes one that nobody closes, unless there is surely none.
asyncio.set_event_loop(None)

# No test fails because the machine was busy.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("untimed")

#: A crash of PostgreSQL, which the tests provoke, loses nothing without fsync; only a crash of the machine would.
POSTGRES_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "300"}


@dataclass
class Database:
    """An empty database, or one with the outbox schema, that is dropped after the test with all its connections."""

    url: str
    _opened: list[asyncpg.Connection] = field(default_factory=list)

    async def connect(self) -> asyncpg.Connection:
        self._opened.append(await asyncpg.connect(self.url))
        return self._opened[-1]

    async def close(self) -> None:
        for connection in self._opened:
            with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError):
                await connection.close(timeout=10)


@contextlib.contextmanager
def skipped_without_server() -> Iterator[None]:
    """Where a server can't be downloaded its tests are skipped; with REQUIRE_SERVERS=1 they fail."""
    try:
        yield
    except MavenUnreachableError as error:
        if os.environ.get("REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if os.environ.get("DATABASE_URL"):
        yield open_postgres()
        return
    with skipped_without_server():
        server = PostgresServer.start(POSTGRES_SETTINGS)
    with server:
        yield Postgres(server.url(), server)


@pytest.fixture
async def database(postgres: Postgres) -> AsyncIterator[Database]:
    name = f"test_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.url)
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        database = Database(make_url(postgres.url).set(database=name).render_as_string(hide_password=False))
        try:
            yield database
        finally:
            await database.close()
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@pytest.fixture
async def outbox_database(database: Database) -> Database:
    await schema.apply(await database.connect())
    return database


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    with skipped_without_server():
        kafka = open_kafka()
    try:
        yield kafka
    finally:
        kafka.close()


@pytest.fixture
def fake_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As where Maven can't be reached: an empty cache, and ``mvn`` and ``jgo`` in this directory only fail."""
    monkeypatch.setenv("OUTBOX_RELAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    monkeypatch.delenv("KAFKA_VERSION", raising=False)
    tools = tmp_path / "tools"
    (tools / "jgo").mkdir(parents=True)
    (tools / "jgo" / "__init__.py").touch()
    (tools / "jgo" / "__main__.py").write_text("raise SystemExit('nor by jgo')")
    monkeypatch.setenv("PYTHONPATH", str(tools))
    monkeypatch.syspath_prepend(tools)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    write_mvn(tools, "echo [INFO] trying; echo '[ERROR] no way by mvn'; echo '[ERROR] a help page'; exit 1")
    return tools


def write_mvn(tools: Path, script: str) -> None:
    (tools / "mvn").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "mvn").chmod(0o755)
