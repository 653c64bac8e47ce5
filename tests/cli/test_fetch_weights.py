"""Tests of `admfast fetch inception` and `admfast fetch dinov2`, from a local server of small files."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import socket

import pytest

from admfast.cli.main import main
from admfast.errors import AdmfastError
from admfast.evaluation import open_features
from admfast.evaluation.inception_weights import FILES, find_inception_weights
from admfast.evaluation.published_weights import PUBLISHED_WEIGHTS
from admfast.models.presets import MODELS, SYSTEMS
from tests.tools.file_server import serving

INCEPTION, CONFIG, DINOV2 = FILES[0], "dinov2-large/config.json", "dinov2-large/model.safetensors"


@pytest.fixture
def server(monkeypatch):
    """Serve random bytes under the names of the published files, and make them the published ones."""
    with serving() as server:
        for name, files in PUBLISHED_WEIGHTS.items():
            small = {}
            for place, remote in files.items():
                data = random.Random(place).randbytes(3_000_000 if place != CONFIG else 500)
                server.files[place.rpartition("/")[2]] = data
                sha256 = hashlib.sha256(data).hexdigest()
                small[place] = dataclasses.replace(remote, size=len(data), sha256=sha256)
            monkeypatch.setitem(PUBLISHED_WEIGHTS, name, small)
        yield server


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*given):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def fetch(server, tmp_path, capsys):
    """Return a function that runs the command, and returns its status, output and error."""

    def run(*words):
        status = main(["fetch", *words, "--out", str(tmp_path / "models"), "--base-url", server.url])
        return status, *capsys.readouterr()

    return run


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_weights_arrive_where_evaluate_looks_for_them(fetch, server, tmp_path):
    status, out, _ = fetch("inception", "dinov2")
    assert status == 0 and out.count("bytes, checked by size, sha256\n") == 3
    data = {place: server.files[place.rpartition("/")[2]] for place in (INCEPTION, CONFIG, DINOV2)}
    assert files(tmp_path / "models") == data and len(server.requests) == 3
    assert find_inception_weights(tmp_path / "models") == tmp_path / "models" / INCEPTION
    status, out, _ = fetch("dinov2", "inception")
    assert status == 0 and out.count("left as it is") == 3 and len(server.requests) == 3
    (tmp_path / "models" / CONFIG).write_text("{}")
    status, _, error = fetch("dinov2")
    assert status == 2 and "2 bytes, not the published 500" in error
    assert fetch("dinov2", "--overwrite")[0] == 0 and files(tmp_path / "models") == data


@pytest.mark.parametrize(
    ("name", "place"), [("inception", INCEPTION), ("dinov2", CONFIG), ("dinov2", DINOV2)]
)
def test_another_file_is_refused_and_discarded(fetch, server, tmp_path, name, place):
    file = place.rpartition("/")[2]
    server.files[file] = server.files[file][::-1]
    status, _, error = fetch(name)
    assert (
        status == 2 and f"{file}: not the published file: its sha256 is " in error and "; discarded" in error
    )
    assert set(files(tmp_path)) == ({f"models/{CONFIG}"} if place == DINOV2 else set())
    assert (tmp_path / "models").exists() == (place == DINOV2), "empty folders should be removed"


@pytest.mark.parametrize(("name", "place"), [("inception", INCEPTION), ("dinov2", DINOV2)])
def test_a_broken_download_is_resumed(fetch, server, tmp_path, name, place):
    server.plan = [""] * (len(PUBLISHED_WEIGHTS[name]) - 1) + ["cut"]
    status, _, error = fetch(name, "--retries", "0")
    kept = (tmp_path / "models" / f"{place}.part").stat().st_size
    assert status == 2 and "fetch again to continue" in error and kept == 1_000_000
    assert fetch(name)[0] == 0 and server.requests[-1]["Range"] == f"bytes={kept}-"
    assert files(tmp_path / "models")[place] == server.files[place.rpartition("/")[2]]


def test_the_mirror_of_the_environment_holds_them_too(server, monkeypatch, tmp_path):
    monkeypatch.setenv("ADMFAST_MIRROR", server.url)
    assert main(["fetch", "inception", "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == {INCEPTION: server.files[INCEPTION]}


@pytest.mark.parametrize("words", [[], ["incepton"]])
def test_the_error_without_a_known_name_lists_all(no_network, capsys, words):
    assert main(["fetch", *words]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in (*SYSTEMS, *MODELS, "inception", "dinov2"))
    assert error.startswith(
        "admfast: names='incepton'" if words else "admfast fetch: Missing argument 'NAMES...'"
    )


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_only_fetch_downloads(no_network, monkeypatch, tmp_path, name):
    with pytest.raises(AdmfastError, match=f"admfast fetch {name}"):
        open_features(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["models"]) == 0 and main(["evaluate", "nowhere.npz", "--features", name]) == 2
    with pytest.raises(AssertionError, match="a connection was opened"):
        main(["fetch", name])


def test_the_published_files():
    (place, inception), (config, _), (weights, _) = (
        item for files in PUBLISHED_WEIGHTS.values() for item in files.items()
    )
    assert inception.url.endswith(f"/{place}") and inception.sha256.startswith(place[-12:-4]), (
        "torch.hub's rule"
    )
    assert {config, weights} == {CONFIG, DINOV2}
    for remote in (remote for files in PUBLISHED_WEIGHTS.values() for remote in files.values()):
        assert remote.url.startswith("https://") and len(remote.sha256) == 64 and remote.size > 0
