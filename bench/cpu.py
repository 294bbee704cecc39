"""What processes cost: CPU seconds and memory, read from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpu:
    """CPU seconds by whom."""

    relay: float
    postgresql: float
    kafka: float

    def __sub__(self, earlier: Cpu) -> Cpu:
        return Cpu(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))

    @property
    def total(self) -> float:
        return self.relay + self.postgresql + self.kafka


def cpu_seconds(*pids: int, proc: Path = Path("/proc")) -> float:
    """CPU that processes and their descendants have used, those that ended and were waited for included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in proc.glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        ticks[number] = sum(map(int, fields[11:15]))  # utime, stime, and both of children waited for
    wanted = set(pids)
    return sum(count for number, count in ticks.items() if wanted & set(_line_of(number, parents))) / _TICKS_PER_SECOND


def _line_of(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        yield pid
        pid = parents[pid]


def peak_rss_mb(pids: Iterable[int], proc: Path = Path("/proc")) -> float:
    """The most memory that each of the processes has ever had resident, summed: ``VmHWM``."""
    return sum(_status_kb(proc / str(pid), "VmHWM") for pid in pids) / 1024


def _status_kb(process: Path, field: str) -> int:
    for line in (process / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise ValueError(f"{process}/status has no {field}")
