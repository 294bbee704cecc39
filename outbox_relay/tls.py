"""TLS to a server: who vouches for it, and as whom this process appears."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

# How long a server is given to say what it thinks of a finished handshake.
_REFUSAL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Tls:
    """Files are PEM. Without ``ca_file`` the system's authorities vouch; without ``key_file`` the key is in
    ``cert_file``. With ``verify`` off any server is believed, and so is whoever sits in between.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    key_password: Callable[[], str] | None = None
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Made of the files as they are now, so that a renewed certificate is used by the next connection.

        Raises OSError, which ssl's own error is one of, and names the file.
        """
        # Not create_default_context, whose strictness differs between Pythons: private authorities often lack what
        # it asks for since 3.13, and neither libpq nor Java does.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca_file is None:
            context.load_default_certs()
        else:
            _load(self.ca_file, "isn't a PEM file of certificates", lambda file: context.load_verify_locations(file))
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert_file is not None:
            self._load_certificate(context, self.cert_file)
        return context

    def _load_certificate(self, context: ssl.SSLContext, cert_file: Path) -> None:
        key_file = self.key_file or cert_file
        # A callback even without a password: OpenSSL would ask for it on the terminal.
        password = self.key_password or (lambda: "")
        for file in (cert_file, key_file):
            _load(file, "", lambda file: file.open().close())
        _load(
            cert_file,
            f"with the key of {key_file}: isn't PEM, or the two don't belong together, or the key's password is wrong",
            lambda file: context.load_cert_chain(file, key_file, password),
        )


async def tls_refusal(handshake: Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> str | None:
    """Why the server isn't believed, or doesn't take this client; None where it does.

    Raises OSError where it doesn't come to a handshake.
    """
    try:
        reader, writer = await handshake
        try:
            # A server that wants a certificate, or another one, says so only after the handshake.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFUSAL_SECONDS):
                    await reader.read(1)
        finally:
            writer.transport.abort()
    except ssl.SSLError as error:
        return tls_problem(error)
    return None


def tls_problem(error: ssl.SSLError) -> str:
    """What goes wrong, to follow the name of the server."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"isn't believed: {error.verify_message}"
    return f"refuses TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"


def _load(file: Path, problem: str, load: Callable[[Path], object]) -> None:
    try:
        load(file)
    except ssl.SSLError as error:
        raise OSError(f"{file} {problem}") from error
    except OSError as error:
        raise OSError(f"{file}: {error.strerror or error}") from error
