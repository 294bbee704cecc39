"""Why a row isn't sent: what the database knows of it, of what is before it, and of who should send it.

Reads a bounded number of rows, through the primary keys, ``outbox_parked_line`` and ``outbox_unsent``; of a discarded
row the whole of ``outbox_audit``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

import asyncpg

from outbox_relay import schema
from outbox_relay.message import TOPIC_NOT_ALLOWED
from outbox_relay.source.session import Session
from outbox_relay.source.slot_statements import UNLOCKED
from outbox_relay.source.snapshot import one, snapshot
from outbox_relay.source.statements import OUTBOX, OutboxTable, quoted, topic_of
from outbox_relay.text import printable, span

#: Of rows before it in its bucket so many are counted.
MOST_BEFORE = 10_000

_ROW = """
-- explain a row
SELECT {topic} AS topic, {key} AS key, o.{bucket} AS bucket, o.{sent_at} AS sent_at, o.{parked_at} AS parked_at,
       p.state, p.attempts, p.due_at, p.parked_at AS since, p.error, p.reason, now() AS now
FROM {outbox} o
LEFT JOIN outbox_parked p ON p.id = o.{id}
WHERE o.{id} = $1
"""

# What a row of this bucket, topic and key would have to wait for: the first of its line.
_FIRST = """
-- explain: the first of the line
SELECT p.id, p.state, p.attempts, p.due_at, p.error, p.reason, now() AS now
FROM (SELECT $1::smallint AS bucket, hashtextextended($2, hashtextextended($3, 0)) AS line) AS l
CROSS JOIN LATERAL (
    SELECT * FROM outbox_parked p
    WHERE (p.bucket, p.line, p.id) >= (l.bucket, l.line, -9223372036854775808)
      AND (p.bucket, p.line, p.id) < (l.bucket, l.line, $4::bigint)
      AND p.state <> 'discarded'
    ORDER BY p.bucket, p.line, p.id
    LIMIT 1
) AS p
"""

_PAUSE = """
-- explain: the pause
SELECT p.paused_at, p.reason FROM outbox_pause p WHERE p.topic = $1
"""

_DISCARDED = """
-- explain: who discarded it
SELECT a.at, a.by_role, a.by_whom, a.reason FROM outbox_audit a
WHERE a.command = 'dead discard' AND $1 = ANY (a.ids) ORDER BY a.audit_id DESC LIMIT 1
"""

_OWNER = f"""
-- explain: the owner
SELECT s.owner, s.taken_at, r.name, r.ready, r.renewed_at,
       r.renewed_at > now() - make_interval(secs => r.lease_seconds) AS is_alive,
       r.direct AND {UNLOCKED} AS is_unlocked
FROM outbox_slot s LEFT JOIN outbox_relay r ON r.relay_id = s.owner
WHERE s.slot = $1
"""

_BEFORE = """
-- explain: how many are before it
SELECT count(*) AS rows FROM (
    SELECT FROM {outbox} o
    WHERE (o.{bucket}, o.{id}) >= ($1::smallint, -9223372036854775808)
      AND (o.{bucket}, o.{id}) < ($1::smallint, $2::bigint)
      AND o.{sent_at} IS NULL AND o.{parked_at} IS NULL
    ORDER BY o.{bucket}, o.{id}
    LIMIT $3
) AS before
"""

_GONE = """
-- explain: what is known of a row that is gone
SELECT l.pruned_until, l.pruned_until > now() AS deletes_sent,
       EXISTS (SELECT FROM outbox_parked p WHERE p.id = $1 AND p.state <> 'discarded') AS holds_others
