"""Real relay processes, read through their own logs, and an application that writes the outbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg

from outbox_relay import ledger, outbox
from outbox_relay.checker import Report
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka
from outbox_relay.servers.guarded import Guarded
from outbox_relay.topic_reader import check_topics, read_topics
from tests.waiting import eventually

SECONDS = 60.0
_STORY_LINES = 60

Event = dict[str, Any]


class RelayProcess:
    """One ``outbox-relay run``, in its own process, that ends with the test. It can be started again."""

    def __init__(self, config: Mapping[str, Mapping[str, Any]], *arguments: str) -> None:
        self._guarded = Guarded("relay")
        self._arguments = arguments
        self.name: str = config["relay"]["name"]
        path = self._guarded.directory / "config.toml"
        path.write_text(toml(config))
        self._command = [sys.executable, "-m", "outbox_relay", "run", "--config", str(path), *arguments]
        self._read_to = 0
        self._events: list[Event] = []

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._guarded.start(self._command, environment)

    # -- its log

    def events(self, name: str | None = None, **fields: Any) -> list[Event]:
        """What it has logged since the very first start: all of it, or the events of a name with these fields."""
        self._read()
        wanted = {**({} if name is None else {"event": name}), **fields}
        return [event for event in self._events if all(event.get(key) == value for key, value in wanted.items())]

    async def event(self, name: str, *, after: int = 0, deadline_seconds: float = SECONDS, **fields: Any) -> Event:
        """The first such event from the ``after``-th such on; waits for it."""

        def found() -> Event | None:
            events = self.events(name, **fields)
            return events[after] if len(events) > after else None

        try:
            return await eventually(found, f"{self.name} logs {name} {fields or ''}", deadline_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; its last lines:\n{self._guarded.tail()}") from error

    def ids(self, name: str) -> list[int]:
        """The row ids of all events of that name, in their order; needs log level debug."""
        return [id_ for event in self.events(name) for id_ in event["ids"]]

    def story(self) -> str:
        """What one needs of it when a test failed: the last lines, without those of each claim, and the very last."""
        told = [json.dumps(event) for event in self.events() if event["level"] != "debug"]
        return "\n".join([f"{self.name}, its last lines above debug:", *told[-_STORY_LINES:], self._guarded.tail()])

    def output(self) -> str:
        """All that it has written since the last start."""
        return self._guarded.output()

    def _read(self) -> None:
        with contextlib.suppress(FileNotFoundError), self._guarded.log.open("rb") as log:
            log.seek(self._read_to)
            whole_lines, newline, _ = log.read().rpartition(b"\n")
            self._read_to += len(whole_lines) + len(newline)
            for line in whole_lines.splitlines():
                # A process that was killed in the middle of a line leaves it so.
                with contextlib.suppress(json.JSONDecodeError):
                    self._events.append(json.loads(line))

    # -- its life

    @property
    def pid(self) -> int:
        return self._guarded.pid

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._guarded.stop(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def exit_code(self, deadline_seconds: float = SECONDS) -> int:
        """Wait for its end."""
        code = await asyncio.to_thread(self._guarded.wait, deadline_seconds)
        assert code is not None, f"{self.name} runs on:\n{self._guarded.tail()}"
        return code

    async def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.signal(signal.SIGTERM)
        return await self.exit_code()

    @property
    def directory(self) -> Path:
        return self._guarded.directory

    def close(self) -> None:
        self._guarded.close()


@contextlib.contextmanager
def relay_process(
    database_url: str,
    bootstrap_servers: str,
    *arguments: str,
    start: bool = True,
    database: Mapping[str, Any] | None = None,
    kafka: Mapping[str, Any] | None = None,
    log: Mapping[str, Any] | None = None,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    **relay: Any,
) -> Iterator[RelayProcess]:
    """A relay process that logs everything as JSON. Keywords are settings of the table ``[relay]``,
    ``tables`` whole other tables."""
    config = {
        "database": {"url": database_url, **(database or {})},
        "kafka": {"bootstrap_servers": [bootstrap_servers], **(kafka or {})},
        "relay": {"name": f"relay-{uuid4().hex[:8]}", "heartbeat_seconds": 0.2, **relay},
        "log": {"level": "debug", "format": "json", **(log or {})},
        **(tables or {}),
    }
    process = RelayProcess(config, *arguments)
    try:
        if start:
            process.start()
        yield process
    except BaseException:
        sys.stdout.write(f"{process.story()}\n")  # pytest shows it with the failure
        raise
    finally:
        process.close()


def toml(config: Mapping[str, Mapping[str, Any]]) -> str:
    tables = (
        f"[{name}]\n" + "".join(f"{key} = {_value(value)}\n" for key, value in table.items())
        for name, table in config.items()
    )
    return "\n".join(tables)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    # Text, numbers, booleans and lists of them look the same in JSON.
    return json.dumps(value)


SLOTS = 16


def owned(relay: RelayProcess) -> int:
    """How many slots it has, as it says."""
    events = [event for event in relay.events() if event["event"] in ("slots.taken", "slots.released", "slots.lost")]
    return int(events[-1]["owned"]) if events else 0


async def shared_out(relays: Sequence[RelayProcess]) -> None:
    """Wait until every relay has an even share of the slots."""
    await eventually(lambda: all(owned(relay) == SLOTS // len(relays) for relay in relays), "even shares")


def in_flight(relay: RelayProcess) -> set[int]:
    """The ids that it has claimed and not marked."""
    return set(relay.ids("claim.made")) - set(relay.ids("claim.settled"))


async def new_topic(
    kafka: Kafka, partitions: int = 6, config: Mapping[str, str] | None = None, *, name: str | None = None
) -> str:
    name = name or f"orders-{uuid4().hex}"
    await kafka.create_topic(name, partitions, config)
    return name


# -- the application


@dataclass
class Application:
    """Writers of one outbox that take turns on each key, as the guarantee of order asks them to.

    Every other transaction is rolled back. ``transaction_rows`` are written in each.
    """

    database_url: str
    topic: str
    keys: int = 50
    transaction_rows: int = 5
    committed_rows: int = 0
    rolled_back_rows: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(1))
    _names: list[str] = field(default_factory=list)

    async def prepare(self) -> None:
        """Make the aggregates' table. The keys are spread evenly over the slots, and so over relays that share them."""
        async with self._connection() as connection:
            await connection.execute("CREATE TABLE IF NOT EXISTS account (key text PRIMARY KEY, version int NOT NULL)")
            rows = await connection.fetch(
                """
                SELECT name FROM (
                    SELECT name, row_number() OVER (PARTITION BY hashtextextended(name, 0) & $2 ORDER BY n) AS turn
                    FROM (SELECT n, 'k' || n AS name FROM generate_series(1, 100 * $1::int) AS n) AS names
                ) AS spread ORDER BY turn, name LIMIT $1
                """,
                self.keys,
                SLOTS - 1,
            )
            self._names = [row["name"] for row in rows]
            await connection.execute(
                "INSERT INTO account SELECT name, 0 FROM unnest($1::text[]) AS name ON CONFLICT DO NOTHING", self._names
            )

    async def write(self, rows: int, *, writers: int = 8) -> None:
        """Commit so many rows, and roll as many back, from several connections at once."""
        goal = self.committed_rows + rows

        async def writer(number: int) -> None:
            async with self._connection() as connection:
                roll_back = bool(number % 2)
                while self.committed_rows < goal:
                    # Counted before it is written, so that all writers together don't write more.
                    if not roll_back:
                        self.committed_rows += self.transaction_rows
                    await self._transaction(connection, roll_back=roll_back)
                    roll_back = not roll_back

        await asyncio.gather(*(writer(number) for number in range(writers)))

    async def _transaction(self, connection: asyncpg.Connection, *, roll_back: bool) -> None:
        keys = self._random.choices(self._names, k=self.transaction_rows)
        transaction = connection.transaction()
        await transaction.start()
        # In one order, so that writers don't deadlock; and in a statement before the outbox's.
        await connection.execute("SELECT FROM account WHERE key = ANY ($1) ORDER BY key FOR UPDATE", sorted(set(keys)))
        await connection.execute("UPDATE account SET version = version + 1 WHERE key = ANY ($1)", keys)
        messages = [Message(self.topic, {"for": key}, key=key, type="AccountChanged") for key in keys]
        await outbox.add_async(connection, *messages)
        if roll_back:
            self.rolled_back_rows += self.transaction_rows
            await transaction.rollback()
        else:
            await transaction.commit()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close(timeout=10)


