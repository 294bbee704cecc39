"""Which outbox operators' commands mean, and how they connect to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from outbox_relay.cli_operators import outbox_of, outbox_options
from outbox_relay.source.session import Database
from outbox_relay.source.statements import OUTBOX, OutboxTable

LOCAL, REMOTE = "postgresql://localhost/d", "postgresql://ops:word@db.example/d"


def meant(*arguments: str, **environment: str) -> tuple[Database, OutboxTable]:
    found: list[tuple[Database, OutboxTable]] = []

    @click.command()
    @outbox_options
    def command(**options: Any) -> None:
        found.append(outbox_of(**options))

    result = CliRunner().invoke(command, arguments, env={"DATABASE_URL": None, **environment}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(
        '[database]\nurl = "postgresql://relay@localhost/d"\nstatement_timeout_seconds = 7\n'
        'password = { file = "password" }\n[kafka]\nbootstrap_servers = ["localhost:1"]\n[table]\nname = "messages"\n'
    )
    (tmp_path / "password").write_text("the relay's")
    return str(path)


def test_the_file_says_which_and_the_url_by_whom(config: str) -> None:
    database, table = meant("--config", config)
    assert (database.url, table.name) == ("postgresql://relay@localhost/d", "messages")
    assert database.password is not None
    database, table = meant("--config", config, "--database-url", LOCAL)
    assert (database.url, table.name, database.statement_timeout_seconds) == (LOCAL, "messages", 7)
    # The relay's password isn't another user's.
    assert database.password is None
    # What is in the environment is probably the application's own.
    assert meant("--config", config, DATABASE_URL=LOCAL)[0].url == "postgresql://relay@localhost/d"
    assert meant(DATABASE_URL=LOCAL) == meant("--database-url", LOCAL)
    assert meant("--database-url", LOCAL)[1] == OUTBOX


def test_other_machines_are_verified(config: str) -> None:
    assert meant("--database-url", LOCAL)[0].tls is None
    for options in ([], ["--config", config]):
        tls = meant(*options, "--database-url", REMOTE)[0].tls
        assert tls is not None
        assert tls.verify


def test_plaintext_is_what_the_file_says_in_so_many_words(config: str) -> None:
    path = Path(config)
    path.write_text(path.read_text().replace("[kafka]", "dangerously_allow_plaintext = true\n[kafka]"))
    assert meant("--config", config, "--database-url", REMOTE)[0].tls is None
