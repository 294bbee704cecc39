"""The configuration: one frozen, strict type for each TOML table. ``config.example.toml`` shows every default.

No text becomes a number, and the other way round. No message about a mistake holds a value of the file, for that may
be a password.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from outbox_relay.errors import ConfigError

# PostgreSQL counts in whole milliseconds, and takes 0 for no timeout at all.
Seconds = Annotated[float, Field(ge=0.001, le=86_400, allow_inf_nan=False)]

_PORT = r"(:[0-9]{1,5})?"
_HOST_AND_PORT = re.compile(rf"(\[[0-9A-Fa-f:.%]+\]|[^\s:/@,\[\]]+){_PORT}")


def _at_least(lower: str, times: int = 1) -> AfterValidator:
    """Not below the field ``lower``, which stands before it in the same table."""

    def check(value: float, info: ValidationInfo) -> float:
        lowest = info.data.get(lower)  # missing when it is itself at fault
        if lowest is not None and value < times * lowest:
            multiple = f"{times} times " if times > 1 else ""
            raise ValueError(f"{value:g} must not be below {multiple}{lower} ({lowest:g})")
        return value

    return AfterValidator(check)


def _postgresql_url(url: str) -> str:
    # Checked here, since what asyncpg says of a url that it can't read may hold a part of the password.
    problem = ValueError(
        "must be postgresql://user:password@host:port/database,"
        " with any of / ? # @ : % in the user or password percent-encoded"
    )
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
    if parts.scheme not in ("postgresql", "postgres") or not sound:
        raise problem
    return url


def _host_and_port(address: str) -> str:
    if not _HOST_AND_PORT.fullmatch(address):
        raise ValueError("must be host:port")
    return address


def _installed(compression: str) -> str:
    if compression not in ("none", "gzip") and util.find_spec("cramjam") is None:
        raise ValueError(f"{compression} needs a package that isn't here: pip install 'outbox-relay[compression]'")
    return compression


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class DatabaseConfig(_Table):
    """``[database]``"""

    url: Annotated[str, AfterValidator(_postgresql_url)]
    connect_timeout_seconds: Seconds = 10.0
    statement_timeout_seconds: Seconds = 30.0


class KafkaConfig(_Table):
    """``[kafka]``"""

    bootstrap_servers: Annotated[list[Annotated[str, AfterValidator(_host_and_port)]], Field(min_length=1)]
    client_id: Annotated[str, Field(min_length=1)] = "outbox-relay"
    compression: Annotated[Literal["none", "gzip", "snappy", "lz4", "zstd"], AfterValidator(_installed)] = "none"
    batch_bytes: Annotated[int, Field(ge=1024, le=100_000_000)] = 524_288
    connect_timeout_seconds: Seconds = 10.0
    request_timeout_seconds: Seconds = 20.0
    publish_warn_seconds: Seconds = 5.0
    publish_deadline_seconds: Annotated[Seconds, _at_least("publish_warn_seconds")] = 60.0


class RelayConfig(_Table):
    """``[relay]``"""

    name: Annotated[str, Field(min_length=1)] = Field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    batch_rows: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    claims_in_flight: Annotated[int, Field(ge=1, le=16)] = 2
    poll_floor_seconds: Seconds = 0.01
    poll_ceiling_seconds: Annotated[Seconds, _at_least("poll_floor_seconds")] = 0.5
    retry_first_seconds: Seconds = 0.5
    retry_ceiling_seconds: Annotated[Seconds, _at_least("retry_first_seconds")] = 30.0
    heartbeat_seconds: Seconds = 1.0
    lease_seconds: Annotated[Seconds, _at_least("heartbeat_seconds", times=3)] = 15.0
    shutdown_grace_seconds: Seconds = 20.0


class LogConfig(_Table):
    """``[log]``"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Config(_Table):
    """A whole configuration file."""

    database: DatabaseConfig
    kafka: KafkaConfig
    relay: RelayConfig = Field(default_factory=RelayConfig)
    log: LogConfig = Field(default_factory=LogConfig)


TABLES: dict[str, type[_Table]] = {
    "database": DatabaseConfig,
    "kafka": KafkaConfig,
    "relay": RelayConfig,
    "log": LogConfig,
}


def load(path: Path) -> Config:
    """Read a configuration file.

    Raises :class:`ConfigError` with one line for each mistake: ``file: table.key: what was expected``.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: must be UTF-8, and byte {error.start} isn't"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: not TOML: {error}"]) from error
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        mistakes = error.errors(include_input=False, include_url=False)
        # From None, for pydantic's own message holds the values.
        raise ConfigError([f"{path}: {line}" for mistake in mistakes for line in _lines(mistake)]) from None


def _lines(mistake: ErrorDetails) -> Iterator[str]:
    """``table.key: what was expected``; more than one for a table that is missing."""
    table, *keys = (str(part) for part in mistake["loc"])
    where = ".".join([table, *keys[:1]]) + "".join(f"[{index}]" for index in keys[1:])
    if mistake["type"] == "missing" and not keys:
        for key, field in TABLES[table].model_fields.items():
            if field.is_required():
                yield f"{table}.{key}: missing, and there is no default"
    elif mistake["type"] == "missing":
        yield f"{where}: missing, and there is no default"
    elif mistake["type"] == "extra_forbidden":
        yield f"{where}: unknown {_advice(table, *keys)}"
    elif mistake["type"] == "model_type":
        yield f"{where}: must be a table, [{table}]"
    else:
        yield f"{where}: {re.sub('^(Value error, |[A-Z][a-z]+ should )', _must, mistake['msg'])}"


def _must(beginning: re.Match[str]) -> str:
    return "must " if beginning[0].endswith("should ") else ""


def _advice(table: str, key: str | None = None) -> str:
    """What may have been meant by an unknown table, or key of a known one."""
    if key is None:
        known, what = list(TABLES), "table or key"
        homes = [name for name, type_ in TABLES.items() if table in type_.model_fields]
    else:
        known, what = list(TABLES[table].model_fields), "key"
        homes = [name for name, type_ in TABLES.items() if key in type_.model_fields]
    if homes:
        return f"{what}; it belongs into [{homes[0]}]"
    nearest = difflib.get_close_matches(key or table, known, n=1)
    return f"{what}; did you mean {nearest[0]}?" if nearest else f"{what}; known are {', '.join(known)}"
