"""What is logged of a message that can't be handled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from structlog.testing import capture_logs

from outbox_relay.inbox.closing import Closing
from outbox_relay.inbox.handling import Handler, Handling, PermanentError, Tries
from outbox_relay.inbox.telemetry import Telemetry
from outbox_relay.retry import Backoff


async def failure(handlers: dict[tuple[str, str | None], Handler], *headers: tuple[str, bytes]) -> dict[str, Any]:
    """The line of a message with these headers, in the topic orders."""
    message = SimpleNamespace(topic="orders", partition=0, offset=6, key=b"ada", value=b"{}", headers=headers)
    with capture_logs() as logs:
        handling = Handling(
            None,
            None,
            handlers,
            max_attempts=3,
            backoff=Backoff(0.1, 0.1),
            dead_letters=None,
            telemetry=Telemetry(group="payments"),
        )
        assert await handling.handle(message, Tries(), Closing()) is not None
    (line,) = logs
    assert line["event"] == "message.failed"
    return dict(line)


async def test_a_type_without_a_handler_is_named() -> None:
    async def handle(message: Any) -> None: ...

    line = await failure({("orders", "OrderPlaced"): handle}, ("type", b"OrderPaid"))
    assert (line["error"], line["attempts"]) == ("NoHandlerError", 1)
    assert line["reason"] == "no handler for messages of type 'OrderPaid' of topic 'orders'"
    line = await failure({("orders", "OrderPlaced"): handle})
    assert line["reason"] == "no handler for messages without a type of topic 'orders'"
    line = await failure({}, ("type", b"x" * 100_000))
    assert len(line["reason"]) == 1_000


async def test_the_text_of_a_handler_s_error_is_not_logged() -> None:
    for error in (ValueError("ada's address"), PermanentError("ada's address")):

        async def handle(message: Any, error: Exception = error) -> None:
            raise error

        line = await failure({("orders", None): handle})
        assert line["error"] == type(error).__name__
        assert line["reason"] == "its text may quote the message, so it isn't logged"
        assert "ada" not in str(line)
