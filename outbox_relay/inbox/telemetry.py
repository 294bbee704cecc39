"""What operators see of a consumer: one method an event, as for the relay. ``docs/logs.md`` lists them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from outbox_relay.errors import MissingMessageIdError, NoHandlerError, NotInTransactionError

_PROGRESS_SECONDS = 10.0
_LONGEST_REASON = 1_000
#: Errors of the project's own, whose text has names and numbers, but no key and no payload.
_TELLABLE = (MissingMessageIdError, NoHandlerError, NotInTransactionError)


class Telemetry:
    """Events of one ``Consumer`` or ``Transformer``. Keys and payloads are never logged."""

    def __init__(self, **context: Any) -> None:
        self._log = structlog.get_logger("outbox_relay.inbox").bind(**context)
        self._handled = self._repeated = self._failed = self._dead = 0
        self._said_at = time.monotonic()

    def handled(self, new: int, repeated: int) -> None:
        self._handled += new
        self._repeated += repeated

    def say_progress(self, lag: Callable[[], int], *, is_last: bool = False) -> None:
        """Now and then, and only where there was something."""
        now = time.monotonic()
        counts = self._handled, self._repeated, self._failed, self._dead
        if not any(counts) or (now - self._said_at < _PROGRESS_SECONDS and not is_last):
            return
        self._log.info(
            "consumer.progress",
            handled=self._handled,
            repeated=self._repeated,
            failed=self._failed,
            dead=self._dead,
            lag=lag(),
            seconds=round(now - self._said_at, 3),
        )
        self._handled = self._repeated = self._failed = self._dead = 0
        self._said_at = now

    def partition_assigned(self, topic: str, partition: int) -> None:
        self._log.info("partition.assigned", topic=topic, partition=partition)

    def partition_revoked(self, topic: str, partition: int, abandoned: int) -> None:
        self._log.info("partition.revoked", topic=topic, partition=partition, abandoned=abandoned)

    def partition_paused(self, topic: str, partition: int, waiting: int) -> None:
        self._log.debug("partition.paused", topic=topic, partition=partition, waiting=waiting)

    def partition_resumed(self, topic: str, partition: int) -> None:
        self._log.debug("partition.resumed", topic=topic, partition=partition)

    def message_failed(self, message: Any, error: Exception, attempts: int, retry_in_seconds: float) -> None:
        self._failed += 1
        self._log.warning(
            "message.failed",
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            error=type(error).__name__,
            reason=_reason(error),
            attempts=attempts,
            retry_in_seconds=retry_in_seconds,
        )

    def message_dead(self, message: Any, error: Exception, attempts: int, dead_letter_topic: str) -> None:
        self._dead += 1
        self._log.error(
            "message.dead",
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            error=type(error).__name__,
            reason=_reason(error),
            attempts=attempts,
            dead_letter_topic=dead_letter_topic,
        )

    def message_unburied(self, message: Any, error: Exception, dead_letter_topic: str) -> None:
        self._log.error(
            "message.unburied",
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            error=type(error).__name__,
            dead_letter_topic=dead_letter_topic,
        )

    def message_unmarked(self, message: Any, error: Exception) -> None:
        self._log.warning(
            "message.unmarked",
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            error=type(error).__name__,
        )

    def batch_failed(self, messages: Sequence[Any], error: Exception) -> None:
        self._log.warning(
            "batch.failed",
            topic=messages[0].topic,
            partition=messages[0].partition,
            first_offset=messages[0].offset,
            messages=len(messages),
            error=type(error).__name__,
        )

    def consumer_not_closed(self, after_seconds: float) -> None:
        self._log.warning("consumer.not_closed", after_seconds=after_seconds)

    def offset_unread(self, topic: str, partition: int, error: Exception) -> None:
        self._log.warning("offset.unread", topic=topic, partition=partition, error=type(error).__name__)

    def offsets_uncommitted(self, error: Exception) -> None:
        self._log.warning("offsets.uncommitted", error=type(error).__name__)

    def transaction_failed(self, topic: str, partition: int, error: Exception, retry_in_seconds: float) -> None:
        self._log.warning(
            "transaction.failed",
            topic=topic,
            partition=partition,
            error=type(error).__name__,
            retry_in_seconds=retry_in_seconds,
        )


def _reason(error: Exception) -> str:
    if isinstance(error, _TELLABLE):
        return str(error)[:_LONGEST_REASON]
    return "its text may quote the message, so it isn't logged"
