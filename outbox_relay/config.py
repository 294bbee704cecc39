"""The configuration: one frozen, strict type for each TOML table. ``config.example.toml`` shows every default."""

from __future__ import annotations

import os
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from outbox_relay.errors import ConfigError

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Table(BaseModel):
    # strict=True would refuse 5 for 5.0, so numbers are lax; text never becomes a number or the other way round.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DatabaseConfig(_Table):
    """``[database]``"""

    url: str
    connect_timeout_seconds: Seconds = 10.0
    statement_timeout_seconds: Seconds = 30.0


class KafkaConfig(_Table):
    """``[kafka]``"""

    bootstrap_servers: Annotated[list[str], Field(min_length=1)]
    client_id: str = "outbox-relay"
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "none"
    batch_bytes: Annotated[int, Field(ge=1024, le=100_000_000)] = 524_288
    connect_timeout_seconds: Seconds = 10.0
    request_timeout_seconds: Seconds = 20.0
    publish_warn_seconds: Seconds = 5.0
    publish_deadline_seconds: Seconds = 60.0


class RelayConfig(_Table):
    """``[relay]``"""

    name: str = Field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    batch_rows: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    claims_in_flight: Annotated[int, Field(ge=1, le=16)] = 2
    poll_floor_seconds: Seconds = 0.01
    poll_ceiling_seconds: Seconds = 0.5
    retry_first_seconds: Seconds = 0.5
    retry_ceiling_seconds: Seconds = 30.0
    heartbeat_seconds: Seconds = 1.0
    lease_seconds: Seconds = 15.0
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

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Config:
        relay, kafka = self.relay, self.kafka
        for lower, lower_name, upper, upper_name in (
            (relay.poll_floor_seconds, "relay.poll_floor_seconds",
             relay.poll_ceiling_seconds, "relay.poll_ceiling_seconds"),
            (relay.retry_first_seconds, "relay.retry_first_seconds",
             relay.retry_ceiling_seconds, "relay.retry_ceiling_seconds"),
            (kafka.publish_warn_seconds, "kafka.publish_warn_seconds",
             kafka.publish_deadline_seconds, "kafka.publish_deadline_seconds"),
            (3 * relay.heartbeat_seconds, "three times relay.heartbeat_seconds",
             relay.lease_seconds, "relay.lease_seconds"),
        ):  # fmt: skip
            if lower > upper:
                raise ValueError(f"{lower_name} ({lower:g}) must not be above {upper_name} ({upper:g})")
        return self


def load(path: Path) -> Config:
    """Read a configuration file.

    Raises :class:`ConfigError` with one line for each mistake.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not TOML: {error}"]) from error
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            [f"{path}: {'.'.join(map(str, e['loc'])) or 'file'}: {_expected(e['msg'])}" for e in error.errors()]
        ) from error


def _expected(message: str) -> str:
    if message == "Extra inputs are not permitted":
        return "unknown key"
    return message.removeprefix("Value error, ")
