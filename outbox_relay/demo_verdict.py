"""What came of the demo: its numbers, and whether they are good."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from outbox_relay.checker import Committed, Report
from outbox_relay.demo_screen import Row, Screen


class Charges(NamedTuple):
    """What the payment service did."""

    charged: int  #: charges
    orders: int  #: orders that were charged and are in the database
    repeats: int  #: records that were sent again on purpose


@dataclass(frozen=True, slots=True)
class Numbers:
    """What came of it."""

    committed: int  #: orders that the service committed
    rolled_back: int  #: orders that it rolled back
    published_at_kill: int  #: rows marked as sent when the relay had been killed
    published: int  #: of the committed orders, those that Kafka holds in the end
    lost: int  #: of the committed orders, those that it doesn't
    invented: int  #: records of no committed order
    duplicates: int  #: records of a committed order beyond its first
    out_of_order: int  #: first records behind a later one of the same customer
    charged: int  #: charges that the payment service committed
    seconds: float

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The numbers, and behind them the checker's report and the payment service's charges."""

    numbers: Numbers
    report: Report
    charges: Charges

    @property
    def is_relay_sound(self) -> bool:
        """Nothing lost, invented, out of order, corrupted or in a wrong partition."""
        return self.report.sound and not self.numbers.lost

    @property
    def is_each_charged_once(self) -> bool:
        """As many charges as orders, and no order without one."""
        return self.charges.charged == self.charges.orders == self.numbers.committed

    @property
    def sound(self) -> bool:
        """The relay did no damage, and each order was charged once."""
        return self.is_relay_sound and self.is_each_charged_once


def expected_rows(table: Iterable[Committed], committed: Collection[str]) -> list[Committed]:
    """The outbox table's rows, but for those of which the service doesn't know that it committed them."""
    return [row for row in table if row.event_id in committed]


def judge(
    committed: Collection[str],
    rolled_back: Collection[str],
    published_at_kill: int,
    report: Report,
    charges: Charges,
    seconds: float,
) -> Verdict:
    """``committed`` and ``rolled_back`` are the event ids that the service remembers, ``report`` is a check against
    :func:`expected_rows`.
    """
    numbers = Numbers(
        committed=len(committed),
        rolled_back=len(rolled_back),
        published_at_kill=published_at_kill,
        published=report.published,
        # Not the report's, which knows nothing of rows that are gone from the table.
        lost=len(committed) - report.published,
        invented=report.invented,
        duplicates=report.duplicates,
        out_of_order=report.out_of_order,
        charged=charges.charged,
        seconds=round(seconds, 1),
    )
    return Verdict(numbers, report, charges)


def show_verdict(verdict: Verdict, screen: Screen, *, is_mock: bool) -> None:
    """The table, and in words what it comes to."""
    numbers, report, charges = verdict.numbers, verdict.report, verdict.charges
    rows = [
        Row("committed", f"{numbers.committed}", "orders, each with its outbox row"),
        Row("rolled back", f"{numbers.rolled_back}", "orders and their rows, on purpose"),
        Row("sent at the kill", f"{numbers.published_at_kill}", "rows marked as sent when the relay died"),
        Row("published", f"{numbers.published}", "committed orders that are in Kafka", not numbers.lost),
        Row("lost", f"{numbers.lost}", "committed orders that are not", not numbers.lost),
        Row("invented", f"{numbers.invented}", "records of no committed order", not numbers.invented),
        Row("duplicates", f"{numbers.duplicates}", "records that the relay sent again"),
        Row(
            "out of order", f"{numbers.out_of_order}", "orders behind later ones of their key", not numbers.out_of_order
        ),
    ]
    if report.corrupted:
        rows.append(Row("corrupted", f"{report.corrupted}", "records that differ from their row", False))
    if report.misplaced:
        rows.append(Row("misplaced", f"{report.misplaced}", "customers in a partition that isn't theirs", False))
    rows.append(Row("charged", f"{numbers.charged}", _charged(charges), verdict.is_each_charged_once))
    rows.append(Row("seconds", f"{numbers.seconds}", "from the start of the servers to their end"))
    screen.table(rows)
    where = " (on a mock of Kafka, which proves little)" if is_mock else ""
    screen.line("Rows in flight at a kill are sent again; consumers drop repeats by header `id`, as the inbox does.")
    if not verdict.is_relay_sound:
        screen.line(f"The relay did damage{where}: {report.describe()}", good=False)
    if not verdict.is_each_charged_once:
        # Whose fault that is isn't said: what the relay lost can't be charged.
        screen.line(
            f"Not each order was charged once{where}: {charges.charged} charges, of {charges.orders} orders"
            f" where {numbers.committed} were committed",
            good=False,
        )
    if verdict.sound:
        screen.line(f"Nothing was lost, invented or out of order, and each order was charged once{where}.", good=True)


def _charged(charges: Charges) -> str:
    return f"charges, one an order is right; {charges.repeats} records more came again, on purpose"