@contextlib.asynccontextmanager
async def busy(application: Application) -> AsyncIterator[None]:
    """The application writes, at most 50,000 rows, until the block is left."""
    done = asyncio.Event()

    async def write() -> None:
        while not done.is_set() and application.committed_rows < 50_000:
            await application.write(200, writers=4)

    writing = asyncio.create_task(write())
    try:
        yield
    finally:
        done.set()
        await writing


async def drained(connection: asyncpg.Connection, deadline_seconds: float = 120.0) -> None:
    """Wait until no unsent row is left."""

    async def nothing_left() -> bool:
        return not await connection.fetchval("SELECT EXISTS (SELECT FROM outbox WHERE sent_at IS NULL)")

    await eventually(nothing_left, "every row is marked as sent", deadline_seconds)


async def compare(connection: asyncpg.Connection, kafka: Kafka, *topics: str) -> Report:
    """What the table says was committed against what Kafka holds."""
    committed = await ledger.committed_rows(connection)
    return await check_topics(committed, kafka.bootstrap_servers, topics, deadline_seconds=SECONDS)


async def repeated(connection: asyncpg.Connection, report: Report) -> set[int]:
    """The ids of the rows that Kafka holds more than once."""
    rows = await connection.fetch("SELECT id FROM outbox WHERE event_id = ANY ($1)", list(report.duplicate_ids))
    return {row["id"] for row in rows}


async def ids_in(kafka: Kafka, topic: str) -> list[int]:
    """The outbox ids of the topic's records, in the order of each partition."""
    records = read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=SECONDS)
    return [int(dict(record.headers)["outbox-id"] or b"") async for record in records]
