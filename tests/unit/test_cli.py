"""The command line: exit codes, and messages that say what to do, without a traceback or a secret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outbox_relay import __version__, schema
from outbox_relay.inbox import schema as inbox_schema

SECRET = "s3cret-w0rd"


def outbox_relay(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    usual = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    return subprocess.run(
        [sys.executable, "-m", "outbox_relay", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=usual | environment,
    )


def test_the_version() -> None:
    done = outbox_relay("--version")
    assert (done.returncode, done.stdout) == (0, f"outbox-relay, version {__version__}\n")


def test_schema_print_prints_the_sql_and_nothing_else() -> None:
    done = outbox_relay("schema", "print")
    assert (done.returncode, done.stdout, done.stderr) == (0, schema.read_sql(), "")


def test_schema_print_prints_the_inbox_instead() -> None:
    done = outbox_relay("schema", "print", "--inbox")
    assert (done.returncode, done.stdout, done.stderr) == (0, inbox_schema.read_sql(), "")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["print", "--inbox", "--roles"], "--roles, --wake-up or --inbox, one at a time"),
        (["print", "--inbox", "--config", "config.toml"], "--config goes with --roles or --wake-up"),
        (["apply", "--inbox", "--wake-up"], "--roles and --wake-up belong to the outbox"),
    ],
)
def test_the_inbox_goes_with_nothing_else(arguments: list[str], why: str) -> None:
    done = outbox_relay("schema", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr


def test_each_mistake_in_the_configuration_is_a_line_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[database]\nurl = "mysql://u:{SECRET}@h/d"\n[relay]\nbatch_row = 1\n')
    done = outbox_relay("run", "--config", str(path))
    assert (done.returncode, done.stdout) == (78, "")
    assert SECRET not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{path}:") for line in lines)


def test_a_configuration_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    done = outbox_relay("run", "--config", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == f"{tmp_path / 'none.toml'}: No such file or directory\n"


def test_the_file_to_validate_is_given_one_way_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[database]\nurl = "postgresql://localhost/d"\n[kafka]\nbootstrap_servers = ["localhost:1"]\n')
    for arguments in ([str(path)], ["--config", str(path)]):
        done = outbox_relay("validate", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: no mistakes\n", "")
    for arguments in ([], [str(path), "--config", "another.toml"]):
        done = outbox_relay("validate", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "which file? Give one, as FILE or with --config" in done.stderr


def test_schema_apply_asks_which_database_is_meant() -> None:
    done = outbox_relay("schema", "apply")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == "which database is meant? Give --config or --database-url, or set DATABASE_URL\n"


@pytest.mark.parametrize("url", [f"mysql://u:{SECRET}@h/d", f"postgresql://u:{SECRET}@h:port/d", f"u:{SECRET}@h"])
def test_a_url_that_is_none_is_said_without_it(url: str) -> None:
    for done in (
        outbox_relay("schema", "apply", "--database-url", url),
        outbox_relay("schema", "apply", DATABASE_URL=url),
    ):
        assert (done.returncode, done.stdout) == (78, "")
        assert done.stderr.startswith("the database's url must be postgresql://user:password@host:port/database")
        assert SECRET not in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "where",
    [
        "127.0.0.1:1/d",  # refused
        "nowhere.invalid/d",
        "two..dots/d",  # no host at all
        "127.0.0.1:1/d?sslmode=nonsense",
    ],
)
def test_a_database_out_of_reach_is_one_line_without_its_password(where: str) -> None:
    done = outbox_relay("schema", "apply", "--database-url", f"postgresql://u:{SECRET}@{where}")
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_relay_starts_without_sqlalchemy() -> None:
    """Loading it would be most of the start, and 22 MB of memory."""
    script = "import sys, outbox_relay.cli; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
