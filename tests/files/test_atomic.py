"""Tests of atomic writes: a file is written completely or not at all, and a failure keeps the old file."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from admfast.errors import AdmfastError, OutputError
from admfast.files.atomic import (
    atomic_folder,
    atomic_open,
    atomic_path,
    check_writable,
    folder_removed_if_empty,
    output_error,
    write_bytes,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_bytes_and_text(tmp_path):
    write_bytes(tmp_path / "a", b"\x00one")
    write_text(tmp_path / "b", "zwei\r\n\u00e4")
    assert (tmp_path / "a").read_bytes() == b"\x00one"
    assert (tmp_path / "b").read_bytes() == "zwei\r\n\u00e4".encode()
    assert names(tmp_path) == ["a", "b"]


def test_replaces_only_at_the_end(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    with atomic_open(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
        with atomic_path(tmp_path / "b") as temporary:
            temporary.unlink()
            descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600)  # as safetensors does
            os.write(descriptor, b"y")
            os.close(descriptor)
    finally:
        os.umask(before)
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name


@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "no", "other")]
)
@pytest.mark.parametrize("manager", [atomic_open, atomic_path])
def test_an_exception_of_the_block_passes_and_changes_nothing(tmp_path, manager, error):
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(type(error)) as caught, manager(target) as sink:
        if manager is atomic_open:
            sink.write(b"half")
        else:
            sink.write_bytes(b"half")
        raise error
    assert caught.value is error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("manager", [atomic_open, atomic_path])
@pytest.mark.parametrize(
    ("place", "reason"),
    [("missing/a", "the folder"), ("file/a", "is not a folder"), (".", "it is a folder")],
)
def test_a_place_that_cant_be_written(tmp_path, manager, place, reason):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match=reason) as caught, manager(tmp_path / place):
        pytest.fail("the block must not run")
    assert str(tmp_path / place) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, AdmfastError)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_place_is_tried_without_a_trace(tmp_path, system):
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old")
    check_writable(tmp_path / "new")
    assert names(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"
    for place, reason in (
        ("no/file", "does not exist"),
        (".", "a folder, not a file"),
        ("old/x", "not a folder"),
    ):
        with pytest.raises(OutputError, match=reason):
            check_writable(tmp_path / place)


@pytest.mark.parametrize("there", [[], ["a"], ["a", "a/b"]], ids=["none", "a", "b"])
def test_a_folder_goes_with_a_block_that_puts_nothing_into_it(tmp_path, there):
    for folder in there:
        (tmp_path / folder).mkdir()
    before, place = sorted(tmp_path.rglob("*")), tmp_path / "a/b"
    with contextlib.suppress(ZeroDivisionError), folder_removed_if_empty(place):
        assert place.is_dir()
        raise ZeroDivisionError
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(OutputError), folder_removed_if_empty(place / ("x" * 300)):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    with folder_removed_if_empty(place):
        (place / "file").write_text("")
    assert (place / "file").exists()


@pytest.mark.parametrize("there", [None, [], ["old", "mine"]], ids=["missing", "empty", "filled"])
def test_the_files_of_a_folder_come_all_at_the_end(tmp_path, there, system):
    folder = tmp_path / "a/b"
    for name in there or ():
        (folder / "in").mkdir(parents=True, exist_ok=True)
        (folder / "in" / name).write_text("before")
    if there is not None:
        folder.mkdir(parents=True, exist_ok=True)
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}

    def fill(temporary: Path) -> None:
        (temporary / "in").mkdir()
        for name in ("old", "new"):
            (temporary / "in" / name).write_text("after")

    with contextlib.suppress(ZeroDivisionError), atomic_folder(folder) as temporary:
        fill(temporary)
        raise ZeroDivisionError
    assert {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == before
    with atomic_folder(folder) as temporary:
        fill(temporary)
        assert not (folder / "in" / "new").exists()
    found = {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {**({"mine": "before"} if there else {}), "old": "after", "new": "after"}
    assert names(tmp_path / "a") == ["b"]


def test_a_killed_process_leaves_a_folder_as_it_was(tmp_path):
    program = """
        import os, pathlib, signal
        from admfast.files.atomic import atomic_folder
        with atomic_folder(pathlib.Path("x")) as place:
            (place / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    [left] = names(tmp_path)
    assert left.startswith(".x.") and left.endswith(".tmp")


def test_a_device_is_not_replaced():
    with pytest.raises(OutputError, match="a device, not a file"):
        write_bytes("/dev/full", b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "real").read_text() == "new"


def test_a_folder_that_vanishes_while_writing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(OutputError, match="does not exist"), atomic_open(folder / "a") as file:
        file.write(b"x")
        for entry in folder.iterdir():
            entry.unlink()
        folder.rmdir()


WRITERS = {
    "bytes": "write_bytes(target, b'x' * 300_000)",
    "path": "with atomic_path(target) as t: t.write_bytes(b'x' * 300_000)",
    "savez": "write_streamed(target, (10, 100, 100, 3), np.zeros((10, 100, 100, 3), np.uint8))",
    "png": "write_png(target, np.random.default_rng(0).integers(0, 256, (400, 400, 3)).astype(np.uint8))",
    "small writes": "with atomic_open(target) as f: [f.write(b'x' * 1000) for _ in range(300)]",
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_a_full_disk(tmp_path, writer):
    """A limit on the file size stands in for a full disk: writes fail in the same way, without root."""
    (tmp_path / "target").write_text("old")
    program = f"""
        import numpy as np
        from pathlib import Path
        from admfast.errors import OutputError
        from admfast.files.atomic import *
        from admfast.files.images import *
        from admfast.files.npz import *
        target = Path("target")
        try:
            {writer}
        except OutputError as error:
            print(error)
        else:
            raise SystemExit("no error")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "target: not written: the file would exceed the largest size allowed here\n"
    assert (tmp_path / "target").read_text() == "old"
    assert names(tmp_path) == ["target"]


def test_no_space_is_said_even_where_the_writer_hides_it(tmp_path, monkeypatch):
    """torch.save turns a failed write into a RuntimeError about positions."""
    with pytest.raises(OutputError, match="the disk is full"), atomic_open(tmp_path / "a") as file:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file.fileno())
        os.close(full)
        try:
            file.write(b"x" * 100_000)
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598") from None
    assert names(tmp_path) == []


def test_a_failed_write_that_the_writer_passes_over(tmp_path):
    with pytest.raises(OutputError, match="the disk is full"), atomic_open(tmp_path / "a") as file:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file.fileno())
        os.close(full)
        with contextlib.suppress(OSError):
            file.write(b"x" * 100_000)
    assert names(tmp_path) == []


def test_concurrent_writers_do_not_mix(tmp_path):
    target = tmp_path / "a"
    with atomic_open(target) as one, atomic_open(target) as two:
        one.write(b"1" * 1000)
        two.write(b"2" * 1000)
    assert target.read_bytes() == b"1" * 1000  # `one` ends last and wins
    assert names(tmp_path) == ["a"]


def test_a_very_long_name(tmp_path):
    write_bytes(tmp_path / ("n" * 255), b"x")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"x"
    with pytest.raises(OutputError, match="too long"):
        write_bytes(tmp_path / ("n" * 256), b"x")
    assert len(names(tmp_path)) == 1


def test_unknown_errors_keep_the_systems_words():
    assert str(output_error("a/b", OSError(32, "Broken pipe"))) == "a/b: not written: Broken pipe"
