"""Operators decide about rows a thousand times while two relays work on them: order holds, and nothing is lost or
sent against a decision."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from outbox_relay import ledger
from outbox_relay.dead_letters import DISCARDED, RETRIED, DeadLetters, Edit, Selector
from outbox_relay.errors import RefusedError
from outbox_relay.servers import Kafka
from outbox_relay.topic_reader import check_topics
from tests.acceptance.commands import session_on
from tests.acceptance.parked import broken_rules
from tests.acceptance.relays import new_topic, relay_process
from tests.conftest import Database
from tests.waiting import eventually

DEEDS = 1_000
OPERATORS = 6
KEYS = 24
SEED = 5

#: What the topic takes, and what it doesn't.
LIMIT = {"max.message.bytes": "4096"}
SMALL, LARGE = b"small", b"x" * 8_000

_SOME = """
SELECT id FROM outbox_parked WHERE state = ANY ($1) AND ($2::int IS NULL OR id % $3 = $2) ORDER BY random() LIMIT 1
"""

_UNFINISHED = """
SELECT o.id FROM outbox o LEFT JOIN outbox_parked p ON p.id = o.id AND p.state = 'discarded'
WHERE o.sent_at IS NULL AND p.id IS NULL ORDER BY o.id LIMIT 20
"""


@dataclass
class Storm:
    """What was done, as far as it succeeded."""

    topic: str
    moved_to: str
    deeds: int = 0
    done: Counter[str] = field(default_factory=Counter)
    payloads: dict[int, bytes] = field(default_factory=dict)  # of rows that were corrected
    moved: set[int] = field(default_factory=set)
    discarded: set[int] = field(default_factory=set)
    broken: list[dict[str, list[int]]] = field(default_factory=list)


class Operator:
    """Also an application that alone writes its keys. Corrects only rows that no other operator corrects, so that
    it is known which correction is the last."""

    def __init__(self, number: int, storm: Storm, letters: DeadLetters, connection: asyncpg.Connection) -> None:
        self._number = number
        self._storm = storm
        self._letters = letters
        self._connection = connection
        self._random = random.Random(f"{SEED} {number}")
        self._keys = [f"k{key}" for key in range(KEYS) if key % OPERATORS == number]

    async def work(self) -> None:
        await self._write(30)
        while self._storm.deeds < DEEDS:
            deed = self._random.choices([self._retry, self._correct, self._move, self._discard], [4, 3, 1, 2])[0]
            if await deed():
                self._storm.deeds += 1
                await self._write(self._random.randrange(4))
            else:
                # Nothing waits for a decision; a row that will comes sooner than others are through.
                await self._write(1)
                await asyncio.sleep(0.05)

    async def _write(self, rows: int) -> None:
        payloads = self._random.choices([LARGE, SMALL], [1, 6], k=rows)
        await self._connection.executemany(
            "INSERT INTO outbox (topic, key, payload) VALUES ($1, $2, $3)",
            [(self._storm.topic, self._random.choice(self._keys), payload) for payload in payloads],
        )

    async def _some(self, states: tuple[str, ...], *, mine: bool = False) -> int | None:
        id_: int | None = await self._connection.fetchval(_SOME, states, self._number if mine else None, OPERATORS)
        return id_

    async def _retry(self) -> bool:
        id_ = await self._some(RETRIED)
        if id_ is None:
            return False
        by_id, by_error = Selector((id_,)), Selector(error="MessageSizeTooLargeError")
        selector = by_error if self._random.random() < 0.05 else by_id
        self._storm.done["retry"] += await self._letters.retry(await self._letters.choose(RETRIED, selector), "storm")
        return True

    async def _discard(self) -> bool:
        id_ = await self._some(DISCARDED)
        if id_ is None:
            return False
        if await self._letters.discard(await self._letters.choose(DISCARDED, Selector((id_,))), "storm", "storm"):
            self._storm.done["discard"] += 1
            self._storm.discarded.add(id_)
        return True

    async def _correct(self) -> bool:
        id_ = await self._some(RETRIED, mine=True)
        if id_ is None:
            return False
        # Some corrections don't help.
        payload = b"%d %d" % (id_, self._storm.deeds) + (LARGE if self._random.random() < 0.3 else b"")
        with contextlib.suppress(RefusedError):
            await self._letters.edit(id_, Edit(set_headers={"by": str(self._number)}, payload=payload))
            self._storm.payloads[id_] = payload
            self._storm.done["correct"] += 1
        return True

    async def _move(self) -> bool:
        id_ = await self._some(RETRIED, mine=True)
        if id_ is None:
            return False
        with contextlib.suppress(RefusedError):
            await self._letters.edit(id_, Edit(topic=self._storm.moved_to))
            self._storm.moved.add(id_)
            self._storm.done["move"] += 1
        return True


async def test_a_thousand_decisions_while_two_relays_work(outbox_database: Database, kafka: Kafka) -> None:
    storm = Storm(await new_topic(kafka, 3, LIMIT), await new_topic(kafka, 3))
    connection = await outbox_database.connect()
    settings: dict[str, Any] = {
        "kafka": {"batch_bytes": 2_048},
        "log": {"level": "warning"},
        "max_attempts": 2,
        "retry_first_seconds": 0.02,
        "retry_ceiling_seconds": 0.05,
    }
    servers = outbox_database.url, kafka.bootstrap_servers
    with relay_process(*servers, **settings) as first, relay_process(*servers, **settings) as second:
        async with _operators(storm, outbox_database) as operators, _watched(storm, outbox_database):
            await asyncio.gather(*(operator.work() for operator in operators))
            await _mend_all_and_drain(storm, outbox_database)
        assert await first.stop() == 0
        assert await second.stop() == 0

    assert storm.broken == []
    assert min(storm.done[deed] for deed in ("retry", "correct", "move", "discard")) >= 20, storm.done
    # What is left is what was discarded, and nothing of that was sent.
    parked = await connection.fetch("SELECT id, state FROM outbox_parked")
    assert {row["state"] for row in parked} == {"discarded"}
    assert {row["id"] for row in parked} == storm.discarded
    audited = "SELECT id FROM outbox_audit, unnest(ids) AS id WHERE command = 'dead discard' ORDER BY id"
    assert [row["id"] for row in await connection.fetch(audited)] == sorted(storm.discarded)

    rows = [row for row in await ledger.committed_rows(connection) if row.outbox_id not in storm.discarded]
    # No correction is lost: the outbox has it, and Kafka has what the outbox has.
    values = {row.outbox_id: row.value for row in rows}
    assert {id_: values[id_] for id_ in storm.payloads if id_ in values} == {
        id_: payload for id_, payload in storm.payloads.items() if id_ in values
    }
    assert {row.outbox_id for row in rows if row.topic == storm.moved_to} == storm.moved - storm.discarded
    for topic in (storm.topic, storm.moved_to):
        report = await check_topics(
            [row for row in rows if row.topic == topic], kafka.bootstrap_servers, [topic], deadline_seconds=60
        )
        counts = report.lost, report.invented, report.duplicates, report.corrupted, report.misplaced
        assert counts == (0, 0, 0, 0, 0), report.describe()
        # A row that changes its topic joins another line, where its order isn't kept.
        assert topic == storm.moved_to or report.out_of_order == 0, report.describe()


@contextlib.asynccontextmanager
async def _operators(storm: Storm, database: Database) -> AsyncIterator[list[Operator]]:
    sessions = [session_on(database) for _ in range(OPERATORS)]
    yield [
        Operator(number, storm, DeadLetters(session), await database.connect())
        for number, session in enumerate(sessions)
    ]
    for session in sessions:
        await session.close()


@contextlib.asynccontextmanager
async def _watched(storm: Storm, database: Database) -> AsyncIterator[None]:
    """The rules are looked at again and again, and at the end."""
    connection = await database.connect()

    async def look() -> None:
        if broken := await broken_rules(connection):
            storm.broken.append(broken)

    async def watch() -> None:
        while True:
            await look()
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])
    assert watching.cancelled(), watching.exception()
    await look()


async def _mend_all_and_drain(storm: Storm, database: Database) -> None:
    """Correct what is dead until everything is sent, but what was discarded."""
    session = session_on(database)
    letters = DeadLetters(session)
    connection = await database.connect()

    async def all_sent() -> bool:
        for row in await connection.fetch("SELECT id FROM outbox_parked WHERE state = 'dead'"):
            await letters.edit(row["id"], Edit(payload=SMALL))
            storm.payloads[row["id"]] = SMALL
        return not await connection.fetch(_UNFINISHED)

    try:
        await eventually(all_sent, "everything is sent or discarded", 60)
    except AssertionError:
        left = await connection.fetch(f"SELECT p.* FROM ({_UNFINISHED}) AS u LEFT JOIN outbox_parked p USING (id)")
        raise AssertionError([dict(row) for row in left], await broken_rules(connection)) from None
    finally:
        await session.close()
