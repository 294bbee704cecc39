"""What an outbox table says was committed, for the checker.

It reads the whole table, so it needs no index. Rows that retention has deleted are not in it, nor those that relays
delete once they are sent: a check against it is complete only where nothing was deleted since the topics began.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from outbox_relay.checker import Committed
from outbox_relay.errors import CheckError

if TYPE_CHECKING:
    import asyncpg

_ROWS_A_FETCH = 5_000

_READ_LEDGER = """-- read ledger
SELECT id, event_id::text AS event_id, topic, key, type, payload, headers::text AS headers, created_at
FROM outbox
ORDER BY id"""


async def committed_rows(connection: asyncpg.Connection) -> list[Committed]:
    """Every row of the outbox table, sent or not, in the order of ids and in one snapshot.

    All are held in memory: about 700 bytes a row, and its payload.
    The table is the one that ``connection`` finds by the name ``outbox``, as the relay does.
    ``connection`` must not decode json itself: a payload is compared as PostgreSQL prints it.
    Raises CheckError when it does, and asyncpg's errors as they are.
    """
    async with connection.transaction():
        cursor = connection.cursor(_READ_LEDGER, prefetch=_ROWS_A_FETCH)
        return [
            Committed(
                outbox_id=row["id"],
                event_id=row["event_id"],
                topic=row["topic"],
                key=None if row["key"] is None else row["key"].encode(),
                value=_value(row["payload"]),
                type=row["type"],
                headers=json.loads(row["headers"]),
                created_at=row["created_at"],
            )
            async for row in cursor
        ]


def _value(payload: Any) -> bytes | None:
    match payload:
        case None | bytes():
            return payload
        case str():  # a payload column of type text, json or jsonb
            return payload.encode()
    raise CheckError(
        f"a payload came as {type(payload).__name__}; read the ledger over a connection without type codecs"
    )
