"""Kafka: what is published, and what becomes of it.

Batches are built here, one a partition, since aiokafka's own ``send`` costs four times as much a message
(``docs/decisions/0005-publishing-with-aiokafka.md``). What is left undecided by Kafka ends here: a publish has a
deadline, and past it the producer is abandoned.

Whose fault an error is stands in ``blame.py``. A row is blamed only when Kafka refused it alone, and for an error that
Kafka gives no name only when its partition took others. Where Kafka can't be reached, it is nobody's, and the rows are
free again. A topic's rows wait, other topics flow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any

from aiokafka import errors as kafka_errors

from outbox_relay.blame import Fault, advice_on, fault_of, name_of
from outbox_relay.errors import PublisherUnavailableError
from outbox_relay.kafka_security import PLAINTEXT, KafkaSecurity
from outbox_relay.message import TOPIC_NOT_ALLOWED, Outcome, Record
from outbox_relay.partitioner import Partition, partition_for
from outbox_relay.producer import Producer
from outbox_relay.publication import Publication, size_bytes
from outbox_relay.telemetry import Telemetry

#: A broker closes the connection on a request above its ``socket.request.max.bytes``, by default 100 MiB, instead of
#: answering, and would on every later try. Measured before compression, as Java's client does, with room for names.
REQUEST_BYTES = 99 * 1024 * 1024
#: A publish deadline that passed is lengthened for the next try, up to this many times its setting.
_LONGEST_DEADLINE = 8
#: How often is looked whether there is still something to wait for.
_LOOK_SECONDS = 0.5
#: How long rows at fault are searched for before the others are given back and claimed anew.
_BLAME_SECONDS = 1.0

#: What may be one record's fault, which is looked for.
_BLAMED = (Fault.ROW, Fault.UNCLEAR)
#: What isn't waited for when nothing else is under way.
_HOPELESS = (kafka_errors.UnknownTopicOrPartitionError, kafka_errors.NotEnoughReplicasError)

_NOT_ALLOWED = "add it to kafka.allowed_topics, if it is meant, and restart the relay"


class KafkaPublisher:
    """One producer at a time, made anew whenever it is in doubt; see :class:`outbox_relay.relay.Publisher`.

    ``batch_bytes`` bounds a batch before compression, and must be below the topics' ``max.message.bytes``.
    ``metadata_max_age_seconds`` is how long it may take until a new partition is used. ``records_per_producer`` keeps
    sequence numbers, of which a partition and producer have 2**31, from running out. ``allowed_topics`` are names, and
    prefixes that end in ``*``; rows for others are refused without asking Kafka.
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
        metadata_max_age_seconds: float = 300.0,
        records_per_producer: int = 1_000_000_000,
        security: KafkaSecurity = PLAINTEXT,
        allowed_topics: Collection[str] | None = None,
    ) -> None:
        self._bootstrap_servers = list(bootstrap_servers)
        self._settings: dict[str, Any] = {
            "bootstrap_servers": self._bootstrap_servers,
            "client_id": client_id,
            "acks": "all",
            "enable_idempotence": True,
            "compression_type": None if compression == "none" else compression,
            "max_batch_size": batch_bytes,
            "request_timeout_ms": int(request_timeout_seconds * 1000),
            "metadata_max_age_ms": int(metadata_max_age_seconds * 1000),
        }
        self._security = security
        self._allowed_topics = allowed_topics
        self._telemetry = telemetry
        self._batch_bytes = batch_bytes
        self._connect_timeout_seconds = connect_timeout_seconds
        self._warn_seconds = publish_warn_seconds
        self._deadline_seconds = publish_deadline_seconds
        self._records_per_producer = records_per_producer
        self._lengthened: dict[str, int] = {}  # by topic, where it isn't 1
        self._producer: Producer | None = None
        self._keyless_turn = 0

    @property
    def ready(self) -> bool:
        return self._producer is not None

    async def connect(self) -> None:
        await self._abandon()
        try:
            settings = {**self._settings, **self._security.arguments()}
            self._producer = await Producer.connect(settings, self._connect_timeout_seconds)
        except OSError as error:
            raise PublisherUnavailableError(f"connect to Kafka: {error}") from error
        except PublisherUnavailableError as error:
            problem = await self._security.refusal(self._bootstrap_servers)
            if problem is None:
                raise
            raise PublisherUnavailableError(f"connect to Kafka: {problem}") from error

    async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
        publication = Publication(records, batch_bytes=self._batch_bytes, request_bytes=REQUEST_BYTES)
        try:
            if self.ready and await self._enqueue(publication, records):
                await self._send_all(publication, is_ours)
        except BaseException:
            # Cancelled, or a defect: nothing may go out behind the caller's back.
            await self._abandon()
            raise
        return publication.outcomes(reachable=self.ready)

    async def close(self) -> None:
        await self._abandon()

    def obstacle(self, topic: str) -> str | None:
        """Why nothing can be written to the topic, as far as is known without trying; once connected."""
        assert self._producer is not None
        if not is_allowed(topic, self._allowed_topics):
            return f"{TOPIC_NOT_ALLOWED}, {_NOT_ALLOWED}"
        count = self._producer.partition_count(topic)
        problem = next(filter(None, (self._producer.obstacle((topic, number)) for number in range(count))), None)
        if not count:
            problem = kafka_errors.UnknownTopicOrPartitionError()
        return None if problem is None else f"{name_of(problem)}, {advice_on(problem)}"

    # -- one publication

    async def _enqueue(self, publication: Publication, records: Sequence[Record]) -> bool:
        """Find each record its partition; False when Kafka had to be asked for that and didn't answer."""
        assert self._producer is not None
        producer = self._producer
        topics = {topic for topic in publication.topics if is_allowed(topic, self._allowed_topics)}
        for topic in publication.topics - topics:
            publication.refuse_topic(topic, TOPIC_NOT_ALLOWED, _NOT_ALLOWED)
        if any(self._lacks_something(topic) for topic in topics) and not await producer.refresh():
            await self._abandon()
            return False
        counts = {topic: producer.partition_count(topic) for topic in topics}
        for topic, count in counts.items():
            if not count:
                self._refuse_topic(publication, topic, kafka_errors.UnknownTopicOrPartitionError())
        self._keyless_turn += 1
        for record in records:
            if count := counts.get(record.topic, 0):
                number = self._keyless_turn % count if record.key is None else partition_for(record.key, count)
                publication.add((record.topic, number), record)
        return True

    def _lacks_something(self, topic: str) -> bool:
        """Whether the topic is missing or a partition has no leader, as far as is known."""
        assert self._producer is not None
        count = self._producer.partition_count(topic)
        return not count or any(self._producer.obstacle((topic, number)) for number in range(count))

    async def _send_all(self, publication: Publication, is_ours: Callable[[], bool]) -> None:
        blaming_since: float | None = None
        blamed_enough = False
        sent_again: set[Partition] = set()
        while await self._renewed() and not blamed_enough and is_ours() and (round_ := publication.next_round()):
            for partition, error in (await self._send(round_)).items():
                batch = round_[partition]
                fault = None if error is None else fault_of(error)
                if error is None:
                    publication.delivered(partition, batch)
                elif fault is Fault.PRODUCER and partition not in sent_again:
                    # Once: whoever refuses the new producer too doesn't mend by being asked in a loop.
                    sent_again.add(partition)
                    publication.put_back(partition, batch)
                elif fault not in _BLAMED:
                    self._refuse_topic(publication, partition[0], error)
                    publication.give_up(partition)
                elif len(batch) > 1:
                    blaming_since = blaming_since or time.monotonic()
                    publication.put_back_in_parts(partition, batch)
                else:
                    publication.refuse_row(
                        partition, batch[0], name_of(error), advice_on(error), surely=fault is Fault.ROW
                    )
                    # Only after one was found, so that every publication gets on.
                    blamed_enough = blaming_since is not None and time.monotonic() - blaming_since > _BLAME_SECONDS

    def _refuse_topic(self, publication: Publication, topic: str, error: BaseException) -> None:
        publication.refuse_topic(topic, name_of(error), advice_on(error))

    async def _send(self, round_: Mapping[Partition, Sequence[Record]]) -> dict[Partition, BaseException | None]:
        """Send one batch to each partition and wait for all: None is an acknowledgement, anything else none.

        After TimeoutError, as after an obstacle that turned up meanwhile, the batch may be written or not.
        """
        assert self._producer is not None
        producer = self._producer
        answers: dict[Partition, BaseException | None] = {}
        sent: dict[asyncio.Future[object], Partition] = {}
        doubtful = False
        for partition, batch in round_.items():
            too_large = size_bytes(batch[0]) > REQUEST_BYTES
            obstacle = kafka_errors.RecordTooLargeError() if too_large else producer.obstacle(partition)
            if obstacle is not None:
                answers[partition] = obstacle
                continue
            try:
                sent[await producer.send(partition, batch)] = partition
            except (kafka_errors.KafkaError, TimeoutError) as failure:
                answers[partition] = failure
                doubtful = True
        unanswered = await self._wait(sent, {partition: len(batch) for partition, batch in round_.items()})
        for future, partition in sent.items():
            error = future.exception() if future not in unanswered else producer.obstacle(partition) or TimeoutError()
            answers[partition] = error
            doubtful = doubtful or error is not None
            if error is not None and future not in unanswered and fault_of(error) not in _BLAMED:
                self._telemetry.publish_failed(*partition, len(round_[partition]), name_of(error))
        if doubtful:
            # Sequence numbers are used up, or something may still be on its way: this producer is finished.
            await self._abandon()
        return answers

    async def _wait(
        self, sent: Mapping[asyncio.Future[object], Partition], rows: Mapping[Partition, int]
    ) -> Set[asyncio.Future[object]]:
        """Wait until Kafka has answered all, or the deadline, or waiting is hopeless; those without an answer."""
        assert self._producer is not None
        topics = {topic for topic, _ in sent.values()}
        deadline_seconds = self._deadline_seconds * max((self._lengthened.get(topic, 1) for topic in topics), default=1)
        began = time.monotonic()
        said_slow = False
        pending: Set[asyncio.Future[object]] = set(sent)

        def unanswered_rows() -> int:
            return sum(rows[sent[future]] for future in pending)

        while pending:
            waited = time.monotonic() - began
            if waited >= deadline_seconds:
                self._lengthen({sent[future][0] for future in pending})
                self._telemetry.publish_abandoned(unanswered_rows(), deadline_seconds)
                return pending
            if waited >= self._warn_seconds and not said_slow:
                said_slow = True
                self._telemetry.publish_slow(unanswered_rows(), waited)
            if waited >= _LOOK_SECONDS and all(self._is_hopeless(sent[future]) for future in pending):
                return pending
            looks = (_LOOK_SECONDS, deadline_seconds - waited, self._warn_seconds - waited)
            _, pending = await asyncio.wait(pending, timeout=min(seconds for seconds in looks if seconds > 0))
        if said_slow:
            self._telemetry.publish_answered(sum(rows[partition] for partition in sent.values()), waited)
        self._shorten(topics, time.monotonic() - began)
        return pending

    def _lengthen(self, topics: Iterable[str]) -> None:
        for topic in topics:
            self._lengthened[topic] = min(_LONGEST_DEADLINE, self._lengthened.get(topic, 1) * 2)

    def _shorten(self, topics: Set[str], waited_seconds: float) -> None:
        """By half, and only for an answer that would have come within that: else every other publish is repeated."""
        for topic in topics & self._lengthened.keys():
            shorter = self._lengthened[topic] // 2
            if waited_seconds < shorter * self._deadline_seconds:
                self._lengthened[topic] = shorter
            if self._lengthened[topic] == 1:
                del self._lengthened[topic]

    def _is_hopeless(self, partition: Partition) -> bool:
        """Whether the topic is gone, or has too few replicas, so that its batch isn't written and won't be soon."""
        assert self._producer is not None
        return isinstance(self._producer.obstacle(partition), _HOPELESS)

    # -- the producer's life

    async def _renewed(self) -> bool:
        """A producer is there that may go on, made anew if need be; False when Kafka can't be reached."""
        if self._producer is not None and self._producer.records_sent >= self._records_per_producer:
            await self._abandon()
        if self._producer is None:
            try:
                await self.connect()
            except PublisherUnavailableError:
                return False
            self._telemetry.kafka_available()
        return True

    async def _abandon(self) -> None:
        """Make sure that the producer sends nothing any more, and be without one."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.abandon()


def is_allowed(topic: str, allowed_topics: Collection[str] | None) -> bool:
    """``allowed_topics`` are names, and prefixes that end in ``*``; None allows every topic."""
    return allowed_topics is None or any(
        topic.startswith(allowed[:-1]) if allowed.endswith("*") else topic == allowed for allowed in allowed_topics
    )
