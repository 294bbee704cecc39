"""How far a partition is finished: the offset before which every message is, whatever order they finish in. Pure."""

from __future__ import annotations

from collections import OrderedDict


class Progress:
    """Of one partition, from its assignment to its revocation.

    Offsets are begun in the order of the partition; they may have gaps, as in compacted or transactional topics.
    """

    def __init__(self) -> None:
        self._finished: OrderedDict[int, bool] = OrderedDict()
        self._first: int | None = None
        self._last = -1
        self._committable: int | None = None
        self._committed: int | None = None

    @property
    def unfinished(self) -> int:
        """How many were begun and aren't part of the finished prefix: what is kept in memory."""
        return len(self._finished)

    @property
    def next_offset(self) -> int | None:
        """That of the first message that isn't finished, where it is known."""
        return next(iter(self._finished), self._last + 1 if self._last >= 0 else self._first)

    def begin_at(self, offset: int) -> None:
        """It is what is fetched first."""
        self._first = offset

    def begin(self, offset: int) -> None:
        """A message was received. Raises ValueError where it isn't above the one before."""
        if offset <= self._last:
            raise ValueError(f"offset {offset} came after {self._last}")
        self._last = offset
        self._finished[offset] = False

    def finish(self, offset: int) -> None:
        """Everything that the message was to cause is durable."""
        self._finished[offset] = True
        while self._finished:
            first = next(iter(self._finished))
            if not self._finished[first]:
                break
            del self._finished[first]
            self._committable = first + 1

    def to_commit(self) -> int | None:
        """The offset to commit, where there is a new one: nothing below it is unfinished."""
        return self._committable if self._committable != self._committed else None

    def committed(self, offset: int) -> None:
        """Kafka has it."""
        self._committed = offset
