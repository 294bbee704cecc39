"""Handle once without a table of ids: how far a consumer has come is committed together with the effects.

    offsets = Offsets("payments")
    consumer.subscribe(["orders"], listener=Seek(offsets, consumer, pool))  # see SeekOnAssignment

    async for message in consumer:
        async with pool.acquire() as connection, connection.transaction():
            if await offsets.accept(connection, message):
                await charge(connection, message)

One row a partition, in ``inbox_offset``, in the transaction of the handler's writes: nothing here commits, begins or
rolls back that. Kafka's own offsets are not used; whoever is given a partition seeks to what the row says.

**A partition has one owner.** To take it is to write a token of one's own into its row. That waits for a transaction
that the last owner has open, and reads what it committed; whoever owned it before is then refused by ``accept``. So
after a rebalance nobody handles what another has handled, however late he learns of it.

**Nothing is passed over.** What ``accept`` was asked about must be handled before what comes after it, also where it
was refused, rolled back, or lost with its connection, and the partition has changed hands since.

**What it doesn't tell** is what its producer sent twice: those are two offsets; :mod:`~outbox_relay.inbox.postgres`
does. Nor that a topic was deleted and made again, once the new one is longer than what was handled of the old.

Relies on the primary key of ``inbox_offset``, ``(consumer, topic, partition)``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar
from uuid import UUID, uuid4

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_relay.errors import OffsetGoneError, PartitionBusyError, PartitionLostError, PassedOverError
from outbox_relay.inbox.ids import ConsumedMessage
from outbox_relay.inbox.names import checked_name
from outbox_relay.inbox.outages import is_outage
from outbox_relay.inbox.transaction import Connection, fetch, require

M = TypeVar("M", bound=ConsumedMessage)

_LOCK_NOT_AVAILABLE = "55P03"
_TRY_SECONDS = 10.0
_PAUSE_SECONDS = 1.0

_BOUND = """\
-- wait so long for locks, until the transaction ends
SELECT set_config('lock_timeout', CAST($1 AS text), true)
"""

# It waits for the transaction that the last owner has open. What it inserts for a new partition is where that begins.
_TAKE = """\
-- take a partition
INSERT INTO {schema}inbox_offset AS o (consumer, topic, partition, next_offset, owner)
VALUES (CAST($1 AS text), CAST($2 AS text), CAST($3 AS integer), CAST($4 AS bigint), CAST($5 AS uuid))
ON CONFLICT (consumer, topic, partition) DO UPDATE SET owner = CAST($5 AS uuid)
RETURNING o.next_offset
"""

_LOCK = """\
-- lock a partition
SELECT owner, next_offset, CAST(pg_current_xact_id() AS text) FROM {schema}inbox_offset
WHERE consumer = CAST($1 AS text) AND topic = CAST($2 AS text) AND partition = CAST($3 AS integer)
FOR UPDATE
"""

_MOVE = """\
-- move the offset
UPDATE {schema}inbox_offset SET next_offset = CAST($4 AS bigint)
WHERE consumer = CAST($1 AS text) AND topic = CAST($2 AS text) AND partition = CAST($3 AS integer)
RETURNING next_offset
"""


class Offsets:
    """How far one consumer has come. It remembers the partitions that it took: one for each Kafka consumer.

    ``consumer`` is as for :class:`~outbox_relay.inbox.postgres.Inbox`. ``lock_timeout_seconds`` bounds what
    :meth:`take` waits for a transaction that another has open.
    """

    def __init__(self, consumer: str, *, lock_timeout_seconds: float = 3.0) -> None:
        self.consumer = checked_name(consumer)
        self._lock_timeout_ms = max(1, round(lock_timeout_seconds * 1000))  # 0 would be no bound
        self._owners: dict[tuple[str, int], UUID] = {}
        self._refused: dict[tuple[str, int], Exception] = {}
        # What accept was asked about, less what is known to be committed; and the transaction of the last accept.
        self._asked: dict[tuple[str, int], set[int]] = {}
        self._transactions: dict[tuple[str, int], str] = {}

    async def take(self, connection: Connection, topic: str, partition: int, *, beginning: int, end: int) -> int:
        """Own the partition once this transaction commits; the offset to go on from.

        ``beginning`` and ``end`` are where the partition begins and ends in Kafka; a consumer that has never had it
        begins at the beginning. Waits for a transaction that its last owner has open; PostgreSQL's ``lock_timeout`` is
        set until this transaction ends.

        Raises NotInTransactionError, PartitionBusyError where that takes too long, which may pass, and OffsetGoneError
        where Kafka no longer has that offset.
        """
        owner = uuid4()
        self.drop(topic, partition)
        await fetch(connection, _BOUND, f"{self._lock_timeout_ms}ms")
        try:
            rows = await fetch(connection, _TAKE, self.consumer, topic, partition, beginning, owner)
        except Exception as error:
            # SQLAlchemy has the driver's error in its own.
            if getattr(getattr(error, "orig", error), "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            raise PartitionBusyError(
                f"the last {self.consumer!r} with {topic}, partition {partition}, has had a transaction open for"
                f" {self._lock_timeout_ms} ms: try again, or end that"
            ) from error
        offset: int = rows[0][0]
        if not beginning <= offset <= end:
            why = (
                f"what follows until {beginning} was deleted before it was handled"
                if offset < beginning
                else "the topic was made anew, or lost what it had"
            )
            raise OffsetGoneError(
                f"consumer {self.consumer!r} is at offset {offset} of {topic}, partition {partition}, which has offsets"
                f" {beginning} to {end}: {why}. Find out what is missing; then to go on, UPDATE inbox_offset SET"
                f" next_offset = {beginning} for it, which handles all that is there"
            )
        self._owners[topic, partition] = owner
        return offset

    def drop(self, topic: str, partition: int) -> None:
        """The partition is no longer this one's; what it has open may still be committed."""
        self._owners.pop((topic, partition), None)
        self._refused.pop((topic, partition), None)

    def refuse(self, topic: str, partition: int, error: Exception) -> None:
        """The partition couldn't be taken: each of its messages raises that, until it is taken."""
        self.drop(topic, partition)
        self._refused[topic, partition] = error

    async def accept(self, connection: Connection, message: ConsumedMessage) -> bool:
        """Whether the message is new: then it counts as handled once this transaction commits, and only then.

        ``connection`` is as for ``Inbox.accept``. Raises NotInTransactionError; PartitionLostError where another has
        the partition, or it isn't taken here; OffsetGoneError as :meth:`take`; PassedOverError where this was asked
        about a message before this one, which isn't handled yet. After any of them the transaction is to be rolled
        back.
        """
        return bool(await self.accept_batch(connection, [message]))

    async def accept_batch(self, connection: Connection, messages: Sequence[M]) -> list[M]:
        """The messages that are new; all of one partition, in its order; as :meth:`accept`. Two statements."""
        if not messages:
            await require(connection)
            return []
        topic, partition = messages[0].topic, messages[0].partition
        if any((message.topic, message.partition) != (topic, partition) for message in messages):
            raise ValueError("the messages of a batch must be of one partition: accept those of each by themselves")
        # Before anything can fail: whatever becomes of this, they come before what is asked about next.
        self._asked.setdefault((topic, partition), set()).update(message.offset for message in messages)
        owner = self._owner(topic, partition)
        rows = await fetch(connection, _LOCK, self.consumer, topic, partition)
        if not rows or UUID(str(rows[0][0])) != owner:
            raise PartitionLostError(
                f"another {self.consumer!r} has taken {topic}, partition {partition}: roll back, it handles the message"
            )
        offset: int = rows[0][1]
        ahead = {each for each in self._asked[topic, partition] if each >= offset}
        # What this transaction itself has moved the offset past may be rolled back yet.
        if self._transactions.get((topic, partition)) != rows[0][2]:
            self._asked[topic, partition], self._transactions[topic, partition] = ahead, rows[0][2]
        new = [message for message in messages if message.offset >= offset]
        if not new:
            return []
        # Offsets have gaps, so the row alone doesn't tell that a message is missing.
        if (first := min(ahead)) < new[0].offset:
            raise PassedOverError(
                f"the message at offset {new[0].offset} of {topic}, partition {partition}, comes after {first}, which"
                f" isn't handled: roll back, and handle that first, or seek to {offset}; where Kafka no longer has it,"
                " start the consumer anew"
            )
        await fetch(connection, _MOVE, self.consumer, topic, partition, new[-1].offset + 1)
        return new

    def _owner(self, topic: str, partition: int) -> UUID:
        if (owner := self._owners.get((topic, partition))) is not None:
            return owner
        # Made anew each time, or one error's traceback would grow.
        kept = self._refused.get((topic, partition))
        if isinstance(kept, OffsetGoneError):
            raise OffsetGoneError(str(kept)) from kept
        why = "isn't taken here" if kept is None else f"couldn't be taken, start the consumer anew: {kept!r}"
        raise PartitionLostError(f"{topic}, partition {partition}, {why}") from kept


