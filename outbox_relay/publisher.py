"""Kafka, and the only place that classifies a broker's errors.

aiokafka batches are built here, one a partition, since its own ``send`` costs five times as much a message. Three of
its traits shape this module (all of 0.14):

- An idempotent send has no deadline: with the brokers gone its future never resolves. So there is one here, and past
  it the producer is *abandoned*: its sender cancelled and its sockets closed, so that it can send nothing any more.
- A batch that failed has used up sequence numbers without an epoch bump, and the next is out of order for ever. So
  after any failed batch the producer is rebuilt.
- A metadata request that names a topic creates it where the broker allows that. So topics are never named: the
  client asks for all of them, and a topic that isn't among them is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka_errors

from outbox_relay.errors import PublisherUnavailableError
from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.partitioner import partition_for
from outbox_relay.telemetry import Telemetry

#: The topic can't be written to, whatever the record.
_TOPIC_ERRORS = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.UnknownTopicOrPartitionError,
    kafka_errors.InvalidTopicError,
)

#: The broker looked at the batch and refused it: some record in it is at fault.
#: UnknownError stands for codes that aiokafka has no class for, INVALID_RECORD (87) among them.
_ROW_ERRORS = (
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.RecordListTooLargeError,
    kafka_errors.CorruptRecordException,
    kafka_errors.InvalidTimestampError,
    kafka_errors.UnsupportedForMessageFormatError,
    kafka_errors.PolicyViolationError,
    kafka_errors.UnknownError,
)

_BATCH_OVERHEAD_BYTES = 61
#: A broker closes the connection on a request above its ``socket.request.max.bytes``, by default 100 MiB, instead of
#: answering, and would on every later try. Measured before compression, as Java's client does, with room for names.
_REQUEST_BYTES = 99 * 1024 * 1024
_CLOSE_TIMEOUT_SECONDS = 5.0
#: A publish deadline that passed is lengthened for the next try, up to this many times its setting.
_LONGEST_DEADLINE = 8

Partition = tuple[str, int]
Line = tuple[str, bytes | int]


class RecordTooLargeError(kafka_errors.KafkaError):
    """No broker with usual settings takes a request with this record."""


class KafkaPublisher:
    """One idempotent producer; see :class:`outbox_relay.relay.Publisher`.

    ``batch_bytes`` bounds a batch before compression, and must be below the topics' ``max.message.bytes``.
    """

    def __init__(
        self,
        bootstrap_servers: Sequence[str],
        telemetry: Telemetry,
        *,
        client_id: str,
        compression: str,
        batch_bytes: int,
        connect_timeout_seconds: float,
        request_timeout_seconds: float,
        publish_warn_seconds: float,
        publish_deadline_seconds: float,
    ) -> None:
        self._settings = {
            "bootstrap_servers": list(bootstrap_servers),
            "client_id": client_id,
            "acks": "all",
            "enable_idempotence": True,
            "compression_type": None if compression == "none" else compression,
            "max_batch_size": batch_bytes,
            "request_timeout_ms": int(request_timeout_seconds * 1000),
        }
        self._telemetry = telemetry
        self._batch_bytes = batch_bytes
        self._connect_timeout_seconds = connect_timeout_seconds
        self._warn_seconds = publish_warn_seconds
        self._deadline_seconds = publish_deadline_seconds
        self._lengthened = 1
        self._producer: AIOKafkaProducer | None = None
        self._keyless_turn = 0

    @property
    def ready(self) -> bool:
        return self._producer is not None

    async def connect(self) -> None:
        await self._abandon()
        producer = AIOKafkaProducer(**self._settings)
        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                await producer.start()
                # A new client knows no topic yet, and a topic that it doesn't know counts as missing.
                if not await producer.client.force_metadata_update():
                    raise kafka_errors.KafkaConnectionError("no broker answers")
        except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
            await _dismantle(producer)
            reason = str(error) or f"no answer within {self._connect_timeout_seconds} s"
            raise PublisherUnavailableError(f"connect to Kafka: {reason}") from error
        except asyncio.CancelledError:
            await _dismantle(producer)
            raise
        self._producer = producer

    async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
        publication = _Publication(records)
        try:
            await self._send_all(publication, is_ours)
        except asyncio.CancelledError:
            await self._abandon()
            raise
        return publication.outcomes()

    async def close(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(TimeoutError, kafka_errors.KafkaError, OSError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                    await producer.stop()
                    return
            await _dismantle(producer)

    # -- one publication

    async def _send_all(self, publication: _Publication, is_ours: Callable[[], bool]) -> None:
        if self._producer is None:
            return
        queues = await self._queues(publication)
        while queues and self._producer is not None and is_ours():
            # One batch a partition, and its next only when that is acknowledged: none overtakes one that fails.
            round_ = self._take_round(queues, publication)
            failures = await self._send(round_, publication)
            for partition, (chunk, error) in failures.items():
                if not await self._isolate(partition, chunk, error, publication, is_ours):
                    queues[partition].clear()
            queues = {partition: queue for partition, queue in queues.items() if queue}

    async def _queues(self, publication: _Publication) -> dict[Partition, deque[Record]]:
        """The records by partition, in order, without those whose topic isn't there."""
        assert self._producer is not None
        counts = await self._partition_counts({record.topic for record in publication.records})
        self._keyless_turn += 1
        queues: dict[Partition, deque[Record]] = {}
        for record in publication.records:
            count = counts.get(record.topic, 0)
            if not count:
                publication.refuse_topic(record.topic, kafka_errors.UnknownTopicOrPartitionError())
                continue
            number = self._keyless_turn % count if record.key is None else partition_for(record.key, count)
            queues.setdefault((record.topic, number), deque()).append(record)
        return queues if self._producer is not None else {}

    async def _partition_counts(self, topics: set[str]) -> dict[str, int]:
        """How many partitions each topic has, 0 where it is missing. Asks Kafka again before it says so."""
        assert self._producer is not None
        client = self._producer.client
        if any(client.cluster.partitions_for_topic(topic) is None for topic in topics):
            try:
                async with asyncio.timeout(self._connect_timeout_seconds):
                    reached = await client.force_metadata_update()
            except TimeoutError:
                reached = False
            if not reached:
                # Nobody to ask is not "missing".
                await self._abandon()
        return {topic: len(client.cluster.partitions_for_topic(topic) or ()) for topic in topics}

    def _take_round(
        self, queues: dict[Partition, deque[Record]], publication: _Publication
    ) -> dict[Partition, list[Record]]:
        """The next batch of each partition, together at most as much as a broker takes in one request."""
        round_: dict[Partition, list[Record]] = {}
        room = _REQUEST_BYTES
        for partition, queue in queues.items():
            round_[partition], taken = self._take_batch(queue, publication, room)
            room -= taken
        return round_

    def _take_batch(self, queue: deque[Record], publication: _Publication, room: int) -> tuple[list[Record], int]:
        """The next records of a partition, without those that must wait; as many as surely fit into one batch.

        With their size in bytes, which is at most ``room``.
        """
        chunk: list[Record] = []
        size = 0
        while queue:
            record = queue[0]
            if _line(record) in publication.halted:
                queue.popleft()
                continue
            more = _size(record)
            if more > _REQUEST_BYTES:
                publication.refuse_row(record, RecordTooLargeError())
                continue
            if size + more > room or (chunk and size + more > self._batch_bytes - _BATCH_OVERHEAD_BYTES):
                break
            size += more
            chunk.append(queue.popleft())
        return chunk, size

    async def _send(
        self, round_: dict[Partition, list[Record]], publication: _Publication
    ) -> dict[Partition, tuple[list[Record], BaseException]]:
        """Send one batch to each partition and wait for all; those that Kafka refused.

        Whatever is neither delivered nor refused stays as it was: free, and perhaps written.
        """
        assert self._producer is not None
        producer = self._producer
        failures: dict[Partition, tuple[list[Record], BaseException]] = {}
        sent: dict[asyncio.Future[object], Partition] = {}
        now_ms = int(time.time() * 1000)
        for (topic, number), chunk in round_.items():
            if not chunk:
                continue
            # Without this, send_batch would wait for a topic that is gone, or even create it.
            if number not in (producer.client.cluster.partitions_for_topic(topic) or ()):
                failures[topic, number] = (chunk, kafka_errors.UnknownTopicOrPartitionError())
                continue
            batch = producer.create_batch()
            for record in chunk:
                if not batch.append(key=record.key, value=record.value, timestamp=now_ms, headers=record.headers):
                    raise RuntimeError(f"outbox id {record.id} did not fit into its batch")
            try:
                future = await producer.send_batch(batch, topic, partition=number)
            except kafka_errors.KafkaError as refusal:
                failures[topic, number] = (chunk, refusal)
            else:
                # Nobody asks an abandoned one, and asyncio would say so at length.
                future.add_done_callback(lambda done: done.cancelled() or done.exception())
                sent[future] = (topic, number)
        unanswered = await self._wait_for(sent, sum(len(round_[partition]) for partition in sent.values()))
        for future, partition in sent.items():
            if future in unanswered:
                continue
            error = future.exception()
            if error is None:
                publication.delivered(round_[partition])
            else:
                failures[partition] = (round_[partition], error)
                self._telemetry.publish_failed(*partition, len(round_[partition]), _name(error))
        if unanswered or failures:
            # Sequence numbers are used up, or something may still be on its way: this producer is finished.
            await self._abandon()
        return failures

    async def _wait_for(
        self, futures: Collection[asyncio.Future[object]], rows: int
    ) -> Collection[asyncio.Future[object]]:
        """Wait until Kafka has answered all, or the deadline; those still unanswered."""
        if not futures:
            return ()
        deadline_seconds = self._deadline_seconds * self._lengthened
        _, pending = await asyncio.wait(futures, timeout=min(self._warn_seconds, deadline_seconds))
        if pending and deadline_seconds > self._warn_seconds:
            self._telemetry.publish_slow(rows, self._warn_seconds)
            _, pending = await asyncio.wait(pending, timeout=deadline_seconds - self._warn_seconds)
        if pending:
            self._telemetry.publish_abandoned(rows, deadline_seconds)
            self._lengthened = min(_LONGEST_DEADLINE, self._lengthened * 2)
        else:
            self._lengthened = 1
        return pending

    # -- blame

    async def _isolate(
        self,
        partition: Partition,
        refused: list[Record],
        error: BaseException,
        publication: _Publication,
        is_ours: Callable[[], bool],
    ) -> bool:
        """Find the rows at fault in a refused batch by halving it; deliver the others, in order.

        A row is blamed only when Kafka refused it alone. False when the partition can't go on in this publication.
        """
        to_try = [refused]
        while to_try:
            chunk = [record for record in to_try.pop() if _line(record) not in publication.halted]
            if not chunk:
                continue
            if chunk != refused:
                if not is_ours() or not await self._rebuilt():
                    return False
                failures = await self._send({partition: chunk}, publication)
                if not failures:
                    if self._producer is None:
                        return False
                    continue
                ((_, error),) = failures.values()
            if isinstance(error, _TOPIC_ERRORS):
                publication.refuse_topic(partition[0], error)
                break
            if not isinstance(error, _ROW_ERRORS):
                break
            if len(chunk) == 1:
                publication.refuse_row(chunk[0], error)
            else:
                middle = len(chunk) // 2
                to_try += [chunk[middle:], chunk[:middle]]
        else:
            return await self._rebuilt()
        await self._rebuilt()
        return False

    # -- the producer's life

    async def _rebuilt(self) -> bool:
        """A producer is there, made anew if need be."""
        if self._producer is None:
            with contextlib.suppress(PublisherUnavailableError):
                await self.connect()
        return self._producer is not None

    async def _abandon(self) -> None:
        """Make sure that the producer sends nothing any more, and be without one."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await _dismantle(producer)


async def _dismantle(producer: AIOKafkaProducer) -> None:
    """Stop a producer without flushing: its sender first, then its sockets. Bounded in time, never raises.

    aiokafka has no public way: ``stop`` flushes, which may never end.
    """
    producer._closed = True
    sender = producer._sender.sender_task
    if sender is not None:
        sender.cancel()
    with contextlib.suppress(TimeoutError, kafka_errors.KafkaError, OSError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
            await producer.client.close()
    if sender is not None and not sender.done():
        # Cancelled once, the sender waits for its requests; their sockets are closed now.
        sender.cancel()
        await asyncio.wait([sender], timeout=_CLOSE_TIMEOUT_SECONDS)
    producer._message_accumulator.fail_all(kafka_errors.ProducerClosed())


class _Publication:
    """What has become of each record of one ``publish`` so far."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        #: Keys with a record that Kafka refused: nothing later of theirs may go.
        self.halted: set[Line] = set()
        self._known: dict[int, Outcome] = {}
        self._refused_topics: dict[str, BaseException] = {}

    def delivered(self, records: Sequence[Record]) -> None:
        for record in records:
            self._known[record.id] = Delivered(record)

    def refuse_row(self, record: Record, error: BaseException) -> None:
        self._known[record.id] = Retry(record, Scope.ROW, _name(error), _advice(error))
        self.halted.add(_line(record))

    def refuse_topic(self, topic: str, error: BaseException) -> None:
        self._refused_topics.setdefault(topic, error)

    def outcomes(self) -> list[Outcome]:
        return [self._known.get(record.id) or self._unsent(record) for record in self.records]

    def _unsent(self, record: Record) -> Outcome:
        error = self._refused_topics.get(record.topic)
        return Released(record) if error is None else Retry(record, Scope.TOPIC, _name(error), _advice(error))


def _line(record: Record) -> Line:
    """What waits together: the records of a ``(topic, key)``, or a record without a key alone."""
    return (record.topic, record.id if record.key is None else record.key)


def _size(record: Record) -> int:
    """An upper bound of the bytes that the record takes in a batch (record format v2: seven varints and a flag)."""
    size = 40 + len(record.key or b"") + len(record.value or b"")
    for name, value in record.headers:
        # UTF-8 takes at most four bytes a character.
        size += 10 + 4 * len(name) + len(value)
    return size


def _name(error: BaseException) -> str:
    return type(error).__name__


_ADVICE: dict[type[BaseException], str] = {
    kafka_errors.MessageSizeTooLargeError: (
        "the record is larger than the topic takes: raise its max.message.bytes, or store less in payload"
    ),
    RecordTooLargeError: "the record is larger than brokers take in one request (100 MiB): store less in payload",
    kafka_errors.TopicAuthorizationFailedError: "grant this relay's user Write on the topic",
    kafka_errors.UnknownTopicOrPartitionError: (
        "create the topic (the relay never does), or grant this relay's user Describe on it"
    ),
}


def _advice(error: BaseException) -> str:
    return _ADVICE.get(type(error)) or str(error) or "see the broker's log"
