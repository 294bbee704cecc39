"""What becomes of a run: its result is kept, and one that fails stops nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.__main__ import _one, main
from bench.arms import ArmUnavailableError
from bench.results import Results
from bench.stage import Stage
from bench.workloads import Workload


async def one(results: Results, outcome: Mapping[str, Any] | BaseException) -> bool:
    """Run a workload with that outcome; what :func:`_one` says."""

    async def measure(stage: Stage, arm: str) -> Mapping[str, Any]:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    workload = Workload("idle", measure, ["mark"], 1)
    no_stage: Any = None
    return await _one(no_stage, workload, "mark", 1, results, {"machine": {"cores": 2}})


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path, "20260101T000000Z")


async def test_a_result_is_kept_with_the_machine_and_what_the_arm_is(results: Results) -> None:
    assert await one(results, {"cpu_percent": 0.5})
    (kept,) = results.all()
    assert kept["runs"] == [{"round": 1, "cpu_percent": 0.5}]
    assert (kept["machine"], kept["ordered"], kept["polling"]) == ({"cores": 2}, True, True)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (RuntimeError("of 10 messages: 1 lost"), "of 10 messages: 1 lost"),
        (TimeoutError(), "TimeoutError"),
        (ExceptionGroup("several", [ExceptionGroup("", [ValueError("the first")]), ValueError()]), "the first"),
    ],
    ids=["error", "without words", "of several"],
)
async def test_a_failure_is_kept_and_no_result(results: Results, error: Exception, problem: str) -> None:
    assert await one(results, error)
    (kept,) = results.all()
    assert kept["runs"] == [{"round": 1, "problem": problem}]
    assert not results.has("idle", "mark", 1)


async def test_an_arm_that_can_not_be_had_is_left_out(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    assert not await one(results, ArmUnavailableError("no Java here"))
    assert list(results.all()) == []
    assert capsys.readouterr().out == "idle, mark, round 1: left out: no Java here\n"


async def test_whoever_stops_the_bench_stops_it(results: Results) -> None:
    with pytest.raises(asyncio.CancelledError):
        await one(results, asyncio.CancelledError())
    assert list(results.all()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--quick", "--arm", "kafka"], "no arm kafka; there are R_db, R_kafka, "),
        (["run", "--quick", "--workload", "sent"], "no workload sent; there are after_idle, drain_300, "),
        (["report"], "there are no results: run the bench first"),
    ],
)
def test_what_can_not_be_is_said_before_anything_starts(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code != 0
    assert said in done.output
