"""A consumer that ties the inbox together: handlers by topic and type, in order per key, offsets after effects.

    consumer = Consumer("localhost:9092", "payments", inbox=Inbox("payments"), transaction=sessions.begin)

    @consumer.handler("orders", type="order.placed")
    async def charge(message, session): ...

    await consumer.run()

Receive, handle, commit the database's transaction, commit the offset: of each partition only up to the first message
that isn't finished. A message that fails is tried again, and holds up its own key alone; its partition is paused once
``most_waiting`` messages are behind it, or a fetch more. What can't be handled goes to ``dead_letter_topic``; without
one it is tried for ever, and is never passed over. While PostgreSQL or Redis is away all are tried for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from outbox_relay.inbox.closing import Closing
from outbox_relay.inbox.handling import Handler, Handling, PermanentError, Tries
from outbox_relay.inbox.keys import KeyQueues
from outbox_relay.inbox.letters import DeadLetterTopic
from outbox_relay.inbox.positions import out_of_range, position
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.progress import Progress
from outbox_relay.inbox.telemetry import Telemetry
from outbox_relay.inbox.transaction import Transaction
from outbox_relay.retry import Backoff

if TYPE_CHECKING:
    from outbox_relay.inbox.redis import RedisInbox

__all__ = ["Consumer", "Handler", "PermanentError"]

T = TypeVar("T")

_POLL_MS = 100
_COMMIT_SECONDS = 10.0
_CLOSE_SECONDS = 10.0


class _Partition:
    """From its assignment to its revocation."""

    def __init__(self, queues: KeyQueues[Any]) -> None:
        self.progress = Progress()
        self.queues = queues
        self.is_paused = False
        self.closing = Closing()
        self.beginning: asyncio.Task[None] | None = None


class Consumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """One member of a consumer group.

    ``inbox`` is an ``Inbox`` in PostgreSQL, together with ``transaction``, which opens what handlers get as their
    second argument, and commits it when they return; or a ``RedisInbox``; or None, and handlers see repeats.

    A message is tried ``max_attempts`` times, with pauses by ``backoff``, or once if the handler raises
    :class:`PermanentError`; what failed before the handler was called isn't counted, nor is an outage (see
    ``outages.py``). ``at_once`` handlers run at a time. A partition that is taken away waits ``grace_seconds`` for
    those that run; what they have not committed then is rolled back, and the next owner's.

    With a ``batch_size`` above 1, in PostgreSQL only, as many messages of a partition as wait, but no more than that,
    are handled one after another in one transaction, which is committed once. If that raises they are handled one by
    one. Keys of a partition then wait for each other.

    ``settings`` are further arguments of aiokafka's clients, as ``security_protocol``; ``consumer_settings``, such as
    ``group_instance_id``, and ``producer_settings``, of dead letters, those of one of them.

    Raises ValueError for what can't be together, and TypeError for a setting that aiokafka doesn't know.
    """

    def __init__(
        self,
        bootstrap_servers: str | Collection[str],
        group: str,
        *,
        inbox: Inbox | RedisInbox | None = None,
        transaction: Transaction | None = None,
        dead_letter_topic: str | None = None,
        max_attempts: int = 5,
        backoff: Backoff | None = None,
        at_once: int = 16,
        batch_size: int = 1,
        most_waiting: int = 500,
        grace_seconds: float = 10.0,
        settings: Mapping[str, Any] | None = None,
        consumer_settings: Mapping[str, Any] | None = None,
        producer_settings: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(inbox, Inbox) != (transaction is not None):
            raise ValueError("an Inbox in PostgreSQL needs a transaction=…, and nothing else takes one")
        if batch_size > 1 and not isinstance(inbox, Inbox):
            raise ValueError("a batch_size above 1 needs an Inbox in PostgreSQL, whose transaction can take all back")
        if min(max_attempts, at_once, batch_size, most_waiting) < 1:
            raise ValueError("max_attempts, at_once, batch_size and most_waiting are 1 or more")
        servers = bootstrap_servers if isinstance(bootstrap_servers, str) else list(bootstrap_servers)
        common = {**(settings or {}), "bootstrap_servers": servers}
        self._consumer_settings = {
            "isolation_level": "read_committed",
            # What a revoked partition may take, so that a member that finishes its work isn't expelled for it.
            "rebalance_timeout_ms": round(1000 * (2 * grace_seconds + _COMMIT_SECONDS + 10)),
            **common,
            **(consumer_settings or {}),
            "group_id": group,
            "enable_auto_commit": False,
            # Where Kafka doesn't have an offset, going on from another would pass over messages: see _begin().
            "auto_offset_reset": "none",
        }
        inspect.signature(AIOKafkaConsumer).bind(**self._consumer_settings)
        self._group = group
        self._most_waiting, self._grace_seconds = most_waiting, grace_seconds
        self._batch_size = batch_size
        self._backoff = backoff or Backoff(0.1, 30.0)
        self._at_once = asyncio.Semaphore(at_once)
        self._handlers: dict[tuple[str, str | None], Handler] = {}
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._stopping = asyncio.Event()
        self._telemetry = Telemetry(group=group)
        self._handling = Handling(
            inbox,
            transaction,
            self._handlers,
            max_attempts=max_attempts,
            backoff=self._backoff,
            dead_letters=DeadLetterTopic(dead_letter_topic, {**common, **(producer_settings or {})})
            if dead_letter_topic is not None
            else None,
            telemetry=self._telemetry,
        )
        self._kafka: Any = None

    def handler(self, topic: str, *, type: str | None = None) -> Callable[[Handler], Handler]:
        """Have messages of the topic handled by this function; without a type, those that no other is for."""

        def register(function: Handler) -> Handler:
            if self._handlers.setdefault((topic, type), function) is not function:
                raise ValueError(f"two handlers for topic {topic!r} and type {type!r}")
            return function

        return register

    def stop(self) -> None:
        """Finish what is in work, commit its offsets, and let :meth:`run` return."""
        self._stopping.set()

    async def run(self) -> None:
        """Until :meth:`stop`, or an error of Kafka's client that doesn't pass, as that the group may not be read.

        Raises ValueError where no handler is registered, and OffsetGoneError where Kafka no longer has the messages
        that are next.
        """
        if not self._handlers:
            raise ValueError("nothing to consume: register a handler before run()")
        self._kafka = AIOKafkaConsumer(**self._consumer_settings)
        self._kafka.subscribe(sorted({topic for topic, _ in self._handlers}), listener=self)
        try:
            # It returns when the group has shared out its partitions, which may take as long as another member does.
            await self._unless_stopped(self._kafka.start())
            while not self._stopping.is_set():
                await self._receive()
                self._raise_defects()
                self._pause()
                await self._commit(list(self._partitions))
                self._telemetry.say_progress(self._lag)
        finally:
            try:
                await self.on_partitions_revoked(list(self._partitions))
            finally:
                await self._close()

    async def _unless_stopped(self, coming: Awaitable[T]) -> T | None:
        """What comes, or None where it is to stop before."""
        task = asyncio.ensure_future(coming)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stopping.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    async def _receive(self) -> None:
        try:
            received = await self._unless_stopped(
                self._kafka.getmany(timeout_ms=_POLL_MS, max_records=self._most_waiting)
            )
        except OffsetOutOfRangeError as error:
            raise out_of_range(self._group, error) from error
        # No await until all are begun: a partition taken away meanwhile is no longer among ours.
        for partition, messages in (received or {}).items():
            if (state := self._partitions.get(partition)) is not None:
                for message in messages:
                    state.progress.begin(message.offset)
                    # A batch is a transaction, so keys can't be handled beside each other in it.
                    state.queues.add(message.key if self._batch_size == 1 else "", message)

    def _raise_defects(self) -> None:
        for state in self._partitions.values():
            if state.queues.defect is not None:
                raise state.queues.defect
            if state.beginning is not None and state.beginning.done() and not state.beginning.cancelled():
                state.beginning.result()

    def _pause(self) -> None:
        for partition, state in self._partitions.items():
            is_full = state.progress.unfinished >= self._most_waiting
            if is_full and not state.is_paused:
                self._kafka.pause(partition)
                self._telemetry.partition_paused(partition.topic, partition.partition, state.progress.unfinished)
            elif state.is_paused and not is_full:
                self._kafka.resume(partition)
                self._telemetry.partition_resumed(partition.topic, partition.partition)
            state.is_paused = is_full

    def _lag(self) -> int:
        """How many offsets Kafka has, as far as it has said, beyond what is finished of our partitions."""
        return sum(
            max(0, (self._kafka.highwater(partition) or 0) - (state.progress.next_offset or 0))
            for partition, state in self._partitions.items()
        )

    async def _commit(self, partitions: Collection[TopicPartition]) -> None:
        offsets = {}
        for partition in partitions:
            state = self._partitions.get(partition)
            if state is not None and (offset := state.progress.to_commit()) is not None:
                offsets[partition] = offset
        if not offsets:
            return
        try:
            async with asyncio.timeout(_COMMIT_SECONDS):
                await self._kafka.commit(offsets)
        except (KafkaError, TimeoutError) as error:
            # Tried again next time; or the partition is another's by now, who gets these messages again.
            self._telemetry.offsets_uncommitted(error)
            return
        for partition, offset in offsets.items():
            if (state := self._partitions.get(partition)) is not None:
                state.progress.committed(offset)

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._kafka.stop()
        except TimeoutError:
            self._telemetry.consumer_not_closed(_CLOSE_SECONDS)
            # What it didn't come to any more; a second stop() does nothing.
            for part in (self._kafka._fetcher, self._kafka._client):
                if part is not None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_CLOSE_SECONDS):
                            await part.close()

    # -- partitions come and go

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        for partition in assigned:
            # With a position nobody else asks for one; and nothing is fetched there.
            self._kafka.pause(partition)
            self._kafka.seek(partition, 0)
            queues = KeyQueues(self._finish, most_at_once=self._batch_size)
            self._partitions[partition] = state = _Partition(queues)
            state.beginning = asyncio.create_task(self._begin(partition, state))
            self._telemetry.partition_assigned(partition.topic, partition.partition)

    async def _begin(self, partition: TopicPartition, state: _Partition) -> None:
        """Have it fetched from what the group has committed, or all of it. Raises OffsetGoneError."""
        failures = 0
        while True:
            try:
                async with asyncio.timeout(_COMMIT_SECONDS):
                    committed = await self._kafka.committed(partition)
                    offset = await position(self._kafka, self._group, partition, committed)
                break
            except (KafkaError, TimeoutError) as error:
                failures += 1
                self._telemetry.offset_unread(partition.topic, partition.partition, error)
                if not await state.closing.rest(self._backoff.delay_seconds(failures)):
                    return
        if not state.closing.is_set():
            self._kafka.seek(partition, offset)
            state.progress.begin_at(offset)
            self._kafka.resume(partition)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Nothing of them is in work once this returns; what was finished is committed."""
        ours = [partition for partition in revoked if partition in self._partitions]
        for partition in ours:
            state = self._partitions[partition]
            state.closing.set()
            if state.beginning is not None:
                state.beginning.cancel()
        await asyncio.gather(*(self._partitions[each].queues.close(self._grace_seconds) for each in ours))
        await self._commit(ours)
        if self._stopping.is_set():
            # Nothing more is handled, and what is left of the partitions is still known.
            self._telemetry.say_progress(self._lag, is_last=True)
        for partition in ours:
            # A rebalance and the end of run() may come together.
            if (state_left := self._partitions.pop(partition, None)) is not None:
                self._telemetry.partition_revoked(partition.topic, partition.partition, state_left.progress.unfinished)

    async def _finish(self, messages: list[Any]) -> None:
        """Handle them, or see them buried, and count them as finished; or not, if the partition is taken away."""
        state = self._partitions[TopicPartition(messages[0].topic, messages[0].partition)]
        if len(messages) > 1:
            async with self._at_once:
                if state.closing.is_set():
                    return
                is_handled = await self._handling.handle_batch(messages)
            if is_handled:
                for message in messages:
                    state.progress.finish(message.offset)
                return
        for message in messages:
            tries = Tries()
            while True:
                # Not held while it waits for another try, so that no number of failing keys holds up the others.
                async with self._at_once:
                    if state.closing.is_set():
                        return
                    pause_seconds = await self._handling.handle(message, tries, state.closing)
                if pause_seconds is None:
                    break
                if not await state.closing.rest(pause_seconds):
                    return
            state.progress.finish(message.offset)
