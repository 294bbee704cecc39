"""The statements by which relays share out the slots; see ``slots.py``."""

from __future__ import annotations

# The class of the advisory lock is the oid of this very table, so that a stranger's number doesn't meet it.
_LOCK_CLASS = "'outbox_relay'::regclass::oid::bigint::bit(32)::integer"

# $3 is who this relay was before its row was lost: slots that nobody has taken since are still its own.
REGISTER = """
-- register
WITH me AS (
    INSERT INTO outbox_relay (name, lease_seconds, ready, direct) VALUES ($1, $2, false, false) RETURNING relay_id
), kept AS (
    UPDATE outbox_slot SET owner = me.relay_id FROM me WHERE owner = $3
)
SELECT relay_id FROM me
"""

# Behind a pooler the process id that the connection was told isn't the backend's: no lock, for it would be
# somebody else's soon.
LOCK = f"""
-- lock
SELECT CASE WHEN pg_backend_pid() = $2
            THEN pg_try_advisory_lock({_LOCK_CLASS}, ($1::bigint & 2147483647)::integer)
            ELSE false END AS direct
"""

#: That nobody has the advisory lock of relay ``r``.
UNLOCKED = """NOT EXISTS (
        SELECT FROM pg_locks l
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
          AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
          AND l.classid = 'outbox_relay'::regclass::oid
          AND l.objid::bigint = r.relay_id & 2147483647
    )"""

# $1 is the asking relay, which is alive by asking. {missed} and {renewed_at} are those whose lock has been missed for
# long enough, with when they were heard of last.
_ALIVE = f"""peers AS MATERIALIZED (
    SELECT r.relay_id, r.ready, r.renewed_at, r.direct AND {UNLOCKED} AS unlocked
    FROM outbox_relay r
    WHERE r.relay_id <> $1 AND r.renewed_at > now() - make_interval(secs => r.lease_seconds)
), alive AS MATERIALIZED (
    SELECT p.relay_id, p.ready FROM peers p
    WHERE NOT p.unlocked OR (p.relay_id, p.renewed_at) NOT IN (
        SELECT m.relay_id, m.renewed_at FROM unnest({{missed}}::bigint[], {{renewed_at}}::timestamptz[])
            AS m (relay_id, renewed_at))
)"""

# $6 are the buckets that idle lanes wait for; what is found there is told in the same breath.
HEARTBEAT = f"""
-- heartbeat
WITH renewed AS (
    UPDATE outbox_relay SET renewed_at = now(), ready = $2, direct = $3, listens = $7 WHERE relay_id = $1
    RETURNING relay_id
), {_ALIVE.format(missed="$4", renewed_at="$5")}
SELECT EXISTS (SELECT FROM renewed) AS registered,
       ARRAY(SELECT a.relay_id FROM alive a WHERE a.ready) AS ready_peers,
       ARRAY(SELECT p.relay_id FROM peers p WHERE p.unlocked ORDER BY p.relay_id) AS unlocked_peers,
       ARRAY(SELECT p.renewed_at FROM peers p WHERE p.unlocked ORDER BY p.relay_id) AS unlocked_renewed_at,
       ARRAY(SELECT s.slot FROM outbox_slot s WHERE s.owner = $1 ORDER BY s.slot) AS owned,
       ARRAY(SELECT s.epoch FROM outbox_slot s WHERE s.owner = $1 ORDER BY s.slot) AS epochs,
       ARRAY(SELECT s.slot FROM outbox_slot s
             WHERE s.owner IS NULL
                OR (s.owner <> $1 AND s.owner NOT IN (SELECT a.relay_id FROM alive a))) AS free,
       (SELECT count(*) FROM outbox_slot) AS slots,
       ARRAY(SELECT paused.topic FROM outbox_pause paused) AS paused_topics,{{look}} AS look
"""

LOOK = """
-- look
SELECT{look} AS look
"""

TAKE = f"""
-- take
WITH {_ALIVE.format(missed="$4", renewed_at="$5")}
UPDATE outbox_slot SET owner = $1, epoch = epoch + 1, taken_at = now()
WHERE slot = ANY (ARRAY(
    SELECT s.slot FROM outbox_slot s
    WHERE s.slot = ANY ($2::smallint[])
      AND (s.owner IS NULL OR (s.owner <> $1 AND s.owner NOT IN (SELECT a.relay_id FROM alive a)))
    ORDER BY s.slot
    LIMIT $3
    FOR UPDATE SKIP LOCKED
))
RETURNING slot, epoch
"""

# In a statement of its own: who writes a row once this is seen wakes the relay, and what was written before is seen by
# the look that follows.
LISTEN = """
-- listen
UPDATE outbox_relay SET listens = true WHERE relay_id = $1
"""

# Long dead relays are only history; a lease is what makes one dead.
FORGET = """
-- forget
DELETE FROM outbox_relay
WHERE relay_id <> $1 AND renewed_at < now() - make_interval(secs => 60 * lease_seconds)
"""

LEAVE = """
-- leave
WITH freed AS (UPDATE outbox_slot SET owner = NULL, epoch = epoch + 1 WHERE owner = $1)
DELETE FROM outbox_relay WHERE relay_id = $1
"""