class Partition(Protocol):
    """What is asked of a partition; aiokafka's ``TopicPartition`` has it."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...


class SeekOnAssignment:
    """Takes each partition that the consumer is given, and seeks to where its effects end.

        class Seek(SeekOnAssignment, ConsumerRebalanceListener):
            pass

    is a listener as aiokafka's ``subscribe`` takes it; nothing of the inbox imports aiokafka.

    The consumer has ``auto_offset_reset="none"``, so that it raises OffsetOutOfRangeError where Kafka deletes messages
    before it reads them, instead of passing over them; anything else is a ValueError. ``enable_auto_commit=False``.

    ``database`` is an asyncpg pool or a SQLAlchemy ``AsyncEngine``. Each partition is paused until it is taken, and
    holds up no other. An outage, or an open transaction of its last owner, is waited out, for ``give_up_seconds``. What
    it can't be taken for is then raised by ``accept`` for each of its messages, from its beginning on.
    """

    def __init__(
        self, offsets: Offsets, consumer: Any, database: asyncpg.Pool | AsyncEngine, *, give_up_seconds: float = 60.0
    ) -> None:
        if getattr(consumer, "_auto_offset_reset", "none") != "none":
            raise ValueError('the consumer must have auto_offset_reset="none", or it may pass over messages in silence')
        self._offsets = offsets
        self._consumer = consumer
        self._database = database
        self._give_up_seconds = give_up_seconds
        self._taking: dict[Partition, asyncio.Task[None]] = {}

    async def on_partitions_revoked(self, revoked: Iterable[Partition]) -> None:
        for each in revoked:
            if (task := self._taking.pop(each, None)) is not None:
                task.cancel()
            self._offsets.drop(each.topic, each.partition)

    async def on_partitions_assigned(self, assigned: Iterable[Partition]) -> None:
        """Begins to take them, and returns: while a listener runs, aiokafka sends no heartbeats."""
        partitions = list(assigned)
        await self.on_partitions_revoked(partitions)
        for each in partitions:
            # At once: with a position nobody asks the group for one, and nothing is fetched when paused.
            self._consumer.pause(each)
            self._consumer.seek(each, 0)
            self._taking[each] = asyncio.create_task(self._take_and_seek(each))

    async def _take_and_seek(self, each: Partition) -> None:
        try:
            offset = await self._take(each)
        except Exception as error:
            self._offsets.refuse(each.topic, each.partition, error)
            # Its first message, whichever that is, is to raise it.
            await self._consumer.seek_to_beginning(each)
        else:
            self._consumer.seek(each, offset)
        self._consumer.resume(each)

    async def _take(self, each: Partition) -> int:
        """Again and again, as long as what fails may pass."""
        ends = time.monotonic() + self._give_up_seconds
        while True:
            self._end_if_stopped()
            try:
                async with asyncio.timeout(_TRY_SECONDS):
                    return await self._try_to_take(each)
            except Exception as error:
                is_kafkas = getattr(error, "retriable", False)  # says its client
                may_pass = is_kafkas or is_outage(error) or isinstance(error, PartitionBusyError)
                if not may_pass or time.monotonic() > ends:
                    raise
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _try_to_take(self, each: Partition) -> int:
        beginning = (await self._consumer.beginning_offsets([each]))[each]
        end = (await self._consumer.end_offsets([each]))[each]
        async with _begin(self._database) as connection:
            offset = await self._offsets.take(connection, each.topic, each.partition, beginning=beginning, end=end)
            self._end_if_stopped()
        return offset

    def _end_if_stopped(self) -> None:
        # It tells its listener nothing, and the partition may be another's by now.
        if getattr(self._consumer, "_closed", False):
            raise asyncio.CancelledError


@asynccontextmanager
async def _begin(database: asyncpg.Pool | AsyncEngine) -> AsyncIterator[Connection]:
    if isinstance(database, AsyncEngine):
        async with database.begin() as connection:
            yield connection
    else:
        async with database.acquire() as connection, connection.transaction():
            yield connection
