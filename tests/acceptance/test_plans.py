"""What the relay's statements cost in PostgreSQL, whatever lies in the outbox and whatever the planner believes of it.

The plans are those of the statements that the product runs: its own source claims and settles on its own session, and
PostgreSQL's auto_explain tells the plan of each statement, with what really happened in it. Each transaction is then
rolled back, so that all of a module's tests can share one outbox of a million sent rows.

The costs are counted in buffers (pages looked at, in memory or not), since time says little on a busy machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from uuid import uuid4

import asyncpg
import pytest
import structlog
from sqlalchemy import make_url

from outbox_relay import schema, status
from outbox_relay.failures import Policies
from outbox_relay.message import Delivered, Released, Retry, Scope
from outbox_relay.relay import Poll
from outbox_relay.retry import Backoff
from outbox_relay.servers import Postgres
from outbox_relay.source import pruning
from outbox_relay.source.parking_statements import DUE
from outbox_relay.source.polling import CLAIM_BYTES, PollingSource
from outbox_relay.source.pruning import Pruner
from outbox_relay.source.session import Database, Session
from outbox_relay.source.slots import Slots
from outbox_relay.source.statements import OUTBOX, OWN, ROW_BYTES, Statements, created_at
from outbox_relay.tables import BUCKETS, SLOTS
from outbox_relay.telemetry import Telemetry
from tests.conftest import Database as DatabaseForTest

STATEMENTS = Statements(OUTBOX)

SENT = 1_000_000
KEYS = 50_000
BATCH_ROWS = 2_000

# What a statement may cost, in buffers. Measured at most: a row claimed 5.8, a row that is stepped over 0.7, a bucket
# without rows 2.1, a row marked 12.8 (15.3 in a claim of 61; before PostgreSQL 17, where each of many ids is looked up
# from the root of the index, 20.3), a row that couldn't be marked 3.1, a slot owned 3.
CLAIM_A_ROW = 8
CLAIM_A_ROW_STEPPED_OVER = 1
CLAIM_A_BUCKET = 4
SETTLE_A_ROW = 24
UNSETTLED_A_ROW = 6
OWN_A_SLOT = 4


# -- the plans of what a source runs


@dataclass(frozen=True)
class Explained:
    """One statement as it was executed: what it is called in ``statements.py``, and its plan."""

    label: str
    plan: dict[str, Any]

    @property
    def buffers(self) -> int:
        return int(self.plan["Shared Hit Blocks"] + self.plan["Shared Read Blocks"])

    def nodes(self) -> Iterator[dict[str, Any]]:
        waiting = [self.plan]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.get("Plans", ()))

    def scans(self) -> set[str]:
        """How the outbox is read: ``{"outbox_unsent"}``, or the kind of a scan that uses no index."""
        return {
            node.get("Index Name", node["Node Type"])
            for node in self.nodes()
            if node.get("Relation Name") == "outbox" and "Scan" in node["Node Type"]
        }

    def hashed(self) -> set[str]:
        """The subqueries that a row is looked up in."""
        return {name for node in self.nodes() for name in re.findall(r"hashed SubPlan \d+", node.get("Filter", ""))}

    def sorted_rows(self) -> int:
        """The rows of the largest sort."""
        return max((int(node["Actual Rows"]) for node in self.nodes() if "Sort" in node["Node Type"]), default=0)


Rewrite: TypeAlias = Callable[[str], str]


class ExplainedSession(Session):
    """The product's session, which remembers each statement's plan, and commits nothing."""

    def __init__(self, url: str, *, plan_cache_mode: str | None = None, rewrite: Rewrite = str) -> None:
        super().__init__(Database(url, 10.0, 60.0), "explained")
        self.explained: list[Explained] = []
        self._plan_cache_mode = plan_cache_mode
        self._rewrite = rewrite

    async def connection(self) -> asyncpg.Connection:
        is_new = not self.connected
        connection = await super().connection()
        if is_new:
            connection.add_log_listener(self._remember_plan)
            await connection.execute(
                "LOAD 'auto_explain';"
                "SET auto_explain.log_level = 'notice'; SET auto_explain.log_format = 'json';"
                "SET auto_explain.log_min_duration = 0; SET auto_explain.log_analyze = on;"
                "SET auto_explain.log_buffers = on; SET auto_explain.log_timing = off"
            )
        return connection

    async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        rows = await super().fetch(self._rewrite(statement), *arguments)
        if statement == OWN and self._plan_cache_mode is not None:
            await super().fetch(f"SET LOCAL plan_cache_mode = {self._plan_cache_mode}")
        return rows

    async def change(self, statement: str, *arguments: Any) -> int:
        return await super().change(self._rewrite(statement), *arguments)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        connection = await self.connection()
        await connection.execute(self._begin())
        try:
            yield
        finally:
            await connection.execute("ROLLBACK")

    async def planned(self, statement: str) -> tuple[int, int]:
        """How often it was executed with a generic plan, and how often with a custom one."""
        connection = await self.connection()
        row = await connection.fetchrow(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1", statement
        )
        return row["generic_plans"], row["custom_plans"]

    def last(self, label: str) -> Explained:
        return next(explained for explained in reversed(self.explained) if explained.label == label)

    def _remember_plan(self, _: Any, message: asyncpg.PostgresLogMessage) -> None:
        _, found, text = message.message.partition("plan:\n")
        if found:
            explained = json.loads(text)
            label = explained["Query Text"].lstrip("\n- ").partition("\n")[0]
            self.explained.append(Explained(label, explained["Plan"]))


@contextlib.asynccontextmanager
async def source_on(
    session: Session, url: str, *, slots: int = SLOTS, batch_rows: int = BATCH_ROWS, deletes_sent: bool = False
) -> AsyncIterator[PollingSource]:
    """The product's source on this session, owner of so many slots."""
    telemetry = Telemetry()
    lanes = SLOTS // slots
    owned = Slots(
        Session(Database(url, 10.0, 60.0), "heartbeat"),
        telemetry,
        name="explained",
        lanes=lanes,
        lease_seconds=600.0,
        heartbeat_seconds=1.0,
        poll=Poll(0.5, 0.5),
        layout_buckets=BUCKETS,
        layout_slots=SLOTS,
        all_open=True,
    )
    source = PollingSource(
        session,
        owned,
        0,
        telemetry,
        layout_buckets=BUCKETS,
        layout_slots=SLOTS,
        batch_rows=batch_rows,
        policies=Policies(Backoff(600.0, 600.0)),
        deletes_sent=deletes_sent,
    )
    try:
        for lane in range(lanes):
            owned.set_ready(lane, True)
        await owned.beat()
        yield source
    finally:
        await owned.leave()
        await source.close()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of ids a claim would hide what a failed test says."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


