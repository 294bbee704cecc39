"""PostgreSQL on loopback."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import asyncpg

from outbox_relay.errors import ServerError
from outbox_relay.servers.guarded import Guarded
from outbox_relay.servers.ports import free_port
from outbox_relay.servers.postgres_binaries import postgres_binaries

_USER = "postgres"
_INITDB_SECONDS = 60.0
_READY_SECONDS = 60.0
_CLIENT_SECONDS = 30.0
_PORT_TRIES = 5
#: Nothing of the caller's environment: PGOPTIONS and its like would change what the server does.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


class PostgresServer:
    """A server with data of its own, deleted at the end. Every method blocks; any thread may call them.

    It takes connections of any user over TCP on 127.0.0.1, without a password.
    """

    def __init__(self, installed: Path, settings: Mapping[str, str]) -> None:
        self._installed = installed
        self._settings = dict(settings)
        user = _unprivileged_user()
        self._guarded = Guarded(
            "postgres",
            # Immediate shutdown, which leaves no shared memory behind.
            end_signal=signal.SIGQUIT,
            user=user,
            parent_directory=_parent_directory(user),
        )
        self._data = self.directory / "data"
        self.port = free_port()
        try:
            self._binaries = installed / "bin" if user is None or _is_open_to_all(installed) else self._copy(*user)
        except BaseException:
            self.close()
            raise

    @classmethod
    def start(
        cls,
        settings: Mapping[str, str] | None = None,
        progress: Callable[[str], None] = lambda _: None,
        *,
        version: str | None = None,
    ) -> PostgresServer:
        """Make a cluster and start it. ``settings`` are those of postgresql.conf.

        Those of a ``version`` can do TLS; without one it is that of ``POSTGRES_VERSION``, else the wheel's, which
        can't. Raises :class:`ServerError`, ``MavenUnreachableError`` among them.
        """
        server = cls(postgres_binaries(progress, version), {"max_connections": "200", **(settings or {})})
        try:
            server._initdb()
            for _ in range(_PORT_TRIES - 1):
                try:
                    server._launch()
                except _PortTakenError:
                    server.port = free_port()
                else:
                    return server
            server._launch()
        except BaseException:
            server.close()
            raise
        return server

    def start_again(self, settings: Mapping[str, str] | None = None) -> None:
        """Start after :meth:`stop`, on the same data and the same port, with ``settings`` added."""
        self._settings.update(settings or {})
        self._launch()

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop: ``fast`` ends sessions and writes a checkpoint, ``immediate`` is a crash of the server."""
        self._guarded.stop({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/{quote(database, safe='')}"

    def create_database(self, name: str) -> str:
        """Make an empty database; its url. Raises :class:`ServerError`."""
        # Not by createdb, which not every build has. In a thread, for the caller's may have a loop that runs.
        with ThreadPoolExecutor(1) as threads:
            try:
                threads.submit(asyncio.run, self._execute(f"CREATE DATABASE {_quoted(name)}")).result()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                raise ServerError(f"database {name!r} could not be made: {error}") from error
        return self.url(name)

    @property
    def pid(self) -> int:
        """The postmaster's, parent of all the server's processes."""
        return self._guarded.pid

    @property
    def directory(self) -> Path:
        """Where the data and the server's log lie; it is gone after :meth:`close`."""
        return self._guarded.directory

    def close(self) -> None:
        """End the server and delete its data. Idempotent."""
        self._guarded.close()

    def __enter__(self) -> PostgresServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url(), timeout=_CLIENT_SECONDS, command_timeout=_CLIENT_SECONDS)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def _copy(self, uid: int, gid: int) -> Path:
        """The server's programs where its user can read them, for as long as the server is there."""
        package = self.directory / "programs" / self._installed.parent.name
        libraries = f"{package.name}.libs"  # found by their place beside the package
        shutil.copytree(
            self._installed, package / self._installed.name, ignore=shutil.ignore_patterns("include", "*.a")
        )
        if (self._installed.parents[1] / libraries).exists():
            shutil.copytree(self._installed.parents[1] / libraries, package.parent / libraries)
        for path in (package.parent, *package.parent.rglob("*")):
            os.chown(path, uid, gid, follow_symlinks=False)
        return package / self._installed.name / "bin"

    def _initdb(self) -> None:
        options = [f"--pgdata={self._data}", f"--username={_USER}", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        # Without --no-sync it waits for a disk that only a crash of the machine would need.
        self._guarded.run([self._binaries / "initdb", *options, "--no-sync"], _ENVIRONMENT, _INITDB_SECONDS)
        self._defaults = (self._data / "postgresql.conf").read_text()

    def _launch(self) -> None:
        self._write_settings()
        # What a crash left here would, with a pid that was given again, keep the server from starting.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        self._guarded.start([self._binaries / "postgres", "-D", self._data], _ENVIRONMENT)
        deadline = time.monotonic() + _READY_SECONDS
        while not self._is_ready():
            if self._guarded.wait(0.02) is not None:
                problem = f"PostgreSQL ended while starting:\n{self._guarded.tail()}"
                raise _PortTakenError(problem) if "Address already in use" in problem else ServerError(problem)
            if time.monotonic() > deadline:
                self._guarded.stop(signal.SIGQUIT)
                raise ServerError(f"PostgreSQL was not ready within {_READY_SECONDS:g} s:\n{self._guarded.tail()}")

    def _write_settings(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            **self._settings,
        }
        lines = "".join(f"{name} = '{_escaped(value)}'\n" for name, value in settings.items())
        (self._data / "postgresql.conf").write_text(f"{self._defaults}\n{lines}")

    def _is_ready(self) -> bool:
        """Whether the postmaster has noted in its own data directory that it takes sessions."""
        try:
            lines = (self._data / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        # "standby" is a hot standby that takes sessions, which only read.
        return lines[0] == str(self.pid) and len(lines) > 7 and lines[7].strip() in ("ready", "standby")


class _PortTakenError(ServerError):
    pass


def _unprivileged_user() -> tuple[int, int] | None:
    """(uid, gid) to run as where this process is root's, since PostgreSQL refuses to be."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError as error:
        raise ServerError("PostgreSQL refuses to run as root, and here is no user 'nobody' to run it") from error
    return nobody.pw_uid, nobody.pw_gid


def _parent_directory(user: tuple[int, int] | None) -> Path:
    usual = Path(tempfile.gettempdir())
    return usual if user is None or _is_open_to_all(usual) else Path("/tmp")  # noqa: S108


def _is_open_to_all(directory: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (directory, *directory.parents))


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")
