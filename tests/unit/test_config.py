"""The configuration: its defaults, its example, and what is said about mistakes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from outbox_relay import config, config_file
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

TABLES = {place: table for place, table in config_file.tables(config.Config) if not issubclass(table, config.Secret)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def load(file: Path, text: str) -> config.Config:
    file.write_text(text, encoding="utf-8")
    return config.load(file)


def problems(file: Path, text: str) -> list[str]:
    """The lines about the mistakes in ``text``, each from the line's number on."""
    with pytest.raises(ConfigError) as caught:
        load(file, text)
    assert caught.value.problems
    assert all(problem.startswith(f"{file}:") and "\n" not in problem for problem in caught.value.problems)
    return [problem.removeprefix(f"{file}:").removeprefix(" ") for problem in caught.value.problems]


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
    # What is commented out has a default that can't be written down, or needs something that isn't here.
    shown = tomllib.loads(re.sub(r"^# ?(?=\w+ = )", "", EXAMPLE.read_text("utf-8"), flags=re.MULTILINE))
    for place, table in TABLES.items():
        there = shown
        for name in place:
            there = there[name]
        assert list(there) == config_file.keys(table)


def test_whole_numbers_are_seconds_too(file: Path) -> None:
    assert load(file, SMALLEST + "[relay]\nlease_seconds = 60").relay.lease_seconds == 60.0


def test_a_relay_without_a_name_is_called_by_host_and_process(file: Path) -> None:
    assert re.fullmatch(r".+:\d+", load(file, SMALLEST).relay.name)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h/db",
        "postgres://u:p%2F@localhost:5432/db",
        "postgresql://a:5432,b:5433/db",
        "postgresql://u@[::1]:5432/db",
        "postgresql:///db?host=/run/postgresql",
        "postgresql://u@%2Frun%2Fpostgresql/db",
    ],
)
def test_urls_that_lead_somewhere_are_taken(url: str, file: Path) -> None:
    assert load(file, SMALLEST.replace("postgresql://localhost/orders", url)).database.url == url


@pytest.mark.parametrize(
    ("url", "tls", "used"),
    [
        ("postgresql://localhost/db", "auto", False),
        ("postgresql://127.0.0.9/db", "auto", False),
        ("postgresql://[::1]/db", "auto", False),
        ("postgresql:///db", "auto", False),
        ("postgresql:///db?host=/run/postgresql", "auto", False),
        ("postgresql://localhost/db", "verify-full", True),
        ("postgresql://db1/db", "auto", True),
        ("postgresql://localhost,db1/db", "auto", True),
        ("postgresql:///db?host=db1", "auto", True),
    ],
)
def test_only_to_this_machine_is_tls_left_out_by_default(url: str, tls: str, used: bool, file: Path) -> None:
    database = f'url = "{url}"\ntls = "{tls}"'
    assert (load(file, toml({**REQUIRED, "database": database})).database.tls_settings() is not None) == used


def test_a_host_from_the_environment_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db1")
    assert load(file, SMALLEST.replace("localhost/orders", "/orders")).database.tls_settings() is not None


def test_relative_paths_begin_at_the_file(file: Path) -> None:
    (file.parent / "secret").write_text("word\n")
    database = 'url = "postgresql://u@localhost/db"\npassword = { file = "secret" }'
    password = load(file, toml({**REQUIRED, "database": database})).database.password
    assert password is not None
    assert password.read() == "word"
    (file.parent / "secret").write_text("rotated")
    assert password.read() == "rotated"
    assert "rotated" not in repr(password)


def test_a_secret_of_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "word")
    database = 'url = "postgresql://u@localhost/db"\npassword = { env = "DB_PASSWORD" }'
    password = load(file, toml({**REQUIRED, "database": database})).database.password
    assert password is not None
    assert password.read() == "word"
    assert "word" not in repr(password).lower().replace("db_password", "").replace("password", "")


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
        "2: stray: unknown table or key; did you mean relay?",
        "3: kafka: must be a table, [kafka]",
        "5: database.url: must be postgresql://user@host:port/database,"
        " with any of / ? # @ : % in the user percent-encoded",
        "6: database.connect_timeout_seconds: must be a valid number",
        "7: database.statment_timeout_seconds: unknown key; did you mean statement_timeout_seconds?",
        "8: relais: unknown table or key; did you mean relay?",
        "10: relay.lease_seconds: 15 must not be below 3 times heartbeat_seconds (10)",
        "11: relay.batch_rows: must be greater than or equal to 1",
        "12: relay.claims_in_flight: must be a valid integer",
        "13: relay.poll_floor_seconds: must be a valid number",
        "14: relay.poll_ceiling_seconds: must be a finite number",
        "15: relay.retry_first_seconds: must be greater than or equal to 0.001",
        "17: relay.url: unknown key; it belongs into [database]",
        "19: log.level: must be 'debug', 'info', 'warning' or 'error'",
        "20: log.format: must be 'auto', 'json' or 'console'",
    ]


