"""The payment service of ``inbox_consumer.py``, with FastStream and the inbox as its middleware.

``python -m tests.acceptance.inbox_faststream_consumer URL BOOTSTRAP_SERVERS TOPIC GROUP HANDLER [STEP OFFSET]``, as
there. All messages are in partition 0.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import asyncpg
from aiokafka import TopicPartition
from faststream import AckPolicy, Context
from faststream.kafka import KafkaBroker, KafkaMessage

from outbox_relay.inbox.faststream import InboxMiddleware, _Handling
from tests.acceptance.inbox_consumer import INBOX, charge, say
from tests.waiting import eventually


class _Unchecked(_Handling):
    async def on_receive(self) -> None:
        pass


class Payments(InboxMiddleware):
    policy = AckPolicy.NACK_ON_ERROR
    handling: type[_Handling] = _Handling

    def __init__(self, url: str, servers: str, topic: str, group: str, step: str, at: int) -> None:
        super().__init__(INBOX, transaction=self._transact)
        self._url, self._partition, self._step, self._at = url, TopicPartition(topic, 0), step, at
        self._offset = -1  # of the message that is handled
        self._is_finished = asyncio.Event()
        self._broker = KafkaBroker(servers, middlewares=[self], logger=None)
        self._subscriber = self._broker.subscriber(
            topic,
            group_id=group,
            auto_offset_reset="earliest",
            auto_commit_interval_ms=10,
            ack_policy=self.policy,
        )
        self._subscriber(self._charge)

    def __call__(self, msg: Any, /, *, context: Any) -> _Handling:
        self._offset = msg.offset
        return self.handling(msg, context=context, middleware=self)

    async def _done(self, step: str) -> None:
        if (step, self._offset) == (self._step, self._at):
            say("waiting to be killed")
            await asyncio.Event().wait()

    @asynccontextmanager
    async def _transact(self) -> AsyncIterator[asyncpg.Connection]:
        await self._done("received")
        connection = await asyncpg.connect(self._url)
        try:
            async with connection.transaction():
                await self._done("begun")
                yield connection
        finally:
            await connection.close()
        await self._done("committed")

    async def _charge(self, message: KafkaMessage, connection: Annotated[Any, Context("inbox_session")]) -> None:
        await self._done("accepted")
        await charge(connection, message.raw_message)
        await self._done("charged")

    async def run(self) -> None:
        await self._broker.start()
        consumer: Any = self._subscriber.consumer
        (end,) = (await consumer.end_offsets([self._partition])).values()
        commit = consumer.commit

        async def commit_and_end() -> None:
            await commit()
            await self._done("offset")
            if await consumer.position(self._partition) == end:
                self._is_finished.set()

        consumer.commit = commit_and_end
        await self._is_finished.wait()
        await self._broker.stop()


class AckFirst(Payments):
    """Broken: aiokafka commits offsets by itself, and nothing refuses that."""

    policy = AckPolicy.ACK_FIRST
    handling = _Unchecked

    async def _charge(self, message: KafkaMessage, connection: Annotated[Any, Context("inbox_session")]) -> None:
        if self._offset == self._at:
            consumer: Any = self._subscriber.consumer

            async def is_committed() -> bool:
                return (await consumer.committed(self._partition) or 0) > self._at

            await eventually(is_committed, "the offset is committed")
        await super()._charge(message, connection)


HANDLERS = {"faststream": Payments, "faststream_ack_first": AckFirst}


async def main(url: str, servers: str, topic: str, group: str, handler: str, step: str = "", at: str = "-1") -> None:
    await HANDLERS[handler](url, servers, topic, group, step, int(at)).run()
    say("done")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
