"""What operators see: one method an event, so that names and fields stand in one place.

Ids go into logs, keys and payloads never do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

import structlog

from outbox_relay.errors import SourceRefusedError, SourceUnavailableError
from outbox_relay.message import Delivered, Outcome, Record, Retry, Scope

#: How often :meth:`Telemetry.progress` is to be called.
PROGRESS_INTERVAL_SECONDS = 10.0
#: An outage that lasts is repeated this seldom.
REPEAT_INTERVAL_SECONDS = 30.0
#: Of an outage, what is said at once.
_MOST_CAUSES = 10


class Telemetry:
    """Events of one relay process as structured log lines. Names and fields are stable; ``docs/logs.md`` lists them."""

    def __init__(self, **context: Any) -> None:
        log = structlog.get_logger("outbox_relay").bind(**context)
        self._log = log
        #: Said of every row, so not even put together where nobody wants to know.
        self._lists_ids: bool = log.is_enabled_for(logging.DEBUG)
        self._database = _Outage()
        self._schema = _Outage()
        self._kafka = _Outage()
        self._retention = _Outage()
        self._delivered = 0
        self._not_delivered = 0
        #: Of the first claim that is counted; None: nothing is, so that no idle time is.
        self._progress_from: float | None = None
        self._published_at = 0.0
        #: Claims whose answers aren't there, and since when there are some that nothing before counts.
        self._claims_out = 0
        self._out_since = 0.0

    # -- the process

    def starting(self, version: str, batch_rows: int, claims_in_flight: int) -> None:
        self._log.info("relay.starting", version=version, batch_rows=batch_rows, claims_in_flight=claims_in_flight)

    def stopping(self, signal: str, grace_seconds: float) -> None:
        self._log.info("relay.stopping", signal=signal, grace_seconds=grace_seconds)

    def forced(self, reason: str) -> None:
        self._log.warning("relay.forced", reason=reason)

    def left_unsettled(self, rows: int) -> None:
        self._log.warning(
            "relay.left_unsettled",
            rows=rows,
            reason="in flight, so they may be published once more",
        )

    def failed(self, error: BaseException) -> None:
        self._log.error("relay.failed", error=type(error).__name__, reason="a defect of outbox-relay", exc_info=error)

    def stopped(self, exit_code: int) -> None:
        self.progress()
        self._log.info("relay.stopped", exit_code=exit_code)

    # -- outages: one line at the start, one now and then, one at the end

    def database_unavailable(self, error: BaseException, by: object) -> None:
        """``by`` tells apart who uses the database: the outage is over when it works for all who met it."""
        if isinstance(error, SourceUnavailableError) and self._database.was_over(error.asked_at):
            return
        # What somebody has to mend is said at once, though the outage may have begun as a lost connection.
        since_seconds = self._database.met(by, str(error) if isinstance(error, SourceRefusedError) else None)
        if since_seconds is not None:
            self._log.warning(
                "database.unavailable", error=_name(error), reason=str(error), since_seconds=since_seconds
            )

    def database_available(self, by: object) -> None:
        after_seconds = self._database.over(by)
        if after_seconds is not None:
            self._log.info("database.available", after_seconds=after_seconds)

    def schema_unusable(self, error: BaseException) -> None:
        since_seconds = self._schema.met()
        if since_seconds is not None:
            self._log.warning("schema.unusable", reason=str(error), since_seconds=since_seconds)

    def schema_usable(self) -> None:
        after_seconds = self._schema.over()
        if after_seconds is not None:
            self._log.info("schema.usable", after_seconds=after_seconds)

    def kafka_unavailable(self, error: BaseException) -> None:
        since_seconds = self._kafka.met()
        if since_seconds is not None:
            self._log.warning("kafka.unavailable", error=_name(error), reason=str(error), since_seconds=since_seconds)

    def kafka_available(self) -> None:
        after_seconds = self._kafka.over()
        if after_seconds is not None:
            self._log.info("kafka.available", after_seconds=after_seconds)

    def retention_stalled(self, error: BaseException) -> None:
        since_seconds = self._retention.met()
        if since_seconds is not None:
            self._log.warning("retention.stalled", reason=str(error), since_seconds=since_seconds)

    def retention_resumed(self) -> None:
        after_seconds = self._retention.over()
        if after_seconds is not None:
            self._log.info("retention.resumed", after_seconds=after_seconds)

    # -- ownership

    def registered(self, relay_id: int, direct: bool, is_woken: bool) -> None:
        self._log.info("relay.registered", relay_id=relay_id, direct=direct, wake_up=is_woken)

    def slots_taken(self, slots: Collection[int], owned: int) -> None:
        self._log.info("slots.taken", slots=sorted(slots), owned=owned)

    def slots_released(self, slots: Collection[int], owned: int) -> None:
        self._log.info("slots.released", slots=sorted(slots), owned=owned)

    def slots_lost(self, slots: Collection[int], owned: int, reason: str) -> None:
        self._log.warning("slots.lost", slots=sorted(slots), owned=owned, reason=reason)

    def lanes_open(self, lanes: int) -> None:
        self._log.debug("lanes.open", lanes=lanes)

    # -- rows

    def claimed(self, records: Sequence[Record]) -> None:
        if records:
            now = time.monotonic()
            if not self._claims_out:
                self._out_since = now
            self._claims_out += 1
            if self._progress_from is None:
                self._progress_from = now
        if self._lists_ids:
            self._log.debug("claim.made", rows=len(records), ids=[record.id for record in records])

    def published(self, outcomes: Sequence[Outcome]) -> None:
        delivered = sum(isinstance(outcome, Delivered) for outcome in outcomes)
        if self._lists_ids:
            ids = [outcome.record.id for outcome in outcomes if isinstance(outcome, Delivered)]
            self._log.debug("claim.published", delivered=delivered, ids=ids)
        self._delivered += delivered
        self._not_delivered += len(outcomes) - delivered
        self._claims_out -= 1
        self._published_at = self._out_since = time.monotonic()

    def progress(self) -> None:
        """What was published since the last such line, if anything was."""
        if self._progress_from is None or not (self._delivered or self._not_delivered):
            return
        seconds = self._published_at - self._progress_from
        self._log.info(
            "relay.progress",
            delivered=self._delivered,
            not_delivered=self._not_delivered,
            seconds=round(seconds, 3),
            per_second=round(self._delivered / max(0.001, seconds), 1),
        )
        self._delivered = self._not_delivered = 0
        self._progress_from = self._out_since if self._claims_out else None

    def settled(self, ids: Collection[int]) -> None:
        if self._lists_ids:
            self._log.debug("claim.settled", rows=len(ids), ids=sorted(ids))

    def settle_postponed(self, ids: Sequence[int]) -> None:
        self._log.warning(
            "settle.postponed",
            rows=len(ids),
            first_id=ids[0],
            reason="published, but another session has the rows locked; they are settled when it lets go",
        )

    def row_unmarkable(self, record_id: int, error: BaseException, why: str, *, deleting: bool) -> None:
        what = "deleted" if deleting else "marked as sent"
        self._log.error(
            "row.unmarkable",
            id=record_id,
            error=type(error).__name__,
            reason=f"published, but PostgreSQL doesn't let it be {what} ({why}); it isn't published again while"
            " this relay runs: mend the constraint or trigger",
        )

    def row_stuck(self, record_id: int, error: BaseException, why: str) -> None:
        self._log.error(
            "row.stuck",
            id=record_id,
            error=type(error).__name__,
            reason=f"to be parked or tried again, but PostgreSQL doesn't let it be changed ({why}); it waits where it"
            " is, as do later rows of its key: mend the row, the constraint or the trigger",
        )

    def row_uncopied(self, record_id: int, topic: str, error: BaseException, why: str) -> None:
        self._log.error(
            "row.uncopied",
            id=record_id,
            dead_letter_topic=topic,
            error=type(error).__name__,
            reason=f"the row is dead, and PostgreSQL refuses its copy for the dead-letter topic ({why}): mend the"
            " constraint, the trigger or the unique index",
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
            "row.refused" if retry.scope is Scope.ROW else "topic.refused",
            id=retry.record.id,
            event_id=retry.record.event_id,
            topic=retry.record.topic,
            error=retry.error,
            reason=retry.reason,
            attempts=attempts,
            retry_in_seconds=round(retry_in_seconds, 3),
        )

    def dead(self, retry: Retry, attempts: int) -> None:
        self._log.error(
            "row.dead",
            id=retry.record.id,
            event_id=retry.record.event_id,
            topic=retry.record.topic,
            error=retry.error,
            reason=retry.reason,
            attempts=attempts,
        )

    def parked(self, rows: int) -> None:
        self._log.debug("rows.parked", rows=rows)

    def row_accepted(self, record: Record) -> None:
        """Only after :meth:`refused` or :meth:`dead` of that row."""
        self._log.info("row.accepted", id=record.id, event_id=record.event_id, topic=record.topic)

    def topic_accepted(self, topic: str) -> None:
        """Only after :meth:`refused` of that topic."""
        self._log.info("topic.accepted", topic=topic)

    def pruned(self, rows: int, seconds: float) -> None:
        self._log.info("rows.pruned", rows=rows, seconds=round(seconds, 1))

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
        self._kafka.began(waited_seconds)

    def publish_failed(self, topic: str, partition: int, rows: int, error: str) -> None:
        self._log.warning("publish.failed", topic=topic, partition=partition, rows=rows, error=error)


class _Outage:
    """When something that is needed doesn't work, and when that is to be said. Answers are in seconds."""

    def __init__(self) -> None:
        self._met_by: set[object] = set()
        self._began: float | None = None
        self._said: float | None = None
        self._causes: set[str] = set()
        self._ended: float | None = None

    def was_over(self, asked_at: float | None) -> bool:
        """Whether what was asked then, and failed later, failed for an outage that is over: it says nothing of now."""
        return self._ended is not None and asked_at is not None and asked_at < self._ended

    def began(self, ago_seconds: float) -> None:
        """It may turn out to be one; nothing is said yet."""
        if self._began is None:
            self._began = time.monotonic() - ago_seconds

    def met(self, by: object = None, cause: str | None = None) -> float | None:
        """How long it has lasted, if that is to be said now; a ``cause`` is, when it is met first."""
        now = time.monotonic()
        self._met_by.add(by)
        if self._began is None:
            self._began = now
        if not self._is_news(cause) and self._said is not None and now - self._said < REPEAT_INTERVAL_SECONDS:
            return None
        self._said = now
        return round(now - self._began, 1)

    def _is_news(self, cause: str | None) -> bool:
        if cause is None or cause in self._causes or len(self._causes) >= _MOST_CAUSES:
            return False
        self._causes.add(cause)
        return True

    def over(self, by: object = None) -> float | None:
        """How long it lasted, if it is over now for everybody."""
        self._met_by.discard(by)
        if self._began is None or self._met_by:
            return None
        self._ended = time.monotonic()
        lasted = self._ended - self._began
        self._began = self._said = None
        self._causes.clear()
        return round(lasted, 1)


def _name(error: BaseException) -> str:
    """Of what was met first: the project's own errors say in their message what that means."""
    return type(error.__cause__ or error).__name__
