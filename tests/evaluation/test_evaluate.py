"""Tests of whole evaluations: networks of features, references, processes, warnings, weights files."""

from __future__ import annotations

import importlib
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from admfast.distributed import World
from admfast.errors import AdmfastError, CheckpointError, InvalidArgument
from admfast.evaluation import (
    ArrayImages,
    ClassifierFeatures,
    DinoFeatures,
    FeatureNet,
    ImageFeatures,
    InceptionFeatures,
    compare_features,
    compute_features,
    density_coverage,
    evaluate,
    frechet_distance,
    open_features,
    open_images,
    statistics_of,
)
from admfast.evaluation.evaluate import DENSITY_NEIGHBOURS
from admfast.evaluation.features import Neighbours
from admfast.evaluation.inception_layers import graph_names
from admfast.evaluation.inception_score import SPLIT_SIZE
from admfast.evaluation.inception_weights import read_inception_weights
from admfast.evaluation.kernel_distance import SUBSET_SIZE, SUBSETS
from admfast.evaluation.precision_recall import coverage_of_alike_sets
from admfast.evaluation.reference import write_reference
from tests.small import classifier
from tests.tools.random_inception import random_inception

evaluate_file = importlib.import_module("admfast.evaluation.evaluate")


class Corners(FeatureNet):
    """Features that a person can compute: eight pixels; spatial features: six others."""

    name, device = "corners", torch.device("cpu")
    statistics_widths = (8, 6)

    def __call__(self, images: Tensor) -> ImageFeatures:
        flat = images.flatten(1).float()
        return ImageFeatures(flat[:, :8], flat[:, 20:26], (flat[:, :5] / 50).softmax(1))


def pictures(count, seed=0, low=0):
    images = np.random.default_rng(seed).integers(low, 256, (count, 8, 8, 3), dtype=np.uint8)
    return ArrayImages(images, np.arange(count) % 4)


def data_of(images: ArrayImages) -> np.ndarray:
    return np.concatenate(list(images.batches(0, len(images), 100)))


def pixels(images: ArrayImages) -> np.ndarray:
    return data_of(images).reshape(len(images), -1).astype(float)


def test_the_measures_are_those_of_the_features():
    samples, reference = pictures(60), pictures(90, 1, low=40)
    found = evaluate(samples, reference, Corners(), batch_size=7)
    names = [measure.name for measure in found.measures]
    assert names == ["classifier score", "FD", "sFID", "precision", "recall", "density", "coverage", "KD"]
    a, b = pixels(samples), pixels(reference)
    assert found.value("FD") == pytest.approx(frechet_distance(a[:, :8], b[:, :8]), rel=1e-9)
    assert found.value("sFID") == pytest.approx(frechet_distance(a[:, 20:26], b[:, 20:26]), rel=1e-9)
    for measure in found.measures:
        if measure.interval is not None:
            assert measure.interval[0] <= measure.value <= measure.interval[1]
    assert json.loads(json.dumps(found.to_dict()))["samples"]["images"] == 60


def test_without_a_reference_there_is_only_the_score():
    found = evaluate(pictures(10), None, Corners())
    assert [measure.name for measure in found.measures] == ["classifier score"] and found.reference is None


