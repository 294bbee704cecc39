"""The SQL of a claim, over the table as it is called in the database.

The claim relies on the index ``outbox_unsent (bucket, id) WHERE sent_at IS NULL AND parked_at IS NULL`` and on the
primary key. Statistics of a mostly empty outbox are stale when a burst comes, and a plan made before it is kept. So
each statement is written such that it has one sensible plan whatever the statistics, and the planner is told to scan
nothing else; ``tests/acceptance/test_plans.py`` states what a row may cost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutboxTable:
    """What the table and its columns are called, unquoted; an empty name: there is no such column.

    ``topic`` is a template: columns in braces and fixed text around them, braces doubled.
    """

    name: str = "outbox"
    topic: str = "{topic}"
    id: str = "id"
    event_id: str = "event_id"
    key: str = "key"
    type: str = "type"
    payload: str = "payload"
    headers: str = "headers"
    created_at: str = "created_at"
    sent_at: str = "sent_at"
    parked_at: str = "parked_at"
    bucket: str = "bucket"


#: As ``schema.sql`` has it.
OUTBOX = OutboxTable()

#: Of a template: fixed text, or the name of a column.
_TEMPLATE = re.compile(r"((?:[^{}]|\{\{|\}\})+)|\{([^{}]+)\}")


class Statements:
    """The statements over one table; those of ``typed`` depend on the type of the payload, which ``payload_type`` asks.

    Rows that were sent are marked, or with ``deletes_sent`` deleted.
    """

    def __init__(self, table: OutboxTable, *, deletes_sent: bool = False) -> None:
        # Text whatever the type: a key may be a uuid, and a null topic would never be compared, nor seen.
        names = {
            "outbox": quoted(table.name),
            "topic": topic_of(table.topic),
            "key": f"o.{quoted(table.key)}::text",
            "type": _text(table.type),
            "headers": _text(table.headers),
            "created_at": created_at(table.created_at) if table.created_at else "NULL::text",
            **{name: quoted(getattr(table, name)) for name in ("id", "event_id", "sent_at", "parked_at", "bucket")},
        }
        how = "DELETE FROM {outbox} AS sent" if deletes_sent else "UPDATE {outbox} AS sent SET {sent_at} = now()"
        self.settle = _SETTLE.format(how=how.format(**names), **names)
        self.unsettled = _UNSETTLED.format(**names)
        self.payload_type = _PAYLOAD_TYPE.format(outbox=literal(names["outbox"]), payload=literal(table.payload))
        payload = f"o.{quoted(table.payload)}"
        # A payload goes through as PostgreSQL prints it, and is never decoded by the relay.
        printed = dict.fromkeys(("text", "other"), f"convert_to({payload}::text, 'UTF8')") | {"bytea": payload}
        locked = {type_: _LOCKED.format(payload=payload, **names) for type_, payload in printed.items()}
        sizes = _sizes(table)
        self.claim = {
            type_: _CLAIM.format(candidates=_candidates(sizes[type_], names), locked=locked[type_]) for type_ in printed
        }
        self.candidates = _CANDIDATE_IDS.format(candidates=_candidates("0", names))
        self.sizes = {type_: _SIZES.format(size=sizes[type_], **names) for type_ in printed}
        self.read = {type_: _READ.format(locked=locked[type_], **names) for type_ in printed}
        self.identify = _IDENTIFY.format(**names)

    def untyped(self) -> list[str]:
        """Those of a claim, but for what waits, that suit any payload."""
        return [OWN, self.settle, self.unsettled, RELEASE, self.payload_type, self.candidates, self.identify]

    def typed(self, payload_type: str) -> list[str]:
        """Those that suit payloads of this type alone."""
        return [self.claim[payload_type], self.sizes[payload_type], self.read[payload_type]]


def _candidates(size: str, names: Mapping[str, str]) -> str:
    """``size`` of a row, in bytes."""
    first = _UNSENT.format(start=f">= (owned.bucket, {_SMALLEST})", of="owned.bucket", limit="$2", size=size, **names)
    next_ = _UNSENT.format(start="> (deep.bucket, deep.last_id)", of="deep.bucket", limit="$3", size=size, **names)
    return _CANDIDATES.format(first=first, next=next_)


def quoted(name: str) -> str:
    """An identifier for any name."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _text(column: str) -> str:
    return f"o.{quoted(column)}::text" if column else "NULL::text"


def created_at(column: str) -> str:
    """RFC 3339. Printed by PostgreSQL, whose calendar is longer than Python's: an infinite one, or one of the year
    10000, isn't worth stopping for, and arrives as PostgreSQL prints it.
    """
    time = f"o.{quoted(column)}::timestamptz"
    return f"""
           CASE WHEN {time} >= '0001-01-01 00:00Z' AND {time} < '10000-01-01 00:00Z'
                THEN to_char({time} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
                ELSE {time}::text END"""


