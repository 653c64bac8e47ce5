"""Tests of the statistics that a convolution's epilogue leaves for the norm that reads its output next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admfast.ops import channel_sums, group_norm_silu, group_norm_silu_ref
from admfast.ops.conv import epilogue
from tests.kernels.norm_cases import DEVICE, DTYPES, force, module, poison
from tests.ops.tolerance import assert_within

pytest.importorskip("triton")
STATISTICS = "_group_norm_silu_stats_kernel"


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Read everything twice, and return the names of the kernels that are launched."""
    force(monkeypatch, "two passes")
    poison(monkeypatch)
    launch, names = module("norm_launch"), []
    run = launch.run

    def noting(calls, device):
        names.extend(call.kernel.__name__ for call in calls)
        run(calls, device)

    monkeypatch.setattr(launch, "run", noting)
    torch.manual_seed(0)
    return names


def draw(*shape: int, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return channels-last images of deviation 1."""
    last = torch.randn(shape[0], *shape[2:], shape[1], device=DEVICE) + mean
    return last.to(dtype).movedim(-1, 1)


def judged(sources: list[Tensor]) -> None:
    """Assert that the norm of the sources is within the tolerance."""
    channels = sum(source.shape[1] for source in sources)
    weight, bias = torch.randn(2, channels, device=DEVICE)
    x2 = sources[1] if len(sources) > 1 else None
    got = group_norm_silu(sources[0], weight, bias, 32, x2=x2, impl="triton")
    own = group_norm_silu_ref(sources[0], weight, bias, 32, x2=x2)
    wide = [source.double() for source in sources]
    truth = group_norm_silu_ref(wide[0], weight, bias, 32, x2=wide[1] if x2 is not None else None)
    assert_within(got, own, truth, "y", "output")


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("has_bias", "has_residual"), [(True, True), (True, False), (False, True)])
def test_the_norm_takes_what_the_epilogue_left(has_bias, has_residual, dtype, mean, launched):
    y = draw(2, 64, 9, 7, mean=mean, dtype=DTYPES[dtype])
    bias = draw(1, 64, 1, 1, dtype=DTYPES[dtype]).flatten() if has_bias else None
    residual = draw(2, 64, 9, 7, dtype=DTYPES[dtype]) if has_residual else None
    expected = module("conv_epilogue").conv_epilogue_fwd(y.clone(), bias, residual)
    x = epilogue.add_in_place(y, bias, residual)
    assert x is y and torch.equal(x, expected)
    judged([x])
    assert STATISTICS not in launched


@pytest.mark.parametrize("mean", [0, 100])
def test_two_sources_that_share_a_group(mean, launched):
    # 96 channels in 32 groups of 3: the first source ends within a group.
    sources = [draw(2, channels, 9, 7, mean=mean) for channels in (64, 32)]
    judged([epilogue.add_in_place(source, None, draw(*source.shape)) for source in sources])
    assert STATISTICS not in launched


def test_a_source_without_statistics_has_both_read(launched):
    first, second = draw(2, 64, 9, 7), draw(2, 32, 9, 7)
    judged([epilogue.add_in_place(first, None, draw(2, 64, 9, 7)), second])
    assert STATISTICS in launched


def test_statistics_end_with_a_write(launched):
    x = epilogue.add_in_place(draw(2, 64, 9, 7), None, draw(2, 64, 9, 7))
    assert channel_sums.find_attached(x) is not None
    x.mul_(3).add_(1)
    assert channel_sums.find_attached(x) is None
    judged([x])
    assert STATISTICS in launched


def test_a_saved_tensor_holds_nothing_of_ours(launched, tmp_path):
    x = epilogue.add_in_place(draw(2, 64, 9, 7), None, draw(2, 64, 9, 7))
    assert channel_sums.find_attached(x) is not None
    torch.save(x, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), x)


def test_statistics_are_left_where_gradients_are_recorded(launched):
    before, dy = draw(2, 64, 9, 7), draw(2, 64, 9, 7)
    weight, bias = torch.randn(2, 64, device=DEVICE)

    def gradient(dtype: torch.dtype, fused: bool) -> Tensor:
        y, residual = before.to(dtype), dy.to(dtype).requires_grad_(True)
        x = epilogue.add_in_place(y.clone(), None, residual) if fused else y + residual
        assert (channel_sums.find_attached(x) is not None) == fused
        norm = group_norm_silu if fused else group_norm_silu_ref
        out = norm(x, weight, bias, 32, **(dict(impl="triton") if fused else {}))
        return torch.autograd.grad(out, residual, dy.to(dtype))[0]

    got = gradient(torch.float32, True)
    own, truth = (gradient(dtype, False) for dtype in (torch.float32, torch.float64))
    assert_within(got, own, truth, "dx", "input gradient")
    assert STATISTICS not in launched


def test_an_image_read_once_and_channels_of_no_group_leave_nothing(monkeypatch):
    force(monkeypatch, "one read")
    assert (
        channel_sums.find_attached(epilogue.add_in_place(draw(1, 64, 4, 4), None, draw(1, 64, 4, 4))) is None
    )
    force(monkeypatch, "two passes")
    assert channel_sums.find_attached(epilogue.add_in_place(draw(1, 6, 9, 7), None, draw(1, 6, 9, 7))) is None
