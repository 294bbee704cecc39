"""What the relay's role may do: all that ``roles.sql`` has, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from outbox_relay.checks.findings import Finding, Kind, finding
from outbox_relay.checks.inspection import Check, Inspection, mapped
from outbox_relay.roles import granted


async def privileges_missing(inspection: Inspection) -> AsyncIterator[Finding]:
    async for found in _lacking(inspection, "outbox_relay", Kind.PRIVILEGE_MISSING):
        yield found
    if inspection.needs.copies:
        async for found in _lacking(inspection, "outbox_writer", Kind.PRIVILEGE_MISSING):
            yield found
    needs = inspection.needs
    if needs.deletes_sent or needs.deletes_old:
        kind = Kind.DELETE_PRIVILEGE_MISSING if needs.deletes_sent else Kind.RETENTION_PRIVILEGE_MISSING
        async for found in _lacking(inspection, "outbox_pruner", kind):
            yield found


async def _lacking(inspection: Inspection, role: str, kind: Kind) -> AsyncIterator[Finding]:
    """What ``roles.sql`` gives this role, and the relay's own hasn't."""
    read = dict.fromkeys(name for _, name in mapped(inspection.table) if name in inspection.columns)
    for name, privileges in granted(inspection.table, role).items():
        for privilege, columns in privileges.items():
            of = columns
            if name == inspection.table.name and privilege != "DELETE":
                # Of the outbox what the relay reads; and which columns aren't there is told by another check.
                of = [column for column in columns or read if column in inspection.columns]
                if not of:
                    continue
            missing = await _missing(inspection, name, privilege, of)
            if missing is None:
                continue
            what = f"{privilege} ({', '.join(missing)})" if missing else privilege
            relation = inspection.names[name]
            found = f"role {inspection.role} lacks {what} on {relation}"
            yield finding(kind, found, grant=f"{what} ON {relation}", role=inspection.role)


async def _missing(inspection: Inspection, name: str, privilege: str, of: list[str]) -> list[str] | None:
    """The columns that the privilege is missing for, none meaning the whole table; None: it is there."""
    has = await inspection.connection.fetchval(
        "SELECT has_table_privilege($1::regclass, $2)", inspection.names[name], privilege
    )
    if has:
        return None
    if not of:
        return []
    rows = await inspection.connection.fetch(
        """
        SELECT quote_ident(n) AS quoted FROM unnest($3::text[]) WITH ORDINALITY AS c (n, place)
        WHERE NOT has_column_privilege($1::regclass, n, $2) ORDER BY c.place
        """,
        inspection.names[name],
        privilege,
        of,
    )
    if privilege == "SELECT" and len(rows) == len(of):
        return []
    return [row["quoted"] for row in rows] or None


async def privileges_in_excess(inspection: Inspection) -> AsyncIterator[Finding]:
    if inspection.is_superuser:
        return
    if await inspection.connection.fetchval(
        "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = $1::regclass", inspection.outbox
    ):
        yield finding(Kind.ROLE_OWNER, f"the relay's role {inspection.role} owns {inspection.outbox}")
        return
    needs = inspection.needs
    roles = [
        "outbox_relay",
        *(["outbox_pruner"] if needs.deletes_sent or needs.deletes_old else []),
        *(["outbox_writer"] if needs.copies else []),
    ]
    for name, privileges in granted(inspection.table, *roles).items():
        excess = await _excess(inspection, name, privileges)
        if excess:
            relation = inspection.names[name]
            what = ", ".join(excess)
            found = f"role {inspection.role} has {what} on {relation}, which the relay doesn't need"
            yield finding(Kind.PRIVILEGE_EXCESS, found, grant=f"{what} ON {relation}", role=inspection.role)


async def _excess(inspection: Inspection, name: str, privileges: Mapping[str, list[str]]) -> list[str]:
    """What it may do to the table besides these."""
    relation = inspection.names[name]
    rows = await inspection.connection.fetch(
        """
        SELECT p FROM unnest($2::text[]) WITH ORDINALITY AS w (p, place)
        WHERE CASE WHEN p = 'INSERT' THEN has_any_column_privilege($1::regclass, p)
                   ELSE has_table_privilege($1::regclass, p) END
        ORDER BY place
        """,
        relation,
        [privilege for privilege in ("INSERT", "DELETE", "TRUNCATE") if privilege not in privileges],
    )
    excess = [row["p"] for row in rows]
    updated = privileges.get("UPDATE")
    if updated == []:
        return excess
    columns = await inspection.connection.fetch(
        """
        SELECT quote_ident(attname) AS quoted, has_table_privilege($1::regclass, 'UPDATE') AS whole FROM pg_attribute
        WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND NOT attname = ANY ($2::text[])
          AND has_column_privilege($1::regclass, attnum, 'UPDATE')
        ORDER BY attnum
        """,
        relation,
        updated or [],
    )
    if columns:
        names = ", ".join(row["quoted"] for row in columns)
        excess.append("UPDATE" if columns[0]["whole"] else f"UPDATE ({names})")
    return excess


async def row_security(inspection: Inspection) -> AsyncIterator[Finding]:
    for relation in inspection.names.values():
        if await inspection.connection.fetchval("SELECT row_security_active($1::regclass)", relation):
            found = (
                f"row level security hides rows of {relation} from role {inspection.role}, and they would wait for ever"
            )
            yield finding(Kind.ROW_SECURITY, found, table=relation)


CHECKS: Sequence[Check] = (privileges_missing, privileges_in_excess, row_security)
