"""A relay process of an alternative: ``python -m bench.decisions.contender CANDIDATE CONFIG PROCESSES``.

It logs as the product does, and runs until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from bench.decisions.lanes import Candidate, opened, relay_all
from outbox_relay import logs
from outbox_relay.config import load
from outbox_relay.telemetry import Telemetry


async def _run(candidate: Candidate, path: Path, processes: int) -> None:
    config = load(path)
    logs.configure(config.log.level, config.log.format)
    telemetry = Telemetry(relay=config.relay.name)
    async with opened(candidate, config, telemetry, processes=processes) as sources:
        await relay_all(sources, config, telemetry, once=False)


if __name__ == "__main__":
    asyncio.run(_run(Candidate(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
