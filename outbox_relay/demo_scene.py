"""What there is to play with in the demo: servers, a database and a topic of its own, and the processes under guard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from uuid import uuid4

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from sqlalchemy import make_url

from outbox_relay import demo_payments, schema
from outbox_relay.demo_orders import OrderService
from outbox_relay.demo_screen import Screen
from outbox_relay.demo_waiting import in_thread, together
from outbox_relay.errors import DemoError
from outbox_relay.inbox import schema as inbox_schema
from outbox_relay.servers import Kafka, Postgres, open_kafka, open_postgres
from outbox_relay.servers.guarded import Guarded

WRITERS = 16
_PARTITIONS = 4
_CONNECT_SECONDS = 10.0
_STATEMENT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What there is to play with; the processes are still to be started."""

    screen: Screen
    kafka: Kafka
    topic: str  #: and the payment service's group
    service: OrderService
    relay: Process
    payments: Process
    connection: asyncpg.Connection


@contextlib.asynccontextmanager
async def open_scene(screen: Screen) -> AsyncIterator[Scene]:
    """All of it, until the end of the block. Raises DemoError and ServerError."""
    loop = asyncio.get_running_loop()

    def progress(text: str) -> None:
        """Said by a thread, shown by this one."""
        loop.call_soon_threadsafe(screen.say, text)

    async def database() -> str:
        postgres = await in_thread(lambda: open_postgres(progress))
        stack.callback(postgres.close)
        url = await stack.enter_async_context(_own_database(postgres))
        async with _connection(url) as connection:
            await schema.apply(connection)
            await inbox_schema.apply(connection)
            await connection.execute(demo_payments.TABLE)
        screen.say("PostgreSQL is ready, with outbox and inbox in a database of its own")
        return url

    async def topic() -> tuple[Kafka, str]:
        kafka = await in_thread(lambda: open_kafka(progress, allow_mock=True))
        stack.callback(kafka.close)
        name = await stack.enter_async_context(_own_topic(kafka))
        screen.say(f"Kafka is ready, with the topic {name}")
        return kafka, name

    async with AsyncExitStack() as stack:
        with screen.waiting("starting PostgreSQL and Kafka"):
            url, (kafka, topic_name) = await together(database(), topic())
        service = OrderService(
            url, topic_name, connections=WRITERS, timeout=_CONNECT_SECONDS, command_timeout=_STATEMENT_SECONDS
        )
        stack.push_async_callback(service.close)
        await service.prepare()
        relay = await in_thread(lambda: _relay(url, kafka.bootstrap_servers))
        stack.callback(relay.close)
        payments = await in_thread(lambda: _payments(url, kafka, topic_name))
        stack.callback(payments.close)
        connection = await stack.enter_async_context(_connection(url))
        yield Scene(screen, kafka, topic_name, service, relay, payments, connection)


class Process:
    """A process under guard, that can be started again. Every method blocks."""

    def __init__(self, name: str) -> None:
        self._name = f"the {name}"
        self.guarded = Guarded(f"demo-{name.replace(' ', '-')}")
        self.command: Sequence[str] = ()  #: arguments of Python
        self.environment: Mapping[str, str] = {}  #: besides this process's

    def start(self) -> None:
        # The new process is to find the same modules.
        path = os.pathsep.join(path for path in sys.path if path)
        self.guarded.start([sys.executable, *self.command], {**os.environ, "PYTHONPATH": path, **self.environment})

    @property
    def pid(self) -> int:
        return self.guarded.pid

    def check_alive(self) -> None:
        """Raises DemoError when it has ended."""
        code = self.guarded.wait(0)
        if code is not None:
            raise self.error(f"{self._name} ended by itself, with exit code {code}")

    def kill(self) -> None:
        """``kill -9``. Raises DemoError when it was dead already."""
        code = self.guarded.stop(signal.SIGKILL)
        if code != -signal.SIGKILL:
            raise self.error(f"{self._name} ended by itself, with exit code {code}, before it was killed")

    def stop(self) -> None:
        """SIGTERM. Raises DemoError when it doesn't end in good order."""
        code = self.guarded.stop(signal.SIGTERM)
        if code:
            raise self.error(f"{self._name} was asked to end, and did with exit code {code}")

    def error(self, problem: str) -> DemoError:
        return DemoError(f"{problem}; its last lines:\n{self.guarded.tail() or '(none)'}")

    def close(self) -> None:
        self.guarded.close()


def _relay(database_url: str, bootstrap_servers: str) -> Process:
    """With the settings that a relay has by itself."""
    relay = Process("relay")
    config = relay.guarded.directory / "config.toml"
    # Text and lists of it look the same in TOML as in JSON.
    config.write_text(
        f"[database]\nurl = {json.dumps(database_url)}\n"
        f"[kafka]\nbootstrap_servers = {json.dumps(bootstrap_servers.split(','))}\n"
        f'[log]\nformat = "console"\n'
    )
    relay.command = ["-m", "outbox_relay", "run", "--config", str(config)]
    return relay


def _payments(database_url: str, kafka: Kafka, topic: str) -> Process:
    payments = Process("payment service")
    payments.command = ["-m", "outbox_relay.demo_payments", topic, *(["--mock"] if kafka.is_mock else [])]
    # Not among the arguments, which everybody on the machine can read: the url may have a password.
    payments.environment = {"DATABASE_URL": database_url, "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers}
    return payments


@contextlib.asynccontextmanager
async def _own_database(postgres: Postgres) -> AsyncIterator[str]:
    """The url of a new database, which is dropped where its server stays."""
    name = f"outbox_demo_{uuid4().hex[:12]}"
    try:
        async with _connection(postgres.url) as connection:
            try:
                await connection.execute(f"CREATE DATABASE {name}")
            except asyncpg.InsufficientPrivilegeError as error:
                raise DemoError(f"give DATABASE_URL a role that may create a database for the demo: {error}") from error
        yield make_url(postgres.url).set(database=name).render_as_string(hide_password=False)
    finally:
        if postgres.server is None:
            async with _connection(postgres.url) as connection:
                await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextlib.asynccontextmanager
async def _connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    try:
        connection = await asyncpg.connect(url, timeout=_CONNECT_SECONDS, command_timeout=_STATEMENT_SECONDS)
    except (asyncpg.PostgresError, OSError) as error:
        raise DemoError(f"PostgreSQL can't be reached: {error or type(error).__name__}") from error
    try:
        yield connection
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)


@contextlib.asynccontextmanager
async def _own_topic(kafka: Kafka) -> AsyncIterator[str]:
    """The name of a new topic, which is deleted where its server stays."""
    name = f"demo-orders-{uuid4().hex[:12]}"
    try:
        await kafka.create_topic(name, _PARTITIONS)
        yield name
    finally:
        if kafka.server is None:
            await _delete_topic(kafka.bootstrap_servers, name)


async def _delete_topic(bootstrap_servers: str, name: str) -> None:
    """Best effort: a broker may forbid it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    try:
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(_CONNECT_SECONDS):
                await admin.start()
                await admin.delete_topics([name])
    finally:
        await admin.close()
