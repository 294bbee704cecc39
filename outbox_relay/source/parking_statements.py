"""The SQL of rows that wait; ``docs/decisions/0009-where-waiting-rows-are-kept.md`` has the rules that it keeps.

Each is run with the lock of its rows' slots in hand, by a relay with the settings of ``OWN``, or by an operator's
command. Rows of ``outbox`` that a stranger has locked are left for later rather than waited for.
"""

from __future__ import annotations

from outbox_relay.message import DEAD_LETTER_HEADER
from outbox_relay.source.statements import OutboxTable, quoted, topic_of

# What a relay has to know of slots that it hasn't had before.
LEARN = """
-- learn what is parked
SELECT p.bucket, p.line, p.topic, p.key, bool_or(p.state = 'topic') AS for_topic,
       array_agg(p.id) FILTER (WHERE p.state = 'trying') AS trying,
       coalesce(bool_or(p.attempts > 0) FILTER (WHERE p.state = 'trying'), false) AS refused,
       bool_or(p.state = 'blocked') AS blocked
FROM outbox_parked p
WHERE p.bucket = ANY ($1::smallint[]) AND p.state <> 'discarded'
GROUP BY p.bucket, p.line, p.topic, p.key
"""

DUE = """
-- due
SELECT d.id, d.bucket, d.line, d.topic, d.key, d.state
FROM unnest($1::smallint[]) AS owned (bucket)
CROSS JOIN LATERAL (
    SELECT p.id, p.bucket, p.line, p.topic, p.key, p.state FROM outbox_parked p
    WHERE p.bucket = owned.bucket AND p.due_at <= now()
    ORDER BY p.due_at, p.id
    LIMIT $2
) AS d
"""

_LINES = """unnest($1::smallint[], $2::bigint[], $3::text[], $4::text[]) AS l (bucket, line, topic, key)"""

_OF_LINE = """f.bucket = l.bucket AND f.line = l.line AND f.state <> 'discarded'
      AND f.topic = l.topic AND f.key IS NOT DISTINCT FROM l.key"""

# The first of a line, as many as may be tried at a time, up to one that waits for something of its own.
FOLLOWERS = f"""
-- followers
SELECT n.id
FROM {_LINES}
CROSS JOIN LATERAL (
    SELECT f.id, bool_and(f.state = 'blocked') OVER (ORDER BY f.id) AS free
    FROM outbox_parked f
    WHERE {_OF_LINE}
    ORDER BY f.id
    LIMIT $5
) AS n
WHERE n.free
"""

# It was due, and isn't the first of its line: whoever takes away what is before it makes it due again.
NOT_DUE = """
-- not due
UPDATE outbox_parked p SET due_at = NULL WHERE p.id = ANY ($1::bigint[]) AND p.state = 'blocked'
"""

# Due, and can't be put back now. A row of a topic too is then tried when it is due.
POSTPONE = """
-- postpone
UPDATE outbox_parked p SET due_at = now() + make_interval(secs => later.seconds)
FROM unnest($1::bigint[], $2::float8[]) AS later (id, seconds)
WHERE p.id = later.id
"""

# Where followers don't wait any more.
FREE = f"""
-- free followers
UPDATE outbox_parked p SET state = 'retry', due_at = now()
WHERE p.id = ANY (ARRAY(
    SELECT free.id
    FROM {_LINES}
    CROSS JOIN LATERAL (
        SELECT f.id FROM outbox_parked f WHERE {_OF_LINE} AND f.state = 'blocked' ORDER BY f.id LIMIT $5
    ) AS free
    LIMIT $5
))
RETURNING p.id
"""

# Rule 3: the first of a line isn't blocked without being due.
MAKE_NEXT_DUE = f"""
-- make the next due
UPDATE outbox_parked p SET due_at = now()
FROM {_LINES}
WHERE p.state = 'blocked' AND p.due_at IS NULL AND p.id = (
    SELECT f.id FROM outbox_parked f
    WHERE {_OF_LINE}
    ORDER BY f.id
    LIMIT 1
)
"""

OF_TOPIC = """
-- of a topic
SELECT w.id
FROM unnest($1::smallint[]) AS owned (bucket)
CROSS JOIN LATERAL (
    SELECT p.id FROM outbox_parked p
    WHERE p.bucket = owned.bucket AND hashtextextended(p.topic, 0) = hashtextextended($2, 0) AND p.state = 'topic'
      AND p.topic = $2 AND p.due_at IS NULL
    ORDER BY p.id
    LIMIT $3
) AS w
LIMIT $4
"""

# What is before a row is a row that waits; one that is being tried goes ahead of it in the claim itself.
FIRST_PARKED = """
-- first parked of each line
SELECT (
    SELECT f.id FROM outbox_parked f
    WHERE f.bucket = l.bucket AND f.line = hashtextextended(l.topic, hashtextextended(l.key, 0))
      AND f.state <> 'discarded' AND f.state <> 'trying' AND f.topic = l.topic AND f.key = l.key
    ORDER BY f.id
    LIMIT 1
) AS id
FROM unnest($1::smallint[], $2::text[], $3::text[]) WITH ORDINALITY AS l (bucket, topic, key, place)
ORDER BY l.place
"""

DONE = """
-- done
DELETE FROM outbox_parked p WHERE p.id = ANY ($1::bigint[]) AND p.state = 'trying'
RETURNING p.bucket, p.line, p.topic, p.key
"""

