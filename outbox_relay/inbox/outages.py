"""Which errors of a handler aren't its message's fault: the next message would meet them too."""

from __future__ import annotations

import asyncpg
import sqlalchemy.exc

_OUTAGES = (
    OSError,  # nobody answers; TimeoutError and redis-py's ConnectionError apart, all are
    TimeoutError,
    asyncpg.InterfaceError,  # the connection is closed, or its pool
    asyncpg.InternalClientError,  # it was closed while a statement was being sent
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # PostgreSQL starts or stops, or somebody has ended the session
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,  # a deadlock, or a serialization failure
    asyncpg.ReadOnlySQLTransactionError,  # a former primary
    sqlalchemy.exc.TimeoutError,  # all connections of the pool are in use
)


def is_outage(error: BaseException) -> bool:
    """Whether it, or what it was raised from (as SQLAlchemy's errors are), says that a server can't be used now."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        # redis-py is an extra, and has its own.
        of_redis = type(cause).__module__ == "redis.exceptions" and type(cause).__name__ in (
            *("ConnectionError", "TimeoutError", "BusyLoadingError", "ReadOnlyError"),
        )
        if of_redis or isinstance(cause, _OUTAGES):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or getattr(cause, "orig", None)
    return False
