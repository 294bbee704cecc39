"""Where all arms run: one PostgreSQL and one Kafka, both on this machine, and a new database and topic for each run."""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient

from bench.arms import Run
from bench.cpu import Cpu, cpu_seconds
from bench.rows import Rows
from outbox_relay.servers import KafkaServer, PostgresServer
from outbox_relay.servers.versions import KAFKA, USUAL_KAFKA, chosen

PARTITIONS = 12

#: What differs from what PostgreSQL ships with, for all arms alike; so fsync and synchronous_commit are on.
POSTGRES_SETTINGS = {
    "wal_level": "logical",  # Debezium reads the log; it adds little for the others
    "shared_buffers": "512MB",  # else a backlog of 500,000 rows doesn't fit, and the disk is measured
    "max_wal_size": "8GB",  # else each run meets another number of checkpoints
    "max_connections": "200",
}
KAFKA_SETTINGS = {"num.partitions": str(PARTITIONS)}
#: Kafka stamps each record when it is written, so that rates come from one clock, in the broker.
TOPIC_SETTINGS = {"message.timestamp.type": "LogAppendTime"}

_SECONDS = 300.0


class Stage:
    """Both servers; see :func:`opened`."""

    def __init__(self, postgres: PostgresServer, kafka: KafkaServer) -> None:
        self.postgres = postgres
        self.kafka = kafka
        self._templates: dict[Rows, str] = {}
        self._making = asyncio.Lock()

    def cpu(self, relay: Sequence[int]) -> Cpu:
        """What has been used until now, by the relay's processes and by the servers, their children included."""
        return Cpu(cpu_seconds(*relay), cpu_seconds(self.postgres.pid), cpu_seconds(self.kafka.pid))

    @property
    def postgres_log(self) -> Path:
        """What the server writes."""
        return self.postgres.directory / "server.log"

    @asynccontextmanager
    async def run(self, rows: Rows) -> AsyncIterator[Run]:
        """A place for one run, with ``bench_rows`` in its database."""
        name = f"run_{uuid4().hex[:12]}"
        async with self._making, connected(self.postgres.url()) as admin:
            template = await self._template(rows)
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy", timeout=_SECONDS)
        try:
            await self.kafka.create_topic(name, PARTITIONS, TOPIC_SETTINGS)
            with tempfile.TemporaryDirectory(prefix="outbox-relay-bench-") as directory:
                yield Run(self.postgres.url(name), self.kafka.bootstrap_servers, name, PARTITIONS, Path(directory))
        finally:
            async with connected(self.postgres.url()) as admin:
                await _drop_slots(admin, name)
                await admin.execute(f"DROP DATABASE {name} WITH (FORCE)", timeout=_SECONDS)
            await _delete_topics(self.kafka.bootstrap_servers, name)

    async def _template(self, rows: Rows) -> str:
        if rows not in self._templates:
            name = f"rows_{uuid4().hex[:12]}"
            url = await asyncio.to_thread(self.postgres.create_database, name)
            async with connected(url) as connection:
                await connection.execute(rows.fill(), timeout=_SECONDS)
                await connection.execute("VACUUM (ANALYZE)", timeout=_SECONDS)  # bench_rows may be a view
            self._templates[rows] = name
        return self._templates[rows]


@asynccontextmanager
async def opened(progress: Callable[[str], None] = lambda _: None) -> AsyncIterator[Stage]:
    """Start both servers; they end with the block, or with this process, and leave nothing behind."""
    progress("starting PostgreSQL")
    postgres = await asyncio.to_thread(PostgresServer.start, POSTGRES_SETTINGS, progress)
    with postgres:
        progress("starting Apache Kafka")
        kafka = await asyncio.to_thread(KafkaServer.start, KAFKA_SETTINGS, progress)
        with kafka:
            yield Stage(postgres, kafka)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the bench's own."""
    connection = await asyncpg.connect(url, timeout=10, server_settings={"application_name": "bench"})
    try:
        yield connection
    finally:
        await connection.close(timeout=10)


async def machine(stage: Stage) -> dict[str, Any]:
    """What figures depend on: the machine, and the versions of what was measured."""
    async with connected(stage.postgres.url()) as connection:
        postgresql = await connection.fetchval("SHOW server_version")
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "postgresql": postgresql,
        "kafka": KAFKA[chosen("KAFKA_VERSION", KAFKA) or USUAL_KAFKA],
        "postgresql_settings": POSTGRES_SETTINGS,
        "load_before": os.getloadavg()[0],
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


async def _drop_slots(admin: asyncpg.Connection, database: str) -> None:
    """Replication slots that an arm has left would keep their database."""
    async with asyncio.timeout(_SECONDS):
        slots = await admin.fetch(
            "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = $1", database
        )
        for slot in slots:
            if slot["active_pid"] is not None:
                await admin.fetchval("SELECT pg_terminate_backend($1, 10000)", slot["active_pid"])
            await admin.execute("SELECT pg_drop_replication_slot($1)", slot["slot_name"])


async def _delete_topics(bootstrap_servers: str, prefix: str) -> None:
    """Those of a run: an arm may have made more, with the run's name in front."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    try:
        await admin.start()
        names = await admin.list_topics()
        await admin.delete_topics([name for name in names if name == prefix or name.startswith(f"{prefix}-")])
    finally:
        await admin.close()