def topic_columns(template: str) -> list[str]:
    """The columns that a template of topics names."""
    return [column for _, column in _TEMPLATE.findall(template) if column]


def topic_of(template: str) -> str:
    """An expression of the template: ``outbox.event.{aggregatetype}`` and the like."""
    parts = []
    for text, column in _TEMPLATE.findall(template):
        if column:
            parts.append(f"coalesce({_text(column)}, '')")
        else:
            parts.append(literal(text.replace("{{", "{").replace("}}", "}")))
    return f"({' || '.join(parts)})"


#: What a row counts for besides its payload, its key and its headers, in bytes: what Python keeps of it, about.
ROW_BYTES = 1_500


def _sizes(table: OutboxTable) -> dict[str, str]:
    """By type of payload, what a row counts for, in bytes; nothing that is kept out of line is read for it.

    Of bytea and text the length is kept beside it. Of anything else (json, jsonb) what is stored is about what is
    printed, unless it is compressed: only that is printed to be measured.
    """
    payload = f"o.{quoted(table.payload)}"
    rest = f"{ROW_BYTES} + coalesce(octet_length(o.{quoted(table.key)}::text), 0)"
    if table.headers:
        rest += f" + coalesce({_stored(f'o.{quoted(table.headers)}')}, 0)"
    of_payload = {
        "bytea": f"octet_length({payload})",
        "text": f"octet_length({payload}::text)",
        "other": _stored(payload),
    }
    return {type_: f"{rest} + coalesce({size}, 0)" for type_, size in of_payload.items()}


def _stored(column: str) -> str:
    return (
        f"CASE WHEN pg_column_compression({column}) IS NULL THEN pg_column_size({column})"
        f" ELSE octet_length({column}::text) END"
    )


# The smallest bigint, since an application may choose its own ids.
_SMALLEST = -9223372036854775808

# The settings are the transaction's own, so they hold behind a transaction pooler too. A plan is made once, since
# planning costs as much as a small claim and would find the same; and never compiled, which takes a second each claim.
OWN = """
-- own
WITH settings AS MATERIALIZED (
    SELECT set_config('synchronous_commit',
                      CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
                      true),
           set_config('enable_seqscan', 'off', true),
           set_config('enable_bitmapscan', 'off', true),
           set_config('plan_cache_mode', 'force_generic_plan', true),
           set_config('jit', 'off', true)
)
SELECT s.slot
FROM settings, outbox_slot s
JOIN unnest($1::smallint[], $2::bigint[]) AS mine (slot, epoch) ON mine.slot = s.slot AND mine.epoch = s.epoch
FOR NO KEY UPDATE OF s
"""

# Rows that a stranger has locked are left for later rather than waited for. num_nulls(…) = 1 is IS NULL in words from
# which the planner can't conclude that outbox_unsent would do: without a bucket all of that index is searched for an
# id, which looks cheap while it is small. Nothing is returned, since how many rows there were is told anyway, and
# mostly that is all of them.
_SETTLE = """
-- settle
{how}
WHERE sent.{id} = ANY (ARRAY(
    SELECT o.{id} FROM {outbox} o WHERE o.{id} = ANY ($1::bigint[]) AND num_nulls(o.{sent_at}) = 1
    FOR UPDATE SKIP LOCKED
))
"""

_UNSETTLED = """
-- unsettled
SELECT o.{id} AS id FROM {outbox} o WHERE o.{id} = ANY ($1::bigint[]) AND num_nulls(o.{sent_at}) = 1
"""

# The epoch grows here too: a slot and an epoch together name one ownership for good.
RELEASE = """
-- release
UPDATE outbox_slot SET owner = NULL, epoch = epoch + 1 WHERE slot = ANY ($1::smallint[])
"""

# A bucket's rows from one on, in order, without those that wait. A range of (bucket, id), since with `bucket = b` and
# an order by id the planner walks the primary key instead. What waits is a hashed subquery; <> ALL (…) would compare
# each row with each thing that waits.
_UNSENT = """
        SELECT o.{id} AS id, o.{bucket} AS bucket, {topic} AS topic, {key} AS key, {size} AS size
        FROM {outbox} o
        WHERE (o.{bucket}, o.{id}) {start}
          AND (o.{bucket}, o.{id}) < ({of} + 1, -9223372036854775808)
          AND o.{sent_at} IS NULL AND o.{parked_at} IS NULL
          AND o.{id} NOT IN (SELECT held.id FROM unnest($4::bigint[]) AS held (id))
          AND {topic} NOT IN (SELECT held.topic FROM unnest($5::text[]) AS held (topic))
          AND ({key} IS NULL OR ({topic}, {key}) NOT IN (
                   SELECT held.topic, held.key FROM unnest($6::text[], $7::text[]) AS held (topic, key)))
        ORDER BY o.{bucket}, o.{id}
        LIMIT {limit}"""


