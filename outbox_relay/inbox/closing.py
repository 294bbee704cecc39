"""The end of a partition's assignment, for work that waits in between."""

from __future__ import annotations

import asyncio


class Closing(asyncio.Event):
    """Set when the partition is being taken away."""

    async def rest(self, seconds: float) -> bool:
        """Wait before another try; False where the partition is being taken away, so that there is none."""
        try:
            await asyncio.wait_for(self.wait(), seconds)
        except TimeoutError:
            return True
        return False
