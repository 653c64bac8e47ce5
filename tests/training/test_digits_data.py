"""The digits: how they are enlarged, in which order they come, and the files that training ends in."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import admfast
from admfast.checkpoints import load_network
from admfast.errors import AdmfastError, InvalidArgument
from admfast.models import build
from admfast.training import digit_images
from admfast.training.digit_images import block_means, enlarge, load_digits
from admfast.training.digits import DIFFUSION, RECIPES, batches, export, main, to_model_range
from admfast.training.loop import TrainConfig

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
CONFIG = TrainConfig(steps=1, batch_size=50, lr=1e-3)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return load_digits()


@pytest.fixture(scope="module")
def enlarged(data) -> torch.Tensor:
    return enlarge(data[0])


def test_digits_are_those_of_scikit_learn(data):
    images, labels = data
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 16) and torch.equal(images, images.round())
    assert labels.dtype == torch.int64 and labels[:10].tolist() == list(range(10))
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_enlarged_digits_stay_in_range_and_their_block_means_give_the_digits_back(data, enlarged):
    assert enlarged.shape == (1797, 1, 32, 32) and enlarged.dtype == torch.float32
    assert (enlarged.min(), enlarged.max()) == (0, 16)
    error = (block_means(enlarged) - data[0]).abs()
    # Measured on all 1,797: at most 0.6325 levels of 16, 0.0832 in the root mean square, and 40 of 115,008
    # block means that round to another level. The limit to 0..16 is what keeps strokes from being exact.
    assert error.max() < 0.64
    assert error.square().mean().sqrt() < 0.084
    assert (error > 0.5).sum() <= 44


def test_more_rounds_bring_the_means_nearer(data):
    some = data[0][:100]
    errors = [float((block_means(enlarge(some, rounds)) - some).square().mean()) for rounds in (0, 1, 5, 20)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 50 * errors[-1]


def test_enlarging_is_smooth_and_keeps_flat_images():
    flat = torch.full((1, 1, 8, 8), 5.0)
    torch.testing.assert_close(enlarge(flat), torch.full((1, 1, 32, 32), 5.0))
    assert torch.equal(enlarge(flat.to(torch.uint8)), enlarge(flat))


def test_model_range_and_block_means():
    assert to_model_range(torch.tensor([0.0, 8.0, 16.0])).tolist() == [-1.0, 0.0, 1.0]
    blocks = torch.arange(16.0).view(1, 1, 4, 4)
    assert block_means(blocks).tolist() == [[[[7.5]]]]


# Batches


def taken(count: int, config: TrainConfig = CONFIG, seed: int = 3) -> list:
    generator = torch.Generator().manual_seed(seed)
    return list(itertools.islice(batches(DIFFUSION.build(), config, generator), count))


def test_batches_are_drawn_from_the_generator_alone(data, enlarged):
    torch.manual_seed(0)
    first = taken(3)
    torch.manual_seed(1)
    again = taken(3)
    for a, b in zip(first, again, strict=True):
        assert all(
            torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "labels", "t", "noise")
        )
    assert not torch.equal(first[0].noise, taken(1, seed=4)[0].noise)
    batch = first[0]
    assert batch.images.shape == batch.noise.shape == (50, 1, 32, 32)
    assert batch.t.dtype == torch.int64 and 0 <= int(batch.t.min()) and int(batch.t.max()) < 1000
    index = int((to_model_range(enlarged) == batch.images[0]).flatten(1).all(1).nonzero()[0])
    assert int(batch.labels[0]) == int(data[1][index])


def test_an_epoch_has_every_digit_at_most_once():
    config = TrainConfig(steps=1, batch_size=599, lr=1e-3)
    images = torch.cat([batch.images for batch in taken(3, config)]).flatten(1)
    assert len(torch.unique(images, dim=0)) > 1790, "1,797 but for a few that are drawn alike"
    first, second = (torch.cat([b.labels for b in taken(6, config)[i : i + 3]]) for i in (0, 3))
    assert torch.equal(first.bincount(), second.bincount()) and not torch.equal(first, second)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(InvalidArgument, match="batch_size=1798: at most the 1797 digits"):
        taken(1, TrainConfig(steps=1, batch_size=1798, lr=1e-3))


# Recipes and files


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_loss_for_each_image_and_a_gradient_for_each_weight(name):
    recipe = RECIPES[name]
    torch.manual_seed(0)
    net = build(recipe.net).train()
    with torch.no_grad():
        for parameter in net.parameters():  # nothing at zero, or nothing before it has a gradient
            parameter.add_(0.02 * torch.randn(parameter.shape))
    (batch,) = taken(1, TrainConfig(steps=1, batch_size=4, lr=1e-3))
    terms = recipe.loss(net, DIFFUSION.build(), batch)
    assert {"loss"} <= set(terms) and all(value.shape == (4,) for value in terms.values())
    terms["loss"].mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("name", ["diffusion", "upsampler"])
def test_export_and_load(name, tmp_path):
    torch.manual_seed(0)
    net = build(RECIPES[name].net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    path = tmp_path / f"{name}.safetensors"
    export(name, net, RECIPES[name].training, 123, path)
    pipe = admfast.load(path, device="cpu")
    assert pipe.config == RECIPES[name].net and pipe.diffusion == DIFFUSION
    for key, value in net.state_dict().items():
        assert torch.equal(pipe.net.state_dict()[key], value.half().float()), key
    training = json.loads(path.with_suffix(".json").read_text())["training"]
    assert (training["steps"], training["batch_size"]) == (123, RECIPES[name].training.batch_size)
    assert "load_digits" in training["data"] and name in training["command"]
    low_res = None if name == "diffusion" else torch.zeros(1, 1, 8, 8)
    assert pipe.sample(3, steps=1, low_res=low_res).shape == (1, 32, 32, 1)


def test_the_command_trains_and_writes_what_load_reads(tmp_path, capsys):
    assert main(["classifier", "--out", str(tmp_path), "--steps", "2"]) == 0
    path = tmp_path / "classifier.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    net, info = load_network(path)
    assert isinstance(net, admfast.Classifier) and info.diffusion is None
    assert info.training["steps"] == 2 and info.config == RECIPES["classifier"].net
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "classifier.json",
        "classifier.safetensors",
        "state.pt",
    ]
    with pytest.raises(InvalidArgument, match="a diffusion model; this file holds a classifier"):
        admfast.load(path)


def test_mistakes_of_the_command_are_one_line_and_status_2(tmp_path, capsys):
    assert main(["classifier", "--out", str(tmp_path), "--steps", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("admfast: steps=0: ") and said.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert main(["classifier", "--out", str(tmp_path / "file"), "--steps", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main(["diffuser", "--out", str(tmp_path)])
    assert caught.value.code == 2


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(AdmfastError, match=r"install the extra 'admfast\[demo\]'"):
        digit_images.load_digits()
