"""A consumer in one mode, as a process of its own, so that it can be killed and frozen at the worst places.

``python -m tests.semantics.service URL BOOTSTRAP_SERVERS TOPIC RESULTS GROUP MEMBER MODE [STEP OFFSET HOW]`` runs until
SIGTERM. With a step it has trouble there, once, with the message at the offset: it ``wait``s for SIGUSR1, ``freeze``s
itself (SIGSTOP) or ``raise``s. Effects are rows of ``effect``, a table without a unique key, or records of RESULTS.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import asyncpg
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from outbox_relay.inbox import message_id
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.transform import Output, Transformer, _Batch
from outbox_relay.retry import Backoff

INBOX = Inbox("semantics")

#: The session is the shortest that Kafka takes by default, so that a member that is frozen is missed soon.
MEMBER_SETTINGS = {"session_timeout_ms": 6_000, "heartbeat_interval_ms": 200}

#: The places for trouble: in the handler, its transaction open; and between the effect and the offset.
STEPS = ("handler", "between")

_CONNECT_SECONDS = 5.0
_PAUSE_SECONDS = 0.1

CommitOffset: TypeAlias = Callable[[], Awaitable[None]]


class HandlerError(Exception):
    """What a handler raises once."""


@dataclass
class Trouble:
    step: str = ""
    offset: int = -1
    how: str = ""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def at(self, step: str, offset: int) -> None:
        if (step, offset) != (self.step, self.offset):
            return
        self.step = ""
        say(f"trouble: {self.how}")
        if self.how == "wait":
            await self.go_on.wait()
        elif self.how == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise HandlerError(f"at {offset}, once")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# -- effects in PostgreSQL


@dataclass
class Handler:
    """One message's effect and offset, in an order that is the mode."""

    url: str
    trouble: Trouble
    #: Whether a message whose handling failed is taken again.
    tries_again = True

    async def handle(self, message: Any, commit_offset: CommitOffset) -> None:
        raise NotImplementedError

    async def _effect(self, message: Any, *, once: bool = False) -> None:
        connection = await asyncpg.connect(self.url, timeout=_CONNECT_SECONDS, command_timeout=60)
        try:
            async with connection.transaction():
                if not once or await INBOX.accept(connection, message):
                    await connection.execute("INSERT INTO effect VALUES ($1)", message_id(message))
                await self.trouble.at("handler", message.offset)
        finally:
            connection.terminate()


class AtMostOnce(Handler):
    tries_again = False

    async def handle(self, message: Any, commit_offset: CommitOffset) -> None:
        await commit_offset()
        await self.trouble.at("between", message.offset)
        await self._effect(message)


class AtLeastOnce(Handler):
    async def handle(self, message: Any, commit_offset: CommitOffset) -> None:
        await self._effect(message)
        await self.trouble.at("between", message.offset)
        await commit_offset()


class Idempotent(Handler):
    async def handle(self, message: Any, commit_offset: CommitOffset) -> None:
        await self._effect(message, once=True)
        await self.trouble.at("between", message.offset)
        await commit_offset()


HANDLERS: dict[str, type[Handler]] = {
    "at-most-once": AtMostOnce,
    "at-least-once": AtLeastOnce,
    "idempotent": Idempotent,
}


async def consume(handler: Handler, servers: str, topic: str, group: str, member: str, stopping: asyncio.Event) -> None:
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=servers,
        group_id=group,
        group_instance_id=member,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        **MEMBER_SETTINGS,
    )
    await consumer.start()
    try:
        while not stopping.is_set():
            for partition, messages in (await consumer.getmany(timeout_ms=100, max_records=1)).items():
                await _handle(handler, consumer, partition, messages[0])
    finally:
        await consumer.stop()


async def _handle(handler: Handler, consumer: Any, partition: TopicPartition, message: Any) -> None:
    async def commit_offset() -> None:
        await consumer.commit({partition: message.offset + 1})

    try:
        await handler.handle(message, commit_offset)
    except (HandlerError, KafkaError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        say(f"failed at {message.offset}: {error!r}")
        # Where it was the offset that failed, the effect is there; the group says whether the message comes again.
        if handler.tries_again and not isinstance(error, KafkaError) and partition in consumer.assignment():
            consumer.seek(partition, message.offset)
        await asyncio.sleep(_PAUSE_SECONDS)
    else:
        say(f"handled {message.offset}")


# -- effects in Kafka


class TopicToTopic(Transformer):
    """A message a transaction, as the others have an offset for each message."""

    def __init__(self, servers: str, topic: str, results: str, group: str, member: str, trouble: Trouble) -> None:
        super().__init__(
            servers,
            group,
            topics=[topic],
            transform=self._result,
            most_at_once=1,
            backoff=Backoff(_PAUSE_SECONDS, 1.0),
            consumer_settings={"group_instance_id": member, **MEMBER_SETTINGS},
        )
        self._results, self._trouble = results, trouble

    async def _result(self, message: Any) -> list[Output]:
        await self._trouble.at("handler", message.offset)
        return [Output(self._results, message.value, message.key, [("id", message_id(message).encode())])]

    async def _commit(self, producer: Any, partition: TopicPartition, batch: _Batch) -> None:
        try:
            await super()._commit(producer, partition, batch)
        except Exception as error:
            say(f"failed before {batch.next_offset}: {error!r}")
            raise
        if batch.next_offset is not None:
            say(f"handled {batch.next_offset - 1}")

    async def _send_offset(self, producer: Any, partition: TopicPartition, offset: int) -> None:
        await super()._send_offset(producer, partition, offset)
        await self._trouble.at("between", offset - 1)


MODES = (*HANDLERS, "topic-to-topic")


async def main(
    url: str,
    servers: str,
    topic: str,
    results: str,
    group: str,
    member: str,
    mode: str,
    step: str = "",
    offset: str = "-1",
    how: str = "",
) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stdout))
    trouble, stopping = Trouble(step, int(offset), how), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, trouble.go_on.set)
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    if mode in HANDLERS:
        await consume(HANDLERS[mode](url, trouble), servers, topic, group, member, stopping)
        return
    transformer = TopicToTopic(servers, topic, results, group, member, trouble)
    running = asyncio.create_task(transformer.run())
    await asyncio.wait([running, asyncio.create_task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
    transformer.stop()
    await running


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