# A row that kept failing may be held by its state alone: only a refusal of its own (retry) counts an attempt, and only
# once, though the commit that parked it was in doubt. What was tried in vain has waited all the while.
_PARK = """
-- park
WITH asked AS MATERIALIZED (
    SELECT a.id, a.state, a.error, a.reason, a.max_attempts
    FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::integer[])
        AS a (id, state, error, reason, max_attempts)
), locked AS MATERIALIZED (
    SELECT o.{id} AS id, o.{bucket} AS bucket, {topic} AS topic, {key} AS key
    FROM {outbox} o WHERE o.{id} = ANY ($1::bigint[]) AND num_nulls(o.{sent_at}, o.{parked_at}) = 2
    FOR UPDATE SKIP LOCKED
), marked AS (
    UPDATE {outbox} AS o SET {parked_at} = now() WHERE o.{id} = ANY (ARRAY(SELECT l.id FROM locked l))
)
INSERT INTO outbox_parked AS p (id, bucket, topic, key, state, attempts, due_at, error, reason)
SELECT l.id, l.bucket, l.topic, l.key, n.state, n.attempts,
       CASE n.state WHEN 'retry'
            THEN now() + make_interval(secs => least($7::float8, $6::float8 * 2.0 ^ least(n.attempts - 1, 62))
                                               * (0.5 + random() / 2)) END,
       a.error, a.reason
FROM locked l
JOIN asked a ON a.id = l.id
LEFT JOIN outbox_parked before ON before.id = l.id
CROSS JOIN LATERAL (
    SELECT coalesce(before.attempts, 0) + (a.state = 'retry')::integer AS attempts
) AS counted
CROSS JOIN LATERAL (
    SELECT counted.attempts,
           CASE WHEN a.state = 'retry' AND counted.attempts >= a.max_attempts THEN 'dead' ELSE a.state END AS state
) AS n
ON CONFLICT (id) DO UPDATE SET
    bucket = excluded.bucket, topic = excluded.topic, key = excluded.key,
    state = excluded.state, attempts = excluded.attempts, due_at = excluded.due_at,
    parked_at = CASE excluded.state WHEN 'dead' THEN now() ELSE p.parked_at END,
    error = coalesce(excluded.error, p.error), reason = coalesce(excluded.reason, p.reason)
RETURNING p.id, p.bucket, p.topic, p.key, p.state, p.attempts,
          extract(epoch FROM p.due_at - now())::float8 AS due_seconds
"""

_UNPARKED = """
-- neither sent nor parked
SELECT o.{id} AS id FROM {outbox} o
WHERE o.{id} = ANY ($1::bigint[]) AND num_nulls(o.{sent_at}, o.{parked_at}) = 2
"""

# A message like any other, in the transaction in which its original died. What is a copy already isn't copied.
COPY_DEAD = f"""
-- copy a dead letter
INSERT INTO outbox (event_id, topic, key, type, payload, headers)
SELECT o.event_id, $2, o.key, o.type, o.payload,
       o.headers || jsonb_strip_nulls(jsonb_build_object(
           '{DEAD_LETTER_HEADER}', o.id::text,
           'dead-letter-topic', o.topic,
           'dead-letter-attempts', p.attempts::text,
           'dead-letter-error', p.error,
           'dead-letter-reason', p.reason))
FROM outbox o JOIN outbox_parked p ON p.id = o.id
WHERE o.id = $1 AND NOT o.headers ? '{DEAD_LETTER_HEADER}'
"""

_TRY = """
-- try again
WITH hot AS (
    UPDATE {outbox} AS o SET {parked_at} = NULL
    WHERE o.{id} = ANY (ARRAY(
        SELECT o.{id} FROM {outbox} o WHERE o.{id} = ANY ($1::bigint[]) AND num_nulls(o.{sent_at}) = 1
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING o.{id} AS id
)
UPDATE outbox_parked p SET state = 'trying', due_at = NULL FROM hot WHERE p.id = hot.id
RETURNING p.id, p.bucket, p.attempts
"""

# Somebody deleted the outbox row, or marked it as sent.
_FORGET_GONE = """
-- forget what is gone
DELETE FROM outbox_parked p
WHERE p.id = ANY ($1::bigint[])
  AND NOT EXISTS (SELECT FROM {outbox} o WHERE o.{id} = p.id AND num_nulls(o.{sent_at}) = 1)
RETURNING p.id, p.bucket, p.line, p.topic, p.key
"""


class ParkingStatements:
    """Those of the statements that read or write the outbox table itself."""

    def __init__(self, table: OutboxTable) -> None:
        names = {
            "outbox": quoted(table.name),
            "topic": topic_of(table.topic),
            "key": f"o.{quoted(table.key)}::text",
            **{name: quoted(getattr(table, name)) for name in ("id", "sent_at", "parked_at", "bucket")},
        }
        self.park = _PARK.format(**names)
        self.unparked = _UNPARKED.format(**names)
        self.try_again = _TRY.format(**names)
        self.forget_gone = _FORGET_GONE.format(**names)

    def all(self) -> list[str]:
        """Every statement of what waits but ``COPY_DEAD``, which isn't valid for every table: headers may be text."""
        return [
            LEARN,
            DUE,
            FOLLOWERS,
            NOT_DUE,
            POSTPONE,
            FREE,
            MAKE_NEXT_DUE,
            OF_TOPIC,
            FIRST_PARKED,
            DONE,
            self.park,
            self.unparked,
            self.try_again,
            self.forget_gone,
        ]
