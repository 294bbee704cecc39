from __future__ import annotations

from datetime import UTC, datetime

import asyncpg
import pytest

from outbox_relay import ledger
from outbox_relay.checker import Committed
from outbox_relay.errors import CheckError
from tests.conftest import Database

INSERT = """-- insert
INSERT INTO outbox (event_id, topic, key, type, payload, headers, created_at)
VALUES ('00000000-0000-0000-0000-00000000000A', 'orders', $1, $2, $3, $4, '2024-02-29 12:00:00.5+02')"""

EVENT_ID = "00000000-0000-0000-0000-00000000000a"
CREATED_AT = datetime(2024, 2, 29, 10, 0, 0, 500_000, UTC)


async def test_ledger_has_each_committed_row_as_it_was_written_sent_or_not(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute(INSERT, "ü", "OrderPlaced", b"\x00\xff", '{"trace": "ä", "empty": ""}')
    await connection.execute(INSERT, "", None, None, "{}")
    await connection.execute(INSERT, None, "", b"", "{}")
    await connection.execute("UPDATE outbox SET sent_at = now() WHERE id = 2")
    other = await outbox_database.connect()
    async with other.transaction():
        await other.execute(INSERT, "open", None, b"", "{}")
        rows = await ledger.committed_rows(connection)
    headers = {"trace": "ä", "empty": ""}
    assert rows == [
        Committed(1, EVENT_ID, "orders", "ü".encode(), b"\x00\xff", "OrderPlaced", headers, CREATED_AT),
        Committed(2, EVENT_ID, "orders", b"", None, None, {}, CREATED_AT),
        Committed(3, EVENT_ID, "orders", None, b"", "", {}, CREATED_AT),
    ]


async def test_rolled_back_row_is_not_in_the_ledger(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(INSERT, "key", None, b"", "{}")
    await transaction.rollback()
    assert await ledger.committed_rows(connection) == []


@pytest.mark.parametrize(
    ("type_", "value"), [("text", '{"n": 1.0, "n": 2}'), ("json", '{"n": 1.0, "n": 2}'), ("jsonb", '{"n": 2}')]
)
async def test_payload_that_is_not_bytea_is_what_postgresql_prints(
    type_: str, value: str, outbox_database: Database
) -> None:
    connection = await outbox_database.connect()
    await connection.execute(f"ALTER TABLE outbox ALTER payload TYPE {type_} USING NULL")
    await connection.execute(INSERT, "key", None, '{"n": 1.0, "n": 2}', "{}")
    (row,) = await ledger.committed_rows(connection)
    assert row.value == value.encode()


async def test_connection_that_decodes_payloads_is_refused(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute("ALTER TABLE outbox ALTER payload TYPE jsonb USING NULL")
    await connection.execute(INSERT, "key", None, "{}", "{}")
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=str, decoder=lambda _: {})
    with pytest.raises(CheckError, match=r"a payload came as dict; .* without type codecs"):
        await ledger.committed_rows(connection)


async def test_ledger_is_read_from_the_table_that_the_relay_would_find(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute("CREATE SCHEMA shop; ALTER TABLE outbox SET SCHEMA shop")
    with pytest.raises(asyncpg.UndefinedTableError):
        await ledger.committed_rows(connection)
    await connection.execute("SET search_path = shop")
    await connection.execute(INSERT, "key", None, b"", "{}")
    assert len(await ledger.committed_rows(connection)) == 1


async def test_ledger_larger_than_one_fetch_is_complete_and_in_order(outbox_database: Database) -> None:
    connection = await outbox_database.connect()
    await connection.execute(
        "INSERT INTO outbox (topic, key, payload) SELECT 'orders', 'k', '' FROM generate_series(1, 12000)"
    )
    assert [row.outbox_id for row in await ledger.committed_rows(connection)] == list(range(1, 12_001))
