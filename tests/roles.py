"""``roles.sql`` for one test: roles belong to the whole server, so each name gets a suffix."""

from __future__ import annotations

import re

from outbox_relay import roles
from outbox_relay.source.statements import OUTBOX, OutboxTable


def roles_sql(suffix: str, table: OutboxTable = OUTBOX, schema: str = "") -> str:
    """It makes ``outbox_relay_<suffix>`` and so on."""
    return suffixed(roles.roles_sql(table, schema), suffix)


def suffixed(sql: str, suffix: str) -> str:
    return re.sub(r"(\b(?:ROLE|TO) |to_regrole\(')(outbox_\w+)", rf"\1\2_{suffix}", sql)
