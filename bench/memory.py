"""How much memory the relay takes, whatever its rows are like, beside the bound that docs/operations.md states.

Each case has a relay of its own, so that the peak (``VmHWM``) is that case's and no other's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.arms import Arm, Run
from bench.cpu import peak_rss_mb
from bench.drain import RunFailedError, checked, prepared, reach, records_in, settled, write_backlog
from bench.idle import idle
from bench.ledger import Seen
from bench.rows import LargeRows, Rows, Spread
from bench.stage import Stage, connected
from outbox_relay.config import RelayConfig

#: As stated: what is claimed takes so many times ``max_in_flight_bytes``, and a row that is larger than the share of
#: its claim, which goes alone, so many times its size.
TIMES = 4
TIMES_ALONE = 7

#: What PostgreSQL would try to compress in vain, for longer than all else takes.
_UNCOMPRESSED = "ALTER TABLE outbox ALTER payload SET STORAGE EXTERNAL"
_MB = 2**20
_IDLE_SECONDS = 2.0
#: So often a row was refused before the peak is read: a second try may take more than the first.
_ATTEMPTS = 4
_PARKED_SECONDS = 60.0
_POLL_SECONDS = 0.1

_REFUSED = "SELECT error || ': ' || reason FROM outbox_parked WHERE attempts >= $1"


@dataclass(frozen=True)
class Case:
    """What is written; ``refused`` where Kafka doesn't take it."""

    name: str
    rows: Rows
    refused: bool = False


#: All on topics as Kafka makes them: of 1,048,588 bytes a batch, so that 1 MB is a million.
CASES = (
    Case("2 GB of 1 MB rows", LargeRows(2_000, 1_000_000)),
    Case("one row of 20 MB", LargeRows(1, 20_000_000, Spread.ONE), refused=True),
    Case("1,000,000 rows of 300 B, one key", LargeRows(1_000_000, 300, Spread.ONE)),
    Case("100,000 rows of 8 KB", LargeRows(100_000, 8_192)),
)
EIGHT_KB = CASES[-1].name


@dataclass(frozen=True)
class Taken:
    """What one case took; in this bench a MB of memory is 2**20 bytes."""

    row_bytes: int
    peak_mb: float
    bound_mb: float
    rate: float | None  #: messages a second, None where Kafka refuses
    reason: str | None  #: with which a row that Kafka refuses waits


@dataclass(frozen=True)
class Memory:
    """By case, and what an idle relay takes, with which each bound begins."""

    idle_mb: float
    cases: Mapping[str, Taken]


async def memory(stage: Stage, make: Callable[[], Arm], *, cases: tuple[Case, ...] = CASES) -> Memory:
    """An idle relay, then the cases one after the other. Raises :class:`RunFailedError`."""
    base = (await idle(stage, make(), seconds=_IDLE_SECONDS)).rss_mb
    return Memory(base, {case.name: await _taken(stage, make(), case, base) for case in cases})


async def _taken(stage: Stage, arm: Arm, case: Case, base_mb: float) -> Taken:
    rate = reason = None
    async with stage.run(case.rows) as run, prepared(arm, run), records_in(run) as written:
        async with connected(run.database_url) as connection:
            await connection.execute(_UNCOMPRESSED)
        await write_backlog(run, arm, case.rows)
        await arm.start(run)
        if case.refused:
            reason = await _parked(run)
        else:
            await reach(written, case.rows.count)
            await settled(stage, arm, run)
        peak = peak_rss_mb(arm.pids)
        await arm.stop()
        if not case.refused:
            records, _ = await checked(run, arm, complete=True)
            rate = _rate(records)
        elif count := await written():
            raise RunFailedError(f"Kafka has {count:,} of what it was to refuse")
    return Taken(case.rows.size, peak, base_mb + bound_of_rows_mb(case.rows.size), rate, reason)


def _rate(records: Sequence[Seen]) -> float:
    """Records a second, by the broker's clock."""
    times = [record.at_ms for record in records]
    return (len(times) - 1) / max(max(times) - min(times), 1) * 1000


def bound_of_rows_mb(size: int) -> float:
    """What rows of that size take at most beside an idle relay, with the settings that the relay ships with."""
    settings = RelayConfig()
    in_flight = settings.max_in_flight_bytes
    alone = size > in_flight / settings.claims_in_flight
    return (TIMES_ALONE * size if alone else TIMES * in_flight) / _MB


async def _parked(run: Run) -> str:
    """Wait until a row was refused often enough; why it is."""
    async with connected(run.database_url) as connection:
        deadline = time.monotonic() + _PARKED_SECONDS
        while time.monotonic() < deadline:
            reason = await connection.fetchval(_REFUSED, _ATTEMPTS)
            if reason is not None:
                return str(reason)
            await asyncio.sleep(_POLL_SECONDS)
    raise RunFailedError(f"a row that Kafka refuses isn't parked with its reason within {_PARKED_SECONDS:g} s")