def test_an_empty_file_lacks_what_has_no_default(file: Path) -> None:
    assert problems(file, "") == [
        "database.url: missing, and there is no default",
        "kafka.bootstrap_servers: missing, and there is no default",
    ]
    assert problems(file, "[database]\n[kafka]\n") == [
        "1: database.url: missing, and there is no default",
        "2: kafka.bootstrap_servers: missing, and there is no default",
    ]


@pytest.mark.parametrize("place", TABLES, ids=".".join)
def test_an_unknown_key_is_refused_in_every_table(place: tuple[str, ...], file: Path) -> None:
    (problem,) = [line for line in problems(file, f"[{'.'.join(place)}]\nqqqqqqqq = 1") if "missing" not in line]
    known = ", ".join(config_file.keys(TABLES[place]))
    assert problem == f"2: {'.'.join(place)}.qqqqqqqq: unknown key; known are {known}"


def test_a_key_outside_of_its_table_is_sent_there(file: Path) -> None:
    assert problems(file, "batch_rows = 5\n" + SMALLEST) == [
        "1: batch_rows: unknown table or key; it belongs into [relay]"
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
            'bootstrap_servers = ["localhost:1"]\npublish_deadline_seconds = 1',
            "kafka.publish_deadline_seconds: 1 must not be below publish_warn_seconds (5)",
        ),
        ("relay", "shutdown_grace_seconds = 1e9", "relay.shutdown_grace_seconds: must be less than or equal to 86400"),
        (
            "kafka",
            "bootstrap_servers = []",
            "kafka.bootstrap_servers: must have at least 1 item after validation, not 0",
        ),
        ("kafka", 'bootstrap_servers = "k:1"', 'kafka.bootstrap_servers: must be a list, such as ["localhost:9092"]'),
        ("kafka", 'bootstrap_servers = ["k:1", "k:x"]', "kafka.bootstrap_servers[1]: must be host:port"),
        ("kafka", 'bootstrap_servers = ["k:1,j:1"]', "kafka.bootstrap_servers[0]: must be host:port"),
        ("kafka", 'bootstrap_servers = ["k:65536"]', "kafka.bootstrap_servers[0]: must be host:port"),
        ("relay", 'name = ""', "relay.name: must have at least 1 character"),
    ],
)
def test_a_value_that_can_not_work_is_refused(table: str, keys: str, problem: str, file: Path) -> None:
    (told,) = problems(file, toml({**REQUIRED, table: keys}))
    line, _, told = told.partition(": ")
    assert int(line)
    assert told == problem


REMOTE = 'url = "postgresql://u@db1/db"'
BROKERS = 'bootstrap_servers = ["k1:9092"]'


