from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from random import Random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from outbox_relay.checker import KINDS, Checker, Committed, Report, Seen, check
from outbox_relay.errors import CheckError
from outbox_relay.partitioner import partition_for

PARTITIONS = {"orders": 3, "bills": 2}
KEYS = (b"a", b"b", b"c", b"d", b"")
START = datetime(2024, 2, 29, 23, 59, 58, 120_000, UTC)


# What a relay without faults leaves in Kafka, from any ledger.


ROW_SHAPES = st.tuples(
    st.sampled_from(sorted(PARTITIONS)),
    st.sampled_from([None, *KEYS]),
    st.sampled_from([None, b"", b"\x00", b"value"]),
    st.sampled_from([None, "", "OrderPlaced"]),
    st.sampled_from([{}, {"x": ""}, {"x": "1", "ý": "ü"}]),
    st.booleans(),
)
LEDGER_SHAPES = st.lists(ROW_SHAPES, min_size=1, max_size=14)
# Seeds rather than st.randoms(), whose every draw is a choice of its own and slow.
RANDOMS = st.integers(0, 2**32).map(Random)
REPEATS = st.integers(0, 4)


def ledger_of(shapes: Sequence[Any], random: Random) -> list[Committed]:
    rows = []
    outbox_id = random.randint(-5, 5)
    for number, (topic, key, value, type_, headers, dated) in enumerate(shapes):
        outbox_id += random.randint(1, 3)
        created_at = START + timedelta(microseconds=number * 90_000)
        rows.append(
            Committed(
                outbox_id=outbox_id,
                event_id=str(UUID(int=0xABC << 64 | number)),
                topic=topic,
                key=key,
                value=b"" if key is None and value is None else value,
                type=type_,
                headers=headers,
                created_at=created_at if dated else None,
            )
        )
    return rows


def record_of(row: Committed, partition: int, offset: int = 0) -> Seen:
    headers: list[tuple[str, bytes | None]] = [("id", row.event_id.encode())]
    if row.type is not None:
        headers.append(("type", row.type.encode()))
    headers.append(("outbox-id", str(row.outbox_id).encode()))
    headers.append(("created_at", (row.created_at or START).isoformat().replace("+00:00", "Z").encode()))
    headers += [(name, value.encode()) for name, value in row.headers.items()]
    return Seen(row.topic, partition, offset, row.key, row.value, tuple(headers))


def home_of(row: Committed, random: Random) -> int:
    partitions = PARTITIONS[row.topic]
    return random.randrange(partitions) if row.key is None else partition_for(row.key, partitions)


def shuffled_within(records: Sequence[Seen], group_of: Callable[[Seen], Any], random: Random) -> list[Seen]:
    """Any interleaving that keeps the order inside each group."""
    waiting: dict[Any, list[Seen]] = {}
    for record in records:
        waiting.setdefault(group_of(record), []).append(record)
    turns = [group_of(record) for record in records]
    random.shuffle(turns)
    return [waiting[group].pop(0) for group in turns]


def first_occurrences(rows: Sequence[Committed], random: Random) -> list[Seen]:
    records = [record_of(row, home_of(row, random)) for row in rows]
    return shuffled_within(records, lambda record: (record.topic, record.key, _unless_keyed(record)), random)


def _unless_keyed(record: Seen) -> str | None:
    return event_id_of(record) if record.key is None else None


def with_repeats(records: list[Seen], repeats: int, random: Random) -> list[Seen]:
    records = list(records)
    for _ in range(repeats):
        position = random.randrange(len(records))
        records.insert(random.randint(position + 1, len(records)), records[position])
    return records


def as_read(records: Sequence[Seen], random: Random) -> list[Seen]:
    """The records with offsets, with gaps as transactions leave them; partitions mixed as a reader may."""
    next_offset: dict[tuple[str, int], int] = {}
    placed = []
    for record in records:
        position = (record.topic, record.partition)
        offset = next_offset.get(position, 0) + random.choice([0, 0, 1, 5])
        next_offset[position] = offset + 1
        placed.append(replace(record, offset=offset))
    return shuffled_within(placed, lambda record: (record.topic, record.partition), random)


