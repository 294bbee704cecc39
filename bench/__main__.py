"""``python -m bench run`` and ``python -m bench report``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from bench import report as reporting
from bench.arms import ArmUnavailableError
from bench.arms.registry import ARMS
from bench.drain import drain
from bench.measuring import interleaved
from bench.results import FULL, QUICK, Results
from bench.rows import Rows
from bench.stage import Stage, machine, opened
from bench.summary import summarise
from bench.workloads import Workload, full, quick, selected

#: What is drained first, and not kept, so that the broker has compiled what it runs most.
_WARM_UP = Rows(50_000, 300)


@click.group()
def main() -> None:
    """How fast the relay is, at what cost, beside what else could be taken."""


@main.command()
@click.option("--quick", "is_quick", is_flag=True, help="A first answer within three minutes, kept apart.")
@click.option("--workload", "names", multiple=True, help="Only this one; may be given several times.")
@click.option("--arm", "arms", multiple=True, help="Only this one; may be given several times.")
@click.option("--resume", is_flag=True, help="Go on with the last bench; what has its result isn't run again.")
def run(*, is_quick: bool, names: Sequence[str], arms: Sequence[str], resume: bool) -> None:
    """Start servers, run everything, write the results."""
    known = quick() if is_quick else full()
    for kind, given, possible in (
        ("workload", names, {workload.name for workload in known}),
        ("arm", arms, {arm for workload in known for arm in workload.arms}),
    ):
        if unknown := set(given) - possible:
            raise click.BadParameter(f"no {kind} {', '.join(sorted(unknown))}; there are {', '.join(sorted(possible))}")
    directory = QUICK if is_quick else FULL
    found = Results.last(directory) if resume else None
    results = found or Results(directory, datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"))
    began = time.monotonic()
    asyncio.run(_run(selected(known, names, arms), results))
    print(f"took {time.monotonic() - began:,.0f} s")
    _report(results, is_quick=is_quick)


@main.command()
@click.option("--quick", "is_quick", is_flag=True, help="Of the last quick bench.")
def report(*, is_quick: bool) -> None:
    """Write the summary of the last bench, and docs/performance.md, from its results."""
    results = Results.last(QUICK if is_quick else FULL)
    if results is None:
        raise click.ClickException("there are no results: run the bench first")
    _report(results, is_quick=is_quick)


def _report(results: Results, *, is_quick: bool) -> None:
    found = reporting.in_order(results.all())
    summary = summarise(found)
    path = results.directory / "summary.json"
    path.write_text(json.dumps(reporting.rounded(summary), indent=1) + "\n")
    print(reporting.tables(found, summary))
    if not is_quick:
        reporting.write_document(found, summary)


async def _run(workloads: Sequence[Workload], results: Results) -> None:
    async with opened(print) as stage:
        about = {"machine": await machine(stage)}
        await drain(stage, ARMS["mark"](), _WARM_UP)
        missing: set[str] = set()
        for workload in workloads:
            for number, arm in enumerate(interleaved(workload.arms, workload.rounds)):
                round_ = number // len(workload.arms) + 1
                if arm in missing or results.has(workload.name, arm, round_):
                    continue
                if not await _one(stage, workload, arm, round_, results, about):
                    missing.add(arm)


async def _one(
    stage: Stage, workload: Workload, arm: str, round_: int, results: Results, about: dict[str, Any]
) -> bool:
    """Run and keep one; False when the arm can't be had at all."""
    began = time.monotonic()
    title = f"{workload.name}, {arm}, round {round_}"
    try:
        figures = await workload.measure(stage, arm)
        said = reporting.in_short(figures)
    except ArmUnavailableError as error:
        print(f"{title}: left out: {error}", flush=True)
        return False
    except Exception as error:
        # Of any kind: the others go on, and the result says what went wrong, without the paths of a traceback.
        problem = _problem(error)
        figures = {"problem": problem.splitlines()[0]}
        said = f"no result: {problem}"
    results.add(workload.name, arm, round_, figures, **_about(arm), **about)
    print(f"{title}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return True


def _problem(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


def _about(arm: str) -> dict[str, Any]:
    if arm not in ARMS:
        return {}
    kind = ARMS[arm]()
    return {name: getattr(kind, name) for name in ("ordered", "polling", "deletes", "note")}


if __name__ == "__main__":
    main(prog_name="python -m bench")
