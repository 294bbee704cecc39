"""What an operator asks first: what waits, who works on it, how fast, and when it will be gone.

Read from the database alone, in two read-only snapshots a few seconds apart, and cheap however much waits: every
statement reads a bounded number of rows, through ``outbox_unsent`` or the primary key. A backlog that is larger than
what is counted is estimated: each bucket's oldest rows are counted, and what comes after them in evenly spaced windows
of ids, which neither a busy key nor a row that waits from long ago misleads.

There is no index on ``sent_at``. What was sent is what came in less what a counted backlog grew by; an estimate is too
coarse for that, so there PostgreSQL's statistics say how many rows were updated, a second or so late. Where relays
delete what they have sent they say how many were deleted: neither look sees what came and went between the two.

What isn't in the database isn't guessed: which rows a relay holds back without parking them is known to that relay
alone, and in its log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from outbox_relay import schema
from outbox_relay.source.session import Database, Session
from outbox_relay.source.slot_statements import UNLOCKED
from outbox_relay.source.snapshot import OLDEST_OF_BUCKETS, one, snapshot
from outbox_relay.source.statements import OutboxTable, literal, quoted, topic_of
from outbox_relay.text import columns, printable, span

#: A backlog is counted up to here, and estimated above.
MOST_COUNTED = 100_000
#: Of all buckets together so many rows are looked at for their topics, each bucket's oldest.
MOST_LOOKED_AT = 64_000
#: For an estimate, so many windows of so many ids.
WINDOWS = 100
WINDOW_IDS = 500
#: The topics that have the most of these are told.
MOST_TOPICS = 10
#: Of topics that are paused or refused so many are told.
MOST_WAITING = 100
#: No statement runs longer, whatever the relay may take.
MOST_SECONDS = 5.0

#: Smaller than any id but the smallest.
_BEFORE_ALL = -(2**63)

_COUNT = """
-- count the backlog
SELECT extract(epoch FROM now())::float8 AS at, count(*) AS rows
FROM (SELECT FROM {outbox} o WHERE o.{sent_at} IS NULL AND o.{parked_at} IS NULL LIMIT $1) AS unsent
"""

_LAST_ID = """
-- last id
SELECT o.{id} AS id FROM {outbox} o ORDER BY o.{id} DESC LIMIT 1
"""

# A relay that deletes what it has sent has pruned_until ahead of the time; retention has it far behind.
_CHANGED = """
-- rows ever updated and deleted
SELECT pg_stat_get_tuples_updated({outbox_text}::regclass) AS updated,
       pg_stat_get_tuples_deleted({outbox_text}::regclass) AS deleted,
       extract(epoch FROM l.pruned_until)::float8 AS deleted_until
FROM outbox_layout l
"""

_NEW = """
-- count new rows
SELECT count(*) AS rows FROM {outbox} o WHERE o.{id} > $1
"""

_AGE = f"""
-- oldest unsent row
SELECT extract(epoch FROM now() - min(oldest.created_at))::float8 AS seconds
FROM {OLDEST_OF_BUCKETS.format(columns="{created_at} AS created_at", limit="1")}"""

_TOPICS = f"""
-- count by topic
SELECT oldest.topic, count(*) AS rows, (sum(count(*)) OVER ())::bigint AS looked_at
FROM {OLDEST_OF_BUCKETS.format(columns="{topic} AS topic", limit="$2")}
GROUP BY oldest.topic ORDER BY rows DESC, oldest.topic LIMIT $3
"""

_LONG_BUCKETS = f"""
-- buckets with more
SELECT every.bucket, max(oldest.id) AS last_id
FROM {OLDEST_OF_BUCKETS.format(columns="o.{bucket} AS bucket", limit="$2")}
GROUP BY every.bucket HAVING count(*) = $2
"""

# num_nulls(…) = 1 is IS NULL in words from which the planner can't conclude that outbox_unsent would do.
_IN_WINDOWS = """
-- count in windows
SELECT count(*) AS rows
FROM generate_series($1::bigint, $2::bigint, $3::bigint) AS every (id)
CROSS JOIN LATERAL (
    SELECT o.{bucket} AS bucket, o.{id} AS id FROM {outbox} o
    WHERE o.{id} > every.id AND o.{id} <= least(every.id + $4::bigint, $2::bigint)
      AND num_nulls(o.{sent_at}, o.{parked_at}) = 2
) AS unsent
JOIN unnest($5::integer[], $6::bigint[]) AS long (bucket, last_id)
  ON long.bucket = unsent.bucket AND unsent.id > long.last_id
