"""The payment service of ``inbox_consumer.py``, with the inbox's own ``Consumer``.

``python -m tests.acceptance.inbox_runner_consumer URL BOOTSTRAP_SERVERS TOPIC GROUP HANDLER [STEP OFFSET]``, as there.
All messages are in partition 0 and have one key, so that one is handled at a time.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from outbox_relay.inbox.runner import Consumer
from tests.acceptance.inbox_consumer import INBOX, charge, say


class Payments(Consumer):
    batches_of = 1

    def __init__(self, url: str, servers: str, topic: str, group: str, end: int, step: str, at: int) -> None:
        super().__init__(servers, group, inbox=INBOX, transaction=self._transact, batch_size=self.batches_of)
        self.handler(topic)(self._charge)
        self._url, self._end, self._step, self._at = url, end, step, at
        self._offset = -1  # of the message that is handled, or that of its batch at which it stops
        self._offset_is_committed = asyncio.Event()  # of that at which it stops

    async def _done(self, step: str, offset: int) -> None:
        if (step, offset) == (self._step, self._at):
            say("waiting to be killed")
            await asyncio.Event().wait()

    @asynccontextmanager
    async def _transact(self) -> AsyncIterator[asyncpg.Connection]:
        await self._done("received", self._offset)
        connection = await asyncpg.connect(self._url)
        try:
            async with connection.transaction():
                await self._done("begun", self._offset)
                yield connection
        finally:
            await connection.close()
        await self._done("committed", self._offset)

    async def _charge(self, message: Any, connection: asyncpg.Connection) -> None:
        await self._done("accepted", message.offset)
        await charge(connection, message)
        await self._done("charged", message.offset)

    def _begin_one(self, message: Any) -> None:
        self._offset = message.offset

    async def _finish(self, messages: list[Any]) -> None:
        at = [message for message in messages if message.offset == self._at]
        self._begin_one((at or messages)[-1])
        await super()._finish(messages)

    async def _commit(self, partitions: Collection[TopicPartition]) -> None:
        await super()._commit(partitions)
        for partition in partitions:
            committed = self._partitions[partition].progress._committed or 0
            if committed > self._at >= 0:
                self._offset_is_committed.set()
                await self._done("offset", self._at)
            is_finished = not self._partitions[partition].progress.unfinished
            if is_finished and await self._kafka.position(partition) == self._end:
                self.stop()


class InBatches(Payments):
    """Those that have come by then in one transaction."""

    batches_of = 4


class FinishedBeforeHandled(Payments):
    """Broken: offsets are committed before the database is."""

    def _begin_one(self, message: Any) -> None:
        super()._begin_one(message)
        self._partitions[TopicPartition(message.topic, message.partition)].progress.finish(message.offset)

    async def _charge(self, message: Any, connection: asyncpg.Connection) -> None:
        if message.offset == self._at:
            await self._offset_is_committed.wait()
        await super()._charge(message, connection)


HANDLERS = {"runner": Payments, "runner_in_batches": InBatches, "finished_before_handled": FinishedBeforeHandled}


async def main(url: str, servers: str, topic: str, group: str, handler: str, step: str = "", at: str = "-1") -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    partition = TopicPartition(topic, 0)
    async with AIOKafkaConsumer(bootstrap_servers=servers) as consumer:
        end = (await consumer.end_offsets([partition]))[partition]
    await HANDLERS[handler](url, servers, topic, group, end, step, int(at)).run()
    say("done")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
