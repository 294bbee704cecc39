"""A relay made with faststream-outbox as its documentation says.

``schema`` makes the table, ``relay`` runs until SIGTERM.

[docs] is https://faststream-outbox.modern-python.org/, for 0.19.0.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from faststream import FastStream
from faststream.kafka import KafkaBroker, KafkaResponse
from faststream_outbox import OutboxBroker, make_outbox_table
from faststream_outbox.annotations import OutboxMessage
from faststream_outbox.autovacuum import outbox_autovacuum_ddl
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

_QUEUE = "outbox_queue"

metadata = MetaData()
outbox_table = make_outbox_table(metadata, table_name="outbox")


async def schema(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        # "Apply once in a migration". [docs] concepts/performance "Storage: autovacuum tuning"
        await connection.execute(text(outbox_autovacuum_ddl("outbox")))
    await engine.dispose()


async def relay(engine: AsyncEngine, bootstrap_servers: str, topic: str, workers: int) -> None:
    # Without two lines in the log for each message: its logger is at INFO, and log_level is what it writes them at.
    # https://faststream.ag2.ai/latest/getting-started/logging/
    outbox = OutboxBroker(engine, outbox_table=outbox_table, log_level=logging.DEBUG)
    # What all arms have: acks=all, idempotent; for speed, larger batches than 16 KB (aiokafka's max_batch_size).
    kafka = KafkaBroker(bootstrap_servers, acks="all", enable_idempotence=True, max_batch_size=262_144)

    # [docs] usage/relay "Minimal relay", "Header propagation". The key travels in a header, since a row has no key.
    @kafka.publisher(topic)
    @outbox.subscriber(
        _QUEUE,
        # For speed. [docs] concepts/performance "Which knob for which workload": more workers and a larger fetch for
        # capacity, a batched terminal flush for throughput.
        max_workers=workers,
        fetch_batch_size=500,
        terminal_flush_batch_size=100,
        # Polled quickly where NOTIFY doesn't wake it. [docs] usage/subscriber "Subscriber options"
        min_fetch_interval=0.01,
        max_fetch_interval=1.0,
    )
    async def forward(message: OutboxMessage) -> KafkaResponse:
        return KafkaResponse(message.body, key=message.headers["key"].encode())

    # [docs] usage/relay "Standalone"
    await FastStream(outbox, on_startup=[kafka.start], after_shutdown=[kafka.stop]).run()
    await engine.dispose()


async def main(what: str, database_url: str, bootstrap_servers: str, topic: str, workers: str) -> None:
    # "Each subscriber holds max_workers + 1 long-lived pool connections". [docs] usage/subscriber "Connection budget"
    engine = create_async_engine(
        database_url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=int(workers) + 2
    )
    if what == "schema":
        await schema(engine)
    else:
        await relay(engine, bootstrap_servers, topic, int(workers))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