@dataclass(frozen=True)
class Case:
    """A ledger, and a correct log of it in the order of writing, without offsets."""

    ledger: list[Committed]
    log: list[Seen]
    repeats: int
    random: Random

    def check(self, log: Sequence[Seen], partitions: Mapping[str, int] | None = PARTITIONS) -> Report:
        return check(self.ledger, as_read(log, self.random), partitions=partitions)


@st.composite
def cases(draw: st.DrawFn, *, repeated: bool = True) -> Case:
    random = draw(RANDOMS)
    ledger = ledger_of(draw(LEDGER_SHAPES), random)
    repeats = draw(REPEATS) if repeated else 0
    log = with_repeats(first_occurrences(ledger, random), repeats, random)
    return Case(ledger, log, repeats, random)


def damage(report: Report) -> dict[str, int]:
    return {kind: getattr(report, kind) for kind in KINDS if getattr(report, kind)}


def expected(**counts: int) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count}


def event_id_of(record: Seen) -> str:
    value = dict(record.headers)["id"]
    assert value is not None
    return value.decode()


# Sound.


@given(cases())
def test_correct_log_is_sound_and_its_repeats_are_counted(case: Case) -> None:
    report = case.check(case.log)
    assert damage(report) == expected(duplicates=case.repeats)
    assert report.sound
    assert sum(report.duplicate_ids.values()) == case.repeats
    assert (report.committed, report.published) == (len(case.ledger), len(case.ledger))
    assert report.records == len(case.log)


@given(cases(repeated=False))
def test_correct_log_is_sound_when_partition_counts_are_unknown(case: Case) -> None:
    assert damage(case.check(case.log, partitions=None)) == {}


def test_nothing_committed_and_nothing_in_kafka_is_sound() -> None:
    report = check([], [])
    assert report.sound
    assert damage(report) == {}


# Each kind of damage, and no other.


@given(cases(), st.data())
def test_dropped_event_is_lost_and_nothing_else(case: Case, data: st.DataObject) -> None:
    dropped = data.draw(st.sampled_from(case.ledger))
    log = [record for record in case.log if event_id_of(record) != dropped.event_id]
    extra = len(case.log) - len(log) - 1
    report = case.check(log)
    assert damage(report) == expected(lost=1, duplicates=case.repeats - extra)
    assert not report.sound
    assert report.published == len(case.ledger) - 1
    (example,) = report.examples["lost"]
    assert (example.event_id, example.outbox_id) == (dropped.event_id, dropped.outbox_id)


ID_HEADERS: list[tuple[str, bytes | None] | None] = [
    None,
    ("id", None),
    ("id", b""),
    ("id", b"\xff"),
    ("id", str(UUID(int=1)).encode()),
    ("id", str(UUID(int=0xABC << 64)).upper().encode()),
]


@given(cases(), st.data(), st.sampled_from(ID_HEADERS))
def test_foreign_record_is_invented_and_nothing_else(
    case: Case, data: st.DataObject, id_header: tuple[str, bytes | None] | None
) -> None:
    model = data.draw(st.sampled_from(case.log))
    headers = tuple(header for header in model.headers if header[0] != "id")
    foreign = replace(model, headers=headers if id_header is None else (id_header, *headers))
    log = list(case.log)
    log.insert(data.draw(st.integers(0, len(log))), foreign)
    report = case.check(log)
    assert damage(report) == expected(invented=1, duplicates=case.repeats)
    assert not report.sound


