"""Late and repeated messages don't move a state backwards. The states are in a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest

from outbox_relay.errors import NotInTransactionError, UnguardedMessageError
from outbox_relay.inbox.guard import OutboxIdGuard, Transitions, Verdict, VersionGuard
from tests.acceptance.inboxes import OPENERS, Open, open_async_session, open_asyncpg, prepare, waits_for_another
from tests.conftest import Database
from tests.consumed import record

APPLY, SEEN, GAP = Verdict.APPLY, Verdict.SEEN, Verdict.GAP
VERSIONS = VersionGuard("payments")
IDS = OutboxIdGuard("payments")


@pytest.fixture
async def inbox_database(database: Database) -> Database:
    await prepare(database)
    return database


@pytest.fixture(params=OPENERS, ids=lambda opener: opener.__name__.removeprefix("open_"))
def open_handler(request: pytest.FixtureRequest) -> Open:
    opener: Open = request.param
    return opener


async def advance(database: Database, *versions: int, aggregate: str = "order-1", by: Any = VERSIONS) -> list[Verdict]:
    """Each version in a transaction of its own, which commits."""
    found = []
    connection = await database.connect()
    for version in versions:
        async with connection.transaction():
            found.append(await by.advance(connection, aggregate, version))
    return found


def sent(
    outbox_id: int | bytes | None, *, key: bytes | None = b"42", topic: str = "orders", replay_of: int | None = None
) -> Any:
    """A record as the relay writes it."""
    headers = (
        [] if outbox_id is None else [("outbox-id", outbox_id if isinstance(outbox_id, bytes) else b"%d" % outbox_id)]
    )
    if replay_of is not None:
        headers.append(("replay-of", b"%d" % replay_of))
    return record(uuid4().hex, headers=headers, key=key, topic=topic)


async def receive(database: Database, *messages: Any, by: OutboxIdGuard = IDS) -> list[Verdict]:
    found = []
    connection = await database.connect()
    for message in messages:
        async with connection.transaction():
            found.append(await by.advance(connection, message))
    return found


# -- by version


async def test_each_version_is_applied_once_and_in_order(inbox_database: Database) -> None:
    versions = [1, 1, 2, 4, 5, 3, 2, 3, 4, 1, 5, 5]
    expected = [APPLY, SEEN, APPLY, GAP, GAP, APPLY, SEEN, SEEN, APPLY, SEEN, APPLY, SEEN]
    assert await advance(inbox_database, *versions) == expected


async def test_versions_are_told_on_every_kind_of_connection(open_handler: Open, inbox_database: Database) -> None:
    for version, expected in ((2, GAP), (1, APPLY), (1, SEEN), (3, GAP), (2, APPLY), (1, SEEN)):
        async with open_handler(inbox_database.url) as opened:
            assert await VERSIONS.advance(opened.connection, "order-1", version) is expected


async def test_aggregates_and_consumers_have_versions_of_their_own(inbox_database: Database) -> None:
    assert await advance(inbox_database, 1, 2) == [APPLY, APPLY]
    assert await advance(inbox_database, 1, 3, aggregate="order-2") == [APPLY, GAP]
    assert await advance(inbox_database, 1, 2, by=VersionGuard("mails")) == [APPLY, APPLY]


async def test_the_first_version_is_what_was_said_or_whichever_comes_first(inbox_database: Database) -> None:
    assert await advance(inbox_database, 1, 0, 1, by=VersionGuard("a", first_version=0)) == [GAP, APPLY, APPLY]
    assert await advance(inbox_database, 7, 9, 8, 6, by=VersionGuard("b", first_version=None)) == [
        APPLY,
        GAP,
        APPLY,
        SEEN,
    ]


async def test_a_version_that_can_be_none_is_refused(inbox_database: Database) -> None:
    for version in (0, -1, 2**63):
        with pytest.raises(ValueError, match=r"version -?\d+ of order-1 can't be: versions are 1 or above"):
            await advance(inbox_database, version)
    for aggregate in ("", "x" * 1_001, "a\0b"):
        with pytest.raises(ValueError, match="aggregate must be text of 1 to 1,000 bytes"):
            await advance(inbox_database, 1, aggregate=aggregate)


async def test_a_version_is_the_aggregates_only_once_the_handler_commits(
    open_handler: Open, inbox_database: Database
) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with open_handler(inbox_database.url) as opened:
            assert await VERSIONS.advance(opened.connection, "order-1", 1) is APPLY
            raise ZeroDivisionError
    assert await advance(inbox_database, 2, 1) == [GAP, APPLY]


async def test_outside_a_transaction_nothing_is_told(open_handler: Open, inbox_database: Database) -> None:
    async with open_handler(inbox_database.url, begin=False) as opened:
        with pytest.raises(NotInTransactionError, match="in no transaction"):
            await VERSIONS.advance(opened.connection, "order-1", 1)
        with pytest.raises(NotInTransactionError, match="in no transaction"):
            await IDS.advance(opened.connection, sent(1))


async def test_the_rights_that_inbox_sql_names_are_enough(inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    role = f"consumer_{uuid4().hex}"
    await connection.execute(f"CREATE ROLE {role}; GRANT SELECT, INSERT, UPDATE ON inbox_state TO {role}")
    try:
        async with open_asyncpg(inbox_database.url) as opened:
            await opened.execute(f"SET LOCAL ROLE {role}")
            found = [await VERSIONS.advance(opened.connection, "order-1", version) for version in (1, 1, 2, 4)]
            assert found == [APPLY, SEEN, APPLY, GAP]
            assert [await IDS.advance(opened.connection, sent(n)) for n in (5, 9, 5)] == [APPLY, APPLY, SEEN]
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_schema_translate_map_is_honoured(inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    await connection.execute("CREATE SCHEMA us; ALTER TABLE inbox_state SET SCHEMA us")
    options = {"schema_translate_map": {None: "us"}}
    async with open_async_session(inbox_database.url, execution_options=options) as opened:
        assert await VERSIONS.advance(opened.connection, "order-1", 1) is APPLY
    assert await connection.fetchval("SELECT count(*) FROM us.inbox_state") == 1


# -- at once

Advance: TypeAlias = Callable[[asyncpg.Connection, int], Awaitable[Verdict]]


async def guarded(connection: asyncpg.Connection, version: int) -> Verdict:
    return await VERSIONS.advance(connection, "order-1", version)


async def look_then_write(connection: asyncpg.Connection, version: int) -> Verdict:
    """Broken: another may come in between."""
    found = await connection.fetchval("SELECT version FROM inbox_state WHERE aggregate = 'order-1'")
    if version <= (found or 0):
        return SEEN
    if version > (found or 0) + 1:
        return GAP
    await connection.execute(
        "INSERT INTO inbox_state VALUES ('payments', 'order-1', $1)"
        " ON CONFLICT (consumer, aggregate) DO UPDATE SET version = $1",
        version,
    )
    return APPLY


async def at_once(
    database: Database, by: Advance, versions: tuple[int, int], *, before: int = 0, commits: bool = True
) -> list[Verdict]:
    """Two sessions, the second while the first's transaction is open; the second's ends after the first's."""
    first, second, watcher = [await database.connect() for _ in range(3)]
    for version in range(1, before + 1):
        async with watcher.transaction():
            assert await guarded(watcher, version) is APPLY
    opened = first.transaction()
    await opened.start()
    found = [await by(first, versions[0])]

    async def later() -> Verdict:
        async with second.transaction():
            return await by(second, versions[1])

    waiting = asyncio.create_task(later())
    blocked = asyncio.create_task(waits_for_another(watcher, second.get_server_pid()))
    await asyncio.wait([waiting, blocked], return_when=asyncio.FIRST_COMPLETED)
    blocked.cancel()
    await (opened.commit() if commits else opened.rollback())
    async with asyncio.timeout(30):
        return [*found, await waiting]


