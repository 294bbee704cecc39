"""Who did what: one row of ``outbox_audit`` for each transaction of an operator's command, committed with it."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from outbox_relay.source.session import Session

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
