"""Sources with what stands behind them, so that one suite can hold the fake and the real one to the protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Set
from typing import Protocol

import asyncpg
from sqlalchemy import make_url

from outbox_relay import schema
from outbox_relay.failures import Policies
from outbox_relay.message import Record
from outbox_relay.relay import Poll, Source
from outbox_relay.retry import Backoff
from outbox_relay.source import session
from outbox_relay.source.polling import CLAIM_BYTES, PollingSource
from outbox_relay.source.session import Session
from outbox_relay.source.slots import Slots
from outbox_relay.telemetry import Telemetry
from tests.conftest import Database
from tests.fakes import MemoryOutbox, MemorySource
from tests.waiting import eventually

BACKOFF = Backoff(0.05, 0.05)
POLICIES = Policies(BACKOFF)


class SourceWorld(Protocol):
    """An outbox, its relays, and everybody else who touches it."""

    async def insert(self, *records: Record) -> None: ...

    async def sent(self) -> set[int]:
        """The rows that are marked, or deleted because they were sent."""
        ...

    async def source(self, *, batch_rows: int = 100) -> Source:
        """The source of one more relay."""
        ...

    def locked(self, ids: Collection[int]) -> contextlib.AbstractAsyncContextManager[None]:
        """Another session has these rows locked."""
        ...

    def unreachable(self) -> contextlib.AbstractAsyncContextManager[None]:
        """No relay gets at the outbox."""
        ...

    async def take_away(self) -> None:
        """Whatever relays own, they own no more."""
        ...

    async def close(self) -> None: ...


class MemoryWorld:
    """The fake."""

    def __init__(self) -> None:
        self._outbox = MemoryOutbox()

    async def insert(self, *records: Record) -> None:
        self._outbox.insert(*records)

    async def sent(self) -> set[int]:
        return set(self._outbox.sent)

    async def source(self, *, batch_rows: int = 100) -> Source:
        return MemorySource(self._outbox, batch_rows=batch_rows, backoff=BACKOFF)

    @contextlib.asynccontextmanager
    async def locked(self, ids: Collection[int]) -> AsyncIterator[None]:
        self._outbox.locked.update(ids)
        yield
        self._outbox.locked.difference_update(ids)

    @contextlib.asynccontextmanager
    async def unreachable(self) -> AsyncIterator[None]:
        self._outbox.reachable = False
        yield
        self._outbox.reachable = True

    async def take_away(self) -> None:
        self._outbox.give_to(None)

    async def close(self) -> None:
        pass


class PostgresWorld:
    """PollingSource on PostgreSQL, each with slots of its own, as in a relay process of one lane."""

    def __init__(
        self, database: Database, connection: asyncpg.Connection, admin: asyncpg.Connection, *, deletes_sent: bool
    ) -> None:
        self._database = database
        self._connection = connection
        self._admin = admin
        self._deletes_sent = deletes_sent
        self._inserted: set[int] = set()
        self._name = make_url(database.url).database
        self._relays: list[tuple[PollingSource, Slots, asyncio.Task[None]]] = []

    @classmethod
    async def open(cls, database: Database, admin_url: str, *, deletes_sent: bool = False) -> PostgresWorld:
        connection = await database.connect()
        await schema.apply(connection)
        return cls(database, connection, await asyncpg.connect(admin_url), deletes_sent=deletes_sent)

    async def insert(self, *records: Record) -> None:
        self._inserted.update(each.id for each in records)
        await self._connection.executemany(
            "INSERT INTO outbox (id, event_id, topic, key, payload) VALUES ($1, $2, $3, $4, $5)",
            [
                (each.id, each.event_id, each.topic, None if each.key is None else each.key.decode(), each.value)
                for each in records
            ],
        )

    async def sent(self) -> set[int]:
        rows = await self._connection.fetch("SELECT id, sent_at IS NOT NULL AS is_marked FROM outbox")
        if not self._deletes_sent:
            return {row["id"] for row in rows if row["is_marked"]}
        assert not any(row["is_marked"] for row in rows)
        return self._inserted - {row["id"] for row in rows}

    async def source(
        self,
        *,
        batch_rows: int = 100,
        claim_bytes: int = CLAIM_BYTES,
        policies: Policies = POLICIES,
        lane_database: session.Database | None = None,
    ) -> PollingSource:
        database = session.Database(self._database.url, 5.0, 5.0)
        telemetry = Telemetry()
        slots = Slots(
            Session(database, "outbox-relay heartbeat"),
            telemetry,
            name="test",
            lanes=1,
            lease_seconds=60.0,
            heartbeat_seconds=0.05,
            poll=Poll(0.05, 0.05),
            layout_buckets=64,
            layout_slots=16,
        )
        source = PollingSource(
            Session(lane_database or database, "outbox-relay lane"),
            slots,
            0,
            telemetry,
            layout_buckets=64,
            layout_slots=16,
            batch_rows=batch_rows,
            claim_bytes=claim_bytes,
            policies=policies,
            deletes_sent=self._deletes_sent,
        )
        self._relays.append((source, slots, asyncio.create_task(slots.run())))
        return source

    @contextlib.asynccontextmanager
    async def locked(self, ids: Collection[int]) -> AsyncIterator[None]:
        stranger = await self._database.connect()
        async with stranger.transaction():
            await stranger.execute("SELECT FROM outbox WHERE id = ANY ($1) FOR UPDATE", list(ids))
            yield

    @contextlib.asynccontextmanager
    async def unreachable(self) -> AsyncIterator[None]:
        await self._admin.execute(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS false")
        await self._admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = $1 AND application_name LIKE 'outbox-relay %'",
            self._name,
        )
        yield
        await self._admin.execute(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS true")

    async def take_away(self) -> None:
        await self._connection.execute("UPDATE outbox_slot SET owner = NULL, epoch = epoch + 1")

    async def paused(self, topics: Set[str]) -> None:
        """Wait until every relay knows that these topics are paused, and no others."""
        for _, slots, _ in self._relays:
            await eventually(lambda s=slots: s.paused_topics == topics, "the heartbeat has said so")  # type: ignore[misc]

    async def freeze_heartbeats(self) -> None:
        """No relay learns any more what becomes of its slots."""
        for _, _, heartbeat in self._relays:
            heartbeat.cancel()
            await asyncio.wait([heartbeat])

    async def close(self) -> None:
        await self.freeze_heartbeats()
        for source, slots, _ in self._relays:
            await slots.leave()
            await source.close()
        await self._admin.close()
