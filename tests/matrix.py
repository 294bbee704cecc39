"""``make matrix``: the tests on each version that the README may claim. Each at least once, not every combination.

What came of it is printed, and written to ``reports/matrix.md`` after each row; what pytest said lies beside it. The
tests of the demo and of the bench are left out: neither is meant for other servers than the newest. Numbers of rows, as
in ``python -m tests.matrix 1 4``, run these alone. It ends with 1 if a row didn't pass, or wasn't run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import click

from outbox_relay.servers.versions import KAFKA, POSTGRES

REPOSITORY = Path(__file__).parents[1]
REPORTS = REPOSITORY / "reports"

#: Those that the README and the package's classifiers may claim. Any later one that is here is tried too.
PYTHONS = ("3.11", "3.12", "3.13")
OLDEST_PYTHON = (3, 11)

_LEFT_OUT = ("tests/acceptance/test_demo.py", "tests/acceptance/test_bench.py")
_SETUP_SECONDS = 600.0
_TESTS_SECONDS = 1800.0
_DESCRIBE = "import json, sys; print(json.dumps([sys.version_info[:2], sys.version.split()[0]]))"


@dataclass(frozen=True)
class Row:
    """One run of the tests."""

    postgres: str
    kafka: str
    python: str

    @property
    def name(self) -> str:
        return f"postgres{self.postgres}-kafka{self.kafka}-python{self.python}"


@dataclass(frozen=True)
class Python:
    path: Path
    version: str  #: in full


@dataclass(frozen=True)
class Outcome:
    passed: bool
    said: str


def rows(pythons: Sequence[str] = PYTHONS) -> list[Row]:
    """As few as have every version; the newest go together."""
    newest_first = [list(reversed(names)) for names in (list(POSTGRES), list(KAFKA), list(pythons))]
    longest = max(map(len, newest_first))
    return [Row(*(names[number % len(names)] for names in newest_first)) for number in range(longest)]


def pythons_here() -> dict[str, Python]:
    """By "3.12" and the like, one each that PATH or pyenv has and that isn't too old."""
    found: dict[tuple[int, int], Python] = {}
    for path in _candidates():
        try:
            said = subprocess.run([path, "-c", _DESCRIBE], capture_output=True, text=True, check=True, timeout=60)
            short, version = json.loads(said.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):  # pyenv's stand-ins are there for what isn't
            continue
        if tuple(short) >= OLDEST_PYTHON:
            found.setdefault(tuple(short), Python(path, version))
    return {f"{major}.{minor}": found[major, minor] for major, minor in sorted(found)}


def _candidates() -> Iterator[Path]:
    if shutil.which("pyenv") is not None:
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        yield from sorted(Path(root).glob("versions/3.*/bin/python"), reverse=True)
    for directory in os.get_exec_path():
        yield from (path for path in Path(directory).glob("python3*") if re.fullmatch(r"python3(\.\d+)?", path.name))


def run(row: Row, python: Python | None) -> Outcome:
    """Make the row's virtual environment, run the tests in it, and wait for them."""
    if python is None:
        return Outcome(False, f"Python {row.python} isn't here")
    venv = REPOSITORY / ".cache" / "matrix" / f"python{python.version}"
    with (REPORTS / f"{row.name}.log").open("w") as log:
        make = ["make", "setup", f"VENV={venv}", f"PYTHON={python.path}"]
        if _code_of(make, log.fileno(), os.environ, _SETUP_SECONDS) != 0:
            return Outcome(False, f"its virtual environment could not be made, see {log.name}")
        results = REPORTS / f"{row.name}.xml"
        results.unlink(missing_ok=True)
        pytest: list[str | Path] = [venv / "bin" / "python", "-m", "pytest", "-n", "2", "--dist", "loadfile"]
        began = time.monotonic()
        code = _code_of(
            [*pytest, *(f"--ignore={path}" for path in _LEFT_OUT), f"--junitxml={results}"],
            log.fileno(),
            _environment(row),
            _TESTS_SECONDS,
        )
        if code is None:
            return Outcome(False, f"not done within {_TESTS_SECONDS:g} s, see {log.name}")
    counts = _counts(results)
    seconds = time.monotonic() - began
    return Outcome(code == 0, f"{counts} in {seconds / 60:.1f} min" + (f", see {log.name}" if code else ""))


def _environment(row: Row) -> dict[str, str]:
    servers_of_ones_own = ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS")
    return {
        **{name: value for name, value in os.environ.items() if name not in servers_of_ones_own},
        "POSTGRES_VERSION": row.postgres,
        "KAFKA_VERSION": row.kafka,
        "REQUIRE_SERVERS": "1",
    }


def _code_of(command: Sequence[str | Path], output: int, environment: Mapping[str, str], seconds: float) -> int | None:
    """The exit code, or None where it had to be ended; its servers end with it."""
    try:
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, check=False, timeout=seconds
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def _counts(results: Path) -> str:
    try:
        suite = ElementTree.parse(results).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        suite = None
    if suite is None:
        return "no tests were run"
    tests, skipped, *failed = (int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors"))
    counts = {"passed": tests - skipped - sum(failed), "skipped": skipped, "failed": sum(failed)}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def table(all_rows: Iterable[Row], pythons: Mapping[str, Python], outcomes: Mapping[Row, Outcome]) -> str:
    lines = ["| PostgreSQL | Apache Kafka | Python | | |", "|---|---|---|---|---|"]
    for row in all_rows:
        python = pythons[row.python].version if row.python in pythons else row.python
        outcome = outcomes.get(row, Outcome(False, "not run"))
        versions = f"{POSTGRES[row.postgres].removesuffix('.0')} | {KAFKA[row.kafka]} | {python}"
        lines.append(f"| {versions} | {'passed' if outcome.passed else 'NOT PASSED'} | {outcome.said} |")
    return "\n".join(lines) + "\n"


def main(numbers: Sequence[int]) -> int:
    pythons = pythons_here()
    all_rows = rows(sorted({*PYTHONS, *pythons}, key=lambda version: [int(part) for part in version.split(".")]))
    REPORTS.mkdir(exist_ok=True)
    outcomes: dict[Row, Outcome] = {}
    for number, row in enumerate(all_rows, 1):
        if not numbers or number in numbers:
            click.echo(f"row {number} of {len(all_rows)}: {row.name}")
            outcomes[row] = run(row, pythons.get(row.python))
            (REPORTS / "matrix.md").write_text(table(all_rows, pythons, outcomes))
    click.echo(table(all_rows, pythons, outcomes), nl=False)
    return int(not all(row in outcomes and outcomes[row].passed for row in all_rows))


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
