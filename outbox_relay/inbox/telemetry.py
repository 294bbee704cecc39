"""What operators see of a consumer: one method an event, as for the relay. ``docs/logs.md`` lists them."""

from __future__ import annotations

from typing import Any

import structlog


class Telemetry:
    """Events of one ``Consumer`` or ``Transformer``. Keys and payloads are never logged."""

    def __init__(self, **context: Any) -> None:
        self._log = structlog.get_logger("outbox_relay.inbox").bind(**context)

    def partition_assigned(self, topic: str, partition: int) -> None:
        self._log.info("partition.assigned", topic=topic, partition=partition)

    def partition_revoked(self, topic: str, partition: int, abandoned: int) -> None:
        self._log.info("partition.revoked", topic=topic, partition=partition, abandoned=abandoned)

    def partition_paused(self, topic: str, partition: int, waiting: int) -> None:
        self._log.debug("partition.paused", topic=topic, partition=partition, waiting=waiting)

    def partition_resumed(self, topic: str, partition: int) -> None:
        self._log.debug("partition.resumed", topic=topic, partition=partition)

    def message_failed(self, message: Any, error: Exception, attempts: int, retry_in_seconds: float) -> None:
        self._log.warning(
            "message.failed",
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            error=type(error).__name__,
            attempts=attempts,
            retry_in_seconds=retry_in_seconds,
        )

    def message_dead(self, message: Any, error: Exception, attempts: int, dead_letter_topic: str) -> None:
        self._log.error(
            "message.dead",
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            error=type(error).__name__,
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
