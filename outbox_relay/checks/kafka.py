"""What is wrong with Kafka, as seen by the user and through the addresses of the relay. Nothing is written to it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import errors as kafka_errors
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.transaction import InitProducerIdRequest

from outbox_relay.checks.backlog import TopicBacklog
from outbox_relay.checks.findings import Checked, Finding, Kind, finding
from outbox_relay.checks.kafka_protocol import OLDEST_KAFKA, WRITE, TopicMetadataRequest
from outbox_relay.kafka_security import KafkaSecurity
from outbox_relay.publisher import REQUEST_BYTES, is_allowed

_LONGEST_NAME = 249
_LEGAL_NAME = re.compile(rf"[a-zA-Z0-9._-]{{1,{_LONGEST_NAME}}}")
_TOPIC_RESOURCE = 2
_CONFIGS = ["max.message.bytes", "min.insync.replicas", "unclean.leader.election.enable", "cleanup.policy"]
_FEWEST_REPLICAS = 3


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """As the relay's configuration has them."""

    bootstrap_servers: Sequence[str]
    security: KafkaSecurity
    client_id: str
    allowed_topics: Collection[str] | None
    compression: str
    batch_bytes: int
    connect_timeout_seconds: float
    request_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class _Topic:
    backlog: TopicBacklog
    replicas: int
    config: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"topic {self.backlog.topic}"


async def check(settings: KafkaSettings, backlog: Sequence[TopicBacklog]) -> Checked:
    """All findings, within the two timeouts of the settings. Raises OSError where a file or secret can't be read."""
    findings = [*_not_allowed(settings, backlog), *_illegal(settings, backlog)]
    arguments = {**settings.security.arguments(), "client_id": settings.client_id}
    try:
        async with asyncio.timeout(settings.connect_timeout_seconds):
            connection = await _connect(settings, arguments)
    except (kafka_errors.KafkaConnectionError, TimeoutError):
        servers = ", ".join(settings.bootstrap_servers)
        reason = await settings.security.refusal(settings.bootstrap_servers) or f"no broker answers at {servers}"
        return Checked([*findings, finding(Kind.KAFKA_UNREACHABLE, reason)], None)
    topics = {topic.topic: topic for topic in _to_be_written(settings, backlog)}
    try:
        async with asyncio.timeout(settings.request_timeout_seconds):
            findings += [found async for found in _ask(connection, settings, topics, arguments)]
    except (kafka_errors.IncompatibleBrokerVersion, NotImplementedError):
        found = f"the broker at {connection.host}:{connection.port} lacks requests that the relay needs"
        findings.append(finding(Kind.KAFKA_TOO_OLD, found, oldest=OLDEST_KAFKA))
    except (kafka_errors.KafkaError, TimeoutError) as error:
        reason = str(error) or f"a broker gave no answer within {settings.request_timeout_seconds:g} s"
        findings.append(finding(Kind.KAFKA_FAILED, reason, setting="kafka.request_timeout_seconds"))
    finally:
        connection.close()
    return Checked(findings, sorted(topics))


async def _connect(settings: KafkaSettings, arguments: Mapping[str, Any]) -> AIOKafkaConnection:
    """To the first server that answers; each gets a part of the time."""
    share_ms = int(settings.connect_timeout_seconds * 1000 / (len(settings.bootstrap_servers) + 1))
    for address in settings.bootstrap_servers:
        host, _, port = address.rpartition(":") if re.search(r":\d+$", address) else (address, ":", "9092")
        # Of any kind: aiokafka asserts what a broker answers, and what listens there may be none.
        with contextlib.suppress(Exception):
            return await create_conn(host.strip("[]"), int(port), request_timeout_ms=share_ms, **arguments)
    raise kafka_errors.KafkaConnectionError


