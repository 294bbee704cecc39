"""txoutbox, a relay from PyPI that polls and keeps order per key."""

from __future__ import annotations

from typing import ClassVar

from bench.arms.pypi import PypiArm


class Txoutbox(PypiArm):
    """One relay that marks."""

    name: ClassVar[str] = "txoutbox"
    ordered: ClassVar[bool] = True
    deletes: ClassVar[bool] = False
    slow: ClassVar[bool] = True
    note: ClassVar[str] = "txoutbox 0.2.2, rounds of 16,000, woken by NOTIFY."
    peer: ClassVar[str] = "txoutbox"
    pending: ClassVar[str] = "SELECT count(*) FROM outbox WHERE status = 'pending'"

    def insert(self, rows: str) -> str:
        return f"""
            INSERT INTO outbox (topic, key, payload)
            SELECT '{self.run.topic}', rows.key, convert_to(rows.payload, 'UTF8') FROM {rows} ORDER BY rows.n
        """
