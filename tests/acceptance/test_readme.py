"""The README's examples do what the README says they do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import ProgrammingError

from outbox_relay import config, outbox, topic_reader
from outbox_relay.inbox import schema as inbox_schema
from outbox_relay.outbox import Message
from outbox_relay.servers import Kafka
from tests.acceptance.commands import outbox_relay
from tests.acceptance.relays import relay_process
from tests.conftest import Database
from tests.roles import roles_sql, suffixed
from tests.waiting import eventually

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


def example(name: str) -> str:
    """The code block that follows the README's remark ``<!-- tested: name -->``."""
    match = re.search(rf"<!-- tested: {name} -->\n```\w+\n(.*?)\n```\n", README, re.DOTALL)
    assert match is not None, f"the README has no example {name!r}"
    return match[1]


def test_every_example_marked_as_tested_is_tested_here() -> None:
    assert set(re.findall(r"<!-- tested: (\w+) -->", README)) == {"fastapi", "sync", "sql", "config", "payments"}


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_the_configuration_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(example("config"))
    kafka = config.load(path).kafka
    assert (kafka.bootstrap_servers, kafka.allowed_topics) == (["localhost:9092"], ["orders"])


async def test_a_synchronous_session(outbox_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", outbox_database.url)
    defined: dict[str, Any] = {}
    await asyncio.to_thread(exec, example("sync"), defined)
    defined["engine"].dispose()
    row = await (await outbox_database.connect()).fetchrow("SELECT topic, key, type, payload FROM outbox")
    assert tuple(row) == ("orders", "42", "OrderPlaced", b'{"id":42}')


async def test_the_order_service_and_the_sql_reach_kafka_in_order(
    outbox_database: Database, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic, 3)
    service: Any = ModuleType("order_service")
    monkeypatch.setenv("DATABASE_URL", outbox_database.url)
    monkeypatch.setitem(sys.modules, "order_service", service)  # where FastAPI looks annotations up
    exec(example("fastapi").replace('Message("orders"', f'Message("{topic}"'), service.__dict__)
    async with (
        service.lifespan(service.app),
        httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://orders") as client,
    ):
        placed = await client.post("/orders/ada")
        placed.raise_for_status()
        order_id = placed.json()
        (await client.post(f"/orders/{order_id}/pay")).raise_for_status()
        assert (await client.post(f"/orders/{order_id + 1}/pay")).status_code == 404  # there is no such order
        async with service.engine.begin() as connection:
            await connection.exec_driver_sql(
                "ALTER TABLE orders ADD CONSTRAINT once UNIQUE (customer) DEFERRABLE INITIALLY DEFERRED"
            )
    # COMMIT comes before the answer: an order that PostgreSQL refuses in the end isn't confirmed.
    transport = httpx.ASGITransport(service.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://orders") as client:
        assert (await client.post("/orders/ada")).status_code == 500
    async with service.engine.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE orders DROP CONSTRAINT once")
    await service.engine.dispose()
    connection = await outbox_database.connect()
    await connection.execute(example("sql").replace("'orders'", f"'{topic}'"))

    with relay_process(outbox_database.url, kafka.bootstrap_servers, "--once") as relay:
        assert await relay.exit_code() == 0
    records = [r async for r in topic_reader.read_topics(kafka.bootstrap_servers, [topic], deadline_seconds=30)]
    by_key = {
        key: [(dict(r.headers)["type"], r.value) for r in records if r.key == key] for key in {r.key for r in records}
    }
    assert by_key == {
        str(order_id).encode(): [
            (b"OrderPlaced", b'{"id":%d,"customer":"ada"}' % order_id),
            (b"OrderPaid", b'{"id":%d}' % order_id),
        ],
        b"42": [(b"OrderPlaced", b'{"id": 42}')],
    }
    assert [dict(r.headers).get("tenant") for r in records if r.key == b"42"] == [b"north"]


@pytest.mark.parametrize("granted", [pytest.param(True, id="as it is there"), pytest.param(False, id="broken")])
async def test_the_roles_suffice_for_the_order_service(
    outbox_database: Database, monkeypatch: pytest.MonkeyPatch, granted: bool
) -> None:
    """``broken`` leaves out the right to make its own table, as PostgreSQL does from 15 on."""
    suffix = uuid4().hex[:12]  # roles belong to the whole server
    connection = await outbox_database.connect()
    await connection.execute(f"REVOKE CREATE ON SCHEMA public FROM PUBLIC; {roles_sql(suffix)}")
    *users, grant = [
        re.sub(r"(ROLE|TO) (relay|order_service|ada)\b", rf"\1 \2_{suffix}", suffixed(statement, suffix)).replace(
            "…", "word"
        )
        for statement in re.findall(r'-c "((?:CREATE|GRANT) .+?)"', README)
    ]
    assert len(users) == 3
    try:
        for statement in [*users, *([grant] if granted else [])]:
            await connection.execute(statement)
        user = make_url(outbox_database.url).set(username=f"order_service_{suffix}", password="word")
        monkeypatch.setenv("DATABASE_URL", user.render_as_string(hide_password=False))
        service: Any = ModuleType("order_service")
        monkeypatch.setitem(sys.modules, "order_service", service)
        exec(example("fastapi"), service.__dict__)
        with contextlib.nullcontext() if granted else pytest.raises(ProgrammingError, match="permission denied"):
            async with (
                service.lifespan(service.app),
                httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://orders") as client,
            ):
                placed = await client.post("/orders/ada")
                placed.raise_for_status()
                (await client.post(f"/orders/{placed.json()}/pay")).raise_for_status()
        await service.engine.dispose()
        assert await connection.fetchval("SELECT count(*) FROM outbox") == (2 if granted else 0)
    finally:
        made = [role for (role,) in await connection.fetch("SELECT rolname FROM pg_roles WHERE rolname ~ $1", suffix)]
        await connection.execute(f"DROP OWNED BY {', '.join(made)}; DROP ROLE {', '.join(made)}")


@pytest.mark.parametrize(
    ("instead", "charges", "charges_of_copies"),
    [
        pytest.param('Inbox("payments")', 3, 4, id="as it is there"),
        pytest.param("Inbox(group)", 5, 7, id="broken"),
    ],
)
async def test_the_payment_service_charges_each_order_once_though_all_come_again(
    outbox_database: Database, kafka: Kafka, tmp_path: Path, instead: str, charges: int, charges_of_copies: int
) -> None:
    topic = f"orders-{uuid4().hex}"
    await kafka.create_topic(topic, 1)  # in one partition, so that what comes again comes before what is new
    connection = await outbox_database.connect()
    await inbox_schema.apply(connection)
    script = tmp_path / "payments.py"
    code = example("payments").replace('@consumer.handler("orders"', f'@consumer.handler("{topic}"')
    assert code.count('Inbox("payments")') == 1
    script.write_text(code.replace('Inbox("payments")', instead))

    async def place(*numbers: int) -> None:
        for number in numbers:
            placed = Message(topic, {"id": number, "customer": "ada"}, key=str(number), type="OrderPlaced")
            paid = Message(topic, {"id": number}, key=str(number), type="OrderPaid")
            async with connection.transaction():
                await outbox.add_async(connection, placed, paid)
        with relay_process(outbox_database.url, kafka.bootstrap_servers, "--once") as relay:
            assert await relay.exit_code() == 0

    async def consume(group: str, last: int) -> str:
        """As somebody who presses Ctrl-C when it has charged the last; what they see."""
        with subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, str(script), group],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "DATABASE_URL": outbox_database.url, "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers},
        ) as process:
            try:
                charged = f"SELECT EXISTS (SELECT FROM charge WHERE order_id = {last})"
                await eventually(lambda: connection.fetchval(charged), "the last is charged")
                process.send_signal(signal.SIGINT)
                said, _ = await asyncio.to_thread(process.communicate, timeout=90)
            finally:
                process.kill()
        assert process.returncode == 0
        return said

    await connection.execute("CREATE TABLE charge (order_id bigint, customer text)")
    await place(1, 2)
    assert (await consume(f"{topic}-1", last=2)).endswith("charges: 2, orders: 2\n")
    await place(3)
    assert (await consume(f"{topic}-2", last=3)).endswith(f"charges: {charges}, orders: 3\n")
    again = re.search(r"`outbox-relay (replay --topic )orders( --since \S+)`", README)
    assert again is not None
    assert "6 rows copied" in await outbox_relay(outbox_database, *f"{again[1]}{topic}{again[2]} --yes".split())
    await place(4)
    # The group that has met 1 and 2. Its copies are skipped by either inbox, for they have the ids of their originals.
    assert (await consume(f"{topic}-1", last=4)).endswith(f"charges: {charges_of_copies}, orders: 4\n")
