"""The servers that are to be had here: those which the environment names, else new ones on loopback."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from outbox_relay.servers.kafka import KafkaServer
from outbox_relay.servers.maven import MavenUnreachableError
from outbox_relay.servers.mock_kafka import MockKafka
from outbox_relay.servers.postgres import PostgresServer
from outbox_relay.servers.topics import create_topic


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL to use; ``server`` only where it is one of ours."""

    url: str
    server: PostgresServer | None = None

    def close(self) -> None:
        """End the server if it is ours. Idempotent."""
        if self.server is not None:
            self.server.close()


@dataclass(frozen=True)
class Kafka:
    """A Kafka to use; ``server`` only where it is one of ours."""

    bootstrap_servers: str
    server: KafkaServer | MockKafka | None = None

    @property
    def is_mock(self) -> bool:
        """Whether it is librdkafka's imitation, which proves nothing about Kafka."""
        return isinstance(self.server, MockKafka)

    async def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Make a topic that can be written to at once; the mock gives each four partitions and no config.

        Raises :class:`ServerError`.
        """
        if isinstance(self.server, MockKafka):
            await self.server.create_topic(name)
        else:
            await create_topic(self.bootstrap_servers, name, partitions, config)

    def close(self) -> None:
        """End the server if it is ours. Idempotent."""
        if self.server is not None:
            self.server.close()


def open_postgres(progress: Callable[[str], None] = lambda _: None) -> Postgres:
    """The PostgreSQL of ``DATABASE_URL``, else a new server. Blocks. Raises :class:`ServerError`."""
    if url := os.environ.get("DATABASE_URL"):
        progress("using PostgreSQL of DATABASE_URL")
        return Postgres(url)
    progress("starting PostgreSQL")
    server = PostgresServer.start(progress=progress)
    return Postgres(server.url(), server)


def open_kafka(progress: Callable[[str], None] = lambda _: None, *, allow_mock: bool = False) -> Kafka:
    """The Kafka of ``KAFKA_BOOTSTRAP_SERVERS``, else a new server. Blocks. Raises :class:`ServerError`.

    Where Apache Kafka is neither in the cache nor can be downloaded that is an error, or with ``allow_mock`` the mock.
    """
    if addresses := os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        progress("using Kafka of KAFKA_BOOTSTRAP_SERVERS")
        return Kafka(addresses)
    try:
        progress("starting Apache Kafka")
        kafka = KafkaServer.start(progress=progress)
        return Kafka(kafka.bootstrap_servers, kafka)
    except MavenUnreachableError as error:
        if not allow_mock:
            raise
        progress(f"using librdkafka's mock instead of Apache Kafka: {error}")
        mock = MockKafka.start()
        return Kafka(mock.bootstrap_servers, mock)
