"""How the bench's peers are set up: pinned, and each setting with its source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bench.peers
from bench.arms import Run
from bench.arms.debezium import write_properties

PEERS = Path(bench.peers.__file__).parent
PROPERTIES = sorted(PEERS.glob("*/*.properties"))
REQUIREMENTS = sorted(PEERS.glob("*/requirements.txt"))


def settings_of(path: Path) -> dict[str, str]:
    """Those of a properties file, none of them said twice."""
    pairs = [line.split("=", 1) for line in path.read_text().splitlines() if line and not line.startswith("#")]
    settings = dict(pairs)
    assert len(settings) == len(pairs)
    return settings


@pytest.mark.parametrize("path", PROPERTIES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_each_group_of_settings_names_its_source(path: Path) -> None:
    head, *groups = path.read_text().split("\n\n")
    sources = set(re.findall(r"^# (\[\w+\]): https://", head, re.MULTILINE))
    # A comment and what is set under it.
    for comment in re.findall(r"((?:^#.*\n)+)^[^#\n]", "\n\n".join(groups), re.MULTILINE):
        named = set(re.findall(r"\[\w+\]", comment))
        assert named, comment
        assert named <= sources, comment


def test_every_peer_of_these_has_its_files() -> None:
    assert {path.parent.name for path in PROPERTIES} == {"debezium"}
    assert {path.parent.name for path in REQUIREMENTS} == {"faststream", "txoutbox"}


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_packages_are_pinned_with_their_hashes(path: Path) -> None:
    text = path.read_text()
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 1
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.]+ .*\\\n    --hash=sha256:", entry), entry
    assert "://" not in text


def test_a_connector_has_what_is_committed_and_what_is_its_runs(tmp_path: Path) -> None:
    run = Run("postgresql://postgres@127.0.0.1:5433/run7", "127.0.0.1:9093", "orders", 12, tmp_path)

    worker, connector = write_properties(run, tmp_path, 8083)

    committed = settings_of(PEERS / "debezium" / "connector.properties")
    written = settings_of(connector)
    assert committed.items() <= written.items()
    assert {name: written[name] for name in written.keys() - committed.keys()} == {
        "name": "outbox",
        "topic.prefix": "bench",
        "database.hostname": "127.0.0.1",
        "database.port": "5433",
        "database.user": "postgres",
        "database.dbname": "run7",
        "slot.name": "debezium_run7",
    }
    assert settings_of(worker)["bootstrap.servers"] == "127.0.0.1:9093"
    assert settings_of(worker)["listeners"] == "http://127.0.0.1:8083"
