"""What operators' transactions have in common: they wait for locks only so long, are durable, and leave a row of
``outbox_audit`` that says who did what.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from outbox_relay.source.session import Session

#: So long a command waits for a relay to give a slot's lock back. A transaction of a relay takes milliseconds; one of a
#: frozen host ends with its statement timeout.
LOCK_SECONDS = 10.0

# Plans as for a claim, since what is said of lines is the same statement.
_SETTINGS = """
-- wait for locks so long
SELECT set_config('lock_timeout', $1, true),
       set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('jit', 'off', true),
       set_config('synchronous_commit',
                  CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
                  true)
"""

_RECORD = """
-- audit
INSERT INTO outbox_audit (by_whom, command, selector, rows, ids, reason) VALUES ($1, $2, $3, $4, $5, $6)
"""


def _client() -> str:
    """The user of this machine, and the machine; the database knows the role by itself."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container may run as a number that has no name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@dataclass(frozen=True, slots=True)
class Deed:
    """A command as it was given: ``selector`` says of which rows, in words."""

    command: str
    selector: str
    reason: str | None = None
    by_whom: str = field(default_factory=_client)


async def record(session: Session, deed: Deed, ids: Sequence[int] = ()) -> None:
    """In the transaction that changes these rows."""
    await session.fetch(_RECORD, deed.by_whom, deed.command, deed.selector, len(ids), list(ids), deed.reason)


def prepares(session: Session, statements: Iterable[str]) -> None:
    """Those of a :func:`transaction` that locks something; see :meth:`Session.prepares`."""
    session.prepares([_SETTINGS, _RECORD, *statements])


@contextlib.asynccontextmanager
async def transaction(session: Session) -> AsyncIterator[None]:
    """For statements that change something, and :func:`record`."""
    async with session.transaction():
        await session.fetch(_SETTINGS, f"{LOCK_SECONDS * 1000:.0f}")
        yield
