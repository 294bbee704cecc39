"""How a command ends that couldn't do what it was asked to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import asyncpg
import click

from outbox_relay import daemon, tracebacks
from outbox_relay.errors import ConfigError, NotPermittedError, OutboxRelayError, RefusedError
from outbox_relay.source.session import what_it_says

#: sysexits.h: the configuration is at fault (EX_CONFIG), or a service isn't there (EX_UNAVAILABLE).
EXIT_CONFIG = 78
EXIT_UNAVAILABLE = 69
#: Nor does it help to try again (EX_NOPERM).
EXIT_NOT_PERMITTED = 77
#: What was asked for can't be done to what is there.
EXIT_REFUSED = 1


@contextlib.contextmanager
def failing_clearly() -> Iterator[None]:
    """Turn what an operator can mend into lines on stderr and an exit code."""
    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        sys.exit(EXIT_CONFIG)
    except RefusedError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_REFUSED)
    except NotPermittedError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_NOT_PERMITTED)
    except (OutboxRelayError, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        click.echo(what_it_says(error) or type(error).__name__, err=True)
        sys.exit(EXIT_UNAVAILABLE)
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        click.echo(f"a defect of outbox-relay\n{tracebacks.without_data(error)}", err=True)
        sys.exit(daemon.EXIT_DEFECT)
