"""What :class:`outbox_relay.relay.Source` promises, of the fake and of PollingSource on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.relay import Claim, Source
from outbox_relay.servers import Postgres
from tests.conftest import Database
from tests.contract.sources import MemoryWorld, PostgresWorld, SourceWorld
from tests.fakes import line, record
from tests.waiting import eventually


@pytest.fixture
def memory() -> SourceWorld:
    return MemoryWorld()


@pytest.fixture
async def postgresql(database: Database, postgres: Postgres) -> AsyncIterator[SourceWorld]:
    world = await PostgresWorld.open(database, postgres.url)
    yield world
    await world.close()


@pytest.fixture
async def postgresql_deleting(database: Database, postgres: Postgres) -> AsyncIterator[SourceWorld]:
    world = await PostgresWorld.open(database, postgres.url, deletes_sent=True)
    yield world
    await world.close()


@pytest.fixture(params=["memory", "postgresql", "postgresql_deleting"])
def world(request: pytest.FixtureRequest) -> SourceWorld:
    world: SourceWorld = request.getfixturevalue(request.param)
    return world


def ids(claim: Claim) -> list[int]:
    return [each.id for each in claim.records]


async def claimed(source: Source) -> Claim:
    """The first claim that isn't empty; an empty one needs no handing back."""

    async def some() -> Claim | None:
        claim = await source.claim()
        return claim if claim.records else None

    return await eventually(some, "the source claims something")


async def nothing_claimed(source: Source) -> None:
    """Several claims in a row, so that one which only looks elsewhere first doesn't count."""
    for _ in range(3):
        assert ids(await source.claim()) == []


async def settled(source: Source, outcome_of: Callable[[Record], Outcome], claim: Claim | None = None) -> list[int]:
    """Claim, unless that was done before, and hand everything back; the ids."""
    claim = claim or await claimed(source)
    source.settle([outcome_of(each) for each in claim.records])
    return ids(claim)


async def all_settled(source: Source, count: int) -> list[int]:
    """Claim and deliver until there were so many; their ids in that order."""
    ids_: list[int] = []
    while len(ids_) < count:
        ids_ += await settled(source, Delivered)
    return ids_


async def marked(source: Source, world: SourceWorld, expected: set[int]) -> None:
    """Claim, without finding anything, until exactly this is marked."""

    async def done() -> bool:
        assert ids(await source.claim()) == []
        return await world.sent() == expected

    await eventually(done, f"{expected} are marked")


async def test_waiting_ends_when_there_is_something_to_claim(world: SourceWorld) -> None:
    source = await world.source()
    await world.insert(record(1))
    await settled(source, Delivered)
    await marked(source, world, {1})
    waiting = asyncio.ensure_future(source.wait(0.5))
    await world.insert(record(2))
    async with asyncio.timeout(30):
        await waiting
    assert ids(await claimed(source)) == [2]


async def not_ours_any_more(claim: Claim) -> None:
    await eventually(lambda: not claim.is_ours(), "the claim isn't ours any more")


def refused(each: Record) -> Outcome:
    return Retry(each, Scope.ROW, "MessageSizeTooLargeError", "too large")


def refused_topic(each: Record) -> Outcome:
    return Retry(each, Scope.TOPIC, "UnknownTopicOrPartitionError", "no such topic")


# -- claim


async def test_a_claim_is_ascending_and_complete(world: SourceWorld) -> None:
    records = [record(id_, key=f"k{id_ % 7}" if id_ % 5 else None) for id_ in range(1, 60)]
    shuffled = random.Random(1).sample(records, len(records))
    await world.insert(*shuffled)
    claim = await claimed(await world.source())
    assert ids(claim) == list(range(1, 60))
    assert not claim.is_idle


async def test_a_record_is_what_was_inserted(world: SourceWorld) -> None:
    inserted = [
        record(1, key="ключ", topic="t.1"),
        record(2, key="", value=None),
        record(3, key=None, value=b"\x00\xff"),
    ]
    await world.insert(*inserted)
    got = (await claimed(await world.source())).records
    assert [(r.id, r.event_id, r.topic, r.key, r.value) for r in got] == [
        (r.id, r.event_id, r.topic, r.key, r.value) for r in inserted
    ]
    for mine, theirs in zip(inserted, got, strict=True):
        assert set(mine.headers) <= set(theirs.headers)


