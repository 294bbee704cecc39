"""A relay made with txoutbox as its README says.

``schema`` makes the table, ``relay`` runs until SIGTERM.

[readme] is https://github.com/OsmnvAslan/txoutbox#readme, for 0.2.2.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

from aiokafka import AIOKafkaProducer
from txoutbox import OutboxMessage, Relay, RelayConfig
from txoutbox.adapters.postgres import PostgresStorage

_BATCH = 16_000


async def main(what: str, database_url: str, bootstrap_servers: str, _topic: str) -> None:
    # Wakes the relay rather than have it poll. [readme] "Not polling: LISTEN/NOTIFY"
    # What is delivered is marked, which is its default, and order per key is kept, which is too.
    storage = await PostgresStorage.connect(database_url, notify_channel="outbox")
    if what == "schema":
        await storage.create_schema()
        await storage.close()
        return
    config = RelayConfig(
        # For speed, of 500 to 30,000 the best, rather than 50: "throughput is bounded at roughly batch_size * 1000 /
        # claim_ms"; and all keys of a round at once: "ordering groups published in parallel".
        # [readme] "Configuration", "Delivery semantics"
        batch_size=_BATCH,
        concurrency=_BATCH,
        # "must exceed ceil(batch_size / concurrency) * publish_timeout", which stays 5 s
        lease=timedelta(seconds=60),
    )
    # [readme] "Kafka in three lines", with what all arms have: acks=all, idempotent.
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap_servers,
        acks="all",
        enable_idempotence=True,
        # For speed: larger batches than 16 KB. https://aiokafka.readthedocs.io/en/stable/api.html
        max_batch_size=262_144,
    )
    await producer.start()

    async def publish(message: OutboxMessage) -> None:
        await producer.send_and_wait(message.topic, message.payload, key=message.key.encode() if message.key else None)

    relay = Relay(storage, publish, config=config)
    listener = await storage.listen(relay.wake)
    await relay.run(handle_signals=True)
    await listener.close()
    await producer.stop()
    await storage.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
