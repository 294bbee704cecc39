"""Two relays that anybody could write instead of taking one: the textbook's, and a competent one."""

from __future__ import annotations

from typing import ClassVar

from bench.arms.plain import PlainLoop


class Textbook(PlainLoop):
    """``send_and_wait`` and ``UPDATE`` for each row."""

    name: ClassVar[str] = "textbook"
    module: ClassVar[str] = "bench.arms.textbook_loop"
    slow: ClassVar[bool] = True
    note: ClassVar[str] = "order only as long as one process runs"


class Batched(PlainLoop):
    """Batches and several claims in flight, no features."""

    name: ClassVar[str] = "batched"
    module: ClassVar[str] = "bench.arms.batched_loop"
    note: ClassVar[str] = "order only as long as one process runs and nothing fails; no retries, no takeover"
