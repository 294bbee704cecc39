"""Small relays as people write them, each with its one classic mistake, and beside it the same relay mended.

Some mend the mistake before theirs and make the next one: publishing before marking, locking rows, locking buckets,
cutting keys. One call is one poll: it claims a few rows of the outbox, publishes them, marks them and says how many
it published. Where a test holds a relay, it calls ``at`` with the name of the step that it has done.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC
from typing import Any, Protocol, TypeAlias

import asyncpg
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from outbox_relay.producer import Producer

BATCH_ROWS = 5

At: TypeAlias = Callable[[str], Awaitable[None]]


async def straight_on(_: str) -> None:
    """Hold nothing up."""


Relay: TypeAlias = Callable[[asyncpg.Connection, AIOKafkaProducer], Awaitable[int]]


class RelayWithSteps(Protocol):
    async def __call__(self, connection: asyncpg.Connection, producer: AIOKafkaProducer, at: At = ...) -> int: ...


LOCK_ROWS = """-- lock rows
SELECT * FROM outbox WHERE sent_at IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED"""

MARK = """-- mark
UPDATE outbox SET sent_at = now() WHERE id = ANY ($1)"""


async def publish(producer: AIOKafkaProducer, row: asyncpg.Record, **changes: Any) -> None:
    """Publish one row and wait for Kafka's answer; ``changes`` are other arguments for the producer."""
    headers = [
        ("id", str(row["event_id"]).encode()),
        ("outbox-id", str(row["id"]).encode()),
        ("created_at", row["created_at"].astimezone(UTC).isoformat().encode()),
        *((name, value.encode()) for name, value in json.loads(row["headers"]).items()),
    ]
    if row["type"] is not None:
        headers.append(("type", row["type"].encode()))
    record = {"key": row["key"].encode(), "value": row["payload"], "headers": headers}
    await producer.send_and_wait(row["topic"], **record | changes)


async def mark(connection: asyncpg.Connection, rows: Sequence[asyncpg.Record]) -> int:
    await connection.execute(MARK, [row["id"] for row in rows])
    return len(rows)


# -- marks before it publishes

MARK_NEXT = """-- mark next
UPDATE outbox SET sent_at = now()
WHERE id IN (SELECT id FROM outbox WHERE sent_at IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED)
RETURNING *"""


async def marks_then_publishes(connection: asyncpg.Connection, producer: AIOKafkaProducer, at: At = straight_on) -> int:
    rows = sorted(await connection.fetch(MARK_NEXT, BATCH_ROWS), key=lambda row: row["id"])
    await at("marked")
    for row in rows:
        await publish(producer, row)
    return len(rows)


async def publishes_then_marks(connection: asyncpg.Connection, producer: AIOKafkaProducer, at: At = straight_on) -> int:
    async with connection.transaction():
        rows = await connection.fetch(LOCK_ROWS, BATCH_ROWS)
        await at("claimed")
        for row in rows:
            await publish(producer, row)
        await at("published")
        return await mark(connection, rows)


# -- locks rows and nothing else, so that another takes the next rows of the same key: publishes_then_marks

LOCK_SLOTS = """-- lock slots
SELECT slot FROM outbox_slot FOR UPDATE SKIP LOCKED"""

LOCK_ROWS_OF_SLOTS = """-- lock rows of slots
SELECT * FROM outbox
WHERE bucket % (SELECT slots FROM outbox_layout) = ANY ($1) AND sent_at IS NULL
ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED"""


async def locks_slots_first(connection: asyncpg.Connection, producer: AIOKafkaProducer, at: At = straight_on) -> int:
    async with connection.transaction():
        slots = [row["slot"] for row in await connection.fetch(LOCK_SLOTS)]
        rows = await connection.fetch(LOCK_ROWS_OF_SLOTS, slots, BATCH_ROWS)
        await at("claimed")
        for row in rows:
            await publish(producer, row)
        return await mark(connection, rows)


# -- skips a row that a stranger has locked and goes on behind it: locks_slots_first

SEE_ROWS_OF_SLOTS = """-- see rows of slots
SELECT id, topic, key FROM outbox
WHERE bucket % (SELECT slots FROM outbox_layout) = ANY ($1) AND sent_at IS NULL
ORDER BY id LIMIT $2"""

LOCK_SEEN_ROWS = """-- lock seen rows
SELECT * FROM outbox WHERE id = ANY ($1) AND sent_at IS NULL FOR UPDATE SKIP LOCKED"""


async def cuts_keys_at_locked_rows(connection: asyncpg.Connection, producer: AIOKafkaProducer) -> int:
    async with connection.transaction():
        slots = [row["slot"] for row in await connection.fetch(LOCK_SLOTS)]
        seen = await connection.fetch(SEE_ROWS_OF_SLOTS, slots, BATCH_ROWS)
        locked = {row["id"]: row for row in await connection.fetch(LOCK_SEEN_ROWS, [row["id"] for row in seen])}
        rows, cut = [], set()
        for row in seen:
            line = (row["topic"], row["key"])
            if row["id"] not in locked:
                cut.add(line)
            elif line not in cut:
                rows.append(locked[row["id"]])
                await publish(producer, rows[-1])
        return await mark(connection, rows)


# -- remembers how far it has read and reads on from there, although ids become visible out of order

CURSOR = """-- cursor
CREATE TABLE cursor (xid xid8 NOT NULL, id bigint NOT NULL);
INSERT INTO cursor VALUES ('0', 0);
ALTER TABLE outbox ADD COLUMN xid xid8 NOT NULL DEFAULT pg_current_xact_id();
"""