@pytest.mark.parametrize(
    ("table", "keys", "problem"),
    [
        (
            "database",
            'url = "postgresql://u:p@db1/db"',
            'url: holds a password: take it out, and set password = { env = "NAME" } or { file = "/path" }',
        ),
        (
            "database",
            'url = "postgresql://db1/db?sslmode=require"',
            "url: sslmode has no place in the url: set tls and the tls_… keys instead",
        ),
        (
            "database",
            'url = "postgresql://db1/db?target_session_attrs=any"',
            "url: target_session_attrs has no place in the url:"
            " of several hosts the relay takes one that can be written to, whatever is set",
        ),
        (
            "database",
            f'{REMOTE}\npassword = "word"',
            'password: must be { env = "NAME" } or { file = "/path" }',
        ),
        (
            "database",
            f"{REMOTE}\npassword = {{}}",
            'password: must be { env = "NAME" } or { file = "/path" }, one of them',
        ),
        (
            "database",
            f'{REMOTE}\npassword = {{ env = "UNHEARD_OF" }}',
            "password: the environment variable UNHEARD_OF isn't set",
        ),
        (
            "database",
            f'{REMOTE}\npassword = {{ file = "/unheard/of" }}',
            "password.file: /unheard/of can't be read: No such file or directory",
        ),
        (
            "database",
            f'{REMOTE}\ntls = "disable"',
            'dangerously_allow_plaintext: must be true for tls = "disable", and db1 isn\'t this machine',
        ),
        (
            "database",
            'url = "postgresql:///db"\ntls_ca_file = "config.toml"',
            'tls_ca_file: has no effect without tls = "verify-full"',
        ),
        ("database", f'{REMOTE}\ntls_key_file = "config.toml"', "tls_key_file: has no effect without tls_cert_file"),
        (
            "kafka",
            BROKERS,
            "dangerously_allow_plaintext: must be true for"
            ' security_protocol = "PLAINTEXT" or "SASL_PLAINTEXT", and k1 isn\'t this machine',
        ),
        (
            "kafka",
            'bootstrap_servers = ["localhost:1"]\nsecurity_protocol = "SASL_PLAINTEXT"\nsasl_mechanism = "PLAIN"\n'
            'sasl_username = "u"\nsasl_password = { file = "config.toml" }',
            'sasl_mechanism: PLAIN shows the password to the network: set security_protocol = "SASL_SSL", or use SCRAM',
        ),
        (
            "kafka",
            f'{BROKERS}\nsecurity_protocol = "SASL_SSL"',
            "sasl_mechanism: missing, and security_protocol needs it",
        ),
        (
            "kafka",
            f'{BROKERS}\nsecurity_protocol = "SSL"\nsasl_username = "u"',
            "sasl_username: has no effect without sasl_mechanism = SCRAM-SHA-256, SCRAM-SHA-512 or PLAIN",
        ),
        (
            "kafka",
            f'{BROKERS}\nsecurity_protocol = "SASL_SSL"\nsasl_mechanism = "OAUTHBEARER"\n'
            'sasl_token_provider = "unheard.of:it"',
            "sasl_token_provider: can't be imported: No module named 'unheard'",
        ),
        (
            "kafka",
            f'{BROKERS}\nsecurity_protocol = "SASL_SSL"\nsasl_mechanism = "OAUTHBEARER"\n'
            'sasl_token_provider = "os:unheard_of"',
            "sasl_token_provider: can't be imported: module 'os' has no attribute 'unheard_of'",
        ),
        (
            "kafka",
            f'{BROKERS}\nsecurity_protocol = "SSL"\nallowed_topics = ["a b"]',
            "allowed_topics[0]: must be the name of a topic, or the beginning of names and then *",
        ),
        (
            "table",
            'topic = "orders"',
            'topic: must have a column in braces, as "{topic}" or "outbox.event.{aggregatetype}"',
        ),
    ],
)
def test_weak_or_contradictory_connections_are_refused(table: str, keys: str, problem: str, file: Path) -> None:
    (told,) = problems(file, toml({**REQUIRED, table: keys}))
    assert told.partition(": ")[2] == f"{table}.{problem}"


def test_files_that_are_no_certificates_are_told(file: Path) -> None:
    database = f'{REMOTE}\ntls_ca_file = "config.toml"'
    (told,) = problems(file, toml({**REQUIRED, "database": database}))
    assert told.endswith(f"the tls files don't work: {file} isn't a PEM file of certificates")


def test_values_of_several_lines_and_tables_in_tables_have_their_line(file: Path) -> None:
    text = """
[database] # here
url = "postgresql:///db"

[kafka]
bootstrap_servers = [
  # one
  "k:1",

  "x y",
]
table.columns = { id = 3, "no" = 4 }
[table]
[table.columns]
id = 4
"""
    assert problems(file, text) == [
        "6: kafka.bootstrap_servers[1]: must be host:port",
        "12: kafka.table: unknown key; known are " + ", ".join(config_file.keys(config.KafkaConfig)),
        "15: table.columns.id: must be a valid string",
    ]


def test_a_compression_whose_package_is_missing_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "cramjam" else find_spec(name))
    with_compression = SMALLEST + 'compression = "{}"'
    for compression in ("none", "gzip"):
        load(file, with_compression.format(compression))
    for compression in ("snappy", "lz4", "zstd"):
        assert problems(file, with_compression.format(compression)) == [
            f"5: kafka.compression: {compression} needs a package that isn't here:"
            " pip install 'outbox-relay[compression]'"
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
        "postgresql://u:secret@h/db",
        "postgresql://u@h/db?password=secret",
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
    assert caught.value.__context__ is None


def test_a_file_that_can_not_be_read_is_told_in_one_line(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert caught.value.problems == [f"{file}: No such file or directory"]
    assert problems(file, "[database\nurl") == [
        "1: not TOML: Expected ']' at the end of a table declaration (column 10)"
    ]
    file.write_bytes(b"# \xff")
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert caught.value.problems == [f"{file}: must be UTF-8, and byte 2 isn't"]
