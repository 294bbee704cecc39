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
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from outbox_relay.errors import MissingMessageIdError, OutboxRelayError
from outbox_relay.inbox.closing import Closing
from outbox_relay.inbox.ids import header
from outbox_relay.inbox.keys import KeyQueues
from outbox_relay.inbox.letters import letter
from outbox_relay.inbox.outages import is_outage
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.progress import Progress
from outbox_relay.inbox.telemetry import Telemetry
from outbox_relay.inbox.transaction import Transaction
from outbox_relay.retry import Backoff

if TYPE_CHECKING:
    from outbox_relay.inbox.redis import RedisInbox

Handler: TypeAlias = Callable[..., Awaitable[object]]


class PermanentError(OutboxRelayError):
    """Raised by a handler: trying again is of no use."""


_POLL_MS = 100
_BURY_SECONDS = 30.0


class _Partition:
    def __init__(self, queues: KeyQueues[Any]) -> None:
        self.progress = Progress()
        self.queues = queues
        self.is_paused = False
        self.is_closing = Closing()


class Consumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """One member of a consumer group.

    ``inbox`` is an ``Inbox`` in PostgreSQL, together with ``transaction``, which opens what handlers get as their
    second argument, and commits it when they return; or a ``RedisInbox``; or None, and handlers see repeats.

    A message is tried ``max_attempts`` times, with pauses by ``backoff``, or once if the handler raises
    :class:`PermanentError`; an outage isn't counted (see ``outages.py``). ``at_once`` handlers run at a time. A
    partition that is taken away waits ``grace_seconds`` for those that run; what they have not committed then is rolled
    back, and the next owner's.

    ``settings`` are further arguments of aiokafka's clients, as ``security_protocol``.
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
        most_waiting: int = 500,
        grace_seconds: float = 10.0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(inbox, Inbox) != (transaction is not None):
            raise ValueError("an Inbox in PostgreSQL needs a transaction=…, and nothing else takes one")
        servers = bootstrap_servers if isinstance(bootstrap_servers, str) else list(bootstrap_servers)
        self._settings = {**(settings or {}), "bootstrap_servers": servers}
        self._group = group
        self._inbox, self._transaction = inbox, transaction
        self._dead_letter_topic = dead_letter_topic
        self._max_attempts, self._backoff = max_attempts, backoff or Backoff(0.1, 30.0)
        self._at_once = asyncio.Semaphore(at_once)
        self._most_waiting, self._grace_seconds = most_waiting, grace_seconds
        self._handlers: dict[tuple[str, str | None], Handler] = {}
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._stopping = asyncio.Event()
        self._telemetry = Telemetry(group=group)
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
        """Until :meth:`stop`, or an error of Kafka's client that isn't about offsets, such as one to connect.

        Raises ValueError where no handler is registered.
        """
        if not self._handlers:
            raise ValueError("nothing to consume: register a handler before run()")
        self._kafka = AIOKafkaConsumer(
            **self._settings, group_id=self._group, enable_auto_commit=False, auto_offset_reset="earliest"
        )
        self._kafka.subscribe(sorted({topic for topic, _ in self._handlers}), listener=self)
        try:
            await self._kafka.start()
            while not self._stopping.is_set():
                received = await self._kafka.getmany(timeout_ms=_POLL_MS, max_records=self._most_waiting)
                # No await until all are begun: a partition taken away meanwhile is no longer among ours.
                for partition, messages in received.items():
                    if (state := self._partitions.get(partition)) is not None:
                        for message in messages:
                            state.progress.begin(message.offset)
                            state.queues.add(message.key, message)
                for state in self._partitions.values():
                    if state.queues.defect is not None:
                        raise state.queues.defect
                self._pause()
                await self._commit(list(self._partitions))
        finally:
            try:
                await self.on_partitions_revoked(list(self._partitions))
            finally:
                await self._kafka.stop()

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

    async def _commit(self, partitions: Collection[TopicPartition]) -> None:
        offsets = {}
        for partition in partitions:
            state = self._partitions.get(partition)
            if state is not None and (offset := state.progress.to_commit()) is not None:
                offsets[partition] = offset
        if not offsets:
            return
        try:
            await self._kafka.commit(offsets)
        except KafkaError as error:
            # Tried again next time; or the partition is another's by now, who gets these messages again.
            self._telemetry.offsets_uncommitted(error)
            return
        for partition, offset in offsets.items():
            if (state := self._partitions.get(partition)) is not None:
                state.progress.committed(offset)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        for partition in assigned:
            self._partitions[partition] = _Partition(KeyQueues(self._finish))
            self._telemetry.partition_assigned(partition.topic, partition.partition)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Nothing of them is in work once this returns; what was finished is committed."""
        ours = [partition for partition in revoked if partition in self._partitions]
        for partition in ours:
            self._partitions[partition].is_closing.set()
        await asyncio.gather(*(self._partitions[each].queues.close(self._grace_seconds) for each in ours))
        await self._commit(ours)
        for partition in ours:
            # A rebalance and the end of run() may come together.
            if (state := self._partitions.pop(partition, None)) is not None:
                self._telemetry.partition_revoked(partition.topic, partition.partition, state.progress.unfinished)

    async def _finish(self, message: Any) -> None:
        """Handle it, or see it buried, and count it as finished; or not, if its partition is taken away before."""
        state = self._partitions[TopicPartition(message.topic, message.partition)]
        failures = attempts = 0
        while True:
            try:
                # Not held while it waits for another try, so that no number of failing keys holds up the others.
                async with self._at_once:
                    if state.is_closing.is_set():
                        return
                    pause_seconds = await self._handle(message)
                if pause_seconds is None:
                    break
            except Exception as error:
                failures += 1
                attempts += not is_outage(error)
                is_final = isinstance(error, PermanentError | MissingMessageIdError) or attempts >= self._max_attempts
                if is_final and self._dead_letter_topic is not None:
                    if not await self._bury(state, message, error, attempts):
                        return
                    break
                pause_seconds = self._backoff.delay_seconds(failures)
                self._telemetry.message_failed(message, error, attempts, pause_seconds)
            if not await state.is_closing.rest(pause_seconds):
                return
        state.progress.finish(message.offset)

    async def _handle(self, message: Any) -> float | None:
        """Handled, or skipped as a repeat; otherwise when to ask whether another still holds it."""
        type_ = (header(message, "type") or b"").decode("utf-8", "replace") or None
        handler = self._handlers.get((message.topic, type_)) or self._handlers.get((message.topic, None))
        if handler is None:
            raise PermanentError(f"no handler for messages of type {type_!r} of topic {message.topic!r}")
        if isinstance(self._inbox, Inbox):
            assert self._transaction is not None
            async with self._transaction() as connection:
                if await self._inbox.accept(connection, message):
                    await handler(message, connection)
        elif self._inbox is not None:
            from outbox_relay.inbox.redis import Busy, Claimed  # of an extra

            claim = await self._inbox.claim(message)
            if isinstance(claim, Busy):
                # Not for all of its lease: its holder may fail before, and let go.
                return min(claim.lease_seconds, self._backoff.ceiling_seconds)
            if isinstance(claim, Claimed):
                try:
                    await handler(message)
                except BaseException:
                    await self._inbox.release(claim)
                    raise
                await self._inbox.done(claim)
        else:
            await handler(message)
        return None

    async def _bury(self, state: _Partition, message: Any, error: Exception, attempts: int) -> bool:
        """Write it to the dead-letter topic, however often that fails; False if its partition is taken away before."""
        assert self._dead_letter_topic is not None
        dead = letter(message, error, attempts)
        tries = 0
        while not state.is_closing.is_set():
            try:
                # A producer for each letter: one that has failed is in doubt.
                async with (
                    asyncio.timeout(_BURY_SECONDS),
                    AIOKafkaProducer(**self._settings, enable_idempotence=True) as producer,
                ):
                    await producer.send_and_wait(self._dead_letter_topic, dead.value, dead.key, headers=dead.headers)
            except Exception as failure:  # whatever it was, the message isn't passed over
                tries += 1
                self._telemetry.message_unburied(message, failure, self._dead_letter_topic)
                await state.is_closing.rest(self._backoff.delay_seconds(tries))
            else:
                self._telemetry.message_dead(message, error, attempts, self._dead_letter_topic)
                return True
        return False
