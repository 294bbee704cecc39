"""What is sent in which batches, and who is blamed, against a producer that answers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiokafka import errors as kafka_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox_relay import publisher as publisher_module
from outbox_relay.blame import Fault, fault_of
from outbox_relay.errors import PublisherUnavailableError
from outbox_relay.message import Delivered, Outcome, Record, Released, Retry, Scope
from outbox_relay.partitioner import Partition
from outbox_relay.publication import Publication, size_bytes
from outbox_relay.publisher import KafkaPublisher
from outbox_relay.telemetry import Telemetry
from tests.fakes import line, record


@dataclass
class Broker:
    """What stands behind the fake producers."""

    partitions: dict[str, int] = field(default_factory=lambda: {"t": 1})
    error_for: Callable[[Record], Exception | None] = lambda _: None
    reachable: bool = True
    written: dict[Partition, list[Record]] = field(default_factory=dict)
    batches: list[tuple[Partition, int]] = field(default_factory=list)
    producers: int = 0

    def ids(self) -> list[int]:
        return [record.id for records in self.written.values() for record in records]


class FakeProducer:
    """As :class:`outbox_relay.producer.Producer`, answering from a :class:`Broker`. Usable until a batch failed."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._usable = True
        self.records_sent = 0

    def partition_count(self, topic: str) -> int:
        return self._broker.partitions.get(topic, 0)

    def obstacle(self, partition: Partition) -> Exception | None:
        missing = partition[1] >= self.partition_count(partition[0])
        return kafka_errors.UnknownTopicOrPartitionError() if missing else None

    async def refresh(self) -> bool:
        return self._broker.reachable

    async def send(self, partition: Partition, records: Sequence[Record]) -> asyncio.Future[object]:
        assert self._usable, "a producer is finished after a failed batch"
        self.records_sent += len(records)
        self._broker.batches.append((partition, len(records)))
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        error = next((error for each in records if (error := self._broker.error_for(each))), None)
        if error is not None:
            asyncio.get_running_loop().call_soon(self._finish)  # others of the same round still go
            answer.set_exception(error)
        else:
            self._broker.written.setdefault(partition, []).extend(records)
            answer.set_result(None)
        return answer

    async def abandon(self) -> None:
        self._finish()

    def _finish(self) -> None:
        self._usable = False


