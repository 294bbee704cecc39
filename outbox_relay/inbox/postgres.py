"""Handle once, where the effects are in PostgreSQL: exactly one effect each, whatever dies in between.

    inbox = Inbox("payments")

    async for message in consumer:
        async with pool.acquire() as connection, connection.transaction():
            if await inbox.accept(connection, message):
                await charge(connection, message)
        await consumer.commit({TopicPartition(message.topic, message.partition): message.offset + 1})

The message's id is inserted into the table ``inbox`` in the very transaction of the handler's writes, so they are
committed together or not at all. Nothing here commits, begins or rolls back that transaction, and the offset is
committed only after it: a crash before its COMMIT leaves nothing, one after it has the message come again and be
skipped. A COMMIT whose answer was lost is no different.

**At once.** Where another session handles the same message, ``accept`` waits for the end of that transaction: if it
commits, the message is not new; if it rolls back, it is. So neither races the other. Under REPEATABLE READ and
SERIALIZABLE PostgreSQL can't skip what a later transaction committed: the one that waited fails with a serialization
failure (40001), is to be rolled back, and finds the message handled when it tries again.

**Deadlocks.** A batch inserts its ids in their order, so batches don't deadlock. A transaction that accepts more than
once may, with another that does so in another order; PostgreSQL then fails one of them (40P01), to be tried again.

**What it stands on.** The transaction must be durable before the offset is committed: with ``synchronous_commit`` on,
and failing over only to a synchronous standby. Otherwise a crash of the server takes back id and effects of a message
that Kafka won't bring again.

**For how long.** Ids are kept until :meth:`Inbox.prune` deletes them. A repeat that comes later than that is new.

Relies on the primary key ``(consumer, message_id)``, and pruning on the index ``inbox_handled (consumer, handled_at)``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_relay.errors import InTransactionError
from outbox_relay.inbox.ids import ConsumedMessage, MessageId, id_of
from outbox_relay.inbox.names import checked_name
from outbox_relay.inbox.transaction import Connection, fetch, require

M = TypeVar("M", bound=ConsumedMessage)

#: The most rows that are deleted in one transaction.
PRUNE_ROWS = 1_000

# ON CONFLICT waits for whoever is inserting the same id, row by row in the order of the array.
_ACCEPT = """\
-- accept messages
INSERT INTO {schema}inbox (consumer, message_id)
SELECT CAST($1 AS text), id FROM unnest(CAST($2 AS text[])) AS id
ON CONFLICT (consumer, message_id) DO NOTHING
RETURNING message_id
"""

# A batch that a crash takes back is only deleted again, so nobody waits for a disk or a standby. And of a table whose
# statistics are of its quiet hours, the planner would read all for each batch.
_PRUNE_SETTINGS = """\
-- settings to prune the inbox
SELECT set_config('synchronous_commit', 'off', true),
       set_config('enable_seqscan', 'off', true),
       set_config('enable_bitmapscan', 'off', true),
       set_config('jit', 'off', true)
