"""``docs/dead-letters.md`` tells what is so: its commands are run in their order, on real servers."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path
from typing import Any

from outbox_relay.servers import Kafka
from tests.acceptance import parked
from tests.acceptance.commands import invoke
from tests.acceptance.relays import new_topic, relay_process
from tests.acceptance.test_status import config, on_a_terminal
from tests.conftest import Database
from tests.waiting import eventually

GUIDE = Path(__file__).parents[2] / "docs" / "dead-letters.md"

#: What differs from night to night, by what it becomes.
_DIFFERS = (
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\S*( UTC)?", "TIME"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
    (r"\d+(\.\d+)? (s|min)\b", "SPAN"),
    (r"\d+\.\d/s", "RATE"),
    (r"by \S+@\S+ as \w+", "by WHOM"),
    (r"orders-relay-1|relay-[0-9a-f]{8}", "RELAY"),
    (r"[─ ]+", " "),
)


async def test_the_guide(outbox_database: Database, kafka: Kafka, tmp_path: Path) -> None:
    topic = await new_topic(kafka, 1, {"max.message.bytes": "4096"})
    connection = await outbox_database.connect()
    large = b'{"order": 2, "note": "' + b"x" * 5_988 + b'"}'
    given = {"type": "OrderPlaced", "headers": '{"tenant": "north"}'}
    retries: dict[str, Any] = {"max_attempts": 3, "retry_first_seconds": 0.02, "retry_ceiling_seconds": 0.05}
    with relay_process(outbox_database.url, kafka.bootstrap_servers, kafka={"batch_bytes": 2_048}, **retries):
        for key, payload in (("ada", b"{}"), ("ada", large), ("ada", b"{}"), ("ada", b"{}"), ("bo", b"{}")):
            await parked.insert(connection, topic, key, payload=payload, **given)

        async def waits(states: dict[int, str]) -> bool:
            unsent = await connection.fetchval("SELECT count(*) FROM outbox WHERE sent_at IS NULL")
            return unsent == len(states) and await parked.states(connection) == states

        await eventually(lambda: waits({2: "dead", 3: "blocked", 4: "blocked"}), "one is dead, and two are behind it")
        for command, told in _commands():
            arguments = shlex.split(command)[1:]
            if arguments == ["status"]:
                said = await asyncio.to_thread(on_a_terminal, config(tmp_path, outbox_database.url))
            else:
                said = await _run(arguments, outbox_database, tmp_path)
            assert _alike(said.replace(topic, "orders")) == _alike(told), command
            if "--edit" in arguments:
                await eventually(lambda: waits({}), "the row and its followers are sent")
                await parked.insert(connection, topic, "bo", payload=large)
                await eventually(lambda: waits({6: "dead"}), "another is dead")


async def _run(arguments: list[str], database: Database, directory: Path) -> str:
    arguments, _, target = arguments[: arguments.index(">")] if ">" in arguments else arguments, None, arguments[-1]
    file = directory / "payload.json"
    if "--edit" in arguments:
        # Somebody shortens it.
        assert len(file.read_bytes()) == 6_012
        file.write_text('{"order": 2}')
    arguments = [str(file) if argument == file.name else argument for argument in arguments]
    yes = ["--yes"] if arguments[1] in ("retry", "discard") else []
    result = await invoke(*arguments, *yes, "--database-url", database.url)
    assert result.exit_code == 0, result.output
    if target == file.name and "--edit" not in arguments:
        file.write_bytes(result.stdout_bytes)
        return ""
    return result.output


def _commands() -> list[tuple[str, str]]:
    """Each command of the guide, and what is told of its output; without the questions."""
    blocks = re.findall(r"<!-- tested: night -->\n```console\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    commands = [part.partition("\n") for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, re.sub(r".*\[y/N\]: y\n", "", told)) for command, _, told in commands]


def _alike(text: str) -> list[str]:
    for pattern, replacement in _DIFFERS:
        text = re.sub(pattern, replacement, text)
    return [line.strip() for line in text.replace("\r", "").strip().splitlines()]
