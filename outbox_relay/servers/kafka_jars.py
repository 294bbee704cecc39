"""Apache Kafka's jars, from their Maven coordinates."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path

from outbox_relay.errors import ServerError
from outbox_relay.servers.cache import cache_directory
from outbox_relay.servers.guarded import Guarded

VERSION = "4.4.0"
#: Kafka, and the plainest of loggers: without one it says nothing, not even why it does not start.
_COORDINATES = (("org.apache.kafka", "kafka_2.13", VERSION), ("org.slf4j", "slf4j-simple", "1.7.36"))
_EXPECTED = (f"kafka_2.13-{VERSION}.jar", f"kafka-clients-{VERSION}.jar", "slf4j-simple-1.7.36.jar")
_FEWEST_JARS = 30
_MEGABYTES = 45

_DOWNLOAD_SECONDS = 600.0
_STALLED_SECONDS = 30.0
_LONGEST_REASON = 100

_COPY_DEPENDENCIES = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"


class MavenUnreachableError(ServerError):
    """Kafka's jars are not in the cache and could not be downloaded."""


def kafka_jars(progress: Callable[[str], None]) -> Path:
    """The directory of Kafka's jars in the cache, downloaded on first use; ``progress`` is told of that.

    Several processes may ask at once. Raises :class:`ServerError`, :class:`MavenUnreachableError` among them.
    """
    cache = cache_directory()
    jars = cache / f"kafka-{VERSION}"
    if _is_complete(jars):
        return jars
    ways = {"mvn": _by_maven, "jgo": _by_jgo}
    if shutil.which("mvn") is None:
        del ways["mvn"]
    if util.find_spec("jgo") is None:
        del ways["jgo"]
    if not ways:
        raise ServerError("Apache Kafka needs mvn or jgo to be downloaded: pip install 'outbox-relay[demo]'")
    failures = []
    for name, download in ways.items():
        progress(f"downloading Apache Kafka {VERSION} with {name} (about {_MEGABYTES} MB, only this once)")
        # The download ends with this process too, and leaves nothing.
        with contextlib.closing(Guarded("download", parent_directory=cache)) as guarded:
            try:
                downloaded = download(guarded)
            except _DownloadError as error:
                failures.append(f"{name}: {error}")
                continue
            if not _is_complete(downloaded):
                failures.append(f"{name}: jars are missing from what it downloaded")
                continue
            return _put_in_place(downloaded, jars)
    raise MavenUnreachableError(f"Apache Kafka {VERSION} could not be downloaded ({'; '.join(failures)})")


class _DownloadError(Exception):
    pass


def _by_maven(guarded: Guarded) -> Path:
    dependencies = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version></dependency>"
        for group, artifact, version in _COORDINATES
    )
    pom = guarded.directory / "pom.xml"
    pom.write_text(
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
        "<groupId>local</groupId><artifactId>kafka</artifactId><version>1</version>"
        f"<dependencies>{dependencies}</dependencies></project>"
    )
    jars = guarded.directory / "jars"
    _run(
        guarded,
        # Not in batch mode, where it says nothing while a file is coming.
        [
            "mvn",
            "-Dstyle.color=never",
            "-f",
            str(pom),
            _COPY_DEPENDENCIES,
            "-DincludeScope=runtime",
            f"-DoutputDirectory={jars}",
        ],
    )
    return jars


def _by_jgo(guarded: Guarded) -> Path:
    endpoint = "+".join(":".join(coordinate) for coordinate in _COORDINATES)
    jgo = [
        *(sys.executable, "-m", "jgo", "--resolver", "python", "--system-java", "--color", "plain"),
        *("--cache-dir", str(guarded.directory / "cache"), "--repo-cache", str(guarded.directory / "repository")),
    ]
    _run(guarded, [*jgo, "init", endpoint])
    _run(guarded, [*jgo, "sync"])
    jars = guarded.directory / "jars"
    jars.mkdir()
    for jar in (guarded.directory / "repository").rglob("*.jar"):
        jar.rename(jars / jar.name)
    return jars


def _run(guarded: Guarded, command: list[str]) -> None:
    """Run a download until it ends, or nothing has come for a while. Raises _DownloadError."""
    guarded.start(command, None)
    started = moved = time.monotonic()
    size = 0
    while (code := guarded.wait(1.0)) is None:
        now = time.monotonic()
        if (grown := sum(_sizes(guarded.directory))) != size:
            size, moved = grown, now
        if now - moved > _STALLED_SECONDS:
            raise _DownloadError(f"nothing came for {_STALLED_SECONDS:g} s")
        if now - started > _DOWNLOAD_SECONDS:
            raise _DownloadError(f"not done within {_DOWNLOAD_SECONDS:g} s")
    if code:
        lines = [line for line in guarded.output().splitlines() if line.strip()] or [f"exit code {code}"]
        # Maven's first error is the cause, and Python's last line.
        errors = [line.removeprefix("[ERROR]") for line in lines if line.startswith("[ERROR]")] or lines[-1:]
        raise _DownloadError(textwrap.shorten(errors[0], _LONGEST_REASON, placeholder=" …"))


def _sizes(directory: Path) -> Iterator[int]:
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            yield path.stat().st_size


def _put_in_place(downloaded: Path, jars: Path) -> Path:
    for _ in range(2):
        try:
            return downloaded.rename(jars)
        except OSError:
            if _is_complete(jars):  # another process was first
                return jars
            shutil.rmtree(jars, ignore_errors=True)
    raise ServerError(f"{jars} could not be written: delete it, or set OUTBOX_RELAY_CACHE to another directory")


def _is_complete(jars: Path) -> bool:
    names = {jar.name for jar in jars.glob("*.jar")}
    return names.issuperset(_EXPECTED) and len(names) >= _FEWEST_JARS
