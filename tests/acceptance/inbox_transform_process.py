"""A process that transforms a topic into another, so that it can be killed, or frozen, after each step.

``python -m tests.acceptance.inbox_transform_process BOOTSTRAP_SERVERS TOPIC OUTPUTS GROUP VARIANT [STEP OFFSET HOW]``
ends when all of partition 0 is committed. Each message becomes one with its key and, as the value, its offset. With a
step it stops when it has done that for the batch, or the message, with the offset: ``HOW`` is ``wait`` or ``freeze``.

As a static member, so that the next process has the partition without waiting until this one is missed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from outbox_relay.inbox.transform import Output, Transformer, _Batch
from outbox_relay.retry import Backoff
from tests.acceptance.inbox_consumer import say

STEPS = ("received", "transformed", "sent", "offset", "committed")


class Process(Transformer):
    def __init__(self, servers: str, topic: str, outputs: str, group: str, end: int, step: str, at: int, how: str):
        super().__init__(
            servers,
            group,
            topics=[topic],
            transform=self._to_output,
            most_at_once=3,
            backoff=Backoff(0.01, 0.1),
            consumer_settings={"group_instance_id": "the-only-one"},
        )
        self._outputs, self._end, self._step, self._at, self._how = outputs, end, step, at, how
        self._is_to_stop = False

    async def _done(self, step: str) -> None:
        if step == self._step and self._is_to_stop:
            say("stopped")
            if self._how == "wait":
                await asyncio.Event().wait()
            self._step = ""
            os.kill(os.getpid(), signal.SIGSTOP)

    async def _to_output(self, message: Any) -> list[Output]:
        self._is_to_stop |= message.offset == self._at
        await self._done("received")
        return [Output(self._outputs, str(message.offset).encode(), message.key)]

    async def _send(self, producer: Any, outputs: Sequence[Output]) -> None:
        await self._done("transformed")
        await super()._send(producer, outputs)
        await self._done("sent")

    async def _send_offset(self, producer: Any, partition: TopicPartition, offset: int) -> None:
        await super()._send_offset(producer, partition, offset)
        await self._done("offset")

    async def _commit(self, producer: Any, partition: TopicPartition, batch: _Batch) -> None:
        await super()._commit(producer, partition, batch)
        await self._done("committed")
        if batch.next_offset == self._end:
            self.stop()


class OffsetsOutside(Process):
    """Broken: offsets aren't in the transaction."""

    async def _send_offset(self, producer: Any, partition: TopicPartition, offset: int) -> None:
        await self._kafka.commit({partition: offset})
        await self._done("offset")


VARIANTS = {"right": Process, "offsets_outside": OffsetsOutside}


async def main(
    servers: str, topic: str, outputs: str, group: str, variant: str, step: str = "", at: str = "-1", how: str = ""
) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stdout))
    partition = TopicPartition(topic, 0)
    async with AIOKafkaConsumer(bootstrap_servers=servers) as consumer:
        end = (await consumer.end_offsets([partition]))[partition]
    await VARIANTS[variant](servers, topic, outputs, group, end, step, int(at), how).run()
    say("done")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
