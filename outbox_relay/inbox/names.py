"""Names that go into a key of the consumer's tables."""

from __future__ import annotations

#: In bytes, so that a name and an id fit into one entry of PostgreSQL's index.
MAX_NAME_BYTES = 200


def checked_name(consumer: str) -> str:
    """The consumer's name, if it can be one: text of 1 to 200 bytes. Raises ValueError or TypeError."""
    if not isinstance(consumer, str):
        raise TypeError(f"consumer must be a str, not {type(consumer).__name__}: name whoever handles the messages")
    if not consumer or "\0" in consumer or len(consumer.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"consumer must be text of 1 to {MAX_NAME_BYTES} bytes, without a NUL character")
    return consumer