@given(cases(), st.data())
def test_swapped_first_occurrences_are_out_of_order_and_nothing_else(case: Case, data: st.DataObject) -> None:
    firsts: dict[tuple[str, bytes], dict[str, int]] = {}
    for position, record in enumerate(case.log):
        if record.key is not None:
            firsts.setdefault((record.topic, record.key), {}).setdefault(event_id_of(record), position)
    several = sorted((group for group in firsts.items() if len(group[1]) > 1), key=lambda group: group[0])
    assume(several)
    positions = sorted(data.draw(st.sampled_from(several))[1].values())
    low = data.draw(st.integers(0, len(positions) - 2))
    high = data.draw(st.integers(low + 1, len(positions) - 1))
    # A repeat right behind the place that its first occurrence leaves would become the first itself.
    assume(event_id_of(case.log[positions[low]]) not in map(event_id_of, case.log[positions[low] + 1 :]))
    log = list(case.log)
    log[positions[low]], log[positions[high]] = log[positions[high]], log[positions[low]]
    report = case.check(log)
    # The higher id now comes first, so all others from the lower one on are below it.
    assert damage(report) == expected(out_of_order=high - low, duplicates=case.repeats)
    assert not report.sound


def with_header(record: Seen, name: str, value: bytes | None) -> Seen:
    return replace(record, headers=tuple((n, value if n == name else v) for n, v in record.headers))


def without_header(record: Seen, name: str) -> Seen:
    return replace(record, headers=tuple(header for header in record.headers if header[0] != name))


def flipped(value: bytes | None) -> bytes:
    return bytes([value[0] ^ 1]) + value[1:] if value else b"\x00"


