"""Apache Kafka's jars, of one of several versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from outbox_relay.servers.maven import Artifacts
from outbox_relay.servers.versions import KAFKA, USUAL_KAFKA, chosen

_FEWEST_JARS = 30


def kafka_jars(progress: Callable[[str], None], version: str | None = None) -> Path:
    """The directory of the jars in the cache, downloaded on first use; ``progress`` is told of that.

    Without ``version``, as "3.9", it is that of ``KAFKA_VERSION``. Raises :class:`ServerError`,
    ``MavenUnreachableError`` among them.
    """
    full_version = KAFKA[version or chosen("KAFKA_VERSION", KAFKA) or USUAL_KAFKA]
    return _artifacts(full_version).kept(progress)


def _artifacts(version: str) -> Artifacts:
    expected = (f"kafka_2.13-{version}.jar", f"kafka-clients-{version}.jar", "slf4j-simple-1.7.36.jar")

    def is_complete(jars: Path) -> bool:
        names = {jar.name for jar in jars.glob("*.jar")}
        return names.issuperset(expected) and len(names) >= _FEWEST_JARS

    return Artifacts(
        title=f"Apache Kafka {version}",
        directory=f"kafka-{version}",
        megabytes=45,
        # The plainest of loggers too: without one Kafka says nothing, not even why it does not start.
        coordinates=(("org.apache.kafka", "kafka_2.13", version), ("org.slf4j", "slf4j-simple", "1.7.36")),
        is_complete=is_complete,
    )
