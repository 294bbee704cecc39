"""The process between a local server and whoever started it, so that neither outlives the other.

Its parent holds the only write end of its standard input. When that closes, or the parent is gone, the guard stops
the server and all its descendants, deletes the data and exits. It has a session of its own, so a Ctrl-C in the
terminal reaches the parent alone, and the kernel ends the server should the guard itself be killed.

Run by path with ``NAME DIRECTORY UID GID END_SIGNAL`` (uid and gid -1: no change of user); imports nothing but the
standard library. Requests come as JSON objects, one a line, ``{"n": 1, "do": ...}``, and each has one answer,
``{"n": 1, "answer": ...}`` or ``{"n": 1, "error": "..."}``. The answer to request 0, which is not asked, is the new
directory's path.

- ``start`` (``command``, ``environment``): the server's pid
- ``wait`` (``seconds``): its exit code, or null when it runs on
- ``stop`` (``signal``): its exit code, by SIGKILL if it doesn't end by itself
- ``pause``, ``resume``: null; SIGSTOP and SIGCONT, answered when they have taken effect
- ``end``: null; as if the input had been closed
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STOP_SECONDS = 20.0
_END_SECONDS = 10.0
_PARENT_CHECK_SECONDS = 0.5
_EXIT_CHECK_SECONDS = 0.01
_DELETE_ATTEMPTS = 3

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class _ParentGone(Exception):
    pass


class _Guard:
    def __init__(self, directory: Path, user: tuple[int, int] | None, end_signal: signal.Signals) -> None:
        self._directory = directory
        self._user = user
        self._end_signal = end_signal
        self._server: subprocess.Popen[bytes] | None = None
        self._parent = os.getppid()
        self._input = b""

    def serve(self) -> None:
        self._answer(0, answer=str(self._directory))
        for request in self._requests():
            number, do = request.pop("n"), request.pop("do")
            if do == "end":
                return
            try:
                self._answer(number, answer=getattr(self, f"do_{do}")(**request))
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                self._answer(number, error=str(error))

    def do_start(self, command: list[str], environment: dict[str, str] | None) -> int:
        if self._running():
            raise ValueError("the server runs already")
        guard = os.getpid()

        def before_exec() -> None:
            # After the change of user, which would clear it.
            _libc.prctl(_PR_SET_PDEATHSIG, self._end_signal)
            if os.getppid() != guard:
                os._exit(1)

        uid, gid = self._user or (None, None)
        with (self._directory / "server.log").open("ab") as log:
            self._server = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=environment,
                start_new_session=True,
                user=uid,
                group=gid,
                extra_groups=None if uid is None else [],
                preexec_fn=before_exec,
            )
        return self._server.pid

    def do_wait(self, seconds: float) -> int | None:
        if self._server is None:
            raise ValueError("the server was never started")
        deadline = time.monotonic() + seconds
        while (code := self._server.poll()) is None and (left := deadline - time.monotonic()) > 0:
            self._listen(min(left, _EXIT_CHECK_SECONDS))
        return code

    def do_stop(self, signal: int) -> int | None:
        if self._server is None:
            raise ValueError("the server was never started")
        self._signal(signal)
        self.do_wait(_STOP_SECONDS)
        return self._kill()

    def do_pause(self) -> None:
        if self._server is not None and self._running():
            self._server.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._server.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def do_resume(self) -> None:
        if self._server is not None and self._running():
            self._server.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Stop what runs, in good order if that is quick, and delete the data."""
        try:
            if self._server is not None:
                self._signal(self._end_signal)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._server.wait(_END_SECONDS)
                self._kill()
        finally:
            for _ in range(_DELETE_ATTEMPTS):
                shutil.rmtree(self._directory, ignore_errors=True)
                if not self._directory.exists():
                    break

    def _running(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def _signal(self, number: int) -> None:
        assert self._server is not None
        self._server.send_signal(number)
        # A paused process hears nothing else.
        self._server.send_signal(signal.SIGCONT)

    def _kill(self) -> int:
        """Kill what is left of the server; the exit code of its first process."""
        assert self._server is not None
        self._server.kill()
        code = self._server.wait()
        # What lost its parent has become our child.
        while orphans := _children(os.getpid()):
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        return code

    def _requests(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\n" not in self._input:
                self._listen(_PARENT_CHECK_SECONDS)
            line, self._input = self._input.split(b"\n", 1)
            yield json.loads(line)

    def _listen(self, seconds: float) -> None:
        """Wait for input; raises _ParentGone at its end.

        A process that the parent forked may hold the pipe open, hence the look at the parent itself.
        """
        if select.select([0], [], [], seconds)[0]:
            received = os.read(0, 65536)
            if not received:
                raise _ParentGone
            self._input += received
        if os.getppid() != self._parent:
            raise _ParentGone

    def _answer(self, number: int, **answer: object) -> None:
        try:
            os.write(1, json.dumps({"n": number, **answer}).encode() + b"\n")
        except BrokenPipeError as error:
            raise _ParentGone from error


def _children(parent: int) -> list[int]:
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        # Processes end while they are looked at.
        with contextlib.suppress(OSError):
            # pid (name) state ppid ..., and a name may hold anything, parentheses too
            stat = Path("/proc", pid, "stat").read_text(errors="replace")
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(pid))
    return found


def main(name: str, parent_directory: str, uid: int, gid: int, end_signal: int) -> None:
    # Handlers, not SIG_IGN, which the server would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGHUP, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    directory = Path(tempfile.mkdtemp(prefix=f"outbox-relay-{name}-", dir=parent_directory))
    guard = _Guard(directory, None if uid < 0 else (uid, gid), signal.Signals(end_signal))
    try:
        if uid >= 0:
            os.chown(directory, uid, gid)
        with contextlib.suppress(_ParentGone):
            guard.serve()
    finally:
        signal.signal(signal.SIGTERM, lambda *_: None)
        guard.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