async def connected(broker: Broker, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> KafkaPublisher:
    class Producers:
        @staticmethod
        async def connect(_: Mapping[str, Any], __: float) -> FakeProducer:
            if not broker.reachable:
                raise PublisherUnavailableError("down")
            broker.producers += 1
            return FakeProducer(broker)

    monkeypatch.setattr(publisher_module, "Producer", Producers)
    usual: dict[str, Any] = {"batch_bytes": 524_288, "publish_warn_seconds": 1.0, "publish_deadline_seconds": 2.0}
    publisher = KafkaPublisher(
        ["nowhere:1"],
        Telemetry(),
        client_id="test",
        compression="none",
        connect_timeout_seconds=1.0,
        request_timeout_seconds=1.0,
        **{**usual, **settings},
    )
    await publisher.connect()
    return publisher


def ours() -> bool:
    return True


def too_large(record: Record) -> Exception | None:
    return kafka_errors.MessageSizeTooLargeError() if record.value == b"bad" else None


def of_kind(outcomes: Sequence[Outcome], kind: type[Outcome]) -> list[int]:
    return [outcome.record.id for outcome in outcomes if isinstance(outcome, kind)]


rows = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from([b"good"] * 4 + [b"bad"])), max_size=40
)
hypothesis_settings = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@hypothesis_settings
@given(rows=rows, partitions=st.integers(1, 3), batch_rows=st.integers(1, 12), blame=st.sampled_from([0.0, 1000.0]))
async def test_a_refused_row_halts_its_key_alone_and_what_was_written_is_what_counts_as_delivered(
    rows: list[tuple[str | None, bytes]],
    partitions: int,
    batch_rows: int,
    blame: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [record(id_, key, value=value) for id_, (key, value) in enumerate(rows, 1)]
    broker = Broker({"t": partitions}, too_large)
    monkeypatch.setattr(publisher_module, "_BLAME_SECONDS", blame)
    publisher = await connected(
        broker, monkeypatch, batch_bytes=61 + batch_rows * max(map(size_bytes, records), default=1)
    )
    # Given back, and claimed again, until nothing is left that isn't behind a refused row.
    refused: dict[object, int] = {}
    for _ in range(len(records) + 1):
        sent = set(broker.ids())
        offered = [each for each in records if each.id not in sent and line(each) not in refused]
        outcomes = await publisher.publish(offered, ours)
        assert [outcome.record for outcome in outcomes] == offered
        assert set(of_kind(outcomes, Delivered)) == set(broker.ids()) - sent
        for outcome in outcomes:
            if isinstance(outcome, Retry):
                assert outcome.scope is Scope.ROW
                assert outcome.record.value == b"bad"
                refused[line(outcome.record)] = outcome.record.id
    first_bad: dict[object, int] = {}
    for each in records:
        if each.value == b"bad":
            first_bad.setdefault(line(each), each.id)
    assert refused == first_bad
    assert sorted(broker.ids()) == [each.id for each in records if each.id < first_bad.get(line(each), 10**9)]
    for written in broker.written.values():
        for key in ("a", "b", "c"):
            ids = [each.id for each in written if each.key == key.encode()]
            assert ids == sorted(ids)


async def test_one_bad_row_among_a_thousand_is_found_in_some_forty_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker(error_for=too_large)
    publisher = await connected(broker, monkeypatch)
    records = [record(n, f"k{n}", value=b"bad" if n == 700 else b"good") for n in range(1, 1001)]
    outcomes = await publisher.publish(records, ours)
    assert of_kind(outcomes, Retry) == [700]
    assert len(of_kind(outcomes, Delivered)) == 999
    assert len(broker.batches) <= 40
    assert broker.producers <= 20


async def test_other_partitions_go_on_while_a_row_at_fault_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker({"t": 1, "other": 1}, too_large)
    publisher = await connected(broker, monkeypatch, batch_bytes=1024)
    suspicious = [record(n, f"k{n}", value=b"bad" if n == 1 else b"good") for n in range(1, 9)]
    others = [record(n, f"k{n}", topic="other", value=bytes(400)) for n in range(9, 13)]
    await publisher.publish(suspicious + others, ours)
    partitions = [partition for (partition, _), _ in broker.batches]
    assert partitions[:4] == ["t", "other", "t", "other"]


#: Error codes that aiokafka tries again by itself, so that the publisher meets them as TimeoutError, or sees the
#: obstacle itself; of those that Kafka may answer to a batch.
TRIED_AGAIN = {3, 5, 6, 7, 19, 20, 56}
ANSWERS = {-1, 2, 10, 17, 18, 21, 29, 31, 32, 35, 42, 43, 44, 45, 47, 48, 49, 53, 59, 87}


def test_it_is_known_which_answers_are_tried_again_by_the_client() -> None:
    assert {code for code in TRIED_AGAIN | ANSWERS if kafka_errors.for_code(code).retriable} == TRIED_AGAIN


@pytest.mark.parametrize(
    "error",
    [*(kafka_errors.for_code(code)() for code in sorted(ANSWERS)), kafka_errors.ProducerFenced(), TimeoutError()],
    ids=repr,
)
async def test_only_a_row_at_fault_is_blamed_and_other_topics_flow(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker({"t": 1, "other": 1}, lambda each: error if each.topic == "t" else None)
    publisher = await connected(broker, monkeypatch)
    outcomes = await publisher.publish([record(1), record(2, topic="other")], ours)
    fault = fault_of(error)
    assert isinstance(outcomes[0], Retry)
    assert outcomes[0].error == type(error).__name__
    assert outcomes[0].scope is (Scope.ROW if fault is Fault.ROW else Scope.TOPIC)
    assert isinstance(outcomes[1], Delivered)
    assert publisher.ready
    assert broker.producers == 2 + (fault is Fault.PRODUCER), "once more, and not in a loop"


async def test_a_batch_that_a_producer_s_numbering_spoilt_is_sent_again_whole_and_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = Broker()
    broker.error_for = lambda _: kafka_errors.OutOfOrderSequenceNumber() if broker.producers == 1 else None
    publisher = await connected(broker, monkeypatch)
    outcomes = await publisher.publish([record(n) for n in range(1, 11)], ours)
    assert of_kind(outcomes, Delivered) == list(range(1, 11))
    assert broker.batches == [(("t", 0), 10)] * 2


async def test_an_error_without_a_name_is_a_rows_only_if_its_partition_takes_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(each: Record) -> Exception | None:
        return kafka_errors.UnknownError() if each.value == b"bad" or each.topic == "in trouble" else None

    broker = Broker({"t": 1, "in trouble": 1}, fails)
    publisher = await connected(broker, monkeypatch)
    records = [record(n, f"k{n}", "t", b"bad" if n == 3 else b"good") for n in range(1, 6)]
    records += [record(n, f"k{n}", "in trouble") for n in range(11, 16)]
    outcomes = await publisher.publish(records, ours)
    assert of_kind(outcomes, Delivered) == [1, 2, 4, 5]
    scopes = {outcome.record.id: outcome.scope for outcome in outcomes if isinstance(outcome, Retry)}
    assert scopes == {3: Scope.ROW} | dict.fromkeys(range(11, 16), Scope.TOPIC)


async def test_without_kafka_nobody_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()

    def fails(_: Record) -> Exception:
        broker.reachable = False
        return kafka_errors.KafkaConnectionError()  # type: ignore[no-any-return]

    broker.error_for = fails
    publisher = await connected(broker, monkeypatch)
    assert await publisher.publish([record(1), record(2, topic="missing")], ours) == [
        Released(record(1)),
        Released(record(2, topic="missing")),
    ]
    assert not publisher.ready
    assert await publisher.publish([record(1)], ours) == [Released(record(1))]


async def test_a_topic_counts_as_missing_only_when_kafka_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()
    publisher = await connected(broker, monkeypatch)
    (outcome,) = await publisher.publish([record(1, topic="missing")], ours)
    assert isinstance(outcome, Retry)
    assert outcome.scope is Scope.TOPIC
    assert outcome.reason.startswith("create the topic")
    broker.reachable = False
    assert await publisher.publish([record(1, topic="missing")], ours) == [Released(record(1, topic="missing"))]
    assert not publisher.ready


async def test_a_record_that_no_broker_takes_is_refused_unsent_behind_those_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = Broker()
    publisher = await connected(broker, monkeypatch)
    monkeypatch.setattr(publisher_module, "REQUEST_BYTES", 10_000)
    records = [record(1), record(2, value=bytes(10_001)), record(3), record(4, "other")]
    outcomes = await publisher.publish(records, ours)
    assert [type(outcome) for outcome in outcomes] == [Delivered, Retry, Released, Delivered]
    assert isinstance(outcomes[1], Retry)
    assert (outcomes[1].scope, outcomes[1].error) == (Scope.ROW, "RecordTooLargeError")
    assert sorted(broker.ids()) == [1, 4]
    assert broker.producers == 1


async def test_the_batches_of_a_round_fit_into_one_request_together(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker({"t": 6})
    publisher = await connected(broker, monkeypatch)
    monkeypatch.setattr(publisher_module, "REQUEST_BYTES", 3_000)
    rounds: list[int] = []
    next_round = Publication.next_round

    def recorded(publication: Publication) -> dict[Partition, list[Record]]:
        round_ = next_round(publication)
        rounds.append(sum(size_bytes(each) for batch in round_.values() for each in batch))
        return round_

    monkeypatch.setattr(Publication, "next_round", recorded)
    records = [record(n, f"k{n}", value=bytes(900)) for n in range(1, 31)]
    outcomes = await publisher.publish(records, ours)
    assert of_kind(outcomes, Delivered) == list(range(1, 31))
    assert max(rounds) <= 3_000
    assert rounds[-1] == 0


async def test_nothing_is_sent_once_the_claim_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()
    publisher = await connected(broker, monkeypatch, batch_bytes=1024)
    answers = iter([True, False])
    outcomes = await publisher.publish([record(n, value=bytes(900)) for n in (1, 2, 3)], lambda: next(answers))
    assert [type(outcome) for outcome in outcomes] == [Delivered, Released, Released]
    assert broker.ids() == [1]


async def test_records_without_a_key_spread_over_all_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker({"t": 6})
    publisher = await connected(broker, monkeypatch)
    for n in range(1, 13):
        await publisher.publish([record(n, None)], ours)
    assert {number: len(written) for (_, number), written in broker.written.items()} == dict.fromkeys(range(6), 2)


async def test_a_producer_is_made_anew_before_its_sequence_numbers_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()
    publisher = await connected(broker, monkeypatch, records_per_producer=10)
    for n in range(1, 36):
        assert of_kind(await publisher.publish([record(n)], ours), Delivered) == [n]
    assert broker.ids() == list(range(1, 36))
    assert broker.producers == 4


@given(
    key=st.none() | st.binary(max_size=300),
    value=st.none() | st.binary(max_size=300),
    headers=st.lists(st.tuples(st.text(max_size=40), st.binary(max_size=40)), max_size=8),
    batch=st.integers(1, 200),
)
def test_the_size_of_a_record_is_never_underestimated(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]], batch: int
) -> None:
    from aiokafka.record.default_records import DefaultRecordBatchBuilder

    each = Record(1, "e", "t", key, value, headers)
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, 0, 2**31 - 1)
    for offset in range(batch):
        builder.append(offset, 1_800_000_000_000, key, value, headers)
    assert builder.size() <= 61 + batch * size_bytes(each)
