"""Log lines: the documented ones are those in the code, and what they look like."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "outbox_relay"


@dataclass(frozen=True)
class Event:
    level: str
    fields: frozenset[str]


# -- what is documented


def methods() -> dict[str, ast.FunctionDef]:
    """The methods of the relay's Telemetry and the consumer's, by their names."""
    found: dict[str, ast.FunctionDef] = {}
    for path in ("telemetry.py", "inbox/telemetry.py"):
        tree = ast.parse((PACKAGE / path).read_text())
        (telemetry,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Telemetry")
        for method in telemetry.body:
            if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                assert method.name not in found, f"{method.name} is in both"
                found[method.name] = method
    return found


def log_calls(method: ast.FunctionDef) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(method)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "self._log"
    ]


def events_in_code() -> dict[str, Event]:
    found: dict[str, Event] = {}
    for method in methods().values():
        for call in log_calls(method):
            assert isinstance(call.func, ast.Attribute)
            # An error that is handed over is written as its traceback.
            fields = frozenset("exception" if word.arg == "exc_info" else str(word.arg) for word in call.keywords)
            names = [node.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
            assert names
            for name in names:
                assert isinstance(name, str)
                assert name not in found, f"{name} is logged in two places"
                found[name] = Event(call.func.attr, fields)
    return found


def events_in_documentation() -> dict[str, Event]:
    rows = re.findall(r"^\| (`.*?) \| (\w+) \| (.*?) \| (.+) \|$", (REPOSITORY / "docs" / "logs.md").read_text(), re.M)
    names = [name.strip("`") for name, *_ in rows]
    assert len(set(names)) == len(names)
    return {
        name: Event(level, frozenset(re.findall(r"`(\w+)`", fields)))
        for name, (_, level, fields, _) in zip(names, rows, strict=True)
    }


def test_documented_events_are_those_in_the_code() -> None:
    code = events_in_code()
    assert len(code) > 20
    assert events_in_documentation() == code


def test_event_names_are_dotted_words() -> None:
    assert [name for name in events_in_code() if not re.fullmatch(r"[a-z]+\.[a-z_]+", name)] == []


def test_every_event_is_logged_by_something() -> None:
    used = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "telemetry.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("telemetry")
    }
    unused = [name for name, method in methods().items() if not name.startswith("_") and name not in used]
    assert unused == []


def test_only_telemetry_logs() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("telemetry.py", "logs.py"):
            assert "structlog" not in path.read_text(), path


# -- what a line looks like

PROGRAM = """
import logging, sys
from outbox_relay import logs
from outbox_relay.telemetry import Telemetry
logs.configure("info", sys.argv[1])
telemetry = Telemetry(relay="r1")
telemetry.starting("0.1.0", 100, 2)
telemetry.claimed([])
logging.getLogger("somebody.else").warning("a stranger says %s", "hello")
logging.getLogger("aiokafka.conn").debug("password")
logging.getLogger("asyncio").debug("password")
try:
    raise TypeError("of no use")
except TypeError as error:
    telemetry.failed(error)
"""


def on_a_pipe(format_: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, format_], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stderr == ""
    return done.stdout


def on_a_terminal(format_: str) -> str:
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, format_], stdout=theirs, stderr=theirs)
        os.close(theirs)
        said = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            said += chunk
        assert process.wait(30) == 0
    finally:
        os.close(ours)
    return said.decode()


def on_a_pipe_as_json(format_: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in on_a_pipe(format_).splitlines()]


@pytest.mark.parametrize("format_", ["auto", "json"])
def test_lines_on_a_pipe_are_json_objects(format_: str) -> None:
    starting, stranger, failed = on_a_pipe_as_json(format_)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", str(starting.pop("timestamp")))
    assert starting == {
        "event": "relay.starting",
        "level": "info",
        "logger": "outbox_relay",
        "relay": "r1",
        "version": "0.1.0",
        "batch_rows": 100,
        "claims_in_flight": 2,
    }
    assert stranger["event"] == "a stranger says hello"
    assert (stranger["level"], stranger["logger"]) == ("warning", "somebody.else")
    assert (failed["event"], failed["level"], failed["error"]) == ("relay.failed", "error", "TypeError")
    assert str(failed["exception"]).endswith("TypeError: of no use")


def test_lines_on_a_terminal_are_text() -> None:
    said = on_a_terminal("auto")
    assert "relay.starting" in said
    assert "a stranger says hello" in said
    assert "TypeError: of no use" in said
    assert '{"' not in said
    assert "\x1b[" in said, "in colour"


def test_a_terminal_gets_json_where_that_is_asked_for() -> None:
    assert json.loads(on_a_terminal("json").splitlines()[0])["event"] == "relay.starting"


def test_text_on_a_pipe_has_no_colours() -> None:
    said = on_a_pipe("console")
    assert "relay.starting" in said
    assert "\x1b[" not in said


def test_other_libraries_are_held_above_debug_whatever_the_level() -> None:
    program = PROGRAM.replace('"info"', '"debug"')
    done = subprocess.run(
        [sys.executable, "-c", program, "json"], capture_output=True, text=True, check=True, timeout=30
    )
    assert "claim.made" in done.stdout
    assert "password" not in done.stdout
