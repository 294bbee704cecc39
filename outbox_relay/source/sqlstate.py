"""Whose fault it is when PostgreSQL refuses a statement, by the class of its SQLSTATE. Pure.

``docs/errors.md`` says of each class what happens and what to do; a test holds both to the classes that there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import asyncpg


class Fault(Enum):
    """Only a fault of the row costs an attempt, and only after PostgreSQL refused it alone."""

    ROW = "row"  #: of one row, perhaps: it is looked for
    CONFIGURATION = "configuration"  #: everything waits, until somebody mends what the message names
    INFRASTRUCTURE = "infrastructure"  #: nobody's: the connection is dropped, and everything waits


#: What values, constraints, triggers and damaged pages do to a statement.
_ROW = ("09", "10", "20", "21", "22", "23", "27", "2F", "38", "39", "44", "54", "P0", "XX")
_CONFIGURATION = ("0L", "0P", "28", "2B", "3D", "3F", "42", "F0")
_INFRASTRUCTURE = ("08", "0A", "25", "40", "53", "55", "57", "58", "72", "HV")
#: Of statements that the relay doesn't make.
NEVER = ("00", "01", "02", "03", "0B", "0F", "0Z", "24", "26", "2D", "34", "3B")

#: By the first two characters of a SQLSTATE.
FAULTS: Mapping[str, Fault] = {
    **dict.fromkeys(_ROW, Fault.ROW),
    **dict.fromkeys(_CONFIGURATION, Fault.CONFIGURATION),
    **dict.fromkeys(_INFRASTRUCTURE, Fault.INFRASTRUCTURE),
    **dict.fromkeys(NEVER, Fault.INFRASTRUCTURE),
}


def fault_of(error: BaseException | None) -> Fault:
    state = error.sqlstate if isinstance(error, asyncpg.PostgresError) else None
    return FAULTS.get((state or "")[:2], Fault.INFRASTRUCTURE)


def why(error: BaseException) -> str:
    """For operators. Not what PostgreSQL says, which may quote a value."""
    constraint = getattr(error, "constraint_name", None)
    return f"SQLSTATE {getattr(error, 'sqlstate', None)}" + (f", constraint {constraint}" if constraint else "")
