"""What becomes of rows that wait: parked with attempts and reason, tried again, dead, and their followers in order."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
import structlog

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.failures import Policies, Policy
from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.relay import Claim
from outbox_relay.retry import Backoff
from outbox_relay.servers import Postgres
from outbox_relay.source.polling import PollingSource
from tests.acceptance.parked import broken_rules, park, states
from tests.conftest import Database
from tests.contract.sources import PostgresWorld
from tests.fakes import record
from tests.waiting import eventually

QUICK = Backoff(0.01, 0.01)
NEVER = Backoff(3_600.0, 3_600.0)

#: What Kafka has against a record.
Wrong = Callable[[Record], Retry | None]


@pytest.fixture
def deletes_sent() -> bool:
    return False


@pytest.fixture
async def world(database: Database, postgres: Postgres, deletes_sent: bool) -> AsyncIterator[PostgresWorld]:
    world = await PostgresWorld.open(database, postgres.url, deletes_sent=deletes_sent)
    yield world
    await world.close()


@pytest.fixture
async def connection(world: PostgresWorld, database: Database) -> asyncpg.Connection:
    return await database.connect()


def refused(each: Record) -> Retry:
    return Retry(each, Scope.ROW, "MessageSizeTooLargeError", "raise max.message.bytes")


def missing(each: Record) -> Retry:
    return Retry(each, Scope.TOPIC, "UnknownTopicOrPartitionError", "create the topic")


def refusing(*ids: int) -> Wrong:
    return lambda each: refused(each) if each.id in ids else None


def nothing_wrong(_: Record) -> Retry | None:
    return None


def outcomes(claim: Claim, wrong: Wrong) -> list[Outcome]:
    """As Kafka and the publisher do: after a row that isn't delivered, nothing later of its key is sent."""
    failed: set[tuple[str, bytes | None]] = set()
    result: list[Outcome] = []
    for each in claim.records:
        retry = wrong(each)
        if each.key is not None and (each.topic, each.key) in failed:
            result.append(Released(each))
        elif retry is not None:
            failed.add((each.topic, each.key))
            result.append(retry)
        else:
            result.append(Delivered(each))
    return result


async def step(source: PollingSource, wrong: Wrong = nothing_wrong) -> list[int]:
    """One claim, handed back; the ids that were delivered."""
    claim = await source.claim()
    of_claim = outcomes(claim, wrong)
    source.settle(of_claim)
    return [outcome.record.id for outcome in of_claim if isinstance(outcome, Delivered)]


async def until(
    source: PollingSource, connection: asyncpg.Connection, expected: dict[int, str], wrong: Wrong = nothing_wrong
) -> list[int]:
    """Claim until the rows that are parked are these; what was delivered meanwhile."""
    delivered: list[int] = []

    async def reached() -> bool:
        delivered.extend(await step(source, wrong))
        assert await broken_rules(connection) == {}
        return await states(connection) == expected

    await eventually(reached, f"{expected}")
    return delivered


async def test_a_row_refused_to_the_end_is_dead_with_its_reason_and_is_not_tried_again(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "b"), record(3, "a"), record(4, None))
    source = await world.source(policies=Policies(QUICK, Policy(max_attempts=3)))
    tried: list[int] = []

    def wrong(each: Record) -> Retry | None:
        tried.append(each.id)
        return refusing(1)(each)

    delivered = await until(source, connection, {1: "dead", 3: "blocked"}, wrong)
    assert delivered == [2, 4]
    assert tried.count(1) == 3
    row = await connection.fetchrow("SELECT * FROM outbox_parked WHERE id = 1")
    assert (row["attempts"], row["due_at"], row["error"], row["reason"]) == (
        3,
        None,
        "MessageSizeTooLargeError",
        "raise max.message.bytes",
    )
    await world.insert(record(5, "a"), record(6, "b"))
    assert await until(source, connection, {1: "dead", 3: "blocked", 5: "blocked"}) == [6]
    assert tried.count(1) == 3


