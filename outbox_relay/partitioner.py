"""Which partition a key belongs to: the same answer as the default partitioner of Kafka's Java client."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

from aiokafka.partitioner import murmur2

#: ``(topic, number)``
Partition: TypeAlias = tuple[str, int]


#: So that the cache holds some megabytes at most.
_LONGEST_CACHED_KEY_BYTES = 256


def partition_for(key: bytes, partitions: int) -> int:
    """The partition, from 0 to ``partitions - 1``, that Java's default partitioner chooses for ``key``.

    It changes when the topic's partition count does. Raises ValueError when there is no partition.
    """
    if partitions < 1:
        raise ValueError(f"a topic has at least one partition, not {partitions}")
    # Java's toPositive: clears the sign bit, which is not the absolute value.
    hash_ = _hash(key) if len(key) <= _LONGEST_CACHED_KEY_BYTES else int(murmur2(key))
    return (hash_ & 0x7FFFFFFF) % partitions


@lru_cache(maxsize=65_536)
def _hash(key: bytes) -> int:
    # Cached, because in pure Python it costs more than appending the record does.
    return int(murmur2(key))
