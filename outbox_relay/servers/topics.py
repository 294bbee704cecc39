"""Making topics on the servers of the demo and the tests."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from outbox_relay.errors import ServerError

_SECONDS = 30.0
_MOST_REPLICAS = 3


class TopicExistsError(ServerError):
    """There is such a topic already, with whatever partitions and settings; it was left as it is."""


async def create_topic(
    bootstrap_servers: str, name: str, partitions: int = 1, config: Mapping[str, str] | None = None
) -> None:
    """Make a topic, on three brokers where there are so many, and wait until each of its partitions has a leader.

    Raises :class:`ServerError`, :class:`TopicExistsError` among them.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    try:
        async with asyncio.timeout(_SECONDS):
            await admin.start()
            replicas = min(_MOST_REPLICAS, len((await admin.describe_cluster())["brokers"]))
            topic = NewTopic(name, partitions, replicas, topic_configs=dict(config or {}))
            response = await admin.create_topics([topic])
            for _, code, message in response.topic_errors:
                if code:
                    kind = TopicExistsError if code == TopicAlreadyExistsError.errno else ServerError
                    raise kind(f"topic {name!r} could not be made: {message or for_code(code).__name__}")
            while not await _has_leaders(admin, name, partitions):  # noqa: ASYNC110 - only asking tells
                await asyncio.sleep(0.02)
    except (KafkaError, TimeoutError) as error:
        raise ServerError(f"topic {name!r} could not be made: {error or 'no answer in time'}") from error
    finally:
        await admin.close()


async def _has_leaders(admin: AIOKafkaAdminClient, name: str, partitions: int) -> bool:
    (topic,) = await admin.describe_topics([name])
    found = [partition for partition in topic["partitions"] if partition["leader"] >= 0]
    return not topic["error_code"] and len(found) == partitions
