"""The peers' bench takes one preset a run, goes on to the next, and keeps what was compiled."""

from __future__ import annotations

import os

import pytest
import torch

from bench import peers
from bench.case import Settings
from bench.command import UNFINISHED
from bench.results import ResultFile, read_rows
from bench.sampling import choice
from bench.sampling.choice import Choice
from bench.sampling.subject import TINY

FLAGS = ["--device", "cpu", "--precisions", "fp32", "--peers", "eager", "--guided-diffusion", ""]


@pytest.fixture
def two_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.SYSTEMS, "cpu", ("tiny",))
    monkeypatch.setitem(choice.BATCHES, "cpu", (1, 2))
    monkeypatch.setattr(choice, "subjects", lambda: {"tiny": TINY})
    monkeypatch.setattr("bench.sampling.bout.ROUNDS", 1)
    monkeypatch.setitem(choice.BOUT_SECONDS, "cpu", 0.01)


def test_one_preset_a_run(two_pairs: None, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.peers.matmul.cases", lambda settings: ())
    flags = [*FLAGS, "--out", str(tmp_path)]
    assert peers.main(flags) == UNFINISHED
    assert "tiny, batch 2" in capsys.readouterr().out
    batches = {row["shape"]["batch"] for row in read_rows(tmp_path / "peers.jsonl")}
    assert batches == {1}
    assert peers.main(flags) == 0
    rows = read_rows(tmp_path / "peers.jsonl")
    assert {row["shape"]["batch"] for row in rows} == {1, 2}
    # Without its checkout the peer is a row that says so, and stands in nobody's way.
    assert {row["status"] for row in rows} == {"ok", "none"}


def test_a_pair_that_ended_in_an_error_does_not_hold_up_the_next(tmp_path) -> None:
    settings = Settings(torch.device("cpu"))
    every = Choice(((TINY, 1), (TINY, 2)), ("fp32",), (), "")
    results = ResultFile(tmp_path / "peers.jsonl")
    assert peers.unmeasured(every, results, settings) == every
    first = next(every.cases(settings))
    key = peers.row_key(
        first.kind, first.dtype, first.provider, first.shape, peers.device_name(settings.device)
    )
    results.append({"key": key, "status": "error"})
    assert peers.unmeasured(every, results, settings).pairs == ((TINY, 2),)


def test_what_was_compiled_is_kept_in_a_folder(
    two_pairs: None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert peers.main([*FLAGS, "--out", str(tmp_path), "--budget", "1e-9"]) == UNFINISHED
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "peers.cache")
    assert peers.main(["--batches", "none"]) == 2
