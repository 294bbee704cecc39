"""Puts the relay process together, and ends it in order. The only place that knows every part.

Stop: claim nothing more → finish what is in flight, within the grace → settle and release → close Kafka → give the
slots and the name back → close the database. A second signal, or the end of the grace, cuts that short: what was in
flight is published again. Where nothing is in flight, nobody waits for a database or a Kafka that doesn't answer.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from outbox_relay import __version__, checks, schema
from outbox_relay import dry_run as next_
from outbox_relay.config import Config, load_provider
from outbox_relay.errors import SchemaError, SourceUnavailableError
from outbox_relay.failures import Policies, Policy
from outbox_relay.kafka_security import KafkaSecurity
from outbox_relay.publisher import KafkaPublisher
from outbox_relay.relay import Poll, Relay
from outbox_relay.retry import Backoff
from outbox_relay.source import watch
from outbox_relay.source.polling import PollingSource
from outbox_relay.source.pruning import Pruner
from outbox_relay.source.session import Database, Session
from outbox_relay.source.slots import Slots
from outbox_relay.source.statements import OutboxTable
from outbox_relay.telemetry import PROGRESS_INTERVAL_SECONDS, Telemetry

EXIT_OK = 0
#: Stopped before everything in flight was settled.
EXIT_UNSETTLED = 1
#: Ended by a defect of this program (EX_SOFTWARE of sysexits.h).
EXIT_DEFECT = 70

#: After a signal, how long lanes with nothing in flight may take to end by themselves.
_IDLE_SECONDS = 2.0
#: How long saying goodbye may take, and how long when a second signal came.
_CLOSE_SECONDS = 5.0
_FORCED_CLOSE_SECONDS = 1.0
#: Between two tries to mark the last rows while the database is away.
_SETTLE_AGAIN_SECONDS = 0.2

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: More objects than are in flight with the settings that the relay ships with.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000
#: What makes a cycle may be large, such as a failed claim with its rows.
_SECONDS_BETWEEN_COLLECTIONS = 30.0


async def run(config: Config, *, once: bool = False) -> int:
    """Run one relay process until a signal, or, with ``once``, until nothing is left to claim. The exit code."""
    telemetry = Telemetry(relay=config.relay.name)
    telemetry.starting(__version__, config.relay.batch_rows, config.relay.claims_in_flight)
    _collect_garbage_seldom()
    with _Signals(telemetry, config.relay.shutdown_grace_seconds) as signals:
        try:
            code = await _run(config, telemetry, signals, once=once)
        except Exception as error:
            telemetry.failed(error)
            code = EXIT_DEFECT
    telemetry.stopped(code)
    return code


def _collect_garbage_seldom() -> None:
    """Rows come and go without ever making a cycle, and looking through them for one was 40 % of a busy relay's CPU.

    What is there by now stays as long as the process, so it isn't looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


async def _collect_garbage_now_and_then() -> None:
    """Of what makes cycles, such as an exception with its traceback, or a producer that was abandoned."""
    while True:
        await asyncio.sleep(_SECONDS_BETWEEN_COLLECTIONS)
        gc.collect()


async def _say_progress(telemetry: Telemetry) -> None:
    """By the clock, so that it is said of the last row too, after which nothing comes."""
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL_SECONDS)
        telemetry.progress()


async def dry_run(config: Config) -> list[str]:
    """What would be published next, in lines for people; nothing is claimed, published or marked.

    Raises SchemaError, SourceUnavailableError and PublisherUnavailableError: nothing is waited for.
    """
    found = await next_.read(database_of(config), table_of(config), config.relay.batch_rows)
    publisher = _publisher(config, Telemetry(relay=config.relay.name))
    try:
        await publisher.connect()
        return list(next_.as_lines(found, publisher.obstacle))
    finally:
        await publisher.close()


def database_of(config: Config) -> Database:
    """The database that is meant, and how to connect to it."""
    database = config.database
    return Database(
        database.url,
        database.connect_timeout_seconds,
        database.statement_timeout_seconds,
        password=database.password.read if database.password is not None else None,
        tls=database.tls_settings(),
        schema=config.table.schema_,
    )


def table_of(config: Config) -> OutboxTable:
    """What the outbox table and its columns are called."""
    return OutboxTable(config.table.name, config.table.topic, **config.table.columns.model_dump())


def policies_of(config: Config) -> Policies:
    """What becomes of rows that Kafka refuses."""
    relay = config.relay

    def policy(followers: str) -> Policy:
        return Policy(relay.max_attempts, followers == "block", relay.dead_letter_topic)

    return Policies(
        Backoff(relay.retry_first_seconds, relay.retry_ceiling_seconds),
        policy(relay.followers),
        {topic: policy(followers) for topic, followers in relay.followers_of.items()},
    )


