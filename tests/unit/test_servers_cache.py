from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from outbox_relay.errors import ServerError
from outbox_relay.servers.cache import cache_directory


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUTBOX_RELAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def test_the_cache_is_below_the_home_directory(tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "home" / ".cache" / "outbox-relay"
    assert cache_directory().is_dir()


def test_xdg_cache_home_goes_before_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "outbox-relay"


def test_a_directory_of_ones_own_goes_before_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("OUTBOX_RELAY_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


@pytest.fixture
def unusable_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))


@pytest.mark.usefixtures("unusable_home")
def test_where_that_cannot_be_written_the_cache_is_a_temporary_directory_of_this_users(tmp_path: Path) -> None:
    directory = cache_directory()
    assert directory == tmp_path / "temporary" / f"outbox-relay-cache-{os.geteuid()}"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert cache_directory() == directory


@pytest.mark.usefixtures("unusable_home")
def test_a_temporary_cache_that_others_could_fill_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "temporary" / f"outbox-relay-cache-{os.geteuid()}"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(ServerError, match="OUTBOX_RELAY_CACHE"):
        cache_directory()


@pytest.mark.usefixtures("unusable_home")
def test_a_link_in_place_of_the_temporary_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "temporary" / f"outbox-relay-cache-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ServerError, match="OUTBOX_RELAY_CACHE"):
        cache_directory()
