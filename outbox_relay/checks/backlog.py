"""What waits in the outbox, to be compared with the topics: a sample of the newest rows, so that it costs little."""

from __future__ import annotations

from dataclasses import dataclass

from outbox_relay.checks.inspection import Inspection
from outbox_relay.source.statements import quoted, topic_of

#: The most rows that are looked at, of those that can be sent and of those that wait.
ROWS = 10_000
#: The headers that the relay adds, the record's own fields and the batch's.
_OVERHEAD_BYTES = 250


@dataclass(frozen=True, slots=True)
class TopicBacklog:
    """What was seen of a topic's unsent rows; ``largest_bytes`` is that of a record before compression, about."""

    topic: str
    rows: int = 0
    rows_without_key: int = 0
    largest_id: int = 0
    largest_bytes: int = 0


# Of each bucket the newest rows that can be sent, and as many that wait. Of a large bytea or text, octet_length reads
# no more than how long it is.
_BACKLOG = """
SELECT o.topic, count(*) AS rows, count(*) - count(o.key) AS without_key,
       (array_agg(o.id ORDER BY o.size DESC))[1] AS largest_id, max(o.size) AS largest
FROM (
    SELECT newest.* FROM generate_series(0, $1::integer - 1) AS b (bucket)
    CROSS JOIN LATERAL (
        SELECT {columns} FROM {outbox} o
        WHERE (o.{bucket}, o.{id}) >= (b.bucket, -9223372036854775808)
          AND (o.{bucket}, o.{id}) < (b.bucket + 1, -9223372036854775808)
          AND o.{sent_at} IS NULL AND o.{parked_at} IS NULL
        ORDER BY o.{bucket} DESC, o.{id} DESC
        LIMIT $2 / $1
    ) AS newest
    UNION ALL
    SELECT parked.* FROM (
        SELECT p.id FROM outbox_parked p WHERE p.state NOT IN ('trying', 'discarded') LIMIT $2
    ) AS p
    CROSS JOIN LATERAL (
        SELECT {columns} FROM {outbox} o WHERE o.{id} = p.id AND o.{sent_at} IS NULL LIMIT 1
    ) AS parked
) AS o
GROUP BY o.topic ORDER BY o.topic
"""

_COLUMNS = """o.{id}::bigint AS id, {topic} AS topic, o.{key}::text AS key,
               coalesce(octet_length({payload}), 0) + coalesce(octet_length(o.{key}::text), 0)
                   + coalesce(octet_length({headers}), 0) + {overhead} AS size"""


async def read(inspection: Inspection) -> list[TopicBacklog]:
    """By topic. Raises asyncpg's errors."""
    table, layout = inspection.table, inspection.layout
    assert layout is not None
    payload = f"o.{quoted(table.payload)}"
    names = {name: quoted(getattr(table, name)) for name in ("id", "key", "sent_at", "parked_at", "bucket")}
    columns = _COLUMNS.format(
        topic=topic_of(table.topic),
        payload=payload if inspection.columns[table.payload]["type"] == "bytea" else f"{payload}::text",
        headers=f"o.{quoted(table.headers)}::text" if table.headers else "NULL::text",
        overhead=_OVERHEAD_BYTES,
        **names,
    )
    statement = _BACKLOG.format(outbox=quoted(table.name), columns=columns, **names)
    rows = await inspection.connection.fetch(statement, layout.buckets, ROWS)
    return [
        TopicBacklog(row["topic"], row["rows"], row["without_key"], row["largest_id"], row["largest"]) for row in rows
    ]
