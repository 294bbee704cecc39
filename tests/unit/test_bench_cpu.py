"""What a server costs is counted with its children, also those that have ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.cpu import Cpu, cpu_seconds, peak_rss_mb

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A postmaster, a backend with a child, and strangers."""

    def process(pid: int, parent: int, name: str, *ticks: int) -> None:
        (tmp_path / str(pid)).mkdir()
        fields = [str(pid), f"({name})", "S", str(parent), *["0"] * 9, *map(str, ticks), "20", "0"]
        (tmp_path / str(pid) / "stat").write_text(" ".join(fields))
        (tmp_path / str(pid) / "status").write_text(f"Name:\t{name}\nVmHWM:\t  {pid * 1024} kB\nVmRSS:\t 1 kB\n")

    process(1, 0, "init", 900, 0, 0, 0)
    process(10, 1, "postgres", 1, 2, 4, 8)
    process(11, 10, "a ) worse (name", 16, 32, 0, 0)
    process(12, 11, "child", 64, 0, 0, 0)
    process(20, 1, "java", 128, 0, 0, 0)
    process(100, 1, "stranger", 5, 0, 0, 0)
    (tmp_path / "30").mkdir()  # has ended meanwhile
    return tmp_path


def test_a_tree_is_summed_and_strangers_are_left_out(proc: Path) -> None:
    assert cpu_seconds(10, proc=proc) == (1 + 2 + 4 + 8 + 16 + 32 + 64) / TICKS
    assert cpu_seconds(20, proc=proc) == 128 / TICKS


def test_a_process_that_is_named_with_its_parent_counts_once(proc: Path) -> None:
    assert cpu_seconds(10, 11, 20, proc=proc) == (127 + 128) / TICKS


def test_no_process_costs_nothing(proc: Path) -> None:
    assert cpu_seconds(proc=proc) == 0
    assert cpu_seconds(77, proc=proc) == 0


def test_children_of_a_real_process_count_once_they_have_ended() -> None:
    before = cpu_seconds(os.getpid())
    child = os.fork()
    if child == 0:
        while sum(os.times()[:2]) < 0.1:
            pass
        os._exit(0)
    os.waitpid(child, 0)
    assert cpu_seconds(os.getpid()) - before >= 0.09


def test_the_peak_of_memory_is_summed(proc: Path) -> None:
    assert peak_rss_mb([10, 11], proc=proc) == 21


def test_what_was_used_is_a_difference() -> None:
    used = Cpu(relay=3, postgresql=5, kafka=7) - Cpu(relay=1, postgresql=1, kafka=1)
    assert used == Cpu(relay=2, postgresql=4, kafka=6)
    assert used.total == 12
