"""A member of a group that handles once on Redis; a process of its own, so that it can be killed.

``python -m tests.acceptance.inbox_runner_member REDIS_URL BOOTSTRAP_SERVERS TOPIC GROUP ID`` says that it has
partitions, and once it has handled the message with the id, but not marked it, and waits to be killed. Effects are in
a list.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection
from typing import Any

import structlog
from aiokafka import TopicPartition
from redis.asyncio import Redis

from outbox_relay.inbox import message_id
from outbox_relay.inbox.redis import RedisInbox
from outbox_relay.inbox.runner import Consumer
from outbox_relay.retry import Backoff
from tests.acceptance.inbox_consumer import say

#: The shortest that Kafka takes by default, so that a member that was killed is missed soon.
SETTINGS = {"session_timeout_ms": 6_000, "heartbeat_interval_ms": 200}


class Member(Consumer):
    def __init__(self, redis: Redis, servers: str, topic: str, group: str, wait_at: str = "") -> None:
        # Nobody waits for the lease to run out: a test sets it back.
        inbox = RedisInbox(redis, group, lease_seconds=3_600, keep_seconds=3_600)
        super().__init__(servers, group, inbox=inbox, backoff=Backoff(0.01, 0.05), consumer_settings=SETTINGS)
        self.handler(topic)(self._affect)
        self._redis, self._wait_at = redis, wait_at

    async def _affect(self, message: Any) -> None:
        await self._redis.rpush(f"effects:{self._group}", message_id(message))
        if message_id(message) == self._wait_at:
            say("waiting to be killed")
            await asyncio.Event().wait()


class SaysWhatItHas(Member):
    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        await super().on_partitions_assigned(assigned)
        if assigned:
            say("assigned")


async def main(url: str, servers: str, topic: str, group: str, wait_at: str) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    async with Redis.from_url(url) as redis:
        await SaysWhatItHas(redis, servers, topic, group, wait_at).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
