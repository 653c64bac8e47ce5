"""Tests that crops, flips, files and classes of training images equal the published ones exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.files.levels import from_uint8
from admfast.files.sources import open_source
from admfast.training.crops import cacheable_part, center_crop, random_crop
from admfast.training.images import check_classes
from admfast.training.samples import Samples
from tests.parity.golden import cases, load_json, load_npz

FOLDER = cases("training", pattern="images/config.json")


def recorded(drawn: np.ndarray, least: int):
    """Return a `draw` that gives the three recorded draws in turn; the first one is relative to `least`."""
    values = iter([int(drawn[0]) - least, int(drawn[1]), int(drawn[2])])

    def draw(count: int) -> int:
        value = next(values)
        assert 0 <= value < count
        return value

    return draw


def as_published(image: np.ndarray) -> np.ndarray:
    """Convert uint8 [H, W, C] to float32 [C, H, W] in [-1, 1]."""
    return from_uint8(torch.from_numpy(image[None].copy()))[0].numpy()


@pytest.mark.parametrize("path", FOLDER)
def test_crops(path: Path):
    config, golden = load_json(path), load_npz(path.with_name("crops"))
    compared = 0
    for i in range(len(config["images"])):
        image = golden[f"img{i}"]
        for size in config["sizes"]:
            wanted = golden[f"center_img{i}_size{size}"]
            assert np.array_equal(center_crop(image, size), wanted)
            assert np.array_equal(center_crop(cacheable_part(image, size, random=False), size), wanted)
            for seed in config["crop_seeds"]:
                name = f"random_img{i}_size{size}_seed{seed}"
                for source in (image, cacheable_part(image, size, random=True)):
                    draw = recorded(golden[f"{name}_draws"], size)
                    assert np.array_equal(random_crop(source, size, draw), golden[name]), name
                compared += 1
        name = f"random_img{i}_size64_frac0.5_0.75"
        draw = recorded(golden[f"{name}_draws"], 86)  # 64 / 0.75, rounded up
        assert np.array_equal(random_crop(image, 64, draw, 0.5, 0.75), golden[name])
        compared += 1
    assert compared == sum("_draws" in name for name in golden)


@pytest.mark.parametrize("path", FOLDER)
def test_files_classes_and_items(path: Path):
    config, golden = load_json(path), load_npz(path.with_name("dataset"))
    files = path.parent / "files"
    source = open_source(files, "prefixes")
    assert [source.name(i) for i in range(len(source))] == [
        str(files / name) for name in config["file_order"]
    ]
    assert source.labels == open_source(files).labels
    check_classes(source, 3)
    size = config["image_size_dataset"]
    for i in range(len(source)):
        image = source.decode(i)
        assert np.array_equal(as_published(center_crop(image, size)), golden[f"item{i}_x"])
        assert source.labels is not None and source.labels[i] == golden[f"item{i}_y"]
        drawn = golden[f"aug{i}_draws"]
        augmented = random_crop(image, size, recorded(drawn, size))
        augmented = augmented[:, ::-1] if drawn[3] < 0.5 else augmented
        assert np.array_equal(as_published(augmented), golden[f"aug{i}_x"])


@pytest.mark.parametrize("path", FOLDER)
def test_the_published_batch_is_among_the_samples(path: Path):
    config, golden = load_json(path), load_npz(path.with_name("dataset"))
    source = open_source(path.parent / "files", "prefixes")
    samples = Samples(source, 0, config["loader"]["image_size"], random_flip=False)
    ours = [samples.at(k) for k in range(len(source))]
    for image, label in zip(golden["loader_batch_x"], golden["loader_batch_y"], strict=True):
        (found,) = [x for x, y in ours if y == label]
        assert np.array_equal(from_uint8(found.movedim(0, -1)[None])[0].numpy(), image)
