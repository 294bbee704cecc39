"""``inbox.sql``: the consumer's tables, and their creation.

They are found by ``search_path``, and created in its first schema.
"""

from __future__ import annotations

from importlib import resources

import asyncpg

from outbox_relay.errors import SchemaError

#: The version that ``inbox.sql`` creates.
INBOX_VERSION = 1

_MARK = "outbox-relay inbox, version "

# One at a time in a database. The number is drawn from a name of ours, so that a stranger hardly has the same.
_LOCK = """\
-- lock the inbox
SELECT pg_advisory_xact_lock(hashtextextended('outbox-relay schema apply --inbox', 0))
"""

_FIND = """\
-- find the inbox
SELECT obj_description(to_regclass('inbox'), 'pg_class')
"""


def read_sql() -> str:
    """The SQL that creates the tables, with its comments."""
    return resources.files("outbox_relay").joinpath("inbox.sql").read_text("utf-8")


async def apply(connection: asyncpg.Connection) -> bool:
    """Create the tables, all of it or nothing; False where they are there already.

    Several at once wait for one another. Raises SchemaError, and changes nothing, where the tables are of a newer
    release, or their names are taken by others.
    """
    # READ COMMITTED whatever the role's default, so that what is read after the lock is what its last holder left.
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(_LOCK)
        found: str | None = await connection.fetchval(_FIND)
        if found is not None and found.startswith(_MARK):
            if found != f"{_MARK}{INBOX_VERSION}":
                raise SchemaError(
                    f"the database has another release's inbox: {found!r}, and this one knows version {INBOX_VERSION}:"
                    " apply with the newest outbox-relay that is in use"
                )
            return False
        try:
            await connection.execute(read_sql())
        except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError) as error:
            raise SchemaError(
                f"{error.args[0]}, and it isn't outbox-relay's: rename it, or put the inbox into a schema of its own,"
                " the first on the search_path of the consumer"
            ) from error
        except asyncpg.InsufficientPrivilegeError as error:
            raise SchemaError(
                f"{error.args[0]}: log in as a role that may make tables: --database-url postgresql://…"
            ) from error
        return True
