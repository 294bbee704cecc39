"""The bench runs what it says it runs: every kind of measurement in miniature, and a relay that loses is no result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

import bench.idle
import bench.memory
import bench.steady
from bench.arms import Run
from bench.arms.loops import Batched, Textbook
from bench.arms.ours import Delete, Mark
from bench.conditions import Condition, Parked, Sent, XminHeld
from bench.drain import RunFailedError, drain
from bench.idle import idle
from bench.memory import Case, memory
from bench.roofs import database_roof, kafka_roof
from bench.rows import KEYS, LargeRows, Rows, Spread
from bench.stage import Stage, connected
from bench.steady import after_silence, steady, writers_beside
from outbox_relay.servers import Kafka, KafkaServer, Postgres

#: Enough that they aren't all in Kafka when it is first looked.
ROWS = Rows(30_000, 300)


@pytest.fixture
def stage(postgres: Postgres, kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> Stage:
    if postgres.server is None or not isinstance(kafka.server, KafkaServer):
        pytest.skip("what servers cost is measured on servers of our own")
    monkeypatch.setattr(bench.steady, "WARM_UP_SECONDS", 0.5)
    monkeypatch.setattr(bench.idle, "_CALM_SECONDS", 1.0)
    return Stage(postgres.server, kafka.server)


@pytest.mark.parametrize("arm", [Mark, Delete, Batched])
async def test_a_drain_is_measured_and_checked(stage: Stage, arm: type[Mark | Delete | Batched]) -> None:
    found = await drain(stage, arm(), ROWS)
    # All but those that were in Kafka when it was first looked.
    assert 0 < found.messages <= ROWS.count * 0.95
    assert found.rate > 0
    assert found.repeated == 0
    assert found.cpu_us["all"] == pytest.approx(sum(found.cpu_us[who] for who in ("relay", "postgresql", "kafka")))
    assert found.rss_mb > 10


async def test_a_slow_relay_is_cut_off(stage: Stage) -> None:
    found = await drain(stage, Textbook(), Rows(20_000, 300), most_seconds=1)
    assert 0 < found.messages < 20_000


class Loses(Mark):
    """The writers' ledger has a message that never gets to the table."""

    def insert(self, rows: str) -> str:
        return super().insert(f"(SELECT * FROM {rows} WHERE rows.n <> 7) AS rows")


class Reorders(Mark):
    """The messages of a key are written in the wrong order."""

    def insert(self, rows: str) -> str:
        return super().insert(rows).replace("ORDER BY rows.n", "ORDER BY -rows.n")


@pytest.mark.parametrize(
    ("arm", "problem"), [(Loses, "of 4,000 messages: 1 lost"), (Reorders, r"of 4,000 messages: [\d,]+ out of order")]
)
async def test_a_relay_that_loses_or_reorders_is_no_result(stage: Stage, arm: type[Mark], problem: str) -> None:
    with pytest.raises(RunFailedError, match=problem):
        await drain(stage, arm(), Rows(4_000, 300, Spread.HOT), most_seconds=3)


@pytest.mark.parametrize(
    "condition", [Sent(2_000), Parked(500), XminHeld()], ids=lambda condition: type(condition).__name__
)
async def test_a_drain_in_bad_times(stage: Stage, condition: Condition) -> None:
    assert (await drain(stage, Mark(), ROWS, condition=condition)).repeated == 0


async def test_the_roofs(stage: Stage) -> None:
    for roof in (database_roof, kafka_roof):
        found = await roof(stage, Rows(4_000, 300), [(500, 1), (500, 2)])
        assert [(one.batch, one.claims) for one in found] == [(500, 1), (500, 2)]
        assert all(one.rate > 0 and one.cpu_us["relay"] > 0 for one in found)


async def test_steady_writers(stage: Stage) -> None:
    found = await steady(stage, Mark(), rate=100, seconds=2, size=300)
    assert 50 < found.written_per_second < 200
    assert 0 < found.latency_ms["p50"] <= found.latency_ms["p99"]
    assert found.repeated == 0


async def test_writers_beside_a_relay(stage: Stage) -> None:
    found = await writers_beside(stage, Mark, share=0.1, seconds=1, size=300)
    assert found["due_per_second"] == pytest.approx(0.1 * found["most_per_second"])


async def test_a_message_after_silence(stage: Stage) -> None:
    found = await after_silence(stage, Mark, silence_seconds=1, places=2, messages=2, size=300)
    assert found["messages"] == 4


async def test_an_idle_relay(stage: Stage) -> None:
    found = await idle(stage, Mark(), seconds=2)
    assert found.statements_per_second > 0
    assert found.rss_mb > 10


MEGABYTES = Case("megabytes", LargeRows(120, 1_000_000))
TOO_LARGE = Case("too large", LargeRows(1, 3_000_000, Spread.ONE), refused=True)


async def test_memory_by_case(stage: Stage) -> None:
    found = await memory(stage, Mark, cases=(MEGABYTES, TOO_LARGE))
    megabytes, too_large = found.cases["megabytes"], found.cases["too large"]
    assert min(megabytes.peak_mb, too_large.peak_mb) > 10
    assert megabytes.bound_mb == pytest.approx(found.idle_mb + 40)
    assert (megabytes.rate or 0) > 0
    assert too_large.rate is None
    assert "max.message.bytes" in (too_large.reason or "")


class Hoards(Mark):
    """Claims all that there is."""

    settings: ClassVar[Mapping[str, Any]] = {"max_in_flight_bytes": 1_000_000_000}


class Takes(Mark):
    """Its rows are within what Kafka takes, although they are said not to be."""

    def insert(self, rows: str) -> str:
        return super().insert(rows).replace("rows.payload", "left(rows.payload, 300)")


async def test_a_relay_that_takes_more_than_is_stated_is_told(stage: Stage) -> None:
    found = (await memory(stage, Hoards, cases=(MEGABYTES,))).cases["megabytes"]
    assert found.peak_mb > found.bound_mb


async def test_a_row_that_is_not_refused_is_no_result(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.memory, "_PARKED_SECONDS", 1.0)
    with pytest.raises(RunFailedError, match="isn't parked"):
        await memory(stage, Takes, cases=(TOO_LARGE,))


@pytest.mark.parametrize("size", [300, 1024])
@pytest.mark.parametrize("kind", [Rows, LargeRows])
@pytest.mark.parametrize("spread", Spread)
async def test_rows_have_their_size_and_their_keys(stage: Stage, size: int, kind: type[Rows], spread: Spread) -> None:
    async with stage.run(kind(4_000, size, spread)) as run:
        counts = await _counts(run)
    assert counts["sizes"] == [size]
    assert counts["payloads"] == 4_000
    assert counts["broken"] == 0, "each payload is JSON of its own n, k and v, and a key's versions are without a gap"
    assert counts["keys"] <= KEYS
    largest = {Spread.EVEN: 4, Spread.HOT: 2_002, Spread.ZIPF: 534, Spread.ONE: 4_000}[spread]
    assert counts["largest"] == pytest.approx(largest, rel=0.01)


async def _counts(run: Run) -> dict[str, Any]:
    async with connected(run.database_url) as connection:
        return dict(
            await connection.fetchrow("""
                SELECT array_agg(DISTINCT octet_length(payload)) AS sizes, count(DISTINCT payload) AS payloads,
                       count(DISTINCT key) AS keys, max(v) AS largest,
                       count(*) FILTER (WHERE (payload::json ->> 'n')::bigint <> n OR (payload::json ->> 'k')::int <> k
                                           OR (payload::json ->> 'v')::int <> v) AS broken
                FROM bench_rows
            """)
        )
