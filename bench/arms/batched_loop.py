"""What a competent developer writes in a day: claims of many rows, batches built per partition, marks by array.

No feature beyond that: no retries, one process only, lost order after a failure. Four claims are in flight, as in
outbox-relay: each worker has the rows whose hashed key falls to it, a connection and a producer.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from functools import cache

import asyncpg
from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2

WORKERS = 4
ROWS = 2_000
BATCH_BYTES = 512 * 1024

CLAIM = f"""
SELECT id, topic, key, payload FROM outbox
WHERE sent_at IS NULL AND hashtext(key) & {WORKERS - 1} = $1 ORDER BY id LIMIT {ROWS} FOR UPDATE SKIP LOCKED
"""
MARK = "UPDATE outbox SET sent_at = now() WHERE id = ANY ($1::bigint[])"


@cache
def partition_of(key: str, count: int) -> int:
    return (int(murmur2(key.encode())) & 0x7FFFFFFF) % count


async def publish(producer: AIOKafkaProducer, rows: list[asyncpg.Record]) -> None:
    by_partition = defaultdict(list)
    for row in rows:
        count = len(producer.client.cluster.partitions_for_topic(row["topic"]))
        by_partition[row["topic"], partition_of(row["key"], count)].append(row)
    now = int(time.time() * 1000)

    async def send(topic: str, number: int, of_partition: list[asyncpg.Record]) -> None:
        batch = producer.create_batch()
        for row in of_partition:
            record = {
                "key": row["key"].encode(),
                "value": row["payload"],
                "timestamp": now,
                "headers": [("id", b"%d" % row["id"])],
            }
            if not batch.append(**record):
                await (await producer.send_batch(batch, topic, partition=number))
                batch = producer.create_batch()
                batch.append(**record)
        await (await producer.send_batch(batch, topic, partition=number))

    await asyncio.gather(*(send(topic, number, found) for (topic, number), found in by_partition.items()))


async def work(number: int, database_url: str, bootstrap_servers: str) -> None:
    connection = await asyncpg.connect(database_url)
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap_servers, acks="all", enable_idempotence=True, max_batch_size=BATCH_BYTES
    )
    await producer.start()
    await producer.client.force_metadata_update()
    while True:
        async with connection.transaction():
            rows = await connection.fetch(CLAIM, number)
            if rows:
                await publish(producer, rows)
                await connection.execute(MARK, [row["id"] for row in rows])
        if not rows:
            await asyncio.sleep(0.01)


async def main(database_url: str, bootstrap_servers: str) -> None:
    await asyncio.gather(*(work(number, database_url, bootstrap_servers) for number in range(WORKERS)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
