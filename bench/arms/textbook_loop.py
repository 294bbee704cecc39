"""The relay of articles and tutorials: ``SKIP LOCKED``, one send a row, one UPDATE a row, all in one transaction."""

from __future__ import annotations

import asyncio
import sys

import asyncpg
from aiokafka import AIOKafkaProducer

CLAIM = """
SELECT id, topic, key, payload FROM outbox
WHERE sent_at IS NULL ORDER BY id LIMIT 100 FOR UPDATE SKIP LOCKED
"""


async def main(database_url: str, bootstrap_servers: str) -> None:
    connection = await asyncpg.connect(database_url)
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, acks="all", enable_idempotence=True)
    await producer.start()
    while True:
        async with connection.transaction():
            rows = await connection.fetch(CLAIM)
            for row in rows:
                await producer.send_and_wait(row["topic"], row["payload"], row["key"].encode())
                await connection.execute("UPDATE outbox SET sent_at = now() WHERE id = $1", row["id"])
        if not rows:
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
