"""What a bench came to is worked out from its runs, and from nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.goals import goals
from bench.idle import executed
from bench.measuring import interleaved
from bench.plots import Bar, bars
from bench.report import in_order, in_short, rounded, tables, write_document
from bench.results import Results
from bench.steady import percentiles
from bench.summary import Result, summarise
from bench.workloads import full, quick, selected

MACHINE = {"cores": 2}


def drained(rate: float, cpu: float = 40, **more: Any) -> dict[str, Any]:
    cpu_us = {"relay": cpu / 4, "postgresql": cpu / 2, "kafka": cpu / 4, "all": cpu}
    return {"rate": rate, "cpu_us": cpu_us, "rss_mb": 90, "wal_bytes": 700, "repeated": 0, **more}


def result(arm: str, *runs: dict[str, Any], workload: str = "drain_300") -> Result:
    numbered = [{"round": number, **run} for number, run in enumerate(runs, 1)]
    about = {"ordered": True, "polling": arm != "debezium", "note": f"about {arm}", "machine": MACHINE}
    return {"workload": workload, "arm": arm, **about, "runs": numbered}


def tried(rate: float, cpu: float, claims: int) -> dict[str, Any]:
    return {"batch": 2_000, "claims": claims, "rate": rate, "cpu_us": {"all": cpu}}


DRAINS = [
    result("mark", drained(30_000), drained(50_000), drained(40_000, 50)),
    result("textbook", drained(1_000)),
    result("debezium", drained(20_000, 100)),
    result("R_db", {"tried": [tried(50_000, 10, 1), tried(60_000, 20, 2)]}, {"tried": [tried(90_000, 12, 1)]}),
    result("R_kafka", {"tried": [tried(140_000, 9, 2)]}),
]


def test_medians_by_arm_and_peers_by_name() -> None:
    found = summarise(DRAINS)["drain_300"]
    assert found["mark"] == 40_000
    assert found["textbook"] == 1_000
    assert found["cpu_us"] == {"mark": 40, "textbook": 40}
    assert found["peers"] == {"debezium": {"rate": 20_000, "ordered": True, "polling": False, "cpu_us": 100}}


def test_roofs_are_the_best_of_the_medians() -> None:
    found = summarise(DRAINS)["drain_300"]
    assert found["R_db"] == 70_000, "the median of 50,000 and 90,000 is more than 60,000"
    assert found["R_kafka"] == 140_000
    assert found["R_serial"] == pytest.approx(1 / (1 / 70_000 + 1 / 140_000))
    assert found["R_cpu"] == pytest.approx(2 / 20e-6), "two cores; 11 and 9 µs"


def test_a_failed_run_counts_for_nothing() -> None:
    assert summarise([result("mark", {"problem": "of 10 messages: 1 lost"})]) == {}
    found = summarise([result("mark", drained(10), {"problem": "of 10 messages: 1 lost"})])
    assert found["drain_300"]["mark"] == 10


def test_goals_are_said_only_where_they_were_measured() -> None:
    lines = {name: (measured, met) for name, _, measured, met in goals(summarise(DRAINS))}
    assert lines["drain beside textbook"] == ("40", "reached")
    assert lines["drain beside R_serial"] == ("0.857", "missed")
    assert lines["CPU beside Debezium's"] == ("0.4", "reached")
    assert not any("delete" in name or "latency" in name for name in lines)
    assert goals({}) == []


def test_ratios_are_taken_within_a_round() -> None:
    clean = result("clean", drained(100), drained(10), workload="conditions")
    held = result("xmin held", drained(50), drained(8), workload="conditions")
    found = summarise([clean, held])["conditions"]
    assert found["xmin held"]["ratio"] == pytest.approx((0.5 + 0.8) / 2)


def test_tables_name_what_failed_and_what_a_reader_must_know() -> None:
    results = [*DRAINS[:-1], result("batched", {"problem": "of 10 messages: 1 lost\nlog"})]
    text = tables(results, summarise(results))
    assert "- batched, round 1: of 10 messages: 1 lost\n" in text
    assert "- debezium: about debezium" in text
    assert "| mark | 1.00 | 40,000 [30,000, 50,000] | 40.0 [40.0, 50.0] |" in text
    assert "| R_db | 2,000 | 1 | 70,000 [50,000, 90,000] | 11.0 [10.0, 12.0] |" in text


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (drained(12_345.6), "12,346 messages/s, 40.0 µs CPU a message"),
        (drained(12_345.6, repeated=7), "12,346 messages/s, 40.0 µs CPU a message, 7 repeated"),
        ({"tried": [tried(1, 2, 3), tried(4, 5, 6)]}, "4 messages/s, 5.0 µs CPU a message, at best"),
        ({"latency_ms": {"p50": 1.25, "p99": 9.0}}, "p50 1.2 ms, p99 9.0 ms"),
        ({"cpu_percent": 0.5, "messages": 3}, "cpu_percent 0.50"),
    ],
)
def test_a_run_is_said_in_one_line(figures: dict[str, Any], said: str) -> None:
    assert in_short(figures) == said


def test_bars_are_as_long_as_what_they_show() -> None:
    found = ElementTree.fromstring(
        bars("A <title>", "/s", [Bar("ours", 80, 100, 120, True), Bar("a & b", 50, 50, 50, False)])
    )
    shapes = {kind: found.findall(f"{{http://www.w3.org/2000/svg}}{kind}") for kind in ("rect", "line", "text")}
    _, ours, other = (float(rect.get("width", "0")) for rect in shapes["rect"])
    assert ours == pytest.approx(2 * other, rel=0.01)
    line, start = shapes["line"][0], float(shapes["rect"][1].get("x", "0"))
    low, high = ((float(line.get(end, "0")) - start) / ours for end in ("x1", "x2"))
    assert low == pytest.approx(0.8, rel=0.01)
    assert high == pytest.approx(1.2, rel=0.01)
    assert [text.text for text in shapes["text"]] == ["A <title>", "ours", "100 /s", "a & b", "50.0 /s"]


def test_the_document_has_a_plot_for_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    about = {"measured_at": "2026-01-01T00:00:00+00:00", "processor": "some", "memory_gb": 8.0, "system": "Linux"}
    machine = {**MACHINE, **about, "python": "3.11", "postgresql": "18", "kafka": "4.4"}
    results = in_order({**one, "machine": machine} for one in reversed(DRAINS))
    write_document(results, summarise(results))
    text = (tmp_path / "docs" / "performance.md").read_text()
    plots = re.findall(r"\]\((performance/[^)]*)\)", text)
    assert plots == ["performance/drain_300_rate.svg", "performance/drain_300_cpu.svg"]
    assert all((tmp_path / "docs" / plot).exists() for plot in plots)
    assert "on 2 cores (some), 8 GB" in text
    places = [text.index(f"| {arm} |") for arm in ("mark", "textbook", "debezium")]
    assert places == sorted(places), "as the registry lists them"


def test_a_run_that_has_its_result_is_not_run_again(tmp_path: Path) -> None:
    results = Results(tmp_path, "20260101T000000Z")
    results.add("drain_300", "mark, 4 processes", 1, {"rate": 1.0}, machine=MACHINE)
    results.add("drain_300", "mark, 4 processes", 2, {"problem": "lost"}, machine=MACHINE)
    again = Results.last(tmp_path)
    assert again is not None
    assert again.has("drain_300", "mark, 4 processes", 1)
    assert not again.has("drain_300", "mark, 4 processes", 2), "a run that failed has no result"
    assert not again.has("drain_300", "mark", 1)
    again.add("drain_300", "mark, 4 processes", 2, {"rate": 2.0}, machine=MACHINE)
    (only,) = again.all()
    assert only["runs"] == [{"round": 1, "rate": 1.0}, {"round": 2, "rate": 2.0}]


def test_the_last_bench_is_that_which_began_last(tmp_path: Path) -> None:
    assert Results.last(tmp_path) is None
    for stamp in ("20260101T000000Z", "20260201T000000Z"):
        Results(tmp_path, stamp).add("idle", "mark", 1, {}, machine=MACHINE)
    (tmp_path / "summary.json").write_text("{}")
    found = Results.last(tmp_path)
    assert found is not None
    assert found.stamp == "20260201T000000Z"
    assert len(list(found.all())) == 1


def test_arms_take_turns_forwards_and_backwards() -> None:
    assert "".join(interleaved("ABC", 3)) == "ABCCBAABC"


def test_quick_measures_no_other_than_full() -> None:
    arms = {workload.name: set(workload.arms) for workload in full()}
    assert all(set(workload.arms) <= arms[workload.name] for workload in quick())


def test_what_is_named_is_run_and_nothing_else() -> None:
    (only,) = selected(full(), ["drain_1024"], ["mark", "R_db"])
    assert (only.name, list(only.arms)) == ("drain_1024", ["mark", "R_db"])
    assert [workload.name for workload in selected(full(), [], [])] == [workload.name for workload in full()]


def test_percentiles_of_few_are_the_largest() -> None:
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 3.0, "p99": 3.0, "p99_9": 3.0}
    assert percentiles([float(n) for n in range(1_000)])["p99"] == 990


def test_figures_have_no_digits_that_say_nothing() -> None:
    assert rounded({"a": 12_345.678, "b": {"c": 1.23456, "d": True, "e": 7}}) == {
        "a": 12_346,
        "b": {"c": 1.235, "d": True, "e": 7},
    }


def test_statements_are_counted_as_executed() -> None:
    log = """\
2026-01-01 00:00:00.000 UTC [7] LOG:  duration: 0.1 ms  parse <unnamed>: SELECT 1
2026-01-01 00:00:00.000 UTC [7] LOG:  duration: 0.1 ms  bind __asyncpg_1: SELECT 1
2026-01-01 00:00:00.000 UTC [7] LOG:  duration: 0.1 ms  execute __asyncpg_1:
\t-- own
\tSELECT 1
2026-01-01 00:00:00.000 UTC [7] LOG:  duration: 0.012 ms  statement: BEGIN; SET LOCAL statement_timeout = 1
2026-01-01 00:00:00.000 UTC [7] LOG:  checkpoint starting: time
"""
    assert executed(log) == 2
