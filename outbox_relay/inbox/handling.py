"""One message's way through the inbox and its handler, or a batch's; and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from outbox_relay.errors import ClaimLostError, MissingMessageIdError, NoHandlerError, OutboxRelayError
from outbox_relay.inbox.closing import Closing
from outbox_relay.inbox.ids import header
from outbox_relay.inbox.letters import DeadLetterTopic
from outbox_relay.inbox.outages import is_outage
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.telemetry import Telemetry
from outbox_relay.inbox.transaction import Transaction, require_unbroken
from outbox_relay.retry import Backoff

if TYPE_CHECKING:
    from outbox_relay.inbox.redis import Claimed, RedisInbox

Handler: TypeAlias = Callable[..., Awaitable[object]]

_MOST_MARKS = 5


class PermanentError(OutboxRelayError):
    """Raised by a handler: trying again is of no use."""


#: What no further try mends.
_FINAL = (PermanentError, MissingMessageIdError, NoHandlerError)


@dataclass
class Tries:
    """Of one message, since its partition was assigned."""

    failures: int = 0
    attempts: int = 0  #: those failures that may be the message's fault
    handler_was_called: bool = False  #: in this try
    final: Exception | None = None  #: for which it is given up

    def failed(self, error: Exception) -> None:
        self.failures += 1
        is_own = self.handler_was_called or isinstance(error, _FINAL)
        self.attempts += is_own and not is_outage(error)


class Handling:
    """What one consumer does with its messages, of whichever partition."""

    def __init__(
        self,
        inbox: Inbox | RedisInbox | None,
        transaction: Transaction | None,
        handlers: Mapping[tuple[str, str | None], Handler],
        *,
        max_attempts: int,
        backoff: Backoff,
        dead_letters: DeadLetterTopic | None,
        telemetry: Telemetry,
    ) -> None:
        self._inbox, self._transaction, self._handlers = inbox, transaction, handlers
        self._max_attempts, self._backoff = max_attempts, backoff
        self._dead_letters, self._telemetry = dead_letters, telemetry

    async def handle_batch(self, messages: Sequence[Any]) -> bool:
        """All of them in one transaction, in their order. False, and nothing is handled, where that raised."""
        assert isinstance(self._inbox, Inbox)
        assert self._transaction is not None
        try:
            async with self._transaction() as connection:
                new = await self._inbox.accept_batch(connection, messages)
                for message in new:
                    await self._handler_of(message)(message, connection)
                await require_unbroken(connection)
        except Exception as error:
            self._telemetry.batch_failed(messages, error)
            return False
        self._telemetry.handled(len(new), len(messages) - len(new))
        return True

    async def handle(self, message: Any, tries: Tries, closing: Closing) -> float | None:
        """Try once. None: it is finished; otherwise after how many seconds it is to be tried again.

        Finished is what was handled, or skipped as a repeat, or what Kafka has in the dead-letter topic.
        """
        if tries.final is not None:
            return await self._bury(message, tries.final, tries)
        tries.handler_was_called = False
        try:
            return await self._try(message, tries, closing)
        except Exception as error:
            tries.failed(error)
            is_final = tries.attempts >= self._max_attempts or isinstance(error, _FINAL)
            if is_final and self._dead_letters is not None:
                tries.final = error
                return await self._bury(message, error, tries)
            pause_seconds = self._backoff.delay_seconds(tries.failures)
            self._telemetry.message_failed(message, error, tries.attempts, pause_seconds)
            return pause_seconds

    async def _try(self, message: Any, tries: Tries, closing: Closing) -> float | None:
        handler = self._handler_of(message)
        if isinstance(self._inbox, Inbox):
            is_new = await self._in_postgresql(handler, message, tries)
        elif self._inbox is not None:
            from outbox_relay.inbox.redis import Busy, Claimed  # of an extra

            claim = await self._inbox.claim(message)
            if isinstance(claim, Busy):
                # Not for all of its lease: its holder may fail before, and let go.
                return min(claim.lease_seconds, self._backoff.ceiling_seconds)
            if is_new := isinstance(claim, Claimed):
                await self._holding(claim, handler, message, tries)
                await self._mark(claim, message, closing)
        else:
            tries.handler_was_called = is_new = True
            await handler(message)
        self._telemetry.handled(int(is_new), int(not is_new))
        return None

    def _handler_of(self, message: Any) -> Handler:
        type_ = (header(message, "type") or b"").decode("utf-8", "replace") or None
        handler = self._handlers.get((message.topic, type_)) or self._handlers.get((message.topic, None))
        if handler is None:
            which = "without a type" if type_ is None else f"of type {type_!r}"
            raise NoHandlerError(f"no handler for messages {which} of topic {message.topic!r}")
        return handler

    async def _in_postgresql(self, handler: Handler, message: Any, tries: Tries) -> bool:
        assert isinstance(self._inbox, Inbox)
        assert self._transaction is not None
        async with self._transaction() as connection:
            is_new = await self._inbox.accept(connection, message)
            if is_new:
                tries.handler_was_called = True
                await handler(message, connection)
                await require_unbroken(connection)
        return is_new

    async def _holding(self, claim: Claimed, handler: Handler, message: Any, tries: Tries) -> None:
        assert self._inbox is not None
        assert not isinstance(self._inbox, Inbox)
        tries.handler_was_called = True
        try:
            await handler(message)
        except BaseException:
            await self._inbox.release(claim)
            raise

    async def _mark(self, claim: Claimed, message: Any, closing: Closing) -> None:
        """As handled. Where that fails the effect is there all the same, and handling it again wouldn't undo that."""
        assert self._inbox is not None
        assert not isinstance(self._inbox, Inbox)
        for attempt in range(1, _MOST_MARKS + 1):
            try:
                await self._inbox.done(claim)
            except Exception as error:
                is_last = attempt == _MOST_MARKS or isinstance(error, ClaimLostError)
                if is_last or not await closing.rest(self._backoff.delay_seconds(attempt)):
                    self._telemetry.message_unmarked(message, error)
                    return
            else:
                return

    async def _bury(self, message: Any, error: Exception, tries: Tries) -> float | None:
        assert self._dead_letters is not None
        try:
            await self._dead_letters.bury(message, error, tries.attempts)
        except Exception as failure:  # whatever it was, the message isn't passed over
            tries.failures += 1
            self._telemetry.message_unburied(message, failure, self._dead_letters.name)
            return self._backoff.delay_seconds(tries.failures)
        self._telemetry.message_dead(message, error, tries.attempts, self._dead_letters.name)
        return None
