"""A group's committed offset, once no transaction can change it any more.

aiokafka asks for offsets by OffsetFetch up to version 3, which answers the last one even while a transaction that
moves it is being completed. Version 7 (KIP-447, brokers from 2.5 on) has ``require_stable``: until then the broker
answers UNSTABLE_OFFSET_COMMIT. Fields: ``OffsetFetchRequest.json`` and ``OffsetFetchResponse.json`` of Apache Kafka.

That matters also after InitProducerId. It is answered once each partition of the last transaction has its marker, that
of ``__consumer_offsets`` among them (``TransactionCoordinator.prepareInitProducerIdTransit``: CONCURRENT_TRANSACTIONS
in the states Ongoing, PrepareCommit and PrepareAbort). But the older group coordinator takes the offsets over from
its pending ones a moment after that (``GroupMetadataManager.scheduleHandleTxnCompletion``).
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import TopicPartition
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields

_UNSTABLE_OFFSET_COMMIT = 88
_PAUSE_SECONDS = 0.02


class _OffsetFetchResponse(Response):  # type: ignore[misc]
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition_index", Int32),
                        ("committed_offset", Int64),
                        ("committed_leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class _OffsetFetchRequestStruct(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 9
    API_VERSION = 7
    RESPONSE_TYPE = _OffsetFetchResponse
    SCHEMA = Schema(
        ("group_id", CompactString("utf-8")),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                ("partition_indexes", CompactArray(Int32)),
                ("tags", TaggedFields),
            ),
        ),
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class _OffsetFetchRequest(Request[_OffsetFetchRequestStruct]):  # type: ignore[misc]
    API_KEY = 9

    def __init__(self, group: str, partition: TopicPartition) -> None:
        self._group, self._partition = group, partition

    def build(self, request_struct_class: type[_OffsetFetchRequestStruct]) -> _OffsetFetchRequestStruct:
        topics: list[tuple[str, list[int], dict[int, bytes]]] = [
            (self._partition.topic, [self._partition.partition], {})
        ]
        return request_struct_class(self._group, topics, True, {})


async def stable_offset(client: Any, group: str, partition: TopicPartition) -> int | None:
    """Where the group goes on in the partition, or None where it has committed nothing.

    ``client`` is an ``AIOKafkaClient``. Waits while a transaction may move the offset, and for a coordinator, without a
    deadline of its own. Raises KafkaError.
    """
    while True:
        try:
            node = await client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await client.send(
                node, _OffsetFetchRequest(group, partition), group=ConnectionGroup.COORDINATION
            )
            ((_, ((_, offset, _, _, code, _),), _),) = response.topics or [(None, [(0, -1, 0, "", 0, {})], {})]
            code = response.error_code or code
            if not code:
                return None if offset < 0 else offset
            if code != _UNSTABLE_OFFSET_COMMIT:
                raise for_code(code)()
        except KafkaError as error:
            if not error.retriable:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)
