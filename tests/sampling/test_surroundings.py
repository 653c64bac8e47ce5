"""Tests that process-wide settings, contexts and the layout of inputs change no result."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import admfast
from admfast.engine.options import EngineOptions
from admfast.errors import InvalidArgument
from admfast.sampling.guides import Guide
from admfast.sampling.pipeline import Pipeline
from tests.small import classifier, pipeline, randn, unet

X, T, Y = randn(2, 1, 8, 8), torch.tensor([500, 20]), torch.tensor([3, 1])
# Rooms that must name the device of every tensor they make, because torch's default device may be another.
ROOMS = ("ops", "diffusion", "engine", "solvers", "sampling", "verify", "runs")
FACTORIES = {
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
}


def answers(pipe: Pipeline, x: Tensor = X) -> dict[str, Tensor]:
    """Return the results of every way to call a pipeline."""
    found = {
        "guided": pipe.sample([3, 1], [5, 6], steps=3, output="float"),
        "a user's guide": pipe.sample(
            [3, 1], [5, 6], steps=3, output="float", guidance_fn=lambda x_t, t: torch.zeros_like(x_t)
        ),
        "from an image": pipe.sample([3, 1], [5, 6], steps=4, t_start=500, x_start=x, output="float"),
        "predict": pipe.predict(x, 500, [3, 1]).eps,
        "predict between": pipe.predict(x, 500.5, [3, 1]).x0,
    }
    return {name: value.detach() for name, value in found.items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@contextlib.contextmanager
def restored(read: Any, write: Any, value: Any) -> Iterator[None]:
    """Set a value within the block, and restore it afterwards."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def by_default(device: str | None) -> Any:
    return restored(lambda: None, torch.set_default_device, device)


def on_cpu_products(precision: str) -> Any:
    return restored(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision)


SURROUNDINGS = {
    "default device": lambda: by_default("meta"),
    "device context": lambda: torch.device("meta"),
    "default dtype float64": lambda: restored(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "default dtype float16": lambda: restored(
        torch.get_default_dtype, torch.set_default_dtype, torch.float16
    ),
    "rounded products": lambda: on_cpu_products("medium"),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_of_a_call_change_no_result(name):
    wanted, pipe = answers(pipeline()), pipeline()
    with SURROUNDINGS[name]():
        found = answers(pipe)
    assert_equal(found, wanted)


def loaded() -> Pipeline:
    return admfast.load("digits32", device="cpu", precision="fp32")


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_of_a_load_change_no_result(name):
    wanted, x = loaded(), randn(1, 1, 32, 32)
    with SURROUNDINGS[name]():
        pipe = loaded()
    assert torch.equal(pipe.predict(x, 500.5, [3]).eps, wanted.predict(x, 500.5, [3]).eps)
    assert torch.equal(pipe.sample([3], [0], steps=2), wanted.sample([3], [0], steps=2))


def test_products_on_a_cpu_are_exact_within_calls_only():
    pipe, seen = pipeline(), []

    def guide(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return torch.zeros_like(x_t)

    with on_cpu_products("medium"):
        before = torch.backends.mkldnn.matmul.fp32_precision
        pipe.sample([3, 1], [5, 6], steps=2, guidance_fn=guide)
        assert torch.backends.mkldnn.matmul.fp32_precision == before != "ieee"
    assert set(seen) == {"ieee"}


def test_forms_made_under_a_mode_without_values_have_values():
    pipe, wanted = pipeline(), pipeline().predict(X, 500, [3, 1]).eps
    pipe.engine.ensure_folded()
    direction = pipe.net.input_blocks[1][0].in_layers[2].folded.directions[0]
    with FakeTensorMode():
        form = direction.form("library")
    assert type(form) is Tensor and torch.equal(pipe.predict(X, 500, [3, 1]).eps, wanted)


LAYOUTS = {
    "channels together": X[:, 0].unsqueeze(-1).movedim(-1, 1),
    "permuted": X.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "sliced": torch.stack([X, X], dim=-1)[..., 0],
    "a parameter": torch.nn.Parameter(X.clone()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_images_changes_no_result(name):
    assert_equal(answers(pipeline(), LAYOUTS[name]), answers(pipeline()))


def test_strided_timesteps_and_classes_change_no_result():
    pipe = pipeline()
    t, y = (torch.stack([v, v + 1], dim=1)[:, 0] for v in (T, Y - 1))
    assert torch.equal(pipe.predict(X, t, y).eps, pipe.predict(X, T, Y - 1).eps)


def test_whole_numbers_are_no_images():
    with pytest.raises(InvalidArgument, match=r"^x\.dtype"):
        pipeline().net(X.long(), T, Y)


def test_nothing_draws_from_the_global_generator():
    pipe, before = pipeline(), torch.get_rng_state()
    answers(pipe)
    admfast.load("digits32", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("room", ROOMS)
def test_tensors_that_are_made_name_their_device(room):
    folder = Path(admfast.__file__).parent / room
    nameless = [
        f"{path.name}:{node.lineno}"
        for path in sorted(folder.rglob("*.py"))
        if path.name != "cases.py"  # stands for a user's tensors
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
        and not {"device", None} & {keyword.arg for keyword in node.keywords}
    ]
    assert nameless == []


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def posterior(x_t, t, prediction):
    return torch.autograd.grad(prediction.x0.square().sum(), x_t)[0]


@pytest.mark.parametrize("prepared", [True, False])
def test_torch_s_counter_counts_guided_sampling(prepared):
    """A step costs one forward of the network, and a classifier's forward and gradient in x if guided."""
    pipe = pipeline(options=EngineOptions(prepared=prepared))
    x, t, labels = randn(2, 1, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 2])
    net, guide = unet().requires_grad_(False), classifier(1).requires_grad_(False)
    forward = counted(lambda: net(x, t, labels))

    def gradient(network, *more):
        x_in = x.clone().requires_grad_(True)
        # `* 1` because torch's counter doesn't follow leaves.
        torch.autograd.grad(network(x_in * 1, t, *more)[:, :1].sum(), x_in)

    pipe.sample([1, 2], steps=3)  # prepare a step first: it must be counted too
    assert counted(lambda: pipe.sample([1, 2], steps=3, guidance=0)) == 3 * forward
    guided = counted(lambda: pipe.sample([1, 2], steps=3))
    assert guided == 3 * (forward + counted(lambda: gradient(guide)))
    seen = counted(lambda: pipe.sample([1, 2], steps=3, guides=Guide(posterior, sees_prediction=True)))
    assert seen == 3 * counted(lambda: gradient(net, labels))
