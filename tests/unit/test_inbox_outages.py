"""Whose fault a handler's error is."""

from __future__ import annotations

import asyncpg
import pytest
import redis.exceptions
import sqlalchemy.exc
from sqlalchemy.exc import IntegrityError, OperationalError

from outbox_relay.inbox.outages import is_outage


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        asyncpg.AdminShutdownError(),
        asyncpg.CannotConnectNowError(),
        asyncpg.TooManyConnectionsError(),
        asyncpg.DeadlockDetectedError(),
        asyncpg.InterfaceError("the connection is closed"),
        asyncpg.InternalClientError(),
        sqlalchemy.exc.TimeoutError(),
        redis.exceptions.ConnectionError(),
        OperationalError("SELECT 1", {}, raised_from(Exception(), asyncpg.ConnectionDoesNotExistError())),
        raised_from(ValueError(), ConnectionResetError()),
    ],
    ids=repr,
)
def test_a_server_that_is_away_is_an_outage(error: Exception) -> None:
    assert is_outage(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        asyncpg.UniqueViolationError(),
        asyncpg.DataError(),
        redis.exceptions.ResponseError(),
        IntegrityError("INSERT", {}, raised_from(Exception(), asyncpg.UniqueViolationError())),
    ],
    ids=repr,
)
def test_what_the_message_may_have_caused_is_none(error: Exception) -> None:
    assert not is_outage(error)


def test_causes_that_go_round_come_to_an_end() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert not is_outage(first)