CORRUPTIONS: dict[str, tuple[str, Callable[[Seen], Seen]]] = {
    "topic": ("topic", lambda r: replace(r, topic="bills" if r.topic == "orders" else "orders")),
    "key": ("key", lambda r: replace(r, key=flipped(r.key))),
    "key dropped or made up": ("key", lambda r: replace(r, key=b"" if r.key is None else None)),
    "value": ("value", lambda r: replace(r, value=flipped(r.value))),
    "value emptied or made up": ("value", lambda r: replace(r, value=None if r.value else b"\x00")),
    "tombstone": ("value", lambda r: replace(r, value=b"" if r.value is None else None)),
    "own header": (
        "headers",
        lambda r: with_header(r, r.headers[-1][0], flipped(r.headers[-1][1])),
    ),
    "own header made null": ("headers", lambda r: with_header(r, r.headers[-1][0], None)),
    "own header dropped": ("headers", lambda r: replace(r, headers=r.headers[:-1])),
    "own header renamed": (
        "headers",
        lambda r: replace(r, headers=(*r.headers[:-1], ("z", r.headers[-1][1]))),
    ),
    "header added": ("headers", lambda r: replace(r, headers=(*r.headers, ("z", b"")))),
    "header twice": ("headers", lambda r: replace(r, headers=(*r.headers, r.headers[-1]))),
    "id twice": ("headers", lambda r: replace(r, headers=(*r.headers, r.headers[0]))),
    "type": ("headers", lambda r: with_header(r, "type", b"OrderLost")),
    "type dropped": ("headers", lambda r: without_header(r, "type")),
    "outbox-id": ("headers", lambda r: with_header(r, "outbox-id", b"77")),
    "outbox-id dropped": ("headers", lambda r: without_header(r, "outbox-id")),
    "created_at a microsecond later": (
        "headers",
        lambda r: with_header(r, "created_at", b"2024-02-29T23:59:58.120001Z"),
    ),
    "created_at in another zone": (
        "headers",
        lambda r: with_header(r, "created_at", b"2024-03-01T00:59:58.12+01:00"),
    ),
    "created_at not in RFC 3339": (
        "headers",
        lambda r: with_header(r, "created_at", b"2024-02-29T23:59:58.12+0000"),
    ),
    "created_at without zone": (
        "headers",
        lambda r: with_header(r, "created_at", b"2024-02-29T23:59:58.12"),
    ),
    "created_at on no day": (
        "headers",
        lambda r: with_header(r, "created_at", b"2024-02-30T23:59:58.12Z"),
    ),
    "created_at null": ("headers", lambda r: with_header(r, "created_at", None)),
    "created_at dropped": ("headers", lambda r: without_header(r, "created_at")),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@settings(max_examples=20)
@given(case=cases(repeated=False), data=st.data())
def test_changed_record_is_corrupted_and_nothing_else(corruption: str, case: Case, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(case.ledger))
    full_row = replace(row, type="OrderPlaced", headers={"x": "1"}, created_at=START)
    ledger = [full_row if other is row else other for other in case.ledger]
    log = first_occurrences(ledger, case.random)
    position = next(n for n, record in enumerate(log) if event_id_of(record) == row.event_id)
    part, corrupt = CORRUPTIONS[corruption]
    log[position] = corrupt(log[position])
    report = replace(case, ledger=ledger).check(log)
    assert damage(report) == expected(corrupted=1)
    assert not report.sound
    (example,) = report.examples["corrupted"]
    assert example.detail == f"differs in {part}"
    assert (example.event_id, example.outbox_id) == (row.event_id, row.outbox_id)


@given(cases(), st.data())
def test_repeat_with_other_contents_is_corrupted_besides_being_a_duplicate(case: Case, data: st.DataObject) -> None:
    repeated = data.draw(st.sampled_from(case.log))
    log = [*case.log, replace(repeated, value=flipped(repeated.value))]
    assert damage(case.check(log)) == expected(corrupted=1, duplicates=case.repeats + 1)


@given(cases(repeated=False), st.data())
def test_key_in_another_partition_than_javas_is_misplaced_and_nothing_else(case: Case, data: st.DataObject) -> None:
    keyed = [record for record in case.log if record.key is not None]
    assume(keyed)
    moved = data.draw(st.sampled_from(keyed))
    other = (moved.partition + 1) % PARTITIONS[moved.topic]
    log = [
        replace(record, partition=other) if (record.topic, record.key) == (moved.topic, moved.key) else record
        for record in case.log
    ]
    report = case.check(log)
    assert damage(report) == expected(misplaced=1)
    assert not report.sound
    assert report.examples["misplaced"][0].partition == other
    # One partition is as good as another to who doesn't know how many there are.
    assert damage(case.check(log, partitions=None)) == {}


@given(cases(repeated=False), st.data())
def test_key_in_two_partitions_is_misplaced_and_nothing_else(case: Case, data: st.DataObject) -> None:
    by_key: dict[tuple[str, bytes], list[int]] = {}
    for position, record in enumerate(case.log):
        if record.key is not None:
            by_key.setdefault((record.topic, record.key), []).append(position)
    several = [positions for positions in by_key.values() if len(positions) > 1]
    assume(several)
    positions = data.draw(st.sampled_from(several))
    log = list(case.log)
    for position in positions[data.draw(st.integers(1, len(positions) - 1)) :]:
        record = log[position]
        log[position] = replace(record, partition=(record.partition + 1) % PARTITIONS[record.topic])
    assert damage(case.check(log)) == expected(misplaced=1)
    assert damage(case.check(log, partitions=None)) == expected(misplaced=1)


@given(cases(), st.data())
def test_repeated_record_is_a_duplicate_and_nothing_else(case: Case, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(case.log) - 1))
    log = list(case.log)
    log.insert(data.draw(st.integers(position + 1, len(log))), log[position])
    report = case.check(log)
    assert damage(report) == expected(duplicates=case.repeats + 1)
    assert report.sound
    event_id = event_id_of(case.log[position])
    before = case.check(case.log).duplicate_ids
    assert report.duplicate_ids == {**before, event_id: before.get(event_id, 0) + 1}


@given(cases(), RANDOMS)
def test_counts_do_not_depend_on_how_partitions_were_interleaved(case: Case, random: Random) -> None:
    broken = list(case.log)
    random.shuffle(broken)
    broken = [replace(record, partition=random.randrange(2)) for record in broken]
    read = as_read(broken, random)
    again = shuffled_within(read, lambda record: (record.topic, record.partition), random)
    for partitions in (PARTITIONS, None):
        one, other = (damage(check(case.ledger, log, partitions=partitions)) for log in (read, again))
        assert one == other


