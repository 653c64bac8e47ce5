"""Tests of Triton's `group_norm_silu` on a CUDA device: real shapes, graphs, streams, torch.compile."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from admfast.ops import TABLES, group_norm_silu, group_norm_silu_ref
from tests.kernels.norm_cases import call_of, check, check_ends, poison
from tests.kernels.norm_gpu_cases import BATCHES, MODES, PAIRS, PLAIN, case_of, forced, shaped
from tests.kernels.values import noises, results, wide
from tests.ops.cover import case_id
from tests.ops.tolerance import assert_within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("row", PAIRS, ids=case_id)
def test_both_paths_in_every_mode(row, monkeypatch):
    poison(monkeypatch)
    with forced(row["path"]):
        check(case_of(row))


@pytest.mark.parametrize("row", BATCHES, ids=case_id)
def test_real_batches(row, monkeypatch):
    poison(monkeypatch)
    case = case_of(row)
    n, c1, c2, _, spatial = case["shape"]
    (check_ends if n * (c1 + c2) * math.prod(spatial) > 48 << 20 else check)(case)


def call(dtype: torch.dtype = torch.float16, batch: int = 2, **changes) -> tuple[dict[str, Tensor], dict]:
    case = PLAIN | dict(shape=shaped((384, 192, (32, 32)), batch), dtype=dtype, modulated=True) | changes
    tensors, options = call_of(case)
    del options["with_skip"]
    return tensors, options


def test_it_is_chosen():
    tensors, options = call()
    chosen = group_norm_silu(**tensors, **options)
    assert torch.equal(chosen, group_norm_silu(**tensors, **options, impl="triton"))
    assert TABLES["group_norm_silu"].find("triton").reason_missing() is None


def test_the_same_bits_every_time():
    for path in (torch.float16, torch.float32):
        tensors, options = call(path, batch=8)
        options |= dict(with_skip=False)
        noise = noises(group_norm_silu_ref, tensors, options)
        first, *others = (
            results(lambda **k: group_norm_silu(**k, impl="triton"), tensors, options, noise)
            for _ in range(5)
        )
        assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.parametrize("shape", [(384, 192, (32, 32)), (256, 0, (128, 128))], ids=str)
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_a_graph_replays_forward_and_backward(shape, resample):
    tensors, options = call(shape=shaped(shape, 1), resample=resample)
    x = tensors["x"].requires_grad_(True)

    def step() -> tuple[Tensor, Tensor]:
        y = group_norm_silu(**tensors, **options, impl="triton")
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        again = step()
        assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


def test_two_streams_do_not_share():
    calls = [call(batch=4, mean=mean) for mean in (0, 100)]
    expected = [group_norm_silu(**tensors, **options, impl="triton") for tensors, options in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for stream, (tensors, options) in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                got.append(group_norm_silu(**tensors, **options, impl="triton"))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("offset", [1, 4])
def test_pointers_that_are_not_aligned(offset):
    # 8 channels per group: an aligned pointer is read 16 bytes at a time, these 2 and 8 bytes at a time.
    tensors, options = call(shape=(2, 64, 0, 8, (9, 11)), modulated=False)
    x = tensors["x"]
    storage = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
    shifted = storage[offset:].view(x.movedim(1, -1).shape).movedim(-1, 1).copy_(x)
    assert shifted.data_ptr() % 16 == 2 * offset
    y = group_norm_silu(**(tensors | dict(x=shifted)), **options, impl="triton")
    truth = group_norm_silu_ref(**wide(tensors), **options)
    # Another layout of the threads adds in another order, so the bits may differ from the aligned call.
    assert_within(y, group_norm_silu_ref(**tensors, **options), truth, "y", "output")


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB")
    one = torch.randn(1, 64, 64, 256, device="cuda", dtype=torch.float16)
    x = one.expand(2112, 64, 64, 256).contiguous().movedim(-1, 1)
    assert x.numel() > 1 << 31
    weight, bias = torch.randn(2, 256, device="cuda")
    y = group_norm_silu(x, weight, bias, impl="triton")
    reference = group_norm_silu_ref(x[:1], weight, bias)
    truth = group_norm_silu_ref(x[:1].double(), weight.double(), bias.double())
    for n in (0, 1055, 2111):
        assert_within(y[n : n + 1], reference, truth, f"image {n}", "output")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("resample", [None, "up"])
def test_the_compiled_gradient_is_the_eager_one(backend, resample):
    tensors, options = call(dtype=torch.float32, resample=resample)

    def function(**arguments) -> Tensor:
        return group_norm_silu(**arguments, impl="triton") * 2

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    plain = {name: value for name, value in options.items()}
    leaves = [{k: t.detach().requires_grad_(True) for k, t in tensors.items()} for _ in range(2)]
    for function_, own in ((function, leaves[0]), (compiled, leaves[1])):
        function_(**own, **plain).square().sum().backward()
    wide = {k: t.detach().double().requires_grad_(True) for k, t in tensors.items()}
    (group_norm_silu_ref(**wide, **plain) * 2).square().sum().backward()
    for name in tensors:
        eager, through = (own[name].grad for own in leaves)
        assert bool(eager.any())
        parameter = name not in ("x", "x2")
        kind, terms = ("parameter gradient", 2 * 64**2) if parameter else ("input gradient", 1)
        assert_within(through, eager, wide[name].grad, name, kind, terms)


@pytest.mark.parametrize("spatial", [(4, 4), (24, 24)])
@pytest.mark.parametrize("channels", [96, 2048])
def test_one_wide_group(channels, spatial):
    check(MODES["modulated"] | dict(shape=(2, channels, 0, 1, spatial), dtype="fp16"))


def test_a_batch_of_one_million_positions_in_one_dimension():
    x = torch.randn(1, 1 << 20, 32, device="cuda").movedim(-1, 1)
    weight, bias = torch.ones(32, device="cuda"), torch.zeros(32, device="cuda")
    y = group_norm_silu(x, weight, bias, 32, impl="triton")
    reference = group_norm_silu_ref(x, weight, bias, 32)
    truth = group_norm_silu_ref(x.double(), weight.double(), bias.double(), 32)
    assert_within(y, reference, truth, "y", "output")
