"""What the checks of PostgreSQL share: one read-only transaction, and what was found out on the way.

No check waits for a lock for more than a second, every statement has the relay's own timeout, and one that fails leaves
the others their turn.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeAlias

import asyncpg

from outbox_relay.checks.findings import Finding, Kind, finding
from outbox_relay.roles import granted
from outbox_relay.schema import Layout
from outbox_relay.source.session import what_it_says
from outbox_relay.source.statements import OutboxTable, quoted, topic_columns

LAYOUT = "outbox_layout"

_LOCK_TIMEOUT_MS = 1000

#: What SQL calls a relation: with its schema, unless anybody's psql finds it without.
NAME_OF = """(
    SELECT CASE nspname WHEN 'public' THEN quote_ident(relname) ELSE format('%I.%I', nspname, relname) END
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = {oid}
)"""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the relay's configuration asks of the server."""

    connections: int
    statement_timeout_seconds: float
    publish_deadline_seconds: float
    #: By ``relay.after_publish``.
    deletes_sent: bool
    #: By ``relay.retention_hours``.
    deletes_old: bool
    #: Dead rows, by ``relay.dead_letter_topic``.
    copies: bool


@dataclass(slots=True)
class Inspection:
    """``names`` are those of the relations, by their plain name, as SQL has to call them; ``columns`` the outbox's."""

    connection: asyncpg.Connection
    table: OutboxTable
    needs: Needs
    role: str = ""
    is_superuser: bool = False
    names: dict[str, str] = field(default_factory=dict)
    columns: dict[str, asyncpg.Record] = field(default_factory=dict)
    layout: Layout | None = None

    @property
    def outbox(self) -> str:
        return self.names[self.table.name]

    async def begin(self, search_path: str) -> None:
        timeout_ms = int(self.needs.statement_timeout_seconds * 1000)
        begin = (
            "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;"
            f"SET LOCAL statement_timeout = {timeout_ms};"
            f"SET LOCAL lock_timeout = {_LOCK_TIMEOUT_MS}"
        )
        if search_path:
            begin += f"; SET LOCAL search_path = {quoted(search_path)}"
        await self.connection.execute(begin)

    async def run(self, checks: Sequence[Check]) -> list[Finding]:
        """All that they find. Raises asyncpg's errors, OSError and TimeoutError where the session is lost."""
        findings: list[Finding] = []
        for check in checks:
            await self.connection.execute("SAVEPOINT unharmed")
            try:
                findings += [found async for found in check(self)]
            except asyncpg.PostgresError as error:
                if self.connection.is_closed():
                    raise
                said_by_server = said(error, self.needs.statement_timeout_seconds)
                findings.append(finding(Kind.DATABASE_FAILED, f"{said_by_server} ({check.__name__.replace('_', ' ')})"))
            await self.connection.execute("ROLLBACK TO SAVEPOINT unharmed")
        return findings

    async def quote(self, *names: str) -> list[str]:
        """As identifiers that are quoted only where they have to be."""
        statement = (
            "SELECT array_agg(quote_ident(n) ORDER BY place) FROM unnest($1::text[]) WITH ORDINALITY AS u (n, place)"
        )
        return list(await self.connection.fetchval(statement, list(names)))


Check: TypeAlias = Callable[[Inspection], AsyncIterator[Finding]]


def said(error: BaseException, timeout_seconds: float) -> str:
    """In one line."""
    return " ".join(what_it_says(error).split()) or f"no answer within {timeout_seconds:g} s"


def relations(table: OutboxTable) -> list[str]:
    """The tables that a relay works with, the outbox first."""
    return list(granted(table, "outbox_relay"))


def mapped(table: OutboxTable) -> list[tuple[str, str]]:
    """``(setting, column)`` of each column that the relay reads or writes."""
    names = [column.name for column in fields(table) if column.name not in ("name", "topic")]
    named = [(f"table.columns.{name}", getattr(table, name)) for name in names if getattr(table, name)]
    return [*named, *(("table.topic", column) for column in topic_columns(table.topic))]
