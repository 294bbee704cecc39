"""What a person sees of the demo: lines with the time, on a terminal bars that move, and a table at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

_STYLES = {None: "", True: "green", False: "bold red"}


class Row(NamedTuple):
    """One line of the table; ``good`` is None where the figure is neither good nor bad."""

    name: str
    figure: str
    meaning: str
    good: bool | None = None


class Screen:
    """Rich on a terminal, plain text elsewhere. For one thread."""

    def __init__(self, *, to_stderr: bool) -> None:
        # Text is no markup, and a long line is the terminal's to wrap.
        self._console = Console(stderr=to_stderr, markup=False, highlight=False, soft_wrap=True)
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        """One line, with the time."""
        self._console.print(f"{self.seconds:5.1f} s  {text}")

    def line(self, text: str, *, good: bool | None = None) -> None:
        """One line without the time."""
        self._console.print(text, style=_STYLES[good])

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """On a terminal, show within the block that something is going on."""
        with self._console.status(text) if self._console.is_terminal else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def bars(self, totals: Mapping[str, int]) -> Iterator[Callable[..., None]]:
        """On a terminal, show a bar for each name within the block. What it gives is called to move them all."""
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        with progress:
            tasks = [progress.add_task(name, total=total) for name, total in totals.items()]

            def show(*completed: int) -> None:
                for task, value in zip(tasks, completed, strict=True):
                    progress.update(task, completed=value)

            yield show

    def table(self, rows: Sequence[Row]) -> None:
        """The rows, each with its meaning."""
        if not self._console.is_terminal:
            for row in rows:
                self._console.print(f"{row.name:<22}{row.figure:>7}  {row.meaning}")
            return
        table = Table(box=box.ROUNDED, show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column()
        for row in rows:
            table.add_row(row.name, row.figure, row.meaning, style=_STYLES[row.good])
        self._console.print(table, soft_wrap=False)
