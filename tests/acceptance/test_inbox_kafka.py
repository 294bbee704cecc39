"""From Kafka to PostgreSQL: one charge a message, although the consumer is killed between each pair of steps, producers
repeat, offsets are set back, and partitions change hands.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from outbox_relay.inbox import message_id
from outbox_relay.servers import Kafka
from tests.acceptance import inbox_faststream_consumer, inbox_runner_consumer
from tests.acceptance.inbox_consumer import INBOX, STEPS
from tests.acceptance.inboxes import charges_of, prepare, waits_for_another
from tests.conftest import Database

#: Ids of messages in the order of the topic, some sent more than once, and after which one the consumer is killed.
SENT = ("m1", "m2", "m1", "m3", "m2", "m4", "m3")
NEW_AT = 3
REPEATED_AT = 4
ONCE_EACH = {"m1": 1, "m2": 1, "m3": 1, "m4": 1}

#: Members of their group, which waits long for one that was killed; by handler, and which goes on.
MEMBERS = {
    **dict.fromkeys(inbox_runner_consumer.HANDLERS, ("inbox_runner_consumer", "runner")),
    **dict.fromkeys(inbox_faststream_consumer.HANDLERS, ("inbox_faststream_consumer", "faststream")),
}


@pytest.fixture
async def inbox_database(database: Database) -> Database:
    await prepare(database)
    return database


@pytest.fixture
async def topic(kafka: Kafka) -> str:
    """With the messages in one partition."""
    name = f"orders-{uuid4().hex}"
    await kafka.create_topic(name)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for id_ in SENT:
            await producer.send_and_wait(name, b"{}", key=b"42", headers=[("id", id_.encode())], partition=0)
    return name


async def consume(
    database: Database, kafka: Kafka, topic: str, group: str, handler: str, *, die_after: str = "", at: int = -1
) -> None:
    """A consumer, until it has handled everything; or with a step until then, when it is killed."""
    arguments = [database.url, kafka.bootstrap_servers, topic, group, handler, die_after, str(at)]
    program, _ = MEMBERS.get(handler, ("inbox_consumer", handler))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", f"tests.acceptance.{program}", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            said = (await process.stdout.readline()).decode().strip()
            assert said == ("waiting to be killed" if die_after else "done")
            if not die_after:
                assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


async def charges_after_a_kill(
    database: Database, kafka: Kafka, topic: str, handler: str, step: str, at: int = NEW_AT
) -> dict[str, int]:
    """What was charged for by a consumer that is killed after a step, and one that goes on."""
    group = f"payments-{uuid4().hex}"
    await consume(database, kafka, topic, group, handler, die_after=step, at=at)
    if handler in MEMBERS:
        group, handler = await with_its_offset(kafka, topic, group), MEMBERS[handler][1]
    await consume(database, kafka, topic, group, handler)
    return await charges_of(database)


async def with_its_offset(kafka: Kafka, topic: str, group: str) -> str:
    """Another group, that has come as far as this one."""
    partition, other = TopicPartition(topic, 0), f"{group}-again"
    async with member_of(kafka, group) as consumer:
        consumer.assign([partition])
        offset = await consumer.committed(partition)
    if offset is not None:
        async with member_of(kafka, other) as consumer:
            consumer.assign([partition])
            await consumer.commit({partition: offset})
    return other


def member_of(kafka: Kafka, group: str, *topics: str) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        *topics,
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )


@pytest.mark.parametrize("handler", ["one_by_one", "in_batches", "runner"])
@pytest.mark.parametrize("step", STEPS)
async def test_each_message_is_charged_for_once_although_the_consumer_is_killed(
    inbox_database: Database, kafka: Kafka, topic: str, handler: str, step: str
) -> None:
    assert await charges_after_a_kill(inbox_database, kafka, topic, handler, step) == ONCE_EACH


@pytest.mark.parametrize("step", ["charged", "committed", "offset"])
async def test_with_the_runners_batches_too(inbox_database: Database, kafka: Kafka, topic: str, step: str) -> None:
    charged = await charges_after_a_kill(inbox_database, kafka, topic, "runner_in_batches", step)
    assert charged == ONCE_EACH


@pytest.mark.parametrize("step", ["charged", "committed"])
async def test_with_faststream_too(inbox_database: Database, kafka: Kafka, topic: str, step: str) -> None:
    """Around the database's commit; before and after these its steps are those of the others."""
    assert await charges_after_a_kill(inbox_database, kafka, topic, "faststream", step) == ONCE_EACH


async def test_each_message_is_charged_for_once_although_offsets_are_set_back(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    """As by a group that lost them: each consumer begins at the beginning."""
    for handler in ("one_by_one", "in_batches", "runner"):
        await consume(inbox_database, kafka, topic, f"payments-{uuid4().hex}", handler)
    await consume(
        inbox_database, kafka, topic, f"payments-{uuid4().hex}", "one_by_one", die_after="committed", at=REPEATED_AT
    )
    assert await charges_of(inbox_database) == ONCE_EACH


async def test_a_consumer_that_commits_offsets_before_the_database_is_caught(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    charged = await charges_after_a_kill(inbox_database, kafka, topic, "offset_before_the_commit", "offset", at=5)
    assert charged == {"m1": 1, "m2": 1, "m3": 1}


async def test_a_runner_that_commits_offsets_before_the_database_is_caught(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    charged = await charges_after_a_kill(inbox_database, kafka, topic, "finished_before_handled", "charged", at=5)
    assert charged == {"m1": 1, "m2": 1, "m3": 1}


async def test_faststream_that_commits_offsets_by_itself_is_caught(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    charged = await charges_after_a_kill(inbox_database, kafka, topic, "faststream_ack_first", "charged", at=5)
    assert charged == {"m1": 1, "m2": 1, "m3": 1}


async def test_a_consumer_that_commits_ids_before_the_handler_is_caught(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    charged = await charges_after_a_kill(inbox_database, kafka, topic, "id_before_the_handler", "accepted")
    assert charged == {"m1": 1, "m2": 1, "m4": 1}


async def test_a_message_whose_partition_changes_hands_while_it_is_handled_is_charged_for_once(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    first, second, watcher = [await inbox_database.connect() for _ in range(3)]
    group = f"payments-{uuid4().hex}"

    async with asyncio.timeout(90):
        async with member_of(kafka, group, topic) as consumer:
            message = await consumer.getone()
            handling = first.transaction()
            await handling.start()
            assert await INBOX.accept(first, message)
            await first.execute("INSERT INTO charge VALUES ($1)", message_id(message))
        # It has left its group, and doesn't know yet that its work is another's now.
        async with member_of(kafka, group, topic) as consumer:
            again = await consumer.getone()
            assert (again.offset, message_id(again)) == (message.offset, message_id(message))
            async with second.transaction():
                accepting = asyncio.create_task(INBOX.accept(second, again))
                await waits_for_another(watcher, second.get_server_pid())
                await handling.commit()
                assert not await accepting
    assert await charges_of(inbox_database) == {"m1": 1}