# Each bucket is read on its own, so that no backlog of a bucket that isn't ours is stepped over. Each gives its share
# of the batch, so that none waits for another's backlog, and the room that is left goes to those that have more, the
# one with the oldest rows first. So hardly more is read than is taken, however the backlog is spread. Taken are, in
# order of id, those that fit into $8 bytes, and one at least: what is left behind of a key is its end. Locked in order
# of id, since neighbours by id are neighbours on disk.
_CANDIDATES = """
WITH share AS MATERIALIZED (
    SELECT c.id, c.bucket, c.topic, c.key, c.size
    FROM unnest($1::smallint[]) AS owned (bucket)
    CROSS JOIN LATERAL ({first}
    ) AS c
), room AS MATERIALIZED (
    SELECT c.id, c.bucket, c.topic, c.key, c.size
    FROM (SELECT s.bucket, max(s.id) AS last_id FROM share s
          GROUP BY s.bucket HAVING count(*) = $2 ORDER BY last_id) AS deep
    CROSS JOIN LATERAL ({next}
    ) AS c
    LIMIT greatest(0, $3 - (SELECT count(*) FROM share))
), oldest AS (
    SELECT s.id, s.bucket, s.topic, s.key, s.size FROM share s
    UNION ALL
    SELECT r.id, r.bucket, r.topic, r.key, r.size FROM room r
    ORDER BY id
    LIMIT $3
), candidates AS (
    SELECT f.id, f.bucket, f.topic, f.key, f.bytes
    FROM (SELECT o.id, o.bucket, o.topic, o.key, o.size,
                 sum(o.size) OVER (ORDER BY o.id ROWS UNBOUNDED PRECEDING) AS bytes
          FROM oldest o) AS f
    WHERE f.bytes <= $8::bigint OR f.bytes = f.size
)"""

# A candidate without a row beside it couldn't be locked, or was changed meanwhile: there its key is cut. The
# columns are read by their position.
_LOCKED = """
SELECT c.id, c.bucket, c.topic, c.key, c.bytes,
       locked.event_id, locked.type, locked.payload, locked.headers, locked.created_at
FROM candidates AS c
LEFT JOIN LATERAL (
    SELECT o.{event_id}::text AS event_id, {type} AS type, {payload} AS payload, {headers} AS headers,
           {created_at} AS created_at
    FROM {outbox} o
    WHERE o.{bucket} = c.bucket AND o.{id} = c.id AND o.{sent_at} IS NULL AND o.{parked_at} IS NULL
      AND {topic} = c.topic AND {key} IS NOT DISTINCT FROM c.key
    FOR UPDATE SKIP LOCKED
) AS locked ON true
ORDER BY c.id
"""

_CLAIM = """
-- claim{candidates}{locked}"""

# A claim in parts, where one of its rows can't be read: which rows it would have, how large they are, then some of them
# at a time.
_CANDIDATE_IDS = """
-- candidates{candidates}
SELECT c.id FROM candidates c ORDER BY c.id
"""

_SIZES = """
-- sizes
SELECT o.{id} AS id, {size} AS size FROM {outbox} o WHERE o.{id} = ANY ($1::bigint[])
"""

_READ = """
-- read
WITH candidates AS (
    SELECT o.{id} AS id, o.{bucket} AS bucket, {topic} AS topic, {key} AS key, 0 AS bytes
    FROM {outbox} o WHERE o.{id} = ANY ($1::bigint[]) AND num_nulls(o.{sent_at}) = 1
){locked}"""

# Of a row that can't be read, what is needed to park it.
_IDENTIFY = """
-- identify
SELECT o.{id} AS id, o.{bucket} AS bucket, {topic} AS topic, {key} AS key, o.{event_id}::text AS event_id
FROM {outbox} o WHERE o.{id} = ANY ($1::bigint[])
"""

_PAYLOAD_TYPE = """
-- payload type
SELECT CASE WHEN a.atttypid = 'bytea'::regtype THEN 'bytea'
            WHEN a.atttypid IN ('text'::regtype, 'varchar'::regtype) THEN 'text' ELSE 'other' END AS payload
FROM pg_attribute a WHERE a.attrelid = {outbox}::regclass AND a.attname = {payload}
"""