"""

_PARKED = """
-- count what waits
SELECT count(*) AS looked_at,
       count(*) FILTER (WHERE p.state = 'retry') AS retry, count(*) FILTER (WHERE p.state = 'trying') AS trying,
       count(*) FILTER (WHERE p.state = 'blocked') AS blocked, count(*) FILTER (WHERE p.state = 'topic') AS topic,
       count(*) FILTER (WHERE p.state = 'dead') AS dead, count(*) FILTER (WHERE p.state = 'discarded') AS discarded,
       count(DISTINCT (p.bucket, p.line))
           FILTER (WHERE p.has_key AND p.state IN ('retry', 'trying', 'blocked', 'dead')) AS blocked_keys,
       extract(epoch FROM now() - min(p.parked_at) FILTER (WHERE p.state <> 'discarded'))::float8 AS oldest_seconds,
       extract(epoch FROM now() - min(p.parked_at) FILTER (WHERE p.state = 'dead'))::float8 AS oldest_dead_seconds
FROM (SELECT w.state, w.bucket, w.line, w.parked_at, w.key IS NOT NULL AS has_key FROM outbox_parked w LIMIT $1) AS p
"""

_PAUSED = """
-- paused topics
SELECT p.topic, extract(epoch FROM now() - p.paused_at)::float8 AS since_seconds, p.reason
FROM outbox_pause p ORDER BY p.topic LIMIT $1
"""

# What is refused is one row of each lane; the others are parked for it, and have the reason that was known then.
_REFUSED = """
-- refused topics
SELECT p.topic, count(*) AS rows, extract(epoch FROM now() - min(p.parked_at))::float8 AS since_seconds,
       (array_agg(p.error ORDER BY p.id) FILTER (WHERE p.error IS NOT NULL))[1] AS error,
       (array_agg(p.reason ORDER BY p.id) FILTER (WHERE p.error IS NOT NULL))[1] AS reason
FROM (SELECT w.id, w.topic, w.state, w.parked_at, w.error, w.reason FROM outbox_parked w LIMIT $1) AS p
WHERE p.state = 'topic' AND NOT EXISTS (SELECT FROM outbox_pause s WHERE s.topic = p.topic)
GROUP BY p.topic ORDER BY p.topic LIMIT $2
"""

_ALIVE = "r.renewed_at > now() - make_interval(secs => r.lease_seconds)"

_RELAYS = f"""
-- relays
SELECT r.relay_id, r.name, r.ready, CASE WHEN r.direct THEN NOT {UNLOCKED} END AS connected,
       extract(epoch FROM now() - r.renewed_at)::float8 AS heartbeat_seconds,
       ARRAY(SELECT s.slot FROM outbox_slot s WHERE s.owner = r.relay_id ORDER BY s.slot) AS slots
FROM outbox_relay r WHERE {_ALIVE} ORDER BY r.relay_id
"""

_WITHOUT_OWNER = f"""
-- slots without an owner
SELECT s.slot FROM outbox_slot s
WHERE s.owner IS NULL OR s.owner NOT IN (SELECT r.relay_id FROM outbox_relay r WHERE {_ALIVE}) ORDER BY s.slot
"""


# -- the answer; its fields are those of the JSON, and stable


@dataclass(frozen=True, slots=True)
class Backlog:
    """``rows`` is an estimate where ``is_exact`` is false. ``oldest_seconds`` is None without rows, and
    where the table doesn't say when a row was created."""

    rows: int
    is_exact: bool
    oldest_seconds: float | None


@dataclass(frozen=True, slots=True)
class Topic:
    """``rows`` of those that were looked at."""

    topic: str
    rows: int


