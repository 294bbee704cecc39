"""Where servers are: PostgreSQL urls, ``host:port``, and whether that is this machine.

What is said of a mistake never holds the url, which may have a password in it.
"""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from outbox_relay.errors import ConfigError

# 1 to 65535.
_PORT = r"(:(?:[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5]))?"
_HOST_AND_PORT = re.compile(rf"(\[[0-9A-Fa-f:.%]+\]|[^\s:/@,\[\]]+){_PORT}")
_LOCAL_NAMES = ("localhost", "localhost.localdomain")


def _url_parts(url: str, expected: str) -> SplitResult:
    """The parts of a PostgreSQL url; ValueError with what was expected.

    Checked here, since what asyncpg says of a url that it can't read may hold a part of the password.
    """
    problem = ValueError(expected)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise problem from None
    before, at, after = parts.netloc.partition("@")
    # Several hosts are tried in turn. None at all, or one that is a path, is a Unix socket.
    hosts = [host for host in (after if at else before).split(",") if host and not host.startswith("%2F")]
    sound = (
        all(_HOST_AND_PORT.fullmatch(host) for host in hosts) and "@" not in parts.path + parts.query + parts.fragment
    )
    if parts.scheme not in ("postgresql", "postgres") or not sound or not url.isprintable():
        raise problem
    return parts


def postgresql_url(url: str) -> str:
    """The url of a configuration file, without a password and what has a key of its own. Raises ValueError."""
    parts = _url_parts(
        url, "must be postgresql://user@host:port/database, with any of / ? # @ : % in the user percent-encoded"
    )
    before, at, _ = parts.netloc.partition("@")
    for key in parse_qs(parts.query, keep_blank_values=True):
        if advice := _ELSEWHERE.get("ssl" if key.startswith("ssl") else key):
            raise ValueError(f"{key} has no place in the url: {advice}")
    if at and ":" in before and not all(map(is_local, url_hosts(url))):
        raise ValueError('holds a password: take it out, and set password = { env = "NAME" } or { file = "/path" }')
    return url


def checked_url(url: str) -> str:
    """The url of a command line or the environment, where it may hold a password. Raises ConfigError."""
    expected = (
        "the database's url must be postgresql://user:password@host:port/database,"
        " with any of / ? # @ : % in the user or password percent-encoded"
    )
    try:
        _url_parts(url, expected)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    return url


#: What a url may not say, since it is said elsewhere.
_ELSEWHERE = {
    "ssl": "set tls and the tls_… keys instead",
    "password": 'set password = { env = "NAME" } or { file = "/path" } instead',
    "passfile": 'set password = { file = "/path" } instead',
    "service": "name the host, the user and the database",
    "target_session_attrs": "of several hosts the relay takes one that can be written to, whatever is set",
}


def url_hosts(url: str) -> list[str]:
    """The hosts of a PostgreSQL url, without ports; a Unix socket is a path, or nothing at all."""
    parts = urlsplit(url)
    named = parts.netloc.rpartition("@")[2] or ",".join(parse_qs(parts.query).get("host", []))
    named = unquote(named) or os.environ.get("PGHOST", "")
    return [host_of(address) for address in named.split(",") if address]


def host_of(address: str) -> str:
    """``host:port`` without the port, and an IPv6 address without its brackets."""
    if address.startswith("/"):
        return address
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0]


def is_local(host: str) -> bool:
    """Whether what is sent there stays on this machine."""
    if host.startswith("/") or host.lower() in _LOCAL_NAMES:
        return True
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def host_and_port(address: str) -> str:
    """Raises ValueError."""
    if not _HOST_AND_PORT.fullmatch(address):
        raise ValueError("must be host:port")
    return address
