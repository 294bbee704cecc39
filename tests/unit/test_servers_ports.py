from __future__ import annotations

import socket
from pathlib import Path

from outbox_relay.servers.ports import free_port


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as listener:
        # As servers do: a closed connection's remains don't make the port a taken one.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()


def test_a_free_port_is_never_one_that_a_client_could_come_to_hold() -> None:
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not [port for port in (free_port() for _ in range(1000)) if lowest <= port <= highest]
