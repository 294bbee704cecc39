"""What a relay would publish next: read from the outbox without a lock or a slot, and sent nowhere.

Reads of each bucket its share of a batch, the oldest rows, as a claim does, through ``outbox_unsent``. What a running
relay has claimed, or holds back, is among them, since the database doesn't know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from outbox_relay import schema
from outbox_relay.source.session import Database, Session
from outbox_relay.source.snapshot import OLDEST_OF_BUCKETS, snapshot
from outbox_relay.source.statements import OutboxTable, Statements, quoted, topic_of
from outbox_relay.text import columns, printable

_NEXT = f"""
-- next by topic
SELECT oldest.topic, count(*) AS rows, min(oldest.id) AS first_id, max(oldest.id) AS last_id,
       sum(oldest.bytes)::bigint AS bytes, max(oldest.bytes) AS largest_bytes
FROM {
    OLDEST_OF_BUCKETS.format(
        columns="{topic} AS topic, coalesce(octet_length({key}), 0) + coalesce(octet_length({payload}), 0) AS bytes",
        limit="$2",
    )
}
GROUP BY oldest.topic ORDER BY first_id
"""


@dataclass(frozen=True, slots=True)
class Next:
    """Rows of one topic that are next; bytes are those of keys and payloads."""

    topic: str
    rows: int
    first_id: int
    last_id: int
    bytes: int
    largest_bytes: int


async def read(database: Database, table: OutboxTable, batch_rows: int) -> list[Next]:
    """By topic, the one with the oldest row first. Raises SourceUnavailableError and SchemaError."""
    session = Session(database, "outbox-relay dry run")
    try:
        async with snapshot(session):
            with session.unavailable("read outbox_layout"):
                layout = await schema.verify(await session.connection())
            ((kind,),) = await session.fetch(Statements(table).payload_type)
            share = max(1, batch_rows // layout.buckets)
            rows = await session.fetch(_statement(table, kind), layout.buckets, share)
    finally:
        await session.close()
    return [Next(**row) for row in rows]


def _statement(table: OutboxTable, payload_type: str) -> str:
    payload = f"o.{quoted(table.payload)}"
    return _NEXT.format(
        outbox=quoted(table.name),
        topic=topic_of(table.topic),
        key=f"o.{quoted(table.key)}::text",
        payload=payload if payload_type == "bytea" else f"{payload}::text",
        **{name: quoted(getattr(table, name)) for name in ("id", "sent_at", "parked_at", "bucket")},
    )


def as_lines(found: Sequence[Next], obstacle: Callable[[str], str | None]) -> Iterator[str]:
    """``obstacle`` says why nothing can be written to a topic."""
    if not found:
        yield "Nothing waits."
        return
    yield from columns(
        ["TOPIC", "ROWS", "FIRST ID", "LAST ID", "BYTES", "LARGEST", "WOULD BE"],
        [
            [
                printable(next_.topic),
                f"{next_.rows:,}",
                str(next_.first_id),
                str(next_.last_id),
                f"{next_.bytes:,}",
                f"{next_.largest_bytes:,}",
                f"held: {problem}" if (problem := obstacle(next_.topic)) else "published",
            ]
            for next_ in found
        ],
    )