FROM outbox_layout l
"""


#: ``docs/commands.md`` says what each means.
Answer: TypeAlias = Literal[
    "sent",
    "discarded",
    "dead",
    "blocked",
    "retry",
    "trying",
    "topic",
    "paused",
    "no-owner",
    "owner-lost",
    "owner-not-ready",
    "queued",
    "no-such-row",
]


@dataclass(frozen=True, slots=True)
class Explanation:
    """``answer`` is for programs; ``sentences`` say the same, and what follows from it. The other facts are those of
    the answer, by the names of the JSON."""

    answer: Answer
    sentences: list[str]
    facts: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"answer": self.answer, **self.facts, "sentences": self.sentences}


async def explain(session: Session, id_: int, table: OutboxTable = OUTBOX) -> Explanation:
    """Raises SourceUnavailableError and SchemaError."""
    names = {
        "outbox": quoted(table.name),
        "topic": topic_of(table.topic),
        "key": f"o.{quoted(table.key)}::text",
        **{name: quoted(getattr(table, name)) for name in ("id", "sent_at", "parked_at", "bucket")},
    }
    async with snapshot(session):
        with session.unavailable("read outbox_layout"):
            layout = await schema.verify(await session.connection())
        rows = await session.fetch(_ROW.format(**names), id_)
        if not rows:
            return _no_row(id_, await one(session, _GONE, id_))
        row = rows[0]
        if row["sent_at"] is not None:
            return Explanation("sent", [f"It was sent {_at(row['sent_at'], row['now'])}."], {"sent_at": row["sent_at"]})
        if row["state"] == "discarded":
            return _discarded(row, await session.fetch(_DISCARDED, id_))
        if row["state"] == "dead":
            return _dead(row, id_)
        first = None
        if row["key"] is not None:
            found = await session.fetch(_FIRST, row["bucket"], row["topic"], row["key"], id_)
            first = found[0] if found else None
        pauses = await session.fetch(_PAUSE, row["topic"])
        before = await one(session, _BEFORE.format(**names), row["bucket"], id_, MOST_BEFORE)
        slot = row["bucket"] % layout.slots
        owner = await one(session, _OWNER, slot)
    # Where the topic keeps all of its rows, that is why, and not the row before.
    if first is not None and first["state"] != "topic":
        return _behind(first, row)
    if pauses:
        return _paused(pauses[0], row)
    if row["state"] == "topic":
        return _topic(row)
    if first is not None:
        return _behind(first, row)
    return _on_its_way(row, slot, owner, before["rows"])


def _no_row(id_: int, gone: asyncpg.Record) -> Explanation:
    sentences = [f"There is no row {id_}."]
    pruned_until = gone["pruned_until"]
    if gone["holds_others"]:
        sentences.append(
            "Somebody deleted it while it waited, and what is behind it waits still:"
            f" `outbox-relay dead discard {id_} --reason …` lets that go on."
        )
    elif gone["deletes_sent"]:
        sentences.append('Relays delete what they have sent (relay.after_publish = "delete"): it may have been.')
    elif pruned_until is not None:
        sentences.append(f"Rows that were sent or discarded before {_time(pruned_until)} have been deleted.")
    return Explanation("no-such-row", sentences, {"pruned_until": pruned_until})


def _discarded(row: asyncpg.Record, deeds: list[asyncpg.Record]) -> Explanation:
    facts: dict[str, Any] = {"discarded_at": row["since"], "by_whom": None, "by_role": None, "discarded_for": None}
    sentence = f"It was discarded {_at(row['since'], row['now'])}, and is never sent"
    if deeds:
        deed = deeds[0]
        facts |= {"by_whom": deed["by_whom"], "by_role": deed["by_role"], "discarded_for": deed["reason"]}
        sentence += f": by {printable(deed['by_whom'])} as {printable(deed['by_role'])}, for {_said(deed['reason'])}"
    return Explanation("discarded", [f"{sentence}."], facts)


def _dead(row: asyncpg.Record, id_: int) -> Explanation:
    return Explanation(
        "dead",
        [
            f"Kafka refused it {row['attempts']} time{'s' * (row['attempts'] != 1)},"
            f" and it waits for somebody to decide, {_since(row['since'], row['now'])}.",
            f"The last refusal: {_refusal(row)}.",
            f"Mend the cause and `outbox-relay dead retry {id_}`, or `outbox-relay dead discard {id_} --reason …`.",
        ],
        _refused(row),
    )


def _behind(first: asyncpg.Record, row: asyncpg.Record) -> Explanation:
    waits = {
        "dead": f"which is dead: {_refusal(first)}. `outbox-relay explain {first['id']}` says what to do",
        "retry": f"which Kafka refused: {_refusal(first)}; it is tried again {_due(first)}",
        "trying": "which is being tried again now",
        "topic": "whose topic can't be written to, or is paused",
        "blocked": f"which is about to go on; `outbox-relay explain {first['id']}` says more",
    }
    sentences = [f"An earlier row of its topic and key waits: {first['id']}, {waits[first['state']]}."]
    if row["state"] is None:
        sentences.append('No relay has put it behind that yet; where relay.followers is "skip", none will.')
    return Explanation(
        "blocked",
        sentences,
        {"behind": first["id"], "behind_state": first["state"], "behind_error": first["error"]},
    )


def _paused(pause: asyncpg.Record, row: asyncpg.Record) -> Explanation:
    topic = printable(row["topic"])
    return Explanation(
        "paused",
        [
            f"Its topic, {topic}, was paused {_at(pause['paused_at'], row['now'])}, for {_said(pause['reason'])}.",
            f"`outbox-relay resume {topic}` lets it go on.",
        ],
        {"topic": row["topic"], "paused_at": pause["paused_at"], "paused_for": pause["reason"]},
    )


def _topic(row: asyncpg.Record) -> Explanation:
    return Explanation(
        "topic",
        [
            f"Its topic, {printable(row['topic'])}, can't be written to,"
            f" {_since(row['since'], row['now'])}: {_refusal(row)}.",
            "It goes on once its relay is restarted with the topic in kafka.allowed_topics."
            if row["error"] == TOPIC_NOT_ALLOWED
            else "It goes on by itself when the topic takes rows again.",
        ],
        {"topic": row["topic"], **_refused(row)},
    )


def _on_its_way(row: asyncpg.Record, slot: int, owner: asyncpg.Record, before: int) -> Explanation:
    """What keeps it, if anything does, is who should send it."""
    facts: dict[str, Any] = {
        **_refused(row),
        "rows_before": before,
        "slot": slot,
        "relay": owner["name"],
        "owned_since": owner["taken_at"],
    }
    answer: Answer = "queued"
    sentence = _in_the_queue(before)
    if row["state"] == "retry":
        answer = "retry"
        sentence = f"Kafka refused it, attempt {row['attempts']}: {_refusal(row)}. It is tried again {_due(row)}"
    elif row["state"] == "blocked":
        answer = "blocked"
        sentence = f"What it waited for is done. It goes on {_due(row)}"
    elif row["state"] == "trying":
        answer = "trying"
        sentence = f"It waited, and is among those that are sent now. {_in_the_queue(before)}"
    # Only what keeps the row is its owner's fault if nothing else does.
    problem, about = _of_owner(owner, slot, row["now"])
    if problem is not None and answer in ("queued", "trying"):
        answer = problem
    return Explanation(answer, [f"{sentence}.", about], facts)


def _of_owner(owner: asyncpg.Record, slot: int, now: datetime) -> tuple[Answer | None, str]:
    if owner["owner"] is None:
        return "no-owner", f"No relay owns its slot, {slot}: start one, or see `outbox-relay status`."
    if owner["name"] is None:
        return "owner-lost", f"The relay that owned its slot, {slot}, is gone: start one."
    named = f"{printable(owner['name'])}, which owns its slot, {slot}, {_since(owner['taken_at'], now)}"
    if not owner["is_alive"]:
        return "owner-lost", f"{named}, wasn't heard of for {_span(owner['renewed_at'], now)}: is it running?"
    if owner["is_unlocked"]:
        return "owner-lost", (
            f"{named}, lost its session, and was heard of {_span(owner['renewed_at'], now)} ago: if it doesn't come"
            " back, another relay takes over within a few heartbeats. Is one running?"
        )
    if not owner["ready"]:
        return "owner-not-ready", f"{named}, doesn't reach Kafka: look at its log."
    return None, f"It is for {named}."


def _in_the_queue(before: int) -> str:
    if before == 0:
        return "It is the next of its bucket"
    return f"{before:,}{' or more' if before == MOST_BEFORE else ''} rows of its bucket are before it"


def _refused(row: asyncpg.Record) -> dict[str, Any]:
    return {name: row[name] for name in ("state", "attempts", "due_at", "error", "reason")}


def _refusal(row: asyncpg.Record) -> str:
    parts = [printable(text) for text in (row["error"], row["reason"]) if text]
    return ", ".join(parts).rstrip(".") or "no error is known"


def _said(reason: str | None) -> str:
    return f"“{printable(reason or '')}”"


def _due(row: asyncpg.Record) -> str:
    if row["due_at"] is None or row["due_at"] <= row["now"]:
        return "as soon as its relay looks"
    return f"in {span((row['due_at'] - row['now']).total_seconds())}, at {_time(row['due_at'])}"


def _at(time: datetime, now: datetime) -> str:
    return f"at {_time(time)}, {_span(time, now)} ago"


def _since(time: datetime, now: datetime) -> str:
    return f"since {_time(time)}, for {_span(time, now)}"


def _span(time: datetime, now: datetime) -> str:
    return span(max(0.0, (now - time).total_seconds()))


def _time(time: datetime) -> str:
    """In UTC, as logs are."""
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