def kafka_security_of(config: Config) -> KafkaSecurity:
    """How to connect to Kafka."""
    kafka = config.kafka
    return KafkaSecurity(
        kafka.security_protocol,
        kafka.tls_settings(),
        mechanism=kafka.sasl_mechanism,
        username=kafka.sasl_username,
        password=kafka.sasl_password.read if kafka.sasl_password is not None else None,
        token=load_provider(kafka.sasl_token_provider) if kafka.sasl_token_provider is not None else None,
    )


async def check(config: Config) -> checks.Checked:
    """What is wrong with the servers and the tables that the configuration names."""
    kafka = config.kafka
    needs = checks.Needs(
        # A lane has one, the heartbeat, and retention while it deletes.
        connections=config.relay.claims_in_flight + 1 + (config.relay.retention_hours is not None),
        statement_timeout_seconds=config.database.statement_timeout_seconds,
        publish_deadline_seconds=kafka.publish_deadline_seconds,
        deletes_sent=config.relay.after_publish == "delete",
        deletes_old=config.relay.retention_hours is not None,
        copies=config.relay.dead_letter_topic is not None,
    )
    settings = checks.KafkaSettings(
        kafka.bootstrap_servers,
        kafka_security_of(config),
        client_id=kafka.client_id,
        allowed_topics=kafka.allowed_topics,
        compression=kafka.compression,
        batch_bytes=kafka.batch_bytes,
        connect_timeout_seconds=kafka.connect_timeout_seconds,
        request_timeout_seconds=kafka.request_timeout_seconds,
    )
    return await checks.run(database_of(config), table_of(config), needs, settings)


async def _run(config: Config, telemetry: Telemetry, signals: _Signals, *, once: bool) -> int:
    database = database_of(config)
    heart = Session(database, f"outbox-relay {config.relay.name} heartbeat", watch.SETTINGS)
    verifying = asyncio.ensure_future(_verified_layout(heart, telemetry))
    if not await signals.first_or(verifying):
        await signals.while_patient(_end([verifying], heart.close))
        return EXIT_OK
    layout = await verifying

    lanes = range(config.relay.claims_in_flight)
    poll = Poll(config.relay.poll_floor_seconds, config.relay.poll_ceiling_seconds)
    slots = Slots(
        heart,
        telemetry,
        name=config.relay.name,
        lanes=len(lanes),
        lease_seconds=config.relay.lease_seconds,
        heartbeat_seconds=config.relay.heartbeat_seconds,
        poll=poll,
        layout_buckets=layout.buckets,
        layout_slots=layout.slots,
        table=table_of(config),
        wake_up=config.relay.wake_up,
        all_open=once,  # a lane without slots would end at once
    )
    sources = [_source(config, layout, database, slots, lane, telemetry) for lane in lanes]
    relays = [Relay(source, _publisher(config, telemetry), poll, telemetry, once=once) for source in sources]

    def in_flight() -> int:
        return sum(source.in_flight for source in sources)

    heartbeat: asyncio.Future[Any] = asyncio.ensure_future(slots.run())
    running: asyncio.Future[Any] = asyncio.ensure_future(_run_lanes(relays, sources))
    pruner = _pruner(config, database, slots, telemetry)
    besides = [
        heartbeat,
        asyncio.ensure_future(_collect_garbage_now_and_then()),
        asyncio.ensure_future(_say_progress(telemetry)),
        *([asyncio.ensure_future(pruner.run())] if pruner is not None else []),
    ]
    try:
        forced = False
        # What runs besides and ends has met a defect: nothing may go on without it.
        if not await signals.first_or(running, *besides):
            for relay in relays:
                relay.stop()
            forced = await signals.forced_before(running, in_flight)
        for task in (running, *besides):
            if task.done():
                task.result()
        return EXIT_UNSETTLED if forced else EXIT_OK
    finally:
        if rows := in_flight():
            telemetry.left_unsettled(rows)
        goodbyes = [slots.leave, *(source.close for source in sources)]
        if pruner is not None:
            goodbyes.append(pruner.close)
        await signals.while_patient(_end([running, *besides], *goodbyes))


async def _run_lanes(relays: Sequence[Relay], sources: Sequence[PollingSource]) -> None:
    """Run all lanes to their end; a defect in one ends all."""
    lanes = [asyncio.ensure_future(_run_lane(*lane)) for lane in zip(relays, sources, strict=True)]
    try:
        done, _ = await asyncio.wait(lanes, return_when=asyncio.FIRST_EXCEPTION)
        for lane in done:
            lane.result()
    finally:
        for lane in lanes:
            lane.cancel()
        await asyncio.wait(lanes)


async def _run_lane(relay: Relay, source: PollingSource) -> None:
    await relay.run()
    # The database may be away at this very moment. What Kafka has is marked when it is back, as far as the grace goes.
    while source.in_flight:
        await asyncio.sleep(_SETTLE_AGAIN_SECONDS)
        await source.release()