@pytest.mark.parametrize("before", [0, 1])
async def test_the_later_of_two_waits_for_the_first(inbox_database: Database, before: int) -> None:
    """Of an aggregate that is new, and of one that isn't."""
    assert await at_once(inbox_database, guarded, (before + 1, before + 1), before=before) == [APPLY, SEEN]


@pytest.mark.parametrize("before", [0, 1])
async def test_what_follows_at_once_is_no_gap(inbox_database: Database, before: int) -> None:
    assert await at_once(inbox_database, guarded, (before + 1, before + 2), before=before) == [APPLY, APPLY]


@pytest.mark.parametrize("before", [0, 1])
async def test_the_later_of_two_is_judged_by_what_the_first_left(inbox_database: Database, before: int) -> None:
    ahead = (before + 1, before + 2)
    assert await at_once(inbox_database, guarded, ahead, before=before, commits=False) == [APPLY, GAP]
    again = (before + 1, before + 1)
    assert await at_once(inbox_database, guarded, again, commits=False) == [APPLY, APPLY]


async def test_a_guard_that_looks_and_then_writes_is_caught(inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    for before, versions, right in ((1, (2, 2), [APPLY, SEEN]), (1, (2, 3), [APPLY, APPLY])):
        await connection.execute("DELETE FROM inbox_state")
        assert await at_once(inbox_database, look_then_write, versions, before=before) != right


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_under_a_stricter_isolation_the_later_fails_and_tries_again(
    inbox_database: Database, isolation: Any
) -> None:
    first, second, watcher = [await inbox_database.connect() for _ in range(3)]
    transaction = second.transaction(isolation=isolation)
    await transaction.start()
    await second.fetch("SELECT FROM charge")  # whereby the transaction has its snapshot
    async with first.transaction():
        assert await guarded(first, 1) is APPLY
        later = asyncio.create_task(guarded(second, 1))
        await waits_for_another(watcher, second.get_server_pid())
    with pytest.raises(asyncpg.SerializationError):
        await later
    await transaction.rollback()
    async with second.transaction(isolation=isolation):
        assert await guarded(second, 1) is SEEN


async def test_messages_that_come_in_any_order_from_many_sessions_are_applied_in_theirs(
    inbox_database: Database,
) -> None:
    """Each is tried until it is no gap, as a caller does; what was applied is in the order of versions."""
    await (await inbox_database.connect()).execute(
        "CREATE TABLE applied (n bigint GENERATED ALWAYS AS IDENTITY, v int)"
    )

    async def deliver(versions: list[int]) -> None:
        connection = await inbox_database.connect()
        while versions:
            async with connection.transaction():
                verdict = await guarded(connection, versions[0])
                if verdict is APPLY:
                    await connection.execute("INSERT INTO applied (v) VALUES ($1)", versions[0])
            if verdict is GAP:
                versions.append(versions.pop(0))
            else:
                versions.pop(0)

    everything = list(range(1, 31))
    async with asyncio.timeout(60):
        await asyncio.gather(
            deliver(everything[::-1]), deliver(everything[:]), deliver(everything[15:] + everything[:15])
        )
    rows = await (await inbox_database.connect()).fetch("SELECT v FROM applied ORDER BY n")
    assert [row["v"] for row in rows] == everything


# -- by the relay's outbox-id


async def test_an_id_above_the_last_is_applied_whatever_lies_between(
    open_handler: Open, inbox_database: Database
) -> None:
    for outbox_id, expected in ((7, APPLY), (7, SEEN), (900, APPLY), (8, SEEN), (900, SEEN), (2**63 - 1, APPLY)):
        async with open_handler(inbox_database.url) as opened:
            assert await IDS.advance(opened.connection, sent(outbox_id)) is expected


async def test_a_late_repeat_is_seen_however_much_came_since(inbox_database: Database) -> None:
    messages = [sent(n) for n in (10, 20, 30)]
    assert await receive(inbox_database, *messages, *messages, messages[0]) == [APPLY] * 3 + [SEEN] * 4


async def test_keys_topics_and_consumers_have_ids_of_their_own(inbox_database: Database) -> None:
    assert await receive(inbox_database, sent(9)) == [APPLY]
    others = [sent(5, key=b"43"), sent(5, topic="refunds"), sent(5, key=b""), sent(4)]
    assert await receive(inbox_database, *others) == [APPLY, APPLY, APPLY, SEEN]
    assert await receive(inbox_database, sent(5), by=OutboxIdGuard("mails")) == [APPLY]


async def test_a_version_of_an_aggregate_is_no_id_of_a_key(inbox_database: Database) -> None:
    assert await receive(inbox_database, sent(9)) == [APPLY]
    assert await advance(inbox_database, 1, aggregate="orders/42") == [APPLY]


async def test_any_key_will_do(inbox_database: Database) -> None:
    keys = [b"\xff\xfe", b"a\0b", b"a", b"k" * 5_000, b"k" * 5_001, "é".encode() * 300, b"\xff\xfd"]
    messages = [sent(n, key=key) for n, key in enumerate(keys)]
    assert await receive(inbox_database, *messages, *messages) == [APPLY] * len(keys) + [SEEN] * len(keys)
    longest = [sent(n, key=uuid4().hex.encode() * 21, topic="t" * 249) for n in (1, 1)]
    assert await receive(inbox_database, *longest) == [APPLY] * 2


async def test_a_replay_is_seen_unless_the_handler_wants_it(inbox_database: Database) -> None:
    replay = sent(900, replay_of=10)
    assert await receive(inbox_database, sent(20), replay) == [APPLY, SEEN]
    assert await receive(inbox_database, replay, replay, by=OutboxIdGuard("payments", replays=True)) == [APPLY] * 2
    # It has moved nothing: neither for what comes after it nor for what came before.
    assert await receive(inbox_database, sent(21), sent(20), sent(21)) == [APPLY, SEEN, SEEN]


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (sent(None), "has no header 'outbox-id'"),
        (sent(b""), "has a header 'outbox-id' that is no id of an outbox"),
        (sent(b"1_000"), "has a header 'outbox-id' that is no id of an outbox"),
        (sent(b" 7"), "has a header 'outbox-id' that is no id of an outbox"),
        (sent(b"9" * 5_000), "has a header 'outbox-id' that is no id of an outbox"),
        (sent(2**63), "has a header 'outbox-id' that is no id of an outbox"),
        (sent(1, key=None), "has no key, so no order is promised"),
    ],
)
async def test_a_message_that_can_not_be_guarded_is_refused(inbox_database: Database, message: Any, why: str) -> None:
    with pytest.raises(UnguardedMessageError, match=f"offset 17 of orders, partition 3, {why}"):
        await receive(inbox_database, message)


# -- by a table of transitions, on a column of the handler's own

ORDER = Transitions({"placed": ["paid", "cancelled"], "paid": ["shipped"]})


async def test_two_transitions_at_once_change_a_state_once(inbox_database: Database) -> None:
    first, second, watcher = [await inbox_database.connect() for _ in range(3)]
    await first.execute("CREATE TABLE orders (status text); INSERT INTO orders VALUES ('placed')")

    async def move(connection: asyncpg.Connection, wanted: str) -> str:
        sql = "UPDATE orders SET status = $1 WHERE status = ANY ($2::text[])"
        tag: str = await connection.execute(sql, wanted, ORDER.before(wanted))
        return tag

    async with first.transaction():
        assert await move(first, "paid") == "UPDATE 1"
        later = asyncio.create_task(move(second, "cancelled"))
        await waits_for_another(watcher, second.get_server_pid())
    assert await later == "UPDATE 0"
    assert [await move(first, wanted) for wanted in ("paid", "shipped", "paid")] == ["UPDATE 0", "UPDATE 1", "UPDATE 0"]
    assert await first.fetchval("SELECT status FROM orders") == "shipped"
