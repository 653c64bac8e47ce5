"""Tests of sampling on a GPU: the CPU's noise and images, no transfers in the loop, gradients."""

from __future__ import annotations

import pytest
import torch

from admfast.engine.guidance import classifier_guidance
from admfast.ops.update import Stream, as_seeds, normal
from admfast.sampling.load import load
from admfast.sampling.loop import Progress
from tests.parity.golden import NETWORK_GRADIENT_LIMIT
from tests.small import randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLASSES, SEEDS = list(range(10)), [*range(9), 2**64 - 1]


@pytest.mark.parametrize("stream", [Stream.X_T, Stream.STEPS])
def test_the_noise_is_the_same_bit_for_bit(stream):
    seeds = as_seeds(SEEDS)
    there = normal(seeds.cuda(), (1, 32, 32), 3, stream)
    assert there.is_cuda and torch.equal(there.cpu(), normal(seeds, (1, 32, 32), 3, stream))


@pytest.mark.parametrize("settings", [{"guidance": 0.0}, {"guidance": 2.0}, {"solver": "ddim"}], ids=str)
def test_float32_gives_the_images_of_the_cpu(settings):
    here = load("digits32", device="cpu", precision="fp32").sample(CLASSES, SEEDS, steps=10, **settings)
    there = load("digits32", device="cuda", precision="fp32").sample(CLASSES, SEEDS, steps=10, **settings)
    assert there.device.type == "cpu" and there.dtype == torch.uint8
    near = (here.int() - there.int()).abs() <= 1
    assert near.float().mean() >= 0.999


def test_the_default_is_bfloat16():
    pipe = load("digits32", device="cuda")
    assert pipe.precision == "bfloat16"
    assert torch.isfinite(pipe.sample(CLASSES, SEEDS, steps=10, output="float")).all()
    exact = load("digits32", device="cuda", precision="fp32")
    x, t = randn(10, 1, 32, 32).cuda(), torch.full((10,), 500, device="cuda")
    labels = torch.tensor(CLASSES, device="cuda")
    with torch.no_grad():
        found, wanted = (one.net(x, t, labels) for one in (pipe, exact))
    # A few dozen layers each round once.
    error = (found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
    assert error < 20 * torch.finfo(torch.bfloat16).eps
    half = load("digits32", device="cuda", precision="bf16").classifier
    found, wanted = (classifier_guidance(one, labels, 2.0)(x, t) for one in (half, exact.classifier))
    error = (found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
    assert torch.isfinite(found).all() and error < 20 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_nothing_goes_to_the_host_inside_the_loop(solver):
    """Check from the second row to the one before the last: the loop reads the first and last row for NaN."""
    pipe = load("digits32", device="cuda")
    pipe.sample(CLASSES, SEEDS, steps=6, solver=solver)
    reached = []

    def watch(progress: Progress) -> None:
        if progress.done == 1:
            torch.cuda.set_sync_debug_mode("error")
        if progress.done == progress.total - 1:
            torch.cuda.set_sync_debug_mode("default")
            reached.append(progress.done)

    try:
        pipe.sample(CLASSES, SEEDS, steps=6, solver=solver, callback=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reached == [5]


def test_predict_is_differentiable():
    x = randn(2, 1, 32, 32)
    gradients = []
    for device in ("cpu", "cuda"):
        pipe = load("digits32", device=device, precision="fp32")
        x_t = x.to(device).detach().requires_grad_(True)
        pipe.predict(x_t, 500, [3, 7]).x0.square().sum().backward()
        gradients.append(x_t.grad.cpu())
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < NETWORK_GRADIENT_LIMIT


@pytest.mark.parametrize("process", ["highest", "high"])
def test_the_process_s_settings_are_given_back(process):
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    torch.set_float32_matmul_precision(process)
    torch.backends.cudnn.allow_tf32 = process == "high"
    before, seen = settings(), []
    for precision in ("tf32", "fp32"):
        pipe = load("digits32", device="cuda", precision=precision)
        pipe.sample([1], [2], steps=1, callback=lambda _: seen.append(settings()))
        assert settings() == before
    assert seen == [(True, True), (False, False)]
