"""The state guard: late and repeated messages don't move a state backwards.

Three forms, by what there is to go by. :class:`VersionGuard`, where a message says the version of its aggregate;
:class:`OutboxIdGuard`, where it has the relay's header ``outbox-id``; :class:`Transitions`, where it says which state
comes next.

The first two remember how far a consumer has come in the table ``inbox_state``, in the transaction of the handler's
writes, as :mod:`~outbox_relay.inbox.postgres` does: nothing here commits, begins or rolls back, and two transactions
with the same aggregate take turns, the later waiting for the end of the first. A transaction that asks for several
aggregates may deadlock with another that asks in another order (40P01): ask in one order, or try again. Under
REPEATABLE READ and SERIALIZABLE the one that waited fails with a serialization failure (40001), to be tried again.

A state is one row an aggregate, for as long as late messages may come: delete it together with the aggregate, if ever.

Relies on the primary key of ``inbox_state``, ``(consumer, aggregate)``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from enum import Enum
from hashlib import sha256
from typing import Generic, TypeVar

from outbox_relay.errors import UnguardedMessageError
from outbox_relay.inbox.ids import ConsumedMessage, header
from outbox_relay.inbox.names import checked_name
from outbox_relay.inbox.transaction import Connection, fetch
from outbox_relay.message import REPLAY_HEADER

S = TypeVar("S", bound=Hashable)

OUTBOX_ID_HEADER = "outbox-id"

#: The longest name of an aggregate, in bytes: with a consumer's name it must fit into an entry of PostgreSQL's index.
MAX_AGGREGATE_BYTES = 1_000

_BIGINT = range(-(2**63), 2**63)

# Whether it changes the row or not, it locks it, and waits for whoever has. What it inserts for a new aggregate that
# comes with a gap is the version before the first: nothing was seen, and there is a row to lock.
_ADVANCE = """\
-- advance the version of an aggregate
INSERT INTO {schema}inbox_state AS s (consumer, aggregate, version)
VALUES (
    CAST($1 AS text), CAST($2 AS text),
    CASE WHEN CAST($3 AS bigint) = CAST($4 AS bigint) THEN CAST($3 AS bigint) ELSE CAST($4 AS bigint) - 1 END
)
ON CONFLICT (consumer, aggregate) DO UPDATE SET version = CAST($3 AS bigint) WHERE s.version = CAST($3 AS bigint) - 1
RETURNING s.version
"""

_VERSION = """\
-- read the version of an aggregate
SELECT version FROM {schema}inbox_state WHERE consumer = CAST($1 AS text) AND aggregate = CAST($2 AS text)
"""

_MOVE_PAST = """\
-- move past an outbox id
INSERT INTO {schema}inbox_state AS s (consumer, aggregate, version)
VALUES (CAST($1 AS text), CAST($2 AS text), CAST($3 AS bigint))
ON CONFLICT (consumer, aggregate) DO UPDATE SET version = excluded.version WHERE s.version < excluded.version
RETURNING s.version
"""


class Verdict(Enum):
    """What is to become of a message."""

    APPLY = "apply"  #: it is next: handle it
    SEEN = "seen"  #: its change was made already, or a later one: ignore it
    GAP = "gap"  #: an earlier one is missing: park it, or try again later; nothing was changed
    NOT_ALLOWED = "not allowed"  #: no transition leads there from the present state; nothing was changed


class VersionGuard:
    """By the aggregate's version, which grows by one with each of its messages.

    ``consumer`` names whoever follows the aggregates, 1 to 200 bytes. ``first_version`` is that of an aggregate's first
    message; None has whichever comes first be the first, for a consumer that joins late.

    It needs no inbox beside it: a repeat is seen by its version.
    """

    def __init__(self, consumer: str, *, first_version: int | None = 1) -> None:
        self.consumer = checked_name(consumer)
        self._first_version = first_version

    async def advance(self, connection: Connection, aggregate: str, version: int) -> Verdict:
        """``APPLY`` where the version is next, and then it is the aggregate's once this transaction commits.

        ``SEEN`` where it isn't above the aggregate's, ``GAP`` where it is further ahead: then nothing changes. A
        handler that parks such a message does that in the same transaction; one that tries again rolls back.

        ``connection`` is as for ``Inbox.accept``; ``aggregate`` is text of 1 to 1,000 bytes that no aggregate of
        another kind has. Raises NotInTransactionError, and ValueError for what can't be an aggregate or a version.
        """
        aggregate = _checked_aggregate(aggregate)
        first = version if self._first_version is None else self._first_version
        if version < first or version not in _BIGINT:
            raise ValueError(f"version {version} of {aggregate} can't be: versions are {first} or above, and a bigint")
        rows = await fetch(connection, _ADVANCE, self.consumer, aggregate, version, first)
        # No row came back: it is as it was, and locked.
        ((present,),) = rows or await fetch(connection, _VERSION, self.consumer, aggregate)
        if rows and present == version:
            return Verdict.APPLY
        return Verdict.SEEN if version <= present else Verdict.GAP


class OutboxIdGuard:
    """By the relay's header ``outbox-id``: within a topic and a key, what isn't above the last one is a late repeat.

    It holds for the messages of one outbox, relayed with ``followers = "block"``, and while that outbox isn't restored
    to an earlier time, after which it gives ids again. Its ids have gaps, which mean nothing, so ``GAP`` is never said.

    ``replays`` says that a record with the header ``replay-of`` is to be handled, too; without it, it counts as seen.
    It never moves the state, and it may itself come twice: an :class:`~outbox_relay.inbox.postgres.Inbox` tells.
    """

    def __init__(self, consumer: str, *, replays: bool = False) -> None:
        self.consumer = checked_name(consumer)
        self._replays = replays

    async def advance(self, connection: Connection, message: ConsumedMessage) -> Verdict:
        """``APPLY`` where the message is later than all that came before of its topic and key, else ``SEEN``.

        ``connection`` is as for ``Inbox.accept``. Raises NotInTransactionError, and UnguardedMessageError for a message
        without a key, whose order nobody promised, or without an ``outbox-id``.
        """
        outbox_id, aggregate = _outbox_id(message), _aggregate_of(message)
        if header(message, REPLAY_HEADER) is not None:
            return Verdict.APPLY if self._replays else Verdict.SEEN
        rows = await fetch(connection, _MOVE_PAST, self.consumer, aggregate, outbox_id)
        return Verdict.APPLY if rows else Verdict.SEEN


class Transitions(Generic[S]):
    """By a table of which states may follow which; it keeps nothing, the state is a column of the handler's own.

        ORDER = Transitions({None: ["placed"], "placed": ["paid", "cancelled"], "paid": ["shipped"]})

    The state must not change between the question and the answer: read it with ``FOR UPDATE``, or ask within the
    statement that changes it, which then changes one row or none:

        UPDATE orders SET status = 'paid' WHERE id = $1 AND status = ANY ($2)  -- $2: ORDER.before("paid")
    """

    def __init__(self, allowed: Mapping[S, Iterable[S]]) -> None:
        self._after = {state: tuple(following) for state, following in allowed.items()}
        self._states = {*self._after, *(state for following in self._after.values() for state in following)}

    def judge(self, present: S, wanted: S) -> Verdict:
        """``APPLY`` where ``wanted`` may follow, ``SEEN`` where it is the present state already, else ``NOT_ALLOWED``.

        A message that is late by more than one state is ``NOT_ALLOWED``, too: whether the state has passed it, or came
        by another way, the table can't tell. Raises ValueError for a state that isn't in the table.
        """
        if self._known(wanted) in self._after.get(self._known(present), ()):
            return Verdict.APPLY
        return Verdict.SEEN if wanted == present else Verdict.NOT_ALLOWED

    def before(self, wanted: S) -> list[S]:
        """The states that ``wanted`` may follow, in the table's order. Raises ValueError for an unknown one."""
        self._known(wanted)
        return [state for state, following in self._after.items() if wanted in following]

    def _known(self, state: S) -> S:
        if state not in self._states:
            states = ", ".join(sorted(map(repr, self._states)))
            raise ValueError(f"state {state!r} isn't in the table of transitions, which has {states}")
        return state


