"""Tests of fetching released models, from a local server."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import struct

import pytest
import torch

from admfast.checkpoints import fetch, fingerprint, shapes_of
from admfast.errors import CheckpointError, InvalidArgument, OutputError
from admfast.models.presets import MODELS, preset
from tests.tools.file_server import serving

fetching = importlib.import_module("admfast.checkpoints.fetch")  # in the package this name is the function
NAME, FILE = "64x64_classifier", "64x64_classifier.pt"


def saved(state: dict[str, torch.Tensor], **options) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


STATE = {"w": torch.arange(12_000.0).reshape(12, 1000)}
DATA = saved(STATE)
SERVER_S, CONTENT = "the server's own length", ("zip checksums", "keys and shapes")


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """Make the server's file the released one; return a function that changes facts of the model."""

    def give(**facts):
        monkeypatch.setitem(MODELS, NAME, dataclasses.replace(preset(NAME), **facts))

    give(fingerprint=fingerprint(shapes_of(STATE)))
    return give


@pytest.fixture
def server():
    with serving() as server:
        server.files[FILE] = DATA
        yield server


@pytest.fixture
def get(server, tmp_path):
    def run(name=NAME, **options):
        options = {"base_url": server.url, "wait": 0.0, "timeout": 5.0, "progress": False, **options}
        return fetch(name, tmp_path, **options)

    return run


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_fetches_a_model(get, server, tmp_path, system):
    done = get()
    assert done.path == tmp_path / FILE and done.path.read_bytes() == DATA
    assert (done.url, done.size) == (f"{server.url}/{FILE}", len(DATA))
    assert done.checked == (SERVER_S, *CONTENT) and names(tmp_path) == [FILE]
    server.files[FILE] = saved(STATE, _use_new_zipfile_serialization=False)
    assert get(overwrite=True).checked == (SERVER_S, "keys and shapes")


def test_facts_of_the_model_are_compared(get, model, tmp_path):
    sha256, md5 = hashlib.sha256(DATA).hexdigest(), hashlib.md5(DATA).hexdigest()
    model(size=len(DATA), sha256=sha256)
    assert get().checked == ("size", "sha256", *CONTENT)
    model(size=None, sha256=None, md5=md5)
    assert get(overwrite=True).checked == (SERVER_S, "md5", *CONTENT)
    for wrong in ({"sha256": "0" * 64}, {"sha256": None, "md5": "0" * 32}, {"md5": md5, "size": 1}):
        model(**wrong)
        with pytest.raises(CheckpointError, match="not the published file|1 are due"):
            get(overwrite=True)
        assert names(tmp_path) == [FILE], "only the old file should be left"


def test_takes_a_file_name_and_a_base_url_with_a_slash(get, server):
    assert get(FILE, base_url=server.url + "/").size == len(DATA)


def test_the_mirror_of_the_environment(get, server, monkeypatch):
    monkeypatch.setenv("ADMFAST_MIRROR", server.url)
    assert get(base_url=None).url.startswith(server.url)
    monkeypatch.setenv("ADMFAST_MIRROR", "ftp://example.org")
    with pytest.raises(InvalidArgument, match="ADMFAST_MIRROR='ftp://example.org'"):
        get(base_url=None, overwrite=True)


def test_without_a_mirror_the_published_place_is_meant(monkeypatch, tmp_path):
    monkeypatch.delenv("ADMFAST_MIRROR", raising=False)
    monkeypatch.setattr(fetching, "download", lambda remote, *given, **options: remote)
    assert fetch(NAME, tmp_path).url == preset(NAME).url
    assert preset(NAME).url.endswith(f"/diffusion/jul-2021/{NAME}.pt")


@pytest.mark.parametrize(
    "data, said",
    [
        (b"not a zip" * 1000, "text, not a weights file"),
        (DATA[:-100], "truncated"),
        (DATA.replace(struct.pack("<f", 7.0), struct.pack("<f", 9.0), 1), "damaged: .* fails its checksum"),
        (saved({"w": torch.zeros(3)}), f"not {NAME}: .* keys missing .*1 key unexpected"),
    ],
    ids=["text", "cut", "a flipped value", "another model"],
)
def test_what_is_not_the_model_is_discarded(get, server, tmp_path, data, said, system):
    server.files[FILE] = data
    with pytest.raises(CheckpointError, match=f"{said}.*; discarded") as caught:
        get()
    assert "\n" not in str(caught.value) and names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("64x64_clasifier", {}, "nearest: 64x64_classifier"),
        ("digits32_diffusion", {}, "ships with the package"),
        (NAME, {"base_url": "file:///tmp"}, "http:// or https://"),
        (NAME, {"base_url": "C:\\models"}, "http:// or https://"),
    ],
)
def test_what_cant_be_fetched(get, server, name, options, said):
    with pytest.raises(InvalidArgument, match=said):
        get(name, **options)
    assert server.requests == []


def test_a_folder_that_is_missing(server, tmp_path):
    with pytest.raises(OutputError, match="the folder .* does not exist"):
        fetch(NAME, tmp_path / "no", base_url=server.url)
