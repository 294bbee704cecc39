"""The whole story on real servers: orders committed in PostgreSQL reach Kafka although the relay is killed.

An order service places orders, each with its outbox row in one transaction, and rolls every tenth back. A relay
process publishes meanwhile, dies of ``kill -9`` in the middle, and is started again. Then the topic is read back, as
a consumer would, and compared with what the *service* remembers to have committed; the outbox table only says in
which order. So a row that PostgreSQL lost counts as lost, and a rolled-back one that was published as invented.

A payment service consumes all the while, and charges each order once, with the inbox. At last some records are sent
again, besides those that the relay's end had repeated, and its charges are compared with the orders.

Needs the extra ``demo``. Servers, processes and all their files end with this process, however that ends.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from outbox_relay import ledger
from outbox_relay.checker import Report
from outbox_relay.demo_orders import ROLLED_BACK_SHARE
from outbox_relay.demo_repeats import send_again, until_finished
from outbox_relay.demo_scene import WRITERS, Scene, open_scene
from outbox_relay.demo_screen import Screen
from outbox_relay.demo_verdict import Charges, Verdict, expected_rows, judge, show_verdict
from outbox_relay.demo_waiting import in_thread, together
from outbox_relay.errors import DemoError
from outbox_relay.topic_reader import check_topics

ORDERS = 1_000
_ORDERS_A_SECOND = 300

#: The relay is killed once so many rows are marked as sent ...
_KILL_FROM = 450
#: ... and orders above this number come only afterwards, so that it can't have been too many, however late the kill.
_LAST_ORDER_BEFORE_THE_KILL = 900
#: How many rows may be marked as sent for the kill to be in the middle.
_MIDDLE = range(100, 901)

_LOOK_SECONDS = 0.02
_PUBLISHING_SECONDS = 60.0
_READING_SECONDS = 30.0
_CHARGING_SECONDS = 60.0

_COUNT = """\
-- count sent and unsent rows
SELECT count(*) FILTER (WHERE sent_at IS NOT NULL), count(*) FILTER (WHERE sent_at IS NULL) FROM outbox
"""

_COUNT_CHARGES = """\
-- count charges and the orders that are charged
SELECT count(*), count(DISTINCT number) FROM charge LEFT JOIN customer_order ON number = order_number
"""


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


async def _story(screen: Screen) -> Verdict:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    loop.set_exception_handler(_report)
    async with open_scene(screen) as scene:
        at_kill = await _publish(scene)
        report = await _read_back(scene)
        charges = await _repeat(scene)
    verdict = judge(scene.service.committed, scene.service.rolled_back, at_kill, report, charges, screen.seconds)
    show_verdict(verdict, screen, is_mock=scene.kafka.is_mock)
    return verdict


async def _publish(scene: Scene) -> int:
    """Until every order is placed and its row sent; how many rows were sent when the relay had been killed."""
    screen, service, relay, payments = scene.screen, scene.service, scene.relay, scene.payments
    killed = asyncio.Event()

    async def kill_and_start_again() -> int:
        await in_thread(payments.start)
        await in_thread(relay.start)
        screen.say(f"payment service started (process {payments.pid})")
        screen.say(f"relay started (process {relay.pid}); one order in {ROLLED_BACK_SHARE} is rolled back")
        await until(lambda now: now.sent >= _KILL_FROM, f"{_KILL_FROM} rows were not published")
        await in_thread(relay.kill)
        now = await count()
        if now.sent not in _MIDDLE:
            raise relay.error(f"the relay was not killed in the middle: {now.sent} rows were marked as sent")
        screen.say(
            f"relay killed (kill -9): {now.placed} orders placed, {now.rolled_back} of them rolled back;"
            f" {now.sent} rows marked as sent"
        )
        killed.set()
        await in_thread(relay.start)
        screen.say(f"relay started again (process {relay.pid})")
        await until(lambda now: now.placed == ORDERS and not now.unsent, "not every row was published")
        return now.sent

    async def until(condition: Callable[[_Counts], bool], otherwise: str) -> None:
        """Look again and again. Raises DemoError when the relay ends, or it takes too long."""
        deadline = time.monotonic() + _PUBLISHING_SECONDS
        while not condition(await count()):
            relay.check_alive()
            payments.check_alive()
            if time.monotonic() > deadline:
                raise relay.error(f"{otherwise} within {_PUBLISHING_SECONDS:g} s")
            await asyncio.sleep(_LOOK_SECONDS)

    async def count() -> _Counts:
        # Before the table is looked at, which then has all their rows.
        placed, rolled_back = service.placed, len(service.rolled_back)
        now = _Counts(placed, rolled_back, *await scene.connection.fetchrow(_COUNT))
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
    with screen.bars({"orders placed": ORDERS, "rows marked as sent": rows}) as show:
        at_kill: int
        at_kill, *_ = await together(kill_and_start_again(), *(place_orders() for _ in range(WRITERS)))
    screen.say(f"{len(service.committed)} orders committed, {len(service.rolled_back)} rolled back; all rows are sent")
    await in_thread(relay.stop)
    return at_kill


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # asyncpg leaves one behind for each connection that is cancelled in the making.
    if not isinstance(context.get("exception"), ConnectionError):
        loop.default_exception_handler(context)


class _Counts(NamedTuple):
    placed: int  #: orders, rolled back or not
    rolled_back: int  #: of these
    sent: int  #: rows
    unsent: int


async def _read_back(scene: Scene) -> Report:
    with scene.screen.waiting("reading the topic back"):
        table = await ledger.committed_rows(scene.connection)
        report = await check_topics(
            expected_rows(table, scene.service.committed),
            scene.kafka.bootstrap_servers,
            [scene.topic],
            deadline_seconds=_READING_SECONDS,
            check_crcs=not scene.kafka.is_mock,
        )
    scene.screen.say(
        f"the topic is read back: {report.records} records, {report.duplicates} of them sent again by the relay"
    )
    return report


async def _repeat(scene: Scene) -> Charges:
    """Send records again, and when the payment service has dealt with them and all others, count what it charged."""
    with scene.screen.waiting("sending records again"):
        repeats = await send_again(scene.kafka, scene.topic)
        scene.screen.say(f"{repeats.records} of them, every ninth of each partition, are sent again on purpose")
        is_finished = await until_finished(
            scene.kafka, scene.topic, repeats.ends, _CHARGING_SECONDS, scene.payments.check_alive
        )
        if not is_finished:
            raise scene.payments.error(f"not every message was consumed within {_CHARGING_SECONDS:g} s")
        await in_thread(scene.payments.stop)
    charged, orders = await scene.connection.fetchrow(_COUNT_CHARGES)
    scene.screen.say(f"the payment service has read all of it: {charged} charges for {orders} orders")
    return Charges(charged, orders, repeats.records)