async def test_a_row_that_is_tried_again_in_vain_keeps_since_when_it_waits(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "b", topic="gone"))
    source = await world.source(policies=Policies(QUICK, Policy(max_attempts=1_000)))
    tried: list[int] = []

    def wrong(each: Record) -> Retry | None:
        tried.append(each.id)
        return missing(each) if each.topic == "gone" else refused(each)

    async def meet(reached: Callable[[], Awaitable[bool]], what: str) -> None:
        async def met() -> bool:
            await step(source, wrong)
            return await reached()

        await eventually(met, what)

    async def are_parked() -> bool:
        return set(await states(connection)) == {1, 2}

    async def are_tried() -> bool:
        return min(tried.count(1), tried.count(2)) >= 3

    async def is_dead() -> bool:
        return (await states(connection))[1] == "dead"

    await meet(are_parked, "both wait")
    await connection.execute("UPDATE outbox_parked SET parked_at = parked_at - interval '1 hour'")
    since = dict(await connection.fetch("SELECT id, parked_at FROM outbox_parked"))
    tried.clear()
    await meet(are_tried, "each is tried three times more")
    await meet(are_parked, "both wait again")
    assert dict(await connection.fetch("SELECT id, parked_at FROM outbox_parked")) == since
    # Dead it is only now.
    await source.release()
    source = await world.source(policies=Policies(QUICK, Policy(max_attempts=1)))
    await meet(is_dead, "it is dead")
    assert await connection.fetchval("SELECT parked_at FROM outbox_parked WHERE id = 1") > since[1]


async def test_attempts_and_waiting_outlive_the_relay(world: PostgresWorld, connection: asyncpg.Connection) -> None:
    await world.insert(record(1, "a"), record(2, "a"))
    first = await world.source(policies=Policies(NEVER, Policy(max_attempts=3)))
    await until(first, connection, {1: "retry", 2: "blocked"}, refusing(1))
    await first.release()
    second = await world.source(policies=Policies(QUICK, Policy(max_attempts=3)))
    await eventually(lambda: claims_nothing(second), "it has looked")
    await connection.execute("UPDATE outbox_parked SET due_at = now() WHERE id = 1")
    await until(second, connection, {1: "dead", 2: "blocked"}, refusing(1))
    assert await connection.fetchval("SELECT attempts FROM outbox_parked WHERE id = 1") == 3


async def claims_nothing(source: PollingSource) -> bool:
    claim = await source.claim()
    return claim.is_idle and not claim.records


