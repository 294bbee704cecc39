"""``python -m tests.semantics [MODE …] [--document]``: measure all cells, or some modes'; write the guide's table."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.semantics import document
from tests.semantics.faults import FAULTS
from tests.semantics.measure import NAMES, Cell, measure
from tests.semantics.place import servers

REPORT = Path(__file__).parents[2] / "reports" / "semantics.json"


async def cells(modes: list[str]) -> list[Cell]:
    measured = []
    with servers() as (postgres, kafka):
        for fault in FAULTS:
            for mode in modes:
                began = time.monotonic()
                cell = await measure(mode, fault, postgres, kafka)
                sys.stdout.write(
                    f"{cell.fault}, {cell.mode}: {cell.lost} lost, {cell.repeated} repeated"
                    f" ({time.monotonic() - began:.0f} s)\n"
                )
                sys.stdout.flush()
                measured.append(cell)
    return measured


def show(measured: list[Cell]) -> None:
    table = Table("fault", *(NAMES[mode] for mode in NAMES), title="lost / repeated")
    for fault, row in document.rows(measured):
        table.add_row(fault, *row)
    Console().print(table)


def main(arguments: list[str]) -> None:
    modes = [mode for mode in NAMES if mode in arguments] or list(NAMES)
    measured = asyncio.run(cells(modes))
    show(measured)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps([asdict(cell) for cell in measured], indent=1) + "\n")
    if "--document" in arguments:
        document.write(measured)


if __name__ == "__main__":
    main(sys.argv[1:])
