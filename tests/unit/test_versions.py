"""The README and the package claim the versions that ``make matrix`` runs the tests on, and no others."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from outbox_relay.errors import ServerError
from outbox_relay.servers.versions import KAFKA, POSTGRES, USUAL_KAFKA, chosen
from tests.matrix import OLDEST_PYTHON, PYTHONS, Outcome, Row, rows, table

REPOSITORY = Path(__file__).parents[2]


def claimed(product: str) -> list[str]:
    """The versions after its name under *Tested with*: ``1.0, 1.1 and 2.0``."""
    section = re.search(r"## Tested with\n\n(.+?)\n\n", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert section is not None
    versions = re.search(rf"{product} ((?:[\d.]+(?:, | and )?)+)", " ".join(section[1].split()))
    assert versions is not None
    return re.findall(r"\d+(?:\.\d+)?", versions[1])


@pytest.mark.parametrize(
    ("product", "versions"), [("Python", PYTHONS), ("PostgreSQL", [*POSTGRES]), ("Apache Kafka", [*KAFKA])]
)
def test_the_readme_claims_what_the_matrix_runs(product: str, versions: Sequence[str]) -> None:
    assert claimed(product) == list(versions)


def test_the_package_claims_the_pythons_that_the_readme_claims() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    classifiers = [one.removeprefix(prefix) for one in project["classifiers"] if one.startswith(prefix)]
    assert [f"3.{minor}" for minor in classifiers] == claimed("Python")
    assert project["requires-python"] == f">={PYTHONS[0]}" == ">={}.{}".format(*OLDEST_PYTHON)


def test_each_version_is_run_and_the_newest_together() -> None:
    run = rows()
    assert {row.postgres for row in run} == set(POSTGRES)
    assert {row.kafka for row in run} == set(KAFKA)
    assert {row.python for row in run} == set(PYTHONS)
    assert run[0] == Row([*POSTGRES][-1], USUAL_KAFKA, PYTHONS[-1])
    assert len(run) == max(len(POSTGRES), len(KAFKA), len(PYTHONS))


def test_a_row_that_was_not_run_has_not_passed() -> None:
    run = rows()
    lines = table(run, {}, {run[0]: Outcome(True, "12 passed"), run[1]: Outcome(False, "1 failed")}).splitlines()
    assert [("| passed |" in line, "| NOT PASSED |" in line) for line in lines[2:5]] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    assert "not run" in lines[4]


def test_an_unknown_version_is_refused_with_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_VERSION", "2.8")
    with pytest.raises(ServerError, match=r"KAFKA_VERSION is '2\.8', and must be one of 3\.9, 4\.4"):
        chosen("KAFKA_VERSION", KAFKA)


@pytest.mark.parametrize("value", ["", None])
def test_without_a_choice_no_version_is_chosen(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTGRES_VERSION", raising=False)
    if value is not None:
        monkeypatch.setenv("POSTGRES_VERSION", value)
    assert chosen("POSTGRES_VERSION", POSTGRES) is None
