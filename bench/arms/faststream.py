"""faststream-outbox, a relay from PyPI that polls; with one worker it keeps order, with more it doesn't."""

from __future__ import annotations

from typing import ClassVar

from bench.arms.pypi import PypiArm

_VERSION = "faststream-outbox 0.19.0"


class FaststreamOrdered(PypiArm):
    """Its documentation: "if you need strict per-aggregate ordering, […] run a single worker"."""

    name: ClassVar[str] = "faststream-outbox-1"
    ordered: ClassVar[bool] = True
    deletes: ClassVar[bool] = True
    slow: ClassVar[bool] = True
    note: ClassVar[str] = f"{_VERSION}, one worker, which is how it keeps order; fetches of 500, deleted by 100."
    peer: ClassVar[str] = "faststream"
    pending: ClassVar[str] = "SELECT count(*) FROM outbox"
    more_arguments: ClassVar[tuple[str, ...]] = ("1",)

    def insert(self, rows: str) -> str:
        # With the headers and the one notification that its own publish() makes.
        return f"""
            WITH woken AS MATERIALIZED (SELECT pg_notify('outbox_outbox', 'outbox_queue'))
            INSERT INTO outbox (queue, payload, headers)
            SELECT 'outbox_queue', convert_to(rows.payload, 'UTF8'), jsonb_build_object(
                'content-type', 'application/json', 'correlation_id', gen_random_uuid(), 'key', rows.key
            )
            FROM woken, {rows} ORDER BY rows.n
        """


class Faststream(FaststreamOrdered):
    """As fast as it goes."""

    name: ClassVar[str] = "faststream-outbox"
    ordered: ClassVar[bool] = False
    note: ClassVar[str] = f"{_VERSION}, 50 workers, so it doesn't keep order; fetches of 500, deleted by 100."
    more_arguments: ClassVar[tuple[str, ...]] = ("50",)