# -- what they may cost


def assert_own_is_cheap(session: ExplainedSession, *, slots: int = SLOTS) -> None:
    assert session.last("own").buffers <= OWN_A_SLOT * slots


def assert_claim_is_cheap(
    session: ExplainedSession, rows: int, *, buckets: int = BUCKETS, stepped_over: int = 0
) -> None:
    """A claim of so many rows read them, the rows in front of them that wait, and the start of each bucket."""
    claim = session.last("claim")
    assert claim.scans() == {"outbox_unsent"}
    assert claim.sorted_rows() <= BATCH_ROWS
    assert claim.buffers <= CLAIM_A_ROW * rows + CLAIM_A_ROW_STEPPED_OVER * stepped_over + CLAIM_A_BUCKET * buckets
    # Ids, topics and keys that wait, in both readings of a bucket, are looked up rather than compared with each row.
    assert len(claim.hashed()) == 6


def assert_settle_is_cheap(session: ExplainedSession, rows: int) -> None:
    settle = session.last("settle")
    assert settle.scans() == {"outbox_pkey"}
    assert settle.sorted_rows() == 0
    assert settle.buffers <= SETTLE_A_ROW * rows


def assert_unsettled_is_cheap(session: ExplainedSession, rows: int) -> None:
    unsettled = session.last("unsettled")
    assert unsettled.scans() == {"outbox_pkey"}
    assert unsettled.buffers <= UNSETTLED_A_ROW * rows


