"""All arms, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.arms import Arm

#: In the order of tables.
ARMS: Mapping[str, Callable[[], Arm]] = {}
