"""Count processes and threads against the limit of the user, and find those that a process has started (Linux)."""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipelines.errors import ResourceError

RAY_TASKS = 400
"""Processes and threads of Ray and the actors of a small run: 377. With 150, Ray waits for itself until it gives up."""

_PROC = Path("/proc")
_EXEMPT = 1 << 21 | 1 << 24  # CAP_SYS_ADMIN, CAP_SYS_RESOURCE


def check_process_limit() -> None:
    """Raise ResourceError if this user may not start as many processes and threads as Ray needs."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit == resource.RLIM_INFINITY or _is_exempt():
        return
    num_free = max(0, limit - _count_tasks(os.getuid()))
    if num_free < RAY_TASKS:
        raise ResourceError(
            f"Ray needs about {RAY_TASKS} processes and threads, but this user may start only {num_free} more (ulimit "
            f"-u is {limit}); raise that limit, or end other processes of this user"
        )


def list_descendants(*pids: int) -> list[int]:
    """Return the ids of the processes that these have started, and of those that these have started, and so on."""
    children = defaultdict(list)
    for pid, fields in _read_stats():
        children[int(fields[1])].append(pid)
    found = list(pids)
    for pid in found:
        found += children[pid]
    return found[len(pids) :]


def read_descendants_cpu_s(pid: int) -> float:
    """Return the CPU seconds of the running processes that a process has started, and of those that these have."""
    descendants = set(list_descendants(pid))
    ticks = sum(int(fields[11]) + int(fields[12]) for pid, fields in _read_stats() if pid in descendants)
    return ticks / os.sysconf("SC_CLK_TCK")


def _is_exempt() -> bool:
    """Return whether the limit does not apply to this process."""
    with suppress(OSError):
        lines = (_PROC / "self" / "status").read_text().splitlines()
        return any(int(line.split()[1], 16) & _EXEMPT for line in lines if line.startswith("CapEff:"))
    return False


def _count_tasks(uid: int) -> int:
    """Return the number of threads of all processes of a user."""
    return sum(int(fields[17]) for pid, fields in _read_stats() if _read_owner(pid) == uid)


def _read_owner(pid: int) -> int | None:
    with suppress(OSError):
        return (_PROC / str(pid)).stat().st_uid
    return None


def _read_stats() -> Iterator[tuple[int, list[str]]]:
    """Yield process id and the fields after the name of each process: state, parent ..."""
    for path in _PROC.glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            yield int(path.parent.name), path.read_text().rpartition(")")[2].split()