@dataclass(frozen=True, slots=True)
class Topics:
    """Of the oldest rows of each bucket, ``rows_looked_at`` in all, the topics that have most."""

    rows_looked_at: int
    most: list[Topic]


@dataclass(frozen=True, slots=True)
class Parked:
    """Rows in ``outbox_parked`` by state; all but those being tried aren't in the backlog. ``blocked_keys`` are those
    of which a row was refused. Of the first rows alone where ``is_exact`` is false."""

    is_exact: bool
    retry: int
    trying: int
    blocked: int
    topic: int
    dead: int
    discarded: int
    blocked_keys: int
    oldest_seconds: float | None
    oldest_dead_seconds: float | None


@dataclass(frozen=True, slots=True)
class Paused:
    """A topic that somebody paused, and why."""

    topic: str
    since_seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A topic that can't be written to, and isn't paused: so many rows are parked for it, and why."""

    topic: str
    rows: int
    since_seconds: float
    error: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class RelayAlive:
    """One whose lease hasn't run out. ``ready``: it reaches Kafka. ``connected``: its session is there; None behind a
    connection pooler, where that isn't known."""

    relay_id: int
    name: str
    ready: bool
    connected: bool | None
    heartbeat_seconds: float
    slots: list[int]


@dataclass(frozen=True, slots=True)
class SlotsOwned:
    """Rows of a slot without a living owner wait."""

    count: int
    without_owner: list[int]


@dataclass(frozen=True, slots=True)
class Rates:
    """Over the last ``over_seconds``."""

    over_seconds: float
    inserted_per_second: float
    sent_per_second: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """``state``: ``empty``, ``shrinking``, ``standing`` or ``growing``. ``empty_in_seconds`` is told of a
    shrinking backlog: rows ÷ (sent less inserted, a second)."""

    state: str
    empty_in_seconds: float | None


@dataclass(frozen=True, slots=True)
class Status:
    backlog: Backlog
    topics: Topics
    parked: Parked
    paused: list[Paused]
    refused: list[Refused]
    relays: list[RelayAlive]
    slots: SlotsOwned
    rates: Rates
    forecast: Forecast

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# -- reading it


class _Statements:
    def __init__(self, table: OutboxTable) -> None:
        names = {
            "outbox": quoted(table.name),
            "outbox_text": literal(quoted(table.name)),
            "topic": topic_of(table.topic),
            "created_at": f"o.{quoted(table.created_at)}::timestamptz" if table.created_at else "NULL::timestamptz",
            **{name: quoted(getattr(table, name)) for name in ("id", "sent_at", "parked_at", "bucket")},
        }
        self.count = _COUNT.format(**names)
        self.last_id = _LAST_ID.format(**names)
        self.new = _NEW.format(**names)
        self.age = _AGE.format(**names)
        self.topics = _TOPICS.format(**names)
        self.long_buckets = _LONG_BUCKETS.format(**names)
        self.in_windows = _IN_WINDOWS.format(**names)
        self.changed = _CHANGED.format(**names)


async def read(database: Database, table: OutboxTable, window: Callable[[], Awaitable[None]]) -> Status:
    """The status now, with rates since before ``window``, which is waited for.

    Raises SourceUnavailableError, and SchemaError where there is no outbox that this release can work with.
    """
    bounded = replace(database, statement_timeout_seconds=min(MOST_SECONDS, database.statement_timeout_seconds))
    session = Session(bounded, "outbox-relay status")
    try:
        return await read_on(session, table, window)
    finally:
        await session.close()


