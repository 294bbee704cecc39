"""All arms, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.arms import Arm
from bench.arms.debezium import Debezium

#: In the order of tables.
ARMS: Mapping[str, Callable[[], Arm]] = {arm.name: arm for arm in (Debezium,)}
