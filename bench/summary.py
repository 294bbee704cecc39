"""What a bench came to: medians over its runs, in the shape that ``bench/results/summary.json`` has."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

from bench.workloads import BASELINES, LOOPS, OURS, R_DB, R_KAFKA

Result: TypeAlias = Mapping[str, Any]
Summary: TypeAlias = dict[str, Any]

_DRAINS = ("drain_300", "drain_1024")
_LATENCIES = ("latency_500", "latency_2000")


def summarise(results: Iterable[Result]) -> Summary:
    """Messages a second, milliseconds, CPU in µs a message over all processes; what wasn't measured is left out."""
    by_workload: dict[str, dict[str, Result]] = {}
    for result in results:
        if runs_of(result):
            by_workload.setdefault(result["workload"], {})[result["arm"]] = result
    summary: Summary = {}
    for workload, arms in by_workload.items():
        if workload in _DRAINS:
            summary[workload] = _drain(arms)
        elif workload in _LATENCIES:
            summary[workload] = _latency(arms)
    ours = {workload: arms["mark"] for workload, arms in by_workload.items() if "mark" in arms}
    if woken := by_workload.get("after_idle", {}).get("mark, woken"):
        summary["after_idle"] = _percentiles(woken)
    if "idle" in ours:
        summary["idle"] = {
            name: median(ours["idle"], itemgetter(name)) for name in ("cpu_percent", "statements_per_second")
        }
    if "drain_300" in ours:
        summary["rss_mb"] = median(ours["drain_300"], itemgetter("rss_mb"))
        summary["wal_bytes"] = median(ours["drain_300"], itemgetter("wal_bytes"))
    if "sustained" in ours:
        summary["sustained"] = median(ours["sustained"], itemgetter("written_per_second"))
    if "writers" in ours:
        summary["writers"] = _writers(ours["writers"])
    if "memory" in ours:
        summary["memory"] = _memory(ours["memory"])
    for workload, baseline in BASELINES.items():
        if baseline in by_workload.get(workload, {}):
            summary[workload] = _ratios(by_workload[workload], baseline)
    return summary


def _drain(arms: Mapping[str, Result]) -> Summary:
    found: Summary = {name: median(arms[name], rate_of) for name in (*OURS, *LOOPS) if name in arms}
    peers = [name for name in arms if name not in (*OURS, *LOOPS, R_DB, R_KAFKA)]
    found["peers"] = {
        name: {
            "rate": median(arms[name], rate_of),
            "ordered": arms[name]["ordered"],
            "polling": arms[name]["polling"],
            "cpu_us": median(arms[name], cpu_of),
        }
        for name in peers
    }
    found["cpu_us"] = {name: median(arms[name], cpu_of) for name in (*OURS, *LOOPS) if name in arms}
    if R_DB in arms and R_KAFKA in arms:
        database, kafka = roof(arms[R_DB]), roof(arms[R_KAFKA])
        found |= {
            R_DB: database["rate"],
            R_KAFKA: kafka["rate"],
            "R_serial": 1 / (1 / database["rate"] + 1 / kafka["rate"]),
            "R_cpu": arms[R_DB]["machine"]["cores"] / ((database["cpu_us"] + kafka["cpu_us"]) / 1e6),
        }
    return found


def roof(result: Result) -> Mapping[str, float]:
    """The best of what was tried, by medians: the highest rate, and the least CPU, which may be another's."""
    tried: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for run in runs_of(result):
        for one in run["tried"]:
            tried.setdefault((one["batch"], one["claims"]), []).append(one)
    return {
        "rate": max(statistics.median(map(rate_of, found)) for found in tried.values()),
        "cpu_us": min(statistics.median(map(cpu_of, found)) for found in tried.values()),
    }


def _latency(arms: Mapping[str, Result]) -> Summary:
    others = {name: _percentiles(result) for name, result in arms.items() if name not in (*OURS, *LOOPS)}
    found: Summary = {name: _percentiles(arms[name]) for name in ("mark, woken", *LOOPS) if name in arms}
    if "mark" in arms:
        found["ours"] = _percentiles(arms["mark"])
    return {**found, "peers": others}


def _percentiles(result: Result) -> dict[str, float]:
    runs = [run["latency_ms"] for run in runs_of(result)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _writers(result: Result) -> Summary:
    return {
        "due_per_second": median(result, itemgetter("due_per_second")),
        "rate_kept": median(result, lambda run: run["written_per_second"] / run["due_per_second"]),
        "p99_ratio": median(result, lambda run: run["beside_ms"]["p99"] / run["alone_ms"]["p99"]),
    }


def _memory(result: Result) -> Summary:
    runs = runs_of(result)
    return {
        "idle_mb": median(result, itemgetter("idle_mb")),
        "peak_mb": {
            name: statistics.median(run["cases"][name]["peak_mb"] for run in runs) for name in runs[0]["cases"]
        },
        # A bound is exceeded if it ever is, so the worst of all.
        "of_bound": max(case["peak_mb"] / case["bound_mb"] for run in runs for case in run["cases"].values()),
    }


def _ratios(arms: Mapping[str, Result], baseline: str) -> Summary:
    """Rates beside the baseline's of the same round."""
    base = {run["round"]: rate_of(run) for run in runs_of(arms[baseline])}
    found: Summary = {baseline: median(arms[baseline], rate_of)}
    for name, result in arms.items():
        ratios = [rate_of(run) / base[run["round"]] for run in runs_of(result) if run["round"] in base]
        if name != baseline and ratios:
            found[name] = {"ratio": statistics.median(ratios), "rate": median(result, rate_of)}
    return found


def runs_of(result: Result) -> Sequence[Mapping[str, Any]]:
    """Its runs that have a result."""
    return [run for run in result["runs"] if "problem" not in run]


def median(result: Result, figure: Callable[[Mapping[str, Any]], float]) -> float:
    return statistics.median(map(figure, runs_of(result)))


def rate_of(run: Mapping[str, Any]) -> float:
    return float(run["rate"])


def cpu_of(run: Mapping[str, Any]) -> float:
    """µs a message, over all processes."""
    return float(run["cpu_us"]["all"])
