"""A payment service that charges once for each message of a topic; a process of its own, so that it can be killed.

``python -m tests.acceptance.inbox_consumer URL BOOTSTRAP_SERVERS TOPIC GROUP HANDLER [STEP OFFSET]`` handles what is in
partition 0, from the group's offset on, and ends. With a step it says when it has done that for the message at the
offset, and waits to be killed. It assigns the partition to itself, so that nobody waits until its group misses it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from outbox_relay.inbox import message_id
from outbox_relay.inbox.offsets import Offsets, SeekOnAssignment
from outbox_relay.inbox.postgres import Inbox
from tests.waiting import eventually

INBOX = Inbox("payments")
OFFSETS = Offsets("payments")

Step: TypeAlias = Callable[[str], Awaitable[None]]
Handler: TypeAlias = Callable[[asyncpg.Connection, list[Any], Callable[[], Awaitable[None]], Step], Awaitable[None]]


async def charge(connection: asyncpg.Connection, message: Any) -> None:
    await connection.execute("INSERT INTO charge VALUES ($1)", message_id(message))


async def one_by_one(
    connection: asyncpg.Connection, messages: list[Any], commit_offset: Callable[[], Awaitable[None]], done: Step
) -> None:
    (message,) = messages
    await done("received")
    async with connection.transaction():
        await done("begun")
        if await INBOX.accept(connection, message):
            await done("accepted")
            await charge(connection, message)
            await done("charged")
    await done("committed")
    await commit_offset()
    await done("offset")


async def in_batches(
    connection: asyncpg.Connection, messages: list[Any], commit_offset: Callable[[], Awaitable[None]], done: Step
) -> None:
    await done("received")
    async with connection.transaction():
        await done("begun")
        new = await INBOX.accept_batch(connection, messages)
        await done("accepted")
        for message in new:
            await charge(connection, message)
        await done("charged")
    await done("committed")
    await commit_offset()
    await done("offset")


async def offset_before_the_commit(
    connection: asyncpg.Connection, messages: list[Any], commit_offset: Callable[[], Awaitable[None]], done: Step
) -> None:
    """Broken: what a crash takes back, Kafka doesn't bring again."""
    (message,) = messages
    await done("received")
    async with connection.transaction():
        await done("begun")
        if await INBOX.accept(connection, message):
            await done("accepted")
            await charge(connection, message)
            await done("charged")
        await commit_offset()
        await done("offset")
    await done("committed")


async def id_before_the_handler(
    connection: asyncpg.Connection, messages: list[Any], commit_offset: Callable[[], Awaitable[None]], done: Step
) -> None:
    """Broken: a message counts as handled before it is."""
    (message,) = messages
    await done("received")
    await done("begun")
    async with connection.transaction():
        new = await INBOX.accept(connection, message)
    if new:
        await done("accepted")
        await charge(connection, message)
        await done("charged")
    await done("committed")
    await commit_offset()
    await done("offset")


async def offset_with_effects(
    connection: asyncpg.Connection, messages: list[Any], _: Callable[[], Awaitable[None]], done: Step
) -> None:
    """Kafka's own offsets aren't used."""
    (message,) = messages
    async with connection.transaction():
        if await OFFSETS.accept(connection, message):
            await done("accepted")
            await charge(connection, message)
            await done("charged")
    await done("committed")


async def offset_after_effects(
    connection: asyncpg.Connection, messages: list[Any], _: Callable[[], Awaitable[None]], done: Step
) -> None:
    """Broken: in a transaction of its own."""
    (message,) = messages
    await charge(connection, message)
    await done("charged")
    async with connection.transaction():
        await OFFSETS.accept(connection, message)
    await done("committed")


HANDLERS: dict[str, Handler] = {
    handler.__name__: handler
    for handler in (
        one_by_one,
        in_batches,
        offset_before_the_commit,
        id_before_the_handler,
        offset_with_effects,
        offset_after_effects,
    )
}
STEPS = ("received", "begun", "accepted", "charged", "committed", "offset")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def main(url: str, servers: str, topic: str, group: str, handler: str, step: str = "", at: str = "-1") -> None:
    partition = TopicPartition(topic, 0)
    is_seeking = handler in ("offset_with_effects", "offset_after_effects")
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="none" if is_seeking else "earliest",
    )
    await consumer.start()
    consumer.assign([partition])
    if is_seeking:
        async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool:
            await SeekOnAssignment(OFFSETS, consumer, pool).on_partitions_assigned([partition])
            await eventually(lambda: not consumer.paused(), "the partition is taken")
    connection = await asyncpg.connect(url)
    end = (await consumer.end_offsets([partition]))[partition]
    while (begin := await consumer.position(partition)) < end:
        messages: list[ConsumerRecord[bytes, bytes]] = []
        while len(messages) < (3 if handler == "in_batches" else 1) and begin + len(messages) < end:
            messages.append(await consumer.getone())
        is_to_stop = any(message.offset == int(at) for message in messages)

        async def done(each: str, is_to_stop: bool = is_to_stop) -> None:
            if is_to_stop and each == step:
                say("waiting to be killed")
                await asyncio.Event().wait()

        async def commit_offset(offset: int = messages[-1].offset + 1) -> None:
            await consumer.commit({partition: offset})

        await HANDLERS[handler](connection, messages, commit_offset, done)
    say("done")
    await connection.close()
    await consumer.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
