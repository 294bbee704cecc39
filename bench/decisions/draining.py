"""What it costs to relay a backlog, in CPU above all: that varies little where rates vary twofold."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from bench.cpu import cpu_seconds
from bench.decisions.lanes import Candidate, Watch, opened, relay_all
from bench.decisions.outboxes import connected, refill
from bench.measuring import ratios, spread
from outbox_relay import daemon
from outbox_relay.config import Config
from outbox_relay.relay import Publisher
from outbox_relay.servers import PostgresServer
from outbox_relay.source.polling import PollingSource
from outbox_relay.source.session import Session
from outbox_relay.telemetry import Telemetry

CPU_AND_RATE = ("PostgreSQL CPU, µs/message", "ratio", "relay CPU, µs/message", "ratio", "messages/s", "ratio")


@dataclass
class Drain:
    """Of each row, but for ``per_second`` and ``a_claim``."""

    database_cpu: float  #: µs
    relay_cpu: float  #: µs
    per_second: float
    wal_bytes: float
    index_bytes: float  #: before the drain
    statements: float
    a_claim: str  #: statements of a claim that found rows


async def drain(
    postgres: PostgresServer,
    candidate: Candidate,
    config: Config,
    topic: str,
    rows: int,
    keys: int,
    publisher: Callable[[Config, Telemetry], Publisher] = daemon._publisher,
) -> Drain:
    """Write so many rows, then have one process relay them."""
    watch = Watch()
    async with connected(config.database.url) as connection:
        await refill(connection, topic, rows, keys)
        index_bytes = await connection.fetchval("SELECT pg_relation_size('outbox_unsent')")
        async with opened(candidate, config, watch) as sources:
            statements = await _counted_statements(sources)
            wal = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
            database_cpu, relay_cpu = cpu_seconds(postgres.pid), time.process_time()
            async with asyncio.timeout(60):
                await relay_all(sources, config, watch, once=True, publisher=publisher)
            # Before the connections are closed: a backend is in no sum while the postmaster buries it.
            database_cpu, relay_cpu = cpu_seconds(postgres.pid) - database_cpu, time.process_time() - relay_cpu
            wal_bytes = int(await connection.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", wal))
    if not watch.delivered == watch.settled_rows == rows:
        raise RuntimeError(f"{candidate} delivered {watch.delivered} and marked {watch.settled_rows} of {rows} rows")
    return Drain(
        database_cpu / rows * 1e6,
        relay_cpu / rows * 1e6,
        rows / watch.seconds,
        wal_bytes / rows,
        index_bytes / rows,
        statements.total() / rows,
        ", ".join(f"{name} {number / watch.claims:.1f}" for name, number in statements.most_common()),
    )


def cpu_and_rate(found: Sequence[Drain], base: Sequence[Drain]) -> list[str]:
    """The cells of ``CPU_AND_RATE``; ratios round by round."""
    cells: list[str] = []
    for name, digits in (("database_cpu", 1), ("relay_cpu", 1), ("per_second", 0)):
        values = [getattr(one, name) for one in found]
        cells += [spread(values, digits), ratios(values, [getattr(one, name) for one in base])]
    return cells


async def _counted_statements(sources: Sequence[PollingSource]) -> Counter[str]:
    """From now on, the statements of all lanes by name, BEGIN and COMMIT included."""
    counter: Counter[str] = Counter()

    def count(query: Any) -> None:
        # asyncpg tells of these alone: the others are prepared.
        if query.query.startswith(("BEGIN", "COMMIT")):
            counter[query.query.partition(";")[0]] += 1

    for source in sources:
        (await source._session.connection()).add_query_logger(count)
        _count_fetches(source._session, counter)
    return counter


def _count_fetches(session: Session, counter: Counter[str]) -> None:
    fetch = session.fetch

    async def counted(statement: str, *arguments: Any) -> list[asyncpg.Record]:
        # Outside a transaction it calls itself within one.
        if (await session.connection()).is_in_transaction():
            counter[statement.lstrip("\n- ").partition("\n")[0]] += 1
        return await fetch(statement, *arguments)

    session.fetch = counted  # type: ignore[method-assign]
