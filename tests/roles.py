"""``roles.sql`` for one test: roles belong to the whole server, so each name gets a suffix."""

from __future__ import annotations

import re

from outbox_relay import schema


def roles_sql(suffix: str) -> str:
    """It makes ``outbox_relay_<suffix>`` and so on."""
    return re.sub(r"\b(ROLE|TO) (outbox_\w+)", rf"\1 \2_{suffix}", schema.read_roles_sql())
