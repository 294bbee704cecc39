"""Taking turns, and how the figures of several runs are written down."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

#: A script that isn't through by then ends with what it has printed.
AT_MOST_SECONDS = 350.0


def interleaved(arms: Sequence[T], rounds: int) -> Iterator[T]:
    """Every arm in every round, each second round backwards."""
    for number in range(rounds):
        yield from arms if number % 2 == 0 else reversed(arms)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, and in brackets the lowest and the highest."""
    low, middle, high = (f"{of(values):,.{digits}f}" for of in (min, statistics.median, max))
    return middle if low == high else f"{middle} [{low}, {high}]"


def ratios(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Round by round."""
    return spread([value / base for value, base in zip(values, baseline, strict=True)], 2)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """As Markdown."""
    print(f"\n{title}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print(flush=True)


def print_machine() -> None:
    print(f"{os.cpu_count()} cores, shared by all processes; Python {platform.python_version()}", flush=True)
