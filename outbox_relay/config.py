"""The configuration: one frozen, strict type for each TOML table. ``config.example.toml`` shows every default.

No text becomes a number, and the other way round. What is said of a mistake never holds a value of the file that may
be a secret.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Mapping
from importlib import import_module, util
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from outbox_relay import config_file
from outbox_relay.addresses import host_and_port, host_of, is_local, postgresql_url, url_hosts
from outbox_relay.tls import Tls

# PostgreSQL counts in whole milliseconds, and takes 0 for no timeout at all.
Seconds = Annotated[float, Field(ge=0.001, le=86_400, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Followers = Literal["block", "skip"]

_TOPIC_OR_PREFIX = re.compile(r"[a-zA-Z0-9._-]{1,249}\*?|\*")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


# -- paths and secrets


def _path(value: str, info: ValidationInfo) -> Path:
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{value}: there is no such user here") from error
    directory = (info.context or {}).get("directory")
    return directory / path if directory is not None else path


def _readable(value: str, info: ValidationInfo) -> Path:
    path = _path(value, info)
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
    return path


#: A file that is there; a relative path begins where the configuration file is.
File = Annotated[Annotated[str, Field(min_length=1)] | None, AfterValidator(lambda v, i: v and _readable(v, i))]


class Secret(_Table):
    """Where a secret is kept, ``{ env = "NAME" }`` or ``{ file = "/path" }``; it can't be printed with this."""

    shape: ClassVar[str] = '{ env = "NAME" } or { file = "/path" }'

    env: Text | None = None
    file: File = None

    @model_validator(mode="after")
    def _is_there(self) -> Secret:
        if (self.env is None) == (self.file is None):
            raise ValueError(f"must be {self.shape}, one of them")
        if self.env is not None and self.env not in os.environ:
            raise ValueError(f"the environment variable {self.env} isn't set")
        return self

    def read(self) -> str:
        """As it is now, for it may have been rotated; of a file without the line's end. Raises OSError."""
        if self.file is not None:
            return Path(self.file).read_text("utf-8").removesuffix("\n").removesuffix("\r")
        return os.environ[self.env or ""]


# -- checks


def _at_least(lower: str, times: int = 1) -> AfterValidator:
    """Not below the field ``lower``, which stands before it in the same table."""

    def check(value: float, info: ValidationInfo) -> float:
        lowest = info.data.get(lower)  # missing when it is itself at fault
        if lowest is not None and value < times * lowest:
            multiple = f"{times} times " if times > 1 else ""
            raise ValueError(f"{value:g} must not be below {multiple}{lower} ({lowest:g})")
        return value

    return AfterValidator(check)


def _installed(compression: str) -> str:
    if compression not in ("none", "gzip") and util.find_spec("cramjam") is None:
        raise ValueError(f"{compression} needs a package that isn't here: pip install 'outbox-relay[compression]'")
    return compression


def _topic_or_prefix(name: str) -> str:
    if not _TOPIC_OR_PREFIX.fullmatch(name):
        raise ValueError("must be the name of a topic, or the beginning of names and then *")
    return name


def _dead_letter_topic(template: str) -> str:
    name = template.replace("{topic}", "t")
    if template == "{topic}" or name.endswith("*") or not _TOPIC_OR_PREFIX.fullmatch(name):
        raise ValueError('must be the name of a topic, with or without {topic} in it, such as "{topic}.dead"')
    return template


def _copies_fit(relay: RelayConfig, info: ValidationInfo) -> RelayConfig:
    if relay.dead_letter_topic is not None and info.data.get("table", TableConfig()) != TableConfig():
        raise ValueError("dead_letter_topic works with a table as schema.sql has it, not with one that [table] maps")
    return relay


def _provider(name: str | None) -> str | None:
    if name is not None:
        load_provider(name)
    return name


def load_provider(name: str) -> Callable[[], Any]:
    """The function that ``package.module:function`` names. Raises ValueError."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError("must be package.module:function")
    try:
        provider = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"can't be imported: {error}") from None
    except Exception as error:
        # Of the module itself, and without its text, which may hold a secret.
        raise ValueError(f"can't be imported: {module} fails with {type(error).__name__}") from None
    if not callable(provider):
        raise ValueError(f"{name} is no function")  # noqa: TRY004 (pydantic takes a TypeError for a defect)
    found: Callable[[], Any] = provider
    return found


def _template(topic: str) -> str:
    # Doubled braces stand for themselves, as in Python.
    if not re.fullmatch(r"([^{}]|\{\{|\}\}|\{[^{}]+\})+", topic) or "{" not in topic:
        raise ValueError('must have a column in braces, as "{topic}" or "outbox.event.{aggregatetype}"')
    return topic


# Fields that contradict one another: the later one in the table is at fault. What is itself at fault is missing from
# ``info.data``, and then nothing is said here.


def _needs(is_met: Callable[[Mapping[str, Any]], bool], what: str) -> AfterValidator:
    """Given only where something else is."""

    def check(value: Any, info: ValidationInfo) -> Any:
        with contextlib.suppress(KeyError):
            if value is not None and not is_met(info.data):
                raise ValueError(f"has no effect without {what}")
        return value

    return AfterValidator(check)


def _required(if_: Callable[[Mapping[str, Any]], bool], for_what: str) -> AfterValidator:
    """Not to be left out where something else is given."""

    def check(value: Any, info: ValidationInfo) -> Any:
        with contextlib.suppress(KeyError):
            if value is None and if_(info.data):
                raise ValueError(f"missing, and {for_what} needs it")
        return value

    return AfterValidator(check)


def _permits(danger: str, hosts: Callable[[Mapping[str, Any]], list[str]]) -> AfterValidator:
    """True where what ``danger`` names would be done to hosts that aren't this machine."""

    def check(value: bool, info: ValidationInfo) -> bool:
        with contextlib.suppress(KeyError):
            remote = [host for host in hosts(info.data) if not is_local(host)]
            if remote and not value:
                raise ValueError(f"must be true for {danger}, and {remote[0]} isn't this machine")
        return value

    return AfterValidator(check)


