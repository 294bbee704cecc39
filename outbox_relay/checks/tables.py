"""The tables, their columns and indexes, whatever they are called."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from outbox_relay import schema
from outbox_relay.checks.findings import Finding, Kind, finding
from outbox_relay.checks.inspection import LAYOUT, NAME_OF, Check, Inspection, mapped, relations
from outbox_relay.errors import SchemaError


async def the_tables(inspection: Inspection) -> AsyncIterator[Finding]:
    rows = await inspection.connection.fetch(
        f"""
        SELECT n, quote_ident(n) AS quoted, {NAME_OF.format(oid="to_regclass(quote_ident(n))")} AS found
        FROM unnest($1::text[]) AS n
        """,
        relations(inspection.table),
    )
    inspection.names = {row["n"]: row["found"] for row in rows if row["found"] is not None}
    if LAYOUT not in inspection.names:
        yield await _the_schema_is_missing(inspection)
        return
    for row in rows:
        if row["found"] is None:
            yield finding(Kind.TABLE_MISSING, f"there is no table {row['quoted']} where outbox_layout is")


async def _the_schema_is_missing(inspection: Inspection) -> Finding:
    elsewhere = await inspection.connection.fetchrow(
        """
        SELECT quote_ident(n.nspname) AS name, has_schema_privilege(n.oid, 'USAGE') AS usable
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relname = 'outbox_layout' AND c.relkind IN ('r', 'p')
        ORDER BY n.nspname LIMIT 1
        """
    )
    if elsewhere is not None and not elsewhere["usable"]:
        found = f"role {inspection.role} may not use the schema {elsewhere['name']}, which has the outbox"
        grant = f"USAGE ON SCHEMA {elsewhere['name']}"
        return finding(Kind.PRIVILEGE_MISSING, found, grant=grant, role=inspection.role)
    hint = f", but one in schema {elsewhere['name']}" if elsewhere is not None else ""
    return finding(Kind.SCHEMA_MISSING, f"there is no outbox schema on the search_path{hint}")


async def the_schema_s_version(inspection: Inspection) -> AsyncIterator[Finding]:
    if not await inspection.connection.fetchval(
        "SELECT has_table_privilege($1::regclass, 'SELECT')", inspection.names[LAYOUT]
    ):
        return  # said by the check of privileges
    try:
        inspection.layout = await schema.verify(inspection.connection)
    except SchemaError as error:
        found, _, advice = str(error).rpartition(": ")
        yield finding(Kind.SCHEMA_UNUSABLE, found, advice=advice)


async def columns(inspection: Inspection) -> AsyncIterator[Finding]:
    """Those that [table] names: there, of a type that can be relayed, and never null where null would be lost."""
    rows = await inspection.connection.fetch(
        """
        SELECT a.attname, quote_ident(a.attname) AS quoted, a.attnotnull,
               format_type(coalesce(nullif(t.typbasetype, 0), t.oid), NULL) AS type
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        WHERE a.attrelid = $1::regclass AND a.attnum > 0 AND NOT a.attisdropped
        """,
        inspection.outbox,
    )
    inspection.columns = {row["attname"]: row for row in rows}
    for setting, name in mapped(inspection.table):
        column = inspection.columns.get(name)
        if column is None:
            (quoted_name,) = await inspection.quote(name)
            found = f"{setting} names the column {quoted_name}, which {inspection.outbox} hasn't"
            yield finding(Kind.COLUMN_MISSING, found, setting=setting)
            continue
        what = "topic" if setting == "table.topic" else setting.rpartition(".")[2]
        where = f"the column {column['quoted']} of {inspection.outbox}, the {what},"
        types = _TYPES.get(what, ())
        if types and column["type"] not in types:
            found = f"{where} is {column['type']}"
            yield finding(Kind.COLUMN_TYPE, found, types=", ".join(types), setting=setting)
        if what in _AS_TEXT and column["type"] == "bytea":
            found = f"{where} is bytea, which would be relayed as hexadecimal digits"
            yield finding(Kind.COLUMN_TYPE, found, types="text, varchar, uuid or the like", setting=setting)
        if what in _NEVER_NULL and not column["attnotnull"]:
            found = f"{where} may be null, and such a row would never be published"
            yield finding(Kind.COLUMN_NULLABLE, found, table=inspection.outbox, column=column["quoted"])


_INTEGERS = ("bigint", "integer", "smallint")
_TIMES = ("timestamp with time zone", "timestamp without time zone", "date")
#: What the claim's SQL can use; the others, and the payload, may be anything that has a text.
_TYPES = {
    "id": _INTEGERS,
    "bucket": _INTEGERS,
    "headers": ("jsonb", "json", "text", "character varying"),
    "created_at": _TIMES,
    "sent_at": _TIMES,
    "parked_at": _TIMES,
}
_AS_TEXT = ("event_id", "key", "type", "topic")
_NEVER_NULL = ("id", "event_id", "bucket")


async def indexes(inspection: Inspection) -> AsyncIterator[Finding]:
    table = inspection.table
    bucket, id_, sent_at, parked_at = await inspection.quote(table.bucket, table.id, table.sent_at, table.parked_at)
    rows = await inspection.connection.fetch(
        f"""
        SELECT {NAME_OF.format(oid="i.indexrelid")} AS name, i.indisvalid AND i.indisready AS valid, i.indisunique,
               pg_get_expr(i.indpred, i.indrelid) AS predicate,
               ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY AS k (attnum, place)
                     JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                     WHERE k.place <= i.indnkeyatts ORDER BY k.place) AS columns
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
        WHERE i.indrelid = $1::regclass AND m.amname = 'btree'
        """,
        inspection.outbox,
    )
    unsent = [
        row
        for row in rows
        if row["columns"] == [table.bucket, table.id]
        and row["predicate"] == f"(({sent_at} IS NULL) AND ({parked_at} IS NULL))"
    ]
    unique = [row for row in rows if row["columns"] == [table.id] and row["indisunique"] and row["predicate"] is None]
    for found, purpose, needed in (
        (
            unsent,
            "over the unsent rows, so that each claim reads the whole table",
            f"INDEX CONCURRENTLY outbox_unsent ON {inspection.outbox} ({bucket}, {id_})"
            f" WHERE {sent_at} IS NULL AND {parked_at} IS NULL",
        ),
        (
            unique,
            f"that is unique over {id_} alone, so that each row is looked for in the whole table",
            f"UNIQUE INDEX CONCURRENTLY ON {inspection.outbox} ({id_})",
        ),
    ):
        if not found:
            yield finding(Kind.INDEX_MISSING, f"{inspection.outbox} has no index {purpose}", index=needed)
        elif not any(row["valid"] for row in found):
            said = f"the index {found[0]['name']} is invalid: building it failed, and no claim uses it"
            yield finding(Kind.INDEX_INVALID, said, index=found[0]["name"])


async def identity(inspection: Inspection) -> AsyncIterator[Finding]:
    """The order of ids is the order of messages, so no session may draw ids in advance."""
    row = await inspection.connection.fetchrow(
        f"""
        SELECT {NAME_OF.format(oid="s.seqrelid")} AS name, s.seqcache
        FROM pg_sequence s JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = s.seqrelid
        JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
        WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = $1::regclass AND a.attname = $2
        """,
        inspection.outbox,
        inspection.table.id,
    )
    if row is not None and row["seqcache"] != 1:
        found = (
            f"the sequence {row['name']} has CACHE {row['seqcache']}: each session draws so many ids at once, and then"
            " the later of two messages may have the lower id"
        )
        yield finding(Kind.IDENTITY_CACHE, found, sequence=row["name"])


async def autovacuum_of_the_table(inspection: Inspection) -> AsyncIterator[Finding]:
    if await inspection.connection.fetchval(
        """
        SELECT EXISTS (SELECT FROM pg_class c, pg_options_to_table(c.reloptions) o
                       WHERE c.oid = $1::regclass
                         AND o.option_name = 'autovacuum_enabled' AND NOT o.option_value::boolean)
        """,
        inspection.outbox,
    ):
        advice = f"ALTER TABLE {inspection.outbox} RESET (autovacuum_enabled)"
        yield finding(Kind.AUTOVACUUM_OFF, f"autovacuum is off for {inspection.outbox}", advice=advice)


CHECKS: Sequence[Check] = (the_schema_s_version, columns, indexes, identity, autovacuum_of_the_table)
