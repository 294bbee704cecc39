"""Writers that keep to a rate whatever the relay does: ``python -m bench.writers`` with a :class:`Load` on stdin.

An open loop: messages are due at random moments, known before, and one that waits for a free connection is late.
Each is one transaction: it takes the lock of its key's row, then writes the ledger and the outbox. What was written
when goes to stdout as JSON. All times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import asyncpg

from bench.arms import Arm, Run
from bench.rows import KEYS, key_of, payload_of
from bench.stage import connected

CONNECTIONS = 16
_LATE_SECONDS = 60.0

#: One message of a key that other writers may have too, in a single round trip.
_WRITE = f"""
CREATE TABLE bench_keys WITH (fillfactor = 50) AS SELECT k, 0 AS v FROM generate_series(1, {KEYS}) AS k;
ALTER TABLE bench_keys ADD PRIMARY KEY (k);
CREATE FUNCTION bench_write(bench_n bigint, bench_k integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE bench_v integer;
BEGIN
    -- In a statement of its own before the INSERT: so messages of a key commit in the order of their ids.
    UPDATE bench_keys SET v = v + 1 WHERE k = bench_k RETURNING v INTO bench_v;
    INSERT INTO bench_ledger VALUES (bench_n, bench_k, bench_v);
    {{insert}};
END $$
"""


@dataclass(frozen=True)
class Load:
    """So many messages a second for so long, the first ``first`` + 1; without a rate as many as go."""

    database_url: str
    rate: float | None
    seconds: float
    first: int = 0


@dataclass(frozen=True)
class Written:
    """One message, in monotonic seconds."""

    n: int
    due: float
    sent: float  #: its statement
    committed: float  #: COMMIT was acknowledged


async def prepare(run: Run, arm: Arm, size: int) -> None:
    """Make what writers need, once the arm has made its tables."""
    row = f"""(SELECT bench_n AS n, bench_k AS k, bench_v AS v, {key_of("bench_k")} AS key,
                      {payload_of("bench_n", "bench_k", "bench_v", size)} AS payload) AS rows"""
    async with connected(run.database_url) as connection:
        await connection.execute(_WRITE.format(insert=arm.insert(row).rstrip().rstrip(";")))


async def write(load: Load) -> list[Written]:
    """Run the writers in a process of their own. Raises RuntimeError when they fail."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.writers", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(load.seconds + 2 * _LATE_SECONDS):
            output, _ = await process.communicate(json.dumps(asdict(load)).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the writers ended with exit code {process.returncode}")
    return [Written(*one) for one in json.loads(output)]


async def _write(load: Load) -> list[Sequence[Any]]:
    connections: asyncio.Queue[asyncpg.Connection] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        connection = await asyncpg.connect(load.database_url, timeout=10)
        await connection.prepare("SELECT bench_write($1, $2)")
        connections.put_nowait(connection)
    written: list[Sequence[Any]] = []

    async def one(n: int, k: int, due: float) -> None:
        connection = await connections.get()
        sent = time.monotonic()
        await connection.fetch("SELECT bench_write($1, $2)", n, k)
        written.append((n, due, sent, time.monotonic()))
        connections.put_nowait(connection)

    chance = random.Random(load.first)  # noqa: S311
    due = began = time.monotonic() + 0.1
    n = load.first
    async with asyncio.TaskGroup() as writes:
        while due < began + load.seconds:
            n += 1
            if load.rate is None:
                connections.put_nowait(await connections.get())  # as soon as one is free
                due = time.monotonic()
            else:
                due += chance.expovariate(load.rate)
                await asyncio.sleep(due - time.monotonic())
            writes.create_task(one(n, chance.randint(1, KEYS), due))
            await asyncio.sleep(0)
    while not connections.empty():
        await connections.get_nowait().close(timeout=10)
    return written


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_write(Load(**json.load(sys.stdin))))))
