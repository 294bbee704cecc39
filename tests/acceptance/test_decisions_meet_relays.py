"""What operators decide, and what a relay that knows the slot by heart makes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from outbox_relay import pauses
from outbox_relay.dead_letters import DISCARDED, RETRIED, DeadLetters, Edit, Selector
from outbox_relay.failures import Policies, Policy
from outbox_relay.servers import Postgres
from outbox_relay.source.session import Session
from tests.acceptance.commands import session_on
from tests.acceptance.parked import broken_rules
from tests.acceptance.test_parking import QUICK, refusing, step, until
from tests.conftest import Database
from tests.contract.sources import PostgresWorld
from tests.fakes import record
from tests.waiting import eventually

DYING = Policies(QUICK, Policy(max_attempts=2))


@pytest.fixture
async def world(database: Database, postgres: Postgres) -> AsyncIterator[PostgresWorld]:
    world = await PostgresWorld.open(database, postgres.url)
    yield world
    await world.close()


@pytest.fixture
async def operator(world: PostgresWorld, database: Database) -> AsyncIterator[Session]:
    session = session_on(database)
    yield session
    await session.close()


@pytest.fixture
async def connection(world: PostgresWorld, database: Database) -> asyncpg.Connection:
    return await database.connect()


async def test_retried_and_discarded_rows_let_their_followers_go_in_order(
    world: PostgresWorld, operator: Session, connection: asyncpg.Connection
) -> None:
    await world.insert(*(record(id_, key) for id_, key in enumerate("abaabba", start=1)))
    source = await world.source(policies=DYING)
    dead = {1: "dead", 3: "blocked", 4: "blocked", 7: "blocked", 2: "dead", 5: "blocked", 6: "blocked"}
    await until(source, connection, dead, refusing(1, 2))
    letters = DeadLetters(operator)
    await letters.retry(await letters.choose(RETRIED, Selector((1,))), "")
    assert await until(source, connection, {2: "dead", 5: "blocked", 6: "blocked"}) == [1, 3, 4, 7]
    await letters.discard(await letters.choose(DISCARDED, Selector((2, 5))), "", "r")
    assert await until(source, connection, {2: "discarded", 5: "discarded"}) == [6]
    assert await broken_rules(connection) == {}
    assert await world.sent() == {1, 3, 4, 6, 7}


async def test_a_retried_row_has_all_its_attempts_again(
    world: PostgresWorld, operator: Session, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"))
    source = await world.source(policies=DYING)
    await until(source, connection, {1: "dead", 2: "blocked"}, refusing(1))
    letters = DeadLetters(operator)
    await letters.retry(await letters.choose(RETRIED, Selector()), "")
    tries = 0

    async def dead_again() -> bool:
        nonlocal tries
        claim = await source.claim()
        tries += sum(each.id == 1 for each in claim.records)
        source.settle([refused for each in claim.records if (refused := refusing(1)(each))])
        return bool(await connection.fetchval("SELECT state = 'dead' FROM outbox_parked WHERE id = 1"))

    await eventually(dead_again, "it is dead again")
    assert tries == 2


async def test_a_row_that_joins_a_line_which_its_relay_does_not_know_is_sent(
    world: PostgresWorld, operator: Session, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"))
    source = await world.source(policies=DYING)
    await until(source, connection, {1: "dead"}, refusing(1))
    await DeadLetters(operator).edit(1, Edit(topic="another"))
    # By this one the relay learns that nothing is left of the line that it knew.
    await world.insert(record(2, "a"))
    delivered: list[int] = []

    async def both() -> bool:
        delivered.extend(await step(source))
        return sorted(delivered) == [1, 2]

    await eventually(both, "both are sent", 5)
    await until(source, connection, {})


async def test_what_is_tried_again_waits_too_while_its_topic_is_paused(
    world: PostgresWorld, operator: Session, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"))
    source = await world.source(policies=DYING)
    await until(source, connection, {1: "dead", 2: "blocked"}, refusing(1))
    (topic,) = {row["topic"] for row in await connection.fetch("SELECT topic FROM outbox")}
    await pauses.pause(operator, topic, "r")
    await world.paused({topic})
    await world.insert(record(3, "b"))
    await until(source, connection, {1: "dead", 2: "blocked", 3: "topic"})
    letters = DeadLetters(operator)
    await letters.retry(await letters.choose(RETRIED, Selector()), "")
    assert await until(source, connection, {1: "topic", 2: "blocked", 3: "topic"}) == []
    await letters.discard(await letters.choose(DISCARDED, Selector((1,))), "", "r")
    assert await until(source, connection, {1: "discarded", 2: "topic", 3: "topic"}) == []
    await pauses.resume(operator, topic)
    assert sorted(await until(source, connection, {1: "discarded"})) == [2, 3]