# The definitions, by example.


def rows(*ids: int, key: bytes | None = b"a") -> list[Committed]:
    return [Committed(id_, f"event-{id_}", "orders", key, b"value") for id_ in ids]


def log_of(*ids: int, key: bytes | None = b"a", partition: int = 0) -> list[Seen]:
    return [record_of(row, partition, offset) for offset, id_ in enumerate(ids) for row in rows(id_, key=key)]


def copy_of(row: Committed, outbox_id: int) -> Committed:
    return replace(row, outbox_id=outbox_id, headers={"replay-of": str(row.outbox_id)})


def test_copies_of_a_replay_are_events_of_their_own() -> None:
    (first, second) = rows(1, 2)
    copies = [copy_of(first, 3), copy_of(second, 4), copy_of(first, 5)]
    ledger = [first, second, *copies]
    everything = [record_of(row, 0, offset) for offset, row in enumerate(ledger)]
    assert check(ledger, everything).sound
    assert check(ledger, everything).duplicates == 0
    assert check(ledger, everything[:-1]).lost == 1
    assert check([first, second], everything).invented == 3
    again = replace(everything[2], offset=5)
    assert check(ledger, [*everything, again]).duplicates == 1
    assert check(ledger, [*everything[:-1], replace(everything[-1], value=b"other")]).corrupted == 1


def test_a_row_that_comes_after_a_copy_with_a_higher_id_is_in_order() -> None:
    (first, late) = rows(1, 2)
    copy = copy_of(first, 3)
    log = [record_of(row, 0, offset) for offset, row in enumerate((first, copy, late))]
    assert check([first, late, copy], log).sound
    live = replace(copy, event_id="event-3", headers={})
    log = [record_of(row, 0, offset) for offset, row in enumerate((first, live, late))]
    assert check([first, late, live], log).out_of_order == 1


@pytest.mark.parametrize(
    ("log", "out_of_order", "duplicates"),
    [
        ((1, 2, 3), 0, 0),
        ((1, 2, 3, 1, 2, 3), 0, 3),
        ((1, 2, 1, 2, 3), 0, 2),
        ((2, 1, 3), 1, 0),
        ((3, 1, 2), 2, 0),
        ((3, 2, 1), 2, 0),
        ((2, 3, 1), 1, 0),
        ((1, 3, 1, 2), 1, 1),
        ((2, 1, 2, 1, 3), 1, 2),
    ],
)
def test_first_occurrence_below_the_highest_id_so_far_is_out_of_order(
    log: tuple[int, ...], out_of_order: int, duplicates: int
) -> None:
    report = check(rows(1, 2, 3), log_of(*log))
    assert damage(report) == expected(out_of_order=out_of_order, duplicates=duplicates)


def test_rows_without_a_key_promise_no_order_and_no_partition() -> None:
    log = [*log_of(3, 1, key=None), *log_of(2, key=None, partition=1)]
    assert damage(check(rows(1, 2, 3, key=None), log, partitions={"orders": 2})) == {}


def test_order_holds_for_each_topic_and_key_on_its_own() -> None:
    ledger = [
        Committed(1, "one", "orders", b"a", b""),
        Committed(2, "two", "orders", b"b", b""),
        Committed(3, "three", "bills", b"a", b""),
        Committed(4, "four", "orders", b"a", b""),
    ]
    log = [record_of(ledger[n], 0, offset) for offset, n in enumerate((2, 1, 0, 3))]
    assert damage(check(ledger, log)) == {}


def test_each_partition_of_a_stray_key_is_judged_for_order_on_its_own() -> None:
    log = [*log_of(3, 1), *log_of(5, 2, 4, 2, partition=1)]
    assert damage(check(rows(1, 2, 3, 4, 5), log)) == expected(misplaced=1, out_of_order=3, duplicates=1)


