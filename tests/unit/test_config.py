"""The configuration: its defaults, its example, and what is said about mistakes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from outbox_relay import config
from outbox_relay.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"

#: What has no default.
REQUIRED = {
    "database": 'url = "postgresql://localhost/orders"',
    "kafka": 'bootstrap_servers = ["localhost:9092"]',
}


def toml(tables: Mapping[str, str]) -> str:
    return "".join(f"[{table}]\n{keys}\n" for table, keys in tables.items())


SMALLEST = toml(REQUIRED)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def load(file: Path, text: str) -> config.Config:
    file.write_text(text, encoding="utf-8")
    return config.load(file)


def problems(file: Path, text: str) -> list[str]:
    """The lines about the mistakes in ``text``, without the file's name that each begins with."""
    with pytest.raises(ConfigError) as caught:
        load(file, text)
    assert caught.value.problems
    assert all(problem.startswith(f"{file}: ") and "\n" not in problem for problem in caught.value.problems)
    return [problem.removeprefix(f"{file}: ") for problem in caught.value.problems]


def values(loaded: config.Config) -> dict[str, Any]:
    dumped = loaded.model_dump()
    del dumped["relay"]["name"]  # of this process
    return dumped


# -- what is right


def test_the_example_shows_the_defaults(file: Path) -> None:
    example, smallest = values(config.load(EXAMPLE)), values(load(file, SMALLEST))
    for table, key in (("database", "url"), ("kafka", "bootstrap_servers")):
        del example[table][key], smallest[table][key]
    assert example == smallest


def test_the_example_has_every_key(file: Path) -> None:
    # A key that is commented out has a default that can't be written down.
    text, commented_out = re.subn(r"^# (?=\w+ = )", "", EXAMPLE.read_text("utf-8"), flags=re.MULTILINE)
    load(file, text)
    shown = {table: list(keys) for table, keys in tomllib.loads(text).items()}
    assert shown == {name: list(table.model_fields) for name, table in config.TABLES.items()}
    assert commented_out == 1


def test_the_tables_are_those_of_the_type() -> None:
    assert {name: field.annotation for name, field in config.Config.model_fields.items()} == config.TABLES


def test_whole_numbers_are_seconds_too(file: Path) -> None:
    assert load(file, SMALLEST + "[relay]\nlease_seconds = 60").relay.lease_seconds == 60.0


def test_a_relay_without_a_name_is_called_by_host_and_process(file: Path) -> None:
    assert re.fullmatch(r".+:\d+", load(file, SMALLEST).relay.name)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h/db",
        "postgres://u:p%2F@h:5432/db?sslmode=require",
        "postgresql://a:5432,b:5433/db?target_session_attrs=read-write",
        "postgresql://u@[::1]:5432/db",
        "postgresql:///db?host=/run/postgresql",
        "postgresql://u@%2Frun%2Fpostgresql/db",
    ],
)
def test_urls_that_lead_somewhere_are_taken(url: str, file: Path) -> None:
    assert load(file, SMALLEST.replace("postgresql://localhost/orders", url)).database.url == url


# -- what is wrong


def test_every_mistake_is_one_line_and_all_are_told_at_once(file: Path) -> None:
    text = """
    stray = 1
    kafka = 5
    [database]
    url = "mysql://u:secret@h/db"
    connect_timeout_seconds = "5"
    statment_timeout_seconds = 3
    [relais]
    name = "x"
    [relay]
    batch_rows = 0
    claims_in_flight = 2.0
    poll_floor_seconds = true
    poll_ceiling_seconds = nan
    retry_first_seconds = 0
    heartbeat_seconds = 10
    url = "postgresql://localhost/"
    [log]
    level = "DEBUG"
    format = 3
    """
    assert problems(file, text) == [
        "database.url: must be postgresql://user:password@host:port/database,"
        " with any of / ? # @ : % in the user or password percent-encoded",
        "database.connect_timeout_seconds: must be a valid number",
        "database.statment_timeout_seconds: unknown key; did you mean statement_timeout_seconds?",
        "kafka: must be a table, [kafka]",
        "relay.batch_rows: must be greater than or equal to 1",
        "relay.claims_in_flight: must be a valid integer",
        "relay.poll_floor_seconds: must be a valid number",
        "relay.poll_ceiling_seconds: must be a finite number",
        "relay.retry_first_seconds: must be greater than or equal to 0.001",
        "relay.lease_seconds: 15 must not be below 3 times heartbeat_seconds (10)",
        "relay.url: unknown key; it belongs into [database]",
        "log.level: must be 'debug', 'info', 'warning' or 'error'",
        "log.format: must be 'auto', 'json' or 'console'",
        "stray: unknown table or key; did you mean relay?",
        "relais: unknown table or key; did you mean relay?",
    ]


