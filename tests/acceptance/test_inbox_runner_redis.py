"""The runner with an inbox on Redis: a member that is killed is missed by its group, and what it held comes again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from typing import Any
from uuid import uuid4

from aiokafka import AIOKafkaProducer, TopicPartition
from redis.asyncio import Redis

from outbox_relay.servers import Kafka
from tests.acceptance.inbox_runner_member import Member
from tests.redis_server import RedisServer
from tests.waiting import eventually


class Living(Member):
    """Remembers which offsets another held when it asked for them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.busy: Counter[int] = Counter()

        handle = self._handling.handle

        async def counting(message: Any, *arguments: Any) -> float | None:
            pause_seconds = await handle(message, *arguments)
            self.busy[message.offset] += pause_seconds is not None
            return pause_seconds

        self._handling.handle = counting  # type: ignore[method-assign, assignment]


async def test_a_living_member_takes_over_from_one_that_was_killed(kafka: Kafka) -> None:
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic, 2)
    with RedisServer.start() as server:
        async with Redis.from_url(server.url, decode_responses=True) as redis:
            living = Living(redis, kafka.bootstrap_servers, topic, topic)
            running = asyncio.create_task(living.run())
            try:
                await eventually(lambda: len(living._partitions) == 2, "the living one has both")
                await killed_while_it_holds(redis, server.url, kafka, topic, living)
                await eventually(lambda: len(living._partitions) == 2, "the other is missed by its group")
                await eventually(lambda: living.busy[1] > 2, "the living one asks again")
                assert await effects_of(redis, topic) == {"m1": 1, "m2": 1, "n1": 1}
                # As by the passing of time.
                await redis.hset(f"inbox:{topic}:m2", "until", "1")

                async def is_handled() -> bool:
                    assert not running.done(), running.exception()
                    return "m3" in await effects_of(redis, topic)

                await eventually(is_handled, "everything is handled")
            finally:
                living.stop()
                await running
            # One more than one, for the crash between its effect and its mark.
            assert await effects_of(redis, topic) == {"m1": 1, "m2": 2, "m3": 1, "n1": 1}
    assert set(living.busy.elements()) == {1}


async def killed_while_it_holds(redis: Redis, url: str, kafka: Kafka, topic: str, living: Member) -> None:
    """A second member, killed with m2 at offset 1 of its partition handled and not marked."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.acceptance.inbox_runner_member", url, kafka.bootstrap_servers, topic, topic, "m2"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"assigned\n"
            await eventually(lambda: len(living._partitions) == 1, "each has one")
            (of_living,) = living._partitions
            async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
                for id_ in ("n1", "m1", "m2", "m1", "m3"):
                    partition = of_living.partition if id_ == "n1" else 1 - of_living.partition
                    headers = [("id", id_.encode())]
                    await producer.send_and_wait(topic, b"{}", key=b"k", headers=headers, partition=partition)
            assert await process.stdout.readline() == b"waiting to be killed\n"
            # The living one handles its own meanwhile.
            await eventually(lambda: living._partitions[of_living].progress.unfinished == 0, "nothing waits")

            async def is_handled() -> bool:
                return "n1" in await effects_of(redis, topic)

            await eventually(is_handled, "its own is handled")
            assert TopicPartition(topic, 1 - of_living.partition) not in living._partitions
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()


async def effects_of(redis: Redis, group: str) -> dict[str, int]:
    effects: Any = await redis.lrange(f"effects:{group}", 0, -1)
    return dict(Counter(effects))