def test_event_whose_only_record_is_corrupted_is_not_lost_too() -> None:
    (record,) = log_of(1)
    assert damage(check(rows(1), [replace(record, value=b"other")])) == expected(corrupted=1)


@pytest.mark.parametrize("change", [{"key": b"b"}, {"topic": "bills"}])
@pytest.mark.parametrize("partition", [0, 1])
def test_record_with_a_corrupted_key_or_topic_is_not_judged_for_order_or_partition(
    change: dict[str, Any], partition: int
) -> None:
    first, second = log_of(2, 1, partition=partition_for(b"a", 2))
    log = [first, replace(second, partition=partition, **change)]
    assert damage(check(rows(1, 2), log, partitions={"orders": 2})) == expected(corrupted=1)


def test_order_of_headers_does_not_matter() -> None:
    ledger = [replace(rows(1)[0], headers={"x": "1", "y": "2"}, type="t")]
    record = record_of(ledger[0], 0)
    assert damage(check(ledger, [replace(record, headers=tuple(reversed(record.headers)))])) == {}


@pytest.mark.parametrize(
    ("committed", "published"),
    [
        ({"x": "yz"}, {"xy": "z"}),
        ({"x": "12", "y": "3"}, {"x": "1", "y": "23"}),
        ({"x": "1y2"}, {"x": "1", "y": "2"}),
        ({"x": "y", "z": ""}, {"x": "", "y": "z"}),
    ],
)
def test_header_boundaries_are_part_of_the_contents(committed: dict[str, str], published: dict[str, str]) -> None:
    ledger = [replace(rows(1)[0], headers=committed)]
    record = record_of(replace(ledger[0], headers=published), 0)
    assert damage(check(ledger, [record])) == expected(corrupted=1)


def test_null_header_is_not_an_empty_one() -> None:
    ledger = [replace(rows(1)[0], headers={"x": ""})]
    record = with_header(record_of(ledger[0], 0), "x", None)
    assert damage(check(ledger, [record])) == expected(corrupted=1)


@pytest.mark.parametrize(
    "text", [b"2024-02-29T23:59:58.12Z", b"2024-02-29T23:59:58.120000+00:00", b"2024-02-29T23:59:58.120Z"]
)
def test_created_at_is_compared_as_an_instant(text: bytes) -> None:
    elsewhere = START.astimezone(timezone(timedelta(hours=5, minutes=30)))
    ledger = [replace(rows(1)[0], created_at=elsewhere)]
    record = with_header(record_of(ledger[0], 0), "created_at", text)
    assert damage(check(ledger, [record])) == {}


def test_created_at_is_not_looked_at_where_the_ledger_has_none() -> None:
    (record,) = log_of(1)
    for other in (without_header(record, "created_at"), with_header(record, "created_at", b"once")):
        assert damage(check(rows(1), [other])) == {}


# The ledger and the reading must make sense themselves.


def test_ledger_with_an_event_twice_is_refused() -> None:
    with pytest.raises(CheckError, match="event-1 twice"):
        check([*rows(1), *rows(1)], [])


def test_ledger_with_a_time_without_zone_is_refused() -> None:
    with pytest.raises(CheckError, match="event-1 in the ledger has no time zone"):
        check([replace(rows(1)[0], created_at=START.replace(tzinfo=None))], [])


@pytest.mark.parametrize("offsets", [(0, 0), (5, 4)])
def test_reading_that_goes_back_is_refused(offsets: tuple[int, int]) -> None:
    one, other = (replace(record, offset=n) for record, n in zip(log_of(1, 2), offsets, strict=True))
    with pytest.raises(CheckError, match=r"orders partition 0 .* order of its offsets"):
        check(rows(1, 2), [one, other])


# The report.


