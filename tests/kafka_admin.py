"""What an operator does to topics while relays run. By another client than the product's, so that it proves more."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future

from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)

_SECONDS = 30.0


class Admin:
    def __init__(self, bootstrap_servers: str) -> None:
        self._client = AdminClient({"bootstrap.servers": bootstrap_servers})

    async def topics(self) -> set[str]:
        metadata = await asyncio.to_thread(self._client.list_topics, timeout=_SECONDS)
        return set(metadata.topics)

    async def delete(self, topic: str) -> None:
        await self._done(self._client.delete_topics([topic], operation_timeout=_SECONDS)[topic])

    async def configure(self, topic: str, config: Mapping[str, str]) -> None:
        entries = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in config.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
        await self._done(self._client.incremental_alter_configs([resource])[resource])

    async def grow(self, topic: str, partitions: int) -> None:
        await self._done(self._client.create_partitions([NewPartitions(topic, partitions)])[topic])

    async def _done(self, future: Future[None]) -> None:
        await asyncio.to_thread(future.result, _SECONDS)
