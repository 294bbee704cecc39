"""What an operator does to topics while relays run. By another client than the product's, so that it proves more."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourcePatternType,
    ResourceType,
)

from tests.waiting import eventually

_SECONDS = 30.0


class Admin:
    def __init__(self, bootstrap_servers: str) -> None:
        self._client = AdminClient({"bootstrap.servers": bootstrap_servers})

    async def topics(self) -> set[str]:
        metadata = await asyncio.to_thread(self._client.list_topics, timeout=_SECONDS)
        return set(metadata.topics)

    async def delete(self, topic: str) -> None:
        """Returns when the broker knows it no more: it is answered as soon as the controller has decided it."""
        await self._done(self._client.delete_topics([topic], operation_timeout=_SECONDS)[topic])

        async def is_gone() -> bool:
            return topic not in await self.topics()

        await eventually(is_gone, f"that the broker knows {topic} no more")

    async def configure(self, topic: str, config: Mapping[str, str]) -> None:
        entries = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in config.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
        await self._done(self._client.incremental_alter_configs([resource])[resource])

    async def delete_records(self, topic: str, partition: int, before: int) -> None:
        """As retention does: the partition begins at that offset."""
        place = TopicPartition(topic, partition, before)
        await self._done(self._client.delete_records([place])[place])

    async def grow(self, topic: str, partitions: int) -> None:
        await self._done(self._client.create_partitions([NewPartitions(topic, partitions)])[topic])

    async def forbid_writing(self, topic: str) -> None:
        """To everybody; where there is an authorizer, and one that allows what no rule is about."""
        rules = [
            AclBinding(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:*", "*", operation, permission)
            for operation, permission in (
                (AclOperation.ALL, AclPermissionType.ALLOW),
                (AclOperation.WRITE, AclPermissionType.DENY),
            )
        ]
        for future in self._client.create_acls(rules).values():
            await self._done(future)

    async def allow_writing(self, topic: str) -> None:
        rules = AclBindingFilter(
            ResourceType.TOPIC,
            topic,
            ResourcePatternType.LITERAL,
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            AclOperation.WRITE,
            AclPermissionType.DENY,
        )
        await self._done(self._client.delete_acls([rules])[rules])

    async def _done(self, future: Future[Any]) -> None:
        await asyncio.to_thread(future.result, _SECONDS)
