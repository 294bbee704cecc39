"""The bookkeeping of one ``publish``: what is still to be sent, partition by partition, and what became of the rest.

Order rests on two rules here. A partition has one batch out at a time, and its next is taken only when that is
answered; and behind a record that was refused nothing of its key is taken.

Kafka refuses whole batches. The record at fault is found by sending less: the batch is put back and half as many
records are taken, then half of that, until one alone is refused; what Kafka takes meanwhile doubles the next again. So
the records ahead of the bad one go first, and other partitions go on beside it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import TypeAlias

from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.partitioner import Partition

_BATCH_OVERHEAD_BYTES = 61

#: What waits together: the records of a ``(topic, key)``, or a record without a key alone.
Line: TypeAlias = tuple[str, bytes | int]


class Publication:
    """``batch_bytes`` bounds one batch, ``request_bytes`` all batches of a round; a larger record goes alone."""

    def __init__(self, records: Sequence[Record], *, batch_bytes: int, request_bytes: int) -> None:
        self._records = records
        self._batch_bytes = min(batch_bytes, request_bytes) - _BATCH_OVERHEAD_BYTES
        self._request_bytes = request_bytes
        self._queues: dict[Partition, deque[Record]] = defaultdict(deque)
        #: How many records at most are taken of a partition in which one is at fault.
        self._most: dict[Partition, int] = {}
        #: Keys with a record that Kafka refused: nothing later of theirs may go.
        self._halted: set[Line] = set()
        self._known: dict[int, Outcome] = {}
        self._refused_topics: dict[str, tuple[str, str]] = {}
        #: Refused alone, for a reason that may have nothing to do with them; by id, with their partitions.
        self._suspects: dict[int, Partition] = {}
        self._taking: set[Partition] = set()

    @property
    def topics(self) -> set[str]:
        return {record.topic for record in self._records}

    def add(self, partition: Partition, record: Record) -> None:
        """Queue a record, behind those that were added before it."""
        self._queues[partition].append(record)

    def next_round(self) -> dict[Partition, list[Record]]:
        """The next batch of each partition; empty when nothing is left to send."""
        round_: dict[Partition, list[Record]] = {}
        room = self._request_bytes
        for partition, queue in list(self._queues.items()):
            batch, size = self._take(partition, queue, room if round_ else None)
            if batch:
                round_[partition] = batch
                room -= size
            elif not queue:
                del self._queues[partition]
        return round_

    def _take(self, partition: Partition, queue: deque[Record], room: int | None) -> tuple[list[Record], int]:
        """The next records of a partition, without those that must wait, and their size in bytes."""
        batch: list[Record] = []
        most = self._most.get(partition, len(queue))
        size = 0
        while queue and len(batch) < most:
            record = queue[0]
            if self._halted and _line(record) in self._halted:
                queue.popleft()
                continue
            more = size_bytes(record)
            if (batch and size + more > self._batch_bytes) or (room is not None and size + more > room):
                break
            size += more
            batch.append(queue.popleft())
        return batch, size

    def delivered(self, partition: Partition, batch: Sequence[Record]) -> None:
        """Kafka acknowledged the batch."""
        for record in batch:
            self._known[record.id] = Delivered(record)
        self._taking.add(partition)
        if partition in self._most:
            self._most[partition] *= 2

    def put_back(self, partition: Partition, batch: Sequence[Record]) -> None:
        """It is sent again as it is."""
        self._queues[partition].extendleft(reversed(batch))

    def put_back_in_parts(self, partition: Partition, batch: Sequence[Record]) -> None:
        """Kafka refused the batch, for one of its several records: it is tried again in smaller parts."""
        self.put_back(partition, batch)
        self._most[partition] = len(batch) // 2

    def refuse_row(self, partition: Partition, record: Record, error: str, reason: str, *, surely: bool) -> None:
        """Kafka refused the record alone: its key waits. Unless ``surely``, it is blamed only if others are taken."""
        self._known[record.id] = Retry(record, Scope.ROW, error, reason)
        self._halted.add(_line(record))
        if not surely:
            self._suspects[record.id] = partition

    def refuse_topic(self, topic: str, error: str, reason: str) -> None:
        """What is unsent of the topic in the end waits."""
        self._refused_topics.setdefault(topic, (error, reason))

    def give_up(self, partition: Partition) -> None:
        """Send nothing more to the partition."""
        del self._queues[partition]

    def outcomes(self, *, reachable: bool) -> list[Outcome]:
        """What became of each record. Where Kafka can't be reached, no topic is to blame."""
        for id_, partition in self._suspects.items():
            suspect = self._known[id_]
            if partition not in self._taking and isinstance(suspect, Retry):
                self.refuse_topic(suspect.record.topic, suspect.error, suspect.reason)
                del self._known[id_]
        return [self._known.get(record.id) or self._unsent(record, reachable) for record in self._records]

    def _unsent(self, record: Record, reachable: bool) -> Outcome:
        refusal = self._refused_topics.get(record.topic) if reachable else None
        return Retry(record, Scope.TOPIC, *refusal) if refusal else Released(record)


def size_bytes(record: Record) -> int:
    """An upper bound of the bytes that the record takes in a batch (record format v2: seven varints and a flag)."""
    size = 40 + len(record.key or b"") + len(record.value or b"")
    for name, value in record.headers:
        # UTF-8 takes at most four bytes a character.
        size += 10 + 4 * len(name) + len(value)
    return size


def _line(record: Record) -> Line:
    return (record.topic, record.id if record.key is None else record.key)
