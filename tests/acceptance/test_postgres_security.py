"""PostgreSQL behind TLS, client certificates, passwords and privileges: the relay says what is wrong, within its
deadline, and goes on without a restart when it is mended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from outbox_relay import schema
from outbox_relay.servers import Kafka, PostgresServer, free_port
from outbox_relay.servers.versions import POSTGRES
from tests.acceptance.relays import RelayProcess, compare, drained, new_topic, relay_process
from tests.conftest import POSTGRES_SETTINGS, skipped_without_server
from tests.processes import family_of
from tests.roles import roles_sql
from tests.waiting import eventually

#: The wheel's PostgreSQL has no TLS.
VERSION = os.environ.get("POSTGRES_VERSION") or [*POSTGRES][-1]
INSERT = "INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', 'x')"
PASSWORD = "pw-61c0aa"
EXPIRED: dict[str, Any] = {
    "not_before": datetime(2019, 1, 1, tzinfo=UTC),
    "not_after": datetime(2020, 1, 1, tzinfo=UTC),
}
RULES = """
host all postgres 127.0.0.1/32 trust
host replication postgres 127.0.0.1/32 trust
hostssl all certified 127.0.0.1/32 cert
hostssl all worded 127.0.0.1/32 scram-sha-256
hostssl all doubly 127.0.0.1/32 scram-sha-256 clientcert=verify-full
"""
TLS = {"ssl": "on", "ssl_ca_file": "root.crt", "ssl_crl_file": "revoked.crl"}
SECONDS = 20.0
USERS = "certified, worded, doubly"


@dataclass
class Secured:
    """A server that the users of ``RULES`` reach by TLS alone."""

    server: PostgresServer
    ca: trustme.CA

    def write(self, name: str, content: str | bytes) -> None:
        """A file among the server's data, that it alone may read."""
        data = self.server.directory / "data"
        path = data / name
        path.touch(mode=0o600)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        os.chown(path, data.stat().st_uid, data.stat().st_gid)

    async def execute(self, *statements: str, database: str = "postgres") -> None:
        connection = await asyncpg.connect(self.server.url(database), ssl=False)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    async def reload(self) -> None:
        """Have the server read its files again, and wait until it did."""
        connection = await asyncpg.connect(self.server.url(), ssl=False)
        before = await connection.fetchval("SELECT pg_conf_load_time() FROM pg_reload_conf()")
        await connection.close()

        async def is_done() -> bool:
            connection = await asyncpg.connect(self.server.url(), ssl=False)
            try:
                return bool(await connection.fetchval("SELECT pg_conf_load_time() > $1", before))
            finally:
                await connection.close()

        await eventually(is_done, "the server has read its files")

    # -- what can be wrong with it

    async def show_certificate(self, *names: str, **settings: Any) -> None:
        self.write_certificate(self.ca.issue_cert(*(names or ("127.0.0.1",)), **settings))
        await self.reload()

    def write_certificate(self, issued: trustme.LeafCert) -> None:
        self.write("server.crt", b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.write("server.key", issued.private_key_pem.bytes())

    def write_revocations(self, *revoked: trustme.LeafCert) -> None:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(x509.load_pem_x509_certificate(self.ca.cert_pem.bytes()).subject)
            .last_update(now - timedelta(days=1))
            .next_update(now + timedelta(days=1))
        )
        for certificate in revoked:
            serial = x509.load_pem_x509_certificate(certificate.cert_chain_pems[0].bytes()).serial_number
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - timedelta(hours=1))
            builder = builder.add_revoked_certificate(entry.build())
        key = serialization.load_pem_private_key(self.ca.private_key_pem.bytes(), None)
        signed = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
        self.write("revoked.crl", signed.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def secured() -> Iterator[Secured]:
    with skipped_without_server():
        server = PostgresServer.start(POSTGRES_SETTINGS, version=VERSION)
    with server:
        server.stop()
        secured = Secured(server, trustme.CA())
        secured.write("pg_hba.conf", RULES)
        secured.write("root.crt", secured.ca.cert_pem.bytes())
        secured.write_certificate(secured.ca.issue_cert("127.0.0.1"))
        secured.write_revocations()
        server.start_again(TLS)
        yield secured


@dataclass
class Database:
    """An outbox whose relays may do what ``roles.sql`` says, and the files that one of them has."""

    secured: Secured
    name: str
    role: str
    directory: Path
    certificate: trustme.LeafCert

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def certificate_file(self) -> Path:
        return self.directory / "certificate.pem"

    @property
    def password_file(self) -> Path:
        return self.directory / "password"

    def settings(self, **settings: Any) -> dict[str, Any]:
        return {
            "tls": "verify-full",
            "tls_ca_file": str(self.ca_file),
            "connect_timeout_seconds": 5.0,
            "statement_timeout_seconds": 5.0,
            **settings,
        }

    def with_certificate(self, **settings: Any) -> dict[str, Any]:
        return self.settings(tls_cert_file=str(self.certificate_file), **settings)

    def with_password(self, **settings: Any) -> dict[str, Any]:
        return self.settings(password={"file": str(self.password_file)}, **settings)

    def url(self, user: str) -> str:
        return f"postgresql://{user}@127.0.0.1:{self.secured.server.port}/{self.name}"

    def put_certificate(self, user: str = "certified", ca: trustme.CA | None = None, **settings: Any) -> None:
        self.certificate = (ca or self.secured.ca).issue_cert(user, common_name=user, **settings)
        self.certificate.private_key_and_cert_chain_pem.write_to_path(self.certificate_file)

    async def connect(self) -> asyncpg.Connection:
        return await asyncpg.connect(self.secured.server.url(self.name), ssl=False)

    async def execute(self, *statements: str) -> None:
        await self.secured.execute(*statements, database=self.name)

    async def end_sessions(self) -> None:
        await self.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name LIKE 'outbox-relay%' AND datname = current_database()"
        )

    async def mend(self) -> None:
        """Everything is again as it has to be."""
        self.secured.ca.cert_pem.write_to_path(self.ca_file)
        self.password_file.write_text(f"{PASSWORD}\n")
        self.put_certificate()
        self.secured.write_revocations()
        self.secured.write("pg_hba.conf", RULES)
        await self.secured.show_certificate()


