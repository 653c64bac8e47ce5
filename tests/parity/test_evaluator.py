"""Tests that the measures and the features of Inception equal those of the published evaluator."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from admfast.evaluation import (
    InceptionFeatures,
    frechet_distance,
    inception_score,
    open_images,
    precision_recall,
    statistics_of,
)
from admfast.evaluation.neighbours import neighbour_radii, squared_distances
from admfast.evaluation.reference import read_reference_statistics
from admfast.evaluation.resize import resize_bilinear
from tests.parity.golden import cases, compare, load_json, load_npz
from tests.parity.nets import procedural_state

# Limits from the README of the golden data; relative, but for precision and recall.
FRECHET_LIMIT, SINGULAR_FRECHET_LIMIT, SCORE_LIMIT = 1e-6, 1e-4, 1e-5
PRECISION_LIMIT, TIES = 0.01, 2
MEAN_LIMIT = 1e-5  # the published mean is a float32 sum of up to 2,600 rows
# Additions in another order move norms and products by a rounding of float16 each. All of them are at most
# (|a| + |b|)^2, so the limit of a distance is relative to that.
HALF_ROUNDINGS = 4 * 2.0**-11
RESIZED_LIMIT, FEATURES_LIMIT, DIFFERENCE_LIMIT = 1e-3, 1e-4, 1e-3


def _measures() -> list[Any]:
    found = cases("evaluator")
    return [case for case in found if case.values[0] is None or "results" in load_json(case.values[0])]


def _pool(k: int, rows: int, width: int, power: float, spread: float, seed: int) -> np.ndarray:
    """Return the features of the case at full size, which its README defines by a formula."""
    uniform = [
        np.random.RandomState(10 * seed + key).random_sample((rows, columns))
        for key, columns in ((k, width), (k + 5, 1))
    ]
    features = uniform[0] ** power * (0.6 + 0.4 * np.sin(np.arange(width))) * (0.5 + spread * uniform[1])
    return features.astype(np.float32)


def _inputs(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a case; those of the case at full size are computed."""
    arrays, case = load_npz(path), load_json(path)["case"]
    if "ref_pool" not in arrays:
        seed, counts = case["seed"], (case["n_ref"], case["n_sample"])
        i = np.arange(2048 * 1008, dtype=np.float64)
        arrays["softmax_w"] = (0.15 * np.sin(0.37 * i + (0.001 * i * i) % 7)).astype(np.float32)
        arrays["softmax_w"] = arrays["softmax_w"].reshape(2048, 1008)
        shapes = {"ref_pool": (0, 2048, 4.0, 2.0), "sample_pool": (1, 2048, 3.7, 1.9)}
        shapes |= {"ref_spatial": (2, 2023, 3.0, 1.0), "sample_spatial": (3, 2023, 2.8, 1.1)}
        for name, (k, width, power, spread) in shapes.items():
            arrays[name] = _pool(k, counts[name.startswith("sample")], width, power, spread, seed)
        for name in ("softmax_w", *shapes):
            assert np.array_equal(arrays[name][:3, :40], arrays[f"probe_{name}"]), name
    return arrays


@pytest.fixture(scope="module")
def inputs():
    """Return `_inputs`, which keeps the arrays of the case that was read last."""
    kept: dict[Path, dict[str, np.ndarray]] = {}

    def read(path: Path) -> dict[str, np.ndarray]:
        if path not in kept:
            kept.clear()
            kept[path] = _inputs(path)
        return kept[path]

    return read


@pytest.mark.parametrize("path", _measures())
def test_frechet_distances(path, inputs):
    arrays, results = inputs(path), load_json(path)["results"]
    for name, part in (("fid", "pool"), ("sfid", "spatial")):
        samples, reference = arrays[f"sample_{part}"], arrays[f"ref_{part}"]
        columns_vary = min(samples.std(0).min(), reference.std(0).min()) > 0
        singular = min(len(samples), len(reference)) <= samples.shape[1] or not columns_vary
        limit = SINGULAR_FRECHET_LIMIT if singular else FRECHET_LIMIT
        compare(frechet_distance(samples, reference), results[name], limit, name)
    statistics = statistics_of(arrays["ref_pool"])
    compare(statistics.mu, arrays["ref_mu"], MEAN_LIMIT, "ref_mu")
    if "ref_sigma" in arrays:
        compare(statistics.sigma, arrays["ref_sigma"], FRECHET_LIMIT, "ref_sigma")
    else:
        compare(statistics.sigma.diagonal(), arrays["ref_sigma_diag"], FRECHET_LIMIT, "ref_sigma_diag")


