"""Servers to try things on: ``python -m outbox_relay.servers`` starts them, ``… topic NAME`` makes a topic."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import closing

import click

from outbox_relay.errors import ServerError
from outbox_relay.servers import open_kafka, open_postgres
from outbox_relay.servers.topics import create_topic


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Start PostgreSQL and Kafka on this machine, until Ctrl-C; nothing of them is kept."""
    if context.invoked_subcommand is not None:
        return
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell may have had the latter ignored
        signal.signal(number, signal.default_int_handler)
    with closing(open_postgres(_say)) as postgres, closing(open_kafka(_say)) as kafka:
        click.echo(f"export DATABASE_URL={postgres.url}")
        click.echo(f"export KAFKA_BOOTSTRAP_SERVERS={kafka.bootstrap_servers}")
        _say("both run until Ctrl-C, which deletes their data")
        signal.pause()


@main.command()
@click.argument("name")
@click.option("--partitions", default=3, show_default=True)
def topic(name: str, partitions: int) -> None:
    """Make a topic on the Kafka of KAFKA_BOOTSTRAP_SERVERS."""
    servers = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
    asyncio.run(create_topic(servers, name, partitions))


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
