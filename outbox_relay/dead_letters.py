"""Rows that wait, as operators see and change them; see ``docs/decisions/0009-where-waiting-rows-are-kept.md``.

Whoever changes a parked row locks its slot first, as each transaction of the relay that owns the slot does, and reads
in a later statement, whose snapshot is younger than that lock. So a command and a relay never see half of one another's
work, whether a relay runs or not. Nothing is changed that is ``trying``, or not parked: it may be on its way to Kafka.
One slot and a bounded number of rows at a time, so that no relay waits for long.

Relies on ``outbox_parked_line (bucket, line, id)`` and the primary keys; what is selected by topic, key or error reads
all of ``outbox_parked``.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import asyncpg

from outbox_relay import audit, schema
from outbox_relay.audit import Deed
from outbox_relay.errors import RefusedError, SourceRefusedError, SourceUnavailableError
from outbox_relay.outbox_message import Message
from outbox_relay.source.parking_statements import MAKE_NEXT_DUE
from outbox_relay.source.session import Session
from outbox_relay.source.snapshot import snapshot
from outbox_relay.source.statements import OUTBOX, OutboxTable, created_at, literal, quoted, topic_columns
from outbox_relay.text import printable

STATES = ("retry", "trying", "blocked", "topic", "dead", "discarded")
#: What can be tried again, and what can be given up.
RETRIED = ("dead", "retry")
DISCARDED = ("dead", "retry", "blocked", "topic")

#: One transaction changes no more; the relay that owns the slot waits meanwhile.
MOST_ROWS_AT_ONCE = 1_000
#: Of rows that wait behind another so many are counted.
MOST_BEHIND = 1_000

_LOCK = """
-- lock the slot
SELECT s.slot FROM outbox_slot s WHERE s.slot = $1 FOR NO KEY UPDATE
"""

# Each is ignored where it is NULL.
_SELECTED = """p.state = ANY ($1::text[])
  AND ($2::bigint[] IS NULL OR p.id = ANY ($2))
  AND ($3::text IS NULL OR p.key = $3)
  AND ($4::text IS NULL OR p.topic = $4)
  AND ($5::text IS NULL OR p.error = $5)"""

_CHOOSE = f"""
-- choose rows
SELECT p.id, p.bucket, p.state FROM outbox_parked p WHERE {_SELECTED} ORDER BY p.id
"""

# A range of the whole index key, since of `line = l ... ORDER BY id` the planner may make a walk along the primary key.
_OF_THE_LINE = """(p.bucket, p.line, p.id) >= ({of}.bucket, {of}.line, {first})
      AND (p.bucket, p.line, p.id) <= ({of}.bucket, {of}.line, 9223372036854775807)
      AND p.state <> 'discarded'"""

_BEHIND = f"""
    SELECT count(*) AS behind FROM (
        SELECT FROM outbox_parked p
        WHERE {_OF_THE_LINE.format(of="w", first="w.id")} AND p.id > w.id AND p.state = 'blocked'
        LIMIT {MOST_BEHIND}
    ) AS followers"""

_LIST = f"""
-- list rows
SELECT w.id, w.topic, w.state, w.attempts, w.error, w.reason, w.parked_at, w.due_at, now() AS now, f.behind
FROM (SELECT * FROM outbox_parked p WHERE {_SELECTED} ORDER BY p.id LIMIT $6) AS w
CROSS JOIN LATERAL ({_BEHIND}
) AS f
ORDER BY w.id
"""

_SHOW = f"""
-- show a row
SELECT w.id, o.{{event_id}}::text AS event_id, w.topic, w.key, {{type}} AS type, {{headers}} AS headers,
       {{created_at}} AS created_at, octet_length({{payload}}) AS payload_bytes, w.bucket,
       w.state, w.attempts, w.parked_at, w.due_at, w.error, w.reason, f.behind