def test_examples_are_limited_in_number_and_the_counts_are_not() -> None:
    report = check(rows(*range(1, 21)), [], examples_per_kind=3)
    assert report.lost == 20
    assert [example.outbox_id for example in report.examples["lost"]] == [1, 2, 3]
    assert "and 17 more" in report.describe()
    assert check(rows(1), [], examples_per_kind=0).examples == {}
    strangers = check([], log_of(*range(20)), examples_per_kind=3)
    assert strangers.invented == 20
    assert [example.offset for example in strangers.examples["invented"]] == [0, 1, 2]


def damaged_report() -> Report:
    secret = [
        Committed(n, f"event-{n}", "orders", b"s3cret-key", b"s3cret", headers={"x": "s3cret"}) for n in range(1, 6)
    ]
    record = [record_of(row, 0) for row in secret]
    log = [
        record[2],
        record[1],
        record[1],
        replace(record[3], value=b"s3cret 2"),
        replace(record[4], partition=1),
        replace(record[4], headers=(("id", b"stranger " + b"s" * 500 + b"s3cret"),)),
        replace(record[4], headers=()),
    ]
    return check(secret, [replace(r, offset=n) for n, r in enumerate(log)])


def test_every_kind_has_examples_with_ids_and_positions() -> None:
    report = damaged_report()
    assert damage(report) == {
        "lost": 1,
        "invented": 2,
        "duplicates": 1,
        "out_of_order": 1,
        "corrupted": 1,
        "misplaced": 1,
    }
    found = {kind: [(e.event_id, e.outbox_id, e.partition, e.offset) for e in report.examples[kind]] for kind in KINDS}
    assert found == {
        "lost": [("event-1", 1, None, None)],
        "invented": [("stranger " + "s" * 55, None, 0, 5), (None, None, 0, 6)],
        "duplicates": [("event-2", 2, 0, 2)],
        "out_of_order": [("event-2", 2, 0, 1)],
        "corrupted": [("event-4", 4, 0, 3)],
        "misplaced": [("event-5", 5, 1, 4)],
    }


def test_report_shows_no_keys_and_no_payloads() -> None:
    report = damaged_report()
    for text in (report.describe(), json.dumps(report.as_dict()), repr(report)):
        assert "s3cret" not in text


def test_report_as_dict_has_every_count_in_types_that_json_knows() -> None:
    report = damaged_report()
    as_dict = json.loads(json.dumps(report.as_dict()))
    assert as_dict["sound"] is False
    assert [as_dict[name] for name in ("committed", "published", "records", "removed_offsets")] == [5, 4, 7, 0]
    assert {kind: as_dict[kind] for kind in KINDS} == {kind: getattr(report, kind) for kind in KINDS}
    assert as_dict["examples"]["misplaced"] == [
        {
            "event_id": "event-5",
            "outbox_id": 5,
            "topic": "orders",
            "partition": 1,
            "offset": 4,
            "detail": "its key belongs to partition 0",
        }
    ]


def test_description_says_what_happened_to_whom() -> None:
    lines = damaged_report().describe().splitlines()
    assert lines[0] == "DAMAGED: 5 committed, 4 published, 7 records"
    assert "out of order          1" in lines
    assert (
        "    outbox id 2, event 'event-2', orders partition 0 offset 1: first met after outbox id 3 of its key" in lines
    )
    assert check(rows(1), log_of(1)).describe().startswith("sound: 1 committed, 1 published, 1 records")


def test_description_and_dict_say_how_much_could_not_be_read() -> None:
    report = replace(check(rows(1), log_of(1)), removed_offsets=7)
    assert "retention had removed 7 offsets" in report.describe().splitlines()[1]
    assert report.as_dict()["removed_offsets"] == 7
    assert "retention" not in replace(report, removed_offsets=0).describe()


def test_checker_reports_between_records_what_it_has_met_so_far() -> None:
    checker = Checker(rows(1, 2))
    assert checker.report().lost == 2
    for lost, record in zip((1, 0), log_of(1, 2), strict=True):
        checker.see(record)
        assert checker.report().lost == lost
