"""A server process under guard, as the process that started it sees it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outbox_relay.errors import ServerError

_GUARD = Path(__file__).with_name("guard.py")
_CLOSE_SECONDS = 60.0
_TAIL_LINES = 15


class Guarded:
    """A directory and, one after the other, processes in it; all of it ends with this process, however that ends.

    ``end_signal`` is how the process is stopped when its data is no longer wanted. ``user`` is the (uid, gid) that
    owns the directory and runs the processes. Every method blocks, and may be called from any thread.
    """

    def __init__(
        self,
        name: str,
        *,
        end_signal: signal.Signals = signal.SIGKILL,
        user: tuple[int, int] | None = None,
        parent_directory: Path | None = None,
    ) -> None:
        uid, gid = user or (-1, -1)
        where = str(parent_directory or tempfile.gettempdir())
        self._guard = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", str(_GUARD), name, where, str(uid), str(gid), str(end_signal.value)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            text=True,
            start_new_session=True,
        )
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        self._requests, self._answers = self._guard.stdin, self._guard.stdout
        self._number = 0
        self._lock = threading.Lock()
        self._log_from = 0
        self.pid = 0  #: of the last process that was started
        try:
            self.directory = Path(self._answer_to(0))
        except BaseException as error:
            self.close()
            if isinstance(error, ServerError):
                whose = f" for user {uid}" if user else ""
                raise ServerError(f"no directory{whose} could be made in {where}") from error
            raise
        self.log = self.directory / "server.log"

    def run(self, command: Sequence[str | Path], environment: Mapping[str, str] | None, seconds: float) -> None:
        """Run a command to its end; raises :class:`ServerError` when it fails or takes longer than ``seconds``."""
        self.start(command, environment)
        code = self.wait(seconds)
        if code is None:
            self.stop(signal.SIGKILL)
            raise ServerError(f"{Path(command[0]).name} did not end within {seconds:g} s:\n{self.tail()}")
        if code:
            raise ServerError(f"{Path(command[0]).name} failed with exit code {code}:\n{self.tail()}")

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str] | None) -> None:
        """Start a process; without an environment it has this process's."""
        with contextlib.suppress(FileNotFoundError):
            self._log_from = self.log.stat().st_size
        self.pid = self._ask(
            "start",
            command=[str(part) for part in command],
            environment=None if environment is None else dict(environment),
        )

    def wait(self, seconds: float) -> int | None:
        """The process's exit code, or None when it still runs after so many seconds."""
        code: int | None = self._ask("wait", seconds=seconds)
        return code

    def stop(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end, insisting with SIGKILL; then kill what the process has started.

        The process's exit code, the negative of the signal that ended it.
        """
        code: int = self._ask("stop", signal=number.value)
        return code

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._ask("pause")

    def resume(self) -> None:
        """SIGCONT."""
        self._ask("resume")

    @property
    def log_from(self) -> int:
        """Where in ``log`` the output of the process that was started last begins, in bytes."""
        return self._log_from

    def output(self) -> str:
        """What the process that was started last has written."""
        try:
            return self.log.read_bytes()[self._log_from :].decode(errors="replace")
        except FileNotFoundError:
            return ""

    def tail(self) -> str:
        """The last lines of it."""
        return "\n".join(self.output().splitlines()[-_TAIL_LINES:])

    def close(self) -> None:
        """End the process and the guard, and delete the directory. Idempotent."""
        with self._lock:
            if not self._requests.closed:
                with contextlib.suppress(BrokenPipeError):
                    self._requests.write('{"n": -1, "do": "end"}\n')
                    self._requests.flush()
                with contextlib.suppress(BrokenPipeError):
                    self._requests.close()
            self._guard.wait(_CLOSE_SECONDS)
            self._answers.close()

    def _ask(self, do: str, **arguments: object) -> Any:
        with self._lock:
            if self._requests.closed:
                raise ServerError("the local server was closed")
            self._number += 1
            request = json.dumps({"n": self._number, "do": do, **arguments})
            try:
                self._requests.write(request + "\n")
                self._requests.flush()
            except BrokenPipeError as error:
                raise ServerError("the guard of a local server has been killed") from error
            return self._answer_to(self._number)

    def _answer_to(self, number: int) -> Any:
        for line in self._answers:
            answer = json.loads(line)
            # The answers to requests that were interrupted here are still to come.
            if answer["n"] == number:
                if "error" in answer:
                    raise ServerError(f"a local server could not be managed: {answer['error']}")
                return answer["answer"]
        raise ServerError("the guard of a local server has been killed")
