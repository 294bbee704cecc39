"""What is compared: relays, each set up as its own documentation advises, behind one protocol.

Every arm is driven by the same code, in this order:

- a drain: ``prepare`` → the backlog is written → ``start`` → measured from Kafka alone → ``stop`` → a check
- a steady load: ``prepare`` → ``start`` → writers write → ``stop`` → a check

An arm that takes long to get warm (a JVM, a replication slot) does that in ``prepare`` and holds still until ``start``.
What it uses before the first 5 % of a backlog are in Kafka isn't counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Run:
    """Where one run of one arm takes place. Database and topic are new, and gone after it."""

    #: A database for this run only, of a superuser without a password, ``postgresql://…``; ``wal_level`` is logical.
    database_url: str
    bootstrap_servers: str  #: ``host:port``
    topic: str  #: made already
    partitions: int
    directory: Path  #: for configuration and logs; deleted after the run

    @property
    def database(self) -> str:
        """Its name."""
        return self.database_url.rpartition("/")[2]


class Arm(Protocol):
    """One relay, for one run. Made anew for each, so it may keep whatever it likes between the calls."""

    #: In results and tables.
    name: ClassVar[str]
    #: Whether it offers order per key in this set-up; then the check holds it to that.
    ordered: ClassVar[bool]
    #: Whether it polls the table, rather than reading the log.
    polling: ClassVar[bool]
    #: Whether a sent row is deleted, rather than marked or left.
    deletes: ClassVar[bool]
    #: Too slow for the whole backlog: its drain is cut off after a while.
    slow: ClassVar[bool]
    #: What a reader must know to compare it fairly: one sentence, or nothing.
    note: ClassVar[str]

    async def prepare(self, run: Run) -> None:
        """Make the tables (slot, connector …) in ``run.database_url``, and get what takes long to warm up warm.

        Raises :class:`ArmUnavailableError` where the arm can't be had on this machine; it is then left out, and said.
        """
        ...

    def insert(self, rows: str) -> str:
        """SQL that inserts an outbox row for each row of ``rows``, in their order.

        ``rows`` is a table expression with an alias, and has these columns: ``n bigint`` (unique), ``k integer``
        (number of the key), ``v integer`` (version of the key, from 1), ``key text``, ``payload text`` (JSON).
        The record must arrive in ``run.topic`` with ``key`` as its key, so that it has the key's partition, and
        ``payload`` as its value: as it is, as a JSON string, or as JSON that holds the members ``n``, ``k`` and ``v``.
        The SQL has no parameters. The harness runs it within the writer's own transaction, after the ledger's INSERT,
        in order of ``n``: ``INSERT INTO … SELECT … FROM {rows} ORDER BY rows.n`` (the alias is always ``rows``).
        """
        ...

    async def start(self, run: Run) -> None:
        """Begin to relay; returns once that is told, not once it is done."""
        ...

    @property
    def pids(self) -> Sequence[int]:
        """The relay's processes; their descendants count too."""
        ...

    async def unsettled(self, run: Run) -> int | None:
        """How many rows the relay has still to publish, mark or delete; None where nobody can tell.

        Asked now and then once everything is in Kafka, so that the cost of the last marks is counted.
        """
        ...

    async def stop(self) -> None:
        """End all that ``prepare`` and ``start`` began, also if these failed half-way. Idempotent."""
        ...

    def log(self) -> str:
        """The last lines that its processes wrote, for the message when something failed."""
        ...


class ArmUnavailableError(Exception):
    """The arm can't be run on this machine; the message says why."""
