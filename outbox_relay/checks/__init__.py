"""``outbox-relay check``: connects to PostgreSQL and Kafka as the relay does, changes nothing, and says what is wrong.

Takes the configuration's timeouts at most: to connect to each server, for each statement, and for what Kafka is asked.
"""

from __future__ import annotations

import asyncpg

from outbox_relay.checks import backlog, kafka, pooler, privileges, server, tables
from outbox_relay.checks.backlog import TopicBacklog
from outbox_relay.checks.findings import Checked, Finding, Kind, finding
from outbox_relay.checks.inspection import Inspection, Needs, relations, said
from outbox_relay.checks.kafka import KafkaSettings
from outbox_relay.source.session import FAILURES, Database
from outbox_relay.source.statements import OutboxTable

__all__ = ["Checked", "Finding", "KafkaSettings", "Kind", "Needs", "run"]

_NAME = "outbox-relay check"

#: What keeps the rows from being read, or from being read at little cost.
_UNREADABLE = {
    Kind.SCHEMA_UNUSABLE,
    Kind.COLUMN_MISSING,
    Kind.COLUMN_TYPE,
    Kind.PRIVILEGE_MISSING,
    Kind.INDEX_MISSING,
    Kind.INDEX_INVALID,
    Kind.DATABASE_FAILED,
}


async def run(database: Database, table: OutboxTable, needs: Needs, settings: KafkaSettings) -> Checked:
    """All findings. Raises OSError where a file or a secret that the configuration names can't be read."""
    findings, waiting = await _database(database, table, needs)
    of_kafka = await kafka.check(settings, waiting)
    return Checked([*findings, *of_kafka.findings], of_kafka.topics)


async def _database(database: Database, table: OutboxTable, needs: Needs) -> tuple[list[Finding], list[TopicBacklog]]:
    try:
        connection = await database.connect(_NAME, statement_cache_size=0)
    except asyncpg.exceptions.TargetServerAttributeNotMatched:
        return [finding(Kind.DATABASE_READ_ONLY, "no server of database.url can be written to")], []
    except FAILURES as error:
        return [finding(Kind.DATABASE_UNREACHABLE, said(error, database.connect_timeout_seconds))], []
    findings: list[Finding] = []
    try:
        findings += await pooler.check(database, connection)
        if connection.is_closed():
            return findings, []
        inspection = Inspection(connection, table, needs)
        await inspection.begin(database.schema)
        findings += await inspection.run(server.CHECKS)
        findings += await inspection.run([tables.the_tables])
        if len(inspection.names) < len(relations(table)):
            return findings, []
        findings += await inspection.run([*tables.CHECKS, *privileges.CHECKS])
        if any(found.kind in _UNREADABLE for found in findings):
            return findings, []
        try:
            return findings, await backlog.read(inspection)
        except asyncpg.PostgresError as error:
            reason = f"{said(error, database.statement_timeout_seconds)} (the unsent rows)"
            return [*findings, finding(Kind.DATABASE_FAILED, reason)], []
    except FAILURES as error:
        findings.append(finding(Kind.DATABASE_FAILED, said(error, database.statement_timeout_seconds)))
        return findings, []
    finally:
        connection.terminate()