@pytest.fixture
async def database(secured: Secured, tmp_path: Path) -> AsyncIterator[Database]:
    name = f"test_{uuid4().hex}"
    role = f"role_{uuid4().hex}"
    await secured.execute(f"CREATE DATABASE {name}")
    connection = await asyncpg.connect(secured.server.url(name), ssl=False)
    await schema.apply(connection)
    # Roles belong to the whole server: these are of this test alone.
    await connection.execute(roles_sql(role))
    for user in USERS.split(", "):
        await connection.execute(
            f"DO $$ BEGIN CREATE ROLE {user} LOGIN PASSWORD '{PASSWORD}'; EXCEPTION WHEN duplicate_object THEN END $$"
        )
    await connection.execute(f"GRANT outbox_relay_{role} TO {USERS}")
    await connection.close()
    database = Database(secured, name, role, tmp_path, secured.ca.issue_cert("nobody"))
    await database.mend()
    yield database
    await secured.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def write(database: Database, topic: str) -> None:
    await database.execute(INSERT.replace("$1", f"'{topic}'"))


async def relayed(database: Database, relay: RelayProcess, topic: str) -> None:
    """A row that is written now arrives, by the process that was there from the start."""
    await write(database, topic)
    await all_relayed(database)
    assert len(relay.events("relay.starting")) == 1


async def all_relayed(database: Database) -> None:
    connection = await database.connect()
    try:
        await drained(connection, SECONDS)
    finally:
        await connection.close()


async def stopped(relay: RelayProcess, outages: int) -> None:
    """It ends in good order, after so many outages, which it outlived, and of each told a cause no more than once."""
    assert await relay.stop() == 0
    assert len(relay.events("database.available")) == outages
    reasons = Counter(event["reason"] for event in relay.events("database.unavailable"))
    assert max(reasons.values(), default=0) <= outages, reasons
    assert PASSWORD not in relay.output()


