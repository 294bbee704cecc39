"""A real PgBouncer: the one that is installed, else Debian's package, unpacked into the cache where there is apt."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox_relay.servers import free_port
from outbox_relay.servers.cache import cache_directory
from outbox_relay.servers.guarded import Guarded
from outbox_relay.servers.postgres import _parent_directory, _unprivileged_user

_DOWNLOAD_SECONDS = 60.0
_PACKAGES = ("pgbouncer", "libc-ares2")


@contextlib.contextmanager
def pgbouncer(pool_mode: str, server_port: int, user: str) -> Iterator[int]:
    """Its port; ``user`` may come without a password. Skips the test where PgBouncer isn't to be had."""
    program, libraries = _installed()
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True, env={"LD_LIBRARY_PATH": libraries}
    ).stdout
    # It refuses to be root.
    unprivileged = _unprivileged_user()
    guarded = Guarded("pgbouncer", user=unprivileged, parent_directory=_parent_directory(unprivileged))
    try:
        copied = Path(shutil.copy(program, guarded.directory))
        for library in Path(libraries).glob("*.so*"):
            shutil.copy(library, guarded.directory)
        port = free_port()
        (guarded.directory / "users.txt").write_text(f'"{user}" ""\n')
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(port),
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": str(guarded.directory / "users.txt"),
            "pool_mode": pool_mode,
        }
        match = re.search(r"(\d+)\.(\d+)", version)
        if match and (int(match[1]), int(match[2])) >= (1, 21):
            settings["max_prepared_statements"] = "0"
        ini = guarded.directory / "pgbouncer.ini"
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        ini.write_text(f"[databases]\n* = host=127.0.0.1 port={server_port}\n[pgbouncer]\n{lines}")
        for path in guarded.directory.iterdir():
            if unprivileged is not None:
                os.chown(path, *unprivileged)
        guarded.start([copied, ini], {"LD_LIBRARY_PATH": str(guarded.directory)})
        while "process up" not in guarded.output():
            assert guarded.wait(0.02) is None, guarded.tail()
        yield port
        guarded.stop(signal.SIGKILL)
    finally:
        guarded.close()


def _installed() -> tuple[Path, str]:
    """The program, and the directory of libraries that came with it."""
    if found := shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return Path(found), ""
    unpacked = cache_directory() / "pgbouncer"
    if not unpacked.exists():
        if not all(map(shutil.which, ("apt-get", "dpkg"))):
            pytest.skip("PgBouncer isn't installed, and there is no apt to get it with")
        with tempfile.TemporaryDirectory(dir=cache_directory()) as temporary:
            for command in (["apt-get", "download", *_PACKAGES], ["sh", "-c", "for p in *.deb; do dpkg -x $p x; done"]):
                done = subprocess.run(
                    command, cwd=temporary, capture_output=True, text=True, check=False, timeout=_DOWNLOAD_SECONDS
                )
                if done.returncode:
                    pytest.skip(f"PgBouncer isn't installed, and could not be downloaded: {done.stderr[-200:]}")
            with contextlib.suppress(OSError):  # another process was first
                (Path(temporary) / "x").rename(unpacked)
    library = next(unpacked.rglob("libcares.so.2"))
    return next(unpacked.rglob("sbin/pgbouncer")), str(library.parent)
