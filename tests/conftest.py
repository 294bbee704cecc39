from __future__ import annotations

import asyncio

# pytest-asyncio remembers "the loop of before" and thereby makes one that nobody closes, unless there is surely none.
asyncio.set_event_loop(None)
