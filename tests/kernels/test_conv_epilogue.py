"""Tests of the kernel that adds bias and residual after a convolution: values, gradients, selection."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from admfast.ops import FoldedConv, conv_ref, launchers
from admfast.ops.conv import epilogue, forms
from tests.kernels.norm_cases import DEVICE, DTYPES, module
from tests.ops.cover import all_pairs, case_id, laid_out
from tests.ops.tolerance import assert_within, unmodified

pytest.importorskip("triton")
CASES = all_pairs(
    dtype=list(DTYPES),
    bias=[False, True],
    residual=[False, True],
    channels=[3, 6, 65, 192],
    spatial=[(1, 1), (5, 7), (16, 16), (3, 5, 4)],
    batch=[1, 3],
)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape).to(dtype)
    return (laid_out(values, "channels_last") if len(shape) > 2 else values).to(DEVICE)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def taken(monkeypatch):
    """Make every convolution by torch use the kernel, on any device, and return the list of its launches."""
    launch, calls = module("norm_launch"), []
    run = launch.run

    def counting(planned, device):
        calls.extend(planned)
        run(planned, device)

    monkeypatch.setattr(launch, "run", counting)
    monkeypatch.setattr(epilogue, "can_serve", lambda *arguments: True)
    return calls


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values(case):
    dtype, channels = DTYPES[case["dtype"]], case["channels"]
    shape = (case["batch"], channels, *case["spatial"])
    before = draw(*shape, dtype=dtype)
    bias = draw(channels, dtype=dtype) if case["bias"] else None
    residual = draw(*shape, dtype=dtype) if case["residual"] else None

    def formula(dtype: torch.dtype) -> Tensor:
        y = before.to(dtype)
        y = y if bias is None else y + bias.to(dtype).view(-1, *(1,) * len(case["spatial"]))
        return y if residual is None else y + residual.to(dtype)

    y = before.clone()
    with unmodified(bias=bias, residual=residual):
        assert module("conv_epilogue").conv_epilogue_fwd(y, bias, residual) is y
    assert y.stride() == before.stride()
    assert_within(y, formula(dtype), formula(torch.float64), case_id(case))


@pytest.mark.parametrize("channels", [6, 65])
@pytest.mark.parametrize("positions", [2048, 2047, 2049, 4099])
def test_every_element_and_none_beyond_the_end(positions, channels):
    whole = torch.full((positions * channels + 4096,), 7.0, device=DEVICE)
    y = whole[: positions * channels].view(1, positions, 1, channels).movedim(-1, 1)
    before, bias, residual = draw(*y.shape), draw(channels), draw(*y.shape)
    y.copy_(before)
    kernel = module("conv_epilogue").conv_epilogue_fwd
    with unmodified(bias=bias, residual=residual):
        assert kernel(y, bias, residual) is y
    assert torch.equal(y, before + bias.view(-1, 1, 1) + residual)
    assert (whole[positions * channels :] == 7).all()


@pytest.mark.parametrize("leaves", [("x",), ("residual",), ("x", "residual")], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_of_two_orders(leaves, has_bias, taken):
    weight, bias = draw(6, 4, 3, 3) / 6, draw(6) if has_bias else None
    conv = FoldedConv(weight, bias, padding=1, impl="library")
    given = {"x": draw(2, 4, 5, 7), "residual": draw(2, 6, 5, 7)}
    dy = draw(2, 6, 5, 7)

    def derivatives(function, dtype: torch.dtype) -> list[Tensor]:
        tensors = {name: t.to(dtype).requires_grad_(name in leaves) for name, t in given.items()}
        tensors = {name: t.detach().requires_grad_(name in leaves) for name, t in tensors.items()}
        inputs = [tensors[name] for name in leaves]
        y = function(**tensors)
        first = torch.autograd.grad((y.square() * dy.to(dtype)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [y.detach(), *(g.detach() for g in first), *second]

    def reference(x: Tensor, residual: Tensor) -> Tensor:
        return conv_ref(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), residual)

    with unmodified(**given):
        got = derivatives(conv, torch.float32)
    assert taken
    plain, truth = (derivatives(reference, dtype) for dtype in (torch.float32, torch.float64))
    for i, (mine, theirs, true) in enumerate(zip(got, plain, truth, strict=True)):
        assert_within(mine, theirs, true, f"{i}", "input gradient" if i else "output")


def test_torch_is_told_of_the_write():
    y = draw(1, 6, 3, 3).requires_grad_(True) * 2
    kept = y.square()  # its backward needs the old y
    epilogue.add_in_place(y, draw(6), None)
    with pytest.raises(RuntimeError, match="inplace"):
        kept.sum().backward()


def test_an_output_without_gradient_is_no_part_of_a_graph(taken):
    conv = FoldedConv(draw(6, 4, 1, 1), draw(6), impl="library")
    x, residual = draw(1, 4, 3, 3).requires_grad_(True), draw(1, 6, 3, 3)
    with torch.no_grad():
        assert not conv(x, residual).requires_grad
    with torch.inference_mode():
        inferred = conv(x.detach(), residual)
    assert torch.equal(inferred, conv(x, residual).detach()) and len(taken) == 3


def test_what_lies_otherwise_is_added_to_by_torch(taken, monkeypatch):
    x, residual, weight, bias = draw(2, 4, 5, 7), draw(2, 6, 5, 7), draw(6, 4, 3, 3), draw(6)
    dense = {2: lambda *arguments: F.conv2d(*arguments).contiguous()}
    conv = FoldedConv(weight, bias, padding=1, impl="library")
    with mock.patch.dict(forms.CONVOLUTIONS, dense):
        y = conv(x, residual)
    wide = [t.double() for t in (x, weight, bias, residual)]
    assert_within(y, conv_ref(x, weight, bias, residual), conv_ref(*wide), "contiguous")
    assert not taken


# Which calls use the kernel. The device is an argument, so these tests need no GPU.


class Looking(TorchDispatchMode):
    """A mode that runs every operation unchanged."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