@pytest.mark.parametrize("deletes_sent", [False, True], ids=["mark", "delete"])
async def test_after_a_retry_the_followers_go_in_order_however_many_they_are(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(*(record(id_, "a") for id_ in range(1, 101)), record(1000, "b"))
    source = await world.source(batch_rows=7, policies=Policies(QUICK, Policy(max_attempts=1)))
    parked = {1: "dead"} | dict.fromkeys(range(2, 101), "blocked")
    assert await until(source, connection, parked, refusing(1)) == [1000]
    await connection.execute("UPDATE outbox_parked SET state = 'retry', due_at = now(), attempts = 0 WHERE id = 1")
    await world.insert(*(record(id_, "a") for id_ in range(101, 111)))
    assert await until(source, connection, {}) == list(range(1, 111))
    # Nothing is parked once the last have been claimed; what became of them is written after.
    await eventually(lambda: claims_nothing(source), "the last are settled")
    assert await world.sent() == {*range(1, 111), 1000}


async def test_followers_go_up_to_the_next_row_that_waits_for_something_of_its_own(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(*(record(id_, "a") for id_ in range(1, 6)))
    for id_, state in ((1, "retry"), (2, "blocked"), (3, "blocked"), (4, "dead"), (5, "blocked")):
        await park(connection, id_, state, due_in_seconds=0 if id_ == 1 else None)
    source = await world.source()
    assert await until(source, connection, {4: "dead", 5: "blocked"}) == [1, 2, 3]


async def test_followers_that_skip_go_on_and_the_row_is_tried_again(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"), record(3, "a", topic="other"), record(4, "a", topic="other"))
    policies = Policies(QUICK, Policy(max_attempts=2), {"t*": Policy(max_attempts=2, block=False)})
    source = await world.source(policies=policies)
    delivered = await until(source, connection, {1: "dead", 3: "dead", 4: "blocked"}, refusing(1, 3))
    assert delivered == [2]


async def test_followers_that_may_skip_from_now_on_are_freed(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"), record(3, "a"))
    first = await world.source(policies=Policies(QUICK, Policy(max_attempts=1)))
    await until(first, connection, {1: "dead", 2: "blocked", 3: "blocked"}, refusing(1))
    await first.release()
    second = await world.source(policies=Policies(QUICK, Policy(block=False)))
    assert await until(second, connection, {1: "dead"}) == [2, 3]


async def test_followers_are_freed_a_batch_at_a_time(world: PostgresWorld, connection: asyncpg.Connection) -> None:
    await world.insert(*(record(id_, "ab"[id_ % 2]) for id_ in range(1, 41)))
    await park(connection, 1, "dead")
    await park(connection, 2, "dead")
    for id_ in range(3, 41):
        await park(connection, id_, "blocked")
    source = await world.source(batch_rows=3, policies=Policies(QUICK, Policy(block=False)))
    delivered: list[int] = []
    blocked = [38]
    while blocked[-1]:
        delivered += await step(source)
        blocked.append(list((await states(connection)).values()).count("blocked"))
    assert max(before - after for before, after in itertools.pairwise(blocked)) == 3
    delivered += await until(source, connection, {1: "dead", 2: "dead"})
    assert sorted(delivered) == list(range(3, 41))


async def test_a_topic_that_takes_nothing_is_parked_tried_with_one_row_and_goes_on_in_order(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(*(record(id_, f"k{id_ % 5}") for id_ in range(1, 51)), record(100, "k1", topic="other"))
    source = await world.source(batch_rows=20, policies=Policies(Backoff(0.5, 0.5)))
    tried: list[int] = []

    def wrong(each: Record) -> Retry | None:
        if each.topic == "other":
            return None
        tried.append(each.id)
        return missing(each)

    delivered = await until(source, connection, dict.fromkeys(range(1, 51), "topic"), wrong)
    assert delivered == [100]
    assert await connection.fetchval("SELECT max(attempts) FROM outbox_parked") == 0
    row = await connection.fetchrow("SELECT error, reason FROM outbox_parked WHERE id = 1")
    assert tuple(row) == ("UnknownTopicOrPartitionError", "create the topic")
    # Whoever comes later waits too, behind the others.
    await world.insert(record(51, "k1"), record(101, "k1", topic="other"))
    tried.clear()
    began = time.monotonic()

    async def probed() -> bool:
        delivered.extend(await step(source, wrong))
        assert await broken_rules(connection) == {}
        return len(tried) >= 4

    await eventually(probed, "the topic is tried four times")
    assert len(tried) == 4, "one row at a time"
    assert len(tried) <= 1 + (time.monotonic() - began) / 0.5, "and a pause between"
    sent = await until(source, connection, {})
    for key in range(5):
        of_key = [id_ for id_ in sent if id_ % 5 == key and id_ < 100]
        assert of_key == sorted(of_key)
    assert await world.sent() == {*range(1, 52), 100, 101}


async def test_a_paused_topic_waits_and_resumed_goes_on_in_order(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    source = await world.source(policies=Policies(QUICK))
    await connection.execute("INSERT INTO outbox_pause (topic, reason) VALUES ('t', 'a bad deployment')")
    await world.paused({"t"})
    await world.insert(record(1, "a"), record(2, "a", topic="other"), record(3, "a"))
    assert await until(source, connection, {1: "topic", 3: "topic"}) == [2]
    await connection.execute("DELETE FROM outbox_pause")
    await world.paused(set())
    await world.insert(record(4, "a"))
    assert await until(source, connection, {}) == [1, 3, 4]


async def test_a_refused_row_that_a_stranger_has_locked_is_parked_later_and_holds_its_key_meanwhile(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"))
    source = await world.source(policies=Policies(NEVER))
    claim = await eventually(lambda: some(source), "a claim")
    source.settle(outcomes(claim, refusing(1)))
    async with world.locked([1]):
        await world.insert(record(3, "a"), record(4, "b"))
        assert await until(source, connection, {}) == [4]
        for _ in range(3):
            assert await step(source) == []
    await until(source, connection, {1: "retry", 2: "blocked", 3: "blocked"})


async def some(source: PollingSource) -> Claim | None:
    claim = await source.claim()
    return claim if claim.records else None


async def test_a_parked_row_that_somebody_deleted_holds_nobody(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"), record(3, "a"))
    source = await world.source(policies=Policies(QUICK))
    await until(source, connection, {1: "trying", 2: "blocked", 3: "blocked"}, refusing(1))
    await connection.execute("DELETE FROM outbox WHERE id = 1")
    assert await until(source, connection, {}) == [2, 3]


@pytest.mark.parametrize("deletes_sent", [False, True], ids=["mark", "delete"])
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_refused_or_fails_each_key_goes_in_order_and_nothing_is_stranded(
    seed: int, world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    choose = random.Random(seed)
    policies = Policies(QUICK, Policy(max_attempts=1_000))
    source = await world.source(batch_rows=choose.choice([3, 10, 50]), policies=policies)
    rows = {id_: record(id_, choose.choice(["a", "b", "c", None]), topic=choose.choice("tu")) for id_ in range(1, 121)}
    pending = sorted(rows)
    taken: list[Record] = []
    await at_commit(connection, (FAILS, IS_IN_DOUBT)[seed % 2], 0.05)
    for _ in range(150):
        await world.insert(*(rows[id_] for id_ in pending[:3]))
        del pending[:3]
        try:
            claim = await source.claim()
        except SourceUnavailableError:
            assert await broken_rules(connection) == {}
            continue
        bad = {each.id for each in claim.records if choose.random() < 0.2}
        gone = {topic for topic in "tu" if choose.random() < 0.2}

        def wrong(each: Record, bad: set[int] = bad, gone: set[str] = gone) -> Retry | None:
            return missing(each) if each.topic in gone else refusing(*bad)(each)

        of_claim = outcomes(claim, wrong)
        taken += [outcome.record for outcome in of_claim if isinstance(outcome, Delivered)]
        source.settle(of_claim)
        if choose.random() < 0.05:
            # As after a crash: what was handed back is lost, and all is learnt anew.
            await world.take_away()
        assert await broken_rules(connection) == {}

    await no_more(connection)

    async def drained() -> bool:
        claim = await source.claim()
        source.settle([Delivered(each) for each in claim.records])
        taken.extend(claim.records)
        return await world.sent() == set(rows)

    await eventually(drained, "all is sent")
    await step(source)
    assert await states(connection) == {}
    for topic in "tu":
        for key in (b"a", b"b", b"c"):
            ids = [each.id for each in taken if (each.topic, each.key) == (topic, key)]
            assert list(dict.fromkeys(ids)) == sorted(set(ids))


async def test_a_dead_row_is_copied_once_with_its_reason_and_its_copy_is_not(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "b", topic="t" * 248))
    await connection.execute("ALTER TABLE outbox ALTER COLUMN id RESTART WITH 100")
    source = await world.source(policies=Policies(QUICK, Policy(max_attempts=2, dead_letters="{topic}.dead")))
    await until(source, connection, {1: "dead", 2: "dead"}, lambda each: refused(each) if each.id <= 2 else None)
    (copy,) = await connection.fetch("SELECT * FROM outbox WHERE id > 2")
    original = await connection.fetchrow("SELECT * FROM outbox WHERE id = 1")
    assert copy["topic"] == "t.dead"
    assert [copy[name] for name in ("event_id", "key", "type", "payload")] == [
        original[name] for name in ("event_id", "key", "type", "payload")
    ]
    assert json.loads(copy["headers"]) == {
        "dead-letter-of": "1",
        "dead-letter-topic": "t",
        "dead-letter-attempts": "2",
        "dead-letter-error": "MessageSizeTooLargeError",
        "dead-letter-reason": "raise max.message.bytes",
    }

    async def sent() -> bool:
        await step(source)
        return await world.sent() == {copy["id"]}

    await eventually(sent, "the copy is sent")
    await connection.execute("UPDATE outbox SET sent_at = NULL WHERE id > 2")
    await until(source, connection, {1: "dead", 2: "dead", copy["id"]: "dead"}, refused)
    assert await connection.fetchval("SELECT count(*) FROM outbox") == 3


# -- transactions that fail, or may have failed


async def at_commit(connection: asyncpg.Connection, does: str, share: float = 1.0) -> None:
    """A relay that has changed ``outbox_parked`` meets this when it commits, for a share of the rows."""
    await connection.execute(
        f"""
        CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF current_setting('application_name') LIKE 'outbox-relay %' AND random() < {share} THEN
                RAISE {does};
            END IF;
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT OR UPDATE OR DELETE ON outbox_parked
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()
        """
    )


FAILS = "EXCEPTION 'no' USING ERRCODE = 'admin_shutdown'"
IS_IN_DOUBT = "WARNING 'canceling wait for synchronous replication due to user request'"


async def no_more(connection: asyncpg.Connection) -> None:
    await connection.execute("DROP FUNCTION at_commit CASCADE")


async def unavailable(source: PollingSource) -> bool:
    try:
        assert not (await source.claim()).records
    except SourceUnavailableError:
        return True
    return False


async def test_what_a_failed_transaction_put_back_still_waits_and_its_followers_behind_it(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"))
    await park(connection, 1, "dead")
    source = await world.source(batch_rows=1)
    await eventually(lambda: claims_nothing(source), "it has looked")
    await at_commit(connection, FAILS)
    await connection.execute("UPDATE outbox_parked SET state = 'retry', due_at = now()")
    await eventually(lambda: unavailable(source), "a transaction that put the row back has failed")
    await no_more(connection)
    await world.insert(record(2, "a"))
    assert await until(source, connection, {}) == [1, 2]


async def test_followers_that_may_skip_are_freed_although_the_first_transaction_failed(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"))
    await park(connection, 1, "dead")
    await park(connection, 2, "blocked")
    await at_commit(connection, FAILS)
    source = await world.source(policies=Policies(QUICK, Policy(block=False)))
    await eventually(lambda: unavailable(source), "the transaction that freed it has failed")
    await no_more(connection)
    assert await until(source, connection, {1: "dead"}) == [2]


async def test_a_refusal_counts_once_although_its_commit_was_in_doubt(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "a"))
    source = await world.source(policies=Policies(NEVER, Policy(max_attempts=3)))
    claim = await eventually(lambda: some(source), "a claim")
    await at_commit(connection, IS_IN_DOUBT)
    source.settle(outcomes(claim, refusing(1)))
    assert await unavailable(source)
    await no_more(connection)
    assert await states(connection) == {1: "retry"}, "it was committed"
    await world.insert(record(3, "a"))
    assert await until(source, connection, {1: "retry", 2: "blocked", 3: "blocked"}) == []
    assert await connection.fetchval("SELECT attempts FROM outbox_parked WHERE id = 1") == 1


# -- rows that can't be put back


async def test_followers_go_on_without_a_pause_between_batches(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(*(record(id_, "a") for id_ in range(1, 101)))
    for id_ in range(1, 101):
        await park(connection, id_, "blocked", due_in_seconds=0 if id_ == 1 else None)
    source = await world.source(batch_rows=10)
    delivered = await eventually(lambda: step(source), "the first")
    for _ in range(9):
        delivered += await step(source)
    assert delivered == list(range(1, 101))


async def test_a_follower_that_a_stranger_has_locked_is_not_tried_all_the_time_nor_are_those_behind_it(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(*(record(id_, "a") for id_ in range(1, 6)), record(10, "b"))
    for id_ in range(1, 6):
        await park(connection, id_, "blocked", due_in_seconds=0 if id_ == 1 else None)
    source = await world.source()
    async with world.locked([1]):
        assert await eventually(lambda: step(source), "others flow") == [10]
        began = time.monotonic()
        claims = [await source.claim() for _ in range(40)]
    assert [claim.records for claim in claims if claim.records] == []
    # One claim finds the followers; the next one is a second later.
    assert sum(not claim.is_idle for claim in claims) <= 2 + time.monotonic() - began
    assert await until(source, connection, {}) == [1, 2, 3, 4, 5]


async def refuse_to_put_back(connection: asyncpg.Connection, id_: int) -> None:
    await connection.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON outbox FOR EACH ROW
            WHEN (NEW.parked_at IS NULL AND NEW.id = {id_}) EXECUTE FUNCTION refuse()
        """
    )


@pytest.mark.parametrize("state", ["retry", "topic"])
async def test_a_row_that_cannot_be_put_back_does_not_keep_those_after_it_waiting(
    state: str, world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    # Without a key the bucket is the id's, here the same of both; and of a bucket one row is looked at.
    await world.insert(record(64, None), record(128, None))
    for id_ in (64, 128):
        await park(connection, id_, state, due_in_seconds=0 if state == "retry" else None)
    await refuse_to_put_back(connection, 64)
    source = await world.source(batch_rows=1)
    assert await until(source, connection, {64: state}) == [128]
    await connection.execute("DROP TRIGGER refuse ON outbox")
    assert await until(source, connection, {}) == [64]


async def test_a_copy_that_the_table_refuses_keeps_nothing_from_going_on(
    world: PostgresWorld, connection: asyncpg.Connection
) -> None:
    await world.insert(record(1, "a"), record(2, "b"), record(3, "c"), record(4, "a"))
    await connection.execute("ALTER TABLE outbox ALTER COLUMN id RESTART WITH 100")
    await connection.execute("ALTER TABLE outbox ADD CONSTRAINT refuse CHECK (topic <> 't.dead' OR key <> 'a')")
    source = await world.source(policies=Policies(QUICK, Policy(max_attempts=1, dead_letters="{topic}.dead")))
    with structlog.testing.capture_logs() as logs:
        delivered = await until(source, connection, {1: "dead", 2: "dead", 4: "blocked"}, refusing(1, 2))
    assert [id_ for id_ in delivered if id_ < 100] == [3]
    copies = await connection.fetch("SELECT key FROM outbox WHERE topic = 't.dead'")
    assert [row["key"] for row in copies] == ["b"]
    assert [line["id"] for line in logs if line["event"] == "row.uncopied"] == [1]