async def read_on(session: Session, table: OutboxTable, window: Callable[[], Awaitable[None]]) -> Status:
    """As :func:`read`, on a session that is there."""
    statements = _Statements(table)
    async with snapshot(session):
        with session.unavailable("read outbox_layout"):
            layout = await schema.verify(await session.connection())
        before = await _counted(session, statements)
    await window()
    async with snapshot(session):
        after = await _counted(session, statements)
        new = await one(session, statements.new, before.last_id)
        age = (await one(session, statements.age, layout.buckets))["seconds"]
        share = MOST_LOOKED_AT // layout.buckets
        topics = await session.fetch(statements.topics, layout.buckets, share, MOST_TOPICS)
        looked_at = topics[0]["looked_at"] if topics else 0
        rows = after.rows
        if not after.is_exact:
            rows = max(
                rows, looked_at + await _estimated_rest(session, statements, layout.buckets, share, after.last_id)
            )
        parked = dict(await one(session, _PARKED, MOST_COUNTED + 1))
        paused = await session.fetch(_PAUSED, MOST_WAITING)
        refused = await session.fetch(_REFUSED, MOST_COUNTED + 1, MOST_WAITING)
        relays = await session.fetch(_RELAYS)
        without_owner = await session.fetch(_WITHOUT_OWNER)
    rates = rates_of(before, after, new["rows"])
    return Status(
        Backlog(rows, after.is_exact, None if age is None else max(0.0, age)),
        Topics(looked_at, [Topic(topic["topic"], topic["rows"]) for topic in topics]),
        Parked(parked.pop("looked_at") <= MOST_COUNTED, **parked),
        [Paused(**pause) for pause in paused],
        [Refused(**topic) for topic in refused],
        [RelayAlive(**relay) for relay in relays],
        SlotsOwned(layout.slots, [row["slot"] for row in without_owner]),
        rates,
        forecast_of(rows, rates),
    )


@dataclass(frozen=True, slots=True)
class Counted:
    """Of one moment: the unsent rows, counted as far as is allowed, the last id, the rows ever updated and deleted, and
    until when rows that were sent may have been deleted."""

    at: float
    rows: int
    last_id: int
    updated: int
    deleted: int
    deleted_until: float | None

    @property
    def is_exact(self) -> bool:
        return self.rows <= MOST_COUNTED


async def _counted(session: Session, statements: _Statements) -> Counted:
    count = await one(session, statements.count, MOST_COUNTED + 1)
    last = await session.fetch(statements.last_id)
    changed = await one(session, statements.changed)
    return Counted(count["at"], count["rows"], last[0]["id"] if last else _BEFORE_ALL, **changed)


