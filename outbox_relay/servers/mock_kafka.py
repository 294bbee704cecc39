"""librdkafka's mock cluster: a broker for the demo where Apache Kafka can't be had. It proves nothing about Kafka.

Its records' checksums are wrong (consume with ``check_crcs=False``), it makes every topic that it is asked about,
with four partitions, and it checks neither sequence numbers nor topic names.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from importlib import util
from pathlib import Path

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from outbox_relay.errors import ServerError
from outbox_relay.servers.guarded import Guarded

_READY_SECONDS = 30.0
_PROGRAM = "import sys; from outbox_relay.servers.mock_kafka import serve; serve(sys.argv[1])"


class MockKafka:
    """The mock cluster in a process of its own. Every method blocks."""

    def __init__(self, guarded: Guarded, bootstrap_servers: str) -> None:
        self._guarded = guarded
        self.bootstrap_servers = bootstrap_servers

    @classmethod
    def start(cls) -> MockKafka:
        """Raises :class:`ServerError`."""
        if util.find_spec("confluent_kafka") is None:
            raise ServerError("the mock of Kafka is not here: pip install 'outbox-relay[demo]'")
        guarded = Guarded("mock-kafka")
        try:
            address = guarded.directory / "address"
            # The new process is to find the same modules.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            guarded.start([sys.executable, "-c", _PROGRAM, address], environment)
            deadline = time.monotonic() + _READY_SECONDS
            while not address.exists():
                if guarded.wait(0.02) is not None or time.monotonic() > deadline:
                    raise ServerError(f"the mock of Kafka did not start:\n{guarded.tail()}")
            return cls(guarded, address.read_text())
        except BaseException:
            guarded.close()
            raise

    async def create_topic(self, name: str) -> None:
        """Make a topic of four partitions, by asking about it. Raises :class:`ServerError`."""
        client = AIOKafkaClient(bootstrap_servers=self.bootstrap_servers)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await client.bootstrap()
                while not client.cluster.partitions_for_topic(name):
                    await client.set_topics([name])
        except (KafkaError, TimeoutError) as error:
            raise ServerError(f"topic {name!r} could not be made: {error or 'no answer in time'}") from error
        finally:
            await client.close()

    @property
    def pid(self) -> int:
        return self._guarded.pid

    @property
    def directory(self) -> Path:
        """Where what it says is written; it is gone after :meth:`close`."""
        return self._guarded.directory

    def close(self) -> None:
        """End the process. Idempotent."""
        self._guarded.close()

    def __enter__(self) -> MockKafka:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(address: str) -> None:
    """Run the mock cluster in this process for ever, its address written to a file of that name."""
    from confluent_kafka import Producer

    owner = Producer({"bootstrap.servers": "the mock's", "test.mock.num.brokers": 1, "log_level": 0})
    brokers = owner.list_topics(timeout=_READY_SECONDS).brokers.values()
    written = Path(f"{address}.new")
    written.write_text(",".join(f"{broker.host}:{broker.port}" for broker in brokers))
    written.rename(address)
    while True:
        owner.poll(3600)
