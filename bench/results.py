"""Results on disk: one file for each workload and arm of a bench, written anew after each run.

So a bench that was interrupted can go on, and a run that has its result isn't run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: Of full benches; they are committed. Quick ones are for a first look.
FULL = Path("bench/results")
QUICK = Path("reports/bench")

#: What a run showed: figures by name.
Figures = Mapping[str, Any]


class Results:
    """Those of one bench, whose ``stamp`` begins the names of its files."""

    def __init__(self, directory: Path, stamp: str) -> None:
        self.directory = directory
        self.stamp = stamp
        directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def last(cls, directory: Path) -> Results | None:
        """Those of the bench that began last."""
        stamps = sorted(path.name.split("-")[0] for path in directory.glob("*-*.json"))
        return cls(directory, stamps[-1]) if stamps else None

    def has(self, workload: str, arm: str, round_: int) -> bool:
        """Whether that run has its result already."""
        return any(run["round"] == round_ for run in self.runs(workload, arm))

    def runs(self, workload: str, arm: str) -> list[dict[str, Any]]:
        """The runs that have a result, in the order in which they were run."""
        return [run for run in self._read(workload, arm).get("runs", []) if "problem" not in run]

    def add(self, workload: str, arm: str, round_: int, figures: Figures, **about: Any) -> None:
        """Keep a result, or ``problem=…`` for why there is none; ``about`` says what the arm and the machine are."""
        path = self._path(workload, arm)
        found = self._read(workload, arm)
        runs = [run for run in found.get("runs", []) if run["round"] != round_]
        result = {"workload": workload, "arm": arm, **about, "runs": [*runs, {"round": round_, **figures}]}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)

    def all(self) -> Iterator[dict[str, Any]]:
        """What every file holds."""
        for path in sorted(self.directory.glob(f"{self.stamp}-*.json")):
            yield json.loads(path.read_text())

    def _read(self, workload: str, arm: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._path(workload, arm).read_text())
        except FileNotFoundError:
            return {}
        return found

    def _path(self, workload: str, arm: str) -> Path:
        name = "".join(letter if letter.isalnum() else "_" for letter in arm)
        return self.directory / f"{self.stamp}-{workload}-{name}.json"
