"""What is measured, of which arms, how often and for how long."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from bench.arms import Arm
from bench.arms.registry import ARMS
from bench.conditions import CLEAN, Condition, Parked, Sent, XminHeld
from bench.drain import RunFailedError, drain
from bench.idle import idle
from bench.memory import memory
from bench.roofs import COMBINATIONS, QUICK_COMBINATIONS, Tried, database_roof, kafka_roof
from bench.rows import Rows, Spread
from bench.stage import Stage
from bench.steady import after_silence, steady, writers_beside

#: One run of an arm: its figures. Raises RunFailedError, and ArmUnavailableError where the arm can't be had.
Measure: TypeAlias = Callable[[Stage, str], Awaitable[Mapping[str, Any]]]

R_DB, R_KAFKA = "R_db", "R_kafka"
OURS = ("mark", "delete", "mark, 4 processes", "mark, woken")
#: Whom an idle relay's latency is measured of, and who pays for it.
IDLE = ("mark, woken", "mark")
LOOPS = ("textbook", "batched")
PEERS = tuple(name for name in ARMS if name not in (*OURS, *LOOPS))
FAST_PEERS = tuple(name for name in PEERS if not ARMS[name]().slow)
ORDERED_PEERS = tuple(name for name in PEERS if ARMS[name]().ordered)

#: How long a slow arm drains before it is cut off; over five rounds a minute.
_SLOW_SECONDS = 12.0
_SLOW_ROWS = 120_000
#: In these workloads our arm alone is measured, and what takes turns is the state of its table, or the keys.
_CONDITIONS: Mapping[str, Condition] = {
    "clean": CLEAN,
    "10 M sent": Sent(),
    "100,000 parked": Parked(),
    "xmin held": XminHeld(),
}
_LATE_MS = 1_000.0
_BEHIND_MS = 100.0
_SPREADS = {"even": Spread.EVEN, "zipf": Spread.ZIPF, "hot key": Spread.HOT}


#: What the others of a workload are compared with, where it isn't ``mark``.
BASELINES = {"spread": "even", "conditions": "clean", "sent": "clean"}


@dataclass(frozen=True)
class Workload:
    """The arms take turns, in each second round backwards."""

    name: str
    measure: Measure
    arms: Sequence[str]
    rounds: int


def full() -> list[Workload]:
    """At most an hour, on two quiet cores; what matters most comes first."""
    return [
        Workload("drain_300", _drain(500_000, 300), (*OURS[:3], *LOOPS, *PEERS, R_DB, R_KAFKA), 5),
        Workload("latency_500", _steady(500, 10), (*IDLE, "batched", *ORDERED_PEERS), 5),
        Workload("after_idle", _after_silence(60, places=16, messages=1), IDLE, 1),
        Workload("idle", _idle(30), IDLE, 1),
        Workload("conditions", _condition(200_000), ("clean", "100,000 parked", "xmin held"), 3),
        Workload("sent", _condition(200_000), ("clean", "10 M sent"), 2),
        Workload("writers", _writers(10), ("mark",), 2),
        Workload("drain_1024", _drain(200_000, 1024), (*OURS[:2], "batched", *FAST_PEERS, R_DB, R_KAFKA), 3),
        Workload("latency_2000", _steady(2_000, 10), ("mark", "batched", *FAST_PEERS), 3),
        Workload("spread", _spread(200_000), tuple(_SPREADS), 2),
        Workload("sustained", _sustained(6), ("mark",), 1),
        Workload("long", _steady(1_000, 150), ("mark",), 1),
        Workload("memory", _memory, ("mark",), 1),
    ]


def quick() -> list[Workload]:
    """A first answer, within three minutes."""
    arms = ("mark", "delete", *LOOPS, "debezium", R_DB, R_KAFKA)
    return [
        Workload("drain_300", _drain(100_000, 300, QUICK_COMBINATIONS, slow_seconds=4), arms, 1),
        Workload("latency_500", _steady(500, 6), ("mark",), 1),
        Workload("after_idle", _after_silence(3, places=4, messages=2), ("mark, woken",), 1),
        Workload("idle", _idle(6), ("mark",), 1),
    ]


def _drain(
    count: int,
    size: int,
    combinations: Sequence[tuple[int, int]] = COMBINATIONS,
    slow_seconds: float = _SLOW_SECONDS,
) -> Measure:
    async def measure(stage: Stage, name: str) -> Mapping[str, Any]:
        rows = Rows(count, size)
        if name == R_DB:
            return _tried(await database_roof(stage, rows, combinations))
        if name == R_KAFKA:
            return _tried(await kafka_roof(stage, rows, combinations))
        arm = ARMS[name]()
        if arm.slow:
            return asdict(await drain(stage, arm, Rows(min(count, _SLOW_ROWS), size), most_seconds=slow_seconds))
        return asdict(await drain(stage, arm, rows))

    return measure


def _tried(found: Sequence[Tried]) -> Mapping[str, Any]:
    return {"tried": [asdict(one) for one in found]}


def _steady(rate: float, seconds: float) -> Measure:
    async def measure(stage: Stage, name: str) -> Mapping[str, Any]:
        return asdict(await steady(stage, ARMS[name](), rate=rate, seconds=seconds, size=300))

    return measure


def _sustained(seconds: float) -> Measure:
    """The highest rate, of steps of a quarter, at which the last messages arrive as soon as the first."""

    async def measure(stage: Stage, name: str) -> Mapping[str, Any]:
        kept: dict[str, Any] = {}
        rate = 2_000.0
        while True:
            try:
                found = await steady(stage, ARMS[name](), rate=rate, seconds=seconds, size=300)
            except RunFailedError:
                break
            late = found.latency_ms["p99"] > _LATE_MS or found.commit_ms["p99"] > _LATE_MS
            if late or found.behind_ms > _BEHIND_MS:
                break
            kept, rate = asdict(found), rate * 1.25
        if not kept:
            raise RunFailedError(f"{name} keeps up with not even {rate:,.0f} messages a second")
        return kept

    return measure


def _after_silence(seconds: float, *, places: int, messages: int) -> Measure:
    async def measure(stage: Stage, name: str) -> Mapping[str, Any]:
        make = partial(_made, name)
        return await after_silence(stage, make, silence_seconds=seconds, places=places, messages=messages, size=300)

    return measure


def _made(name: str) -> Arm:
    return ARMS[name]()


def _idle(seconds: float) -> Measure:
    async def measure(stage: Stage, name: str) -> Mapping[str, Any]:
        return asdict(await idle(stage, ARMS[name](), seconds=seconds))

    return measure


def _spread(count: int) -> Measure:
    async def measure(stage: Stage, name: str) -> Mapping[str, Any]:
        return asdict(await drain(stage, ARMS["mark"](), Rows(count, 300, _SPREADS[name])))

    return measure


def _condition(count: int) -> Measure:
    async def measure(stage: Stage, name: str) -> Mapping[str, Any]:
        return asdict(await drain(stage, ARMS["mark"](), Rows(count, 300), condition=_CONDITIONS[name]))

    return measure


def _writers(seconds: float) -> Measure:
    async def measure(stage: Stage, name: str) -> Mapping[str, Any]:
        return await writers_beside(stage, partial(_made, name), share=0.6, seconds=seconds, size=300)

    return measure


async def _memory(stage: Stage, name: str) -> Mapping[str, Any]:
    return asdict(await memory(stage, partial(_made, name)))


def selected(workloads: Sequence[Workload], names: Sequence[str], arms: Sequence[str]) -> list[Workload]:
    """Those of the names, with those of the arms; all where none are named."""
    chosen = [workload for workload in workloads if not names or workload.name in names]
    return [replace(workload, arms=[arm for arm in workload.arms if not arms or arm in arms]) for workload in chosen]
