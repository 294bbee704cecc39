"""What was aimed at, and what was measured: ratios, if there is no unit. On two cores that also run the servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.memory import EIGHT_KB
from bench.summary import Summary


class _Goal(NamedTuple):
    name: str
    measured: Callable[[Summary], float]
    wanted: float
    at_least: bool  #: else at most


def _fastest_ordered_polling_peer(summary: Summary) -> float:
    peers = summary["drain_300"]["peers"].values()
    return float(max(peer["rate"] for peer in peers if peer["ordered"] and peer["polling"]))


def _debezium(summary: Summary, figure: str) -> float:
    return float(summary["drain_300"]["peers"]["debezium"][figure])


def _mark(summary: Summary) -> float:
    return float(summary["drain_300"]["mark"])


_GOALS = (
    _Goal("drain beside R_serial", lambda s: _mark(s) / s["drain_300"]["R_serial"], 1.0, True),
    _Goal("drain beside R_cpu", lambda s: _mark(s) / s["drain_300"]["R_cpu"], 0.8, True),
    _Goal(
        "drain beside the fastest ordered polling peer", lambda s: _mark(s) / _fastest_ordered_polling_peer(s), 6, True
    ),
    _Goal("drain beside Debezium", lambda s: _mark(s) / _debezium(s, "rate"), 1.2, True),
    _Goal("drain beside textbook", lambda s: _mark(s) / s["drain_300"]["textbook"], 40, True),
    _Goal("drain beside batched", lambda s: _mark(s) / s["drain_300"]["batched"], 0.9, True),
    _Goal("drain with delete beside mark", lambda s: s["drain_300"]["delete"] / _mark(s), 1.3, True),
    _Goal("drain with delete beside Debezium", lambda s: s["drain_300"]["delete"] / _debezium(s, "rate"), 2, True),
    _Goal("CPU beside Debezium's", lambda s: s["drain_300"]["cpu_us"]["mark"] / _debezium(s, "cpu_us"), 0.75, False),
    _Goal(
        "CPU with delete beside Debezium's",
        lambda s: s["drain_300"]["cpu_us"]["delete"] / _debezium(s, "cpu_us"),
        0.45,
        False,
    ),
    _Goal("four processes beside one", lambda s: s["drain_300"]["mark, 4 processes"] / _mark(s), 0.9, True),
    _Goal("latency at 500/s, p50, ms", lambda s: s["latency_500"]["ours"]["p50"], 5, False),
    _Goal("latency at 500/s, p99, ms", lambda s: s["latency_500"]["ours"]["p99"], 15, False),
    _Goal("one message after silence, p50, ms", lambda s: s["after_idle"]["p50"], 10, False),
    _Goal("idle, % of a core", lambda s: s["idle"]["cpu_percent"], 1, False),
    _Goal("idle, statements a second", lambda s: s["idle"]["statements_per_second"], 2, False),
    _Goal("memory, MB", lambda s: s["rss_mb"], 120, False),
    _Goal("memory with rows of 8 KB, MB", lambda s: s["memory"]["peak_mb"][EIGHT_KB], 120, False),
    _Goal("memory whatever the rows, of the stated bound", lambda s: s["memory"]["of_bound"], 1, False),
    _Goal("10 million sent rows, of the clean rate", lambda s: s["sent"]["10 M sent"]["ratio"], 0.9, True),
    _Goal("100,000 parked rows, of the clean rate", lambda s: s["conditions"]["100,000 parked"]["ratio"], 0.9, True),
    _Goal("xmin held, of the clean rate", lambda s: s["conditions"]["xmin held"]["ratio"], 0.7, True),
    _Goal("writers' rate beside the relay, of what is due", lambda s: s["writers"]["rate_kept"], 0.99, True),
    _Goal("writers' p99 beside the relay, of alone", lambda s: s["writers"]["p99_ratio"], 1.25, False),
)


def goals(summary: Summary) -> Sequence[tuple[str, str, str, str]]:
    """What, how much is wanted, how much was measured, and whether that will do; only what was measured."""
    lines = []
    for goal in _GOALS:
        try:
            measured = goal.measured(summary)
        except (KeyError, ValueError):  # no peer, or not measured this time
            continue
        met = measured >= goal.wanted if goal.at_least else measured <= goal.wanted
        bound = "≥" if goal.at_least else "≤"
        lines.append((goal.name, f"{bound} {goal.wanted:g}", f"{measured:.3g}", "reached" if met else "missed"))
    return lines
