"""Tests of the training example: it trains on class folders, and its weights can be sampled."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

import admfast
from admfast.files.images import write_png

PATH = Path(__file__).resolve().parents[2] / "examples" / "train_on_a_folder.py"


def test_a_folder_becomes_a_model(tmp_path):
    spec = importlib.util.spec_from_file_location("train_on_a_folder", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    random = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "images" / ("dark" if i % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{i}.png", random.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    file = tmp_path / "model.safetensors"
    losses = module.train(tmp_path / "images", file, steps=3, batch_size=2, device="cpu")
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    pipe = admfast.load(file, device="cpu")
    assert pipe.config.num_classes == 2
    assert pipe.sample(classes=[0, 1], seeds=[0, 1], steps=2).shape == (2, 32, 32, 3)
    assert len(PATH.read_text().splitlines()) <= 60
