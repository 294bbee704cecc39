"""What waking relays costs writers: ``python -m bench.decisions.wake_up``, for docs/decisions/0012.

Each writer commits one row a transaction, as fast as it can: with no trigger, with the product's while no relay
listens, and with it while one does.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict

import asyncpg

from bench.cpu import cpu_seconds
from bench.decisions.outboxes import connected, create_outbox
from bench.measuring import interleaved, print_machine, print_table, ratios, spread
from outbox_relay import wake_up
from outbox_relay.servers import PostgresServer

ROUNDS = 5
SECONDS = 2.0
WRITERS = (1, 8)

LISTENS, DOES_NOT = "UPDATE outbox_relay SET listens = true", "UPDATE outbox_relay SET listens = false"
ARMS = {
    "no trigger": "ALTER TABLE outbox DISABLE TRIGGER outbox_wake",
    "trigger, no relay listens": f"ALTER TABLE outbox ENABLE TRIGGER outbox_wake; {DOES_NOT}",
    "trigger, a relay listens": f"ALTER TABLE outbox ENABLE TRIGGER outbox_wake; {LISTENS}",
}
RELAY = "INSERT INTO outbox_relay (name, lease_seconds, ready, direct) VALUES ('r', 1, true, true)"
INSERT = "INSERT INTO outbox (topic, key, payload) VALUES ('t', $1, $2)"


async def write(url: str, writers: int) -> int:
    """Transactions within the time."""
    ends = time.monotonic() + SECONDS

    async def writer(number: int) -> int:
        done = 0
        async with connected(url) as connection:
            while time.monotonic() < ends:
                await connection.execute(INSERT, f"k{number}", b"x" * 300)
                done += 1
        return done

    return sum(await asyncio.gather(*(writer(number) for number in range(writers))))


async def measure(server: PostgresServer) -> None:
    url = await create_outbox(server, "wake_up")
    async with connected(url) as connection, connected(url) as listener:
        await connection.execute(wake_up.read_sql())
        await connection.execute(RELAY)
        await listen(listener, await connection.fetchval("SELECT 'outbox_' || 'outbox'::regclass::oid"))
        for writers in WRITERS:
            rates: dict[str, list[float]] = defaultdict(list)
            costs: dict[str, list[float]] = defaultdict(list)
            for arm in interleaved(list(ARMS), ROUNDS):
                await connection.execute("TRUNCATE outbox; CHECKPOINT")
                await connection.execute(ARMS[arm])
                before = cpu_seconds(server.pid)
                done = await write(url, writers)
                costs[arm].append((cpu_seconds(server.pid) - before) / done * 1e6)
                rates[arm].append(done / SECONDS)
            none = next(iter(ARMS))
            print_table(
                f"{writers} writers, one row a transaction",
                ["", "transactions/s", "ratio", "CPU µs a transaction, PostgreSQL"],
                [[arm, spread(rates[arm], 0), ratios(rates[arm], rates[none]), spread(costs[arm], 0)] for arm in ARMS],
            )


async def listen(connection: asyncpg.Connection, channel: str) -> None:
    await connection.add_listener(channel, lambda *_: None)


def main() -> None:
    print_machine()
    with PostgresServer.start() as server:
        asyncio.run(measure(server))


if __name__ == "__main__":
    main()