async def test_a_client_s_certificate_is_all_that_is_needed(database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    with relay_process(
        database.url("certified"), kafka.bootstrap_servers, database=database.with_certificate()
    ) as relay:
        await relayed(database, relay, topic)
        connection = await database.connect()
        sessions = await connection.fetch(
            "SELECT DISTINCT ssl, client_dn FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
            " WHERE application_name LIKE 'outbox-relay%' AND datname = current_database()"
        )
        await connection.close()
        (session,) = sessions
        assert session["ssl"]
        assert "/CN=certifie" in session["client_dn"]  # which is cut off
        await stopped(relay, 0)


async def another_ca(database: Database) -> None:
    trustme.CA().cert_pem.write_to_path(database.ca_file)


async def certificate_of_another_ca(database: Database) -> None:
    database.put_certificate(ca=trustme.CA())


async def certificate_of_another_user(database: Database) -> None:
    database.put_certificate("stranger")


async def expired_certificate(database: Database) -> None:
    database.put_certificate(**EXPIRED)


async def revoked_certificate(database: Database) -> None:
    database.secured.write_revocations(database.certificate)
    await database.secured.reload()


async def expired_server(database: Database) -> None:
    await database.secured.show_certificate(**EXPIRED)


async def server_of_another_name(database: Database) -> None:
    await database.secured.show_certificate("elsewhere.example")


async def user_not_let_in(database: Database) -> None:
    database.secured.write("pg_hba.conf", RULES.replace("certified", "somebody"))
    await database.secured.reload()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (another_ca, "the server isn't believed: self-signed certificate in certificate chain"),
        (expired_server, "the server isn't believed: certificate has expired"),
        (server_of_another_name, "the server isn't believed: IP address mismatch, certificate is not valid for"),
        (certificate_of_another_ca, "the server refuses TLS: tlsv1 alert unknown ca"),
        (expired_certificate, "the server refuses TLS: sslv3 alert certificate expired"),
        (revoked_certificate, "the server refuses TLS: sslv3 alert certificate revoked"),
        (certificate_of_another_user, 'certificate authentication failed for user "certified"'),
        (user_not_let_in, 'no pg_hba.conf entry for host "127.0.0.1", user "certified"'),
    ],
)
async def test_what_is_wrong_with_a_certificate_is_told_and_mended_without_a_restart(
    spoil: Callable[[Database], Awaitable[None]], reason: str, database: Database, kafka: Kafka
) -> None:
    """From the start, and again while the relay runs and loses its connections."""
    topic = await new_topic(kafka)
    await spoil(database)
    with relay_process(
        database.url("certified"), kafka.bootstrap_servers, database=database.with_certificate()
    ) as relay:
        unavailable = await relay.event("database.unavailable", deadline_seconds=SECONDS)
        assert unavailable["reason"].startswith(f"connect to the database: {reason}")
        await database.mend()
        await relayed(database, relay, topic)

        await spoil(database)
        await database.end_sessions()
        await relay.event("database.unavailable", after=1, reason=unavailable["reason"], deadline_seconds=SECONDS)
        await database.mend()
        await relayed(database, relay, topic)
        await relay.event("database.available", after=1)
        await stopped(relay, 2)


@pytest.mark.parametrize("file", ["ca_file", "certificate_file", "password_file"])
async def test_a_file_that_is_spoilt_while_the_relay_runs_is_named(file: str, database: Database, kafka: Kafka) -> None:
    topic = await new_topic(kafka)
    settings = database.with_certificate(password={"file": str(database.password_file)})
    database.put_certificate("doubly")
    with relay_process(database.url("doubly"), kafka.bootstrap_servers, database=settings) as relay:
        await relayed(database, relay, topic)
        path: Path = getattr(database, file)
        content = path.read_bytes()
        if file == "password_file":
            path.unlink()
        else:
            path.write_text("half of it")
        await database.end_sessions()
        await eventually(
            lambda: any(str(path) in event["reason"] for event in relay.events("database.unavailable")),
            "it names the file",
            SECONDS,
        )
        path.write_bytes(content)
        await relayed(database, relay, topic)
        await relay.event("database.available")
        await stopped(relay, 1)