@pytest.mark.parametrize("path", _measures())
def test_inception_score(path, inputs):
    arrays, golden = inputs(path), load_json(path)
    logits = torch.tensor(arrays["sample_pool"]) @ torch.tensor(arrays["softmax_w"])
    probabilities = logits.softmax(1)
    first = arrays.get("softmax_preds_first8", arrays.get("softmax_preds"))
    compare(probabilities[: len(first)], first, SCORE_LIMIT, "softmax_preds")
    score = inception_score(probabilities, golden["case"].get("is_split", 5000))
    compare(score, golden["results"]["inception_score"], SCORE_LIMIT, "inception_score")


@pytest.mark.parametrize("path", _measures())
def test_precision_and_recall(path, inputs):
    arrays, results = inputs(path), load_json(path)["results"]
    samples, reference = arrays["sample_pool"], arrays["ref_pool"]
    rows = {"precision": len(samples), "recall": len(reference)}
    in_half = precision_recall(samples, reference)
    in_float32 = precision_recall(samples, reference, half=False)
    for name, half, single in zip(rows, in_half, in_float32, strict=True):
        assert abs(half - results[name]) <= PRECISION_LIMIT, name
        off = abs(single - results[f"{name}_float32_official_class"]) * rows[name]
        assert off <= TIES + 1e-6, name


@pytest.mark.parametrize("path", _measures())
def test_distances_and_radii(path, inputs):
    arrays, half = inputs(path), load_json(path)["results"]["float16_path_used"]
    samples, reference = torch.tensor(arrays["sample_pool"]), torch.tensor(arrays["ref_pool"])
    distances = squared_distances(reference[:50], samples[:50], half)
    longest = sum(float(x.norm(dim=1).max()) for x in (samples, reference)) ** 2

    def check(actual: torch.Tensor, name: str, in_half: bool) -> None:
        limit = HALF_ROUNDINGS * longest / np.abs(arrays[name]).max() if in_half else SCORE_LIMIT
        compare(actual, arrays[name], limit, name)

    check(distances, "dist_ref50_sample50", half)
    for name, features in (("ref", reference), ("sample", samples)):
        check(neighbour_radii(features, 3, True)[:, None], f"radii_{name}", half)
        check(neighbour_radii(features, 3, False)[:, None], f"radii_{name}_float32", False)


def _networks() -> list[Any]:
    found = cases("evaluator", pattern="*/config.json")
    return [case for case in found if case.values[0] is None or "keys" in load_json(case.values[0])]


@pytest.mark.parametrize("path", _networks())
def test_from_images_to_features(path):
    config, arrays = load_json(path), load_npz(path.with_name("io.npz"))
    state = procedural_state(config["keys"], config["seed"], gain=np.sqrt(2))
    for key, digest in config.get("sha256", {}).items():
        assert hashlib.sha256(state[key].numpy().astype("<f4").tobytes()).hexdigest() == digest, key
    net = InceptionFeatures(state)
    groups = sorted({name.split(":")[0] for name in arrays})
    assert groups
    for i in groups:
        images = torch.tensor(arrays[f"{i}:images"])
        resized = resize_bilinear(images[:1].movedim(-1, 1), 299, 299).movedim(1, -1)[0, ::7, ::7]
        expected = arrays[f"{i}:resized_first"].reshape(resized.shape)
        assert np.abs(resized.numpy() - expected).max() <= RESIZED_LIMIT * 255
        found = net(images)
        logits = found.pooled @ state["fc.weight"].T
        outputs = {"2048": found.pooled, "spatial": found.spatial, "logits_unbiased": logits}
        for name, value in outputs.items():
            golden = arrays[f"{i}:{name}"]
            compare(value, golden, FEATURES_LIMIT, name)
            step, golden_step = value[1].numpy() - value[0].numpy(), golden[1] - golden[0]
            off = np.linalg.norm(step - golden_step)
            assert off <= DIFFERENCE_LIMIT * np.linalg.norm(golden_step), name
        compare(found.probabilities, logits.softmax(1), SCORE_LIMIT, "probabilities")


def _readers() -> list[Any]:
    return cases("evaluator", pattern="*/expected.json")


@pytest.mark.parametrize("path", _readers())
def test_archives_are_read_in_batches(path):
    expected = load_json(path)
    for name, entry in expected.items():
        if name == "stats":
            continue
        images = open_images(path.with_name(f"{name}.npz"))
        batches = list(images.batches(0, len(images), 4))
        assert [len(batch) for batch in batches] == entry["batch_sizes"]
        assert [int(batch.sum(dtype=np.int64)) for batch in batches] == entry["sums"]
    widths = len(expected["stats"]["mu"]), len(expected["stats"]["mu_s"])
    statistics = read_reference_statistics(path.with_name("compressed_with_stats.npz"), widths)
    found = {
        "mu": statistics.pooled.mu, "sigma_diag": statistics.pooled.sigma.diagonal(),
        "mu_s": statistics.spatial.mu, "sigma_s_diag": statistics.spatial.sigma.diagonal(),
    }  # fmt: skip
    assert {name: array.tolist() for name, array in found.items()} == expected["stats"]
    assert read_reference_statistics(path.with_name("plain.npz"), widths) is None
