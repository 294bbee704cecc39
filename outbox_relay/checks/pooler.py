"""Whether a connection pooler sits between the relay and PostgreSQL, and what it does to the relay.

Told by trying, since poolers don't say: does a session keep its server process while another is in a transaction?
"""

from __future__ import annotations

import asyncio

import asyncpg

from outbox_relay.checks.findings import Finding, Kind, finding
from outbox_relay.source.session import Database

_NAME = "outbox-relay check"
#: How long one session waits for another's server process before it counts as shared.
_WAIT_SECONDS = 2.0


async def check(database: Database, connection: asyncpg.Connection) -> list[Finding]:
    """Raises asyncpg's errors, OSError and TimeoutError."""
    try:
        await connection.execute("BEGIN")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        # It ends the session, too.
        return [finding(Kind.POOLER_STATEMENT_MODE, "a pooler is in between that takes no transactions")]
    pid = await connection.fetchval("SELECT pg_backend_pid()")
    await connection.execute("ROLLBACK")
    if pid == connection.get_server_pid():
        return []
    # As the relay's: with statements that are prepared once and used again.
    one, other = await database.connect(_NAME), await database.connect(_NAME)
    try:
        return await _behind_a_pooler(one, other)
    finally:
        one.terminate()
        other.terminate()


async def _behind_a_pooler(one: asyncpg.Connection, other: asyncpg.Connection) -> list[Finding]:
    pid = await _pid(one)
    await other.execute("BEGIN")
    other_pid = await other.fetchval("SELECT pg_backend_pid()")
    lost = False
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            is_shared = other_pid == pid or await _pid(one) != pid
            if is_shared:
                await _pid(one)
    except TimeoutError:
        is_shared = True
    except asyncpg.PostgresError:
        is_shared = lost = True
    mode = "transaction" if is_shared else "session"
    findings = [finding(Kind.POOLER, f"a pooler is in between, in {mode} mode")]
    if lost:
        found = "the pooler loses prepared statements, of which every claim uses some"
        findings.append(finding(Kind.POOLER_PREPARED_STATEMENTS, found))
    return findings


async def _pid(connection: asyncpg.Connection) -> int:
    """Of the server process that a transaction of the session has now."""
    async with connection.transaction():
        return int(await connection.fetchval("SELECT pg_backend_pid()"))
