"""The schema on a real PostgreSQL: what it refuses, how it is applied, and that ``tables.py`` says the same."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import NullPool, create_engine, make_url

from outbox_relay import roles, schema, tables, wake_up
from outbox_relay.errors import SchemaError
from outbox_relay.inbox import schema as inbox_schema
from outbox_relay.message import RESERVED_HEADERS
from tests.conftest import Database
from tests.waiting import eventually

REPOSITORY = Path(__file__).parents[2]


# --- schema.sql and tables.py say the same

CATALOGUE = {
    "tables": """
        SELECT relname, relkind, relpersistence, reloptions FROM pg_class
        WHERE relnamespace = $1::regnamespace ORDER BY relname
    """,
    "columns": """
        SELECT c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull,
               a.attidentity, a.attgenerated, a.attstorage, a.attcompression, n.nspname AS collation_schema,
               l.collname, pg_get_expr(d.adbin, d.adrelid) AS expression
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
             LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
             LEFT JOIN pg_collation l ON l.oid = a.attcollation
             LEFT JOIN pg_namespace n ON n.oid = l.collnamespace
        WHERE c.relnamespace = $1::regnamespace ORDER BY c.relname, a.attnum
    """,
    "constraints": """
        SELECT conrelid::regclass::text AS of, conname, contype, convalidated, pg_get_constraintdef(oid) AS definition
        FROM pg_constraint WHERE connamespace = $1::regnamespace ORDER BY conrelid::regclass::text, conname
    """,
    "indexes": """
        SELECT relname, pg_get_indexdef(c.oid) AS definition, indisunique, indisvalid
        FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
        WHERE relnamespace = $1::regnamespace ORDER BY relname
    """,
    "sequences": """
        SELECT relname, format_type(seqtypid, NULL) AS type, seqstart, seqincrement, seqmin, seqmax, seqcache, seqcycle
        FROM pg_class c JOIN pg_sequence s ON s.seqrelid = c.oid
        WHERE relnamespace = $1::regnamespace ORDER BY relname
    """,
}


async def catalogue_of(connection: asyncpg.Connection, namespace: str) -> dict[str, list[dict[str, Any]]]:
    """All that PostgreSQL knows about a schema's tables, without the schema's name."""
    await connection.execute(f"SET search_path = {namespace}")
    return {
        what: [
            {
                name: value.replace(f" ON {namespace}.", " ON ") if isinstance(value, str) else value
                for name, value in row.items()
            }
            for row in await connection.fetch(query, namespace)
        ]
        for what, query in CATALOGUE.items()
    }


async def test_schema_sql_and_the_tables_in_python_say_the_same(database: Database) -> None:
    connection = await database.connect()
    await connection.execute("CREATE SCHEMA from_sql; CREATE SCHEMA from_python")
    await connection.execute("SET search_path = from_sql")
    await connection.execute(schema.read_sql())
    engine = create_engine(
        make_url(database.url).set(drivername="postgresql+psycopg"),
        connect_args={"options": "-c search_path=from_python"},
        poolclass=NullPool,
    )
    await asyncio.to_thread(tables.metadata.create_all, engine)

    of_sql = await catalogue_of(connection, "from_sql")
    of_python = await catalogue_of(connection, "from_python")
    assert all(of_sql.values())
    for what in CATALOGUE:
        assert of_python[what] == of_sql[what], what


async def test_the_layout_row_agrees_with_the_tables_in_python(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    layout = await schema.verify(connection)
    assert (layout.buckets, layout.slots, layout.layout_number) == (tables.BUCKETS, tables.SLOTS, 1)
    assert layout.schema_version == schema.SCHEMA_VERSION
    assert f"version {schema.SCHEMA_VERSION}." in schema.read_sql().splitlines()[0]
    slots = await connection.fetch("SELECT slot, owner, epoch FROM outbox_slot ORDER BY slot")
    assert [tuple(row) for row in slots] == [(slot, None, 0) for slot in range(tables.SLOTS)]


async def test_every_version_above_the_first_has_its_upgrade() -> None:
    assert sorted(schema.UPGRADES) == list(range(2, schema.SCHEMA_VERSION + 1))


def test_the_wheel_carries_the_schema(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("outbox_relay/schema.sql").decode() == schema.read_sql()
        assert archive.read("outbox_relay/roles.sql").decode() == roles.read_sql()
        assert archive.read("outbox_relay/wake_up.sql").decode() == wake_up.read_sql()
        assert archive.read("outbox_relay/inbox.sql").decode() == inbox_schema.read_sql()
    assert schema.read_sql() == (REPOSITORY / "schema.sql").read_text("utf-8")


# --- what an INSERT may say

INSERT = "INSERT INTO outbox (topic, key, payload, headers) VALUES ($1, $2, $3, $4::text::jsonb) RETURNING id"


async def insert(
    connection: asyncpg.Connection,
    *,
    topic: str = "orders",
    key: str | None = "k",
    payload: bytes | None = b"",
    headers: str = "{}",
) -> None:
    await connection.execute(INSERT, topic, key, payload, headers)


@pytest.fixture
async def connection(outbox_database: Database) -> asyncpg.Connection:
    return await outbox_database.connect()


async def test_legal_topics_are_taken(connection: asyncpg.Connection) -> None:
    for topic in ("a", "Orders.v1_x-9", "...", ".a", "-", "a" * 249):
        await insert(connection, topic=topic)


async def test_illegal_topics_are_refused(connection: asyncpg.Connection) -> None:
    for topic in ("", ".", "..", "a" * 250, "a b", "a\n", "\na", "a\nb", "é", "a/b", "a:b", "٣"):
        with pytest.raises(asyncpg.CheckViolationError, match="outbox_topic_is_legal"):
            await insert(connection, topic=topic)


async def test_a_missing_topic_is_refused(connection: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.NotNullViolationError, match="topic"):
        await connection.execute("INSERT INTO outbox (key, payload) VALUES ('k', '')")


async def test_a_tombstone_needs_a_key(connection: asyncpg.Connection) -> None:
    await insert(connection, key="k", payload=None)
    await insert(connection, key="", payload=None)
    await insert(connection, key=None, payload=b"")
    with pytest.raises(asyncpg.CheckViolationError, match="outbox_tombstone_has_key"):
        await insert(connection, key=None, payload=None)


async def test_flat_headers_of_strings_are_taken(connection: asyncpg.Connection) -> None:
    for headers in ({}, {"a": "b"}, {"": ""}, {"a": '[1] {"b": null}', "ID": "x", "outbox_id": "x", "é": "日本"}):
        await insert(connection, headers=json.dumps(headers))


async def test_headers_that_are_no_flat_object_of_strings_are_refused(connection: asyncpg.Connection) -> None:
    values: tuple[object, ...] = (1, 1.5, True, None, [], ["b"], [["b"]], {}, {"b": "c"})
    for headers in (*({"ok": "b", "a": value} for value in values), [], ["a"], [{"a": "b"}], "a", 1, True, None):
        with pytest.raises(asyncpg.CheckViolationError, match="outbox_headers_are_flat_strings"):
            await insert(connection, headers=json.dumps(headers))


@pytest.mark.parametrize("name", RESERVED_HEADERS)
async def test_headers_that_the_relay_writes_are_refused(connection: asyncpg.Connection, name: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="outbox_headers_are_not_reserved"):
        await insert(connection, headers=json.dumps({"a": "b", name: "x"}))


async def test_plain_sql_needs_only_topic_and_payload(connection: asyncpg.Connection) -> None:
    row = await connection.fetchrow("INSERT INTO outbox (topic, payload) VALUES ('orders', '\\x00') RETURNING *")
    assert (row["id"], row["headers"], row["sent_at"]) == (1, "{}", None)
    assert row["event_id"].version == 4
    assert row["created_at"] is not None


async def test_the_layout_has_one_row_and_slots_that_divide_the_buckets(connection: asyncpg.Connection) -> None:
    for change in ("slots = 0", "slots = 48", "buckets = 65"):
        with pytest.raises(asyncpg.CheckViolationError, match="outbox_layout_slots_divide_buckets"):
            await connection.execute(f"UPDATE outbox_layout SET {change}")
    copy = "INSERT INTO outbox_layout (only_row, buckets, slots, schema_version, oldest_relay) VALUES ($1, 1, 1, 1, '')"
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(copy, True)
    with pytest.raises(asyncpg.CheckViolationError, match="outbox_layout_has_one_row"):
        await connection.execute(copy, False)


# --- buckets

# Stored rows keep their bucket for ever: a PostgreSQL that hashes otherwise would split a key over two.
BUCKET_OF_KEY = {
    "": 45,
    " ": 50,
    "a": 49,
    "A": 46,
    "42": 62,
    "order-1": 11,
    "order-2": 44,
    "customer/7": 6,
    "0190d7a4-5c6f-7b3a-9f00-0123456789ab": 18,
    "Zoë": 31,
    "日本": 22,
    "🙂": 54,
    "x" * 1000: 36,
}


async def test_a_key_has_the_bucket_that_it_always_had(connection: asyncpg.Connection) -> None:
    for key in BUCKET_OF_KEY:
        await insert(connection, key=key)
    rows = await connection.fetch("SELECT key, bucket FROM outbox")
    assert dict(map(tuple, rows)) == BUCKET_OF_KEY


async def test_a_key_has_one_bucket_whatever_the_topic(connection: asyncpg.Connection) -> None:
    for topic in ("a", "b", "c"):
        await insert(connection, topic=topic, key="order-1")
    assert await connection.fetchval("SELECT count(DISTINCT bucket) FROM outbox") == 1


async def test_rows_without_a_key_are_spread_over_all_buckets(connection: asyncpg.Connection) -> None:
    await connection.execute("INSERT INTO outbox (topic, payload) SELECT 'orders', '' FROM generate_series(1, 640)")
    rows = await connection.fetch("SELECT bucket, count(*) FROM outbox GROUP BY bucket ORDER BY bucket")
    assert [tuple(row) for row in rows] == [(bucket, 10) for bucket in range(tables.BUCKETS)]


async def test_keys_are_spread_over_all_buckets(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO outbox (topic, key, payload) SELECT 'orders', 'order-' || n, '' FROM generate_series(1, 6400) n"
    )
    counts = [row["count"] for row in await connection.fetch("SELECT count(*) FROM outbox GROUP BY bucket")]
    assert len(counts) == tables.BUCKETS
    assert min(counts) > 50
    assert max(counts) < 200


# --- apply

NOW = schema.SCHEMA_VERSION
STEPS = {
    NOW + 1: "ALTER TABLE outbox_relay ADD COLUMN host text; UPDATE outbox_layout SET oldest_relay = '99.0.0'",
    NOW + 2: "ALTER TABLE outbox_relay ALTER COLUMN host SET NOT NULL",
}


async def relations_of(connection: asyncpg.Connection) -> list[str]:
    rows = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY relname"
    )
    return [row["relname"] for row in rows]


async def test_apply_creates_the_schema_and_then_leaves_it_alone(database: Database) -> None:
    connection = await database.connect()
    created = await schema.apply(connection)
    layout = await schema.verify(connection)
    again = await schema.apply(connection)
    assert (created, str(created)) == (schema.Applied(None, NOW), f"created the outbox schema, version {NOW}")
    assert (again, str(again)) == (schema.Applied(NOW, NOW), f"the outbox schema is at version {NOW} already")
    assert await schema.verify(connection) == layout


async def test_apply_creates_in_the_first_schema_of_the_search_path(database: Database) -> None:
    connection = await database.connect()
    await connection.execute("CREATE TABLE outbox (theirs int)")
    await connection.execute("CREATE SCHEMA relay; SET search_path = relay, public")
    assert (await schema.apply(connection)).found is None
    assert (await schema.apply(connection)).found == NOW
    assert await connection.fetchval("SELECT count(*) FROM relay.outbox_layout") == 1
    assert await relations_of(connection) == ["outbox"]


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
async def test_a_second_apply_waits_for_the_first_and_sees_what_it_did(database: Database, isolation: str) -> None:
    first, second, watcher = [await database.connect() for _ in range(3)]
    await second.execute(f"SET default_transaction_isolation = '{isolation}'")

    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND pid = $1"
    async with first.transaction():
        assert (await schema.apply(first)).found is None
        other = asyncio.create_task(schema.apply(second))
        await eventually(
            lambda: watcher.fetchval(waiting, second.get_server_pid()), "the second apply waits for the lock"
        )
    async with asyncio.timeout(30):
        assert await other == schema.Applied(NOW, NOW)


async def test_many_applies_at_once_create_one_schema(database: Database) -> None:
    connections = [await database.connect() for _ in range(6)]
    applied = await asyncio.gather(*(schema.apply(connection) for connection in connections))
    assert sorted(each.found or 0 for each in applied) == [0, NOW, NOW, NOW, NOW, NOW]


async def test_apply_runs_the_missing_upgrades_in_order(connection: asyncpg.Connection) -> None:
    uuid = (await schema.verify(connection)).outbox_uuid
    upgraded = await schema.apply(connection, upgrades=STEPS)
    assert (upgraded, str(upgraded)) == (
        schema.Applied(NOW, NOW + 2),
        f"upgraded the outbox schema from version {NOW} to {NOW + 2}",
    )
    row = await connection.fetchrow("SELECT schema_version, oldest_relay, outbox_uuid FROM outbox_layout")
    assert tuple(row) == (NOW + 2, "99.0.0", uuid)
    assert await schema.apply(connection, upgrades=STEPS) == schema.Applied(NOW + 2, NOW + 2)


async def test_apply_on_an_empty_database_runs_the_upgrades_too(database: Database) -> None:
    connection = await database.connect()
    assert await schema.apply(connection, upgrades=STEPS) == schema.Applied(None, NOW + 2)
    assert await connection.fetchval("SELECT schema_version FROM outbox_layout") == NOW + 2


async def test_an_upgrade_that_fails_changes_nothing(connection: asyncpg.Connection) -> None:
    before = await relations_of(connection)
    steps = {NOW + 1: "CREATE TABLE half (n int)", NOW + 2: "SELECT 1 / 0"}
    with pytest.raises(asyncpg.DivisionByZeroError):
        await schema.apply(connection, upgrades=steps)
    assert await relations_of(connection) == before
    assert (await schema.verify(connection)).schema_version == NOW


async def test_a_schema_that_is_newer_than_the_release_is_left_alone(connection: asyncpg.Connection) -> None:
    await schema.apply(connection, upgrades=STEPS)
    with pytest.raises(SchemaError, match=f"version {NOW + 2}, .*knows none above {NOW}: apply with the newest"):
        await schema.apply(connection)
    assert await connection.fetchval("SELECT schema_version FROM outbox_layout") == NOW + 2


@pytest.mark.parametrize(
    "foreign",
    ["CREATE TABLE outbox (id int)", "CREATE VIEW outbox_slot AS SELECT 1", "CREATE TYPE outbox_relay AS ENUM ('a')"],
)
async def test_tables_of_others_are_named_and_left_alone(database: Database, foreign: str) -> None:
    connection = await database.connect()
    await connection.execute(foreign)
    before = await relations_of(connection)
    with pytest.raises(SchemaError, match=r"\"outbox\w*\" already exists, and it isn't outbox-relay's: rename it, or"):
        await schema.apply(connection)
    assert await relations_of(connection) == before


async def test_a_layout_table_of_others_is_named_and_left_alone(database: Database) -> None:
    connection = await database.connect()
    await connection.execute("CREATE TABLE outbox_layout (n int)")
    for act in (schema.apply, schema.verify):
        with pytest.raises(SchemaError, match=r"outbox_layout that isn't outbox-relay's: rename it, or"):
            await act(connection)
    assert await relations_of(connection) == ["outbox_layout"]


# --- verify


async def test_verify_says_how_to_make_a_missing_schema(database: Database) -> None:
    connection = await database.connect()
    with pytest.raises(SchemaError, match=r"no outbox schema in this database.*run `outbox-relay schema apply`"):
        await schema.verify(connection)


async def test_verify_finds_the_schema_by_search_path(database: Database) -> None:
    connection = await database.connect()
    await connection.execute("CREATE SCHEMA relay; SET search_path = relay")
    await schema.apply(connection)
    assert (await schema.verify(connection)).slots == tables.SLOTS
    await connection.execute("SET search_path = public")
    with pytest.raises(SchemaError, match="not on the search_path"):
        await schema.verify(connection)


@pytest.mark.parametrize("oldest", ["99.0.0", "0.9.4", "0.9.10", "0.10.0"])
async def test_verify_says_that_the_relay_is_too_old(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, oldest: str
) -> None:
    monkeypatch.setattr(schema, "__version__", "0.9.3")
    await connection.execute("UPDATE outbox_layout SET oldest_relay = $1, schema_version = 99", oldest)
    # What else a newer schema has changed is none of an old relay's business.
    await connection.execute("ALTER TABLE outbox_layout DROP COLUMN slots")
    with pytest.raises(SchemaError, match=f"this relay 0.9.3 is too old: the database needs {oldest} or newer"):
        await schema.verify(connection)


@pytest.mark.parametrize("oldest", ["0.8.99", "0.9", "0.9.3", "0.9.3rc1"])
async def test_a_newer_schema_that_this_release_can_work_with_is_taken(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, oldest: str
) -> None:
    monkeypatch.setattr(schema, "__version__", "0.9.3")
    await connection.execute("UPDATE outbox_layout SET oldest_relay = $1, schema_version = 99", oldest)
    assert (await schema.verify(connection)).schema_version == 99


async def test_verify_says_that_the_schema_is_too_old(connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE outbox_layout SET schema_version = 0")
    with pytest.raises(SchemaError, match=f"version 0, and this relay .* needs {NOW}: run `outbox-relay schema apply`"):
        await schema.verify(connection)


async def test_verify_says_that_the_layout_has_lost_its_row(connection: asyncpg.Connection) -> None:
    await connection.execute("DELETE FROM outbox_layout")
    with pytest.raises(SchemaError, match="lost its row: restore it"):
        await schema.verify(connection)


async def test_verify_says_that_the_oldest_relay_is_no_version(connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE outbox_layout SET oldest_relay = 'none'")
    with pytest.raises(SchemaError, match="oldest_relay is 'none', which is no version"):
        await schema.verify(connection)
