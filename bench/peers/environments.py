"""Virtual environments for relays from PyPI, each with one of its own, so that nothing of them is in the project's."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from pathlib import Path

from outbox_relay.errors import ServerError
from outbox_relay.servers.cache import cache_directory
from outbox_relay.servers.guarded import Guarded

_PEERS = Path(__file__).parent
_VENV_SECONDS = 120.0
_INSTALL_SECONDS = 600.0
_PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r")


def interpreter(peer: str) -> Path:
    """The Python of the environment with what ``bench/peers/<peer>/requirements.txt`` pins, made on first use.

    Blocks. Raises :class:`ServerError`.
    """
    requirements = _PEERS / peer / "requirements.txt"
    # Of this Python too, whose minor version the environment's packages are built for.
    version = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    kept = cache_directory() / f"peer-{peer}-{version}"
    python = kept / "bin" / "python"
    if python.exists():
        return python
    with contextlib.closing(Guarded(f"install-{peer}", parent_directory=cache_directory())) as guarded:
        made = guarded.directory / "venv"
        guarded.run([sys.executable, "-m", "venv", made], None, _VENV_SECONDS)
        guarded.run([made / "bin" / "python", *_PIP, requirements], None, _INSTALL_SECONDS)
        try:
            made.rename(kept)
        except OSError as error:
            if not python.exists():  # else another process was first
                shutil.rmtree(kept, ignore_errors=True)
                raise ServerError(f"{kept} could not be written: delete it, and try again") from error
    return python


def program(peer: str) -> Path:
    """What is run with it: not a module of this package for the relay, whose Python knows nothing of it."""
    return _PEERS / peer / "program.py"