FROM outbox_parked w
LEFT JOIN {{outbox}} o ON o.{{id}} = w.id
CROSS JOIN LATERAL ({_BEHIND}
) AS f
WHERE w.id = $1
"""

_HISTORY = """
-- show what was done to a row
SELECT a.at, a.command, a.by_role, a.by_whom, a.reason FROM outbox_audit a WHERE $1 = ANY (a.ids) ORDER BY a.audit_id
"""

_PAYLOAD = """
-- show a payload
SELECT {payload} AS payload FROM {outbox} o WHERE o.{id} = $1
"""

_PAYLOAD_TYPE = """
-- payload type
SELECT format_type(a.atttypid, a.atttypmod) AS type
FROM pg_attribute a WHERE a.attrelid = {outbox_text}::regclass AND a.attname = {payload_text}
"""

_RETRY = """
-- retry
UPDATE outbox_parked SET state = 'retry', attempts = 0, due_at = now()
WHERE id = ANY ($1::bigint[]) AND state IN ('dead', 'retry')
RETURNING id
"""

_DISCARD = """
-- discard
UPDATE outbox_parked SET state = 'discarded', due_at = NULL, parked_at = now()
WHERE id = ANY ($1::bigint[]) AND state IN ('dead', 'retry', 'blocked', 'topic')
RETURNING id, bucket, line, topic, key
"""

_TO_EDIT = """
-- find the row to edit
SELECT p.bucket, p.line, p.topic, p.key, p.state FROM outbox_parked p WHERE p.id = $1
"""

# Not waited for with the slot's lock in hand: its relay would wait too, with all of its slots.
_LOCK_ROW = """
-- lock the row to edit
SELECT o.{id} FROM {outbox} o WHERE o.{id} = $1 FOR NO KEY UPDATE NOWAIT
"""

_EDIT = """
-- edit
UPDATE {outbox} AS o SET {assignments} WHERE o.{id} = $1 AND o.{sent_at} IS NULL AND o.{parked_at} IS NOT NULL
RETURNING o.{id}
"""

_EDIT_PARKED = """
-- edit where it waits
UPDATE outbox_parked SET topic = $2 WHERE id = $1
"""


@dataclass(frozen=True, slots=True)
class Selector:
    """Which rows: all that meet each of what is given. ``error`` is a class, as ``dead list`` shows it."""

    ids: tuple[int, ...] = ()
    key: str | None = None
    topic: str | None = None
    error: str | None = None

    @property
    def is_empty(self) -> bool:
        return not self.ids and (self.key, self.topic, self.error) == (None, None, None)

    def __str__(self) -> str:
        """For the audit, which is kept for long: a key may be somebody's name, so it isn't written down."""
        parts = [f"id {' '.join(map(str, self.ids))}"] if self.ids else []
        parts += [f"topic {self.topic}"] if self.topic is not None else []
        parts += ["a key"] if self.key is not None else []
        parts += [f"error {self.error}"] if self.error is not None else []
        return ", ".join(parts) or "all"

    def arguments(self) -> tuple[Any, ...]:
        return (list(self.ids) or None, self.key, self.topic, self.error)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows that a command is about to change; only these, and only if they are still in one of ``states``."""

    by_slot: Mapping[int, Sequence[int]]
    by_state: Mapping[str, int]

    @property
    def rows(self) -> int:
        return sum(self.by_state.values())

    def missing(self, ids: Sequence[int]) -> set[int]:
        """Of these ids, those that weren't chosen."""
        return set(ids).difference(*self.by_slot.values())

    def __str__(self) -> str:
        return ", ".join(f"{rows:,} {state}" for state, rows in sorted(self.by_state.items())) or "none"


@dataclass(frozen=True, slots=True)
class Edit:
    """What is corrected of a message; None and nothing: left as it is. Raises InvalidMessageError for what the outbox
    would refuse."""

    topic: str | None = None
    set_headers: Mapping[str, str] = field(default_factory=dict)
    remove_headers: Sequence[str] = ()
    payload: bytes | None = None

    def __post_init__(self) -> None:
        Message("any" if self.topic is None else self.topic, b"", headers=self.set_headers)

    @property
    def is_empty(self) -> bool:
        return self.topic is None and not self.set_headers and not self.remove_headers and self.payload is None

    def __str__(self) -> str:
        """Which parts, without what is in them."""
        parts = ["topic"] if self.topic is not None else []
        parts += [f"header {name}" for name in sorted({*self.set_headers, *self.remove_headers})]
        parts += ["payload"] if self.payload is not None else []
        return f"corrected: {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A parked row, for a list. ``behind``: the rows that wait for it, counted up to ``MOST_BEHIND``."""

    id: int
    topic: str
    state: str
    attempts: int
    error: str | None
    reason: str | None
    parked_at: datetime
    due_at: datetime | None
    now: datetime
    behind: int