X, BIAS = torch.ones(2, 4, 5, 7), torch.ones(6)
RESIDUAL = laid_out(torch.ones(2, 6, 5, 7), "channels_last")
VOLUME = laid_out(torch.ones(2, 6, 3, 5, 7), "channels_last")


@pytest.fixture
def present(monkeypatch):
    """Make the kernels available as on a machine with a GPU."""
    monkeypatch.setattr(launchers, "reason_missing", lambda: None)
    monkeypatch.setattr(launchers, "uses_interpreter", lambda: False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    {
        "both": (("cuda", X, BIAS, RESIDUAL), True),
        "bias": (("cuda", X, BIAS, None), True),
        "residual": (("cuda", X, None, RESIDUAL), True),
        "half": (("cuda", X.half(), BIAS, RESIDUAL), True),
        "volume": (("cuda", torch.ones(2, 4, 3, 5, 7), BIAS, VOLUME), True),
        "nothing to add": (("cuda", X, None, None), False),
        "cpu": (("cpu", X, BIAS, RESIDUAL), False),
        "meta": (("meta", X, BIAS, RESIDUAL), False),
        "1d": (("cuda", torch.ones(2, 4, 7), BIAS, None), False),
        "double": (("cuda", X.double(), BIAS, None), False),
        "contiguous residual": (("cuda", X, BIAS, RESIDUAL.contiguous()), False),
        "sliced residual": (("cuda", X, BIAS, laid_out(RESIDUAL, "sliced")), False),
    }.values(),
    ids=lambda value: None,
)
def test_which_calls_take_the_kernel(arguments, expected, present):
    assert epilogue.can_serve(*arguments) is expected


def test_who_looks_on_sees_operations_of_torch(present, monkeypatch):
    def asked(x: Tensor = X, residual: Tensor | None = RESIDUAL) -> bool:
        return epilogue.can_serve("cuda", x, BIAS, residual)

    seen = {}

    def noting(name: str):
        def function(x: Tensor) -> Tensor:
            seen[name] = asked(x)
            return x.sum()

        return function

    torch.vmap(noting("vmap"))(torch.ones(3, *X.shape))
    torch.func.grad(noting("grad"))(X)
    torch.func.jvp(noting("jvp"), (X,), (X,))
    torch.compile(noting("compile"), backend="eager")(X)
    with torch.autograd.forward_ad.dual_level():
        seen["forward mode"] = asked()
    with Looking():
        seen["mode"] = asked()

    class Mine(Tensor):
        pass

    seen["x of a class"] = asked(X.as_subclass(Mine))
    seen["residual of a class"] = asked(residual=RESIDUAL.as_subclass(Mine))
    with mock.patch("torch.jit.is_tracing", lambda: True):
        seen["trace"] = asked()
    assert seen == dict.fromkeys(seen, False) and len(seen) == 9
    assert asked() and asked(torch.nn.Parameter(X))
    with torch.no_grad():
        assert asked()


@pytest.mark.parametrize("name", ["reason_missing", "uses_interpreter"])
def test_without_a_gpu_for_triton_it_is_torch_that_adds(name, present, monkeypatch):
    monkeypatch.setattr(launchers, name, lambda: "missing")
    assert not epilogue.can_serve("cuda", X, BIAS, RESIDUAL)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("y", dict(y=torch.ones(2, 6, 5, 7))),
        ("y.dtype", dict(y=RESIDUAL.double())),
        ("residual", dict(residual=torch.ones(2, 6, 5, 7))),
        ("residual.shape", dict(residual=RESIDUAL[:1])),
        ("bias.shape", dict(bias=torch.ones(5))),
    ],
)
def test_the_launcher_refuses_what_it_would_read_wrongly(name, changes):
    arguments = dict(y=RESIDUAL.clone(), bias=BIAS, residual=RESIDUAL) | changes
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        module("conv_epilogue").conv_epilogue_fwd(**arguments)


def test_of_nothing_there_is_nothing_to_launch_for():
    empty = RESIDUAL[:0]
    assert module("conv_epilogue").conv_epilogue_fwd(empty, BIAS, None) is empty
