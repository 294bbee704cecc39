"""The whole story on real servers: orders committed in PostgreSQL reach Kafka although the relay is killed.

An order service places orders, each with its outbox row in one transaction, and rolls every tenth back. A relay
process publishes meanwhile, dies of ``kill -9`` in the middle, and is started again. Then the topic is read back, as
a consumer would, and compared with what the *service* remembers to have committed; the outbox table only says in
which order. So a row that PostgreSQL lost counts as lost, and a rolled-back one that was published as invented.

Needs the extra ``demo``. Servers, relay and all their files end with this process, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from outbox_relay import ledger, schema
from outbox_relay.checker import Committed, Report
from outbox_relay.demo_orders import ROLLED_BACK_SHARE, OrderService
from outbox_relay.demo_screen import Row, Screen
from outbox_relay.errors import OutboxRelayError
from outbox_relay.servers import Kafka, Postgres, open_kafka, open_postgres
from outbox_relay.servers.guarded import Guarded
from outbox_relay.topic_reader import check_topics

ORDERS = 1_000
_ORDERS_A_SECOND = 300
_WRITERS = 16
_PARTITIONS = 4

#: The relay is killed once so many rows are acknowledged ...
_KILL_FROM = 450
#: ... and orders above this number come only afterwards, so that it can't have been too many, however late the kill.
_LAST_ORDER_BEFORE_THE_KILL = 900
#: How many rows may be acknowledged for the kill to be in the middle.
_MIDDLE = range(100, 901)

_LOOK_SECONDS = 0.02
_PUBLISHING_SECONDS = 60.0
_READING_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
_STATEMENT_SECONDS = 30.0

_COUNT = """\
-- count sent and unsent rows
SELECT count(*) FILTER (WHERE sent_at IS NOT NULL), count(*) FILTER (WHERE sent_at IS NULL) FROM outbox
"""

T = TypeVar("T")


class DemoError(OutboxRelayError):
    """The demo could not be carried to its end, so it shows nothing."""


# -- the verdict


@dataclass(frozen=True, slots=True)
class Numbers:
    """What came of it."""

    committed: int  #: orders that the service committed
    rolled_back: int  #: orders that it rolled back
    published_at_kill: int  #: rows marked as sent when the relay had been killed
    published: int  #: of the committed orders, those that Kafka holds in the end
    lost: int  #: of the committed orders, those that it doesn't
    invented: int  #: records of no committed order
    duplicates: int  #: records of a committed order beyond its first
    out_of_order: int  #: first records behind a later one of the same customer
    seconds: float

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The numbers, and the checker's report behind them."""

    numbers: Numbers
    report: Report

    @property
    def sound(self) -> bool:
        """Nothing lost, invented, out of order, corrupted or in a wrong partition."""
        return self.report.sound and not self.numbers.lost


def expected_rows(table: Iterable[Committed], committed: Collection[str]) -> list[Committed]:
    """The outbox table's rows, but for those of which the service doesn't know that it committed them."""
    return [row for row in table if row.event_id in committed]


def judge(
    committed: Collection[str], rolled_back: Collection[str], published_at_kill: int, report: Report, seconds: float
) -> Verdict:
    """``committed`` and ``rolled_back`` are the event ids that the service remembers, ``report`` is a check against
    :func:`expected_rows`.
    """
    numbers = Numbers(
        committed=len(committed),
        rolled_back=len(rolled_back),
        published_at_kill=published_at_kill,
        published=report.published,
        # Not the report's, which knows nothing of rows that are gone from the table.
        lost=len(committed) - report.published,
        invented=report.invented,
        duplicates=report.duplicates,
        out_of_order=report.out_of_order,
        seconds=round(seconds, 1),
    )
    return Verdict(numbers, report)


# -- the story


