"""What no implementation could compute is refused in one line, the same whatever was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from admfast.errors import InvalidArgument
from admfast.ops import TABLES, as_seeds, attention, normal, sampler_step
from tests.ops.test_sampler_step_call import SHAPE, filled

QKV = torch.ones(1, 4, 12)


@pytest.mark.parametrize("impl", [*TABLES["attention"].names(), None])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=2.0), "num_heads=2.0: a whole number"),
        (dict(num_heads=None), "num_heads=None: a whole number"),
        (dict(num_heads=0), "num_heads=0: a whole number"),
        (dict(num_heads=3), "num_heads=3: "),
        (dict(qkv=QKV.to(torch.float8_e5m2)), "qkv.dtype=torch.float8_e5m2: a floating dtype"),
        (dict(qkv=QKV.long()), "qkv.dtype=torch.int64: a floating dtype"),
        (dict(qkv=None), "qkv='NoneType'"),
        (dict(qkv=QKV[..., :0]), "qkv.shape=(1, 4, 0): "),
        (dict(qkv=QKV[0]), "qkv.shape=(4, 12): "),
        (dict(impl=3), "impl=3: the name of an implementation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention(changes: dict[str, Any], message, impl):
    with pytest.raises(InvalidArgument) as caught:
        attention(**(dict(qkv=QKV, num_heads=2, impl=impl) | changes))
    assert str(caught.value).startswith(message), caught.value


COUNTERS = [2.0, True, "1", -1, 2**32, np.float32(1), torch.ones(1), torch.ones(2, dtype=torch.int64)]
COUNTERS += [torch.ones(1, dtype=torch.int64, device="meta")]


@pytest.mark.parametrize("impl", [*TABLES["normal"].names(), None])
@pytest.mark.parametrize("name", ["row", "stream"])
@pytest.mark.parametrize("value", COUNTERS, ids=str)
def test_counters_of_normal(name, value, impl):
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        normal(**(dict(seeds=as_seeds([1]), shape=(3,), row=0, stream=0, impl=impl) | {name: value}))


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_every_whole_number_is_a_counter(impl):
    if TABLES["normal"].named(impl).available():
        pytest.skip(f"{impl} is not here")
    kinds = (3, np.int64(3), torch.tensor(3), torch.tensor([3], dtype=torch.int32))
    first, *others = (normal(as_seeds([1]), (5,), kind, 1, impl=impl) for kind in kinds)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("impl", [*TABLES["normal"].names(), None])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seeds=[1, 2]), "seeds=[1, 2]: an int64 tensor"),
        (dict(shape=(2.0, 3)), "shape[0]=2.0: a whole number"),
        (dict(shape=(2, -3)), "shape[1]=-3: a whole number"),
        (dict(shape=5), "shape=5: a tuple"),
        (dict(impl=3), "impl=3: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_normal(changes, message, impl):
    with pytest.raises(InvalidArgument) as caught:
        normal(**(dict(seeds=as_seeds([1]), shape=(3,), row=0, stream=0, impl=impl) | changes))
    assert str(caught.value).startswith(message), caught.value


FP8 = torch.ones(SHAPE).to(torch.float8_e4m3fn)
STEP: list[tuple[dict[str, Any], str]] = [
    (dict(grad=FP8), "grad.dtype=torch.float8_e4m3fn: a floating dtype"),
    (dict(noise=FP8), "noise.dtype=torch.float8_e4m3fn: a floating dtype"),
    (dict(out=None), "out='NoneType'"),
    (dict(seeds=[1, 2]), "seeds=[1, 2]: an int64 tensor"),
    (dict(table=[]), "table=[]: what"),
    (dict(stream=torch.tensor(1)), "stream=tensor(1): a whole number"),
    (dict(impl=3), "impl=3: "),
    *[(dict(noise_row=value), "noise_row=") for value in COUNTERS],
]


@pytest.mark.parametrize("impl", [*TABLES["sampler_step"].names(), None])
@pytest.mark.parametrize(("changes", "message"), STEP, ids=[f"{i}-{m}" for i, (_, m) in enumerate(STEP)])
def test_sampler_step(changes, message, impl):
    state, arguments = filled()
    before = state.x.clone()
    with pytest.raises(InvalidArgument) as caught:
        sampler_step(state, **(arguments | dict(impl=impl) | changes))
    assert str(caught.value).startswith(message), caught.value
    assert torch.equal(state.x, before)
