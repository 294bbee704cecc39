"""Free ports on loopback."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from outbox_relay.errors import ServerError

_LOWEST = 10_000
_TRIES = 100
_chance = random.SystemRandom()


def free_port() -> int:
    """A port that nobody listens on now, outside the range from which Linux takes the ports of outgoing connections.

    So no client can come to hold the port of a server that is stopped for a while, not even one that tries to
    connect to it. Another process may still be given the same port: who finds it taken asks again.
    """
    try:
        above = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        above = 32_768
    ports = range(_LOWEST, above) if above > _LOWEST + _TRIES else range(_LOWEST, 65_536)
    for _ in range(_TRIES):
        port = _chance.choice(ports)
        with socket.socket() as listener:
            # As servers do: a closed connection's remains don't make the port a taken one.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError("no free port on 127.0.0.1 was found")
