"""What operators see: one method an event, so that names and fields stand in one place.

Ids go into logs, keys and payloads never do.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import structlog

from outbox_relay.message import Delivered, Outcome, Record, Retry

PROGRESS_INTERVAL_SECONDS = 10.0
#: An outage that lasts is repeated this seldom.
REPEAT_INTERVAL_SECONDS = 30.0


class Telemetry:
    """Events of one relay process as structured log lines."""

    def __init__(self, **context: Any) -> None:
        self._log = structlog.get_logger("outbox_relay").bind(**context)
        self._outages: dict[str, tuple[float, float]] = {}  # what -> (began, last said), monotonic seconds
        self._delivered = 0
        self._not_delivered = 0
        self._progress_from = time.monotonic()

    # -- the process

    def starting(self, **settings: Any) -> None:
        self._log.info("relay.starting", **settings)

    def stopping(self, signal: str, grace_seconds: float) -> None:
        self._log.info("relay.stopping", signal=signal, grace_seconds=grace_seconds)

    def forced(self, reason: str) -> None:
        self._log.warning("relay.forced", reason=reason, hint="claims in flight will be published again")

    def stopped(self) -> None:
        self._say_progress(time.monotonic())
        self._log.info("relay.stopped")

    # -- outages: one line at the start, one now and then, one at the end

    def database_unavailable(self, error: BaseException) -> None:
        self._outage("database", error)

    def database_available(self) -> None:
        self._outage_over("database")

    def kafka_unavailable(self, error: BaseException) -> None:
        self._outage("kafka", error)

    def kafka_available(self) -> None:
        self._outage_over("kafka")

    def _outage(self, what: str, error: BaseException) -> None:
        now = time.monotonic()
        began, said = self._outages.get(what, (now, 0.0))
        if not said or now - said >= REPEAT_INTERVAL_SECONDS:
            said = now
            self._log.warning(
                f"{what}.unavailable",
                error=type(error.__cause__ or error).__name__,
                reason=str(error),
                since_seconds=round(now - began, 1),
            )
        self._outages[what] = (began, said)

    def _outage_over(self, what: str) -> None:
        outage = self._outages.pop(what, None)
        if outage is not None:
            self._log.info(f"{what}.available", after_seconds=round(time.monotonic() - outage[0], 1))

    # -- ownership

    def registered(self, relay_id: int, direct: bool) -> None:
        self._log.info("relay.registered", relay_id=relay_id, direct=direct)

    def slots_taken(self, slots: Collection[int], owned: int) -> None:
        self._log.info("slots.taken", slots=sorted(slots), owned=owned)

    def slots_released(self, slots: Collection[int], owned: int) -> None:
        self._log.info("slots.released", slots=sorted(slots), owned=owned)

    def slots_lost(self, slots: Collection[int], reason: str) -> None:
        self._log.warning("slots.lost", slots=sorted(slots), reason=reason)

    # -- rows

    def claimed(self, records: Sequence[Record]) -> None:
        self._log.debug("claim.made", rows=len(records), ids=[record.id for record in records])

    def published(self, outcomes: Sequence[Outcome]) -> None:
        delivered = [outcome.record.id for outcome in outcomes if isinstance(outcome, Delivered)]
        self._log.debug("claim.published", delivered=len(delivered), ids=delivered)
        self._delivered += len(delivered)
        self._not_delivered += len(outcomes) - len(delivered)
        now = time.monotonic()
        if now - self._progress_from >= PROGRESS_INTERVAL_SECONDS:
            self._say_progress(now)

    def _say_progress(self, now: float) -> None:
        if self._delivered or self._not_delivered:
            self._log.info(
                "relay.progress",
                delivered=self._delivered,
                not_delivered=self._not_delivered,
                per_second=round(self._delivered / max(0.001, now - self._progress_from), 1),
            )
        self._delivered = self._not_delivered = 0
        self._progress_from = now

    def settled(self, ids: Sequence[int]) -> None:
        self._log.debug("claim.settled", rows=len(ids), ids=ids)

    def settle_postponed(self, ids: Sequence[int]) -> None:
        self._log.warning(
            "settle.postponed",
            rows=len(ids),
            first_id=ids[0],
            reason="published, but another session has the rows locked; they will be marked when it lets go",
        )

    def claim_dropped(self, rows: int, reason: str) -> None:
        self._log.warning("claim.dropped", rows=rows, reason=reason)

    def key_locked(self, record_id: int, topic: str) -> None:
        self._log.info(
            "key.locked",
            id=record_id,
            topic=topic,
            reason="another session has the row locked; its key waits, other keys go on",
        )

    def refused(self, retry: Retry, attempts: int, retry_in_seconds: float) -> None:
        self._log.warning(
            f"{retry.scope.value}.refused",
            id=retry.record.id,
            event_id=retry.record.event_id,
            topic=retry.record.topic,
            error=retry.error,
            reason=retry.reason,
            attempts=attempts,
            retry_in_seconds=round(retry_in_seconds, 3),
        )

    # -- publishing

    def publish_slow(self, rows: int, waited_seconds: float) -> None:
        self._log.warning(
            "publish.slow",
            rows=rows,
            waited_seconds=round(waited_seconds, 1),
            reason="Kafka hasn't answered yet; the relay waits on",
        )

    def publish_answered(self, rows: int, waited_seconds: float) -> None:
        """Only after :meth:`publish_slow`."""
        self._log.info("publish.answered", rows=rows, after_seconds=round(waited_seconds, 1))

    def publish_abandoned(self, rows: int, waited_seconds: float) -> None:
        self._log.error(
            "publish.abandoned",
            rows=rows,
            waited_seconds=waited_seconds,
            reason="Kafka didn't answer before the deadline; the rows may be published again",
        )
        # What is said of the outage, if it is one, counts from when Kafka fell silent.
        self._outages.setdefault("kafka", (time.monotonic() - waited_seconds, 0.0))

    def publish_failed(self, topic: str, partition: int, rows: int, error: str) -> None:
        self._log.warning("publish.failed", topic=topic, partition=partition, rows=rows, error=error)
