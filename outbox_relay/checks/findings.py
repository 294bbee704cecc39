"""What ``outbox-relay check`` can find: every kind with its level and what to do about it, and how findings are shown.

Codes and levels are stable; ``docs/commands.md`` lists them. A finding holds names and numbers, never a secret, a key
or a payload.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

#: Nothing was found, or only warnings.
EXIT_SOUND = 0
EXIT_ERRORS = 1
#: A server could not be used, so that not everything was checked (EX_UNAVAILABLE of sysexits.h).
EXIT_UNAVAILABLE = 69

#: Of the topics that were looked at so many are named.
_MOST_TOPICS = 20


class Level(Enum):
    """An error: some message will wait, or a guarantee doesn't hold. A warning: one day it may be so."""

    ERROR = "error"
    WARNING = "warning"


E, W = Level.ERROR, Level.WARNING


class Kind(Enum):
    """``(code, level, what to do)``; names in braces are filled in by the finding."""

    # -- PostgreSQL
    DATABASE_UNREACHABLE = (
        "database-unreachable",
        E,
        "start PostgreSQL if it is down, and compare the url, the password and the tls keys in [database] with it",
    )
    DATABASE_READ_ONLY = (
        "database-read-only",
        E,
        "name the primary in database.url, or all hosts; if it is one, set default_transaction_read_only to off",
    )
    DATABASE_FAILED = (
        "database-failed",
        E,
        "check again when nobody holds a lock on the tables; else see PostgreSQL's log, and if it is only slow raise"
        " database.statement_timeout_seconds",
    )
    POSTGRESQL_TOO_OLD = ("postgresql-too-old", E, "upgrade PostgreSQL to {oldest} or later")
    SCHEMA_MISSING = (
        "schema-missing",
        E,
        "run `outbox-relay schema apply`, or set table.schema to where it is; for a table of your own see"
        " `outbox-relay schema adopt`",
    )
    SCHEMA_UNUSABLE = ("schema-unusable", E, "{advice}")
    TABLE_MISSING = ("table-missing", E, "correct table.name and table.schema, or run `outbox-relay schema adopt`")
    COLUMN_MISSING = ("column-missing", E, "correct {setting}, or add the column as `outbox-relay schema adopt` does")
    COLUMN_TYPE = ("column-type", E, "make the column one of {types}, or name another in {setting}")
    COLUMN_NULLABLE = ("column-nullable", E, "ALTER TABLE {table} ALTER COLUMN {column} SET NOT NULL")
    INDEX_MISSING = ("index-missing", E, "CREATE {index}")
    INDEX_INVALID = ("index-invalid", E, "REINDEX INDEX CONCURRENTLY {index}")
    IDENTITY_CACHE = ("identity-cache", E, "ALTER SEQUENCE {sequence} CACHE 1")
    PRIVILEGE_MISSING = ("privilege-missing", E, "GRANT {grant} TO {role}, or see `outbox-relay schema print --roles`")
    ROW_SECURITY = (
        "row-security",
        E,
        "ALTER TABLE {table} DISABLE ROW LEVEL SECURITY, or give the role a policy that shows it every row",
    )
    ROLE_SUPERUSER = (
        "role-superuser",
        W,
        "let the relay log in with a role of its own that has the privileges of `outbox-relay schema print --roles`",
    )
    ROLE_OWNER = (
        "role-owner",
        W,
        "let the relay log in with a role of its own that has the privileges of `outbox-relay schema print --roles`",
    )
    DELETE_PRIVILEGE_MISSING = (
        "delete-privilege-missing",
        E,
        "GRANT {grant} TO {role}, or grant it outbox_pruner of `outbox-relay schema print --roles`, or set"
        ' relay.after_publish = "mark"',
    )
    RETENTION_PRIVILEGE_MISSING = (
        "retention-privilege-missing",
        W,
        "GRANT {grant} TO {role}, or grant it outbox_pruner of `outbox-relay schema print --roles`, or unset"
        " relay.retention_hours",
    )
    PRIVILEGE_EXCESS = ("privilege-excess", W, "REVOKE {grant} FROM {role}, or from whom it has that")
    AUTOVACUUM_OFF = ("autovacuum-off", W, "{advice}, or claims get slower with every row that was sent")
    FSYNC_OFF = ("fsync-off", W, "set fsync = on in postgresql.conf, unless this database may be lost")
    FULL_PAGE_WRITES_OFF = (
        "full-page-writes-off",
        W,
        "set full_page_writes = on in postgresql.conf, unless its disks never write half a page",
    )
    SYNCHRONOUS_COMMIT_OFF = (
        "synchronous-commit-off",
        W,
        "set it to on for the applications, if what they were told is committed must survive a crash; the relay's own"
        " claims are flushed whatever it is",
    )
    LONG_TRANSACTION = (
        "long-transaction",
        W,
        "end it (SELECT pg_terminate_backend({pid})) if nobody needs it: as long as it is open no dead row can be"
        " vacuumed, and claims get slower",
    )
    TIMEOUT_TOO_SHORT = ("timeout-too-short", W, "ALTER ROLE {role} SET {setting} = 0, or more than {least}")
    CONNECTION_LIMIT = ("connection-limit", E, "raise it to {needed} or more for each relay, or set it to -1")
    POOLER = (
        "pooler",
        W,
        "connect to PostgreSQL directly: behind a pooler a killed relay is replaced only when its lease runs out",
    )
    POOLER_STATEMENT_MODE = ("pooler-statement-mode", E, "set pool_mode = transaction or session, or connect directly")
    POOLER_PREPARED_STATEMENTS = (
        "pooler-prepared-statements",
        E,
        "set max_prepared_statements (PgBouncer 1.21 or later) or pool_mode = session, or connect directly",
    )

    # -- Kafka
    KAFKA_UNREACHABLE = (
        "kafka-unreachable",
        E,
        "start Kafka if it is down, and compare the addresses and the security settings in [kafka] with it",
    )
    BROKER_UNREACHABLE = (
        "broker-unreachable",
        E,
        "start the broker if it is down, or mend its advertised.listeners, which clients must be able to reach",
    )
    KAFKA_FAILED = ("kafka-failed", E, "see the brokers' logs; if they are only slow, raise {setting}")
    KAFKA_TOO_OLD = ("kafka-too-old", E, "upgrade the brokers to Kafka {oldest} or later")
    IDEMPOTENT_WRITE_FORBIDDEN = (
        "idempotent-write-forbidden",
        E,
        "grant the relay's user Write on its topics, or IdempotentWrite on the cluster",
    )
    TOPIC_NOT_ALLOWED = ("topic-not-allowed", E, "add it to kafka.allowed_topics, if it is meant")
    TOPIC_ILLEGAL = ("topic-illegal", E, "have the application write other names, or mend table.topic")
    TOPIC_MISSING = ("topic-missing", E, "create it; the relay never does")
    TOPIC_FORBIDDEN = ("topic-forbidden", E, "grant the relay's user Write on the topic")
    TOPIC_UNREADABLE = ("topic-unreadable", W, "grant the relay's user DescribeConfigs on the topic, or look yourself")
    MESSAGE_TOO_LARGE = (
        "message-too-large",
        E,
        "raise the topic's max.message.bytes (no record goes above 99 MiB), or store less in the payload",
    )
    BATCH_TOO_LARGE = (
        "batch-too-large",
        W,
        "lower kafka.batch_bytes or raise the topic's max.message.bytes: a batch above it is sent again in parts",
    )
    COMPACTED_WITHOUT_KEY = (
        "compacted-without-key",
        E,
        "take compact out of the topic's cleanup.policy, or have the application give each message a key",
    )
    MIN_INSYNC_UNREACHABLE = (
        "min-insync-unreachable",
        E,
        "lower the topic's min.insync.replicas or add replicas: nothing can be written to it",
    )
    MIN_INSYNC_LOW = (
        "min-insync-low",
        W,
        "set the topic's min.insync.replicas to 2: what one broker alone has acknowledged is lost with it",
    )
    REPLICATION_LOW = ("replication-low", W, "give the topic three replicas or more")
    UNCLEAN_ELECTION = (
        "unclean-election",
        W,
        "set the topic's unclean.leader.election.enable to false: such a leader lacks what was acknowledged",
    )

    @property
    def code(self) -> str:
        return self.value[0]

    @property
    def level(self) -> Level:
        return self.value[1]

    @property
    def advice(self) -> str:
        return self.value[2]