# -- an outbox of a million sent rows


def insert(rows: int, *, sent: bool = False, keys: int = KEYS) -> str:
    return (
        "INSERT INTO outbox (topic, key, type, payload, sent_at)"
        f" SELECT 'orders', 'k' || n % {keys}, 'OrderPlaced', '{{}}', {'now()' if sent else 'NULL'}"
        f" FROM generate_series(1, {rows}) AS n"
    )


# Where ANALYZE has never run. In the catalogue itself, since a function for it comes with PostgreSQL 18.
FORGET_STATISTICS = """
UPDATE pg_class SET reltuples = -1, relpages = 0, relallvisible = 0
WHERE relname IN ('outbox', 'outbox_pkey', 'outbox_unsent');
DELETE FROM pg_statistic WHERE starelid = 'outbox'::regclass
"""


@dataclass(frozen=True)
class State:
    """How many rows are unsent, and what the planner knows: ``now``, ``before`` they came, or ``nothing``."""

    unsent: int
    known: Literal["nothing", "before", "now"]

    def __str__(self) -> str:
        return f"{self.unsent}-known-{self.known}"


@dataclass
class Million:
    """A database whose outbox has a million sent rows, and a backlog that grows from test to test."""

    url: str
    state: State = State(0, "nothing")

    async def become(self, state: State) -> None:
        if self.state == state:
            return
        assert state.unsent >= self.state.unsent, "the backlog only grows"
        connection = await asyncpg.connect(self.url)
        if state.known == "before" and state.unsent > self.state.unsent:
            await connection.execute("ANALYZE outbox")
        await connection.execute(insert(state.unsent - self.state.unsent))
        if state.known == "now":
            await connection.execute("ANALYZE outbox")
        elif state.known == "nothing":
            await connection.execute(FORGET_STATISTICS)
        await connection.close()
        self.state = state


