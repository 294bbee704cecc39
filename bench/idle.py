"""What a relay costs that has nothing to do."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from bench import writers
from bench.arms import Arm
from bench.cpu import peak_rss_mb
from bench.drain import prepared
from bench.rows import Rows
from bench.stage import Stage, connected
from bench.steady import Arrivals

#: Until it polls as seldom as it ever does.
_CALM_SECONDS = 5.0


@dataclass(frozen=True)
class Idle:
    """Of a core, and of statements that PostgreSQL executed for the relay, BEGIN and COMMIT included."""

    cpu_percent: float  #: relay and PostgreSQL, without what PostgreSQL uses when nobody is there
    relay_cpu_percent: float
    postgresql_cpu_percent: float
    statements_per_second: float
    rss_mb: float


async def idle(stage: Stage, arm: Arm, *, seconds: float, size: int = 300) -> Idle:
    """Relay one message, then watch for so long. Statements are counted in PostgreSQL's log."""
    async with stage.run(Rows(1, size)) as run, prepared(arm, run):
        await writers.prepare(run, arm, size)
        alone = stage.cpu([])
        await asyncio.sleep(seconds / 2)
        alone_percent = (stage.cpu([]) - alone).postgresql / (seconds / 2) * 100
        async with connected(run.database_url) as connection:
            # For sessions from now on, and nobody but the relay opens one.
            await connection.execute(f"ALTER DATABASE {run.database} SET log_min_duration_statement = 0")
            async with Arrivals(run).read() as arrivals:
                await arm.start(run)
                await connection.fetch("SELECT bench_write(1, 1)")
                await arrivals.all_of([1])
        await asyncio.sleep(_CALM_SECONDS)
        said, cpu = stage.postgres_log.stat().st_size, stage.cpu(arm.pids)
        await asyncio.sleep(seconds)
        used = stage.cpu(arm.pids) - cpu
        with stage.postgres_log.open() as log:
            log.seek(said)
            statements = executed(log.read())
        relay, postgresql = used.relay / seconds * 100, used.postgresql / seconds * 100
        return Idle(
            cpu_percent=relay + max(0.0, postgresql - alone_percent),
            relay_cpu_percent=relay,
            postgresql_cpu_percent=postgresql,
            statements_per_second=statements / seconds,
            rss_mb=peak_rss_mb(arm.pids),
        )


def executed(log: str) -> int:
    """How many statements a log has; parsing and binding are logged too, and don't count."""
    return len(re.findall(r"LOG:  duration: \S+ ms  (?:execute |statement: )", log))
