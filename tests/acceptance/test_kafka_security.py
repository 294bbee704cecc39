"""Kafka behind TLS, SASL and an authorizer: the relay says what is wrong, and goes on when it is mended."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives import serialization

from outbox_relay.servers import Kafka, KafkaServer, free_port
from tests.acceptance.relays import drained, new_topic, relay_process
from tests.conftest import Database

INSERT = "INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', 'x')"
PASSWORD = "pw-1f7c0c"
EXPIRED: dict[str, Any] = {
    "not_before": datetime(2019, 1, 1, tzinfo=UTC),
    "not_after": datetime(2020, 1, 1, tzinfo=UTC),
}


@dataclass
class Secured:
    """A broker that anybody on this machine may use in the clear, and others by certificate or password."""

    server: KafkaServer
    ca: trustme.CA
    directory: Path
    ssl: str  #: wants a client's certificate
    sasl_ssl: str

    def tls(self, **settings: Any) -> dict[str, Any]:
        return {"tls_ca_file": str(self.directory / "ca.pem"), **settings}

    def sasl(self, mechanism: str, **settings: Any) -> dict[str, Any]:
        credentials: dict[str, Any] = {"sasl_username": "relay", "sasl_password": {"file": self.secret(PASSWORD)}}
        if mechanism == "OAUTHBEARER":
            credentials = {"sasl_token_provider": f"{__name__}:token"}
        return self.tls(security_protocol="SASL_SSL", sasl_mechanism=mechanism, **{**credentials, **settings})

    def secret(self, word: str) -> str:
        path = self.directory / f"secret-{word}"
        path.write_text(word)
        return str(path)

    def certificate(self, name: str, ca: trustme.CA | None = None, **settings: Any) -> str:
        """A file with a new certificate and its key."""
        path = self.directory / f"{name}.pem"
        issued = (ca or self.ca).issue_cert("relay", common_name="relay", **settings)
        issued.private_key_and_cert_chain_pem.write_to_path(path)
        return str(path)

    def allow(self, topic: str) -> None:
        admin = AdminClient({"bootstrap.servers": self.server.bootstrap_servers})
        acl = AclBinding(
            *(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:relay", "*"),
            *(AclOperation.WRITE, AclPermissionType.ALLOW),
        )
        for future in admin.create_acls([acl]).values():
            future.result(30)


def token() -> str:
    """An unsigned one, that lives for three seconds; Kafka takes such where nothing else is set."""
    now = time.time()
    parts = ({"alg": "none"}, {"sub": "relay", "iat": now, "exp": now + 3})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


@pytest.fixture(scope="module")
def secured(kafka: Kafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """``kafka`` only for its skip, where Apache Kafka isn't to be had."""
    directory = tmp_path_factory.mktemp("kafka-security")
    directory.chmod(0o755)
    ca = trustme.CA()
    ca.cert_pem.write_to_path(directory / "ca.pem")
    issued = ca.issue_cert("localhost", "127.0.0.1")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    # Java reads keys in this form alone.
    pkcs8 = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "server.pem").write_bytes(pkcs8 + b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    module = "org.apache.kafka.common.security"
    settings = {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(directory / "server.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(directory / "ca.pem"),
        "listener.name.ssl.ssl.client.auth": "required",
        "ssl.principal.mapping.rules": "RULE:^.*CN=([^,]+).*$/$1/,DEFAULT",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL",
        "listener.name.sasl_ssl.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
        "listener.name.sasl_ssl.plain.sasl.jaas.config": f"{module}.plain.PlainLoginModule required"
        f' user_relay="{PASSWORD}";',
        "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": f"{module}.scram.ScramLoginModule required;",
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": f"{module}.scram.ScramLoginModule required;",
        "listener.name.sasl_ssl.oauthbearer.sasl.jaas.config": f"{module}.oauthbearer.OAuthBearerLoginModule"
        ' required unsecuredLoginStringClaim_sub="broker";',
        "listener.name.sasl_ssl.oauthbearer.connections.max.reauth.ms": "3000",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    with KafkaServer.start() as server:
        server.stop()
        properties = (server.directory / "server.properties").read_text().splitlines()
        listeners, advertised = (
            next(line.removeprefix(name) for line in properties if line.startswith(name))
            for name in ("listeners=", "advertised.listeners=")
        )
        ssl, sasl_ssl = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        more = f",SSL://{ssl},SASL_SSL://{sasl_ssl}"
        server.start_again({**settings, "listeners": listeners + more, "advertised.listeners": advertised + more})
        admin = AdminClient({"bootstrap.servers": server.bootstrap_servers})
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
            change = UserScramCredentialUpsertion("relay", ScramCredentialInfo(mechanism, 4096), PASSWORD.encode())
            for future in admin.alter_user_scram_credentials([change]).values():
                future.result(30)
        yield Secured(server, ca, directory, ssl, sasl_ssl)


async def relayed(database: Database, secured: Secured, address: str, settings: dict[str, Any], rows: int = 1) -> None:
    topic = await new_topic(Kafka(secured.server.bootstrap_servers, secured.server))
    secured.allow(topic)
    connection = await database.connect()
    with relay_process(database.url, address, kafka=settings) as relay:
        for _ in range(rows):
            await connection.execute(INSERT, topic)
            await drained(connection)
        assert await relay.stop() == 0
        assert PASSWORD not in relay.output()


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"])
async def test_sasl_under_tls(mechanism: str, secured: Secured, outbox_database: Database) -> None:
    await relayed(outbox_database, secured, secured.sasl_ssl, secured.sasl(mechanism))


async def test_a_client_s_certificate(secured: Secured, outbox_database: Database) -> None:
    settings = secured.tls(security_protocol="SSL", tls_cert_file=secured.certificate("good"))
    await relayed(outbox_database, secured, secured.ssl, settings)


async def test_a_token_that_expires_is_replaced(secured: Secured, outbox_database: Database) -> None:
    topic = await new_topic(Kafka(secured.server.bootstrap_servers, secured.server))
    secured.allow(topic)
    connection = await outbox_database.connect()
    began = time.monotonic()
    with relay_process(outbox_database.url, secured.sasl_ssl, kafka=secured.sasl("OAUTHBEARER")) as relay:
        # For three lives of a token; each row comes when the one before it is marked.
        while time.monotonic() < began + 10:
            await connection.execute(INSERT, topic)
            await drained(connection)
        assert await relay.stop() == 0
    assert not relay.events("publish.abandoned")


@pytest.mark.parametrize("case", ["another CA", "no certificate", "a certificate of another CA", "expired"])
async def test_tls_that_fails_is_told_and_goes_on_when_it_is_mended(
    case: str, secured: Secured, outbox_database: Database
) -> None:
    other = trustme.CA()
    ca_file, cert_file = secured.directory / f"ca {case}.pem", secured.directory / f"cert {case}.pem"
    (other if case == "another CA" else secured.ca).cert_pem.write_to_path(ca_file)
    good = Path(secured.certificate("good"))
    match case:
        case "a certificate of another CA":
            bad = Path(secured.certificate(case, other))
        case "expired":
            bad = Path(secured.certificate(case, **EXPIRED))
        case _:
            bad = good
    cert_file.write_bytes(bad.read_bytes())
    settings: dict[str, Any] = {"security_protocol": "SSL", "tls_ca_file": str(ca_file), "connect_timeout_seconds": 5.0}
    if case != "no certificate":
        settings["tls_cert_file"] = str(cert_file)
    expected = {
        "another CA": "isn't believed: unable to get local issuer certificate",
        "no certificate": "refuses TLS: ",
        "a certificate of another CA": "refuses TLS: ",
        "expired": "refuses TLS: ",
    }[case]
    topic = await new_topic(Kafka(secured.server.bootstrap_servers, secured.server))
    secured.allow(topic)
    connection = await outbox_database.connect()
    await connection.execute(INSERT, topic)
    with relay_process(outbox_database.url, secured.ssl, kafka=settings) as relay:
        unavailable = await relay.event("kafka.unavailable")
        assert expected in unavailable["reason"], unavailable
        if case != "no certificate":
            secured.ca.cert_pem.write_to_path(ca_file)
            cert_file.write_bytes(good.read_bytes())
            await drained(connection)
        assert await relay.stop() == 0


async def test_a_wrong_password_is_told_and_a_right_one_is_used_without_a_restart(
    secured: Secured, outbox_database: Database
) -> None:
    topic = await new_topic(Kafka(secured.server.bootstrap_servers, secured.server))
    secured.allow(topic)
    connection = await outbox_database.connect()
    await connection.execute(INSERT, topic)
    password = Path(secured.secret("wrong-8d1e"))
    settings = secured.sasl("SCRAM-SHA-512", sasl_password={"file": str(password)})
    with relay_process(outbox_database.url, secured.sasl_ssl, kafka=settings) as relay:
        unavailable = await relay.event("kafka.unavailable")
        assert "refuses to authenticate: " in unavailable["reason"], unavailable
        assert "invalid credentials" in unavailable["reason"], unavailable
        password.write_text(f"{PASSWORD}\n")
        await drained(connection)
        assert await relay.stop() == 0
        assert "wrong-8d1e" not in relay.output().replace(str(password), "")


async def test_a_missing_acl_holds_the_topic_until_it_is_granted(secured: Secured, outbox_database: Database) -> None:
    forbidden, allowed = [await new_topic(Kafka(secured.server.bootstrap_servers, secured.server)) for _ in range(2)]
    secured.allow(allowed)
    connection = await outbox_database.connect()
    await connection.executemany(INSERT, [(forbidden,), (allowed,)])
    with relay_process(outbox_database.url, secured.sasl_ssl, kafka=secured.sasl("PLAIN")) as relay:
        refused = await relay.event("topic.refused")
        assert refused["topic"] == forbidden
        assert "grant this relay's user" in refused["reason"]
        await relay.event("claim.settled")
        secured.allow(forbidden)
        await drained(connection)
        assert (await relay.event("topic.accepted"))["topic"] == forbidden
        assert await relay.stop() == 0