_UNREACHABLE = (Kind.DATABASE_UNREACHABLE, Kind.DATABASE_READ_ONLY, Kind.KAFKA_UNREACHABLE)


@dataclass(frozen=True, slots=True)
class Finding:
    kind: Kind
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.kind.level.value} {self.kind.code}: {self.found}. What to do: {self.advice}."


def finding(kind: Kind, found: str, **names: Any) -> Finding:
    """``found`` is a sentence without its full stop; ``names`` are those of the kind's advice."""
    return Finding(kind, found, kind.advice.format(**names))


@dataclass(frozen=True, slots=True)
class Checked:
    """``topics`` were looked at; None where Kafka couldn't be asked."""

    findings: list[Finding]
    topics: list[str] | None


def exit_code(findings: Sequence[Finding]) -> int:
    kinds = {found.kind for found in findings}
    if kinds & set(_UNREACHABLE):
        return EXIT_UNAVAILABLE
    return EXIT_ERRORS if any(kind.level is Level.ERROR for kind in kinds) else EXIT_SOUND


def as_lines(findings: Sequence[Finding]) -> str:
    """One finding a line, and how many there are."""
    return "\n".join([*map(str, findings), _count(findings)])


def as_table(findings: Sequence[Finding], width: int) -> str:
    """For a terminal of that many columns."""
    code_width = max((len(found.kind.code) for found in findings), default=0)
    indent = " " * (9 + code_width + 2)
    lines = []
    for found in findings:
        first = f"{found.kind.level.value:<9}{found.kind.code:<{code_width}}  "
        for text, before in ((f"{found.found}.", first), (f"→ {found.advice}.", indent)):
            lines += textwrap.wrap(
                text,
                max(width, len(indent) + 40),
                initial_indent=before,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join([*lines, _count(findings)])


def topics_in_words(topics: Sequence[str]) -> str:
    if not topics:
        return "topics looked at: none; name them in kafka.allowed_topics"
    more = len(topics) - _MOST_TOPICS
    return f"topics looked at: {', '.join(topics[:_MOST_TOPICS])}{f' and {more} more' if more > 0 else ''}"


def as_json(checked: Checked) -> str:
    shown = [
        {
            "level": found.kind.level.value,
            "code": found.kind.code,
            "found": found.found,
            "what_to_do": found.advice,
        }
        for found in checked.findings
    ]
    return json.dumps({"findings": shown, "topics": checked.topics}, ensure_ascii=False)


def _count(findings: Sequence[Finding]) -> str:
    errors = sum(found.kind.level is Level.ERROR for found in findings)
    warnings = len(findings) - errors
    return f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
