"""Topics that somebody paused: their rows wait in ``outbox_parked`` until they are resumed.

Relays read ``outbox_pause`` with each heartbeat, so what they have claimed by then is still published.
"""

from __future__ import annotations

from outbox_relay import audit, schema
from outbox_relay.audit import Deed
from outbox_relay.errors import RefusedError
from outbox_relay.outbox_message import Message
from outbox_relay.source.session import Session

_PAUSE = """
-- pause
INSERT INTO outbox_pause (topic, reason) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING topic
"""

_PAUSED = """
-- find a pause
SELECT p.paused_at, p.reason FROM outbox_pause p WHERE p.topic = $1
"""

_RESUME = """
-- resume
DELETE FROM outbox_pause WHERE topic = $1 RETURNING paused_at
"""


async def pause(session: Session, topic: str, reason: str) -> None:
    """Have the topic's rows wait. Raises RefusedError where they do already, InvalidMessageError for what can't be a
    topic's name, and SourceUnavailableError and SchemaError."""
    Message(topic, b"")
    await _verify(session)
    async with audit.transaction(session):
        if not await session.fetch(_PAUSE, topic, reason):
            (paused,) = await session.fetch(_PAUSED, topic)
            raise RefusedError(f"{topic} is paused already, since {paused['paused_at']:%Y-%m-%d %H:%M:%S%z}")
        await audit.record(session, Deed("pause", f"topic {topic}", reason))


async def resume(session: Session, topic: str) -> None:
    """Let them go on; raises as :func:`pause` does."""
    await _verify(session)
    async with audit.transaction(session):
        if not await session.fetch(_RESUME, topic):
            raise RefusedError(f"{topic} isn't paused")
        await audit.record(session, Deed("resume", f"topic {topic}"))


async def _verify(session: Session) -> None:
    async with session.transaction():
        with session.unavailable("read outbox_layout"):
            await schema.verify(await session.connection())