def _outbox_id(message: ConsumedMessage) -> int:
    value = header(message, OUTBOX_ID_HEADER)
    if value is None:
        raise _unguarded(message, "has no header 'outbox-id', which the relay writes: guard it by a version of its own")
    # int() alone would take spaces, underscores and the digits of other scripts, too.
    digits = value.removeprefix(b"-")
    if not (digits.isdigit() and len(digits) < 20 and (outbox_id := int(value)) in _BIGINT):
        raise _unguarded(message, "has a header 'outbox-id' that is no id of an outbox: it isn't the relay's")
    return outbox_id


def _aggregate_of(message: ConsumedMessage) -> str:
    """The topic and the key; a key that is no text, or a long one, by its hash. No topic has a ``/`` or a ``#``."""
    key = message.key
    if key is None:
        raise _unguarded(message, "has no key, so no order is promised: tell repeats by an Inbox instead")
    if not isinstance(key, (bytes, str)):
        raise _unguarded(message, f"has a key of type {type(key).__name__}: guard it as it comes, as bytes or str")
    given = key.encode() if isinstance(key, str) else key
    try:
        if b"\0" not in given and len(given) <= MAX_AGGREGATE_BYTES - 300:
            return f"outbox-id {message.topic}/{given.decode()}"
    except UnicodeDecodeError:
        pass
    return f"outbox-id {message.topic}#{sha256(given).hexdigest()}"


def _checked_aggregate(aggregate: str) -> str:
    if not isinstance(aggregate, str) or not 0 < len(aggregate.encode()) <= MAX_AGGREGATE_BYTES or "\0" in aggregate:
        raise ValueError(f"aggregate must be text of 1 to {MAX_AGGREGATE_BYTES:,} bytes, without a NUL character")
    return aggregate


def _unguarded(message: ConsumedMessage, why: str) -> UnguardedMessageError:
    return UnguardedMessageError(
        f"the message at offset {message.offset} of {message.topic}, partition {message.partition}, {why}"
    )
