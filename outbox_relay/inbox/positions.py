"""Where a consumer goes on in a partition: at its group's offset, or, if that is new, at the first message there is.

aiokafka's own ``auto_offset_reset`` can't tell a group that is new from one whose messages are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outbox_relay.errors import OffsetGoneError


async def position(kafka: Any, group: str, partition: Any, committed: int | None) -> int:
    """``committed`` is the group's offset. Raises OffsetGoneError where Kafka begins behind it, and KafkaError."""
    first: int = (await kafka.beginning_offsets([partition]))[partition]
    if committed is None:
        return first
    if committed < first:
        raise _gone(group, f"{partition.topic}-{partition.partition} {committed}, the first is {first}")
    return committed


def out_of_range(group: str, error: Exception) -> OffsetGoneError:
    """For aiokafka's OffsetOutOfRangeError, which has the offset of each partition."""
    offsets = error.args[0] if error.args and isinstance(error.args[0], Mapping) else {}
    where = ", ".join(f"{each.topic}-{each.partition} {offset}" for each, offset in offsets.items())
    return _gone(group, where or str(error))


def _gone(group: str, where: str) -> OffsetGoneError:
    return OffsetGoneError(
        f"Kafka doesn't have the messages at which group {group!r} is to go on ({where}): the topic keeps them for too"
        " short a time, or was made anew. Nothing is passed over. To go on with what is there, set the group's offsets,"
        " as with kafka-consumer-groups --reset-offsets"
    )