async def test_a_missing_certificate_is_told_and_not_needed_any_more_without_a_restart(
    database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    with relay_process(database.url("doubly"), kafka.bootstrap_servers, database=database.with_password()) as relay:
        unavailable = await relay.event("database.unavailable", deadline_seconds=SECONDS)
        assert unavailable["reason"] == "connect to the database: connection requires a valid client certificate"
        database.secured.write("pg_hba.conf", RULES.replace("clientcert=verify-full", ""))
        await database.secured.reload()
        await relayed(database, relay, topic)
        await stopped(relay, 1)


async def test_a_wrong_password_is_told_and_a_right_one_is_used_without_a_restart(
    database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    database.password_file.write_text("wrong-5be2")
    with relay_process(database.url("worded"), kafka.bootstrap_servers, database=database.with_password()) as relay:
        unavailable = await relay.event("database.unavailable", deadline_seconds=SECONDS)
        assert unavailable["reason"] == ('connect to the database: password authentication failed for user "worded"')
        database.password_file.write_text(PASSWORD)
        await relayed(database, relay, topic)
        # It is changed in the database first, and a while later in the file.
        await database.execute("ALTER ROLE worded PASSWORD 'another-77d1'")
        await database.end_sessions()
        await relay.event("database.unavailable", after=1, reason=unavailable["reason"], deadline_seconds=SECONDS)
        database.password_file.write_text("another-77d1")
        await relayed(database, relay, topic)
        await relay.event("database.available", after=1)
        await stopped(relay, 2)
        assert "wrong-5be2" not in relay.output()
        assert "another-77d1" not in relay.output()
    # Only now: one of its sessions may not have been needed again yet, and so not been made anew.
    await database.execute(f"ALTER ROLE worded PASSWORD '{PASSWORD}'")


CHECK = "; `outbox-relay check` says what the role lacks"


@pytest.mark.parametrize(
    ("privilege", "reason"),
    [
        ("SELECT ON outbox", f"claim: permission denied for table outbox{CHECK}"),
        ("UPDATE (sent_at) ON outbox", f"settle: permission denied for table outbox{CHECK}"),
        ("UPDATE ON outbox_relay", f"heartbeat: permission denied for table outbox_relay{CHECK}"),
    ],
)
async def test_a_privilege_that_is_revoked_is_told_and_the_rows_wait_until_it_is_granted_again(
    privilege: str, reason: str, database: Database, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    with relay_process(database.url("worded"), kafka.bootstrap_servers, database=database.with_password()) as relay:
        await relayed(database, relay, topic)
        await database.execute(f"REVOKE {privilege} FROM outbox_relay_{database.role}")
        await write(database, topic)
        await relay.event("database.unavailable", reason=reason, deadline_seconds=SECONDS)
        await database.execute(f"GRANT {privilege} TO outbox_relay_{database.role}")
        await all_relayed(database)
        await relay.event("database.available")
        await stopped(relay, 1)
    connection = await database.connect()
    report = await compare(connection, kafka, topic)
    await connection.close()
    assert (report.sound, report.committed, report.duplicates) == (True, 2, 0), report.describe()


# -- several hosts


@pytest.fixture
async def standby(secured: Secured, database: Database) -> AsyncIterator[PostgresServer]:
    """A copy of the server as it is, fed by streaming replication; a commit waits for it."""
    server = await asyncio.to_thread(PostgresServer.start, POSTGRES_SETTINGS, version=VERSION)
    try:
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(secured.server.stop)
        data = server.directory / "data"
        owner = data.stat()
        shutil.rmtree(data)
        shutil.copytree(secured.server.directory / "data", data)
        (data / "standby.signal").touch()
        for path in (data, *data.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
        await asyncio.to_thread(secured.server.start_again)
        primary = f"host=127.0.0.1 port={secured.server.port} user=postgres sslmode=disable"
        await asyncio.to_thread(server.start_again, {**TLS, "primary_conninfo": primary})
        await secured.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await secured.reload()
        yield server
        await secured.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await secured.reload()
    finally:
        server.close()


@contextlib.contextmanager
def down(server: PostgresServer) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start_again()


@contextlib.contextmanager
def frozen(server: PostgresServer) -> Iterator[None]:
    """Connections stay, and are taken, and nothing answers."""
    processes = family_of(server.pid)

    def signal_all(number: signal.Signals) -> None:
        for pid in processes:
            # One that ends by itself, a worker of autovacuum say, may be gone before it could be stopped.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal_all(signal.SIGSTOP)
    try:
        yield
    finally:
        signal_all(signal.SIGCONT)


@pytest.mark.parametrize("lost", ["stopped", "frozen"])
async def test_of_several_hosts_the_one_that_can_be_written_to_is_used_also_after_a_failover(
    lost: str, secured: Secured, database: Database, standby: PostgresServer, kafka: Kafka
) -> None:
    topic = await new_topic(kafka)
    primary = secured.server
    hosts = [f"127.0.0.1:{server.port}" for server in (primary, standby)]
    if lost == "stopped":
        hosts.reverse()
    url = database.url("certified").replace(f"127.0.0.1:{primary.port}", ",".join(hosts))
    impatient = {"connect_timeout_seconds": 2.0, "statement_timeout_seconds": 1.0}
    with relay_process(url, kafka.bootstrap_servers, database=database.with_certificate(**impatient)) as relay:
        await relayed(database, relay, topic)
        with frozen(primary) if lost == "frozen" else down(primary):
            await relay.event("database.unavailable", deadline_seconds=SECONDS)
            connection = await asyncpg.connect(standby.url(database.name), ssl=False)
            try:
                assert await connection.fetchval("SELECT pg_promote()")
                await connection.execute(INSERT, topic)
                await drained(connection, SECONDS)
                report = await compare(connection, kafka, topic)
            finally:
                await connection.close()
            await relay.event("database.available")
            await stopped(relay, 1)
    assert (report.sound, report.committed, report.duplicates) == (True, 2, 0), report.describe()


async def test_where_no_host_can_be_written_to_each_is_told_with_its_reason(
    database: Database, standby: PostgresServer, kafka: Kafka
) -> None:
    nobody = free_port()
    url = database.url("certified").replace(
        f"127.0.0.1:{database.secured.server.port}", f"127.0.0.1:{nobody},127.0.0.1:{standby.port}"
    )
    with relay_process(url, kafka.bootstrap_servers, database=database.with_certificate()) as relay:
        unavailable = await relay.event("database.unavailable", deadline_seconds=SECONDS)
        assert f"127.0.0.1:{nobody}: " in unavailable["reason"]
        assert f"127.0.0.1:{standby.port}: read-only: a standby" in unavailable["reason"]
        assert await relay.stop() == 0
