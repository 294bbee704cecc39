"""All arms, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.arms import Arm
from bench.arms.debezium import Debezium
from bench.arms.faststream import Faststream, FaststreamOrdered
from bench.arms.loops import Batched, Textbook
from bench.arms.ours import Delete, FourProcesses, Mark, Woken
from bench.arms.txoutbox import Txoutbox

#: In the order of tables.
ARMS: Mapping[str, Callable[[], Arm]] = {
    arm.name: arm
    for arm in (
        Mark,
        Delete,
        FourProcesses,
        Woken,
        Textbook,
        Batched,
        Debezium,
        Txoutbox,
        FaststreamOrdered,
        Faststream,
    )
}