def run(*, to_stderr: bool) -> Verdict:
    """Show the story and the table of what came of it, on stdout or stderr.

    Raises OutboxRelayError where it could not be carried to its end, and KeyboardInterrupt for a Ctrl-C or SIGTERM:
    at once, for what is still starting then ends with this process.
    """
    screen = Screen(to_stderr=to_stderr)
    try:
        return asyncio.run(_story(screen))
    except SQLAlchemyError as error:
        raise DemoError(f"the order service could not use its database: {error}") from error


@dataclass(frozen=True, slots=True)
class _Scene:
    """What there is to play with."""

    screen: Screen
    kafka: Kafka
    topic: str
    service: OrderService
    relay: _Relay
    connection: asyncpg.Connection


async def _story(screen: Screen) -> Verdict:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    loop.set_exception_handler(_report)
    async with _scene(screen) as scene:
        at_kill = await _publish(scene)
        report = await _read_back(scene)
    verdict = judge(scene.service.committed, scene.service.rolled_back, at_kill, report, screen.seconds)
    _show(verdict, screen, is_mock=scene.kafka.is_mock)
    return verdict


async def _publish(scene: _Scene) -> int:
    """Until every order is placed and its row sent; how many rows were sent when the relay had been killed."""
    screen, service, relay = scene.screen, scene.service, scene.relay
    killed = asyncio.Event()

    async def kill_and_start_again() -> int:
        await _in_thread(relay.start)
        screen.say(f"relay started (process {relay.pid}); one order in {ROLLED_BACK_SHARE} is rolled back")
        await until(lambda now: now.sent >= _KILL_FROM, f"{_KILL_FROM} rows were not published")
        await _in_thread(relay.kill)
        now = await count()
        if now.sent not in _MIDDLE:
            raise relay.error(f"the relay was not killed in the middle: {now.sent} rows were acknowledged")
        screen.say(f"relay killed (kill -9): {now.sent} rows acknowledged, {now.placed} orders placed")
        killed.set()
        await _in_thread(relay.start)
        screen.say(f"relay started again (process {relay.pid})")
        await until(lambda now: now.placed == ORDERS and not now.unsent, "not every row was published")
        return now.sent

    async def until(condition: Callable[[_Counts], bool], otherwise: str) -> None:
        """Look again and again. Raises DemoError when the relay ends, or it takes too long."""
        deadline = time.monotonic() + _PUBLISHING_SECONDS
        while not condition(await count()):
            relay.check_alive()
            if time.monotonic() > deadline:
                raise relay.error(f"{otherwise} within {_PUBLISHING_SECONDS:g} s")
            await asyncio.sleep(_LOOK_SECONDS)

    async def count() -> _Counts:
        placed = service.placed  # before the table is looked at, which then has all their rows
        now = _Counts(placed, *await scene.connection.fetchrow(_COUNT))
        show(now.placed, now.sent)
        return now

    began = time.monotonic()
    numbers = iter(range(1, ORDERS + 1))

    async def place_orders() -> None:
        for number in numbers:
            await asyncio.sleep(began + number / _ORDERS_A_SECOND - time.monotonic())
            if number > _LAST_ORDER_BEFORE_THE_KILL:
                await killed.wait()
            await service.place(number)

    rows = ORDERS - ORDERS // ROLLED_BACK_SHARE
    with screen.bars({"orders placed": ORDERS, "rows acknowledged": rows}) as show:
        at_kill: int
        at_kill, *_ = await _together(kill_and_start_again(), *(place_orders() for _ in range(_WRITERS)))
    screen.say(f"{len(service.committed)} orders committed, {len(service.rolled_back)} rolled back; all rows are sent")
    await _in_thread(relay.stop)
    return at_kill


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # asyncpg leaves one behind for each connection that is cancelled in the making.
    if not isinstance(context.get("exception"), ConnectionError):
        loop.default_exception_handler(context)


class _Counts(NamedTuple):
    placed: int  #: orders, rolled back or not
    sent: int  #: rows
    unsent: int