@pytest.fixture(scope="module")
def million(postgres: Postgres) -> Iterator[Million]:
    name = f"test_{uuid4().hex}"
    url = make_url(postgres.url).set(database=name).render_as_string(hide_password=False)

    async def execute(url: str, *statements: str) -> None:
        connection = await asyncpg.connect(url)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    async def make() -> None:
        await execute(postgres.url, f"CREATE DATABASE {name}")
        connection = await asyncpg.connect(url)
        await schema.apply(connection)
        await connection.close()
        await execute(
            url,
            # Statistics are gathered when a test says so.
            "ALTER TABLE outbox SET (autovacuum_enabled = off)",
            # Two million rows are sooner there without a log of them, and without what only a writer meets.
            "ALTER TABLE outbox SET UNLOGGED",
            "ALTER TABLE outbox DROP CONSTRAINT outbox_headers_are_flat_strings",
            "ALTER TABLE outbox DROP CONSTRAINT outbox_headers_are_not_reserved",
            insert(SENT, sent=True),
        )

    try:
        asyncio.run(make())
        yield Million(url)
    finally:
        asyncio.run(execute(postgres.url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


STATES = [
    State(0, "nothing"),
    State(0, "now"),
    State(1_000, "before"),
    State(1_000, "now"),
    State(1_000, "nothing"),
    State(1_000_000, "before"),
    State(1_000_000, "now"),
    State(1_000_000, "nothing"),
]


@pytest.fixture(scope="module", params=STATES, ids=str)
def outbox(million: Million, request: pytest.FixtureRequest) -> State:
    asyncio.run(million.become(request.param))
    return million.state


@pytest.mark.parametrize("slots", [1, SLOTS])
@pytest.mark.parametrize("plan_cache_mode", [None, "force_custom_plan"], ids=["as-it-is", "custom-plan"])
async def test_a_row_costs_the_same_whatever_the_outbox_holds(
    million: Million, outbox: State, plan_cache_mode: str | None, slots: int
) -> None:
    buckets = slots * BUCKETS // SLOTS
    session = ExplainedSession(million.url, plan_cache_mode=plan_cache_mode)
    async with source_on(session, million.url, slots=slots) as source:
        first = await source.claim()
        rows = len(first.records)
        if outbox.unsent == SENT or slots == SLOTS:
            assert rows == min(outbox.unsent, BATCH_ROWS)
        assert_own_is_cheap(session, slots=slots)
        assert_claim_is_cheap(session, rows, buckets=buckets)

        source.settle([Delivered(record) for record in first.records])
        second = await source.claim()
        if rows:
            assert_settle_is_cheap(session, rows)
        # What was marked in this very transaction is still in the index.
        assert_claim_is_cheap(session, len(second.records), buckets=buckets, stepped_over=rows)

        claims = 2
        planned = await session.planned(STATEMENTS.claim["bytea"])
        assert planned == ((claims, 0) if plan_cache_mode is None else (0, claims))


@pytest.mark.parametrize("slots", [1, SLOTS])
@pytest.mark.parametrize("plan_cache_mode", [None, "force_custom_plan"], ids=["as-it-is", "custom-plan"])
async def test_what_waits_is_stepped_over(
    million: Million, outbox: State, plan_cache_mode: str | None, slots: int
) -> None:
    """Up to a thousand keys that Kafka refused, and a thousand rows that are published and that a stranger locked."""
    session = ExplainedSession(million.url, plan_cache_mode=plan_cache_mode)
    stranger = await asyncpg.connect(million.url)
    async with source_on(session, million.url, slots=slots) as source:
        claim = await source.claim()
        refused, published = claim.records[::2], claim.records[1::2]
        retries = [Retry(record, Scope.ROW, "MessageSizeTooLargeError", "it is too large") for record in refused]
        source.settle([*retries, *map(Delivered, published)])
        ids = [record.id for record in published]
        await stranger.execute("BEGIN")
        await stranger.execute("SELECT FROM outbox WHERE id = ANY ($1) FOR UPDATE", ids)

        claim = await source.claim()

        waiting = await stranger.fetchval(
            "SELECT count(*) FROM outbox WHERE sent_at IS NULL AND id <= $1 AND (id = ANY ($2) OR key = ANY ($3))",
            claim.records[-1].id if claim.records else 2**63 - 1,
            ids,
            [record.key.decode() for record in refused if record.key is not None],
        )
        assert waiting >= len(refused) + len(published)
        if published:
            assert_settle_is_cheap(session, len(published))
            assert_unsettled_is_cheap(session, len(published))
        assert_claim_is_cheap(session, len(claim.records), buckets=slots * BUCKETS // SLOTS, stepped_over=waiting)
    await stranger.close()


#: What status reads of a table, by the name of the statement: the index, and the most buffers that it may cost.
STATUS = {
    "count the backlog": ("outbox_unsent", 2 * status.MOST_COUNTED),
    "last id": ("outbox_pkey", 10),
    "count new rows": ("outbox_pkey", 10),
    "oldest unsent row": ("outbox_unsent", 10 * BUCKETS),
    "count by topic": ("outbox_unsent", 2 * status.MOST_LOOKED_AT),
    "buckets with more": ("outbox_unsent", 2 * status.MOST_LOOKED_AT),
    "count in windows": ("outbox_pkey", status.WINDOWS * status.WINDOW_IDS),
}


async def test_a_look_at_the_status_reads_a_bounded_number_of_rows(million: Million, outbox: State) -> None:
    session = ExplainedSession(million.url)
    found = await status.read_on(session, OUTBOX, lambda: asyncio.sleep(0))
    await session.close()
    assert found.backlog.is_exact == (outbox.unsent <= status.MOST_COUNTED)
    assert found.backlog.rows == pytest.approx(outbox.unsent, rel=0 if found.backlog.is_exact else 0.1)
    for label, (index, buffers) in STATUS.items():
        for explained in (explained for explained in session.explained if explained.label == label):
            assert explained.scans() == {index}, label
            assert explained.buffers <= buffers, label
    labels = {explained.label for explained in session.explained} & STATUS.keys()
    assert labels == (STATUS.keys() if not found.backlog.is_exact else set(list(STATUS)[:5]))


#: By the name of retention's statements: the most buffers a row. Measured: 0.02, and 3.1 of a row that is deleted.
#: Before PostgreSQL 17: 9.0.
PRUNE = {"look for rows to prune": 1, "prune sent rows": 6}
PRUNE_BEFORE_17 = {**PRUNE, "prune sent rows": 12}


async def test_old_rows_are_found_and_deleted_by_the_primary_key(million: Million, outbox: State) -> None:
    session = ExplainedSession(million.url)
    batches = iter([True] * 3)
    # All that are sent are older than that.
    await Pruner(session, Telemetry(), lambda: next(batches, False), retention_hours=0.0001).sweep()
    version = (await session.connection()).get_server_version()
    await session.close()
    for label, buffers in (PRUNE if version >= (17,) else PRUNE_BEFORE_17).items():
        found = [explained for explained in session.explained if explained.label == label]
        assert len(found) == 3
        for explained in found:
            assert explained.scans() == {"outbox_pkey"}, label
            assert explained.sorted_rows() == 0
            assert explained.buffers <= buffers * pruning.BATCH_ROWS, label


# -- an outbox that changes under a plan


async def own_statistics(database: DatabaseForTest) -> asyncpg.Connection:
    """A connection to an outbox that nobody vacuums or analyses but the test."""
    connection = await database.connect()
    await connection.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    return connection


async def burst_under_kept_plans(session: ExplainedSession, database: DatabaseForTest, *, analyzed: bool) -> None:
    """Have the plans made while ten rows are there, then let a burst come that ANALYZE doesn't see."""
    connection = await own_statistics(database)
    await connection.execute(insert(10))
    if analyzed:
        await connection.execute("ANALYZE outbox")
    async with source_on(session, database.url) as source:
        for _ in range(2):
            claim = await source.claim()
            source.settle([Delivered(record) for record in claim.records])
        await connection.execute(insert(2_000, sent=True))
        await connection.execute(insert(10_000))
        claim = await source.claim()
        assert len(claim.records) == BATCH_ROWS
        assert_claim_is_cheap(session, BATCH_ROWS)
        source.settle([*map(Delivered, claim.records[:10]), *map(Released, claim.records[10:])])
        await source.claim()
        assert_settle_is_cheap(session, 10)


@pytest.mark.parametrize("analyzed", [False, True], ids=["never-analyzed", "analyzed"])
async def test_plans_that_were_made_for_a_few_rows_serve_a_burst(
    outbox_database: DatabaseForTest, analyzed: bool
) -> None:
    await burst_under_kept_plans(ExplainedSession(outbox_database.url), outbox_database, analyzed=analyzed)


async def test_a_backlog_in_one_bucket_costs_no_more(outbox_database: DatabaseForTest) -> None:
    connection = await own_statistics(outbox_database)
    await connection.execute(insert(100))
    await connection.execute("ANALYZE outbox")
    await connection.execute(insert(50_000, keys=1))
    session = ExplainedSession(outbox_database.url)
    async with source_on(session, outbox_database.url) as source:
        claim = await source.claim()
        assert len(claim.records) == BATCH_ROWS
        assert sum(record.key == b"k0" for record in claim.records) > BATCH_ROWS / 2
        assert_claim_is_cheap(session, BATCH_ROWS)


async def test_of_large_rows_hardly_more_are_looked_at_than_fit_into_a_claim(outbox_database: DatabaseForTest) -> None:
    connection = await own_statistics(outbox_database)
    await connection.execute(
        "INSERT INTO outbox (topic, key, payload) SELECT 'orders', 'k' || n, convert_to(repeat('x', 100000), 'UTF8')"
        " FROM generate_series(1, 500) AS n"
    )
    session = ExplainedSession(outbox_database.url)
    async with source_on(session, outbox_database.url) as source:
        taken = [len((await source.claim()).records) for _ in range(2)]
        assert taken[0] == taken[1] == CLAIM_BYTES // (100_000 + ROW_BYTES)
        looked_at = sum(
            node["Actual Rows"] * node["Actual Loops"]
            for node in session.last("claim").nodes()
            if node.get("Relation Name") == "outbox" and "Scan" in node["Node Type"]
        )
        assert looked_at <= BUCKETS + 4 * taken[1]


async def test_marked_rows_are_passed_by_until_vacuum_removes_them(outbox_database: DatabaseForTest) -> None:
    """The index keeps an entry for each marked row until VACUUM. A claim that meets it looks at its row, and notes in
    the index that the row is dead, so later claims read the index's pages, and no row. It can't note that as long as
    any session's snapshot could still see the row as unsent: then each claim looks at each row again. Measured for
    100,000 rows, in buffers an empty claim: 61,706 beside an old snapshot, 62,150 while noting, 634 then (the index
    has 448 pages), 64 after VACUUM. Before PostgreSQL 18 a bucket's end is only found behind the next one's dead
    entries, so each page is read twice: 1,007 rather than 634.
    """
    rows = 100_000
    connection = await own_statistics(outbox_database)
    watching = await outbox_database.connect()
    await connection.execute(insert(rows))
    await watching.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await watching.execute("SELECT FROM outbox_layout")
    await connection.execute("UPDATE outbox SET sent_at = now()")
    pages = await connection.fetchval("SELECT pg_relation_size('outbox_unsent') / current_setting('block_size')::int")
    session = ExplainedSession(outbox_database.url)
    async with source_on(session, outbox_database.url) as source:

        async def empty_claim() -> int:
            claim = await source.claim()
            assert not claim.records
            return session.last("claim").buffers

        looked_at = [await empty_claim() for _ in range(3)]
        assert min(looked_at) > rows / 2, "somebody's snapshot is older than the marks"
        await watching.execute("ROLLBACK")
        await empty_claim()  # notes what is dead
        assert await empty_claim() <= 2 * pages + CLAIM_A_BUCKET * BUCKETS
        await connection.execute(insert(BATCH_ROWS))
        assert len((await source.claim()).records) == BATCH_ROWS
        assert session.last("claim").buffers <= CLAIM_A_ROW * BATCH_ROWS + 2 * pages + CLAIM_A_BUCKET * BUCKETS
        await connection.execute("DELETE FROM outbox WHERE sent_at IS NULL")
        await connection.execute("VACUUM outbox")
        await empty_claim()
        assert_claim_is_cheap(session, 0)


# -- the number of statements


@pytest.mark.parametrize("deletes_sent", [False, True], ids=["mark", "delete"])
@pytest.mark.parametrize("batch_rows", [1, 100, 2_000])
async def test_a_batch_takes_the_same_statements_whatever_its_size(
    outbox_database: DatabaseForTest, batch_rows: int, deletes_sent: bool
) -> None:
    connection = await outbox_database.connect()
    await connection.execute(insert(3 * batch_rows))
    fetched: list[str] = []
    executed: list[str] = []

    class Counted(Session):
        async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
            if statement != DUE:  # which is asked by the clock
                fetched.append(statement)
            return await super().fetch(statement, *arguments)

        async def change(self, statement: str, *arguments: Any) -> int:
            fetched.append(statement)
            return await super().change(statement, *arguments)

    session = Counted(Database(outbox_database.url, 10.0, 60.0), "counted")
    async with source_on(session, outbox_database.url, batch_rows=batch_rows, deletes_sent=deletes_sent) as source:
        claim = await source.claim()  # which asks for the payload's type too, and whether rows may be deleted
        fetched.clear()
        # Those that aren't prepared.
        (await session.connection()).add_query_logger(lambda logged: executed.append(logged.query))
        for _ in range(2):
            source.settle([Delivered(record) for record in claim.records])
            claim = await source.claim()
            assert len(claim.records) == batch_rows
    settle = Statements(OUTBOX, deletes_sent=deletes_sent).settle
    assert fetched == 2 * [OWN, settle, STATEMENTS.claim["bytea"]]
    assert executed == 2 * [session._begin(), "COMMIT"]


# -- statements that are written otherwise

BY_ID = f"""
-- claim
SELECT c.id, c.bucket, c.topic, c.key, 0::bigint AS bytes, c.event_id, c.type, c.payload, c.headers, c.created_at
FROM (
    SELECT o.id, o.bucket, o.topic, o.key, o.event_id::text, o.type, o.payload, o.headers::text,
           {created_at("created_at")} AS created_at
    FROM outbox o
    WHERE o.bucket = ANY ($1::smallint[]) AND o.sent_at IS NULL AND $2::int > 0 AND $8::bigint > 0
      AND o.id <> ALL ($4::bigint[]) AND o.topic <> ALL ($5::text[])
      AND (o.key IS NULL OR (o.topic, o.key) NOT IN (
                   SELECT held.topic, held.key FROM unnest($6::text[], $7::text[]) AS held (topic, key)))
    ORDER BY o.id
    LIMIT $3
    FOR UPDATE SKIP LOCKED
) AS c
"""


def rewritten(label: str, *replacements: tuple[str, str]) -> Rewrite:
    """The statement of this name with other words in it."""

    def rewrite(statement: str) -> str:
        if not statement.startswith(f"\n-- {label}\n"):
            return statement
        for old, new in replacements:
            assert old in statement
            statement = statement.replace(old, new)
        return statement

    return rewrite


SEQSCAN = rewritten("own", ("set_config('enable_seqscan', 'off', true)", "NULL"))
WHOLE_BATCHES = rewritten("claim", ("LIMIT $2", "LIMIT $3"), ("count(*) = $2", "count(*) = $2 AND false"))
COMPARED = rewritten(
    "claim", ('o."id" NOT IN (SELECT held.id FROM unnest($4::bigint[]) AS held (id))', 'o."id" <> ALL ($4::bigint[])')
)
IS_NULL = rewritten("settle", ('num_nulls(o."sent_at") = 1', 'o."sent_at" IS NULL AND o."parked_at" IS NULL'))


# In brackets the buffers a row, where the claim as it is costs at most 5.8.
@pytest.mark.parametrize(
    ("rewrite", "slots", "plan_cache_mode"),
    [
        pytest.param(
            lambda statement: BY_ID if "\n-- claim\n" in statement else statement, SLOTS, None, id="by-id (308)"
        ),
        pytest.param(WHOLE_BATCHES, SLOTS, None, id="a-batch-from-each-bucket (44)"),
        pytest.param(COMPARED, 1, None, id="what-waits-compared-with-each-row (5.8)"),
    ],
)
async def test_the_bounds_catch_a_claim_that_is_written_otherwise(
    million: Million, rewrite: Rewrite, slots: int, plan_cache_mode: str | None
) -> None:
    await million.become(STATES[-1])
    session = ExplainedSession(million.url, plan_cache_mode=plan_cache_mode, rewrite=rewrite)
    async with source_on(session, million.url, slots=slots) as source:
        claim = await source.claim()
        assert len(claim.records) == BATCH_ROWS
        with pytest.raises(AssertionError):
            assert_claim_is_cheap(session, BATCH_ROWS, buckets=slots * BUCKETS // SLOTS)


# With sequential scans a row claimed costs 177 buffers, and more in a larger table; for IS NULL the settle reads the
# whole index of unsent rows.
@pytest.mark.parametrize(
    ("rewrite", "analyzed"),
    [pytest.param(SEQSCAN, True, id="sequential-scans"), pytest.param(IS_NULL, False, id="settle-with-is-null")],
)
async def test_the_bounds_catch_plans_that_do_not_last(
    outbox_database: DatabaseForTest, rewrite: Rewrite, analyzed: bool
) -> None:
    session = ExplainedSession(outbox_database.url, rewrite=rewrite)
    with pytest.raises(AssertionError, match=r"'Seq Scan'|'outbox_unsent'"):
        await burst_under_kept_plans(session, outbox_database, analyzed=analyzed)