def test_statistics_of_the_reference_replace_those_of_its_images(tmp_path):
    reference, path = pictures(90, 1), tmp_path / "reference.npz"
    everything = compute_features(Corners(), reference)
    write_reference(path, reference, everything)
    with np.load(path) as archive:
        assert set(archive.files) == {"arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s"}
        assert archive["arr_0"].dtype == np.uint8 and len(archive["arr_0"]) == 90
        shifted = dict(archive) | {"mu": archive["mu"] + 3}
    moved = tmp_path / "moved.npz"
    np.savez(moved, **shifted)
    samples = pictures(60)
    own, stored, other = (
        evaluate(samples, images, Corners()) for images in (reference, open_images(path), open_images(moved))
    )
    for name in ("FD", "sFID", "precision", "recall"):
        assert stored.value(name) == pytest.approx(own.value(name), rel=1e-9)
    mean = pixels(samples)[:, :8].mean(0)
    shift = ((mean - shifted["mu"]) ** 2).sum() - ((mean - shifted["mu"] + 3) ** 2).sum()
    assert other.value("FD") - own.value("FD") == pytest.approx(shift, rel=1e-6)
    assert other.value("sFID") == pytest.approx(own.value("sFID"), rel=1e-9)
    np.savez(moved, **(dict(shifted) | {"mu_s": shifted["mu_s"] + 30}))
    assert evaluate(samples, open_images(moved), Corners()).value("sFID") > own.value("sFID") + 1000


def test_an_archive_is_known_by_its_ending_in_any_case(tmp_path):
    reference, path = pictures(90, 1), tmp_path / "R.NPZ"
    found = compute_features(Corners(), reference)
    with open(path, "wb") as file:
        np.savez(file, arr_0=data_of(reference), mu=found.statistics.mu + 30, sigma=found.statistics.sigma)
    result, own = (evaluate(pictures(60), images, Corners()) for images in (open_images(path), reference))
    assert result.value("FD") > own.value("FD") + 1000
    assert not any("mu, sigma" in warning for warning in result.warnings)
    # Without mu_s, sFID is against the images.
    assert result.value("sFID") == pytest.approx(own.value("sFID"), rel=1e-9)


SIGMA = np.eye(8)
BAD_STATISTICS = {
    "no vector": (np.float64(3), SIGMA),
    "text": (np.array(["a"] * 8), SIGMA),
    "complex": (np.zeros(8, complex), SIGMA),
    "another width": (np.zeros(7), np.eye(7)),
    "not square": (np.zeros(8), np.zeros((8, 7))),
    "a negative variance": (np.zeros(8), -SIGMA),
    "not symmetric": (np.zeros(8), SIGMA + np.triu(np.ones((8, 8)), 1)),
    "NaN": (np.full(8, np.nan), SIGMA),
    "only mu": (np.zeros(8), None),
}


@pytest.mark.parametrize(("mu", "sigma"), BAD_STATISTICS.values(), ids=BAD_STATISTICS)
def test_statistics_that_are_none_are_refused_before_any_feature(mu, sigma, tmp_path, monkeypatch):
    path = tmp_path / "r.npz"
    arrays = {"mu": mu} if sigma is None else {"mu": mu, "sigma": sigma}
    np.savez(path, arr_0=data_of(pictures(9)), **arrays)
    monkeypatch.setattr(Corners, "__call__", lambda *_: pytest.fail("no feature must be computed"))
    with pytest.raises(InvalidArgument, match="^reference=.*r.npz"):
        evaluate(pictures(60), open_images(path), Corners())


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    # The samples are a part of the reference: all are precise, and few of the reference are recalled.
    few, many = data_of(pictures(12, low=200)), data_of(pictures(90, 1))
    narrow, wide = ArrayImages(few), ArrayImages(np.concatenate([few, many]))
    net = Corners()
    found = evaluate(narrow, wide, net)
    assert found.value("precision") == 1 and found.value("recall") < 0.5 and found.value("coverage") < 0.5
    assert found.reference_features is not None
    other = compare_features(net, found.sample_features, found.reference_features)
    assert {m.name: m.value for m in other} == {m.name: m.value for m in found.measures}
    swapped = evaluate(wide, narrow, net)
    assert swapped.value("recall") == 1 and swapped.value("precision") < 0.5