def _tls(data: Mapping[str, Any]) -> Tls:
    password: Secret | None = data["tls_key_password"]
    return Tls(
        data["tls_ca_file"],
        data["tls_cert_file"],
        data["tls_key_file"],
        password.read if password is not None else None,
        verify=not data["dangerously_skip_server_verification"],
    )


def _sound_tls(value: bool, info: ValidationInfo) -> bool:
    """Whether the files, all of which stand before this field, make a context."""
    with contextlib.suppress(KeyError):
        try:
            _tls({**info.data, "dangerously_skip_server_verification": value}).context()
        except OSError as error:
            raise ValueError(f"the tls files don't work: {error}") from None
    return value


# -- the tables


def _database_uses_tls(data: Mapping[str, Any]) -> bool:
    return data["tls"] == "verify-full" or (
        data["tls"] == "auto" and not all(is_local(host) for host in url_hosts(data["url"]))
    )


def _kafka_uses_tls(data: Mapping[str, Any]) -> bool:
    return data["security_protocol"] in ("SSL", "SASL_SSL")


def _kafka_hosts(data: Mapping[str, Any]) -> list[str]:
    return [host_of(address) for address in data["bootstrap_servers"]]


def _with_mechanism(*mechanisms: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: data["sasl_mechanism"] in mechanisms


_WITH_PASSWORD = ("SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN")
_SASL_NEEDED = 'security_protocol = "SASL_SSL"'
_DATABASE_TLS = _needs(_database_uses_tls, 'tls = "verify-full"')
_KAFKA_TLS = _needs(_kafka_uses_tls, 'security_protocol = "SSL" or "SASL_SSL"')
_CERTIFICATE = _needs(lambda data: data["tls_cert_file"] is not None, "tls_cert_file")


class DatabaseConfig(_Table):
    """``[database]``"""

    url: Annotated[str, AfterValidator(postgresql_url)]
    password: Secret | None = None
    connect_timeout_seconds: Seconds = 10.0
    statement_timeout_seconds: Seconds = 30.0
    tls: Literal["auto", "verify-full", "disable"] = "auto"
    tls_ca_file: Annotated[File, _DATABASE_TLS] = None
    tls_cert_file: Annotated[File, _DATABASE_TLS] = None
    tls_key_file: Annotated[File, _CERTIFICATE] = None
    tls_key_password: Annotated[Secret | None, _CERTIFICATE] = None
    dangerously_allow_plaintext: Annotated[
        bool,
        _permits('tls = "disable"', lambda data: [] if _database_uses_tls(data) else url_hosts(data["url"])),
    ] = False
    dangerously_skip_server_verification: Annotated[bool, AfterValidator(_sound_tls)] = False

    def tls_settings(self) -> Tls | None:
        """None where no TLS is to be used."""
        return _tls(dict(self)) if _database_uses_tls(dict(self)) else None


class KafkaConfig(_Table):
    """``[kafka]``"""

    bootstrap_servers: Annotated[
        list[Annotated[str, AfterValidator(host_and_port)]], Field(min_length=1, examples=[["localhost:9092"]])
    ]
    client_id: Text = "outbox-relay"
    allowed_topics: Annotated[
        list[Annotated[str, AfterValidator(_topic_or_prefix)]] | None, Field(min_length=1, examples=[["orders"]])
    ] = None
    compression: Annotated[Literal["none", "gzip", "snappy", "lz4", "zstd"], AfterValidator(_installed)] = "none"
    batch_bytes: Annotated[int, Field(ge=1024, le=100_000_000)] = 524_288
    connect_timeout_seconds: Seconds = 10.0
    request_timeout_seconds: Seconds = 20.0
    publish_warn_seconds: Seconds = 5.0
    publish_deadline_seconds: Annotated[Seconds, _at_least("publish_warn_seconds")] = 60.0
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    tls_ca_file: Annotated[File, _KAFKA_TLS] = None
    tls_cert_file: Annotated[File, _KAFKA_TLS] = None
    tls_key_file: Annotated[File, _CERTIFICATE] = None
    tls_key_password: Annotated[Secret | None, _CERTIFICATE] = None
    sasl_mechanism: Annotated[
        Literal["SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN", "OAUTHBEARER"] | None,
        _needs(lambda data: data["security_protocol"].startswith("SASL"), _SASL_NEEDED),
        _required(lambda data: data["security_protocol"].startswith("SASL"), "security_protocol"),
        AfterValidator(lambda value, info: _plain_under_tls(value, info)),
    ] = None
    sasl_username: Annotated[
        str | None,
        _needs(_with_mechanism(*_WITH_PASSWORD), "sasl_mechanism = SCRAM-SHA-256, SCRAM-SHA-512 or PLAIN"),
        _required(_with_mechanism(*_WITH_PASSWORD), "sasl_mechanism"),
    ] = None
    sasl_password: Annotated[
        Secret | None,
        _needs(_with_mechanism(*_WITH_PASSWORD), "sasl_mechanism = SCRAM-SHA-256, SCRAM-SHA-512 or PLAIN"),
        _required(_with_mechanism(*_WITH_PASSWORD), "sasl_mechanism"),
    ] = None
    sasl_token_provider: Annotated[
        str | None,
        _needs(_with_mechanism("OAUTHBEARER"), "sasl_mechanism = OAUTHBEARER"),
        _required(_with_mechanism("OAUTHBEARER"), "sasl_mechanism"),
        AfterValidator(_provider),
    ] = None
    dangerously_allow_plaintext: Annotated[
        bool,
        _permits(
            'security_protocol = "PLAINTEXT" or "SASL_PLAINTEXT"',
            lambda data: [] if _kafka_uses_tls(data) else _kafka_hosts(data),
        ),
    ] = False
    dangerously_skip_server_verification: Annotated[bool, AfterValidator(_sound_tls)] = False

    def tls_settings(self) -> Tls | None:
        """None where no TLS is to be used."""
        return _tls(dict(self)) if _kafka_uses_tls(dict(self)) else None


def _plain_under_tls(mechanism: str | None, info: ValidationInfo) -> str | None:
    if mechanism == "PLAIN" and info.data.get("security_protocol") == "SASL_PLAINTEXT":
        raise ValueError('PLAIN shows the password to the network: set security_protocol = "SASL_SSL", or use SCRAM')
    return mechanism


class ColumnsConfig(_Table):
    """``[table.columns]``: what the table's columns are called; an empty name: the table has none such."""

    id: Text = "id"
    event_id: Text = "event_id"
    key: Text = "key"
    type: str = "type"
    payload: Text = "payload"
    headers: str = "headers"
    created_at: str = "created_at"
    sent_at: Text = "sent_at"
    parked_at: Text = "parked_at"
    bucket: Text = "bucket"


class TableConfig(_Table):
    """``[table]``"""

    # pydantic has something of its own that is called schema.
    schema_: Annotated[str, Field(alias="schema")] = ""
    name: Text = "outbox"
    topic: Annotated[str, AfterValidator(_template)] = "{topic}"
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)


