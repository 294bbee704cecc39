"""What ``outbox-relay validate`` says of every class of mistake, word for word, and that none is without an example.

A class is a place in the code that refuses something, or a type of error that pydantic makes of the settings' types.
Both are gathered from the code, so that a new one without its example fails here.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from outbox_relay import addresses, cli, config, config_file, tls

DATABASE = '[database]\nurl = "postgresql://localhost/orders"\n'
KAFKA = '[kafka]\nbootstrap_servers = ["localhost:9092"]\n'
SMALLEST = DATABASE + KAFKA
SASL = KAFKA + 'security_protocol = "SASL_SSL"\n'
PROVIDER = SASL + 'sasl_mechanism = "OAUTHBEARER"\nsasl_token_provider = "{}"\n'
VERIFIED = DATABASE + 'tls = "verify-full"\n'
URL = "must be postgresql://user@host:port/database, with any of / ? # @ : % in the user percent-encoded"
SECRET = '{ env = "NAME" } or { file = "/path" }'

#: By what is wrong: the file, and the lines about it, ``:`` in front standing for the file's name.
MISTAKES: dict[str, tuple[str | bytes, list[str]]] = {
    # -- no TOML
    "not-utf-8": (b"# \xff", [": must be UTF-8, and byte 2 isn't"]),
    "not-toml": ("[database\n", [":1: not TOML: Expected ']' at the end of a table declaration (column 10)"]),
    "ends-too-early": ("a = '''", [": not TOML: Expected \"'''\" (at end of document)"]),
    "too-deep": ("a = " + 5_000 * "[", [": can't be read: a number is too long, or tables are too deep"]),
    "too-long-a-number": (f"a = 1{5_000 * '0'}", [": can't be read: a number is too long, or tables are too deep"]),
    # -- keys
    "missing-tables": (
        "",
        [
            ": database.url: missing, and there is no default",
            ": kafka.bootstrap_servers: missing, and there is no default",
        ],
    ),
    "missing-key": ("[database]\n" + KAFKA, [":1: database.url: missing, and there is no default"]),
    "unknown-key-like-another": (
        SMALLEST + "batch_bites = 1\n",
        [":5: kafka.batch_bites: unknown key; did you mean batch_bytes?"],
    ),
    "unknown-key-of-another-table": (
        SMALLEST + "batch_rows = 1\n",
        [":5: kafka.batch_rows: unknown key; it belongs into [relay]"],
    ),
    "unknown-key": (SMALLEST + '[log]\n"x\\ny" = 1\n', [":6: log.x\\x0ay: unknown key; known are level, format"]),
    "unknown-table": (
        SMALLEST + "[zzz]\n",
        [":5: zzz: unknown table or key; known are database, kafka, table, relay, log"],
    ),
    # -- types and ranges
    "no-table": (DATABASE.replace("[", "log = 5\n[") + KAFKA, [":1: log: must be a table, [log]"]),
    "no-secret": (DATABASE + 'password = "word"\n' + KAFKA, [f":3: database.password: must be {SECRET}"]),
    "no-text": (SMALLEST + "client_id = 5\n", [":5: kafka.client_id: must be a valid string"]),
    "empty-text": (SMALLEST + 'client_id = ""\n', [":5: kafka.client_id: must have at least 1 character"]),
    "no-whole-number": (SMALLEST + "batch_bytes = 5000.0\n", [":5: kafka.batch_bytes: must be a valid integer"]),
    "too-small": (SMALLEST + "batch_bytes = 5\n", [":5: kafka.batch_bytes: must be greater than or equal to 1024"]),
    "too-large": (
        SMALLEST + "[relay]\nbatch_rows = 100001\n",
        [":6: relay.batch_rows: must be less than or equal to 100000"],
    ),
    "no-number": (
        SMALLEST + 'connect_timeout_seconds = "5"\n',
        [":5: kafka.connect_timeout_seconds: must be a valid number"],
    ),
    "no-finite-number": (
        SMALLEST + "connect_timeout_seconds = inf\n",
        [":5: kafka.connect_timeout_seconds: must be a finite number"],
    ),
    "no-boolean": (
        SMALLEST + "dangerously_allow_plaintext = 1\n",
        [":5: kafka.dangerously_allow_plaintext: must be a valid boolean"],
    ),
    "no-inner-table": (
        SMALLEST + '[relay]\nfollowers_of = "skip"\n',
        [":6: relay.followers_of: must be a table, { name = value, … }"],
    ),
    "no-topic-in-an-inner-table": (
        SMALLEST + '[relay]\nfollowers_of = { "a b" = "skip", "metrics.*" = "go" }\n',
        [
            ":6: relay.followers_of.a b: must be the name of a topic, or the beginning of names and then *",
            ":6: relay.followers_of.metrics.*: must be 'block' or 'skip'",
        ],
    ),
    "no-dead-letter-topic": (
        SMALLEST + '[relay]\ndead_letter_topic = "{topic}"\n',
        [
            ":6: relay.dead_letter_topic: must be the name of a topic, with or without {topic} in it, such as"
            ' "{topic}.dead"'
        ],
    ),
    "dead-letters-of-a-mapped-table": (
        SMALLEST + '[table]\nname = "events"\n[relay]\ndead_letter_topic = "dead"\n',
        [":7: relay: dead_letter_topic works with a table as schema.sql has it, not with one that [table] maps"],
    ),
    "no-list": (
        DATABASE + '[kafka]\nbootstrap_servers = "k:1"\n',
        [':4: kafka.bootstrap_servers: must be a list, such as ["localhost:9092"]'],
    ),
    "no-list-of-topics": (
        DATABASE + KAFKA + 'allowed_topics = "orders"\n',
        [':5: kafka.allowed_topics: must be a list, such as ["orders"]'],
    ),
    "empty-list": (
        DATABASE + "[kafka]\nbootstrap_servers = []\n",
        [":4: kafka.bootstrap_servers: must have at least 1 item after validation, not 0"],
    ),
    "none-of-the-words": (
        SMALLEST + '[log]\nlevel = "INFO"\n',
        [":6: log.level: must be 'debug', 'info', 'warning' or 'error'"],
    ),
    "below-another": (
        SMALLEST + "publish_deadline_seconds = 1\n",
        [":5: kafka.publish_deadline_seconds: 1 must not be below publish_warn_seconds (5)"],
    ),
    "below-a-multiple-of-another": (
        SMALLEST + "[relay]\nlease_seconds = 2\n",
        [":6: relay.lease_seconds: 2 must not be below 3 times heartbeat_seconds (1)"],
    ),
    # -- secrets and files
    "secret-from-two-places": (
        DATABASE + 'password = { env = "HOME", file = "config.toml" }\n' + KAFKA,
        [f":3: database.password: must be {SECRET}, one of them"],
    ),
    "secret-not-in-the-environment": (
        DATABASE + 'password = { env = "UNHEARD_OF" }\n' + KAFKA,
        [":3: database.password: the environment variable UNHEARD_OF isn't set"],
    ),
    "no-such-file": (
        DATABASE + 'password = { file = "/unheard/of" }\n' + KAFKA,
        [":3: database.password.file: /unheard/of can't be read: No such file or directory"],
    ),
    "no-such-user": (
        DATABASE + 'password = { file = "~unheard_of/word" }\n' + KAFKA,
        [":3: database.password.file: ~unheard_of/word: there is no such user here"],
    ),
    # -- addresses
    "no-url": (DATABASE.replace("postgresql", "mysql") + KAFKA, [f":2: database.url: {URL}"]),
    "broken-url": (DATABASE.replace("localhost", "[::1") + KAFKA, [f":2: database.url: {URL}"]),
    "password-in-the-url": (
        DATABASE.replace("localhost", "u:word@db1") + KAFKA,
        [f":2: database.url: holds a password: take it out, and set password = {SECRET}"],
    ),
    "said-elsewhere": (
        DATABASE.replace("orders", "orders?sslmode=require") + KAFKA,
        [":2: database.url: sslmode has no place in the url: set tls and the tls_… keys instead"],
    ),
    "no-host-and-port": (
        KAFKA.replace(":9092", ":x") + DATABASE,
        [":2: kafka.bootstrap_servers[0]: must be host:port"],
    ),
    # -- names
    "no-topic": (
        SMALLEST + 'allowed_topics = ["a b"]\n',
        [":5: kafka.allowed_topics[0]: must be the name of a topic, or the beginning of names and then *"],
    ),
    "no-template": (
        SMALLEST + '[table]\ntopic = "orders"\n',
        [':6: table.topic: must have a column in braces, as "{topic}" or "outbox.event.{aggregatetype}"'],
    ),
    "compression-not-installed": (
        SMALLEST + 'compression = "zstd"\n',
        [
            ":5: kafka.compression: zstd needs a package that isn't here: pip install 'outbox-relay[compression]'",
        ],
    ),
    # -- what contradicts
    "no-effect": (
        DATABASE + 'tls_ca_file = "config.toml"\n' + KAFKA,
        [':3: database.tls_ca_file: has no effect without tls = "verify-full"'],
    ),
    "needed": (DATABASE + SASL, [":3: kafka.sasl_mechanism: missing, and security_protocol needs it"]),
    "plaintext-to-others": (
        DATABASE + KAFKA.replace("localhost", "k1"),
        [
            ":3: kafka.dangerously_allow_plaintext: must be true for"
            ' security_protocol = "PLAINTEXT" or "SASL_PLAINTEXT", and k1 isn\'t this machine'
        ],
    ),
    "password-in-the-clear": (
        DATABASE + KAFKA + 'security_protocol = "SASL_PLAINTEXT"\nsasl_mechanism = "PLAIN"\n'
        'sasl_username = "u"\nsasl_password = { file = "config.toml" }\n',
        [
            ":6: kafka.sasl_mechanism: PLAIN shows the password to the network:"
            ' set security_protocol = "SASL_SSL", or use SCRAM'
        ],
    ),
    # -- the token provider
    "no-function-s-name": (
        DATABASE + PROVIDER.format("tokens"),
        [":7: kafka.sasl_token_provider: must be package.module:function"],
    ),
    "no-module": (
        DATABASE + PROVIDER.format("unheard.of:it"),
        [":7: kafka.sasl_token_provider: can't be imported: No module named 'unheard'"],
    ),
    "module-that-fails": (
        DATABASE + PROVIDER.format("..:it"),
        [":7: kafka.sasl_token_provider: can't be imported: .. fails with TypeError"],
    ),
    "no-function": (
        DATABASE + PROVIDER.format("os:sep"),
        [":7: kafka.sasl_token_provider: os:sep is no function"],
    ),
    # -- TLS
    "no-certificates": (
        VERIFIED + 'tls_ca_file = "config.toml"\n' + KAFKA,
        [
            ":1: database.dangerously_skip_server_verification: the tls files don't work:"
            " {file} isn't a PEM file of certificates"
        ],
    ),
    "no-certificate-of-its-own": (
        VERIFIED + 'tls_cert_file = "config.toml"\n' + KAFKA,
        [
            ":1: database.dangerously_skip_server_verification: the tls files don't work:"
            " {file} with the key of {file}: isn't PEM, or the two don't belong together,"
            " or the key's password is wrong"
        ],
    ),
}


@pytest.fixture(autouse=True)
def _without_cramjam(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "cramjam" else find_spec(name))


def validate(directory: Path, text: str | bytes) -> tuple[int, str, list[str]]:
    """The exit code, stdout, and stderr's lines without the file's name."""
    path = directory / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = CliRunner().invoke(cli.main, ["validate", "--config", str(path)])
    lines = result.stderr.splitlines()
    assert all(line.startswith(f"{path}:") for line in lines), result.stderr
    return (
        result.exit_code,
        result.stdout,
        [line.removeprefix(str(path)).replace(str(path), "{file}") for line in lines],
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_said_of_a_mistake(mistake: str, tmp_path: Path) -> None:
    text, lines = MISTAKES[mistake]
    assert validate(tmp_path, text) == (78, "", lines)


def test_what_is_said_of_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        result = CliRunner().invoke(cli.main, ["validate", "--config", str(path)])
        assert (result.exit_code, result.stdout, result.stderr) == (78, "", f"{path}: {problem}\n")


def test_what_is_said_of_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(SMALLEST)
    result = CliRunner().invoke(cli.main, ["validate", "--config", str(path)])
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{path}: no mistakes\n", "")


# -- that no class is missing

MODULES = (addresses, config, config_file, tls)

#: Met only by ``schema apply --database-url``, and by a file that vanishes between two looks.
NOT_OF_VALIDATE = ("raise ConfigError([str(error)]) from error", "raise OSError(f'{file}: {error.strerror or error}')")


def source(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__)


def refusals() -> Iterator[tuple[Path, int]]:
    """Where the code refuses something: each ``raise``, and each way to tell of a mistake."""
    for module in MODULES:
        for function in ast.walk(ast.parse(source(module).read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if not isinstance(node, (ast.Raise, ast.Yield) if function.name == "_told" else ast.Raise):
                        continue
                    if not ast.unparse(node).startswith(NOT_OF_VALIDATE):
                        yield source(module), node.lineno


def lines_met(path: Path) -> set[tuple[Path, int]]:
    """The lines of the modules that a look at this file comes by."""
    met: set[tuple[Path, int]] = set()
    files = {str(source(module)): source(module) for module in MODULES}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if (traced := files.get(frame.f_code.co_filename)) is None:
            return None
        if event == "line":
            met.add((traced, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        CliRunner().invoke(cli.main, ["validate", "--config", str(path)])
    finally:
        sys.settrace(before)
    return met


def test_every_refusal_in_the_code_has_its_example(tmp_path: Path) -> None:
    met = lines_met(tmp_path / "none.toml")
    for name, (text, _) in MISTAKES.items():
        # Where the stack is full, a trace ends unseen; its line is said by its twin.
        if name != "too-deep":
            path = tmp_path / "config.toml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            met |= lines_met(path)
    wanted = set(refusals())
    assert len(wanted) > 25
    assert sorted(wanted - met) == []


#: What pydantic may say, by what a type is made of.
SAID_OF = {
    "str": "string_type",
    "int": "int_type",
    "float": "float_type",
    "bool": "bool_type",
    "list": "list_type",
    "dict": "dict_type",
    "literal": "literal_error",
    "model": "model_type",
    "model-fields": "extra_forbidden",
    "model-field": "missing",
    "function-after": "value_error",
    "ge": "greater_than_equal",
    "le": "less_than_equal",
    "allow_inf_nan": "finite_number",
    ("str", "min_length"): "string_too_short",
    ("list", "min_length"): "too_short",
}
#: Of which no mistake comes.
SILENT = {"nullable", "default", "definitions", "definition-ref", "no-info", "with-info"}
BOUNDS = {"ge", "le", "gt", "lt", "allow_inf_nan", "multiple_of", "pattern"}
LENGTHS = {"min_length", "max_length"}


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every schema in pydantic's schema of the settings."""
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node
        for key, inner in node.items():
            if key not in ("serialization", "metadata", "config"):
                yield from parts(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from parts(inner)


def types_that_pydantic_may_tell() -> set[str]:
    told = set()
    for part in parts(config.Config.__pydantic_core_schema__):
        if part["type"] not in SILENT:
            told.add(SAID_OF[part["type"]])
        told |= {SAID_OF[bound] for bound in BOUNDS & part.keys()}
        told |= {SAID_OF[part["type"], length] for length in LENGTHS & part.keys()}
    return told


def test_every_type_of_error_has_its_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = config_file._told
    types: set[str] = set()

    def noted(mistake: Any, type_: Any) -> Any:
        types.add(mistake["type"])
        return told(mistake, type_)

    monkeypatch.setattr(config_file, "_told", noted)
    for text, _ in MISTAKES.values():
        validate(tmp_path, text)
    wanted = types_that_pydantic_may_tell()
    assert len(wanted) > 10
    assert wanted - types == set()