"""

# From where the batch before it ended, so as not to step over what that one deleted.
_PRUNE = """\
-- prune the inbox
WITH old AS MATERIALIZED (
    SELECT ctid AS place
    FROM {schema}inbox
    WHERE consumer = CAST($1 AS text)
      AND handled_at >= coalesce(CAST($2 AS timestamptz), '-infinity')
      AND handled_at < now() - make_interval(secs => CAST($3 AS double precision))
    ORDER BY handled_at
    LIMIT CAST($4 AS integer)
    FOR UPDATE SKIP LOCKED
), pruned AS (
    DELETE FROM {schema}inbox WHERE ctid = ANY (ARRAY(SELECT place FROM old)) RETURNING handled_at
)
SELECT count(*), max(handled_at) FROM pruned
"""


@dataclass(frozen=True, slots=True)
class Pruned:
    """``rows`` were deleted; ``is_all`` says that nothing was left, but for rows that somebody had locked."""

    rows: int
    is_all: bool


class Inbox:
    """What one consumer has handled. It keeps nothing in memory: any number of them, in any process, are one.

    ``consumer`` names whoever handles each message once, 1 to 200 bytes: usually the consumer group. Two that both
    handle a topic need two names. ``message_id`` says a message's id; without it that is the header ``id``, or
    ``ce_id``. Raises ValueError for a name that can't be one.
    """

    def __init__(self, consumer: str, *, message_id: MessageId | None = None) -> None:
        self.consumer = checked_name(consumer)
        self._message_id = message_id

    async def accept(self, connection: Connection, message: ConsumedMessage) -> bool:
        """Whether the message is new: then it counts as handled once this transaction commits, and only then.

        ``connection`` is a SQLAlchemy ``AsyncSession``, ``async_scoped_session`` or ``AsyncConnection``, or an asyncpg
        connection, in the transaction of the handler's writes. Waits while another transaction handles the same
        message. Within a savepoint it shares that savepoint's fate. Pending ORM objects are not flushed.

        Raises NotInTransactionError, MissingMessageIdError, and the driver's own errors, after which the transaction
        is to be rolled back and the message to be handled again.
        """
        return bool(await self.accept_batch(connection, [message]))

    async def accept_batch(self, connection: Connection, messages: Iterable[M]) -> list[M]:
        """The messages that are new, in their order, each once although it may be twice among them; as :meth:`accept`.

        One statement, however many they are.
        """
        firsts: dict[str, M] = {}
        for message in messages:
            firsts.setdefault(id_of(message, self._message_id), message)
        if not firsts:
            await require(connection)
            return []
        # In one order everywhere, so that of two batches each waits for the other's ids in turn, and no two for ever.
        rows = await fetch(connection, _ACCEPT, self.consumer, sorted(firsts))
        new = {row[0] for row in rows}
        return [message for id_, message in firsts.items() if id_ in new]

    async def prune(
        self,
        database: AsyncEngine | asyncpg.Connection | PoolConnectionProxy,
        *,
        keep_seconds: float,
        deadline_seconds: float = 10.0,
    ) -> Pruned:
        """Delete the ids of messages that were handled longer ago than ``keep_seconds``, of this consumer alone.

        ``keep_seconds`` must exceed how late a repeat may come. That is as long as the topic keeps its messages
        (``retention.ms``), if a consumer's offsets may be lost or reset to the beginning; for ever, if it is
        compacted; and as long as a dead letter may wait to be sent again, if that keeps its id.

        Each batch is a transaction of its own, of 1,000 rows at most, and waits for nobody: rows that somebody has
        locked stay for the next time. After ``deadline_seconds`` no further batch is begun. To be called now and then
        by one of a consumer's processes; several at once do no harm. On an asyncpg connection outside a transaction,
        or on an ``AsyncEngine``. The database's clock counts.

        Raises InTransactionError on a connection in a transaction, ValueError for a time that isn't positive.
        """
        if not keep_seconds > 0:
            raise ValueError(f"keep_seconds must be above 0, not {keep_seconds}: repeats would be handled again")
        if not isinstance(database, AsyncEngine) and database.is_in_transaction():
            raise InTransactionError(
                "this connection is in a transaction, and each batch is to be one of its own: prune on another"
            )
        ends = time.monotonic() + deadline_seconds
        rows, after = 0, None
        while True:
            deleted, until = await self._prune_batch(database, after, keep_seconds)
            rows += deleted
            after = until or after
            if deleted < PRUNE_ROWS:
                return Pruned(rows, is_all=True)
            if time.monotonic() >= ends:
                return Pruned(rows, is_all=False)

    async def _prune_batch(
        self,
        database: AsyncEngine | asyncpg.Connection | PoolConnectionProxy,
        after: datetime | None,
        keep_seconds: float,
    ) -> tuple[int, datetime | None]:
        arguments = (self.consumer, after, keep_seconds, PRUNE_ROWS)
        if isinstance(database, AsyncEngine):
            async with database.begin() as connection:
                await fetch(connection, _PRUNE_SETTINGS)
                ((deleted, until),) = await fetch(connection, _PRUNE, *arguments)
        else:
            async with database.transaction():
                await fetch(database, _PRUNE_SETTINGS)
                ((deleted, until),) = await fetch(database, _PRUNE, *arguments)
        return deleted, until
