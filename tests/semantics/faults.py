"""Each fault, at the place where it does the most harm. All write twice HALF messages, and have them consumed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from outbox_relay.servers import KafkaServer
from tests.semantics.place import SECONDS, Place
from tests.waiting import eventually

HALF = 6
#: The offset of the message that meets the fault.
AT = 3
KILLED_AT = (1, 3, 5)

Fault: TypeAlias = Callable[[Place], Awaitable[None]]

# The relay marks in a transaction of its own, after it has published.
_HOLD_MARKS = """\
CREATE FUNCTION hold_marks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(4711);
    RETURN NULL;
END $$;
CREATE TRIGGER hold_marks BEFORE UPDATE ON outbox FOR EACH STATEMENT EXECUTE FUNCTION hold_marks();
"""
_IS_HELD = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted)"


async def none(place: Place) -> None:
    service = place.service()
    service.start()
    await place.write(2 * HALF)
    await place.consumed()
    await service.stop()


async def relay_killed(place: Place) -> None:
    """After it has published, and before it has marked."""
    service = place.service()
    service.start()
    async with place.connected() as connection:
        await connection.execute(_HOLD_MARKS)
        await connection.execute("SELECT pg_advisory_lock(4711)")
        await place.write(HALF)
        await eventually(lambda: connection.fetchval(_IS_HELD), "that the relay waits to mark", SECONDS)
        place.relay.kill()
    place.relay.start()
    await place.write(HALF)
    await place.consumed()
    await service.stop()


async def consumer_killed(place: Place) -> None:
    """Three times, between effect and offset, in whichever order the mode has them."""
    service = place.service()
    await place.write(HALF)
    for offset in KILLED_AT:
        service.start("between", offset, "wait")
        await service.in_trouble()
        service.kill()
    service.start()
    await place.write(HALF)
    await place.consumed()
    await service.stop()


async def consumer_frozen(place: Place) -> None:
    """Between effect and offset, until another has consumed all in its stead; then it goes on."""
    frozen, other = place.service(), place.service("second")
    frozen.start("between", AT, "freeze")
    await place.write(HALF)
    await frozen.frozen()
    other.start()
    await place.consumed()
    frozen.thaw()
    await place.write(HALF)
    await place.consumed()
    await frozen.stop()
    await other.stop()


async def handler_raises(place: Place) -> None:
    """Once, before its effect is committed."""
    service = place.service()
    service.start("handler", AT, "raise")
    await place.write(2 * HALF)
    await place.consumed()
    await service.stop()


async def postgres_killed(place: Place) -> None:
    """While a handler's transaction is open."""
    server = place.postgres.server
    assert server is not None
    service = place.service()
    service.start("handler", AT, "wait")
    await place.write(HALF)
    await service.in_trouble()
    await asyncio.to_thread(server.stop, "immediate")
    await asyncio.to_thread(server.start_again)
    service.go_on()
    await place.write(HALF)
    await place.consumed()
    await service.stop()


async def kafka_killed(place: Place) -> None:
    """Between effect and offset, and while half of the messages wait for the relay to publish them."""
    server = place.kafka.server
    assert isinstance(server, KafkaServer)
    service = place.service()
    service.start("between", AT, "wait")
    await place.write(HALF)
    await service.in_trouble()
    await asyncio.to_thread(server.kill)
    await place.write(HALF)
    await asyncio.to_thread(server.start_again)
    service.go_on()
    await place.consumed()
    await service.stop()


FAULTS: dict[str, Fault] = {
    "none": none,
    "relay killed": relay_killed,
    "consumer killed": consumer_killed,
    "consumer frozen": consumer_frozen,
    "handler raises": handler_raises,
    "PostgreSQL killed": postgres_killed,
    "Kafka killed": kafka_killed,
}