async def _read_back(scene: _Scene) -> Report:
    with scene.screen.waiting("reading the topic back"):
        table = await ledger.committed_rows(scene.connection)
        report = await check_topics(
            expected_rows(table, scene.service.committed),
            scene.kafka.bootstrap_servers,
            [scene.topic],
            deadline_seconds=_READING_SECONDS,
            check_crcs=not scene.kafka.is_mock,
        )
    scene.screen.say(f"the topic is read back: {report.records} records")
    return report


def _show(verdict: Verdict, screen: Screen, *, is_mock: bool) -> None:
    numbers, report = verdict.numbers, verdict.report
    rows = [
        Row("committed", f"{numbers.committed}", "orders, each with its outbox row"),
        Row("rolled back", f"{numbers.rolled_back}", "orders and their rows, on purpose"),
        Row("published at the kill", f"{numbers.published_at_kill}", "rows acknowledged when the relay died"),
        Row("published", f"{numbers.published}", "committed orders that are in Kafka", not numbers.lost),
        Row("lost", f"{numbers.lost}", "committed orders that are not", not numbers.lost),
        Row("invented", f"{numbers.invented}", "records of no committed order", not numbers.invented),
        Row("duplicates", f"{numbers.duplicates}", "records that repeat an earlier one"),
        Row(
            "out of order", f"{numbers.out_of_order}", "orders behind later ones of their key", not numbers.out_of_order
        ),
    ]
    if report.corrupted:
        rows.append(Row("corrupted", f"{report.corrupted}", "records that differ from their row", False))
    if report.misplaced:
        rows.append(Row("misplaced", f"{report.misplaced}", "customers in a partition that isn't theirs", False))
    rows.append(Row("seconds", f"{numbers.seconds}", "from the start of the servers to their end"))
    screen.table(rows)
    where = " (on a mock of Kafka, which proves little)" if is_mock else ""
    screen.line("Rows in flight at a kill are sent again; consumers drop repeats by header `id`.")
    if verdict.sound:
        screen.line(f"Nothing was lost, invented or out of order{where}.", good=True)
    else:
        screen.line(f"The relay did damage{where}: {report.describe()}", good=False)


# -- the scene


@contextlib.asynccontextmanager
async def _scene(screen: Screen) -> AsyncIterator[_Scene]:
    loop = asyncio.get_running_loop()

    def progress(text: str) -> None:
        """Said by a thread, shown by this one."""
        loop.call_soon_threadsafe(screen.say, text)

    async def database() -> str:
        postgres = await _in_thread(lambda: open_postgres(progress))
        stack.callback(postgres.close)
        url = await stack.enter_async_context(_own_database(postgres))
        async with _connection(url) as connection:
            await schema.apply(connection)
        screen.say("PostgreSQL is ready, with the outbox schema in a database of its own")
        return url

    async def topic() -> tuple[Kafka, str]:
        kafka = await _in_thread(lambda: open_kafka(progress, allow_mock=True))
        stack.callback(kafka.close)
        name = await stack.enter_async_context(_own_topic(kafka))
        screen.say(f"Kafka is ready, with the topic {name}")
        return kafka, name

    async with AsyncExitStack() as stack:
        with screen.waiting("starting PostgreSQL and Kafka"):
            url, (kafka, topic_name) = await _together(database(), topic())
        service = OrderService(
            url, topic_name, connections=_WRITERS, timeout=_CONNECT_SECONDS, command_timeout=_STATEMENT_SECONDS
        )
        stack.push_async_callback(service.close)
        await service.prepare()
        relay = await _in_thread(lambda: _Relay(url, kafka.bootstrap_servers))
        stack.callback(relay.close)
        connection = await stack.enter_async_context(_connection(url))
        yield _Scene(screen, kafka, topic_name, service, relay, connection)