class DeadLetters:
    """The rows of one outbox that wait. Raises SourceUnavailableError and SchemaError, and RefusedError for what can't
    be done to a row as it is."""

    def __init__(self, session: Session, table: OutboxTable = OUTBOX) -> None:
        self._session = session
        self._table = table
        self._layout: schema.Layout | None = None
        self._names = {
            "outbox": quoted(table.name),
            "outbox_text": literal(quoted(table.name)),
            "payload_text": literal(table.payload),
            **{name: quoted(getattr(table, name)) for name in ("id", "event_id", "sent_at", "parked_at")},
        }

    # -- looking

    async def waiting(self, states: Sequence[str], selector: Selector, limit: int) -> list[Waiting]:
        """The oldest ``limit`` of them."""
        await self._verified()
        async with snapshot(self._session):
            rows = await self._session.fetch(_LIST, states, *selector.arguments(), limit)
        return [Waiting(**row) for row in rows]

    async def show(self, id_: int) -> dict[str, Any]:
        """Everything about a parked row but its payload; by the names of the JSON."""
        layout = await self._verified()
        type_ = await self._payload_type()
        table = self._table
        payload = f"o.{quoted(table.payload)}"
        statement = _SHOW.format(
            type=f"o.{quoted(table.type)}::text" if table.type else "NULL::text",
            headers=f"o.{quoted(table.headers)}::text" if table.headers else "NULL::text",
            created_at=created_at(table.created_at) if table.created_at else "NULL::text",
            payload=payload if type_ == "bytea" else f"{payload}::text",
            **self._names,
        )
        async with snapshot(self._session):
            rows = await self._session.fetch(statement, id_)
            history = await self._session.fetch(_HISTORY, id_)
        if not rows:
            raise RefusedError(_not_parked(id_) + _done_to_it(history))
        found = dict(rows[0])
        found["slot"] = found.pop("bucket") % layout.slots
        return {**found, "history": [dict(deed) for deed in history]}

    async def payload(self, id_: int) -> bytes | None:
        """As it would be published."""
        await self._verified()
        payload = f"o.{quoted(self._table.payload)}"
        if await self._payload_type() != "bytea":
            payload = f"convert_to({payload}::text, 'UTF8')"
        rows = await self._session.fetch(_PAYLOAD.format(payload=payload, **self._names), id_)
        if not rows:
            raise RefusedError(f"there is no row {id_} in the outbox")
        found: bytes | None = rows[0]["payload"]
        return found

    # -- deciding

    async def choose(self, states: Sequence[str], selector: Selector) -> Chosen:
        layout = await self._verified()
        rows = await self._session.fetch(_CHOOSE, states, *selector.arguments())
        by_slot: dict[int, list[int]] = {}
        for row in rows:
            by_slot.setdefault(row["bucket"] % layout.slots, []).append(row["id"])
        return Chosen(by_slot, Counter(row["state"] for row in rows))

    async def retry(self, chosen: Chosen, selector: str) -> int:
        """Have them tried again now, as if they had never been refused; how many."""

        async def change(ids: Sequence[int]) -> list[int]:
            return [row["id"] for row in await self._session.fetch(_RETRY, ids)]

        return await self._change(chosen, Deed("dead retry", selector), change)

    async def discard(self, chosen: Chosen, selector: str, reason: str) -> int:
        """Never send them, and let go on what waits behind them; how many."""

        async def change(ids: Sequence[int]) -> list[int]:
            rows = await self._session.fetch(_DISCARD, ids)
            await self._release_next(rows)
            return [row["id"] for row in rows]

        return await self._change(chosen, Deed("dead discard", selector, reason), change)

    async def edit(self, id_: int, edit: Edit) -> None:
        """Correct a row that was refused, and have it tried again now. With another topic it joins another line: order
        isn't kept for it."""
        layout = await self._verified()
        assignments, arguments = await self._changes(edit)
        before = await self._session.fetch(_TO_EDIT, id_)
        if not before:
            raise RefusedError(_not_parked(id_))
        lock_row = _LOCK_ROW.format(**self._names)
        statement = _EDIT.format(assignments=", ".join(assignments), **self._names)
        self._session.prepares([lock_row, statement])
        async with self._locked(before[0]["bucket"] % layout.slots):
            rows = await self._session.fetch(_TO_EDIT, id_)
            if not rows or rows[0]["state"] not in RETRIED:
                state = rows[0]["state"] if rows else "not parked any more"
                raise RefusedError(
                    f"row {id_} is {state}, and only a row that is dead or waits to be tried again can be corrected;"
                    f" `outbox-relay explain {id_}` says more"
                )
            with _refusals():
                await self._session.fetch(lock_row, id_)
                found = await self._session.fetch(statement, id_, *arguments)
            if not found:
                raise RefusedError(f"row {id_} was deleted from the outbox: discard it")
            if edit.topic is not None:
                await self._session.fetch(_EDIT_PARKED, id_, edit.topic)
                await self._release_next(rows)
            await self._session.fetch(_RETRY, [id_])
            await audit.record(self._session, Deed("dead retry --edit", f"id {id_}", str(edit)), [id_])

    async def _changes(self, edit: Edit) -> tuple[list[str], list[Any]]:
        """Assignments, and their arguments from $2 on."""
        table = self._table
        assignments: list[str] = []
        arguments: list[Any] = []

        def argument(value: Any) -> str:
            arguments.append(value)
            return f"${len(arguments) + 1}"

        if edit.topic is not None:
            (column, *others) = topic_columns(table.topic)
            if others or table.topic != f"{{{column}}}":
                raise RefusedError(
                    "the topic of this table is put together from columns (table.topic): it can't be corrected here"
                )
            assignments.append(f"{quoted(column)} = {argument(edit.topic)}")
        if edit.set_headers or edit.remove_headers:
            if not table.headers:
                raise RefusedError("this table has no headers (table.columns.headers)")
            column = quoted(table.headers)
            removed, set_ = argument(list(edit.remove_headers)), argument(json.dumps(dict(edit.set_headers)))
            assignments.append(
                f"{column} = (coalesce(o.{column}::text::jsonb, '{{}}') - {removed}::text[]) || {set_}::text::jsonb"
            )
        if edit.payload is not None:
            type_ = await self._payload_type()
            value = f"{argument(edit.payload)}::bytea"
            if type_ != "bytea":
                value = f"convert_from({value}, 'UTF8')::{type_}"
            assignments.append(f"{quoted(table.payload)} = {value}")
        return assignments, arguments

    # -- steps

    async def _verified(self) -> schema.Layout:
        if self._layout is None:
            async with self._session.transaction():
                with self._session.unavailable("read outbox_layout"):
                    self._layout = await schema.verify(await self._session.connection())
            audit.prepares(self._session, [_LOCK, _RETRY, _DISCARD, MAKE_NEXT_DUE, _TO_EDIT, _EDIT_PARKED])
        return self._layout

    async def _payload_type(self) -> str:
        ((type_,),) = await self._session.fetch(_PAYLOAD_TYPE.format(**self._names))
        return str(type_)

    async def _change(
        self, chosen: Chosen, deed: Deed, change: Callable[[Sequence[int]], Awaitable[Sequence[int]]]
    ) -> int:
        done = 0
        for slot, ids in sorted(chosen.by_slot.items()):
            for start in range(0, len(ids), MOST_ROWS_AT_ONCE):
                try:
                    async with self._locked(slot):
                        changed = await change(ids[start : start + MOST_ROWS_AT_ONCE])
                        if changed:
                            await audit.record(self._session, deed, sorted(changed))
                except SourceRefusedError:
                    raise  # again it would be the same
                except SourceUnavailableError as error:
                    raise SourceUnavailableError(
                        f"{error}; {done} of {chosen.rows} rows were changed before: give the command again"
                    ) from error
                done += len(changed)
        return done

    async def _release_next(self, rows: Sequence[asyncpg.Record]) -> None:
        """Whoever takes away what was before a row makes it due; else it would wait for nothing."""
        lines = {tuple(row[name] for name in ("bucket", "line", "topic", "key")) for row in rows}
        if lines:
            await self._session.fetch(MAKE_NEXT_DUE, *map(list, zip(*lines, strict=True)))

    @contextlib.asynccontextmanager
    async def _locked(self, slot: int) -> AsyncIterator[None]:
        """A transaction in which nobody else changes a parked row of the slot, nor claims from it."""
        async with audit.transaction(self._session):
            try:
                await self._session.fetch(_LOCK, slot)
            except SourceUnavailableError as error:
                if isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                    raise SourceUnavailableError(
                        f"slot {slot} was locked by its relay for {audit.LOCK_SECONDS:g} s: if that lasts, its host may"
                        " be frozen, or somebody else has locked it; look for it in pg_locks"
                    ) from error
                raise
            yield


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A correction that the table doesn't take is the operator's to mend."""
    try:
        yield
    except SourceUnavailableError as error:
        if isinstance(error.__cause__, (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)):
            raise RefusedError(f"the table doesn't take this correction: {error}") from error
        if isinstance(error.__cause__, asyncpg.LockNotAvailableError):
            raise RefusedError(
                "another session has the row locked: find it in pg_locks, or give the command again"
            ) from error
        raise


def _done_to_it(history: Sequence[asyncpg.Record]) -> str:
    """What operators did before it was sent or deleted, in the same line."""
    deeds = [
        f"{deed['command']} by {printable(deed['by_whom'])} as {printable(deed['by_role'])}"
        f" at {deed['at']:%Y-%m-%d %H:%M:%S} UTC" + (f" for “{printable(deed['reason'])}”" if deed["reason"] else "")
        for deed in history
    ]
    return f"; what was done to it: {', '.join(deeds)}" if deeds else ""


def _not_parked(id_: int) -> str:
    return f"row {id_} isn't parked; `outbox-relay explain {id_}` says what became of it"
