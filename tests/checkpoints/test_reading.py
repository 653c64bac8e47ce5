"""Tests of reading weights files: their contents, and a one-line error for every kind of bad file."""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from admfast.checkpoints import read_weights
from admfast.checkpoints.snapshots import write_snapshot
from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError, InvalidArgument
from admfast.models.description import Description
from tests.small import SMALL_UNET

STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, float("nan")])}


class RunsCode:
    """An object whose unpickling would call os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key].nan_to_num(7), value.nan_to_num(7)) and found[key].dtype == value.dtype


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reads_what_torch_saves(tmp_path, legacy, kind, dtype):
    state = kind((key, value.to(dtype)) for key, value in STATE.items())
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    weights = read_weights(tmp_path / "x.pt")
    assert_equal(weights.tensors, state)
    assert weights.description is None
    assert type(weights.tensors) is dict


def test_entry_chooses_an_average_of_a_run(tmp_path):
    averages = {"0.9": STATE, "0.99": {key: value + 1 for key, value in STATE.items()}}
    (tmp_path / "run.json").write_text(Description(SMALL_UNET).to_json())
    write_snapshot(tmp_path, 3, {"net": STATE, "averages": averages}, keep=None)
    for entry, name in ((None, "0.9"), ("0.9", "0.9"), ("0.99", "0.99"), (0.99, "0.99")):
        weights = read_weights(tmp_path, entry=entry)
        assert_equal(weights.tensors, averages[name])
        assert weights.entry == weights.description.training["average"] == name
    with pytest.raises(InvalidArgument, match="entry='0.5': .*0.9, 0.99"):
        read_weights(tmp_path, entry="0.5")


def test_reads_parameters_and_modules_state_dicts(tmp_path):
    net = torch.nn.Linear(2, 3)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    torch.save({"w": net.weight}, tmp_path / "b.pth")
    assert_equal(read_weights(tmp_path / "a.pt").tensors, net.state_dict())
    assert torch.equal(read_weights(tmp_path / "b.pth").tensors["w"], net.weight)


def test_reads_safetensors(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    assert_equal(
        dict(sorted(read_weights(tmp_path / "x.safetensors").tensors.items())), dict(sorted(STATE.items()))
    )


@pytest.mark.parametrize("how", ["saved over", "emptied"])
@pytest.mark.parametrize("ending", ["pt", "legacy.pt", "safetensors"])
def test_what_was_read_does_not_follow_the_file(tmp_path, ending, how):
    path = tmp_path / f"x.{ending}"

    def save(value):
        state = {"w": torch.full((100_000,), value)}
        if ending == "safetensors":
            save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=ending == "pt")

    save(3.0)
    held = read_weights(path).tensors["w"]
    if how == "emptied":
        os.truncate(path, 0)
    else:
        inode = path.stat().st_ino
        save(5.0)
        assert ending == "safetensors" or path.stat().st_ino == inode
    assert (held == 3.0).all()
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_reading_takes_the_memory_of_the_weights_once(tmp_path, ending):
    """The peak memory of a process that loads 64 tensors of 4 MiB grows by less than 1.3 times their size."""
    path = tmp_path / f"x.{ending}"
    state = {f"w{i}": torch.ones(2**20) for i in range(64)}
    torch.save(state, path) if ending == "pt" else save_file(state, path)
    program = (
        "import resource, sys; from admfast.checkpoints import read_weights\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); held = read_weights(sys.argv[1]); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert int(done.stdout) < 1.3 * 2**28, done.stderr


def test_a_flipped_bit_is_found(tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(struct.pack("<f", 1.5)) + 2] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pt: damaged: x/data/1 fails its checksum"):
        read_weights(tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt", checksums=False).tensors["a.bias"][0] != 1.5


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt: not a regular file"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "held, said",
    [
        ({"a": 1}, "no file of torch.save"),
        ([1, 2], "no file of torch.save"),
        (RunsCode("false"), "refused: unpickling it would call posix.system"),
    ],
    ids=["dict", "list", "code"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_bare_pickles_are_refused_in_one_line(tmp_path, recwarn, held, said, protocol):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(held, protocol=protocol))
    with pytest.raises(CheckpointError, match=said):
        read_weights(tmp_path / "x.pt")
    assert not recwarn.list


def test_the_description_beside_the_file_wins_over_the_header(tmp_path):
    beside = Description(SMALL_UNET, DiffusionConfig(steps=100))
    header = Description(SMALL_UNET, DiffusionConfig(steps=200))
    save_file(STATE, tmp_path / "x.safetensors", metadata={"admfast": header.to_json()})
    assert read_weights(tmp_path / "x.safetensors").description == header
    (tmp_path / "x.json").write_text(beside.to_json())
    assert read_weights(tmp_path / "x.safetensors").description == beside
    torch.save(STATE, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt").description == beside
    (tmp_path / "x.json").write_text(beside.to_json()[:-100])
    with pytest.raises(CheckpointError, match=r"x\.json: not JSON"):
        read_weights(tmp_path / "x.pt")
    (tmp_path / "x.json").write_text(beside.to_json().replace("admfast-1", "admfast-9"))
    with pytest.raises(CheckpointError, match=r"x\.json: not a description"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("text", ["{}", '{"image_size": 32, "lr": 1e-4}', "[1, 2]", "not JSON", "\xff\x00"])
def test_another_program_s_json_is_passed_over(tmp_path, text):
    header = Description(SMALL_UNET, DiffusionConfig(steps=200))
    save_file(STATE, tmp_path / "x.safetensors", metadata={"admfast": header.to_json()})
    torch.save(STATE, tmp_path / "x.pt")
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    for name, found in (("x.safetensors", header), ("x.pt", None)):
        weights = read_weights(tmp_path / name)
        assert weights.description == found
        (note,) = weights.notes
        assert "x.json" in note


def test_foreign_metadata_is_not_a_description(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_weights(tmp_path / "x.safetensors").description is None


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_by_name_and_not_run(tmp_path, legacy, protocol):
    victim = tmp_path / "ran"
    torch.save(
        {"w": torch.zeros(2), "x": RunsCode(f"touch {victim}")},
        tmp_path / "evil.pt",
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    with pytest.raises(CheckpointError, match=r"would call (posix|os|nt)\.system") as caught:
        read_weights(tmp_path / "evil.pt")
    assert "\n" not in str(caught.value) and "evil.pt" in str(caught.value)
    assert not victim.exists()


def test_a_handwritten_pickle_is_refused_by_name(tmp_path):
    """The GLOBAL opcode names `os system`, in a bare pickle and in the data.pkl of an archive."""
    program = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    (tmp_path / "bare.pt").write_bytes(program)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("zip/data.pkl", program)
        archive.writestr("zip/version", "3\n")
    for name in ("bare.pt", "zip.pt"):
        with pytest.raises(CheckpointError, match=r"would call os\.system"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([torch.zeros(1)], "holds a list, not a state dict"),
        (torch.zeros(1), "holds a tensor, not a state dict"),
        ({}, "an empty state dict"),
        ({"state": {}, "param_groups": []}, "the state of an optimiser"),
        ({"opt": {"state": {0: {"m": torch.zeros(1)}}, "param_groups": []}, "step": 1}, "optimiser.*entry="),
        ({"epoch": 3}, "no tensors by name .'epoch'"),
        ({1: torch.zeros(1)}, "no tensors by name .'1'"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_what_holds_no_state_dict_is_refused(tmp_path, value, said):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=said) as caught:
        read_weights(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def make_damaged(folder):
    torch.save({"w": torch.zeros(3000)}, folder / "whole.pt")
    save_file({"w": torch.zeros(3000), "v": torch.ones(4)}, folder / "whole.safetensors")
    data, safe = (folder / "whole.pt").read_bytes(), (folder / "whole.safetensors").read_bytes()
    torch.save({"w": torch.zeros(3000)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "cut.pt").write_bytes(data[:-300])
    (folder / "cut_early.pt").write_bytes(data[:40])
    (folder / "cut_old.pt").write_bytes((folder / "old.pt").read_bytes()[:-500])
    (folder / "spoiled.pt").write_bytes(data[:40] + bytes(300) + data[340:])
    (folder / "noise.pt").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty.pt").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "page.pt").write_text("  <!DOCTYPE html><title>404</title>")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (folder / "short.safetensors").write_bytes(safe[:5])
    (folder / "header.safetensors").write_bytes(safe[:60])
    (folder / "cut.safetensors").write_bytes(safe[:-4])
    (folder / "json.safetensors").write_bytes(struct.pack("<Q", 4) + b"[1]x" + bytes(100))
    (folder / "none.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    header = json.dumps({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "dtype.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with zipfile.ZipFile(folder / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "x")
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "program.pt")
    with tarfile.open(folder / "ancient.pt", "w") as tar:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            payload = pickle.dumps({}, 2)
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cut.pt", r"truncated: the zip central directory at its end is missing \([\d,]+ bytes are there\)"),
        ("cut_early.pt", "truncated: the zip central directory"),
        ("cut_old.pt", "truncated, or no file of torch.save"),
        ("spoiled.pt", "damaged"),
        ("noise.pt", "damaged, or no file of torch.save"),
        ("empty.pt", "the file is empty"),
        ("empty.safetensors", "the file is empty"),
        ("page.pt", "a web page"),
        ("pointer.pt", "a Git LFS pointer"),
        ("other.pt", "a zip archive without data.pkl"),
        ("program.pt", "a TorchScript program"),
        ("ancient.pt", "a tar archive"),
        *((f"{name}.safetensors", "not safetensors") for name in ("header", "cut", "json")),
        ("short.safetensors", "no file of torch.save or safetensors"),
        ("none.safetensors", "holds no tensors"),
        ("dtype.safetensors", "not safetensors"),
        ("", "a folder, not a weights file .holds "),
        ("whole.py", "no such file; similar names: whole.pt"),
        ("no/x.pt", "no such file; there is no folder"),
        ("whole.pt/x.pt", "no such file|Not a directory"),
    ],
)
def test_damage_is_said_in_one_line(tmp_path, name, said):
    make_damaged(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_weights(tmp_path / name)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(tmp_path / name)) and len(text) < 400 + len(str(tmp_path))


def test_a_missing_file_names_what_the_folder_holds(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no weights files"):
        read_weights(tmp_path / "x.pt")
    torch.save(STATE, tmp_path / "64x64_diffusion.pt")
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds 64x64_diffusion.pt"):
        read_weights(tmp_path / "zzz.pt")
    with pytest.raises(CheckpointError, match="similar names: 64x64_diffusion.pt"):
        read_weights(tmp_path / "64x64_difusion.pt")


def test_any_cut_of_a_file_is_refused(tmp_path):
    """A download that stopped at any byte is not accepted as a complete file."""
    torch.save({"w": torch.zeros(50), "v": torch.ones(3)}, tmp_path / "whole.pt")
    save_file({"w": torch.zeros(50), "v": torch.ones(3)}, tmp_path / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        data = (tmp_path / name).read_bytes()
        path = tmp_path / name.replace("whole", "cut")
        for length in [*range(0, len(data) - 1, 37), len(data) - 1]:
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError):
                read_weights(path)


@pytest.mark.parametrize(
    "content, said",
    [
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>BlobNotFound</Code></Error>', "web page"),
        ("<html><title>404</title></html>".encode("utf-16"), "web page"),
        ("<!DOCTYPE html><p>Seite nicht gefunden: fehlt f\u00fcr immer".encode(), "web page"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"404: Not Found", "text.*404"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS"),
        (gzip.compress(b"weights"), "gzip"),
        (bz2.compress(b"weights"), "bzip2"),
        (lzma.compress(b"weights"), "xz"),
        (bytes(4096), "zeros"),
        (b"PK\x05\x06" + bytes(18), "empty zip"),
        (b"\x93NUMPY" + bytes(100), "NumPy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("ending", ["pt", "safetensors", "ckpt"])
def test_what_is_no_weights_file_is_called_what_it_is(tmp_path, content, said, ending):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.{ending}: .*{said}") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250 + len(str(path))


def test_a_file_is_read_by_its_content_whatever_its_ending(tmp_path):
    torch.save(STATE, tmp_path / "a.safetensors")
    save_file(STATE, tmp_path / "b.pt")
    torch.save(STATE, tmp_path / "c.ckpt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.pt", "c.ckpt"):
        found = read_weights(tmp_path / name).tensors
        assert_equal({key: found[key] for key in STATE}, STATE)