async def test_a_claim_larger_than_a_batch_is_cut_and_the_rest_comes_next(world: SourceWorld) -> None:
    await world.insert(*(record(id_) for id_ in range(1, 8)))
    source = await world.source(batch_rows=3)
    assert [await settled(source, Delivered) for _ in range(3)] == [[1, 2, 3], [4, 5, 6], [7]]
    await marked(source, world, set(range(1, 8)))


async def test_nothing_to_do_is_idle(world: SourceWorld) -> None:
    source = await world.source()

    async def idle() -> bool:
        claim = await source.claim()
        assert not claim.records
        return claim.is_idle

    await eventually(idle, "a source without rows is idle")
    await world.insert(record(1))
    assert not (await claimed(source)).is_idle


async def test_behind_a_locked_row_nothing_of_its_key_is_claimed_and_everything_else_is(world: SourceWorld) -> None:
    rows = {1: "a", 2: "a", 3: "b", 4: "a", 5: None, 6: "c", 7: None, 8: "a"}
    await world.insert(*(record(id_, key) for id_, key in rows.items()), record(9, "a", topic="other"))
    source = await world.source()
    async with world.locked([2, 7]):
        assert await settled(source, Delivered) == [1, 3, 5, 6, 9]
        await world.insert(record(10, "a"), record(11, "b"))
        assert await settled(source, Delivered) == [11]
        await marked(source, world, {1, 3, 5, 6, 9, 11})
    delivered: list[int] = []
    while len(delivered) < 5:
        delivered += await settled(source, Delivered)
    assert [id_ for id_ in delivered if id_ != 7] == [2, 4, 8, 10]
    await marked(source, world, set(range(1, 12)))


async def test_a_locked_key_longer_than_a_batch_does_not_starve_the_others(world: SourceWorld) -> None:
    await world.insert(*(record(id_) for id_ in range(1, 50)), record(50, key=None), record(64 + 50, key=None))
    source = await world.source(batch_rows=10)
    async with world.locked([1]):
        claims = [await claimed(source)]
        await settled(source, Delivered, claims[0])
        if len(claims[0].records) == 1:
            claims.append(await claimed(source))
            await settled(source, Delivered, claims[1])
        assert [id_ for claim in claims for id_ in ids(claim)] == [50, 114]


async def test_a_row_that_turns_up_late_below_ids_that_were_sent_is_claimed(world: SourceWorld) -> None:
    source = await world.source()
    await world.insert(record(100), record(101, "b"))
    assert await settled(source, Delivered) == [100, 101]
    await world.insert(record(7, "c"), record(8), record(-3, "b"))
    assert await settled(source, Delivered) == [-3, 7, 8]
    await marked(source, world, {100, 101, 7, 8, -3})


async def test_an_application_may_choose_any_ids(world: SourceWorld) -> None:
    source = await world.source()
    outermost = [-(2**63), -(2**63) + 1, -1, 0, 2**63 - 1]
    await world.insert(*(record(id_) for id_ in reversed(outermost)))
    assert await settled(source, Delivered) == outermost
    await marked(source, world, set(outermost))


async def test_what_one_relay_has_claimed_no_other_claims(world: SourceWorld) -> None:
    await world.insert(*(record(id_, key=f"k{id_}") for id_ in range(1, 200)))
    one, other = await world.source(batch_rows=10), await world.source(batch_rows=10)
    seen: list[int] = []
    while len(seen) < 199:
        claims = [await one.claim(), await other.claim()]
        assert not set(ids(claims[0])) & set(ids(claims[1]))
        for source, claim in zip((one, other), claims, strict=True):
            seen += await settled(source, Delivered, claim)
    assert sorted(seen) == list(range(1, 200))


async def test_a_source_out_of_reach_says_so_and_settles_later_what_was_handed_back(world: SourceWorld) -> None:
    await world.insert(record(1), record(2, "b"))
    source = await world.source()
    await settled(source, Delivered)
    async with world.unreachable():
        for _ in range(2):
            with pytest.raises(SourceUnavailableError):
                await source.claim()
        assert await world.sent() == set()

    async def works() -> bool:
        try:
            assert ids(await source.claim()) == []
        except SourceUnavailableError:
            return False
        return await world.sent() == {1, 2}

    await eventually(works, "what was handed back before is settled")


