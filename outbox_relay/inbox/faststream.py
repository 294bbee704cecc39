"""The inbox as a middleware of FastStream, for its handlers of Kafka messages.

    broker = KafkaBroker(middlewares=[InboxMiddleware(Inbox("payments"), transaction=sessions.begin)])

    @broker.subscriber("orders", group_id="payments", auto_offset_reset="earliest", ack_policy=AckPolicy.NACK_ON_ERROR)
    async def charge(order: Order, session: Annotated[AsyncSession, Context("inbox_session")]) -> None: ...

Open the transaction, insert the id, call the handler, commit; then FastStream commits the offset. A repeat is
acknowledged, and its handler isn't called. What raises is rolled back, and comes again after a pause.

**Why NACK_ON_ERROR alone.** What FastStream 0.7 does with its policies on Kafka (``faststream.kafka.subscriber`` and
``faststream.middlewares.acknowledgement``):

- ``ACK_FIRST``, the default: aiokafka's ``enable_auto_commit``, so an offset may be committed before the handler ends.
- ``ACK`` and ``REJECT_ON_ERROR``: commits after the handler, and also where it raised: the message is passed over.
- ``MANUAL``: the handler commits, so within its transaction, before the database does.
- ``NACK_ON_ERROR``: commits after the handler and its middlewares; where they raised, seeks back to the message.

Needs the extra ``faststream``.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from aiokafka import ConsumerRecord, TopicPartition
from faststream import AckPolicy, BaseMiddleware
from faststream.exceptions import AckMessage, NackMessage, RejectMessage, SkipMessage
from faststream.message import StreamMessage

from outbox_relay.errors import OutboxRelayError
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.transaction import Transaction, require_unbroken
from outbox_relay.retry import Backoff

if TYPE_CHECKING:
    from faststream import ContextRepo

    from outbox_relay.inbox.redis import RedisInbox

#: Where a handler finds its session or connection: ``Context("inbox_session")``.
SESSION = "inbox_session"

# How a handler says that its message is to be passed over.
_PASSED_OVER = (RejectMessage, SkipMessage)


class SubscriberError(OutboxRelayError):
    """The subscriber is set up so that the inbox can't keep its promise."""


