"""One idempotent producer of aiokafka: it is made within a deadline, used, and thrown away on the first doubt.

Traits of aiokafka 0.14 that shape it:

- With the brokers gone a send never resolves, and ``stop`` flushes first, so it never ends either. So a producer is
  *abandoned*: it can send nothing any more. Cancelling its sender doesn't do that: requests under way are tasks of
  their own, and a connection that it closes goes on sending what its transport had buffered.
- A failed batch has used up sequence numbers without an epoch bump, so that the next is out of order for ever; and past
  2**31 - 1 they go on where no broker expects them. So it is made anew after any failure, and when it is worn out.
- A batch whose partition has no leader fails when it is as old as the request timeout, although it may have been sent
  before, and written. So it never gets so old: how long is waited is the publisher's to say.
- While a partition has too few replicas in sync it sends the batch again and again, without a word. So the answers are
  watched, for one such topic would otherwise stop all others until the publish deadline.
- While a partition of its has no leader it asks for metadata as fast as brokers answer. So that is slowed down.
- A metadata request that names a topic creates it where the broker allows that. So topics are never named: the
  client asks for all of them, and a topic that isn't among them is missing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.protocol.produce import ProduceRequest

from outbox_relay.blame import InvalidRecordError
from outbox_relay.errors import PublisherUnavailableError
from outbox_relay.message import Record
from outbox_relay.partitioner import Partition

# Else it would arrive as UnknownError, as an unexpected error in the broker does.
kafka_errors.kafka_errors.setdefault(InvalidRecordError.errno, InvalidRecordError)

_ABANDON_SECONDS = 5.0
#: The least time from one metadata request to the next.
_METADATA_SECONDS = 0.1


class Producer:
    """A connected producer; see :meth:`connect`."""

    def __init__(self, producer: AIOKafkaProducer, connect_timeout_seconds: float) -> None:
        self._producer = producer
        self._client = producer.client
        self._cluster = producer.client.cluster
        self._connect_timeout_seconds = connect_timeout_seconds
        self._requests: set[asyncio.Task[Any]] = set()
        #: Of the batch that is out: how often it was sent, and how often Kafka wrote it nowhere for want of replicas.
        self._tries: Counter[Partition] = Counter()
        self._rejections: Counter[Partition] = Counter()
        self.records_sent = 0
        self._watch_requests()
        self._watch_answers()
        self._slow_metadata_down()
        self._cut_connections_when_closed()

    @classmethod
    async def connect(cls, settings: Mapping[str, Any], connect_timeout_seconds: float) -> Producer:
        """A producer that knows all topics. Raises :class:`PublisherUnavailableError` within the timeout."""
        producer = cls(AIOKafkaProducer(**settings), connect_timeout_seconds)
        producer._producer._message_accumulator._batch_ttl = math.inf
        try:
            async with asyncio.timeout(connect_timeout_seconds):
                await producer._start(len(settings["bootstrap_servers"]))
                # A new client knows no topic yet, and a topic that it doesn't know counts as missing.
                if not await producer._client.force_metadata_update():
                    raise kafka_errors.KafkaConnectionError("no broker answers")
        except Exception as error:
            # Of any kind: aiokafka asserts what a broker answers, and no broker may end the relay.
            await producer.abandon()
            reason = _why_not_connected(error, settings["bootstrap_servers"], connect_timeout_seconds)
            raise PublisherUnavailableError(f"connect to Kafka: {reason}") from error
        except BaseException:
            await producer.abandon()
            raise
        return producer

    async def _start(self, servers: int) -> None:
        """As aiokafka's, but each bootstrap server gets a part of the time, so that none keeps it from the others."""
        request_timeout_ms = self._client._request_timeout_ms
        share_ms = int(self._connect_timeout_seconds * 1000 / (servers + 1))
        self._client._request_timeout_ms = min(request_timeout_ms, share_ms)
        await self._client.bootstrap()
        self._client._request_timeout_ms = request_timeout_ms
        await self._producer._sender.start()

    def partition_count(self, topic: str) -> int:
        """How many partitions the topic has; 0 where it is missing."""
        return len(self._cluster.partitions_for_topic(topic) or ())

    def obstacle(self, partition: Partition) -> kafka_errors.KafkaError | None:
        """Why nothing can be written to the partition, as far as is known now."""
        # Only when no try is without an answer: then the batch is surely not written.
        if self._rejections[partition] and self._rejections[partition] == self._tries[partition]:
            return kafka_errors.NotEnoughReplicasError()
        leader = self._cluster.leader_for_partition(TopicPartition(*partition))
        if leader is None:
            return kafka_errors.UnknownTopicOrPartitionError()
        return kafka_errors.LeaderNotAvailableError() if leader == -1 else None

    async def refresh(self) -> bool:
        """Ask Kafka about all topics again; False when no broker answers within the connect timeout."""
        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                return bool(await self._client.force_metadata_update())
        except TimeoutError:
            return False

    async def send(self, partition: Partition, records: Sequence[Record]) -> asyncio.Future[object]:
        """Hand a batch over, to a partition without an obstacle that has none outstanding; what Kafka will answer.

        The records are stamped with the time of now, so that an old backlog doesn't fall to a topic's retention.
        Raises KafkaError or TimeoutError, and RuntimeError when the records don't fit into one batch.
        """
        topic, number = partition
        now_ms = int(time.time() * 1000)
        batch = self._producer.create_batch()
        # Past the serializers, of which there are none: they would be a third of the work.
        append = batch._builder.append
        for offset, record in enumerate(records):
            if append(offset, now_ms, record.key, record.value, record.headers) is None:
                raise RuntimeError(f"outbox id {record.id} did not fit into its batch")
        batch._relative_offset = len(records)
        self.records_sent += len(records)
        self._tries.pop(partition, None)
        self._rejections.pop(partition, None)
        # It would wait for a topic that isn't known, or for a batch before this one: there is neither.
        async with asyncio.timeout(self._connect_timeout_seconds):
            answer: asyncio.Future[object] = await self._producer.send_batch(batch, topic, partition=number)
        # Nobody asks an abandoned one, and asyncio would say so at length.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return answer

    async def abandon(self) -> None:
        """Send nothing any more, from the first moment on; what a socket here still buffers is dropped.

        Bounded in time, never raises. What the operating system already has may still arrive.
        """
        self._producer._closed = True
        tasks = {self._producer._sender.sender_task, self._client._sync_task, *self._requests} - {None}
        # Before the first await, so that nothing can come in between, not even a cancellation.
        for task in tasks:
            task.cancel()
        for connection in self._client._conns.values():
            connection.close()
        ends = time.monotonic() + _ABANDON_SECONDS
        # Again and again, for a task whose own timeout comes at the same moment takes a cancellation for that.
        while tasks := {task for task in tasks if not task.done()}:
            await asyncio.wait(tasks, timeout=0.1)
            if time.monotonic() > ends:
                break
            for task in tasks:
                task.cancel()

    def _watch_requests(self) -> None:
        """Know the tasks that send; aiokafka's sender keeps them to itself."""
        send = self._producer._sender._send_produce_req

        async def watched(node_id: int, batches: Any) -> None:
            if self._producer._closed:  # made in the very moment of abandoning
                return
            task = asyncio.current_task()
            assert task is not None
            self._requests.add(task)
            self._tries.update(batches.keys())
            try:
                await send(node_id, batches)
            finally:
                self._requests.discard(task)

        self._producer._sender._send_produce_req = watched

    def _watch_answers(self) -> None:
        send = self._client.send

        async def watched(node_id: int, request: Any, **group: Any) -> Any:
            response = await send(node_id, request, **group)
            if isinstance(request, ProduceRequest):
                for topic, partitions in response.topics:
                    for number, code, *_ in partitions:
                        self._rejections[topic, number] += code == kafka_errors.NotEnoughReplicasError.errno
            return response

        self._client.send = watched

    def _slow_metadata_down(self) -> None:
        update = self._client._metadata_update
        next_at = 0.0

        async def slowed_down(*arguments: Any) -> Any:
            nonlocal next_at
            await asyncio.sleep(next_at - time.monotonic())
            next_at = time.monotonic() + _METADATA_SECONDS
            return await update(*arguments)

        self._client._metadata_update = slowed_down

    def _cut_connections_when_closed(self) -> None:
        """Have each connection drop what it has buffered when it is closed, whoever closes it.

        A closed transport sends its buffer first, which for a broker that stands still ends when that goes on.
        """
        closed = self._client._on_connection_closed

        def cut(connection: Any, reason: Any) -> None:
            transport = connection._protocol._transport
            if transport is not None:
                transport.abort()
            closed(connection, reason)

        self._client._on_connection_closed = cut


def _why_not_connected(error: Exception, bootstrap_servers: Sequence[str], timeout_seconds: float) -> str:
    servers = ", ".join(bootstrap_servers)
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_seconds:g} s"
    if isinstance(error, kafka_errors.KafkaConnectionError):
        return f"no broker answers at {servers}: is it up, and is that its address?"
    if isinstance(error, kafka_errors.ClusterAuthorizationFailedError):
        return "grant this relay's user Write on its topics, or IdempotentWrite on the cluster"
    if isinstance(error, kafka_errors.KafkaError | OSError):
        return str(error)
    return f"an answer makes no sense ({type(error).__name__}): is it Kafka that listens at {servers}?"