async def _end(tasks: Sequence[asyncio.Future[Any]], *goodbyes: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Cancel the tasks, then say the goodbyes, the first before all others."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    first, *others = goodbyes
    await first()
    await asyncio.gather(*(goodbye() for goodbye in others))


async def _verified_layout(session: Session, telemetry: Telemetry) -> schema.Layout:
    """Wait for a database with a schema that this release can work with."""

    async def verify() -> schema.Layout:
        async with session.transaction():
            with session.unavailable("read outbox_layout"):
                return await schema.verify(await session.connection())

    def report(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        if isinstance(error, SchemaError):
            telemetry.database_available(session)
            telemetry.schema_unusable(error)
        else:
            telemetry.database_unavailable(error, session)

    attempts = AsyncRetrying(
        retry=retry_if_exception_type((SourceUnavailableError, SchemaError)),
        wait=wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.5),
        before_sleep=report,
    )
    layout: schema.Layout = await attempts(verify)
    telemetry.database_available(session)
    telemetry.schema_usable()
    return layout


def _source(
    config: Config, layout: schema.Layout, database: Database, slots: Slots, lane: int, telemetry: Telemetry
) -> PollingSource:
    return PollingSource(
        Session(database, f"outbox-relay {config.relay.name} lane {lane}"),
        slots,
        lane,
        telemetry,
        layout_buckets=layout.buckets,
        layout_slots=layout.slots,
        batch_rows=config.relay.batch_rows,
        claim_bytes=config.relay.max_in_flight_bytes // config.relay.claims_in_flight,
        policies=policies_of(config),
        table=table_of(config),
        deletes_sent=config.relay.after_publish == "delete",
    )


def _pruner(config: Config, database: Database, slots: Slots, telemetry: Telemetry) -> Pruner | None:
    if config.relay.retention_hours is None:
        return None
    return Pruner(
        Session(database, f"outbox-relay {config.relay.name} retention"),
        telemetry,
        # One relay is enough, and this slot has one owner.
        lambda: slots.owns(0),
        retention_hours=config.relay.retention_hours,
        table=table_of(config),
    )


def _publisher(config: Config, telemetry: Telemetry) -> KafkaPublisher:
    kafka = config.kafka
    return KafkaPublisher(
        kafka.bootstrap_servers,
        telemetry,
        client_id=kafka.client_id,
        compression=kafka.compression,
        batch_bytes=kafka.batch_bytes,
        connect_timeout_seconds=kafka.connect_timeout_seconds,
        request_timeout_seconds=kafka.request_timeout_seconds,
        publish_warn_seconds=kafka.publish_warn_seconds,
        publish_deadline_seconds=kafka.publish_deadline_seconds,
        security=kafka_security_of(config),
        allowed_topics=kafka.allowed_topics,
    )


class _Signals:
    """SIGTERM and SIGINT: the first asks to stop, the second insists."""

    def __init__(self, telemetry: Telemetry, grace_seconds: float) -> None:
        self._telemetry = telemetry
        self._grace_seconds = grace_seconds
        self._first = asyncio.Event()
        self._second = asyncio.Event()

    def __enter__(self) -> _Signals:
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._caught, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _caught(self, number: signal.Signals) -> None:
        if self._first.is_set():
            self._second.set()
        else:
            self._telemetry.stopping(number.name, self._grace_seconds)
            self._first.set()

    async def first_or(self, *tasks: asyncio.Future[Any]) -> bool:
        """Wait until any of the tasks is done (True) or a signal came (False)."""
        return await _any_before(self._first, tasks, None)

    async def forced_before(self, task: asyncio.Future[Any], in_flight: Callable[[], int]) -> bool:
        """Wait for the task: True when a second signal came before, or the grace ran out.

        A task with nothing in flight only waits for a database or for Kafka; it isn't waited for long.
        """
        ends = time.monotonic() + self._grace_seconds
        while not self._second.is_set() and (left := ends - time.monotonic()) > 0:
            if await _any_before(self._second, [task], min(left, _IDLE_SECONDS)):
                return False
            if not self._second.is_set() and not in_flight():
                return False
        self._telemetry.forced("second signal" if self._second.is_set() else "the grace ran out")
        return True

    async def while_patient(self, goodbye: Coroutine[Any, Any, None]) -> None:
        """Run ``goodbye`` for a few seconds at most; a second signal leaves it less."""
        task = asyncio.ensure_future(goodbye)
        if self._second.is_set():
            await asyncio.wait([task], timeout=_FORCED_CLOSE_SECONDS)
        else:
            await _any_before(self._second, [task], _CLOSE_SECONDS)
        task.cancel()
        await asyncio.wait([task], timeout=_FORCED_CLOSE_SECONDS)
        if task.done() and not task.cancelled():
            task.result()


async def _any_before(
    event: asyncio.Event, tasks: Sequence[asyncio.Future[Any]], timeout_seconds: float | None
) -> bool:
    """Whether one of the tasks was done before the event or the timeout."""
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiter, *tasks], timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
    return any(task.done() for task in tasks)
