"""Three brokers with an authorizer: what a relay's user has to be granted, and replicas that are somewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.metadata import MetadataRequest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from outbox_relay.servers import free_port
from outbox_relay.servers.kafka import KafkaServer, _java
from outbox_relay.servers.kafka_jars import kafka_jars
from tests.waiting import eventually

_SECONDS = 60.0
_TOPIC = 2  # of the kinds of things that have a configuration
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"


class _Node(KafkaServer):
    """Ready when it answers for its cluster, however many brokers that has by now."""

    def _is_ready(self) -> bool:
        with contextlib.suppress(Exception):
            return bool(_client(self.bootstrap_servers).list_topics(timeout=2).brokers)
        return False


class KafkaCluster:
    """Anybody may do everything in the clear at ``bootstrap_servers``; whoever comes to ``sasl`` is somebody."""

    def __init__(self) -> None:
        java, jars = _java(), kafka_jars(lambda _: None)
        self._nodes = [_Node(java, jars, {}) for _ in range(3)]
        self.sasl = [f"127.0.0.1:{free_port()}" for _ in self._nodes]
        controller = f"127.0.0.1:{self._nodes[0]._controller_port}"
        for number, (node, sasl) in enumerate(zip(self._nodes, self.sasl, strict=True), 1):
            node._cluster_id = self._nodes[0]._cluster_id
            listeners = f"PLAINTEXT://{node.bootstrap_servers},SASL_PLAINTEXT://{sasl}"
            node._settings = {
                "process.roles": "broker,controller" if number == 1 else "broker",
                "node.id": str(number),
                "controller.quorum.voters": f"1@{controller}",
                "listeners": listeners + (f",CONTROLLER://{controller}" if number == 1 else ""),
                "advertised.listeners": listeners,
                "listener.security.protocol.map": (
                    "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT"
                ),
                "listener.name.sasl_plaintext.sasl.enabled.mechanisms": "SCRAM-SHA-256",
                "listener.name.sasl_plaintext.scram-sha-256.sasl.jaas.config": _SCRAM,
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS",
                "auto.create.topics.enable": "false",
                "num.partitions": "1",
            }
        try:
            with ThreadPoolExecutor() as threads:
                list(threads.map(lambda node: (node._format(), node._launch()), self._nodes))
            self._admin = _client(self.bootstrap_servers)
            ends = time.monotonic() + _SECONDS
            while len(self._admin.list_topics(timeout=_SECONDS).brokers) < len(self._nodes):
                assert time.monotonic() < ends, "not all brokers have joined"
        except BaseException:
            self.close()
            raise

    @property
    def bootstrap_servers(self) -> str:
        return self._nodes[0].bootstrap_servers

    def add_user(self, name: str, password: str) -> None:
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
        change = UserScramCredentialUpsertion(name, credential, password.encode())
        _done(self._admin.alter_user_scram_credentials([change]))

    async def create(self, topic: str, replicas: int = 3, config: Mapping[str, str] | None = None) -> None:
        """A topic of one partition, known to every broker."""
        new = NewTopic(topic, 1, replicas, config=dict(config or {}))
        await asyncio.to_thread(lambda: _done(self._admin.create_topics([new])))
        for node in self._nodes:
            await _until_known(topic, *node.bootstrap_servers.split(":"))

    def allow(self, user: str, topic: str, *operations: AclOperation) -> None:
        topic_of = (ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{user}", "*")
        rules = [AclBinding(*topic_of, operation, AclPermissionType.ALLOW) for operation in operations]
        _done(self._admin.create_acls(rules))

    def close(self) -> None:
        for node in self._nodes:
            node.close()

    def __enter__(self) -> KafkaCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _until_known(topic: str, host: str, port: str) -> None:
    connection = await create_conn(host, int(port))
    try:
        await eventually(lambda: _knows(connection, topic), f"{host}:{port} knows {topic}")
    finally:
        connection.close()


async def _knows(connection: AIOKafkaConnection, topic: str) -> bool:
    (described,) = (await connection.send(DescribeConfigsRequest([(_TOPIC, topic, [])]))).resources
    (found,) = (await connection.send(MetadataRequest([topic]))).to_object()["topics"]
    return not described[0] and not found["error_code"] and all(part["leader"] > 0 for part in found["partitions"])


def _client(bootstrap_servers: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0})


def _done(futures: Mapping[Any, Future[Any]]) -> None:
    for future in futures.values():
        future.result(_SECONDS)
