"""What this process may use of its machine: memory and processors, within the limits of its container."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory(mount: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes of memory that this process may hold: the host's, or less where a control group limits it.

    mount, own: where control groups (version 1 or 2) are mounted, and the file that names the process's own.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _groups("memory", mount, own):
        # "max" in version 2 and a number near 2^63 in version 1 are no limit.
        found += _numbers(folder / "memory.max") + _numbers(folder / "memory.limit_in_bytes")
    return min(found)


def cpus(mount: Path = CGROUPS, own: Path = OWN) -> int:
    """Processors that this process may keep busy: those it may run on, or fewer where it has a quota of time.

    A part of a processor counts as a whole one. mount, own: see `memory`.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(there, _quota(mount, own))))


@functools.cache
def _quota(mount: Path, own: Path) -> float:
    """Processors' worth of time; infinite without a limit. Read once: it is asked for at every call."""
    found = [math.inf]
    for folder in _groups("cpu", mount, own):
        first = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        for share in (_numbers(folder / "cpu.max"), first):
            # "max 100000", or a quota of -1, is no limit.
            if len(share) == 2 and min(share) > 0:
                found.append(share[0] / share[1])
    return min(found)


def _groups(controller: str, mount: Path, own: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in: its own, and those around it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        # Version 1 mounts a tree for each set of controllers, under their names.
        root = mount / controllers if controllers else mount
        place = Path(path.lstrip("/"))
        # Inside a container the path may be the host's, of which there is nothing here but the root.
        yield from (root / part for part in (place, *place.parents))


def _numbers(path: Path) -> list[int]:
    """The whole numbers in a file; none where it isn't there."""
    try:
        words = path.read_text().split()
    except OSError:
        return []
    return [int(word) for word in words if word.lstrip("-").isdigit()]
