"""What was committed against what Kafka holds: a run that loses something, or breaks the order it offers, is no result.

The ledger is written in the writers' own transactions, so that it is right also where an arm deletes what it has sent.
The topic is read back to its end after the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import asyncpg
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

LEDGER = """
CREATE TABLE bench_ledger (n bigint NOT NULL, k integer NOT NULL, v integer NOT NULL)
"""

_SECONDS = 120.0
_POLL_SECONDS = 5.0
#: Of 1 MB each they are 200 MB here.
_AT_ONCE = 200

#: How a payload begins, also where it arrives as a JSON string.
_HEAD = re.compile(rb'^"?\{\\?"n\\?": ?(\d+), ?\\?"k\\?": ?(\d+), ?\\?"v\\?": ?(\d+),')


class Row(NamedTuple):
    """One message as it was written: its number, its key's number, and which of the key's it is, from 1."""

    n: int
    k: int
    v: int


class Seen(NamedTuple):
    """One record, in the order of its partition."""

    partition: int
    at_ms: int  #: when the broker wrote it
    row: Row | None  #: None where the value can't be read as one of ours


@dataclass(frozen=True)
class Verdict:
    """What a run did wrong, in counts."""

    rows: int
    records: int
    lost: int = 0
    invented: int = 0  #: never written, or not as it was written
    repeated: int = 0
    reordered: int = 0  #: a first occurrence that comes after a later one of its key
    moved: int = 0  #: not in the partition that its key's first record is in

    def problem(self, *, ordered: bool) -> str | None:
        """Why the run is no result, if it isn't. Repeats are named, and not held against it."""
        wrong = {"lost": self.lost, "invented": self.invented}
        if ordered:
            wrong |= {"out of order": self.reordered, "in another partition than their key": self.moved}
        found = [f"{count:,} {what}" for what, count in wrong.items() if count]
        return f"of {self.rows:,} messages: {', '.join(found)}" if found else None


def compare(ledger: Mapping[int, Row], records: Iterable[Seen], *, complete: bool, ordered: bool) -> Verdict:
    """Compare. What was cut off before its end (not ``complete``) has lost what is missing *before* a key's last one.

    That is said only of an arm that is ``ordered``; another may rightly have sent later ones first.
    """
    numbers: set[int] = set()
    last: dict[int, int] = {}  # of each key, the highest version seen
    homes: dict[int, int] = {}  # of each key, the partition of its first record
    found = invented = reordered = moved = 0
    for partition, _, row in records:
        found += 1
        if row is None or ledger.get(row.n) != row:
            invented += 1
            continue
        if row.n in numbers:
            continue
        numbers.add(row.n)
        if row.v < last.get(row.k, 0):
            reordered += 1
        else:
            last[row.k] = row.v
        moved += homes.setdefault(row.k, partition) != partition
    missing = (row for row in ledger.values() if row.n not in numbers)
    lost = sum(1 for row in missing if complete or (ordered and row.v < last.get(row.k, 0)))
    return Verdict(len(ledger), found, lost, invented, found - invented - len(numbers), reordered, moved)


async def read_ledger(connection: asyncpg.Connection) -> dict[int, Row]:
    """All that was committed, by number."""
    rows = await connection.fetch("SELECT n, k, v FROM bench_ledger", timeout=_SECONDS)
    return {n: Row(n, k, v) for n, k, v in rows}


def read_topic(bootstrap_servers: str, topic: str, partitions: int) -> list[Seen]:
    """All records up to the end of each partition. Blocks. Raises KafkaException."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "bench",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "fetch.max.bytes": 16 * 1024 * 1024,
        }
    )
    seen: list[Seen] = []
    unread = set(range(partitions))
    try:
        consumer.assign([TopicPartition(topic, number, 0) for number in unread])
        while unread:
            messages = consumer.consume(_AT_ONCE, timeout=_POLL_SECONDS if not seen else 1.0)
            for message in messages:
                error = message.error()
                if error is None:
                    seen.append(Seen(message.partition() or 0, message.timestamp()[1], row_of(message.value())))
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard(message.partition())
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()
    return seen


def row_of(value: bytes | None) -> Row | None:
    """Which message a record's value is: as it was written, as a JSON string of that, or JSON with its members."""
    head = _HEAD.match(value or b"")
    if head is not None:
        return Row(*map(int, head.groups()))
    try:
        found = json.loads(value or b"")
        found = json.loads(found) if isinstance(found, str) else found
        return Row(*(_number(found[name]) for name in Row._fields))
    except (ValueError, LookupError, TypeError):
        return None


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return value
