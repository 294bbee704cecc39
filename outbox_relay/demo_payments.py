"""The demo's payment service, a process of its own: it charges each order once, although messages repeat.

An application like any other, that knows the inbox and the topic and nothing of the relay. The table ``charge`` has no
constraint that would keep an order from being charged twice: that is the inbox's to do.

    DATABASE_URL=… KAFKA_BOOTSTRAP_SERVERS=… python -m outbox_relay.demo_payments TOPIC [--mock]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from outbox_relay import logs
from outbox_relay.inbox.postgres import Inbox
from outbox_relay.inbox.runner import Consumer

_CONNECTIONS = 4
_CONNECT_SECONDS = 10.0
_STATEMENT_SECONDS = 30.0

TABLE = """\
-- make the payment service's table
CREATE TABLE charge (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_number bigint NOT NULL,
    charged_at   timestamptz NOT NULL DEFAULT now()
)
"""

_CHARGE = """\
-- charge an order
INSERT INTO charge (order_number) VALUES ($1)
"""


async def serve(database_url: str, bootstrap_servers: str, topic: str, *, check_crcs: bool) -> None:
    """Charge what is ordered, as a member of the group that is called like the topic, until SIGTERM."""
    async with asyncpg.create_pool(
        database_url,
        min_size=1,
        max_size=_CONNECTIONS,
        timeout=_CONNECT_SECONDS,
        command_timeout=_STATEMENT_SECONDS,
    ) as pool:

        @contextlib.asynccontextmanager
        async def transaction() -> AsyncIterator[Any]:
            async with pool.acquire() as connection, connection.transaction():
                yield connection

        consumer = Consumer(
            bootstrap_servers,
            topic,
            inbox=Inbox("payments"),
            transaction=transaction,
            settings={"check_crcs": check_crcs},
        )

        @consumer.handler(topic, type="OrderPlaced")
        async def charge(message: Any, connection: asyncpg.Connection) -> None:
            await connection.execute(_CHARGE, json.loads(message.value)["order"])

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
        await consumer.run()


def main() -> None:
    """The process."""
    logs.configure("info", "console")
    topic, *options = sys.argv[1:]
    servers = os.environ["KAFKA_BOOTSTRAP_SERVERS"]
    asyncio.run(serve(os.environ["DATABASE_URL"], servers, topic, check_crcs="--mock" not in options))


if __name__ == "__main__":
    main()
