"""The tables, defined once. ``schema.sql`` says the same with comments, which a test proves."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    Uuid,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from outbox_relay.message import RESERVED_HEADERS

BUCKETS = 64
SLOTS = 16

metadata = MetaData()

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(cache=1)),
    Column("event_id", Uuid, nullable=False, server_default=text("gen_random_uuid()")),
    Column("topic", Text, nullable=False),
    Column("key", Text(collation="C")),
    Column("type", Text),
    Column("payload", LargeBinary),
    Column("headers", JSONB, nullable=False, server_default=text("'{}'")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("sent_at", DateTime(timezone=True)),
    Column("parked_at", DateTime(timezone=True)),
    Column(
        "bucket",
        SmallInteger,
        Computed(
            f"(coalesce(hashtextextended(key, 0), id, (sent_at IS NULL)::integer) & {BUCKETS - 1})::smallint",
            persisted=True,
        ),
        nullable=False,
    ),
    PrimaryKeyConstraint("id", name="outbox_pkey"),
    CheckConstraint(
        "sent_at IS NOT NULL OR topic ~ '^[a-zA-Z0-9._-]{1,249}$' AND topic NOT IN ('.', '..')",
        name="outbox_topic_is_legal",
    ),
    CheckConstraint("payload IS NOT NULL OR key IS NOT NULL", name="outbox_tombstone_has_key"),
    CheckConstraint(
        "CASE WHEN sent_at IS NOT NULL THEN true WHEN jsonb_typeof(headers) = 'object'"
        """ THEN NOT jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")') ELSE false END""",
        name="outbox_headers_are_flat_strings",
    ),
    CheckConstraint(
        f"sent_at IS NOT NULL OR headers - ARRAY[{', '.join(repr(name) for name in RESERVED_HEADERS)}] = headers",
        name="outbox_headers_are_not_reserved",
    ),
)

Index(
    "outbox_unsent",
    outbox.c.bucket,
    outbox.c.id,
    postgresql_where=text("sent_at IS NULL AND parked_at IS NULL"),
)

outbox_parked = Table(
    "outbox_parked",
    metadata,
    Column("id", BigInteger, autoincrement=False),
    Column("bucket", SmallInteger, nullable=False),
    Column("topic", Text, nullable=False),
    Column("key", Text(collation="C")),
    Column(
        "line",
        BigInteger,
        Computed(
            "hashtextextended(topic, CASE WHEN key IS NULL THEN id ELSE hashtextextended(key, 0) END)", persisted=True
        ),
        nullable=False,
    ),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("due_at", DateTime(timezone=True)),
    Column("parked_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("error", Text),
    Column("reason", Text),
    PrimaryKeyConstraint("id", name="outbox_parked_pkey"),
    CheckConstraint(
        "state IN ('retry', 'trying', 'blocked', 'topic', 'dead', 'discarded')", name="outbox_parked_state_is_known"
    ),
)

Index(
    "outbox_parked_line",
    outbox_parked.c.bucket,
    outbox_parked.c.line,
    outbox_parked.c.id,
    postgresql_where=text("state <> 'discarded'"),
)
Index(
    "outbox_parked_due",
    outbox_parked.c.bucket,
    outbox_parked.c.due_at,
    postgresql_where=text("due_at IS NOT NULL"),
)
Index(
    "outbox_parked_topic",
    outbox_parked.c.bucket,
    text("hashtextextended(topic, 0)"),
    outbox_parked.c.id,
    postgresql_where=text("state = 'topic'"),
)

outbox_pause = Table(
    "outbox_pause",
    metadata,
    Column("topic", Text, nullable=False),
    Column("paused_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("reason", Text, nullable=False),
    PrimaryKeyConstraint("topic", name="outbox_pause_pkey"),
)

outbox_audit = Table(
    "outbox_audit",
    metadata,
    Column("audit_id", BigInteger, Identity(always=True)),
    Column("at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("by_role", Text, nullable=False, server_default=text("session_user")),
    Column("by_whom", Text, nullable=False),
    Column("command", Text, nullable=False),
    Column("selector", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("ids", ARRAY(BigInteger), nullable=False),
    Column("reason", Text),
    PrimaryKeyConstraint("audit_id", name="outbox_audit_pkey"),
)

outbox_relay = Table(
    "outbox_relay",
    metadata,
    Column("relay_id", BigInteger, Identity(always=True)),
    Column("name", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("renewed_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("lease_seconds", Double, nullable=False),
    Column("ready", Boolean, nullable=False),
    Column("direct", Boolean, nullable=False),
    Column("listens", Boolean, nullable=False, server_default=text("false")),
    PrimaryKeyConstraint("relay_id", name="outbox_relay_pkey"),
)

outbox_slot = Table(
    "outbox_slot",
    metadata,
    Column("slot", SmallInteger, autoincrement=False),
    Column("owner", BigInteger),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    Column("taken_at", DateTime(timezone=True)),
    PrimaryKeyConstraint("slot", name="outbox_slot_pkey"),
)

outbox_layout = Table(
    "outbox_layout",
    metadata,
    Column("only_row", Boolean, server_default=text("true")),
    Column("outbox_uuid", Uuid, nullable=False, server_default=text("gen_random_uuid()")),
    Column("layout_number", Integer, nullable=False, server_default=text("1")),
    Column("buckets", SmallInteger, nullable=False),
    Column("slots", SmallInteger, nullable=False),
    Column("schema_version", Integer, nullable=False),
    Column("oldest_relay", Text, nullable=False),
    Column("pruned_until", DateTime(timezone=True)),
    PrimaryKeyConstraint("only_row", name="outbox_layout_pkey"),
    CheckConstraint("only_row", name="outbox_layout_has_one_row"),
    CheckConstraint("slots > 0 AND buckets % slots = 0", name="outbox_layout_slots_divide_buckets"),
)

#: What VACUUM does with these tables, and when.
OUTBOX_STORAGE = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "10000",
    "vacuum_truncate": "off",
}
PARKED_STORAGE = {**OUTBOX_STORAGE, "autovacuum_vacuum_threshold": "1000"}


def storage_sql(table: str, storage: Mapping[str, str]) -> str:
    """SQL that sets these parameters of a table, whose name is quoted where it has to be."""
    return f"ALTER TABLE {table} SET ({', '.join(f'{name} = {value}' for name, value in storage.items())})"


# Not as an option of the table: SQLAlchemy has none for it before 2.1.
for _table, _storage in ((outbox, OUTBOX_STORAGE), (outbox_parked, PARKED_STORAGE)):
    _ddl = DDL(storage_sql("%(fullname)s", _storage))  # type: ignore[no-untyped-call]
    event.listen(_table, "after_create", _ddl)