def test_as_many_of_both_sets_are_drawn(monkeypatch):
    class Drawn(Corners):
        neighbours = Neighbours(k=5, open_balls=True, most=30)

    seen = []
    own = evaluate_file.neighbourhoods

    def recording(a, b, *rule, **options):
        seen.append((len(a), len(b), a.clone()))
        return own(a, b, *rule, **options)

    monkeypatch.setattr(evaluate_file, "neighbourhoods", recording)
    evaluate(pictures(200), pictures(90, 1), Drawn())
    evaluate(pictures(20), pictures(90, 1), Drawn())
    assert [counts[:2] for counts in seen] == [(30, 30), (20, 20)]
    drawn = {tuple(row) for row in seen[0][2].tolist()}
    first = {tuple(row) for row in compute_features(Drawn(), pictures(200)).pooled[:30].tolist()}
    assert len(drawn & first) < 20  # a draw, not the first rows


def test_density_has_five_neighbours_and_open_balls_whatever_precision_has():
    class Wide(Corners):
        neighbours = Neighbours(k=7, open_balls=True)

    samples, reference = pictures(60), pictures(90, 1)
    found = [evaluate(samples, reference, net) for net in (Wide(), Corners())]
    features = [pixels(images)[:, :8] for images in (samples, reference)]
    expected = density_coverage(*features, k=5)
    for result in found:
        assert (result.value("density"), result.value("coverage")) == pytest.approx(expected)


def test_the_coverage_of_sets_from_one_source_is_the_one_beside_it():
    random, found = np.random.default_rng(0), []
    for _ in range(40):
        a, b = (ArrayImages(random.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)) for n in (20, 60))
        (measure,) = (m for m in evaluate(a, b, Corners()).measures if m.name == "coverage")
        found.append(measure.value)
    alike = coverage_of_alike_sets(20, 60, DENSITY_NEIGHBOURS)
    assert f"{alike:.4g}" in measure.how
    assert abs(np.mean(found) - alike) < 4 * np.std(found) / np.sqrt(len(found)) and alike < 0.8


@pytest.mark.parametrize(("counts", "has_subsets"), [((20, 20), False), ((20, 30), True)])
def test_the_deviation_over_subsets_is_told_only_where_they_differ(counts, has_subsets):
    (measure,) = (m for m in evaluate(*map(pictures, counts), Corners()).measures if m.name == "KD")
    assert ("deviation" in measure.how) is has_subsets


def test_the_defaults_are_those_of_the_sources():
    assert (SPLIT_SIZE, SUBSETS, SUBSET_SIZE, DENSITY_NEIGHBOURS) == (5000, 100, 1000, 5)
    assert InceptionFeatures.neighbours == Neighbours(3, True, False, None)
    assert DinoFeatures.neighbours == Neighbours(5, False, True, 10_000)
    assert InceptionFeatures.statistics_widths == (2048, 2023)


def test_a_reference_keeps_a_fair_draw_of_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr("admfast.evaluation.reference.IMAGES", 30)
    images = pictures(100)
    write_reference(tmp_path / "r.npz", images, compute_features(Corners(), images))
    with np.load(tmp_path / "r.npz") as archive:
        kept, labels, mu = archive["arr_0"], archive["arr_1"], archive["mu"]
    everything = pixels(images)
    rows = [int((everything == row).all(1).nonzero()[0][0]) for row in kept.reshape(30, -1).astype(float)]
    assert rows == sorted(set(rows)) and np.array_equal(labels, np.array(rows) % 4)
    assert max(rows) > 60 and min(rows) < 40
    np.testing.assert_allclose(mu, everything[:, :8].mean(0), rtol=1e-12)
    write_reference(tmp_path / "other.npz", images, compute_features(Corners(), images), seed=1)
    with np.load(tmp_path / "other.npz") as archive:
        assert not np.array_equal(archive["arr_0"], kept) and np.array_equal(archive["mu"], mu)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_images(size, monkeypatch):
    images, net = pictures(31), Corners()
    whole = compute_features(net, images)
    gathered: dict[int, list[Tensor]] = {}

    def parts(rank):
        """Run one process; collect what it would send, or answer with what all have sent."""
        world, calls = World(rank, size), iter(range(100))

        def all_gather(self, values):
            call = next(calls)
            if rank_is_recorded:
                gathered.setdefault(call, []).append(values.clone())
                return torch.cat([values] * size)
            return torch.cat(gathered[call])

        monkeypatch.setattr(World, "all_gather", all_gather)
        return compute_features(net, images, 4, world)

    rank_is_recorded = True
    for rank in range(size):
        parts(rank)
    rank_is_recorded = False
    found = parts(0)
    assert torch.equal(found.pooled, whole.pooled) and torch.equal(found.probabilities, whole.probabilities)
    np.testing.assert_allclose(found.statistics.sigma, whole.statistics.sigma, rtol=1e-12)
    np.testing.assert_allclose(found.spatial.mu, whole.spatial.mu, rtol=1e-12)


