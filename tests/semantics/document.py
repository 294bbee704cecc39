"""The table of ``docs/semantics.md``, written and read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.semantics.faults import FAULTS
from tests.semantics.measure import NAMES, Cell

DOCUMENT = Path(__file__).parents[2] / "docs" / "semantics.md"

_PLACE = re.compile(r"(<!-- table -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rows(cells: Iterable[Cell]) -> Iterator[tuple[str, list[str]]]:
    """Each fault, and what each mode makes of it: ``lost / repeated``."""
    by_place = {(cell.fault, cell.mode): cell for cell in cells}
    for fault in FAULTS:
        found = [by_place.get((fault, mode)) for mode in NAMES.values()]
        yield fault, ["" if cell is None else f"{cell.lost} / {cell.repeated}" for cell in found]


def write(cells: Iterable[Cell]) -> None:
    lines = [["", *NAMES.values()], ["---"] * (1 + len(NAMES)), *([fault, *row] for fault, row in rows(cells))]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    DOCUMENT.write_text(_PLACE.sub(lambda found: found[1] + table + found[3], DOCUMENT.read_text()))


def read() -> dict[tuple[str, str], tuple[int, int]]:
    """By mode, as the service calls it, and fault: lost and repeated."""
    found = _PLACE.search(DOCUMENT.read_text())
    assert found is not None, f"{DOCUMENT} has no table"
    table = [[part.strip() for part in line.strip("|").split("|")] for line in found[2].splitlines()]
    modes = {name: mode for mode, name in NAMES.items()}
    (_, *columns), _, *lines = table
    said = {}
    for fault, *row in lines:
        for name, figures in zip(columns, row, strict=True):
            lost, repeated = map(int, figures.split("/"))
            said[modes[name], fault] = (lost, repeated)
    return said