async def _estimated_rest(session: Session, statements: _Statements, buckets: int, share: int, last_id: int) -> int:
    """About how many unsent rows come after the oldest ``share`` of their bucket."""
    long = await session.fetch(statements.long_buckets, buckets, share)
    if not long:
        return 0
    first_id = min(bucket["last_id"] for bucket in long)
    step = max(WINDOW_IDS, -(-(last_id - first_id) // WINDOWS))
    bounds = [bucket["bucket"] for bucket in long], [bucket["last_id"] for bucket in long]
    found = await one(session, statements.in_windows, first_id, last_id, step, WINDOW_IDS, *bounds)
    return int(found["rows"] * step // WINDOW_IDS)


def rates_of(before: Counted, after: Counted, new: int) -> Rates:
    """``new`` rows have ids from after ``before``."""
    seconds = max(0.001, after.at - before.at)
    deletes_sent = after.deleted_until is not None and after.deleted_until > before.at
    deleted = after.deleted - before.deleted if deletes_sent else 0
    if not (before.is_exact and after.is_exact):
        return Rates(seconds, new / seconds, (after.updated - before.updated + deleted) / seconds)
    growth = after.rows - before.rows
    # A row whose transaction was long has an id from before; it shows in the backlog at least. One that came and was
    # deleted shows in neither.
    inserted = max(new, growth + deleted)
    return Rates(seconds, inserted / seconds, (inserted - growth) / seconds)


def forecast_of(rows: int, rates: Rates) -> Forecast:
    if not rows:
        return Forecast("empty", None)
    faster = rates.sent_per_second - rates.inserted_per_second
    if faster > 0:
        return Forecast("shrinking", rows / faster)
    return Forecast("growing" if faster < 0 else "standing", None)


# -- showing it

_STATES = ("retry", "trying", "blocked", "topic", "dead", "discarded")
#: Those that wait outside of the backlog.
_WAITING = ("retry", "blocked", "topic", "dead")


def as_lines(status: Status) -> Iterator[str]:
    """Plain text: a fact a line, by the same names as in the JSON."""
    return _facts("", status.as_dict())


def _facts(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner, of_inner in value.items():
            yield from _facts(f"{name}.{inner}" if name else inner, of_inner)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _facts(f"{name}.{number}", item)
    elif isinstance(value, list):
        yield f"{name} {' '.join(map(str, value)) or '-'}"
    else:
        yield f"{name} {_fact(value)}"


def _fact(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1f}" if isinstance(value, float) else printable(str(value))


def as_tables(status: Status) -> Iterator[str]:
    """For a person: sentences, and tables with a heading each."""
    backlog, rates = status.backlog, status.rates
    rows = f"{'' if backlog.is_exact else 'about '}{_rows(backlog.rows)}"
    age = "" if backlog.oldest_seconds is None else f", the oldest {span(backlog.oldest_seconds)} old"
    yield f"Backlog   {rows}{age}"
    yield (
        f"Rates     {rates.inserted_per_second:,.1f}/s inserted, {rates.sent_per_second:,.1f}/s sent"
        f" (over {rates.over_seconds:.1f} s)"
    )
    parked = {name: n for name in _STATES if (n := getattr(status.parked, name))}
    yield f"Forecast  {_in_words(status.forecast, but_parked=any(name in parked for name in _WAITING))}"
    if parked:
        keys = status.parked.blocked_keys
        yield (
            f"Parked    {'' if status.parked.is_exact else 'more than '}{_rows(sum(parked.values()))}: "
            + ", ".join(f"{n:,} {'for a topic' if name == 'topic' else name}" for name, n in parked.items())
            + (f"; {keys:,} {'key is' if keys == 1 else 'keys are'} blocked" if keys else "")
            + ("" if (dead := status.parked.oldest_dead_seconds) is None else f"; the oldest dead for {span(dead)}")
        )
    for paused in status.paused:
        yield f"Paused    {printable(paused.topic)}, for {span(paused.since_seconds)}: {printable(paused.reason)}"
    for refused in status.refused:
        why = ", ".join(printable(text) for text in (refused.error, refused.reason) if text) or "no error is known"
        yield f"Refused   {printable(refused.topic)}, {_rows(refused.rows)} for {span(refused.since_seconds)}: {why}"
    alone = status.slots.without_owner
    yield (
        f"Slots     {status.slots.count - len(alone)} of {status.slots.count} owned"
        f"{f'; the rows of these wait: {_numbers(alone)}' if alone else ''}"
    )
    if status.topics.most:
        looked_at = status.topics.rows_looked_at
        yield ""
        heading = "ROWS" if backlog.is_exact and looked_at >= backlog.rows else f"ROWS OF THE {looked_at:,} LOOKED AT"
        yield from columns(
            ["TOPIC", heading], [[printable(topic.topic), f"{topic.rows:,}"] for topic in status.topics.most]
        )
    yield ""
    if not status.relays:
        yield "No relay is alive."
        return
    words = {True: "yes", False: "lost", None: "pooled"}
    yield from columns(
        ["RELAY", "ID", "REACHES KAFKA", "CONNECTED", "HEARTBEAT", "SLOTS"],
        [
            [
                printable(relay.name),
                str(relay.relay_id),
                "yes" if relay.ready else "no",
                words[relay.connected],
                f"{span(relay.heartbeat_seconds)} ago",
                _numbers(relay.slots) or "-",
            ]
            for relay in status.relays
        ],
    )


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _in_words(forecast: Forecast, *, but_parked: bool) -> str:
    if forecast.empty_in_seconds is not None:
        return f"shrinking; gone in {span(forecast.empty_in_seconds)} at these rates"
    return {
        "empty": "nothing waits but what is parked" if but_parked else "nothing waits",
        "standing": "standing: no more goes out than comes in",
        "growing": "growing: more comes in than goes out",
    }[forecast.state]


def _numbers(numbers: list[int]) -> str:
    """0 1 2 5 as 0-2 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