def test_unfair_comparisons_are_named():
    grey = np.arange(7, dtype=np.uint8)[:, None, None, None] + np.zeros((7, 8, 8, 1), np.uint8)
    samples = ArrayImages(grey)

    class Flat(Corners):
        def __call__(self, images):
            return ImageFeatures(images.flatten(1)[:, :8].float() + torch.randn(len(images), 8))

    found = evaluate(samples, pictures(9), Flat())
    text = "\n".join(found.warnings)
    for word in (
        "grey",
        "7 samples",
        "covariance is singular",
        "9 reference images",
        "mu, sigma",
        "only one of the two sets is grey",
    ):
        assert word in text
    small = ArrayImages(np.random.default_rng(0).integers(0, 9, (9, 4, 4, 3), dtype=np.uint8))
    assert any("8x8" in w and "4x4" in w for w in evaluate(pictures(9), small, Flat()).warnings)

    class Jpeg(ArrayImages):
        is_jpeg = True

    jpeg = Jpeg(data_of(pictures(9)))
    for sets, warns in (((jpeg, pictures(9)), True), ((pictures(9), jpeg), True), ((jpeg, jpeg), False)):
        warnings = evaluate(*sets, Flat()).warnings
        assert any("one of the two sets is JPEG" in warning for warning in warnings) is warns


def test_features_that_are_not_finite_name_the_image():
    class Broken(Corners):
        def __call__(self, images):
            found = super().__call__(images)
            found.pooled[(images.flatten(1)[:, 0] == 255).nonzero()[:, 0], 2] = torch.nan
            return found

    images = np.zeros((9, 8, 8, 3), np.uint8)
    images[7, 0, 0, 0] = 255
    with pytest.raises(InvalidArgument, match=r"set\[7\]"):
        evaluate(ArrayImages(images, name="set"), None, Broken(), batch_size=4)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count):
    with pytest.raises(InvalidArgument):
        evaluate(pictures(count or 1).__class__(np.zeros((count, 8, 8, 3), np.uint8)), None, Corners())


