"""Messages as a consumer gets them, without a Kafka."""

from __future__ import annotations

from collections.abc import Sequence

from aiokafka import ConsumerRecord


def record(
    id_: str | bytes | None = None,
    *,
    headers: Sequence[tuple[str, bytes | None]] = (),
    topic: str = "orders",
    partition: int = 3,
    offset: int = 17,
    key: bytes | None = b"42",
    value: bytes | None = b"{}",
) -> ConsumerRecord[bytes, bytes]:
    """aiokafka's own class, with the header ``id`` if one is given, and then ``headers``."""
    given = [] if id_ is None else [("id", id_.encode() if isinstance(id_, str) else id_)]
    return ConsumerRecord(
        topic=topic,
        partition=partition,
        offset=offset,
        timestamp=0,
        timestamp_type=0,
        key=key,
        value=value,
        checksum=None,
        serialized_key_size=len(key or b""),
        serialized_value_size=len(value or b""),
        headers=(*given, *headers),
    )