def test_an_empty_file_lacks_what_has_no_default(file: Path) -> None:
    assert problems(file, "") == [
        "database.url: missing, and there is no default",
        "kafka.bootstrap_servers: missing, and there is no default",
    ]
    assert problems(file, "[database]\n[kafka]\n") == problems(file, "")


@pytest.mark.parametrize("table", config.TABLES)
def test_an_unknown_key_is_refused_in_every_table(table: str, file: Path) -> None:
    (problem,) = [line for line in problems(file, f"[{table}]\nqqqqqqqq = 1") if "missing" not in line]
    known = ", ".join(config.TABLES[table].model_fields)
    assert problem == f"{table}.qqqqqqqq: unknown key; known are {known}"


def test_a_key_outside_of_its_table_is_sent_there(file: Path) -> None:
    assert problems(file, "batch_rows = 5\n" + SMALLEST) == [
        "batch_rows: unknown table or key; it belongs into [relay]"
    ]


@pytest.mark.parametrize(
    ("table", "keys", "problem"),
    [
        (
            "relay",
            "poll_floor_seconds = 2",
            "relay.poll_ceiling_seconds: 0.5 must not be below poll_floor_seconds (2)",
        ),
        (
            "relay",
            "retry_ceiling_seconds = 0.1",
            "relay.retry_ceiling_seconds: 0.1 must not be below retry_first_seconds (0.5)",
        ),
        (
            "relay",
            "lease_seconds = 2.5",
            "relay.lease_seconds: 2.5 must not be below 3 times heartbeat_seconds (1)",
        ),
        (
            "kafka",
            'bootstrap_servers = ["k:1"]\npublish_deadline_seconds = 1',
            "kafka.publish_deadline_seconds: 1 must not be below publish_warn_seconds (5)",
        ),
        ("relay", "shutdown_grace_seconds = 1e9", "relay.shutdown_grace_seconds: must be less than or equal to 86400"),
        (
            "kafka",
            "bootstrap_servers = []",
            "kafka.bootstrap_servers: must have at least 1 item after validation, not 0",
        ),
        ("kafka", 'bootstrap_servers = "k:1"', "kafka.bootstrap_servers: must be a valid list"),
        ("kafka", 'bootstrap_servers = ["k:1", "k:x"]', "kafka.bootstrap_servers[1]: must be host:port"),
        ("kafka", 'bootstrap_servers = ["k:1,j:1"]', "kafka.bootstrap_servers[0]: must be host:port"),
        ("relay", 'name = ""', "relay.name: must have at least 1 character"),
    ],
)
def test_a_value_that_can_not_work_is_refused(table: str, keys: str, problem: str, file: Path) -> None:
    assert problems(file, toml({**REQUIRED, table: keys})) == [problem]


def test_a_compression_whose_package_is_missing_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "cramjam" else find_spec(name))
    with_compression = SMALLEST + 'compression = "{}"'
    for compression in ("none", "gzip"):
        load(file, with_compression.format(compression))
    for compression in ("snappy", "lz4", "zstd"):
        assert problems(file, with_compression.format(compression)) == [
            f"kafka.compression: {compression} needs a package that isn't here: pip install 'outbox-relay[compression]'"
        ]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:secret/a@h/db",
        "postgresql://u:secret?a@h/db",
        "postgresql://u:secret#a@h/db",
        "postgresql://u:secret@a@h/db",
        "postgresql://u:123#secret@h/db",
        "postgresql://u:secret@h:port/db",
        "postgresql+asyncpg://u:secret@h/db",
        "postgresql://u:secret@[::1/db",
        "u:secret@h/db",
    ],
)
def test_a_broken_url_is_refused_and_its_password_kept(url: str, file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, SMALLEST.replace("postgresql://localhost/orders", url))
    assert len(caught.value.problems) == 1
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_file_that_can_not_be_read_is_told_in_one_line(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert caught.value.problems == [f"{file}: No such file or directory"]
    assert problems(file, "[database\nurl") == [
        "not TOML: Expected ']' at the end of a table declaration (at line 1, column 10)"
    ]
    file.write_bytes(b"# \xff")
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert caught.value.problems == [f"{file}: must be UTF-8, and byte 2 isn't"]