@pytest.mark.parametrize("counts", [(5, 20), (20, 5)])
def test_too_few_images_for_the_neighbours_are_refused(counts):
    sets = [pictures(count) for count in counts]
    with pytest.raises(InvalidArgument, match="at least 6"):
        evaluate(*sets, Corners())
    assert evaluate(pictures(6), pictures(6, 1), Corners()).value("coverage") <= 1


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_features_of_a_classifier_are_before_its_last_layer(pool):
    net = classifier(pool=pool).eval()
    config = net.config
    shape = (3, config.image_size, config.image_size, config.in_channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = ClassifierFeatures(net)(images)
    x = images.movedim(-1, 1).float() / 127.5 - 1
    logits = net(x, torch.zeros(3))
    torch.testing.assert_close(found.probabilities, logits.softmax(1))
    if pool in ("adaptive", "spatial", "spatial_v2"):  # the last layer is linear in the features
        last = net.out[-1] if pool.startswith("spatial") else net.out[3]
        rebuilt = found.pooled @ last.weight.flatten(1).T + last.bias
        torch.testing.assert_close(rebuilt, logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidArgument, match="^images="):
        ClassifierFeatures(net)(images[:, :-1])


def field(number, content):
    """Return a field of a protocol buffer: bytes with their length, or a number."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def constant(name, array):
    shape = b"".join(field(2, field(1, side)) for side in array.shape)
    tensor = field(1, 1) + field(2, shape) + field(4, array.astype("<f4").tobytes())
    attribute = field(1, b"value") + field(2, field(8, tensor))
    dtype = field(1, b"dtype") + field(2, field(6, 1))
    return field(1, field(1, name.encode()) + field(2, b"Const") + field(5, dtype) + field(5, attribute))


@pytest.fixture(scope="module")
def inception():
    return random_inception()


def test_the_graph_file_gives_the_weights_of_the_port(inception, tmp_path):
    parts = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean"}
    parts["running_var"] = "moving_variance"
    nodes = [constant("softmax/weights", inception["fc.weight"].numpy().T)]
    for name, place in graph_names().items():
        weight = inception[f"{name}.conv.weight"].numpy().transpose(2, 3, 1, 0)
        nodes.append(constant(f"{place}/conv2d_params", weight))
        for ours, theirs in parts.items():
            nodes.append(constant(f"{place}/batchnorm/{theirs}", inception[f"{name}.bn.{ours}"].numpy()))
    nodes.append(field(1, field(1, b"other") + field(2, b"Conv2D") + field(3, b"input")))
    path = tmp_path / "classify_image_graph_def.pb"
    path.write_bytes(b"".join(nodes) + field(4, 22))
    found = read_inception_weights(path)
    assert set(found) == {key for key in inception if key != "fc.bias"}
    assert all(torch.equal(found[key], inception[key]) for key in found)
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(CheckpointError, match="graph"):
        read_inception_weights(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"PK\x03\x04", struct.pack("<Q", 1)])
def test_a_file_that_is_no_graph(content, tmp_path):
    path = tmp_path / "graph.pb"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"graph\.pb"):
        read_inception_weights(path)


def test_weights_are_found_by_name_in_their_folder(inception, tmp_path):
    torch.save(inception, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    net = open_features("inception", tmp_path)
    images = torch.randint(0, 256, (2, 32, 32, 1), dtype=torch.uint8)
    found = net(images)
    assert found.pooled.shape == (2, 2048) and found.spatial.shape == (2, 2023)
    same = InceptionFeatures(inception)(images.expand(-1, -1, -1, 3))
    assert torch.equal(found.pooled, same.pooled)


def test_weights_that_are_missing_or_of_another_network(inception, tmp_path):
    with pytest.raises(CheckpointError, match="admfast fetch inception"):
        open_features("inception", tmp_path)
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(AdmfastError, match="other|Inception"):
        open_features("inception", tmp_path / "other.safetensors")
    wide = dict(inception) | {"Mixed_6d.branch1x1.conv.weight": torch.zeros(192, 768, 3, 3)}
    with pytest.raises(CheckpointError, match="Mixed_6d.branch1x1"):
        InceptionFeatures(wide)
    broken = dict(inception) | {"fc.weight": torch.full((1008, 2048), torch.nan)}
    with pytest.raises(CheckpointError, match="fc.weight"):
        InceptionFeatures(broken)
    for name in ("resnet", "digits32_diffusion", "inceptoin"):
        with pytest.raises(InvalidArgument, match="^features="):
            open_features(name)
    with pytest.raises(CheckpointError, match="admfast fetch 64x64_classifier"):
        open_features("64x64_classifier", tmp_path)


def test_a_set_against_itself_is_perfect():
    images = pictures(50)
    found = evaluate(images, images, Corners())
    assert found.value("precision") == found.value("recall") == 1
    scale = np.trace(statistics_of(pixels(images)[:, :8]).sigma)
    assert abs(found.value("FD")) < 1e-9 * scale
