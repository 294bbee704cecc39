"""The schema in the database: its SQL, its creation and upgrade, and whether this release can work with it.

Tables are found by ``search_path``, and created in its first schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from uuid import UUID

import asyncpg

from outbox_relay import __version__
from outbox_relay.errors import SchemaError

#: The version that ``schema.sql`` creates, and the oldest that this release can work with.
SCHEMA_VERSION = 1

#: From version 2 on: the SQL that leads to a version from the one before it. Where that shuts out older relays, it
#: sets ``outbox_layout.oldest_relay`` too.
UPGRADES: Mapping[int, str] = MappingProxyType({})

# One at a time in a database. The number is drawn from a name of ours, so that a stranger hardly has the same.
_LOCK = """\
-- lock the outbox schema
SELECT pg_advisory_xact_lock(hashtextextended('outbox-relay schema apply', 0))
"""

_EXISTS = """\
-- find the outbox schema
SELECT to_regclass('outbox_layout') IS NOT NULL
"""

# In every version these two columns mean the same, so that any release can tell whether it is too old.
_READ_VERSION = """\
-- read the outbox schema's version
SELECT schema_version, oldest_relay FROM outbox_layout
"""

_READ_LAYOUT = """\
-- read the outbox layout
SELECT outbox_uuid, layout_number, buckets, slots, schema_version FROM outbox_layout
"""

_WRITE_VERSION = """\
-- record the outbox schema's version
UPDATE outbox_layout SET schema_version = $1
"""


@dataclass(frozen=True, slots=True)
class Applied:
    """What :func:`apply` found and left. ``found`` is None where there was no schema."""

    found: int | None
    version: int

    def __str__(self) -> str:
        if self.found is None:
            return f"created the outbox schema, version {self.version}"
        if self.found == self.version:
            return f"the outbox schema is at version {self.version} already"
        return f"upgraded the outbox schema from version {self.found} to {self.version}"


@dataclass(frozen=True, slots=True)
class Layout:
    """What every relay of one outbox must agree on."""

    outbox_uuid: UUID
    layout_number: int
    buckets: int
    slots: int
    schema_version: int


def read_sql() -> str:
    """The SQL that creates the schema, with its comments."""
    return resources.files("outbox_relay").joinpath("schema.sql").read_text("utf-8")


def read_sql_of_the_relay() -> str:
    """The part of the SQL that is the relay's own tables, without the outbox."""
    _, begin, relay = read_sql().partition("-- Rows that wait, each with its reason.")
    return begin + relay


async def apply(connection: asyncpg.Connection, *, upgrades: Mapping[int, str] = UPGRADES) -> Applied:
    """Create the schema, or upgrade it step by step to the newest version in ``upgrades``; all of it or nothing.

    Several at once wait for one another. Raises SchemaError, and changes nothing, where the schema is newer than this
    release knows, or the tables' names are taken by others.
    """
    newest = max([SCHEMA_VERSION, *upgrades])
    # READ COMMITTED whatever the role's default, so that what is read after the lock is what its last holder left.
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(_LOCK)
        found = None
        if await connection.fetchval(_EXISTS):
            found, _ = await _read_version(connection)
        else:
            await _create(connection)
        current = SCHEMA_VERSION if found is None else found
        if current > newest:
            raise SchemaError(
                f"the database's outbox schema is version {current}, and outbox-relay {__version__} knows none above"
                f" {newest}: apply with the newest outbox-relay that is in use"
            )
        for version in range(current + 1, newest + 1):
            await connection.execute(upgrades[version])
            await connection.execute(_WRITE_VERSION, version)
    return Applied(found, newest)


async def verify(connection: asyncpg.Connection) -> Layout:
    """The layout, if this release can work with the database's schema.

    Raises SchemaError where the schema is missing, older than this release needs, or needs a newer relay.
    """
    if not await connection.fetchval(_EXISTS):
        raise SchemaError(
            "there is no outbox schema in this database, or not on the search_path: run `outbox-relay schema apply`"
        )
    version, oldest_relay = await _read_version(connection)
    if _release(__version__) < _release(oldest_relay):
        raise SchemaError(
            f"this relay {__version__} is too old: the database needs {oldest_relay} or newer; upgrade outbox-relay"
        )
    if version < SCHEMA_VERSION:
        raise SchemaError(
            f"the database's outbox schema is version {version}, and this relay {__version__} needs {SCHEMA_VERSION}:"
            " run `outbox-relay schema apply`"
        )
    return Layout(**await connection.fetchrow(_READ_LAYOUT))


async def _create(connection: asyncpg.Connection) -> None:
    try:
        await connection.execute(read_sql())
    except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError) as error:
        raise SchemaError(
            f"{error.args[0]}, and it isn't outbox-relay's: rename it, or put the outbox into a schema of its own,"
            " the first on the search_path of the application and the relay"
        ) from error


async def _read_version(connection: asyncpg.Connection) -> tuple[int, str]:
    """The schema's version and the oldest relay that can work with it."""
    try:
        row = await connection.fetchrow(_READ_VERSION)
    except asyncpg.UndefinedColumnError as error:
        raise SchemaError(
            "there is a table outbox_layout that isn't outbox-relay's: rename it, or put the outbox into a schema of"
            " its own, the first on the search_path of the application and the relay"
        ) from error
    if row is None:
        raise SchemaError(
            "outbox_layout has lost its row: restore it from a backup, or insert it as in `outbox-relay schema print`"
        )
    return row["schema_version"], row["oldest_relay"]


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare: 0.10.0rc1 is (0, 10, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise SchemaError(f"outbox_layout.oldest_relay is {version!r}, which is no version such as 0.1.0: mend it")
    return tuple(int(number) for number in match[0].split("."))
