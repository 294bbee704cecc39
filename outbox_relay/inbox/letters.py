"""What the dead-letter topic gets: the message as it came, and what became of it in further headers."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaProducer

from outbox_relay.inbox.abandoning import abandon

_LONGEST_REASON = 1_000
_BURY_SECONDS = 30.0
# What the topic takes is said by its own max.message.bytes; a limit here would only hold up what it takes.
_LARGEST_REQUEST = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Letter:
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


def letter(message: Any, error: Exception, attempts: int) -> Letter:
    """``dead-reason`` has the error's text, 1,000 characters at most."""
    about = {
        "dead-reason": f"{type(error).__name__}: {error}"[:_LONGEST_REASON],
        "dead-attempts": str(attempts),
        "dead-topic": message.topic,
        "dead-partition": str(message.partition),
        "dead-offset": str(message.offset),
    }
    headers = [*message.headers, *((name, text.encode("utf-8", "replace")) for name, text in about.items())]
    # A message with neither key nor value can't be sent by aiokafka.
    value = b"" if message.value is None and message.key is None else message.value
    return Letter(message.key, value, headers)


class DeadLetterTopic:
    """``settings`` are arguments of aiokafka's producer. Raises TypeError for one that it doesn't know."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self._settings = {"enable_idempotence": True, "max_request_size": _LARGEST_REQUEST, **settings}
        # Now, and not when the first letter is to be written.
        inspect.signature(AIOKafkaProducer).bind(**self._settings)
        self._one_at_a_time = asyncio.Lock()

    async def bury(self, message: Any, error: Exception, attempts: int) -> None:
        """Returns once Kafka has the letter. Raises what kept it from that; then it may be there or not.

        A producer for each letter: they are rare, and one that has failed is in doubt.
        """
        dead = letter(message, error, attempts)
        async with self._one_at_a_time, asyncio.timeout(_BURY_SECONDS):
            producer = AIOKafkaProducer(**self._settings)
            try:
                await producer.start()
                await producer.send_and_wait(self.name, dead.value, dead.key, headers=dead.headers)
            finally:
                await abandon(producer)
