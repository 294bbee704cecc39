"""Downloads of what is only to be had by Maven coordinates, kept in the cache."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TypeAlias

from outbox_relay.errors import ServerError
from outbox_relay.servers.cache import cache_directory
from outbox_relay.servers.guarded import Guarded

_DOWNLOAD_SECONDS = 600.0
_STALLED_SECONDS = 30.0
_LONGEST_REASON = 100

#: (group, artifact, version) of each.
Coordinates: TypeAlias = tuple[tuple[str, str, str], ...]

_COPY_DEPENDENCIES = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"


class MavenUnreachableError(ServerError):
    """What a server needs is not in the cache and could not be downloaded."""


@dataclass(frozen=True)
class Artifacts:
    """Jars with all that they depend on, and the directory that is made of them.

    ``unpack`` makes in the second directory what is to be kept of the
    jars in the first; without it the jars themselves are kept. ``is_complete`` says of a directory whether all of it
    is there.
    """

    title: str
    directory: str
    megabytes: int
    coordinates: Coordinates
    is_complete: Callable[[Path], bool]
    unpack: Callable[[Path, Path], None] | None = None

    def kept(self, progress: Callable[[str], None]) -> Path:
        """The directory in the cache, downloaded on first use; ``progress`` is told of that.

        Several processes may ask at once. Raises :class:`ServerError`, :class:`MavenUnreachableError` among them.
        """
        cache = cache_directory()
        kept = cache / self.directory
        if self.is_complete(kept):
            return kept
        failures = []
        for name, download in self._ways().items():
            progress(f"downloading {self.title} with {name} (about {self.megabytes} MB, only this once)")
            # The download ends with this process too, and leaves nothing.
            with contextlib.closing(Guarded("download", parent_directory=cache)) as guarded:
                try:
                    downloaded = download(guarded, self.coordinates)
                    if self.unpack is not None:
                        jars, downloaded = downloaded, guarded.directory / "unpacked"
                        self.unpack(jars, downloaded)
                except _DownloadError as error:
                    failures.append(f"{name}: {error}")
                    continue
                if not self.is_complete(downloaded):
                    failures.append(f"{name}: files are missing from what it downloaded")
                    continue
                return self._put_in_place(downloaded, kept)
        raise MavenUnreachableError(f"{self.title} could not be downloaded ({'; '.join(failures)})")

    def _ways(self) -> dict[str, Callable[[Guarded, Coordinates], Path]]:
        ways: dict[str, Callable[[Guarded, Coordinates], Path]] = {"mvn": _by_maven, "jgo": _by_jgo}
        if shutil.which("mvn") is None:
            del ways["mvn"]
        if util.find_spec("jgo") is None:
            del ways["jgo"]
        if not ways:
            raise ServerError(f"{self.title} needs mvn or jgo to be downloaded: pip install 'outbox-relay[demo]'")
        return ways

    def _put_in_place(self, downloaded: Path, kept: Path) -> Path:
        for _ in range(2):
            try:
                return downloaded.rename(kept)
            except OSError:
                if self.is_complete(kept):  # another process was first
                    return kept
                shutil.rmtree(kept, ignore_errors=True)
        raise ServerError(f"{kept} could not be written: delete it, or set OUTBOX_RELAY_CACHE to another directory")


class _DownloadError(Exception):
    pass


def _by_maven(guarded: Guarded, coordinates: Coordinates) -> Path:
    dependencies = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version></dependency>"
        for group, artifact, version in coordinates
    )
    pom = guarded.directory / "pom.xml"
    pom.write_text(
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
        "<groupId>local</groupId><artifactId>servers</artifactId><version>1</version>"
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


def _by_jgo(guarded: Guarded, coordinates: Coordinates) -> Path:
    endpoint = "+".join(":".join(coordinate) for coordinate in coordinates)
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
