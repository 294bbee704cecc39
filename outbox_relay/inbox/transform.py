"""From topic to topic, exactly once: outputs and the input's offset are in one transaction of Kafka.

    async def enrich(message):
        return [Output("enriched", key=message.key, value=...)]

    transformer = Transformer("localhost:9092", "enrich", topics=["orders"], transform=enrich)
    await transformer.run()

Receive, transform, then in a transaction send the outputs and the offset. A reader of the outputs sees each once if its
``isolation_level`` is ``read_committed``.

Each input partition has a ``transactional.id`` of its own, and its owner does the following, in this order, when the
partition is assigned and again whenever anything about a transaction fails or is in doubt:

1. initialise a producer with that id. From then on no earlier owner, such as a process that was frozen and goes on, can
   commit anything; what it left open is committed or aborted;
2. read the group's offset, which only now can't change any more;
3. seek there.

aiokafka sends offsets with the group's id alone, without the member's and its generation, so the group itself keeps no
such zombie from committing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from outbox_relay.errors import OffsetGoneError
from outbox_relay.inbox.abandoning import abandon
from outbox_relay.inbox.closing import Closing
from outbox_relay.inbox.handling import PermanentError
from outbox_relay.inbox.letters import letter
from outbox_relay.inbox.outages import is_outage
from outbox_relay.inbox.positions import out_of_range, position
from outbox_relay.inbox.stable_offsets import stable_offset
from outbox_relay.inbox.telemetry import Telemetry
from outbox_relay.retry import Backoff

_POLL_MS = 100


@dataclass(frozen=True, slots=True)
class Output:
    """A message to write. Without a partition it is the key's, as for Kafka's own producer.

    Raises ValueError where Kafka's client could not send it.
    """

    topic: str
    value: bytes | None
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()
    partition: int | None = None

    def __post_init__(self) -> None:
        if self.value is None and self.key is None:
            raise ValueError("an output needs a key or a value")
        parts = [part for part in (self.value, self.key, *(value for _, value in self.headers)) if part is not None]
        if not all(isinstance(part, bytes) for part in parts):
            raise ValueError("keys, values and the values of headers are bytes")


Transform: TypeAlias = Callable[[Any], Awaitable[Iterable[Output]]]


@dataclass
class _Batch:
    """Messages that are transformed, and not committed."""

    outputs: list[Output] = field(default_factory=list)
    next_offset: int | None = None
    #: Those that were given up: message, error and attempts.
    dead: list[tuple[Any, Exception, int]] = field(default_factory=list)


class Transformer(ConsumerRebalanceListener):  # type: ignore[misc]
    """One member of a consumer group, each of whose partitions is transformed in order, beside the others.

    ``transform`` takes a message and returns its outputs, none, one or many. It may be called again for a message whose
    outputs weren't committed, so other effects of it may come more than once.

    A message whose ``transform`` raises is tried ``max_attempts`` times, with pauses by ``backoff``, or once if it is a
    :class:`~outbox_relay.inbox.runner.PermanentError`; an outage isn't counted (see ``outages.py``). Then it goes to
    ``dead_letter_topic``, in the same transaction as its offset; without one it is tried for ever. Later messages of
    its partition wait, for an offset can't pass over it.

    ``most_at_once`` messages are in a transaction at most. Kafka has ``commit_seconds`` for one, less than the
    ``transaction_timeout_ms`` of the producer, 60 s. A partition that is taken away waits ``grace_seconds`` for a
    message in work.

    ``settings`` are further arguments of aiokafka's clients, as ``security_protocol``; ``consumer_settings``, such as
    ``group_instance_id``, and ``producer_settings``, such as ``compression_type``, those of one of them.
    """

    def __init__(
        self,
        bootstrap_servers: str | Collection[str],
        group: str,
        *,
        topics: Collection[str],
        transform: Transform,
        dead_letter_topic: str | None = None,
        max_attempts: int = 5,
        backoff: Backoff | None = None,
        most_at_once: int = 500,
        commit_seconds: float = 30.0,
        grace_seconds: float = 10.0,
        settings: Mapping[str, Any] | None = None,
        consumer_settings: Mapping[str, Any] | None = None,
        producer_settings: Mapping[str, Any] | None = None,
    ) -> None:
        servers = bootstrap_servers if isinstance(bootstrap_servers, str) else list(bootstrap_servers)
        common = {**(settings or {}), "bootstrap_servers": servers}
        self._consumer_settings = {**common, **(consumer_settings or {})}
        self._producer_settings = {**common, **(producer_settings or {})}
        self._group, self._topics, self._transform = group, sorted(topics), transform
        self._dead_letter_topic = dead_letter_topic
        self._max_attempts, self._backoff = max_attempts, backoff or Backoff(0.1, 30.0)
        self._most_at_once = most_at_once
        self._commit_seconds, self._grace_seconds = commit_seconds, grace_seconds
        self._partitions: dict[TopicPartition, tuple[Closing, asyncio.Task[None]]] = {}
        self._stopping = Closing()
        self._telemetry = Telemetry(group=group)
        self._kafka: Any = None

    def stop(self) -> None:
        """Commit what is transformed, and let :meth:`run` return."""
        self._stopping.set()

    async def run(self) -> None:
        """Until :meth:`stop`, or an error of the group's that doesn't pass, as that it may not be read.

        Raises OffsetGoneError where Kafka doesn't have the messages that are next.
        """
        self._kafka = AIOKafkaConsumer(
            **self._consumer_settings,
            group_id=self._group,
            enable_auto_commit=False,
            # Where Kafka doesn't have an offset, going on from another would pass over messages.
            auto_offset_reset="none",
            isolation_level="read_committed",
        )
        self._kafka.subscribe(self._topics, listener=self)
        try:
            await self._kafka.start()
            # As if something were always being fetched: a member that tries a message for long stays in its group.
            with self._kafka._subscription.fetch_context():
                while await self._stopping.rest(_POLL_MS / 1000):
                    self._kafka._coordinator.check_errors()
                    for _, task in self._partitions.values():
                        if task.done() and not task.cancelled():
                            task.result()
        finally:
            try:
                await self.on_partitions_revoked(list(self._partitions))
            finally:
                await self._kafka.stop()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        for partition in assigned:
            # With a position nobody asks the group for one, which might be out of date; and nothing is fetched there.
            self._kafka.pause(partition)
            self._kafka.seek(partition, 0)
            closing = Closing()
            self._partitions[partition] = (closing, asyncio.create_task(self._own(partition, closing)))
            self._telemetry.partition_assigned(partition.topic, partition.partition)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Nothing of them is in work once this returns; what was transformed is committed."""
        ours = {partition: self._partitions[partition] for partition in revoked if partition in self._partitions}
        for closing, _ in ours.values():
            closing.set()
        tasks = [task for _, task in ours.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._grace_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for partition in ours:
            # A rebalance and the end of run() may come together.
            if self._partitions.pop(partition, None) is not None:
                _, task = ours[partition]
                self._telemetry.partition_revoked(partition.topic, partition.partition, int(task.cancelled()))

    async def _own(self, partition: TopicPartition, closing: Closing) -> None:
        """Transform what comes in the partition; from the beginning whenever something about Kafka fails."""
        failures = 0
        while not closing.is_set():
            try:
                async with self._fenced(partition) as producer:
                    while not closing.is_set():
                        if await self._carry(producer, partition, closing):
                            failures = 0
            except OffsetGoneError:
                raise
            except OffsetOutOfRangeError as error:
                raise out_of_range(self._group, error) from error
            except Exception as error:  # of whichever kind: what was in doubt is read from Kafka again
                failures += 1
                pause_seconds = self._backoff.delay_seconds(failures)
                self._telemetry.transaction_failed(partition.topic, partition.partition, error, pause_seconds)
                await closing.rest(pause_seconds)

    def _transactional_id(self, partition: TopicPartition) -> str:
        # A topic's name has no colon, so no two groups and topics have the same.
        return f"{self._group}:{partition.topic}:{partition.partition}"

    @asynccontextmanager
    async def _fenced(self, partition: TopicPartition) -> AsyncIterator[Any]:
        """A producer after which no earlier owner commits anything, and the consumer at where the last commit ended."""
        producer = AIOKafkaProducer(**self._producer_settings, transactional_id=self._transactional_id(partition))
        try:
            async with asyncio.timeout(self._commit_seconds):
                position = await self._start(producer, partition)
            self._kafka.seek(partition, position)
            self._kafka.resume(partition)
            yield producer
        finally:
            await abandon(producer)

    async def _start(self, producer: Any, partition: TopicPartition) -> int:
        await producer.start()
        return await self._position(producer, partition)

    async def _position(self, producer: Any, partition: TopicPartition) -> int:
        committed = await stable_offset(producer.client, self._group, partition)
        return await position(self._kafka, self._group, partition, committed)

    async def _carry(self, producer: Any, partition: TopicPartition, closing: Closing) -> bool:
        """Transform what was received, and commit it; False if that was nothing, or not all.

        No transaction is open while ``transform`` is at work.
        """
        received = await self._kafka.getmany(partition, timeout_ms=_POLL_MS, max_records=self._most_at_once)
        batch = _Batch()
        for message in received.get(partition, ()):
            failures = attempts = 0
            while True:
                try:
                    outputs = list(await self._transform(message))
                    break
                except Exception as error:
                    failures += 1
                    attempts += not is_outage(error)
                    is_final = isinstance(error, PermanentError) or attempts >= self._max_attempts
                    if is_final and self._dead_letter_topic is not None:
                        dead = letter(message, error, attempts)
                        outputs = [Output(self._dead_letter_topic, dead.value, dead.key, dead.headers)]
                        batch.dead.append((message, error, attempts))
                        break
                    pause_seconds = self._backoff.delay_seconds(failures)
                    self._telemetry.message_failed(message, error, attempts, pause_seconds)
                # Those before it need not wait for it.
                await self._commit(producer, partition, batch)
                batch = _Batch()
                if not await closing.rest(pause_seconds):
                    return False
            batch.outputs += outputs
            batch.next_offset = message.offset + 1
            if closing.is_set():
                break
        await self._commit(producer, partition, batch)
        return bool(received)

    async def _commit(self, producer: Any, partition: TopicPartition, batch: _Batch) -> None:
        """All of it or nothing. After an error either may be so, and the producer is of no use any more."""
        if batch.next_offset is None:
            return
        async with asyncio.timeout(self._commit_seconds):
            await producer.begin_transaction()
            await self._send(producer, batch.outputs)
            await self._send_offset(producer, partition, batch.next_offset)
            await producer.commit_transaction()
        for message, error, attempts in batch.dead:
            assert self._dead_letter_topic is not None
            self._telemetry.message_dead(message, error, attempts, self._dead_letter_topic)

    async def _send(self, producer: Any, outputs: Sequence[Output]) -> None:
        sent = [
            await producer.send(output.topic, output.value, output.key, output.partition, headers=list(output.headers))
            for output in outputs
        ]
        # Each must be looked at: a transaction of which a batch was refused can be committed without it.
        for answer in await asyncio.gather(*sent, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    async def _send_offset(self, producer: Any, partition: TopicPartition, offset: int) -> None:
        await producer.send_offsets_to_transaction({partition: offset}, self._group)
