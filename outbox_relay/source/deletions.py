"""Where sent rows are deleted instead of marked: says so in ``outbox_layout`` before the first of them goes.

``pruned_until`` is set ahead of the time, and again before that is over. So whoever finds that a row is gone finds why,
also long after relays mark again; and no claim writes to a row that all relays share.
"""

from __future__ import annotations

import time

from outbox_relay.errors import SourceRefusedError
from outbox_relay.source.session import Session
from outbox_relay.source.statements import OutboxTable, literal, quoted

#: So long ahead it is said, and so long before the end again: no transaction that deletes begins after that.
_AHEAD_SECONDS = 60.0
_LEFT_SECONDS = 30.0

#: An expression, over the quoted name of the outbox as a literal.
MAY_DELETE = """has_table_privilege({outbox_text}::regclass, 'DELETE')
           AND has_column_privilege('outbox_layout'::regclass, 'pruned_until', 'UPDATE')"""

_MAY_DELETE = """
-- may sent rows be deleted
SELECT {may_delete} AS may_delete
"""

# Of several lanes and relays that come at once, those after the first find nothing to do.
_ANNOUNCE = """
-- announce that sent rows are deleted
UPDATE outbox_layout SET pruned_until = now() + make_interval(secs => $1)
WHERE pruned_until IS NULL OR pruned_until < now() + make_interval(secs => $2)
"""


class Deletions:
    """What one lane says of the rows that it is about to delete."""

    def __init__(self, session: Session, table: OutboxTable) -> None:
        self._session = session
        self._may_delete = _MAY_DELETE.format(may_delete=MAY_DELETE.format(outbox_text=literal(quoted(table.name))))
        self._announced_until: float | None = None
        session.prepares([self._may_delete, _ANNOUNCE])

    @property
    def announced(self) -> bool:
        """Whether it ever was, so that this role may delete."""
        return self._announced_until is not None

    async def announce(self) -> None:
        """Also asks whether this role may delete, before anything is published that couldn't be settled.

        In a transaction of its own: nobody waits for that of another relay with a slot's lock in hand. Raises
        SourceUnavailableError.
        """
        asked_at = time.monotonic()
        if self._announced_until is not None and asked_at < self._announced_until:
            return
        async with self._session.transaction():
            ((may_delete,),) = await self._session.fetch(self._may_delete)
            if not may_delete:
                raise SourceRefusedError(
                    'relay.after_publish is "delete", and the relay\'s role may not delete rows: grant it'
                    " outbox_pruner, or what that role has in `outbox-relay schema print --roles`"
                )
            await self._session.fetch(_ANNOUNCE, _AHEAD_SECONDS, _LEFT_SECONDS)
        self._announced_until = asked_at + _AHEAD_SECONDS - _LEFT_SECONDS
