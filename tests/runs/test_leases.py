"""Tests of leases: one process holds each, and one other takes it over when the first is dead."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from admfast.errors import OutputError
from admfast.runs import leases as module
from admfast.runs.leases import Leases, machine_id, newest_generation, newest_leases, parse_lease

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from admfast.runs.leases import Leases
assert "torch" not in sys.modules
lease = Leases(Path(sys.argv[1]), heartbeat=0.05).acquire("a")
print("held" if lease else "not held", flush=True)
time.sleep(60)
"""


class Clock:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds the lease "a", with its standard output read up to that."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write_foreign(folder: Path, count: int, generation: int = 0) -> Path:
    """Write a lease as a process of another machine does."""
    folder.mkdir(exist_ok=True)
    path = folder / f"a.{generation}"
    path.write_text(json.dumps({"machine": "other", "host": "far", "pid": 1, "locked": True, "count": count}))
    return path


def test_one_process_holds_a_lease_until_it_releases_it(tmp_path, holder):
    own = Leases(tmp_path, lifetime=0)
    assert own.acquire("a") is None and own.acquire("a") is None
    other = own.acquire("b")
    assert other is not None and not other.is_lost()
    assert sorted(newest_leases(tmp_path)) == ["a", "b"]
    other.release()
    assert newest_generation(tmp_path, "b") is None and own.acquire("b") is not None


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_process_of_this_machine_is_noticed_at_once(tmp_path, holder):
    own = Leases(tmp_path)
    assert own.acquire("a") is None
    holder.send_signal(signal.SIGKILL)
    holder.wait(30)
    lease = own.acquire("a")
    assert lease is not None and lease.path.name == "a.1"
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_stopped_and_not_dead_keeps_its_lease_by_the_lock(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    own = Leases(tmp_path, lifetime=0.1)
    for _ in range(4):
        assert own.acquire("a") is None
        time.sleep(0.1)
    holder.send_signal(signal.SIGCONT)


def test_the_heartbeat_counts_and_reports(tmp_path):
    made = [0]
    lease = Leases(tmp_path, heartbeat=0.02).acquire("a", lambda: {"images": made[0]})
    first = parse_lease(lease.path.read_bytes())
    assert first["machine"] == machine_id() and first["pid"] == os.getpid() and first["images"] == 0
    made[0] = 64
    end = time.monotonic() + 20
    while parse_lease(lease.path.read_bytes()).get("images") != 64 and time.monotonic() < end:
        time.sleep(0.01)
    later = parse_lease(lease.path.read_bytes())
    assert later["count"] > first["count"] and later["images"] == 64
    lease.release()


def test_a_lease_of_another_machine_is_judged_by_its_changes_on_our_own_clock(tmp_path):
    clock = Clock()
    own = Leases(tmp_path, lifetime=60, clock=clock)
    path = write_foreign(tmp_path, 1)
    assert own.acquire("a") is None
    clock.now += 59
    assert own.acquire("a") is None
    write_foreign(tmp_path, 2)
    clock.now += 59
    assert own.acquire("a") is None, "it changed since it was seen"
    clock.now += 59
    assert own.acquire("a") is None
    clock.now += 2
    lease = own.acquire("a")
    assert lease is not None and lease.path.name == "a.1" and path.exists()
    lease.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("jump", [-(10**6), 10**6])
def test_wall_clocks_that_jump_and_times_of_files_count_for_nothing(tmp_path, monkeypatch, jump):
    clock = Clock()
    own = Leases(tmp_path, lifetime=60, clock=clock)
    path = write_foreign(tmp_path, 1)
    assert own.acquire("a") is None
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    os.utime(path, (real() + jump, real() + jump))
    clock.now += 59
    assert own.acquire("a") is None
    clock.now += 1
    assert own.acquire("a") is not None


def test_of_many_that_take_a_lease_over_one_gets_it(tmp_path):
    for attempt in range(20):
        folder, clock = tmp_path / str(attempt), Clock()
        write_foreign(folder, 1)
        own = [Leases(folder, lifetime=60, clock=clock) for _ in range(4)]
        assert [one.acquire("a") for one in own] == [None] * 4
        clock.now += 60
        start, taken = threading.Barrier(4), []

        def take(one, start=start, taken=taken):
            start.wait()
            taken.append(one.acquire("a"))

        threads = [threading.Thread(target=take, args=(one,)) for one in own]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [lease for lease in taken if lease is not None]
        winner.release()


def test_the_first_holder_notices_that_it_lost_the_lease(tmp_path):
    lease = Leases(tmp_path, heartbeat=0.02).acquire("a")
    assert not lease.is_lost()
    later = write_foreign(tmp_path, 1, generation=1)
    assert lease.is_lost()
    lease.release()
    assert later.exists(), "it removed the lease of its successor"


def test_without_file_locks_the_heartbeat_is_enough(tmp_path, monkeypatch):
    def refused(descriptor):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(module, "lock", refused)
    clock = Clock()
    first = Leases(tmp_path, heartbeat=1e9).acquire("a")
    own = Leases(tmp_path, lifetime=60, clock=clock)
    assert own.acquire("a") is None
    clock.now += 59
    assert own.acquire("a") is None
    clock.now += 1
    second = own.acquire("a")
    assert second is not None and first.is_lost()


def test_a_folder_that_another_process_removes_is_no_error(tmp_path, monkeypatch):
    """The process that finishes the last shard removes the folder, while others look for work."""
    own = module.make_folder
    monkeypatch.setattr(module, "make_folder", lambda folder: (own(folder), folder.rmdir()))
    assert Leases(tmp_path / "leases").acquire("a") is None
    monkeypatch.undo()
    assert Leases(tmp_path / "leases").acquire("a") is not None


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not written"):
        Leases(tmp_path / "file").acquire("a")
