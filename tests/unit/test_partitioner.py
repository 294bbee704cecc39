from __future__ import annotations

import pytest
from aiokafka.partitioner import murmur2
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.partitioner import partition_for

# What Kafka's own unit test of its Java client expects, as signed 32-bit integers.
JAVA_HASHES = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


def java_partition(java_hash: int, partitions: int) -> int:
    return (java_hash & 0x7FFFFFFF) % partitions


@pytest.mark.parametrize(("key", "java_hash"), JAVA_HASHES.items())
def test_hash_equals_the_one_of_the_java_client(key: bytes, java_hash: int) -> None:
    assert murmur2(key) == java_hash % 2**32


@pytest.mark.parametrize(("key", "java_hash"), JAVA_HASHES.items())
@pytest.mark.parametrize("partitions", [1, 2, 3, 7, 12, 100, 2**31 - 1])
def test_partition_equals_the_one_of_the_java_client(key: bytes, java_hash: int, partitions: int) -> None:
    assert partition_for(key, partitions) == java_partition(java_hash, partitions)


def test_a_negative_hash_loses_its_sign_bit_instead_of_being_negated() -> None:
    assert partition_for(b"21", 1000) == (-973932308 + 2**31) % 1000
    assert partition_for(b"21", 1000) != 973932308 % 1000


@given(key=st.binary(max_size=20), partitions=st.integers(1, 300))
def test_partition_exists_and_is_the_same_when_asked_again(key: bytes, partitions: int) -> None:
    partition = partition_for(key, partitions)
    assert 0 <= partition < partitions
    assert partition_for(key, partitions) == partition


@pytest.mark.parametrize("partitions", [0, -1])
def test_a_topic_without_partitions_is_refused(partitions: int) -> None:
    with pytest.raises(ValueError, match="at least one partition"):
        partition_for(b"key", partitions)
