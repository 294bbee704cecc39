"""What the system says of processes."""

from __future__ import annotations

from pathlib import Path


def state_and_parent(pid: int) -> tuple[str, int] | None:
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return state, int(parent)


def is_alive(pid: int) -> bool:
    found = state_and_parent(pid)
    return found is not None and found[0] not in "ZX"


def family_of(pid: int) -> list[int]:
    """The process and all that descend from it."""
    parents = {int(path.name): state_and_parent(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    family = [pid]
    for member in family:
        family += [child for child, found in parents.items() if found is not None and found[1] == member]
    return family
