"""Sends rows again that were sent: as copies with ids of their own, so behind all that waits, by whoever owns the slot.

A copy has everything of its original, the event id too, and the header ``replay-of``, the original's id. So a consumer
that drops what it has seen drops it, unless it wants to see it again. What is a copy already isn't copied. Originals
stay as they are.

There is no index on ``sent_at``: the table is walked once along its primary key, in steps, each a short statement.
Copies are written a few at a time, each batch a transaction with its row of ``outbox_audit``.
"""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass
from datetime import datetime

from outbox_relay import audit, schema
from outbox_relay.audit import Deed
from outbox_relay.errors import RefusedError, SourceUnavailableError
from outbox_relay.message import REPLAY_HEADER
from outbox_relay.source.session import Session
from outbox_relay.source.snapshot import one, snapshot
from outbox_relay.source.statements import OUTBOX, OutboxTable, literal, quoted, topic_of

#: One statement looks at no more rows, and one transaction writes no more.
ROWS_A_STEP = 20_000
MOST_ROWS_AT_ONCE = 500
#: So often a second copies are written, where the rate allows more than one each time.
_BATCHES_A_SECOND = 5

_LAST_ID = """
-- replay: the last id
SELECT max(o.{id}) AS id FROM {outbox} o
"""

_PRUNED = """
-- replay: until when rows were deleted
SELECT l.pruned_until, l.pruned_until > now() AS deletes_sent FROM outbox_layout l
"""

_STEP = """
-- replay: look for sent rows
SELECT max(w.id) AS last_id, count(*) AS looked_at,
       coalesce(array_agg(w.id ORDER BY w.id) FILTER (WHERE w.is_meant), '{{}}') AS ids,
       min(w.sent_at) FILTER (WHERE w.is_meant) AS first_sent_at,
       max(w.sent_at) FILTER (WHERE w.is_meant) AS last_sent_at
FROM (
    SELECT o.{id} AS id, o.{sent_at} AS sent_at,
           (o.{sent_at} >= $4 AND o.{sent_at} < $5 AND {topic} = $6 AND ($7::text IS NULL OR {key} = $7)
            AND NOT {headers} ? '{header}') IS TRUE AS is_meant
    FROM {outbox} o WHERE o.{id} > $1 AND o.{id} <= $2 ORDER BY o.{id} LIMIT $3
) AS w
"""

# Whatever columns the table has; those that PostgreSQL fills in by itself are left to it.
_COLUMNS = """
-- replay: the columns to copy
SELECT a.attname FROM pg_attribute a
WHERE a.attrelid = {outbox_text}::regclass AND a.attnum > 0 AND NOT a.attisdropped
  AND a.attgenerated = '' AND a.attidentity = '' AND a.attname <> ALL ($1::text[])
ORDER BY a.attnum
"""

# What may be there once only, and would be there twice.
_UNIQUE = """
-- replay: what may not be copied
SELECT i.indexrelid::regclass::text AS name FROM pg_index i
WHERE i.indrelid = {outbox_text}::regclass AND i.indisunique AND i.indpred IS NULL
  AND NOT EXISTS (
      SELECT FROM pg_attribute a
      WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::int2[]) AND a.attname <> ALL ($1::text[])
  )
"""

_COPY = """
-- replay: copy
INSERT INTO {outbox} ({columns}, {headers_column})
SELECT {values}, {marked} FROM {outbox} o
WHERE o.{id} = ANY ($1::bigint[]) AND o.{sent_at} IS NOT NULL
ORDER BY o.{id}
RETURNING {id} AS id
"""


@dataclass(frozen=True, slots=True)
class Range:
    """Rows of a topic, or of a key of it, that were sent at ``since`` or later and before ``until``, with an id above
    ``after``."""

    topic: str
    key: str | None
    since: datetime
    until: datetime
    after: int = -(2**63)

    def __str__(self) -> str:
        """For the audit, without the key."""
        key = "" if self.key is None else ", a key"
        return f"topic {self.topic}{key}, sent from {self.since.isoformat()} until {self.until.isoformat()}"


@dataclass(frozen=True, slots=True)
class Found:
    """The ids of the originals, in order, and when the first and the last of them were sent."""

    ids: array[int]
    first_sent_at: datetime | None
    last_sent_at: datetime | None


