"""Operators' commands, run in this process and with no terminal to ask on."""

from __future__ import annotations

import asyncio

from click.testing import CliRunner, Result

from outbox_relay import cli
from outbox_relay.source import session
from outbox_relay.source.session import Session
from tests.conftest import Database


async def invoke(*arguments: str, input: bytes | None = None) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli.main, arguments, input, catch_exceptions=False)


async def outbox_relay(database: Database, *arguments: str, input: bytes | None = None) -> str:
    """What the command says; it succeeds."""
    result = await invoke(*arguments, "--database-url", database.url, input=input)
    assert result.exit_code == 0, result.output
    return result.output


def session_on(database: Database, schema: str = "") -> Session:
    return Session(session.Database(database.url, 10.0, 10.0, schema=schema), "test")
