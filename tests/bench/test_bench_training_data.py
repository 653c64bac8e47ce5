"""Tests of the bench of training images: a row per source and workers, compared before timing."""

from __future__ import annotations

from pathlib import Path

import pytest

from admfast.training import samples
from bench import training_data
from bench.results import read_rows


def rows_of(folder: Path, *flags: str) -> list[dict]:
    arguments = ["--device", "cpu", "--quick", "--inside", "--out", str(folder), *flags]
    assert training_data.main(arguments) == 0
    return read_rows(folder / "training_data.jsonl")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(training_data, "PICTURES", 8)
    training_data.pictures.cache_clear()
    yield
    training_data.pictures.cache_clear()


@pytest.mark.slow
def test_every_source_is_measured_with_and_without_workers(tmp_path):
    rows = rows_of(tmp_path)
    assert {row["status"] for row in rows} == {"ok"}
    expected = {
        (f"training_{name}", "admfast", workers) for name in training_data.NAMES for workers in (0, 1)
    }
    expected |= {(f"training_{name}", "published", 0) for name in ("jpeg", "png")}
    assert {(row["kind"], row["provider"], row["shape"]["workers"]) for row in rows} == expected
    for row in rows:
        cores = training_data.H100_IMAGES / row["images_per_core_s"]
        assert row["cores_for_h100"] == pytest.approx(cores, rel=1e-3)
    assert "## Training images from the decoded cache" in (tmp_path / "training_data.md").read_text()


def test_other_pixels_are_not_timed(tmp_path, monkeypatch):
    cut = samples.center_crop
    monkeypatch.setattr(samples, "center_crop", lambda image, size: cut(image, size) ^ 1)
    rows = rows_of(tmp_path, "--only", "png")
    assert {row["provider"]: row["status"] for row in rows} == {"published": "ok", "admfast": "wrong"}