ROWS_BEHIND_CURSOR = """-- rows behind the cursor
SELECT outbox.* FROM outbox, cursor WHERE outbox.id > cursor.id ORDER BY outbox.id LIMIT $1"""

FINISHED_ROWS_BEHIND_CURSOR = """-- finished rows behind the cursor
SELECT outbox.* FROM outbox, cursor
WHERE (outbox.xid, outbox.id) > (cursor.xid, cursor.id) AND outbox.xid < pg_snapshot_xmin(pg_current_snapshot())
ORDER BY outbox.xid, outbox.id LIMIT $1"""

MOVE_CURSOR = """-- move the cursor
UPDATE cursor SET (xid, id) = (SELECT xid, id FROM outbox WHERE id = $1)"""


async def reads_on_from_a_cursor(
    connection: asyncpg.Connection, producer: AIOKafkaProducer, *, read: str = ROWS_BEHIND_CURSOR
) -> int:
    rows = await connection.fetch(read, BATCH_ROWS)
    for row in rows:
        await publish(producer, row)
    if rows:
        await connection.execute(MOVE_CURSOR, rows[-1]["id"])
    return len(rows)


async def reads_on_behind_a_fence(connection: asyncpg.Connection, producer: AIOKafkaProducer) -> int:
    return await reads_on_from_a_cursor(connection, producer, read=FINISHED_ROWS_BEHIND_CURSOR)


# -- puts a row that was refused off until later, and goes on with the next row of its key


async def puts_refused_rows_off(connection: asyncpg.Connection, producer: AIOKafkaProducer) -> int:
    async with connection.transaction():
        rows = []
        for row in await connection.fetch(LOCK_ROWS, BATCH_ROWS):
            try:
                await publish(producer, row)
            except KafkaError:
                continue
            rows.append(row)
        return await mark(connection, rows)


async def puts_keys_of_refused_rows_off(connection: asyncpg.Connection, producer: AIOKafkaProducer) -> int:
    async with connection.transaction():
        rows, halted = [], set()
        for row in await connection.fetch(LOCK_ROWS, BATCH_ROWS):
            line = (row["topic"], row["key"])
            if line in halted:
                continue
            try:
                await publish(producer, row)
            except KafkaError:
                halted.add(line)
                continue
            rows.append(row)
        return await mark(connection, rows)


# -- leaves a producer alone that didn't answer in time, and goes on with another


class LeavesProducers:
    """Publishes within a deadline. ``connect`` makes a producer that is started."""

    def __init__(self, connect: Callable[[], Awaitable[AIOKafkaProducer]]) -> None:
        self._connect = connect
        self._producer: AIOKafkaProducer | None = None
        self.deadline: asyncio.Timeout  #: of the poll under way

    async def poll(self, connection: asyncpg.Connection) -> int:
        if self._producer is None:
            self._producer = await self._connect()
        async with connection.transaction():
            rows = await connection.fetch(LOCK_ROWS, BATCH_ROWS)
            try:
                async with asyncio.timeout(30) as self.deadline:
                    await asyncio.gather(*(publish(self._producer, row) for row in rows))
            except (TimeoutError, KafkaError):
                await self._let_go(self._producer)
                self._producer = None
                return 0
            return await mark(connection, rows)

    async def _let_go(self, producer: AIOKafkaProducer) -> None:
        """It isn't stopped, since that would first wait for its answers."""


class CutsProducersOff(LeavesProducers):
    """The same, but a producer is abandoned as the real relay does it."""

    def __init__(self, connect: Callable[[], Awaitable[AIOKafkaProducer]]) -> None:
        async def connect_and_watch() -> AIOKafkaProducer:
            producer = await connect()
            self._watched = Producer(producer, connect_timeout_seconds=30)
            return producer

        super().__init__(connect_and_watch)

    async def _let_go(self, producer: AIOKafkaProducer) -> None:
        await self._watched.abandon()


# -- publishes what isn't committed yet, since it is called where the row is written


async def publishes_inside_the_transaction(
    write: Callable[[], Awaitable[None]], connection: asyncpg.Connection, producer: AIOKafkaProducer
) -> None:
    async with connection.transaction():
        await write()
        await publishes_then_marks(connection, producer)


async def publishes_after_the_transaction(
    write: Callable[[], Awaitable[None]], connection: asyncpg.Connection, producer: AIOKafkaProducer
) -> None:
    async with connection.transaction():
        await write()
    await publishes_then_marks(connection, producer)


# -- chooses partitions as librdkafka does by default


async def partitions_by_crc32(connection: asyncpg.Connection, producer: AIOKafkaProducer) -> int:
    async with connection.transaction():
        rows = await connection.fetch(LOCK_ROWS, BATCH_ROWS)
        for row in rows:
            partitions = await producer.partitions_for(row["topic"])
            await publish(producer, row, partition=crc32_partition(row["key"].encode(), len(partitions)))
        return await mark(connection, rows)


def crc32_partition(key: bytes, partitions: int) -> int:
    return zlib.crc32(key) % partitions


# -- decodes payloads, and so publishes what another encoder makes of them


async def reencodes_json(connection: asyncpg.Connection, producer: AIOKafkaProducer) -> int:
    async with connection.transaction():
        rows = await connection.fetch(LOCK_ROWS, BATCH_ROWS)
        for row in rows:
            await publish(producer, row, value=json.dumps(json.loads(row["payload"])).encode())
        return await mark(connection, rows)
