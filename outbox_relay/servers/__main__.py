"""Servers to try things on: ``python -m outbox_relay.servers`` starts them, ``… topic NAME`` makes a topic."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import click

from outbox_relay.errors import ServerError
from outbox_relay.servers import Kafka, Postgres, open_kafka, open_postgres
from outbox_relay.servers.topics import TopicExistsError, create_topic

_NAMES = ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS")

#: How a configuration begins that may be written anew.
_WRITTEN_HERE = "# Written by python -m outbox_relay.servers, which writes it anew each time"

_CONFIG = """\
[database]
url = {url}

[kafka]
bootstrap_servers = {bootstrap_servers}
allowed_topics = ["orders"]
"""


@click.group(invoke_without_command=True)
@click.option(
    "--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write a relay's configuration for them."
)
@click.pass_context
def main(context: click.Context, path: Path | None) -> None:
    """Start PostgreSQL and Kafka on this machine, until Ctrl-C; nothing of them is kept.

    Where DATABASE_URL or KAFKA_BOOTSTRAP_SERVERS is set, that one is there already, and only the other is started.
    """
    if context.invoked_subcommand is not None:
        return
    named = [name for name in _NAMES if os.environ.get(name)]
    if path is not None:
        _check_config(path, named)
    if len(named) == len(_NAMES):
        _say("both are set already; nothing to start. Unset them to have servers of your own here:")
        _say(f"unset {' '.join(_NAMES)}")
        return
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell may have had the latter ignored
        signal.signal(number, signal.default_int_handler)
    with closing(open_postgres(_say)) as postgres, closing(open_kafka(_say)) as kafka:
        if path is not None:
            _write_config(path, postgres, kafka)
        click.echo(f"export DATABASE_URL={postgres.url}")
        click.echo(f"export KAFKA_BOOTSTRAP_SERVERS={kafka.bootstrap_servers}")
        _say(_until(postgres, kafka))
        signal.pause()


def _check_config(path: Path, named: list[str]) -> None:
    """Before anything is started."""
    if named:
        raise click.UsageError(
            f"--config is for servers that are both started here, so nothing was written: unset {' '.join(named)}"
        )
    try:
        if path.exists() and not path.read_text("utf-8").startswith(_WRITTEN_HERE):
            raise click.UsageError(f"{path} is there already, and wasn't written here: give another name, or move it")
    except (OSError, UnicodeError) as error:
        raise click.UsageError(f"{path} can't be read: {error}") from error


def _write_config(path: Path, postgres: Postgres, kafka: Kafka) -> None:
    servers = json.dumps(kafka.bootstrap_servers.split(","))
    settings = _CONFIG.format(url=json.dumps(postgres.url), bootstrap_servers=servers)
    text = f"{_WRITTEN_HERE}: copy it before you change it.\n{settings}"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ServerError(f"{path} can't be written: {error.strerror or error}") from error
    _say(f"wrote {path}")


def _until(postgres: Postgres, kafka: Kafka) -> str:
    """What ends, and what with it; a server that the environment names isn't ours to end."""
    if postgres.server is None:
        return "Kafka runs until Ctrl-C, which deletes its data"
    if kafka.server is None:
        return "PostgreSQL runs until Ctrl-C, which deletes its data"
    return "both run until Ctrl-C, which deletes their data; go on in another terminal"


@main.command()
@click.argument("name")
@click.option("--partitions", default=3, show_default=True)
def topic(name: str, partitions: int) -> None:
    """Make a topic on the Kafka of KAFKA_BOOTSTRAP_SERVERS, unless it is there."""
    servers = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
    try:
        asyncio.run(create_topic(servers, name, partitions))
    except TopicExistsError:
        click.echo(f"the topic {name} is there already on {servers}, and stays as it is")
        return
    click.echo(f"made the topic {name} with {partitions} partition{'s' * (partitions != 1)} on {servers}")


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ServerError as error:
        _say(str(error))
        sys.exit(69)
    except (KeyboardInterrupt, click.Abort):
        _say("stopped")
