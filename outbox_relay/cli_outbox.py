"""``outbox-relay explain``, ``pause``, ``resume`` and ``replay``."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from outbox_relay import pauses
from outbox_relay.cli_failures import EXIT_REFUSED, failing_clearly
from outbox_relay.cli_operators import agreed, json_option, local_time, on_outbox, outbox_options, to_json, yes_option
from outbox_relay.errors import InvalidMessageError
from outbox_relay.explain import explain
from outbox_relay.replay import Range, Replay
from outbox_relay.source.session import Session
from outbox_relay.source.statements import OutboxTable


class _Time(click.ParamType[datetime]):
    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            self.fail("must be a time such as 2026-01-31T18:00:00+01:00, or with Z for UTC", param, ctx)
        if time.tzinfo is None:
            self.fail("must say its time zone: add its offset, such as +01:00, or Z for UTC", param, ctx)
        return time


@click.command("explain")
@outbox_options
@click.argument("id_", metavar="ID", type=int)
@json_option
def explain_row(path: Path | None, database_url: str | None, id_: int, as_json: bool) -> None:
    """Say why a row isn't sent, or when it was."""
    with failing_clearly():
        found = on_outbox(path, database_url, lambda session, table: explain(session, id_, table))
    click.echo(to_json(found.as_dict()) if as_json else "\n".join(found.sentences))
    if found.answer == "no-such-row":
        sys.exit(EXIT_REFUSED)


@click.command("pause")
@outbox_options
@click.argument("topic")
@click.option("--reason", required=True, help="Why; relays and `explain` say it.")
def pause_topic(path: Path | None, database_url: str | None, topic: str, reason: str) -> None:
    """Have a topic's rows wait, until it is resumed; others flow."""
    if not reason.strip():
        raise click.UsageError("--reason is empty: say why, for whoever wonders where the messages are")
    with failing_clearly():
        try:
            on_outbox(path, database_url, lambda session, _: pauses.pause(session, topic, reason))
        except InvalidMessageError as error:
            raise click.UsageError(str(error)) from error
    click.echo(f"{topic} is paused; relays notice with their next heartbeat")


@click.command("resume")
@outbox_options
@click.argument("topic")
def resume_topic(path: Path | None, database_url: str | None, topic: str) -> None:
    """Let a paused topic's rows go on."""
    with failing_clearly():
        on_outbox(path, database_url, lambda session, _: pauses.resume(session, topic))
    click.echo(f"{topic} is resumed; relays notice with their next heartbeat")


@click.command("replay")
@outbox_options
@click.option("--topic", required=True, help="Rows of this topic.")
@click.option("--key", help="Only those of this key.")
@click.option("--since", type=_Time(), required=True, help="Sent then or later, such as 2026-01-31T18:00:00Z.")
@click.option("--until", type=_Time(), help="Sent before then.  [default: now]")
@click.option("--after", type=int, metavar="ID", default=-(2**63), help="Go on behind the row with this id.")
@click.option(
    "--rate", type=click.FloatRange(0.1, 100_000), default=500.0, show_default=True, help="Rows a second, at most."
)
@yes_option
def replay_rows(
    path: Path | None,
    database_url: str | None,
    topic: str,
    key: str | None,
    since: datetime,
    until: datetime | None,
    after: int,
    rate: float,
    yes: bool,
) -> None:
    """Send rows again that were sent, as copies marked with the header replay-of."""
    range_ = Range(topic, key, since, until if until is not None else datetime.now(UTC), after)
    if range_.since >= range_.until:
        raise click.UsageError("--since must be before --until, and before now")

    async def replay(session: Session, table: OutboxTable) -> int:
        replaying = Replay(session, range_, table)
        found = await replaying.find()
        rows = len(found.ids)
        if rows:
            sent = f"sent from {local_time(found.first_sent_at)} until {local_time(found.last_sent_at)}"
            agreed(f"Send {rows:,} row{'s' * (rows != 1)} again, {sent}, at {rate:g} a second?", yes)
        return await replaying.copy(found, rate)

    with failing_clearly():
        rows = on_outbox(path, database_url, replay)
    click.echo(f"{rows:,} row{'s' * (rows != 1)} copied; they are sent behind what waits already")