async def _ask(
    connection: AIOKafkaConnection,
    settings: KafkaSettings,
    topics: Mapping[str, TopicBacklog],
    arguments: Mapping[str, Any],
) -> AsyncIterator[Finding]:
    metadata = (await connection.send(TopicMetadataRequest(list(topics)))).to_object()
    async for found in _unreachable(metadata["brokers"], settings, arguments):
        yield found
    # What every relay asks for when it starts: it gives a number, and is the only way to learn whether it is allowed.
    answer = await connection.send(InitProducerIdRequest(None, -1))
    if answer.error_code == kafka_errors.ClusterAuthorizationFailedError.errno:
        yield finding(Kind.IDEMPOTENT_WRITE_FORBIDDEN, "the relay's user may not write idempotently")
    described = {}
    for topic in metadata["topics"]:
        problem = _problem(topic)
        if problem is not None:
            yield problem
        if not topic["error_code"]:
            described[topic["topic"]] = topic
    if not described:
        return
    request = DescribeConfigsRequest([(_TOPIC_RESOURCE, name, _CONFIGS) for name in sorted(described)])
    for error_code, _, _, name, entries in (await connection.send(request)).resources:
        replicas = min(len(partition["replicas"]) for partition in described[name]["partitions"])
        config = {} if error_code else {entry[0]: entry[1] for entry in entries}
        if error_code:
            why = kafka_errors.for_code(error_code).__name__
            yield finding(Kind.TOPIC_UNREADABLE, f"how topic {name} is configured can't be seen ({why})")
        for check_ in _TOPIC_CHECKS:
            for found in check_(_Topic(topics[name], replicas, config), settings):
                yield found


async def _unreachable(
    brokers: Iterable[Mapping[str, Any]], settings: KafkaSettings, arguments: Mapping[str, Any]
) -> AsyncIterator[Finding]:
    """Brokers that the cluster names by addresses which lead nowhere from here."""
    timeout_ms = int(settings.connect_timeout_seconds * 500)

    async def reach(broker: Mapping[str, Any]) -> bool:
        with contextlib.suppress(Exception):
            (await create_conn(broker["host"], broker["port"], request_timeout_ms=timeout_ms, **arguments)).close()
            return True
        return False

    named = sorted(brokers, key=lambda broker: broker["node_id"])
    for broker, reached in zip(named, await asyncio.gather(*map(reach, named)), strict=True):
        if not reached:
            where = f"{broker['host']}:{broker['port']}"
            found = f"the cluster says that its broker {broker['node_id']} is at {where}, and there none answers"
            yield finding(Kind.BROKER_UNREACHABLE, found)


# -- which topics


def _not_allowed(settings: KafkaSettings, backlog: Sequence[TopicBacklog]) -> Iterator[Finding]:
    for topic in backlog:
        if not is_allowed(topic.topic, settings.allowed_topics):
            found = f"{_rows(topic.rows)} for topic {_shown(topic.topic)}, which kafka.allowed_topics leaves out"
            yield finding(Kind.TOPIC_NOT_ALLOWED, found)


def _illegal(settings: KafkaSettings, backlog: Sequence[TopicBacklog]) -> Iterator[Finding]:
    for topic in backlog:
        if is_allowed(topic.topic, settings.allowed_topics) and not _is_legal(topic.topic):
            yield finding(
                Kind.TOPIC_ILLEGAL, f"{_rows(topic.rows)} for {_shown(topic.topic)}, which can't be a topic's name"
            )


def _rows(rows: int) -> str:
    return f"{rows} unsent row{'s' * (rows != 1)} {'are' if rows != 1 else 'is'}"


def _shown(topic: str) -> str:
    """In one line, whatever the application wrote."""
    return topic if _is_legal(topic) else repr(topic[:_LONGEST_NAME])


def _is_legal(name: str) -> bool:
    return bool(_LEGAL_NAME.fullmatch(name)) and name not in (".", "..")


