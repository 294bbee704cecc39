"""What operators' commands have in common: which outbox is meant, and that somebody agrees before it is changed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

import asyncpg
import click
from click.core import ParameterSource

from outbox_relay import addresses, config, daemon
from outbox_relay.errors import ConfigError, NotPermittedError, SourceRefusedError
from outbox_relay.source.session import Database, Session, what_it_says
from outbox_relay.source.statements import OUTBOX, OutboxTable
from outbox_relay.tls import Tls

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])

#: What a command does on the session that it is given.
Work: TypeAlias = Callable[[Session, OutboxTable], Awaitable[T]]


def outbox_options(command: C) -> C:
    """``--config`` and ``--database-url``, as the arguments ``path`` and ``database_url``."""
    url = click.option(
        "--database-url",
        envvar="DATABASE_URL",
        help="The database, as a user of its own; with --config, instead of the url in the file. The environment's"
        " DATABASE_URL counts only without --config.",
    )
    path = click.option("--config", "path", type=click.Path(path_type=Path), help="The TOML file of the relay.")
    return path(url(command))


yes_option = click.option("--yes", is_flag=True, help="Don't ask before something is changed.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")


def on_outbox(path: Path | None, database_url: str | None, work: Work[T]) -> T:
    """Do it on a connection of its own."""
    database, table = outbox_of(path, database_url)

    async def do() -> T:
        session = Session(database, "outbox-relay operator")
        try:
            return await work(session, table)
        except SourceRefusedError as error:
            if denied := _denied(error):
                raise NotPermittedError(
                    f"{what_it_says(denied)}: log in as a member of outbox_operator (`outbox-relay schema print"
                    " --roles`): --database-url postgresql://…"
                ) from error
            raise
        finally:
            await session.close()

    return asyncio.run(do())


def _denied(error: BaseException | None) -> asyncpg.InsufficientPrivilegeError | None:
    """What PostgreSQL said, where the role's rights are what is missing."""
    while error is not None and not isinstance(error, asyncpg.InsufficientPrivilegeError):
        error = error.__cause__
    return error


def outbox_of(path: Path | None, database_url: str | None) -> tuple[Database, OutboxTable]:
    """What these options mean. Raises ConfigError."""
    if path is None and database_url is None:
        raise ConfigError(["which database is meant? Give --config or --database-url, or set DATABASE_URL"])
    if path is None:
        return Database(addresses.checked_url(database_url or ""), 10.0, 30.0, tls=_tls(database_url or "")), OUTBOX
    settings = config.load(path)
    database, table = daemon.database_of(settings), daemon.table_of(settings)
    # The environment's is probably the application's own; the file says which is the relay's.
    is_typed = click.get_current_context().get_parameter_source("database_url") is ParameterSource.COMMANDLINE
    if database_url is not None and is_typed:
        url = addresses.checked_url(database_url)
        in_the_clear = settings.database.dangerously_allow_plaintext
        tls = database.tls if database.tls is not None or in_the_clear else _tls(url)
        database = replace(database, url=url, password=None, tls=tls)
    return database, table


def _tls(url: str) -> Tls | None:
    """As with ``tls = "auto"``: to hosts other than this machine verified, with the certificates of the system."""
    local = all(addresses.is_local(host) for host in addresses.url_hosts(url))
    return None if local else Tls()


class _NobodyToAskError(click.ClickException):
    """An option is missing, which how the command is used wouldn't tell."""

    exit_code = click.UsageError.exit_code


def agreed(question: str, yes: bool) -> None:
    """Go on only if whoever is at the terminal says so, or ``--yes`` did."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise _NobodyToAskError(
            f"{question} Nothing was changed: this is no terminal to ask on, so add --yes to go on."
        )
    click.confirm(question, abort=True, err=True)


def to_json(value: Any) -> str:
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def local_time(time: datetime | None) -> str:
    """For a person, in the time zone of this machine, with its offset."""
    return "-" if time is None else time.astimezone().isoformat(sep=" ", timespec="seconds")
