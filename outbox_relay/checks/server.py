"""The PostgreSQL server, and the role that the relay logs in with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from outbox_relay.checks.findings import Finding, Kind, finding
from outbox_relay.checks.inspection import Check, Inspection

OLDEST_MAJOR = 14
LONG_TRANSACTION_SECONDS = 300


async def the_server_s_version(inspection: Inspection) -> AsyncIterator[Finding]:
    number = await inspection.connection.fetchval("SELECT current_setting('server_version_num')::integer")
    if number < OLDEST_MAJOR * 10_000:
        found = f"the server is PostgreSQL {number // 10_000}"
        yield finding(Kind.POSTGRESQL_TOO_OLD, found, oldest=OLDEST_MAJOR)


async def the_role(inspection: Inspection) -> AsyncIterator[Finding]:
    row = await inspection.connection.fetchrow(
        """
        SELECT quote_ident(r.rolname) AS role, r.rolsuper, r.rolconnlimit, d.datconnlimit, d.datname
        FROM pg_roles r, pg_database d WHERE r.rolname = current_user AND d.datname = current_database()
        """
    )
    inspection.role, inspection.is_superuser = row["role"], row["rolsuper"]
    if inspection.is_superuser:
        yield finding(Kind.ROLE_SUPERUSER, f"the relay's role {inspection.role} is a superuser")
        return
    limits = {f"role {inspection.role}": row["rolconnlimit"], f"database {row['datname']}": row["datconnlimit"]}
    needed = inspection.needs.connections
    for whose, limit in limits.items():
        if 0 <= limit < needed:
            found = f"the {whose} may have {limit} connections at a time, and a relay opens {needed}"
            yield finding(Kind.CONNECTION_LIMIT, found, needed=needed)


async def settings(inspection: Inspection) -> AsyncIterator[Finding]:
    # As they are for a new session, whatever this one has set.
    rows = await inspection.connection.fetch("SELECT name, reset_val FROM pg_settings WHERE name = ANY ($1)", _SETTINGS)
    of = {row["name"]: row["reset_val"] for row in rows}
    if of["fsync"] == "off":
        yield finding(Kind.FSYNC_OFF, "fsync is off: a crash of the server's machine can destroy the database")
    if of["full_page_writes"] == "off":
        found = "full_page_writes is off: a crash of the server's machine can destroy pages"
        yield finding(Kind.FULL_PAGE_WRITES_OFF, found)
    if of["synchronous_commit"] == "off":
        found = "synchronous_commit is off: a crash takes back what was committed just before it"
        yield finding(Kind.SYNCHRONOUS_COMMIT_OFF, found)
    if of["autovacuum"] == "off":
        yield finding(Kind.AUTOVACUUM_OFF, "autovacuum is off", advice="set autovacuum = on in postgresql.conf")
    needs = inspection.needs
    for name, least_seconds, cut in (
        ("idle_session_timeout", needs.publish_deadline_seconds, "sessions that wait for Kafka"),
        ("transaction_timeout", needs.statement_timeout_seconds, "claims"),
        ("lock_timeout", needs.statement_timeout_seconds, "claims that wait for a hand-over"),
    ):
        milliseconds = int(of.get(name, 0))
        if 0 < milliseconds < least_seconds * 1000:
            least = f"{least_seconds:g}s"
            found = f"{name} is {milliseconds / 1000:g}s, below {least}: it ends {cut}"
            yield finding(Kind.TIMEOUT_TOO_SHORT, found, role=inspection.role, setting=name, least=least)


_SETTINGS = [
    *("fsync", "full_page_writes", "synchronous_commit", "autovacuum"),
    *("idle_session_timeout", "transaction_timeout", "lock_timeout"),
]


async def transactions(inspection: Inspection) -> AsyncIterator[Finding]:
    """Of other roles only where the relay's role may see them, as a member of pg_read_all_stats."""
    oldest = await inspection.connection.fetchrow(
        """
        SELECT a.pid, extract(epoch FROM now() - a.xact_start)::bigint AS seconds
        FROM pg_stat_activity a
        WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
          AND (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL)
          AND a.xact_start < now() - make_interval(secs => $1)
        ORDER BY a.xact_start LIMIT 1
        """,
        float(LONG_TRANSACTION_SECONDS),
    )
    if oldest is not None:
        pid, seconds = oldest["pid"], oldest["seconds"]
        found = f"the transaction of server process {pid} has been open for {seconds} s"
        yield finding(Kind.LONG_TRANSACTION, found, pid=pid)


CHECKS: Sequence[Check] = (the_server_s_version, the_role, settings, transactions)
