"""Find the memory and processors that this process may use, within the limits of its container."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")
STATUS = Path("/proc/self/status")
# Of the standard, of GNU's OpenMP and of LLVM's, which is Intel's too.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def memory(mount: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes of memory that this process may hold: the host's, or less where a control group limits it.

    mount, own: where control groups (version 1 or 2) are mounted, and the file that names the process's own.
    """
    found = [_physical_memory()]
    for folder in _groups("memory", mount, own):
        # "max" in version 2 and a number near 2^63 in version 1 are no limit.
        found += _numbers(folder / "memory.max") + _numbers(folder / "memory.limit_in_bytes")
    return min(found)


def peak_memory(status: Path = STATUS) -> int:
    """Most bytes of the host's memory that this process held so far.

    status: where Linux says it. Its `ru_maxrss` begins with that of the process that started this one.
    """
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")):
            return int(found[1]) * 1024
    if sys.platform == "win32":
        counters = (ctypes.c_uint64 * 9)(72)  # PROCESS_MEMORY_COUNTERS, which begins with its length
        this_process = ctypes.c_void_p(-1)
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(this_process, counters, ctypes.sizeof(counters))
        return counters[1]
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _physical_memory() -> int:
    """Return the bytes of the machine's memory."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX, which begins with its length
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpus(mount: Path = CGROUPS, own: Path = OWN) -> int:
    """Processors that this process may keep busy: those it may run on, or fewer where it has a quota of time.

    A part of a processor counts as a whole one. mount, own: see `memory`.
    """
    return max(1, math.ceil(min(len(processors()), _quota(mount, own))))


def cores(topology: Path = TOPOLOGY) -> int:
    """Cores of the processors that this process may run on; several processors may share a core.

    topology: where the system describes each processor. One that it doesn't describe is a core of its own.
    """
    return len({_siblings(topology, processor) or str(processor) for processor in processors()})


@functools.cache
def _siblings(topology: Path, processor: int) -> str:
    """The processors of the core that a processor is part of, as the system writes them; "" if it doesn't."""
    try:
        return (topology / f"cpu{processor}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return ""


def processors() -> set[int]:
    """Return the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def wait_passively(environment: MutableMapping[str, str]) -> None:
    """Have OpenMP's threads sleep, not spin, while they wait for each other; a user's own choice stays.

    On a machine that others use as well, a thread that spins holds the processor which the one that it waits
    for needs. Read when OpenMP is loaded, which `import torch` does: to be called before, or for a child.
    """
    if not any(name in environment for name in PASSIVE):
        environment.update(PASSIVE)


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