class Replay:
    """Raises SourceUnavailableError, SchemaError, and RefusedError where this can't be replayed."""

    def __init__(self, session: Session, range_: Range, table: OutboxTable = OUTBOX) -> None:
        self._session = session
        self._range = range_
        self._table = table
        given = f"coalesce(o.{quoted(table.headers)}::text::jsonb, '{{}}')" if table.headers else "'{}'::jsonb"
        # What isn't an object of headers is sent as one header by that name, and so it stays.
        headers = (
            f"(CASE WHEN jsonb_typeof({given}) = 'object' THEN {given} ELSE jsonb_build_object('headers', {given}) END)"
        )
        self._names = {
            "outbox": quoted(table.name),
            "outbox_text": literal(quoted(table.name)),
            "topic": topic_of(table.topic),
            "key": f"o.{quoted(table.key)}::text",
            "headers": headers,
            "header": REPLAY_HEADER,
            **{name: quoted(getattr(table, name)) for name in ("id", "sent_at")},
        }

    async def find(self) -> Found:
        """Which rows that is; looks at every row of the table."""
        async with self._session.transaction():
            with self._session.unavailable("read outbox_layout"):
                await schema.verify(await self._session.connection())
            await self._refuse_what_was_deleted()
        if not self._table.headers:
            raise RefusedError("this table has no headers (table.columns.headers), so that copies couldn't be marked")
        ids: array[int] = array("q")
        sent_at: list[datetime] = []
        ((last_id,),) = await self._session.fetch(_LAST_ID.format(**self._names))
        before = self._range.after
        while last_id is not None and before < last_id:
            range_ = self._range
            async with snapshot(self._session):
                step = await one(
                    self._session,
                    _STEP.format(**self._names),
                    *(before, last_id, ROWS_A_STEP, range_.since, range_.until, range_.topic, range_.key),
                )
            ids.extend(step["ids"])
            sent_at += [step["first_sent_at"], step["last_sent_at"]] if step["ids"] else []
            if step["looked_at"] < ROWS_A_STEP:
                break
            before = step["last_id"]
        return Found(ids, min(sent_at, default=None), max(sent_at, default=None))

    async def copy(self, found: Found, rows_per_second: float) -> int:
        """Write the copies, no faster than that."""
        statement = await self._copy_statement()
        batch_rows = max(1, min(MOST_ROWS_AT_ONCE, int(rows_per_second / _BATCHES_A_SECOND)))
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        done = 0
        for start in range(0, len(found.ids), batch_rows):
            await asyncio.sleep(next_at - loop.time())
            batch = found.ids[start : start + batch_rows].tolist()
            try:
                await self._copy_batch(statement, batch)
            except (SourceUnavailableError, RefusedError) as error:
                raise type(error)(
                    f"{error}; {done} of {len(found.ids)} rows were copied before"
                    f"{f': go on with --after {found.ids[start - 1]}' if start else ''}"
                ) from error
            done += len(batch)
            next_at = max(next_at, loop.time() - 1.0) + len(batch) / rows_per_second
        return done

    async def _copy_batch(self, statement: str, ids: list[int]) -> None:
        async with audit.transaction(self._session):
            copies = await self._session.fetch(statement, ids)
            # Said before rows are deleted, so that what is missing here is found there.
            await self._refuse_what_was_deleted()
            if len(copies) < len(ids):
                raise RefusedError("rows were deleted meanwhile, so copies would be missing")
            await audit.record(self._session, Deed("replay", str(self._range)), ids)

    async def _refuse_what_was_deleted(self) -> None:
        ((pruned_until, deletes_sent),) = await self._session.fetch(_PRUNED)
        if deletes_sent:
            raise RefusedError(
                'relays delete what they have sent (relay.after_publish = "delete"), so what is left may have holes:'
                " have the application write these messages again"
            )
        if pruned_until is not None and self._range.since < pruned_until:
            raise RefusedError(
                f"rows that were sent before {pruned_until.isoformat()} may have been deleted, so what is left from"
                f" {self._range.since.isoformat()} on may have holes: replay from then on, or from a backup"
            )

    async def _copy_statement(self) -> str:
        table = self._table
        own = [table.id, table.sent_at, table.parked_at, table.headers]
        columns = [row["attname"] for row in await self._session.fetch(_COLUMNS.format(**self._names), own)]
        once = await self._session.fetch(_UNIQUE.format(**self._names), columns)
        if once:
            raise RefusedError(
                f"{once[0]['name']} lets a row be there only once, so there can be no copy with the same event id: have"
                " the application write these messages again"
            )
        return _COPY.format(
            columns=", ".join(map(quoted, columns)),
            values=", ".join(f"o.{quoted(column)}" for column in columns),
            headers_column=quoted(table.headers),
            marked=f"{self._names['headers']} || jsonb_build_object('{REPLAY_HEADER}', o.{quoted(table.id)}::text)",
            **self._names,
        )
