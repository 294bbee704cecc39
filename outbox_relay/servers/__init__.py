"""Real PostgreSQL and Apache Kafka on loopback, without Docker, for the demo and the tests.

Whatever is started here ends with the process that started it, however that ends, and leaves no data behind.
"""

from outbox_relay.servers.available import Kafka, Postgres, open_kafka, open_postgres
from outbox_relay.servers.kafka import KafkaServer
from outbox_relay.servers.maven import MavenUnreachableError
from outbox_relay.servers.mock_kafka import MockKafka
from outbox_relay.servers.ports import free_port
from outbox_relay.servers.postgres import PostgresServer

__all__ = [
    "Kafka",
    "KafkaServer",
    "MavenUnreachableError",
    "MockKafka",
    "Postgres",
    "PostgresServer",
    "free_port",
    "open_kafka",
    "open_postgres",
]