# -- settle


async def test_settling_marks_with_the_next_claim_what_was_delivered(world: SourceWorld) -> None:
    await world.insert(*(record(id_, key=f"k{id_}") for id_ in range(1, 5)))
    source = await world.source()
    claim = await claimed(source)
    outcomes: list[Outcome] = [
        Delivered(claim.records[0]), Released(claim.records[1]), refused(claim.records[2]), Delivered(claim.records[3])
    ]  # fmt: skip
    source.settle(outcomes)
    assert await world.sent() == set()
    assert ids(await claimed(source)) == [2]
    assert await world.sent() == {1, 4}


async def test_what_was_released_comes_again_ahead_of_what_is_behind_it(world: SourceWorld) -> None:
    await world.insert(*(record(id_) for id_ in range(1, 5)))
    source = await world.source(batch_rows=4)
    assert await settled(source, Released) == [1, 2, 3, 4]
    await world.insert(*(record(id_) for id_ in range(5, 9)))
    assert await settled(source, Released) == [1, 2, 3, 4]
    assert await settled(source, Delivered) == [1, 2, 3, 4]
    assert await settled(source, Delivered) == [5, 6, 7, 8]


async def test_a_refused_row_holds_its_key_and_comes_again_before_what_is_behind_it(world: SourceWorld) -> None:
    await world.insert(record(1, "a"), record(2, "b"), record(3, "a"), record(4, None), record(5, "a", topic="other"))
    source = await world.source()
    claim = await claimed(source)
    source.settle([Retry(each, Scope.ROW, "E", "r") if each.id == 1 else Released(each) for each in claim.records])
    await world.insert(record(6, "a"), record(7, "b"))
    assert await settled(source, Delivered) == [2, 4, 5, 7]
    assert await all_settled(source, 3) == [1, 3, 6]
    await marked(source, world, set(range(1, 8)))


async def test_a_refused_row_without_a_key_holds_nothing_else(world: SourceWorld) -> None:
    await world.insert(record(1, None), record(65, None), record(129, None))
    source = await world.source()
    claim = await claimed(source)
    source.settle([refused(each) if each.id == 1 else Released(each) for each in claim.records])
    assert await settled(source, Delivered) == [65, 129]
    assert await settled(source, Delivered) == [1]


async def test_a_refused_topic_holds_its_rows_and_no_others(world: SourceWorld) -> None:
    await world.insert(record(1, "a"), record(2, "a", topic="other"), record(3, "b"), record(4, None))
    source = await world.source()
    claim = await claimed(source)
    source.settle([refused_topic(each) if each.topic == "t" else Delivered(each) for each in claim.records])
    await world.insert(record(5, "c"), record(6, "c", topic="other"))
    assert await settled(source, Delivered) == [6]
    assert sorted(await all_settled(source, 4)) == [1, 3, 4, 5]
    await marked(source, world, set(range(1, 7)))


async def test_a_row_locked_after_it_was_published_is_marked_later_alone_and_never_claimed_again(
    world: SourceWorld,
) -> None:
    await world.insert(*(record(id_, "a" if id_ < 4 else "b") for id_ in range(1, 6)))
    source = await world.source()
    await settled(source, Delivered)
    async with world.locked([2]):
        await marked(source, world, {1, 3, 4, 5})
        await world.insert(record(6, "a"))
        # Acknowledged is enough for what is behind it.
        assert await settled(source, Delivered) == [6]
        await marked(source, world, {1, 3, 4, 5, 6})
    await marked(source, world, {1, 2, 3, 4, 5, 6})


# -- ownership


async def test_released_another_takes_everything_and_nothing_delivered_comes_again(world: SourceWorld) -> None:
    await world.insert(*(record(id_, key=f"k{id_}") for id_ in range(1, 41)))
    one, other = await world.source(batch_rows=10), await world.source(batch_rows=100)
    delivered = set(await settled(one, Delivered))
    await one.release()
    assert await world.sent() == delivered
    left = set(range(1, 41)) - delivered
    taken: set[int] = set()
    while taken != left:
        more = set(await settled(other, Delivered))
        assert not more & (taken | delivered)
        taken |= more


