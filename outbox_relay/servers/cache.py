"""Where downloads are kept between runs."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from outbox_relay.errors import ServerError


def cache_directory() -> Path:
    """``$OUTBOX_RELAY_CACHE``, else ``$XDG_CACHE_HOME/outbox-relay``, else ``~/.cache/outbox-relay``.

    Where that can't be written, a directory of this user's among the temporary files. It exists on return.
    Raises :class:`ServerError`.
    """
    try:
        if chosen := os.environ.get("OUTBOX_RELAY_CACHE"):
            directory = Path(chosen).absolute()
        else:
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "outbox-relay"
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    except (OSError, RuntimeError):  # not ours to write, or no home at all
        pass
    directory = Path(tempfile.gettempdir()) / f"outbox-relay-cache-{os.geteuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    # Anybody could have made it first: what lies there is run.
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ServerError(f"{directory} belongs to somebody else: set OUTBOX_RELAY_CACHE to a directory of yours")
    return directory
