"""``kill -9`` again and again, while writers write: what was claimed and not marked at a kill repeats, no more."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

import asyncpg

from outbox_relay.servers import Kafka
from tests.acceptance.relays import Application, RelayProcess, compare, drained, new_topic, relay_process
from tests.conftest import Database
from tests.waiting import eventually

KILLS = 52
#: Every other kill is aimed at the time between publish and mark; it may miss now and then.
BETWEEN_PUBLISH_AND_MARK = 20
#: Written at least, and at most, which isn't reached: without rows nothing is in flight that a kill could hit.
LEAST_ROWS = 10_000
MOST_ROWS = 300_000


@dataclass
class Killer:
    """Kills relays, and keeps what each had claimed and not marked."""

    connection: asyncpg.Connection  #: for its own locks
    between_publish_and_mark: int = 0
    in_flight: Counter[int] = field(default_factory=Counter)  #: row id -> kills at which it was claimed and unmarked
    _born_at: dict[str, int] = field(default_factory=dict)  #: relay -> its events when it was started last

    async def kill_in_the_middle(self, relay: RelayProcess) -> None:
        """Right after it has claimed something."""
        claims = len(relay.events("claim.made"))
        await eventually(
            lambda: any(event["ids"] for event in relay.events("claim.made")[claims:]), f"{relay.name} claims something"
        )
        relay.kill()
        self._record(relay)

    async def kill_before_the_mark(self, relay: RelayProcess) -> None:
        """When it has published, and its next transaction, which would mark that, waits for a slot that we lock."""
        await eventually(lambda: self._killed_before_the_mark(relay), f"{relay.name} publishes, and waits for its slot")

    async def _killed_before_the_mark(self, relay: RelayProcess) -> bool:
        """False where it has no slot, or waits with nothing published, since it had found nothing to publish."""
        relay_id = relay.events("relay.registered")[-1]["relay_id"]
        async with self.connection.transaction():
            slots = await self.connection.fetch(
                "SELECT FROM outbox_slot WHERE owner = $1 ORDER BY slot LIMIT 1 FOR UPDATE", relay_id
            )
            if not slots:
                return False
            await eventually(lambda: self._waits(relay), f"{relay.name} waits for its slot")
            if not self._ids(relay, "claim.published") - self._ids(relay, "claim.settled"):
                return False
            relay.kill()
            published, settled = (self._ids(relay, name) for name in ("claim.published", "claim.settled"))
            unmarked = await self.connection.fetchval(
                "SELECT count(*) FROM outbox WHERE id = ANY ($1) AND sent_at IS NULL", list(published - settled)
            )
            self.between_publish_and_mark += bool(unmarked)
        self._record(relay)
        return True

    async def until_it_works(self, relay: RelayProcess) -> None:
        """Wait until it has claimed something since it was started."""
        await eventually(lambda: self._ids(relay, "claim.made"), f"{relay.name} claims")

    async def until_it_listens(self, relay: RelayProcess) -> None:
        """Wait until a signal is handled by it, and doesn't just end it."""
        await eventually(
            lambda: any(event["event"] == "relay.registered" for event in relay.events()[self._born_at[relay.name] :]),
            f"{relay.name} listens",
        )

    def starts(self, relay: RelayProcess) -> None:
        self._born_at[relay.name] = len(relay.events())
        relay.start()

    async def _waits(self, relay: RelayProcess) -> bool:
        # In a transaction pg_stat_activity shows the sessions that there were when it was read first, and the relay
        # may open another lane for what it waits for.
        await self.connection.execute("SELECT pg_stat_clear_snapshot()")
        waiting = await self.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE $1 AND wait_event_type = 'Lock'",
            f"outbox-relay {relay.name} lane%",
        )
        return bool(waiting)

    def _ids(self, relay: RelayProcess, name: str) -> set[int]:
        """Of the process that was started last."""
        events = relay.events()[self._born_at[relay.name] :]
        return {id_ for event in events if event.get("event") == name for id_ in event["ids"]}

    def _record(self, relay: RelayProcess) -> None:
        self.in_flight.update(self._ids(relay, "claim.made") - self._ids(relay, "claim.settled"))


async def test_only_what_was_in_flight_at_a_kill_is_repeated(outbox_database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    application = Application(outbox_database.url, topic)
    await application.prepare()
    connection = await outbox_database.connect()
    killer = Killer(await outbox_database.connect())
    with ExitStack() as stack:
        relays = [
            stack.enter_context(
                relay_process(outbox_database.url, kafka.bootstrap_servers, start=False, batch_rows=100)
            )
            for _ in range(3)
        ]
        for relay in relays:
            killer.starts(relay)
        done = asyncio.Event()
        writing = asyncio.create_task(keep_writing(application, done))
        for number in range(KILLS):
            victim = relays[number % len(relays)]
            await killer.until_it_works(victim)
            if number % 2:
                await killer.kill_before_the_mark(victim)
            else:
                await killer.kill_in_the_middle(victim)
            killer.starts(victim)
        done.set()
        await writing
        await drained(connection)
        for relay in relays:
            await killer.until_it_listens(relay)
        assert [await relay.stop() for relay in relays] == [0] * len(relays)
        for relay in relays:
            assert not relay.events("publish.abandoned")
            assert not relay.events("slots.lost")
    report = await compare(connection, kafka, topic)
    assert report.sound, report.describe()
    assert report.committed == application.committed_rows >= LEAST_ROWS
    assert killer.between_publish_and_mark >= BETWEEN_PUBLISH_AND_MARK
    assert report.duplicates > 0
    ids = {str(row["event_id"]): row["id"] for row in await connection.fetch("SELECT event_id, id FROM outbox")}
    repeats = {ids[event_id]: extra for event_id, extra in report.duplicate_ids.items()}
    unexplained = {id_: extra for id_, extra in repeats.items() if extra > killer.in_flight[id_]}
    assert not unexplained


async def keep_writing(application: Application, done: asyncio.Event) -> None:
    while application.committed_rows < (LEAST_ROWS if done.is_set() else MOST_ROWS):
        await application.write(200)
