"""Tests of devices, and of limits of memory and processors from control groups and from systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from admfast import host
from admfast.errors import InvalidArgument, Unavailable
from tests.tools import elsewhere


@pytest.fixture
def groups(tmp_path: Path):
    """Return a function that writes a tree of control groups: files by path, and the process's own groups."""

    def write(own: str, **files: str) -> tuple[Path, Path]:
        for name, text in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "own").write_text(own)
        return tmp_path / "mount", tmp_path / "own"

    return write


WHOLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MEMORY = {
    "version 2": ("0::/pod/box\n", {"pod/box/memory.max": "max\n", "pod/memory.max": "4096\n"}, 4096),
    "version 2, own": ("0::/box\n", {"box/memory.max": "5000", "memory.max": "max"}, 5000),
    "version 1": ("4:memory:/box\n", {"memory/box/memory.limit_in_bytes": "6000\n"}, 6000),
    "version 1, the host's path": ("4:memory:/x/y\n", {"memory/memory.limit_in_bytes": "7000"}, 7000),
    "another controller": ("4:pids:/box\n", {"memory/box/memory.limit_in_bytes": "6000\n"}, WHOLE),
    "no limit": ("4:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, WHOLE),
    "nothing": ("", {}, WHOLE),
}


@pytest.mark.parametrize("own, files, wanted", MEMORY.values(), ids=MEMORY)
def test_memory_is_what_the_tightest_group_allows(groups, own, files, wanted):
    assert host.memory_limit(*groups(own, **files)) == wanted


QUOTA = {
    "version 2": ("0::/box\n", {"box/cpu.max": "100000 100000"}, 1),
    "version 2, part of one": ("0::/box\n", {"box/cpu.max": "50000 100000"}, 1),
    "version 2, none": ("0::/box\n", {"box/cpu.max": "max 100000"}, 64),
    "version 1": (
        "3:cpu,cpuacct:/\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        3,
    ),
    "version 1, none": ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
}


@pytest.mark.parametrize("own, files, wanted", QUOTA.values(), ids=QUOTA)
def test_processors_are_those_of_the_mask_within_the_quota(groups, own, files, wanted, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert host.usable_cpus(*groups(own, **files)) == wanted
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert host.usable_cpus(*groups(own, **files)) == 1


def test_a_machine_without_control_groups_is_whole(tmp_path):
    assert (
        host.memory_limit(tmp_path, tmp_path / "missing") == WHOLE
        and host.usable_cpus(tmp_path, tmp_path / "x") >= 1
    )


def test_memory_is_what_windows_says(windows, tmp_path):
    assert host.memory_limit(tmp_path, tmp_path / "missing") == elsewhere.MEMORY
    assert host.peak_memory(tmp_path / "missing") == elsewhere.PEAK


def test_the_peak_is_what_linux_says_else_what_the_process_used(tmp_path):
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  99 kB\nVmHWM:\t  12 kB\n")
    assert host.peak_memory(status) == 12 * 1024
    assert 2**20 < host.peak_memory(tmp_path / "missing") < WHOLE


def test_processors_that_share_a_core_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 7}, raising=False)
    assert host.usable_cores(tmp_path / "nothing") == 4
    for processor, siblings in {0: "0,4", 1: "1,5", 4: "0,4"}.items():
        folder = tmp_path / f"cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert host.usable_cores(tmp_path) == 3


@pytest.mark.parametrize("name", host.PASSIVE_WAIT)
def test_waiting_is_passive_where_the_user_says_nothing(name):
    environment = {"HOME": "/"}
    host.wait_passively(environment)
    assert environment == {"HOME": "/", **host.PASSIVE_WAIT}
    environment = {name: "1"}
    host.wait_passively(environment)
    assert environment == {name: "1"}


def test_a_device_is_found_or_refused():
    assert host.resolve_device("cpu") == host.resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert host.resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("meta", "nonsense", 1.5):
        with pytest.raises(InvalidArgument, match="device="):
            host.resolve_device(device)
    with pytest.raises(Unavailable, match="device='cuda:99'"):
        host.resolve_device("cuda:99")
