"""Sets up structlog: JSON lines on stdout, readable on a terminal, other libraries' records in the same stream."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from outbox_relay import tracebacks
from outbox_relay.repeats import Repeats


def configure(level: str, format_: str) -> None:
    """Send everything of ``level`` and above to stdout.

    Other libraries are held to INFO and above whatever the level: aiokafka's DEBUG lines hold keys and payloads.
    """
    console = format_ == "console" or (format_ == "auto" and sys.stdout.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_traceback),
        _in_front,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        cache_logger_on_first_use=True,
    )
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty()) if console else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    handler.addFilter(Repeats())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(threshold, logging.INFO))
    logging.getLogger("outbox_relay").setLevel(threshold)
    # Below its first line asyncio prints what it was doing, errors with their texts among it.
    logging.getLogger("asyncio").addFilter(_first_line)
    # aiokafka reports each failed connect at ERROR while the relay's own lines tell of the outage once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def _traceback(exc_info: Any) -> str:
    return tracebacks.without_data(exc_info[1])


def _first_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = record.getMessage().partition("\n")[0], ()
    return True


def _in_front(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What a person looks for first comes first."""
    return {name: event[name] for name in ("timestamp", "level", "event") if name in event} | dict(event)