class _Relay:
    """A real relay process, with the settings that it has by itself. Every method blocks."""

    def __init__(self, database_url: str, bootstrap_servers: str) -> None:
        self._guarded = Guarded("demo-relay")
        config = self._guarded.directory / "config.toml"
        # Text and lists of it look the same in TOML as in JSON.
        config.write_text(
            f"[database]\nurl = {json.dumps(database_url)}\n"
            f"[kafka]\nbootstrap_servers = {json.dumps(bootstrap_servers.split(','))}\n"
            f'[log]\nformat = "console"\n'
        )
        self._command = [sys.executable, "-m", "outbox_relay", "run", "--config", str(config)]

    def start(self) -> None:
        # The new process is to find the same modules.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._guarded.start(self._command, environment)

    @property
    def pid(self) -> int:
        return self._guarded.pid

    def check_alive(self) -> None:
        """Raises DemoError when it has ended."""
        code = self._guarded.wait(0)
        if code is not None:
            raise self.error(f"the relay ended by itself, with exit code {code}")

    def kill(self) -> None:
        """``kill -9``. Raises DemoError when it was dead already."""
        code = self._guarded.stop(signal.SIGKILL)
        if code != -signal.SIGKILL:
            raise self.error(f"the relay ended by itself, with exit code {code}, before it was killed")

    def stop(self) -> None:
        """SIGTERM. Raises DemoError when it doesn't end in good order."""
        code = self._guarded.stop(signal.SIGTERM)
        if code:
            raise self.error(f"the relay was asked to end, and did with exit code {code}")

    def error(self, problem: str) -> DemoError:
        return DemoError(f"{problem}; its last lines:\n{self._guarded.tail() or '(none)'}")

    def close(self) -> None:
        self._guarded.close()


@contextlib.asynccontextmanager
async def _own_database(postgres: Postgres) -> AsyncIterator[str]:
    """The url of a new database, which is dropped where its server stays."""
    name = f"outbox_demo_{uuid4().hex[:12]}"
    try:
        async with _connection(postgres.url) as connection:
            try:
                await connection.execute(f"CREATE DATABASE {name}")
            except asyncpg.InsufficientPrivilegeError as error:
                raise DemoError(f"give DATABASE_URL a role that may create a database for the demo: {error}") from error
        yield make_url(postgres.url).set(database=name).render_as_string(hide_password=False)
    finally:
        if postgres.server is None:
            async with _connection(postgres.url) as connection:
                await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextlib.asynccontextmanager
async def _connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    try:
        connection = await asyncpg.connect(url, timeout=_CONNECT_SECONDS, command_timeout=_STATEMENT_SECONDS)
    except (asyncpg.PostgresError, OSError) as error:
        raise DemoError(f"PostgreSQL can't be reached: {error or type(error).__name__}") from error
    try:
        yield connection
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)


@contextlib.asynccontextmanager
async def _own_topic(kafka: Kafka) -> AsyncIterator[str]:
    """The name of a new topic, which is deleted where its server stays."""
    name = f"demo-orders-{uuid4().hex[:12]}"
    try:
        await kafka.create_topic(name, _PARTITIONS)
        yield name
    finally:
        if kafka.server is None:
            await _delete_topic(kafka.bootstrap_servers, name)


async def _delete_topic(bootstrap_servers: str, name: str) -> None:
    """Best effort: a broker may forbid it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    try:
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(_CONNECT_SECONDS):
                await admin.start()
                await admin.delete_topics([name])
    finally:
        await admin.close()


# -- waiting


async def _together(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """As gather, but when one fails the others have ended before the error is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run what blocks in a thread that nobody has to wait for: a Ctrl-C doesn't wait for a download."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(how: Callable[[Any], None], what: object) -> None:
        if not future.cancelled():
            how(what)

    def work() -> None:
        try:
            outcome: tuple[Callable[[Any], None], object] = future.set_result, call()
        except Exception as error:
            outcome = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return future
