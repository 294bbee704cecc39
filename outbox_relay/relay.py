"""The spine: ``source.claim() → publisher.publish(records) → source.settle(outcomes)``.

It knows no SQL, no Kafka and no metric. What it may rely on is written in the two protocols below;
the tests in ``tests/contract`` hold the fakes and the real adapters to them alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    retry_if_exception_type,
    wait_exponential_jitter,
)

from outbox_relay.errors import PublisherUnavailableError, SourceUnavailableError
from outbox_relay.message import Outcome, Record
from outbox_relay.telemetry import Telemetry

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Claim:
    """Rows to publish, ascending by ``id``.

    ``is_ours`` is asked immediately before each send: once it says no, another relay may have the rows.
    ``is_idle`` says that the source saw nothing at all to do, so that it is polled less often.
    """

    records: Sequence[Record]
    is_ours: Callable[[], bool]
    is_idle: bool


class Source(Protocol):
    """Where rows come from. One claim is out at a time."""

    async def claim(self) -> Claim:
        """Settle what was handed back, and claim what is next, in one transaction that is committed.

        A row is in the claim only if every lower unsent row of its ``(topic, key)`` is ahead of it there.
        Raises :class:`SourceUnavailableError`; what was handed back is kept, and settled by a later call.
        """
        ...

    async def wait(self, seconds: float) -> None:
        """After an idle claim: until another may find something, about so long. May be cancelled."""
        ...

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Hand back every record of the last claim, each with what became of it."""
        ...

    async def release(self) -> None:
        """Settle what was handed back and let other relays have the rest. Never raises; bounded in time."""
        ...


class Publisher(Protocol):
    """Where records go."""

    @property
    def ready(self) -> bool:
        """Whether ``publish`` has any prospect; if not, ``connect`` comes first."""
        ...

    async def connect(self) -> None:
        """(Re)build the connection. Raises :class:`PublisherUnavailableError` within its own deadline."""
        ...

    async def publish(self, records: Sequence[Record], is_ours: Callable[[], bool]) -> list[Outcome]:
        """Publish in order, and say what became of each record, in order of ``records``.

        After a record of a ``(topic, key)`` that isn't ``Delivered``, no later one of that key is sent.
        Never raises for what a broker does. When it returns, nothing of these records is on its way any more.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection. Nothing is sent afterwards. Bounded in time."""
        ...


@dataclass(frozen=True, slots=True)
class Poll:
    """How long to wait after a claim that found nothing: from floor to ceiling, each time by half more.

    If it doubled, a pause between two messages would be followed by a wait as long for the second.
    """

    floor_seconds: float
    ceiling_seconds: float

    def next_seconds(self, previous_seconds: float) -> float:
        return min(self.ceiling_seconds, max(self.floor_seconds, previous_seconds * 1.5))


class Relay:
    """One lane: one claim in flight. A process runs several of them over different slots."""

    def __init__(
        self, source: Source, publisher: Publisher, poll: Poll, telemetry: Telemetry, *, once: bool = False
    ) -> None:
        self._source = source
        self._publisher = publisher
        self._poll = poll
        self._telemetry = telemetry
        self._once = once
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Claim nothing more; ``run`` returns when what is in flight is settled."""
        self._stop.set()

    async def run(self) -> None:
        """Relay until :meth:`stop`, or, with ``once``, until nothing is left to claim."""
        try:
            pause_seconds = 0.0
            while not self._stop.is_set():
                if not self._publisher.ready:
                    await self._until_it_works(self._connect, self._telemetry.kafka_unavailable)
                    continue
                claim = await self._until_it_works(self._source.claim, self._report_database)
                if claim is None:
                    continue
                self._telemetry.database_available(self._source)
                if claim.records:
                    outcomes = await self._publisher.publish(claim.records, claim.is_ours)
                    self._source.settle(outcomes)
                    self._telemetry.published(outcomes)
                    del outcomes
                is_idle = claim.is_idle
                # What was published is let go of before more is claimed, or there would be twice as much.
                del claim
                if not is_idle:
                    pause_seconds = 0.0
                elif self._once:
                    break
                else:
                    pause_seconds = self._poll.next_seconds(pause_seconds)
                    await self._unless_stopped(self._source.wait(pause_seconds))
            await self._source.release()
        finally:
            await self._publisher.close()

    def _report_database(self, error: BaseException) -> None:
        self._telemetry.database_unavailable(error, self._source)

    async def _connect(self) -> None:
        # Whoever can't publish doesn't keep rows from a relay that can.
        await self._source.release()
        await self._publisher.connect()
        self._telemetry.kafka_available()

    async def _until_it_works(
        self, call: Callable[[], Awaitable[T]], report: Callable[[BaseException], None]
    ) -> T | None:
        """Call until it doesn't raise *unavailable*, with growing pauses; None once told to stop."""

        def before_sleep(state: RetryCallState) -> None:
            assert state.outcome is not None
            error = state.outcome.exception()
            assert error is not None
            report(error)

        attempts = AsyncRetrying(
            retry=retry_if_exception_type((SourceUnavailableError, PublisherUnavailableError)),
            wait=wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.5),
            stop=lambda _: self._stop.is_set(),
            sleep=self._sleep,
            before_sleep=before_sleep,
        )
        try:
            return await attempts(call)
        except RetryError:
            return None

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not through a stop."""
        await self._unless_stopped(asyncio.sleep(seconds))

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait for it, or for a stop."""
        tasks = asyncio.ensure_future(waiting), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not tasks[0].cancelled():
            tasks[0].result()
