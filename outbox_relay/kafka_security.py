"""How a Kafka client knows whom it speaks to, and proves who it is: the arguments of aiokafka's clients."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import errors as kafka_errors
from aiokafka.abc import AbstractTokenProvider
from aiokafka.conn import create_conn

from outbox_relay.tls import Tls, tls_refusal

_PROBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class KafkaSecurity:
    """``protocol`` and ``mechanism`` are Kafka's own names; ``token`` gives an OAUTHBEARER token, now or awaited."""

    protocol: str = "PLAINTEXT"
    tls: Tls | None = None
    mechanism: str | None = None
    username: str | None = None
    password: Callable[[], str] | None = None
    token: Callable[[], Any] | None = None

    def arguments(self) -> dict[str, Any]:
        """Of files and secrets as they are now. Raises OSError where one can't be read."""
        arguments: dict[str, Any] = {"security_protocol": self.protocol}
        if self.tls is not None:
            arguments["ssl_context"] = self.tls.context()
        if self.mechanism is not None:
            arguments["sasl_mechanism"] = self.mechanism
        if self.username is not None and self.password is not None:
            arguments["sasl_plain_username"] = self.username
            arguments["sasl_plain_password"] = self.password()
        if self.token is not None:
            arguments["sasl_oauth_token_provider"] = _TokenProvider(self.token)
        return arguments

    async def refusal(self, bootstrap_servers: Sequence[str]) -> str | None:
        """Why a server isn't believed, or refuses this client, where aiokafka only says that none could be reached.

        Takes seconds at most.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PROBE_SECONDS):
                for address in bootstrap_servers:
                    host, _, port = address.rpartition(":")
                    with contextlib.suppress(OSError, ValueError):
                        if problem := await self._tls_problem(host.strip("[]"), int(port)):
                            return f"{address} {problem}"
                        if problem := await self._sasl_problem(host.strip("[]"), int(port)):
                            return f"{address} {problem}"
        return None

    async def _tls_problem(self, host: str, port: int) -> str | None:
        if self.tls is None:
            return None
        return await tls_refusal(asyncio.open_connection(host, port, ssl=self.tls.context()))

    async def _sasl_problem(self, host: str, port: int) -> str | None:
        if self.mechanism is None:
            return None
        try:
            (await create_conn(host, port, **self.arguments())).close()
        except kafka_errors.KafkaConnectionError:
            return None
        except kafka_errors.KafkaError as error:
            return f"refuses to authenticate: {error}"
        return None


PLAINTEXT = KafkaSecurity()


class _TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    """Asked by aiokafka for each connection. Brokers end one whose token has expired, and the next has a new one."""

    def __init__(self, token: Callable[[], Any]) -> None:
        self._token = token

    async def token(self) -> str:
        try:
            # In a thread, for it may ask a server and block.
            given = self._token() if inspect.iscoroutinefunction(self._token) else await asyncio.to_thread(self._token)
            token = await given if inspect.isawaitable(given) else given
        except Exception as error:
            # Without its text, which may hold a secret.
            problem = f"sasl_token_provider failed with {type(error).__name__}"
            raise kafka_errors.SaslAuthenticationFailed(problem) from None
        if not isinstance(token, str):
            raise kafka_errors.SaslAuthenticationFailed(f"sasl_token_provider gave {type(token).__name__}, not text")
        return token