def _to_be_written(settings: KafkaSettings, backlog: Sequence[TopicBacklog]) -> list[TopicBacklog]:
    """What rows wait for, and what is allowed by its whole name."""
    named = [name for name in settings.allowed_topics or () if not name.endswith("*")]
    topics = {name: TopicBacklog(name) for name in named if _is_legal(name)}
    for topic in backlog:
        if _is_legal(topic.topic) and is_allowed(topic.topic, settings.allowed_topics):
            topics[topic.topic] = topic
    return list(topics.values())


def _problem(topic: Mapping[str, Any]) -> Finding | None:
    name, code = topic["topic"], topic["error_code"]
    if code == kafka_errors.UnknownTopicOrPartitionError.errno:
        return finding(Kind.TOPIC_MISSING, f"there is no topic {name}")
    if code == kafka_errors.TopicAuthorizationFailedError.errno:
        return finding(Kind.TOPIC_FORBIDDEN, f"the relay's user may not even see the topic {name}, if there is one")
    if code:
        said = f"the topic {name} can't be used now: {kafka_errors.for_code(code).__name__}"
        return finding(Kind.KAFKA_FAILED, said, setting="kafka.request_timeout_seconds")
    if not topic["authorized_operations"] >> WRITE & 1:
        return finding(Kind.TOPIC_FORBIDDEN, f"the relay's user may not write to the topic {name}")
    return None


# -- one topic


def _message_too_large(topic: _Topic, settings: KafkaSettings) -> Iterator[Finding]:
    """With compression only what no broker takes at all, since nobody knows what it makes of a row."""
    limit = (
        int(topic.config.get("max.message.bytes", REQUEST_BYTES)) if settings.compression == "none" else REQUEST_BYTES
    )
    limit = min(limit, REQUEST_BYTES)
    if topic.backlog.largest_bytes > limit:
        found = (
            f"outbox id {topic.backlog.largest_id} is a record of about {topic.backlog.largest_bytes} bytes, and"
            f" {topic.name} takes {limit}"
        )
        yield finding(Kind.MESSAGE_TOO_LARGE, found)


def _batch_too_large(topic: _Topic, settings: KafkaSettings) -> Iterator[Finding]:
    limit = int(topic.config.get("max.message.bytes", settings.batch_bytes))
    if settings.batch_bytes > limit:
        found = f"kafka.batch_bytes is {settings.batch_bytes}, and {topic.name} takes {limit} bytes in a batch"
        yield finding(Kind.BATCH_TOO_LARGE, found)


def _compacted_without_key(topic: _Topic, _: KafkaSettings) -> Iterator[Finding]:
    if "compact" in topic.config.get("cleanup.policy", "") and topic.backlog.rows_without_key:
        rows = _rows(topic.backlog.rows_without_key)
        yield finding(
            Kind.COMPACTED_WITHOUT_KEY, f"{rows} without a key, and {topic.name} is compacted, so it takes none"
        )


def _replicas(topic: _Topic, _: KafkaSettings) -> Iterator[Finding]:
    in_sync = int(topic.config.get("min.insync.replicas", topic.replicas))
    of = f"replica{'s' * (topic.replicas != 1)}"
    if in_sync > topic.replicas:
        found = f"{topic.name} has {topic.replicas} {of}, and min.insync.replicas asks for {in_sync}"
        yield finding(Kind.MIN_INSYNC_UNREACHABLE, found)
    if topic.replicas < _FEWEST_REPLICAS:
        yield finding(Kind.REPLICATION_LOW, f"{topic.name} has {topic.replicas} {of}")
    if "min.insync.replicas" in topic.config and in_sync < 2:
        yield finding(Kind.MIN_INSYNC_LOW, f"{topic.name} has min.insync.replicas = {in_sync}")


def _unclean_election(topic: _Topic, _: KafkaSettings) -> Iterator[Finding]:
    if topic.config.get("unclean.leader.election.enable") == "true":
        found = f"{topic.name} lets a replica that isn't in sync become leader"
        yield finding(Kind.UNCLEAN_ELECTION, found)


_TOPIC_CHECKS = (_message_too_large, _batch_too_large, _compacted_without_key, _replicas, _unclean_election)
