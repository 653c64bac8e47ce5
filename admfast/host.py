"""Find the memory, processors and GPU that this process may use, within the limits of its container."""

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
from typing import TYPE_CHECKING

from admfast.errors import Unavailable, invalid

if TYPE_CHECKING:
    import torch

CGROUPS, PROCESS_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
PROCESS_STATUS = Path("/proc/self/status")
# Variables of the OpenMP standard, of GNU's library, and of LLVM's, which Intel uses too.
PASSIVE_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def memory_limit(mount: Path = CGROUPS, cgroup_file: Path = PROCESS_CGROUP) -> int:
    """Return the bytes of memory that this process may hold: the host's, or a control group's lower limit.

    mount: where control groups (version 1 or 2) are mounted. cgroup_file: names the groups of the process.
    """
    limits = [_physical_memory()]
    for folder in _cgroup_folders("memory", mount, cgroup_file):
        # "max" in version 2 and a number near 2^63 in version 1 are no limit.
        limits += _numbers(folder / "memory.max") + _numbers(folder / "memory.limit_in_bytes")
    return min(limits)


def peak_memory(status: Path = PROCESS_STATUS) -> int:
    """Return the most bytes of the host's memory that this process has held so far.

    status: file in which Linux reports it. `ru_maxrss` is not used there: it begins at the parent's value.
    """
    with contextlib.suppress(OSError):
        if peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")):
            return int(peak[1]) * 1024
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


def usable_cpus(mount: Path = CGROUPS, cgroup_file: Path = PROCESS_CGROUP) -> int:
    """Return how many processors this process may keep busy: those it may run on, or fewer under a CPU quota.

    A fraction of a processor counts as one. mount, cgroup_file: see `memory_limit`.
    """
    return max(1, math.ceil(min(len(processor_ids()), _cpu_quota(mount, cgroup_file))))


def usable_cores(topology: Path = CPU_TOPOLOGY) -> int:
    """Return the number of cores that this process may run on; several processors may share a core.

    topology: folder with the system's description of each processor. One without it counts as one core.
    """
    return len({_core_siblings(topology, processor) or str(processor) for processor in processor_ids()})


@functools.cache
def _core_siblings(topology: Path, processor: int) -> str:
    """Return the processors that share a processor's core, in the system's own text; "" if it has none."""
    try:
        return (topology / f"cpu{processor}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return ""


def processor_ids() -> set[int]:
    """Return the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def wait_passively(environment: MutableMapping[str, str]) -> None:
    """Make OpenMP's threads sleep, not spin, while they wait for each other, unless the user chose already.

    On a shared machine, a thread that spins can hold the processor that the thread it waits for needs. OpenMP
    reads these variables when `import torch` loads it: call this before, or for a child process.
    """
    if not any(name in environment for name in PASSIVE_WAIT):
        environment.update(PASSIVE_WAIT)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the requested device; for None, a GPU if there is one. Raises InvalidArgument, Unavailable."""
    import torch  # takes seconds, and `wait_passively` must come before it

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise invalid("device", device, "cpu, cuda, or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise invalid("device", device, "cpu, cuda, or cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise Unavailable(f"device={str(device)!r}: this machine has {count} usable CUDA devices")
    return resolved


@functools.cache
def _cpu_quota(mount: Path, cgroup_file: Path) -> float:
    """Return the CPU quota in processors, infinite without a limit. Read once, as every call needs it."""
    quotas = [math.inf]
    for folder in _cgroup_folders("cpu", mount, cgroup_file):
        version_1 = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        for quota_and_period in (_numbers(folder / "cpu.max"), version_1):
            # "max 100000", or a quota of -1, is no limit.
            if len(quota_and_period) == 2 and min(quota_and_period) > 0:
                quotas.append(quota_and_period[0] / quota_and_period[1])
    return min(quotas)


def _cgroup_folders(controller: str, mount: Path, cgroup_file: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in: its own, and those that contain it."""
    try:
        lines = cgroup_file.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 mounts a tree for each set of controllers, under their names.
        root = mount / controllers if controllers else mount
        group = Path(path.lstrip("/"))
        # Inside a container the path may be the host's, of which only the root exists here.
        yield from (root / folder for folder in (group, *group.parents))


def _numbers(path: Path) -> list[int]:
    """Return the whole numbers in a file; none if it can't be read."""
    try:
        words = path.read_text().split()
    except OSError:
        return []
    return [int(word) for word in words if word.lstrip("-").isdigit()]
