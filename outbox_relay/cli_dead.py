"""``outbox-relay dead``: rows that wait, and what becomes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import click

from outbox_relay.cli_failures import EXIT_REFUSED, failing_clearly
from outbox_relay.cli_operators import agreed, json_option, local_time, on_outbox, outbox_options, to_json, yes_option
from outbox_relay.dead_letters import DISCARDED, MOST_BEHIND, RETRIED, STATES, DeadLetters, Edit, Selector, Waiting
from outbox_relay.errors import InvalidMessageError, RefusedError
from outbox_relay.source.session import Session
from outbox_relay.source.statements import OutboxTable
from outbox_relay.text import columns, printable, span

C = TypeVar("C", bound=Callable[..., Any])

#: Of ids that weren't changed so many are named.
_MOST_NAMED = 20


def _filters(command: C) -> C:
    error = click.option("--error", help="Those refused with this class of error, as `dead list` shows it.")
    topic = click.option("--topic", help="Those of this topic.")
    key = click.option("--key", help="Those of this key.")
    return key(topic(error(command)))


@click.group("dead")
def dead_group() -> None:
    """Rows that Kafka refused, and those that wait behind them."""


@dead_group.command("list")
@outbox_options
@click.option(
    "--state",
    type=click.Choice([*STATES, "all"]),
    default="dead",
    show_default=True,
    help="Those that are in this state.",
)
@click.option("--id", "ids", type=int, multiple=True, help="This row; may be given more than once.")
@_filters
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="The oldest so many.")
@json_option
def dead_list(
    path: Path | None, database_url: str | None, state: str, ids: tuple[int, ...], limit: int, as_json: bool, **by: Any
) -> None:
    """List rows that wait, the oldest first; without keys and payloads."""
    states = STATES if state == "all" else (state,)

    async def find(session: Session, table: OutboxTable) -> list[Waiting]:
        return await DeadLetters(session, table).waiting(states, Selector(ids, **by), limit + 1)

    with failing_clearly():
        found = on_outbox(path, database_url, find)
    click.echo(_list_as_json(found, limit) if as_json else "\n".join(_list_as_lines(found, limit)))


def _list_as_json(found: Sequence[Waiting], limit: int) -> str:
    rows = [{name: value for name, value in asdict(row).items() if name != "now"} for row in found[:limit]]
    return to_json({"rows": rows, "more": len(found) > limit})


def _list_as_lines(found: Sequence[Waiting], limit: int) -> Iterator[str]:
    if not found:
        yield "none"
        return
    yield from columns(
        ["ID", "TOPIC", "STATE", "ATTEMPTS", "PARKED", "DUE", "BEHIND", "ERROR"],
        [
            [
                str(row.id),
                printable(row.topic),
                row.state,
                str(row.attempts),
                f"{span((row.now - row.parked_at).total_seconds())} ago",
                _due(row),
                f"{row.behind}{'+' if row.behind == MOST_BEHIND else ''}",
                printable(row.error or "-"),
            ]
            for row in found[:limit]
        ],
    )
    if len(found) > limit:
        yield f"and more: these are the oldest {limit}; --limit shows more"


def _due(row: Waiting) -> str:
    if row.due_at is None:
        return "-"
    seconds = (row.due_at - row.now).total_seconds()
    return f"in {span(seconds)}" if seconds > 0 else "now"


@dead_group.command("show")
@outbox_options
@click.argument("id_", metavar="ID", type=int)
@click.option("--payload", "payload_only", is_flag=True, help="Instead, the payload alone, byte for byte, on stdout.")
@json_option
def dead_show(path: Path | None, database_url: str | None, id_: int, payload_only: bool, as_json: bool) -> None:
    """Show all about a row that waits, its key and headers too, but not its payload."""
    with failing_clearly():
        if payload_only:
            payload = on_outbox(path, database_url, lambda session, table: DeadLetters(session, table).payload(id_))
            if payload is None:
                raise RefusedError(f"row {id_} is a tombstone: it has no payload")
            sys.stdout.buffer.write(payload)
            return
        found = on_outbox(path, database_url, lambda session, table: DeadLetters(session, table).show(id_))
    click.echo(to_json(found) if as_json else "\n".join(_shown(found)))


def _shown(found: dict[str, Any]) -> Iterator[str]:
    history = found.pop("history")
    for name, value in found.items():
        shown = local_time(value) if isinstance(value, datetime) else "-" if value is None else printable(str(value))
        yield f"{name:<14} {shown}"
    for deed in history:
        reason = f": {printable(deed['reason'])}" if deed["reason"] else ""
        yield f"{'':14} {local_time(deed['at'])} {deed['command']} by {_whom(deed)}{reason}"


def _whom(deed: dict[str, Any]) -> str:
    return printable(f"{deed['by_whom']} as {deed['by_role']}")


_IDS = click.argument("ids", metavar="[ID]...", type=int, nargs=-1)
_ALL = click.option("--all", "everything", is_flag=True, help="All that there are.")


@dead_group.command("retry")
@outbox_options
@_IDS
@_filters
@_ALL
@click.option("--edit", is_flag=True, help="Correct one row, given by its ID, with the options below.")
@click.option("--set-topic", metavar="TOPIC", help="Send it there. It may arrive before or after its neighbours.")
@click.option("--set-header", "set_headers", metavar="NAME=VALUE", multiple=True, help="Add or replace a header.")
@click.option("--remove-header", "remove_headers", metavar="NAME", multiple=True, help="Take a header away.")
@click.option("--payload-file", type=click.File("rb"), help="What is in this file becomes the payload; - is stdin.")
@yes_option
def dead_retry(
    path: Path | None,
    database_url: str | None,
    ids: tuple[int, ...],
    everything: bool,
    edit: bool,
    set_topic: str | None,
    set_headers: tuple[str, ...],
    remove_headers: tuple[str, ...],
    payload_file: BinaryIO | None,
    yes: bool,
    **by: Any,
) -> None:
    """Try again now what is dead or waits to be tried again; what waits behind it follows in order."""
    selector = Selector(ids, **by)
    _check_selector(selector, everything)
    edited = _edit(set_topic, set_headers, remove_headers, payload_file)
    if edit != (not edited.is_empty):
        raise click.UsageError("--edit goes with --set-topic, --set-header, --remove-header or --payload-file")
    if edit and selector != Selector(ids[:1]):
        raise click.UsageError("--edit corrects one row, given by its ID")

    async def retry(session: Session, table: OutboxTable) -> tuple[int, set[int]]:
        letters = DeadLetters(session, table)
        chosen = await letters.choose(RETRIED, selector)
        if edit and chosen.rows:
            agreed(f"Correct and try again row {ids[0]}?", yes)
            await letters.edit(ids[0], edited)
            return 1, set()
        if chosen.rows:
            agreed(f"Try again {chosen}?", yes)
        return await letters.retry(chosen, str(selector)), chosen.missing(ids)

    with failing_clearly():
        _tell("tried again", *on_outbox(path, database_url, retry))


@dead_group.command("discard")
@outbox_options
@_IDS
@_filters
@_ALL
@click.option("--reason", required=True, help="Why; it is kept in outbox_audit.")
@yes_option
def dead_discard(
    path: Path | None,
    database_url: str | None,
    ids: tuple[int, ...],
    everything: bool,
    reason: str,
    yes: bool,
    **by: Any,
) -> None:
    """Never send rows that wait, and let those behind them go on."""
    selector = Selector(ids, **by)
    _check_selector(selector, everything)
    if not reason.strip():
        raise click.UsageError("--reason is empty: say why, for whoever misses the messages")

    async def discard(session: Session, table: OutboxTable) -> tuple[int, set[int]]:
        letters = DeadLetters(session, table)
        chosen = await letters.choose(DISCARDED, selector)
        if chosen.rows:
            agreed(f"Discard {chosen}?", yes)
        return await letters.discard(chosen, str(selector), reason), chosen.missing(ids)

    with failing_clearly():
        _tell("discarded", *on_outbox(path, database_url, discard))


def _check_selector(selector: Selector, everything: bool) -> None:
    if selector.is_empty and not everything:
        raise click.UsageError("which rows? Give an ID, --key, --topic or --error, or --all")
    if everything and not selector.is_empty:
        raise click.UsageError("--all is all: give either it or an ID, --key, --topic or --error")


def _edit(
    topic: str | None, set_headers: Sequence[str], remove_headers: Sequence[str], payload_file: BinaryIO | None
) -> Edit:
    headers = {}
    for given in set_headers:
        name, equals, value = given.partition("=")
        if not equals:
            raise click.UsageError("--set-header takes NAME=VALUE")
        headers[name] = value
    try:
        return Edit(topic, headers, remove_headers, None if payload_file is None else payload_file.read())
    except InvalidMessageError as error:
        raise click.UsageError(str(error)) from error


def _tell(done: str, rows: int, missing: set[int]) -> None:
    click.echo(f"{rows:,} row{'s' * (rows != 1)} {done}")
    if missing:
        named = " ".join(map(str, sorted(missing)[:_MOST_NAMED])) + (" …" if len(missing) > _MOST_NAMED else "")
        click.echo(
            f"not among them, since they aren't in a state for it: {named}; `outbox-relay explain ID` says more",
            err=True,
        )
        sys.exit(EXIT_REFUSED)
