"""Debezium and Kafka Connect, as one directory of jars from Maven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from outbox_relay.servers.maven import Artifacts

VERSION = "3.6.3.Final"
#: What this Debezium is built with (version.kafka of its parent pom); on 4.4 it lacks a class.
CONNECT_VERSION = "4.3.0"

_EXPECTED = frozenset(
    {f"debezium-connector-postgres-{VERSION}.jar", f"connect-runtime-{CONNECT_VERSION}.jar", "slf4j-simple-1.7.36.jar"}
)
_FEWEST_JARS = 55


def jars(progress: Callable[[str], None]) -> Path:
    """The directory of the jars in the cache, downloaded on first use; ``progress`` is told of that.

    Raises :class:`ServerError`, ``MavenUnreachableError`` among them.
    """
    return Artifacts(
        title=f"Debezium {VERSION} and Kafka Connect {CONNECT_VERSION}",
        directory=f"debezium-{VERSION}-connect-{CONNECT_VERSION}",
        megabytes=40,
        coordinates=(
            ("io.debezium", "debezium-connector-postgres", VERSION),
            ("org.apache.kafka", "connect-runtime", CONNECT_VERSION),
            # The plainest of loggers, as for the broker.
            ("org.slf4j", "slf4j-simple", "1.7.36"),
        ),
        is_complete=_is_complete,
    ).kept(progress)


def _is_complete(directory: Path) -> bool:
    names = {jar.name for jar in directory.glob("*.jar")}
    return names >= _EXPECTED and len(names) >= _FEWEST_JARS
