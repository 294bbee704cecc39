"""Statements over many rows of which PostgreSQL may refuse one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from outbox_relay.errors import SourceUnavailableError
from outbox_relay.source.session import RowRefusedError, Session, what_it_says
from outbox_relay.source.sqlstate import Fault, fault_of, why

T = TypeVar("T")
R = TypeVar("R")

#: How long rows at fault are looked for in one statement, once one was found.
_BLAME_SECONDS = 1.0


class RowByRow:
    """Runs a statement over many rows so that one which PostgreSQL refuses doesn't keep the others from it.

    Usually as one statement: then the refusal ends the transaction, which is tried again as ``careful``. Then in parts,
    each within a savepoint, halved until a row is refused alone.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._careful = False

    async def transact(self, transaction: Callable[[], Awaitable[T]]) -> T:
        """Once more, carefully, if it failed for what may be a row's fault. Raises SourceUnavailableError."""
        try:
            return await transaction()
        except SourceUnavailableError as error:
            if fault_of(error.__cause__) is not Fault.ROW:
                raise
        with self._carefully():
            try:
                return await transaction()
            except SourceUnavailableError as error:
                cause = error.__cause__
                if cause is None or fault_of(cause) is not Fault.ROW:
                    raise
                # What a trigger or a cast says may quote a row, and this is logged.
                raise SourceUnavailableError(str(error).replace(what_it_says(cause), why(cause))) from cause

    @property
    def careful(self) -> bool:
        return self._careful

    @contextlib.contextmanager
    def _carefully(self) -> Iterator[None]:
        self._careful = True
        try:
            yield
        finally:
            self._careful = False

    async def run(
        self, items: Sequence[T], statement: Callable[[Sequence[T]], Awaitable[list[R]]]
    ) -> tuple[list[R], dict[T, BaseException]]:
        """What the statement returns for all of them, and the items that it can't be run over, each with why.

        Looking for them takes a second at most, longer only for the first; then the last items wait for another time.
        """
        if not self._careful:
            return (await statement(items), {}) if items else ([], {})
        ends = time.monotonic() + _BLAME_SECONDS
        rows: list[R] = []
        refused: dict[T, BaseException] = {}
        parts = [items] if items else []
        while parts and not (refused and time.monotonic() > ends):
            part = parts.pop()
            try:
                async with self._session.savepoint():
                    rows += await statement(part)
            except RowRefusedError as error:
                half = len(part) // 2
                if half:
                    parts += [part[half:], part[:half]]
                else:
                    refused[part[0]] = error.error
        return rows, refused