class RelayConfig(_Table):
    """``[relay]``"""

    name: Text = Field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    batch_rows: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    claims_in_flight: Annotated[int, Field(ge=1, le=16)] = 4
    max_in_flight_bytes: Annotated[int, Field(ge=65_536, le=100_000_000_000)] = 10_485_760
    poll_floor_seconds: Seconds = 0.001
    poll_ceiling_seconds: Annotated[Seconds, _at_least("poll_floor_seconds")] = 0.5
    wake_up: bool = True
    retry_first_seconds: Seconds = 0.5
    retry_ceiling_seconds: Annotated[Seconds, _at_least("retry_first_seconds")] = 30.0
    max_attempts: Annotated[int, Field(ge=1, le=10_000)] = 10
    after_publish: Literal["mark", "delete"] = "mark"
    followers: Followers = "block"
    followers_of: dict[Annotated[str, AfterValidator(_topic_or_prefix)], Followers] = Field(default_factory=dict)
    dead_letter_topic: Annotated[str, AfterValidator(_dead_letter_topic)] | None = None
    heartbeat_seconds: Seconds = 1.0
    lease_seconds: Annotated[Seconds, _at_least("heartbeat_seconds", times=3)] = 15.0
    shutdown_grace_seconds: Seconds = 20.0
    # Up to a hundred years.
    retention_hours: Annotated[float | None, Field(ge=0.0001, le=876_000, allow_inf_nan=False)] = None


class LogConfig(_Table):
    """``[log]``"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Config(_Table):
    """A whole configuration file."""

    database: DatabaseConfig
    kafka: KafkaConfig
    table: TableConfig = Field(default_factory=TableConfig)
    relay: Annotated[RelayConfig, AfterValidator(_copies_fit)] = Field(default_factory=RelayConfig)
    log: LogConfig = Field(default_factory=LogConfig)


def load(path: Path) -> Config:
    """Read a configuration file.

    Raises :class:`ConfigError` with one line for each mistake: ``file:line: table.key: what was expected``.
    """
    return config_file.load(path, Config)