class InboxMiddleware:
    """For ``KafkaBroker(middlewares=[…])``, as the last of them, so that it is next to the handler.

    ``inbox`` is an ``Inbox`` in PostgreSQL, together with ``transaction``, which opens a session, or an asyncpg
    connection in a transaction, for each message, and commits it when the handler returns; or a ``RedisInbox``.

    A message that failed comes again after a pause by ``backoff``, for which its subscriber waits; so does one that
    another holds on Redis. Nothing is passed over, but what the handler does so itself (``RejectMessage``,
    ``SkipMessage``): its writes are rolled back. ``AckMessage`` means that it was handled.

    A subscriber without ``AckPolicy.NACK_ON_ERROR``, of batches, or without handlers (``get_one``, ``async for``) gets
    a :class:`SubscriberError` for each message, and a message without an id a MissingMessageIdError.
    """

    def __init__(
        self,
        inbox: Inbox | RedisInbox,
        *,
        transaction: Transaction | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        if isinstance(inbox, Inbox) != (transaction is not None):
            raise ValueError("an Inbox in PostgreSQL needs a transaction=…, and nothing else takes one")
        self.inbox, self.transaction = inbox, transaction
        self._backoff = backoff or Backoff(0.1, 10.0)
        self._failures: dict[TopicPartition, int] = {}

    def __call__(self, msg: Any, /, *, context: ContextRepo) -> BaseMiddleware[Any, Any]:
        """As FastStream asks for it, once for each message."""
        return _Handling(msg, context=context, middleware=self)

    async def rest(self, partition: TopicPartition) -> None:
        """Before another try."""
        self._failures[partition] = failures = self._failures.get(partition, 0) + 1
        await asyncio.sleep(self._backoff.delay_seconds(failures))

    def succeeded(self, partition: TopicPartition) -> None:
        self._failures.pop(partition, None)


class _Handling(BaseMiddleware[Any, Any]):
    """Of one message."""

    def __init__(self, msg: Any, /, *, context: ContextRepo, middleware: InboxMiddleware) -> None:
        super().__init__(msg, context=context)
        self._middleware = middleware

    async def on_receive(self) -> None:
        # Outside of a handler's subscriber there is nothing to check yet: see consume_scope().
        subscriber = self.context.get_local("handler_")
        if subscriber is None:
            return
        policy = getattr(subscriber, "ack_policy", None)
        if policy is not AckPolicy.NACK_ON_ERROR:
            error = SubscriberError(
                f"a subscriber with the inbox needs ack_policy=AckPolicy.NACK_ON_ERROR, not {policy}: with any other,"
                " FastStream may commit an offset without its message's effects being committed"
            )
        elif isinstance(self.msg, tuple):
            error = SubscriberError("the inbox handles one message at a time: subscribe without batch=True")
        elif not isinstance(self.msg, ConsumerRecord):
            error = SubscriberError("the inbox takes messages of FastStream's KafkaBroker alone")
        else:
            return
        await self._send_back()
        raise error

    async def consume_scope(self, call_next: Any, msg: StreamMessage[Any]) -> Any:
        handled = self.context.get_local("message")
        if handled is None or handled.raw_message is not msg.raw_message:
            raise SubscriberError(
                "the inbox is for subscribers with a handler: what get_one() and `async for` return would count as"
                " handled before it is"
            )
        if self._middleware.transaction is not None:
            result = await self._in_postgresql(call_next, msg)
        else:
            result = await self._on_redis(call_next, msg)
        self._middleware.succeeded(_partition_of(self.msg))
        return result

    async def after_processed(
        self, exc_type: type[BaseException] | None = None, exc_val: BaseException | None = None, exc_tb: Any = None
    ) -> bool | None:
        if isinstance(exc_val, AckMessage):
            self._middleware.succeeded(_partition_of(self.msg))
        elif isinstance(exc_val, Exception) and not isinstance(exc_val, _PASSED_OVER):
            await self._send_back()
        return False

    async def _in_postgresql(self, call_next: Any, msg: StreamMessage[Any]) -> Any:
        assert self._middleware.transaction is not None
        assert isinstance(self._middleware.inbox, Inbox)
        result, acknowledged = None, None
        async with self._middleware.transaction() as connection:
            if not await self._middleware.inbox.accept(connection, msg.raw_message):
                acknowledged = AckMessage()
            else:
                try:
                    with self._session(connection):
                        result = await call_next(msg)
                except AckMessage as error:
                    acknowledged = error
                await require_unbroken(connection)
        # Not by returning None, which FastStream would publish as the answer.
        if acknowledged is not None:
            raise acknowledged
        return result

    async def _on_redis(self, call_next: Any, msg: StreamMessage[Any]) -> Any:
        from outbox_relay.inbox.redis import Busy, Claimed, RedisInbox  # of another extra

        inbox = self._middleware.inbox
        assert isinstance(inbox, RedisInbox)
        claim = await inbox.claim(msg.raw_message)
        if isinstance(claim, Busy):
            raise NackMessage
        if not isinstance(claim, Claimed):
            raise AckMessage
        try:
            result = await call_next(msg)
        except AckMessage:
            await inbox.done(claim)
            raise
        except BaseException:
            await inbox.release(claim)
            raise
        await inbox.done(claim)
        return result

    def _session(self, connection: Any) -> AbstractContextManager[None]:
        scope: AbstractContextManager[None] = self.context.scope(SESSION, connection)
        return scope

    async def _send_back(self) -> None:
        """Have the message come again after a pause.

        FastStream seeks, too, but not for a message that it can't parse, such as one with a header that is no text.
        """
        received = self.msg if isinstance(self.msg, tuple) else (self.msg,)
        records = [record for record in received if isinstance(record, ConsumerRecord)]
        consumer = getattr(self.context.get_local("handler_"), "consumer", None)
        for record in reversed(records):
            # Of a subscriber with several workers each message has its own.
            if (of_record := getattr(record, "consumer", consumer)) is not None:
                partition = _partition_of(record)
                # Another's by now, who begins at the offset that is committed.
                if partition in of_record.assignment():
                    of_record.seek(partition, record.offset)
        if records:
            await self._middleware.rest(_partition_of(records[0]))


def _partition_of(record: Any) -> TopicPartition:
    return TopicPartition(record.topic, record.partition)