async def test_after_a_release_it_can_claim_again(world: SourceWorld) -> None:
    source = await world.source()
    await world.insert(record(1))
    await settled(source, Delivered)
    await source.release()
    await source.release()
    await world.insert(record(2))
    assert await settled(source, Delivered) == [2]


async def test_releasing_never_raises_and_loses_nothing(world: SourceWorld) -> None:
    source = await world.source()
    await world.insert(record(1), record(2, "b"))
    await settled(source, Delivered)
    async with world.unreachable():
        await source.release()
        assert await world.sent() == set()

    async def released() -> bool:
        await source.release()
        return await world.sent() == {1, 2}

    await eventually(released, "what was handed back is settled by a later release")


async def test_whoever_lost_the_rows_knows_and_marks_nothing(world: SourceWorld) -> None:
    source = await world.source()
    await world.insert(record(1), record(2, "b"))
    claim = await claimed(source)
    assert claim.is_ours()
    await world.take_away()
    await not_ours_any_more(claim)
    source.settle([Delivered(each) for each in claim.records])
    again = await claimed(source)
    assert await world.sent() == set()
    assert ids(again) == [1, 2]
    assert again.is_ours()
    assert not claim.is_ours()


# -- all of it


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_a_key_goes_on_only_behind_what_is_acknowledged(world: SourceWorld, seed: int) -> None:
    """Rows come, late ones below others too; strangers lock; Kafka refuses; slots go; the rule holds throughout."""
    choose = random.Random(seed)
    source = await world.source(batch_rows=12)
    rows = {0: record(0, None)}
    acknowledged: set[int] = set()
    losses = 0

    async def step(*, all_delivered: bool) -> Claim:
        claim = await source.claim()
        assert ids(claim) == sorted(ids(claim))
        assert losses or not acknowledged & set(ids(claim)), "what was delivered comes again"
        check_no_gap(claim.records, rows, acknowledged)
        outcomes = [Delivered(each) for each in claim.records] if all_delivered else random_outcomes(claim, choose)
        acknowledged.update(outcome.record.id for outcome in outcomes if isinstance(outcome, Delivered))
        source.settle(outcomes)
        return claim

    async def drained() -> bool:
        await step(all_delivered=True)
        return await world.sent() == rows.keys()

    await world.insert(rows[0])
    await eventually(drained, "the source has what it needs")
    for number in range(120):
        new = choose.sample([id_ for id_ in range(1, 400) if id_ not in rows], choose.choice([0, 0, 1, 4]))
        records = [record(id_, choose.choice(["a", "b", "c", None]), choose.choice(["t", "u"])) for id_ in new]
        rows.update((each.id, each) for each in records)
        await world.insert(*records)
        locked = choose.sample(sorted(rows), min(len(rows), choose.choice([0, 3])))
        async with world.locked(locked):
            claim = await step(all_delivered=False)
        if number % 30 == 29:
            await world.take_away()
            await not_ours_any_more(claim)
            losses += 1
    await eventually(drained, "all is delivered and marked")
    assert acknowledged == rows.keys()


def check_no_gap(claimed: Sequence[Record], rows: dict[int, Record], acknowledged: set[int]) -> None:
    """Every lower row of a record's key is acknowledged or ahead of it."""
    ahead = {each.id for each in claimed}
    for each in claimed:
        if each.key is not None:
            lower = {id_ for id_, row in rows.items() if id_ < each.id and line(row) == line(each)}
            assert lower <= ahead | acknowledged


def random_outcomes(claim: Claim, choose: random.Random) -> list[Outcome]:
    """As a publisher may answer: behind what isn't delivered, nothing of the key is."""
    halted: set[object] = set()
    outcomes: list[Outcome] = []
    for each in claim.records:
        outcome: Outcome = Delivered(each)
        if line(each) in halted or choose.random() < 0.1:
            outcome = Released(each)
        elif choose.random() < 0.1:
            outcome = refused(each)
        if not isinstance(outcome, Delivered):
            halted.add(line(each))
        outcomes.append(outcome)
    return outcomes
