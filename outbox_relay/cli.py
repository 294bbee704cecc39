"""The command line: verbs only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import asyncpg
import click

from outbox_relay import __version__, config, daemon, logs, roles, schema, status, wake_up
from outbox_relay.checks import findings
from outbox_relay.cli_dead import dead_group
from outbox_relay.cli_failures import failing_clearly
from outbox_relay.cli_operators import outbox_of, outbox_options
from outbox_relay.cli_outbox import explain_row, pause_topic, replay_rows, resume_topic
from outbox_relay.errors import OutboxRelayError, SourceUnavailableError
from outbox_relay.inbox import schema as inbox_schema
from outbox_relay.source.session import Database, what_it_says
from outbox_relay.source.statements import OUTBOX

T = TypeVar("T")

#: The demo found damage, or was interrupted, as shells count it.
EXIT_DAMAGED = 1
EXIT_INTERRUPTED = 130


@click.group()
@click.version_option(__version__, prog_name="outbox-relay")
def main() -> None:
    """Carry what an application committed to PostgreSQL into Kafka."""


for command in (dead_group, explain_row, pause_topic, resume_topic, replay_rows):
    main.add_command(command)


@main.command()
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, help="The TOML file.")
@click.option("--once", is_flag=True, help="Drain what can be claimed, then exit 0.")
@click.option("--dry-run", is_flag=True, help="Say what would be published next, and whether its topics take it.")
def run(path: Path, once: bool, dry_run: bool) -> None:
    """Relay until SIGTERM or SIGINT; a second signal stops at once."""
    with failing_clearly():
        settings = config.load(path)
        if dry_run:
            # What is said of the servers is in the error, if there is one.
            logs.configure("error", settings.log.format)
            click.echo("\n".join(asyncio.run(daemon.dry_run(settings))))
            return
        logs.configure(settings.log.level, settings.log.format)
        code = asyncio.new_event_loop().run_until_complete(daemon.run(settings, once=once))
    _exit(code)


@main.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--config", "path", type=click.Path(path_type=Path), help="The TOML file, as with the other commands.")
def validate(file: Path | None, path: Path | None) -> None:
    """Say every mistake in a configuration FILE; connects to nothing."""
    path = path or file
    if path is None or (file or path) != path:
        raise click.UsageError("which file? Give one, as FILE or with --config")
    with failing_clearly():
        config.load(path)
    click.echo(f"{path}: no mistakes")


@main.command("status")
@outbox_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.option(
    "--window-seconds",
    type=click.FloatRange(0.1, 60.0),
    default=2.0,
    show_default=True,
    help="How long is counted for the rates.",
)
def show_status(path: Path | None, database_url: str | None, as_json: bool, window_seconds: float) -> None:
    """Say what waits, who works on it, how fast, and when it will be gone; asks the database alone."""
    with failing_clearly():
        database, table = outbox_of(path, database_url)
        found = asyncio.run(status.read(database, table, lambda: asyncio.sleep(window_seconds)))
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        click.echo("\n".join(status.as_tables(found) if sys.stdout.isatty() else status.as_lines(found)))


@main.command()
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, help="The TOML file.")
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON object.")
def check(path: Path, as_json: bool) -> None:
    """Connect to PostgreSQL and Kafka, change nothing, and say what is wrong and what to do about it."""
    with failing_clearly():
        settings = config.load(path)
        # What libraries have to say of a failure is among the findings.
        logging.disable()
        checked = asyncio.new_event_loop().run_until_complete(daemon.check(settings))
    found = checked.findings
    if not as_json and checked.topics is not None:
        click.echo(findings.topics_in_words(checked.topics))
    if as_json:
        click.echo(findings.as_json(checked))
    elif sys.stdout.isatty():
        click.echo(findings.as_table(found, shutil.get_terminal_size().columns))
    else:
        click.echo(findings.as_lines(found))
    _exit(findings.exit_code(found))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout; all else goes to stderr.")
def demo(as_json: bool) -> None:
    """Watch orders reach Kafka on real servers although the relay is killed; exit 1 if anything went wrong."""
    with failing_clearly():
        try:
            from outbox_relay import demo as story

            verdict = story.run(to_stderr=as_json)
        except ModuleNotFoundError as error:
            raise OutboxRelayError(f"the demo needs {error.name}: pip install 'outbox-relay[demo]'") from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(EXIT_INTERRUPTED)
    if as_json:
        click.echo(verdict.numbers.as_json())
    sys.exit(0 if verdict.sound else EXIT_DAMAGED)


@main.group("schema")
def schema_group() -> None:
    """The tables in PostgreSQL."""


@schema_group.command("print")
@click.option(
    "--roles", "with_roles", is_flag=True, help="Instead, the roles that relays, applications and people need."
)
@click.option("--wake-up", "with_wake_up", is_flag=True, help="Instead, the trigger by which writers wake idle relays.")
@click.option("--inbox", "of_inbox", is_flag=True, help="Instead, the tables of consumers that handle a message once.")
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="With --roles or --wake-up: for the table that [table] names.",
)
def schema_print(with_roles: bool, with_wake_up: bool, of_inbox: bool, path: Path | None) -> None:
    """Print the SQL."""
    if with_roles + with_wake_up + of_inbox > 1:
        raise click.UsageError("--roles, --wake-up or --inbox, one at a time")
    if not with_roles and not with_wake_up:
        if path is not None:
            raise click.UsageError(
                "--config goes with --roles or --wake-up; for a table of your own see `outbox-relay schema adopt`"
            )
        click.echo(inbox_schema.read_sql() if of_inbox else schema.read_sql(), nl=False)
        return
    table, named = OUTBOX, ""
    if path is not None:
        with failing_clearly():
            settings = config.load(path)
        table, named = daemon.table_of(settings), settings.table.schema_
    click.echo((roles.roles_sql if with_roles else wake_up.wake_up_sql)(table, named), nl=False)


@schema_group.command("apply")
@outbox_options
@click.option("--roles", "with_roles", is_flag=True, help="Also the roles that relays, applications and people need.")
@click.option("--wake-up", "with_wake_up", is_flag=True, help="Also the trigger by which writers wake idle relays.")
@click.option("--inbox", "of_inbox", is_flag=True, help="Instead, the tables of consumers that handle a message once.")
def schema_apply(
    path: Path | None, database_url: str | None, with_roles: bool, with_wake_up: bool, of_inbox: bool
) -> None:
    """Create the tables, or upgrade them to this release; as their owner."""
    # A consumer's database is often another than the outbox's.
    if of_inbox and (with_roles or with_wake_up):
        raise click.UsageError("--roles and --wake-up belong to the outbox: apply --inbox by itself")
    with failing_clearly():
        database, table = outbox_of(path, database_url)
        if of_inbox:
            created = asyncio.run(_run(database, inbox_schema.apply))
            version = inbox_schema.INBOX_VERSION
            click.echo(
                f"created the inbox, version {version}" if created else f"the inbox is at version {version} already"
            )
            return
        click.echo(asyncio.run(_run(database, schema.apply)))
        if with_roles:
            asyncio.run(_run(database, lambda c: roles.apply(c, roles.roles_sql(table, database.schema))))
            click.echo(f"the roles {', '.join(roles.ROLES)} have their rights; GRANT them to users that log in")
        if with_wake_up:
            asyncio.run(_run(database, lambda c: wake_up.apply(c, wake_up.wake_up_sql(table, database.schema))))
            click.echo("writers wake idle relays, those that connect from now on")


@schema_group.command("adopt")
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, help="The TOML file with [table].")
@click.option("--order-by", metavar="COLUMN", help="What has the order of the rows that are in the table already.")
def schema_adopt(path: Path, order_by: str | None) -> None:
    """Print the SQL that makes an existing table, as [table] names it, an outbox; nothing is changed."""
    from outbox_relay.adoption import adoption_sql  # with SQLAlchemy, which nothing else here needs

    with failing_clearly():
        settings = config.load(path)
    click.echo(adoption_sql(daemon.table_of(settings), order_by, settings.table.schema_), nl=False)


def _exit(code: int) -> NoReturn:
    """At once, all that it has being closed. asyncio.run and sys.exit would wait for threads too, and one may be asking
    a name server that doesn't answer.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


async def _run(database: Database, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
    async with _connected(database) as connection:
        return await work(connection)


@contextlib.asynccontextmanager
async def _connected(database: Database) -> AsyncIterator[asyncpg.Connection]:
    try:
        connection = await database.connect_to_schema("outbox-relay schema")
    except (OSError, TimeoutError, UnicodeError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise SourceUnavailableError(
            f"connect to the database: {what_it_says(error) or 'no answer in time'}"
        ) from error
    try:
        yield connection
    finally:
        await connection.close(timeout=10)
