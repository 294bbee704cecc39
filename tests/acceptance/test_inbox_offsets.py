"""Offsets in the database: each message of a partition takes effect once, although consumers are killed, lose their
partition, or roll back; and what Kafka no longer has is said.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener

from outbox_relay.errors import (
    NotInTransactionError,
    OffsetGoneError,
    PartitionBusyError,
    PartitionLostError,
    PassedOverError,
)
from outbox_relay.inbox import message_id
from outbox_relay.inbox.offsets import Offsets, SeekOnAssignment
from outbox_relay.servers import Kafka
from tests.acceptance.inboxes import OPENERS, Open, charges_of, prepare, waits_for_another
from tests.acceptance.test_inbox_kafka import NEW_AT, SENT, charges_after_a_kill
from tests.conftest import Database
from tests.consumed import record

#: Two of a message that its producer sent twice, since they have two offsets.
EACH_OFFSET_ONCE = dict(Counter(SENT))


class Seek(SeekOnAssignment, ConsumerRebalanceListener):  # type: ignore[misc]
    """As aiokafka wants a listener to be."""


@pytest.fixture
async def inbox_database(database: Database) -> Database:
    await prepare(database)
    return database


@pytest.fixture
async def topic(kafka: Kafka) -> str:
    name = f"orders-{uuid4().hex}"
    await kafka.create_topic(name)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
        for id_ in SENT:
            await producer.send_and_wait(name, b"{}", headers=[("id", id_.encode())], partition=0)
    return name


async def take(
    connection: asyncpg.Connection, offsets: Offsets | None = None, *, beginning: int = 0, end: int = 100
) -> Offsets:
    offsets = offsets or Offsets("payments")
    async with connection.transaction():
        await offsets.take(connection, "orders", 3, beginning=beginning, end=end)
    return offsets


async def accept(offsets: Offsets, connection: asyncpg.Connection, *at: int) -> list[int]:
    async with connection.transaction():
        return [each.offset for each in await offsets.accept_batch(connection, [record(offset=each) for each in at])]


@pytest.mark.parametrize("step", ["charged", "committed"])
async def test_each_offset_takes_effect_once_although_the_consumer_is_killed(
    inbox_database: Database, kafka: Kafka, topic: str, step: str
) -> None:
    charged = await charges_after_a_kill(inbox_database, kafka, topic, "offset_with_effects", step)
    assert charged == EACH_OFFSET_ONCE


async def test_a_consumer_whose_offset_is_in_another_transaction_is_caught(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    charged = await charges_after_a_kill(inbox_database, kafka, topic, "offset_after_effects", "charged")
    killed_at = SENT[NEW_AT]
    assert charged == {**EACH_OFFSET_ONCE, killed_at: EACH_OFFSET_ONCE[killed_at] + 1}


async def test_members_of_a_group_go_on_where_the_effects_end(
    inbox_database: Database, kafka: Kafka, topic: str
) -> None:
    """Each a new group, which has no offsets in Kafka; the last finds that the topic has less than was handled."""
    read: list[int] = []
    async with asyncio.timeout(90), asyncpg.create_pool(inbox_database.url, min_size=1, max_size=1) as pool:
        for turn in range(3):
            offsets = Offsets("payments")
            if turn == 2:
                await pool.execute("UPDATE inbox_offset SET next_offset = 100")
            async with AIOKafkaConsumer(
                bootstrap_servers=kafka.bootstrap_servers,
                group_id=f"payments-{uuid4().hex}",
                enable_auto_commit=False,
                auto_offset_reset="none",
            ) as consumer:
                consumer.subscribe([topic], listener=Seek(offsets, consumer, pool))
                while turn == 2 or len(read) < (3, len(SENT))[turn]:
                    message = await consumer.getone()
                    async with pool.acquire() as connection, connection.transaction():
                        if turn == 2:
                            with pytest.raises(OffsetGoneError, match="at offset 100 of"):
                                await offsets.accept(connection, message)
                            break
                        assert await offsets.accept(connection, message)
                        await connection.execute("INSERT INTO charge VALUES ($1)", message_id(message))
                    read.append(message.offset)
    assert read == [*range(len(SENT))]
    assert await charges_of(inbox_database) == EACH_OFFSET_ONCE


async def test_who_takes_a_partition_waits_for_what_is_open_and_refuses_the_last_owner(
    inbox_database: Database,
) -> None:
    first, second, watcher = [await inbox_database.connect() for _ in range(3)]
    old = await take(first)
    handling = first.transaction()
    await handling.start()
    assert await old.accept(first, record(offset=4))
    taking = asyncio.create_task(take(second))
    await waits_for_another(watcher, second.get_server_pid())
    await handling.commit()
    async with asyncio.timeout(30):
        new = await taking
    assert await accept(new, second, 4, 5) == [5]
    with pytest.raises(PartitionLostError, match="another 'payments' has taken orders, partition 3"):
        await accept(old, first, 5)
    assert await accept(new, second, 6) == [6]


@pytest.mark.parametrize("open_", OPENERS)
async def test_who_takes_a_partition_waits_for_what_is_open_no_longer_than_asked(
    inbox_database: Database, open_: Open
) -> None:
    connection = await inbox_database.connect()
    old, new = await take(connection), Offsets("payments", lock_timeout_seconds=0.05)
    handling = connection.transaction()
    await handling.start()
    assert await old.accept(connection, record(offset=4))
    async with asyncio.timeout(30):
        with pytest.raises(PartitionBusyError, match="orders, partition 3, has had a transaction open for 50 ms"):
            async with open_(inbox_database.url) as opened:
                await new.take(opened.connection, "orders", 3, beginning=0, end=9)
    await handling.commit()
    assert await accept(old, connection, 5) == [5]
    async with open_(inbox_database.url) as opened:
        assert await new.take(opened.connection, "orders", 3, beginning=0, end=9) == 6


async def test_the_bound_of_a_take_ends_with_its_transaction(inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    await connection.execute("SET lock_timeout = '77s'")
    async with connection.transaction():
        await Offsets("payments").take(connection, "orders", 3, beginning=0, end=9)
        assert await connection.fetchval("SHOW lock_timeout") == "3s"
    assert await connection.fetchval("SHOW lock_timeout") == "77s"


async def test_a_take_that_was_rolled_back_owns_nothing(inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    owner, other = await take(connection), Offsets("payments")
    transaction = connection.transaction()
    await transaction.start()
    await other.take(connection, "orders", 3, beginning=0, end=100)
    await transaction.rollback()
    with pytest.raises(PartitionLostError):
        await accept(other, connection, 0)
    assert await accept(owner, connection, 0) == [0]


async def test_what_was_rolled_back_is_not_passed_over(inbox_database: Database) -> None:
    """Offset 4 is a gap, as compaction and transactions leave them."""
    connection = await inbox_database.connect()
    offsets = await take(connection)
    assert await accept(offsets, connection, 2, 3) == [2, 3]
    for at in ([5], [5, 6]):
        transaction = connection.transaction()
        await transaction.start()
        assert await offsets.accept_batch(connection, [record(offset=each) for each in at])
        await transaction.rollback()
        with pytest.raises(PassedOverError, match="or seek to 4"):
            await accept(offsets, connection, 7)
    assert await accept(offsets, connection, 5, 6) == [5, 6]
    assert await accept(offsets, connection, 6) == []


async def test_what_was_refused_is_not_passed_over_once_the_partition_is_back(inbox_database: Database) -> None:
    """A batch was in hand while its partition went to another and came back; meanwhile that one handled its first."""
    connection = await inbox_database.connect()
    offsets = await take(connection)
    assert await accept(offsets, connection, 6) == [6]
    offsets.drop("orders", 3)
    with pytest.raises(PartitionLostError, match="isn't taken here"):
        await accept(offsets, connection, 7)
    await take(connection, offsets)
    with pytest.raises(PassedOverError, match="at offset 8 of orders, partition 3, comes after 7"):
        await accept(offsets, connection, 8)
    other = await take(connection)
    for at in (7, 8, 9):
        with pytest.raises(PartitionLostError, match="another"):
            await accept(offsets, connection, at)
    assert await accept(other, connection, 7) == [7]
    await take(connection, offsets)
    with pytest.raises(PassedOverError, match="comes after 8"):
        await accept(offsets, connection, 9)
    assert await accept(offsets, connection, 7, 8, 9, 11) == [8, 9, 11]


async def test_several_accepts_of_one_transaction_are_not_passed_over(inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    offsets = await take(connection)
    for transaction in (connection.transaction(), connection.transaction()):
        await transaction.start()
        for at in (3, 4, 5):
            savepoint = connection.transaction()
            await savepoint.start()
            assert await offsets.accept(connection, record(offset=at))
            await (savepoint.rollback() if at == 5 else savepoint.commit())
        with pytest.raises(PassedOverError, match="comes after 5"):
            await offsets.accept(connection, record(offset=6))
        await transaction.rollback()
        with pytest.raises(PassedOverError, match="comes after 3"):
            await accept(offsets, connection, 4)
    assert await accept(offsets, connection, 3, 4) == [3, 4]


async def test_what_was_asked_about_in_vain_is_not_passed_over(inbox_database: Database) -> None:
    """As where the connection is lost: what is known of it is that it was asked about."""
    connection, other = await inbox_database.connect(), await inbox_database.connect()
    offsets = await take(connection)
    async with other.transaction():
        await other.execute("SELECT FROM inbox_offset FOR UPDATE")
        await connection.execute("SET lock_timeout = '1ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await accept(offsets, connection, 3)
    with pytest.raises(PassedOverError, match="or seek to 0"):
        await accept(offsets, connection, 4)
    assert await accept(offsets, connection, 3, 4) == [3, 4]


@pytest.mark.parametrize(
    ("beginning", "end", "why"), [(0, 3, "the topic was made anew"), (5, 9, "was deleted before it was handled")]
)
async def test_an_offset_that_kafka_no_longer_has_is_said(
    inbox_database: Database, beginning: int, end: int, why: str
) -> None:
    connection = await inbox_database.connect()
    owner = await take(connection)
    assert await accept(owner, connection, 3) == [3]
    with pytest.raises(OffsetGoneError, match=why):
        await take(connection, beginning=beginning, end=end)
    assert await connection.fetchval("SELECT next_offset FROM inbox_offset") == 4


async def test_a_consumer_that_may_pass_over_messages_is_refused(inbox_database: Database, kafka: Kafka) -> None:
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest")
    async with consumer, asyncpg.create_pool(inbox_database.url, min_size=0) as pool:
        with pytest.raises(ValueError, match='auto_offset_reset="none"'):
            SeekOnAssignment(Offsets("payments"), consumer, pool)


async def test_a_partition_that_is_not_taken_and_a_batch_of_two_are_refused(inbox_database: Database) -> None:
    connection = await inbox_database.connect()
    with pytest.raises(PartitionLostError, match="isn't taken here"):
        await accept(Offsets("payments"), connection, 1)
    with pytest.raises(ValueError, match="of one partition"):
        await (await take(connection)).accept_batch(connection, [record(), record(partition=4)])


@pytest.mark.parametrize("open_", OPENERS)
async def test_on_each_kind_of_connection(inbox_database: Database, open_: Open) -> None:
    offsets = Offsets("payments")
    async with open_(inbox_database.url) as opened:
        await offsets.take(opened.connection, "orders", 3, beginning=0, end=9)
        assert await offsets.accept(opened.connection, record(offset=1))
        assert not await offsets.accept(opened.connection, record(offset=1))
    async with open_(inbox_database.url, begin=False) as opened:
        with pytest.raises(NotInTransactionError):
            await offsets.accept(opened.connection, record(offset=2))
