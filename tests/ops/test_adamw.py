"""The optimiser step: every implementation against the formula in float64, and against torch's own AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import TABLES, adamw_ema_step_
from tests.ops.cover import all_pairs, case_id
from tests.ops.tolerance import DEVICES, assert_within, bits, unmodified

TABLE = TABLES["adamw_ema_step"]
IMPLEMENTATIONS = TABLE.names()
SHAPES = [(7,), (), (3, 5), (64, 32, 3, 3), (0, 4), (1, 1025)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = all_pairs(
    dtype=list(DTYPES),
    layout=["contiguous", "channels_last"],
    emas=[(), (0.999,), (0.5, 0.0, 1.0)],
    step=[0, 1000],
    weight_decay=[0.0, 0.1],
    lr=[0.0, 1e-3, "tensor"],
    scaled=[False, True],
    found=[None, 0.0, 1.0],
)


class State:
    """Everything that a step reads or writes, in one dtype."""

    def __init__(self, case: dict[str, Any], dtype: torch.dtype, device: str = "cpu"):
        source = torch.Generator().manual_seed(0)
        first = DTYPES[case["dtype"]]

        def tensors() -> list[Tensor]:
            # Every number is one of the case's dtype, whatever this state's is.
            made = [torch.randn(shape, generator=source).to(first).to(dtype) for shape in SHAPES]
            if case["layout"] == "channels_last":
                made[3] = made[3].to(memory_format=torch.channels_last)
            return [t.to(device) for t in made]

        self.params, self.grads, self.exp_avgs = tensors(), tensors(), tensors()
        self.exp_avg_sqs = [t.square() for t in tensors()]
        self.emas = [(tensors(), decay) for decay in case["emas"]]
        self.step = torch.tensor(float(case["step"]), device=device)
        self.lr = torch.tensor(1e-3, device=device) if case["lr"] == "tensor" else case["lr"]
        self.options: dict[str, Any] = {"weight_decay": case["weight_decay"], "betas": (0.9, 0.99)}
        if case["scaled"]:
            self.options["grad_scale"] = torch.tensor(1024.0, device=device)
        if case["found"] is not None:
            self.options["found_inf"] = torch.tensor(case["found"], device=device)
            if case["found"]:
                self.grads[0].fill_(float("nan"))

    def run(self, impl: str | None = None) -> State:
        lists = self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.emas
        adamw_ema_step_(*lists, self.step, self.lr, impl=impl, **self.options)
        return self

    def results(self) -> dict[str, Tensor]:
        """All parameters, all m, all v, and all of each average, as one vector each."""
        named = {"p": self.params, "m": self.exp_avgs, "v": self.exp_avg_sqs}
        named |= {f"ema {i}": averages for i, (averages, _) in enumerate(self.emas)}
        return {name: torch.cat([t.flatten() for t in tensors]).cpu() for name, tensors in named.items()}


def refused(state: State, impl: str) -> str | None:
    lists = state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, state.emas
    options = {"grad_scale": None, "found_inf": None, **state.options}
    return TABLE.named(impl).supports(*lists, state.step, state.lr, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_one_step_is_within_tolerance(case, impl, device):
    dtype = DTYPES[case["dtype"]]
    state = State(case, dtype, device)
    if refused(state, impl):
        assert impl == "foreach"
        with pytest.raises(Unavailable, match="adamw_ema_step can't run on it here"):
            state.run(impl)
        return
    strides = [p.stride() for p in state.params]
    grads = state.grads if not case["scaled"] else []
    before = state.results()
    with unmodified(**{f"g{i}": g for i, g in enumerate(grads)}):
        found = state.run(impl).results()
    assert [p.stride() for p in state.params] == strides
    assert float(state.step) == case["step"] + (not case["found"])
    if case["found"]:
        assert all(torch.equal(bits(found[name]), bits(before[name])) for name in before)
        return
    reference, truth = (State(case, wanted).run("reference").results() for wanted in (dtype, torch.float64))
    for name, t in found.items():
        assert t.dtype == dtype
        # Sums whose terms may cancel: u is taken at the larger of what is there before and after.
        largest = float(before[name].abs().max())
        assert_within(t, reference[name], truth[name], name, largest_term=largest)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_many_steps_are_those_of_torch(impl):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3)).double()
    own, average = copy.deepcopy(net), copy.deepcopy(net)
    theirs = copy.deepcopy(net)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    params = list(own.parameters())
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    step = torch.zeros(())
    for count in range(30):
        x = torch.randn(4, 5, dtype=torch.float64)
        for each in (net, own):
            each.zero_grad()
            each(x).square().mean().backward()
        optimiser.step()
        with torch.no_grad():
            for a, p in zip(theirs.parameters(), net.parameters(), strict=True):
                a.mul_(0.9).add_(p, alpha=0.1)  # the published update_ema
        grads = [p.grad for p in params]
        emas = [(list(average.parameters()), 0.9)]
        adamw_ema_step_(params, grads, *moments, emas, step, 1e-2, weight_decay=0.1, impl=impl)
        assert step == count + 1
    for a, b in ((own, net), (average, theirs)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)  # 30 steps of float64 rounding


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_versions_count_the_writes(impl):
    """What was derived from a parameter is made anew when its version changes."""
    p, ema = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    versions = p._version, ema._version
    zeros = [[torch.zeros(4)] for _ in range(2)]
    adamw_ema_step_([p], [torch.ones(4)], *zeros, [([ema], 0.9)], torch.zeros(()), 0.1, impl=impl)
    assert p._version > versions[0] and ema._version > versions[1]
    assert p.grad_fn is None and ema.grad_fn is None


@pytest.mark.parametrize("impl", ["fused", "reference", None])
@pytest.mark.parametrize("found", [1.0, 2.0, 0.5, -1.0, float("inf"), float("nan")])
def test_whatever_isn_t_zero_says_found(impl, found):
    case = {"dtype": "fp32", "layout": "contiguous", "emas": (0.9,), "step": 3, "weight_decay": 0.1}
    state = State(case | {"lr": 1e-3, "scaled": False, "found": found}, torch.float32)
    before = state.results()
    with unmodified(found_inf=state.options["found_inf"]):
        after = state.run(impl).results()
    assert float(state.step) == 3
    assert all(torch.equal(bits(after[name]), bits(before[name])) for name in before)


def toy(**changes: Any) -> dict[str, Any]:
    arguments = {name: [torch.ones(2, 3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    return {**arguments, "emas": [([torch.ones(2, 3)], 0.9)], "step": torch.zeros(()), "lr": 0.1, **changes}


def test_what_lies_differently_in_memory_goes_to_another_implementation():
    turned = [torch.ones(3, 2).t()]
    gaps = {name: [torch.ones(2, 6)[:, ::2]] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    gaps["emas"] = []
    for changes, reason in (
        ({"grads": turned}, r"grads\[0\] has other strides than its parameter"),
        ({"emas": [(turned, 0.5)]}, r"emas\[0\]\[0\] has other strides than its parameter"),
        (gaps, r"params\[0\] has gaps or overlaps in memory"),
        ({"exp_avgs": [torch.ones(2, 3).double()]}, "exp_avgs has torch.float64 on cpu"),
    ):
        with pytest.raises(Unavailable, match=f"impl='fused': .*: {reason}"):
            adamw_ema_step_(**toy(**changes), impl="fused")
        call, expected = toy(**changes), toy(**copy.deepcopy(changes))
        adamw_ema_step_(**call)
        adamw_ema_step_(**expected, impl="reference")
        torch.testing.assert_close(call["params"], expected["params"])
    with pytest.raises(Unavailable, match="impl='foreach': .*: no grad_scale or found_inf"):
        adamw_ema_step_(**toy(), found_inf=torch.zeros(1), impl="foreach")
    halves = {name: [torch.ones(2).half()] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(Unavailable, match="impl='foreach': .*: rounds after every operation"):
        adamw_ema_step_(**toy(**halves, emas=[]), impl="foreach")


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
def test_no_parameters_are_no_step(impl):
    step = torch.zeros(())
    adamw_ema_step_([], [], [], [], [([], 0.5)], step, 0.1, impl=impl)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": []}, r"len\(grads\)=0: one for each of the 1 parameters"),
        ({"emas": [([], 0.9)]}, r"len\(emas\[0\]\)=0: one for each"),
        ({"exp_avg_sqs": [torch.ones(3, 2)]}, r"exp_avg_sqs\[0\].shape=\(3, 2\): its parameter has \(2, 3\)"),
        ({"emas": [([torch.ones(6)], 0.9)]}, r"emas\[0\]\[0\].shape=\(6,\)"),
        ({"params": [torch.ones(2, 3).int()]}, r"params\[0\].dtype=torch.int32: a floating dtype"),
        ({"step": torch.zeros(1)}, r"step=\(\(1,\), torch.float32\): a float32 tensor without dimensions"),
        ({"step": torch.tensor(0)}, r"step=\(\(\), torch.int64\)"),
        ({"lr": -1.0}, "lr=-1.0: a finite number"),
        ({"lr": float("nan")}, "lr=nan: a finite number"),
        ({"grads": [None]}, r"grads\[0\]=None: a tensor"),
        ({"step": 3}, "step=3: a float32 tensor"),
        ({"step": torch.zeros((), device="meta")}, "step.device='meta': cpu"),
        ({"lr": None}, "lr=None: a finite number"),
        ({"lr": torch.tensor(1)}, "lr.dtype=torch.int64: a floating dtype"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\): two numbers"),
        ({"betas": 0.9}, "betas=0.9: two numbers"),
        ({"betas": (0.9, None)}, r"betas\[1\]=None"),
        ({"eps": torch.tensor(1e-8)}, "eps=tensor"),
        ({"weight_decay": torch.tensor(0.1)}, "weight_decay=tensor"),
        ({"emas": [([torch.ones(2, 3)], None)]}, r"decay of emas\[0\]=None"),
        ({"lr": torch.ones(2)}, r"lr.shape=\(2,\): one element"),
        ({"eps": -1e-8}, "eps=-1e-08: a finite number"),
        ({"weight_decay": float("inf")}, "weight_decay=inf: a finite number"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        ({"emas": [([torch.ones(2, 3)], 1.5)]}, r"decay of emas\[0\]=1.5"),
        ({"grad_scale": torch.ones(2)}, r"grad_scale.shape=\(2,\): one element"),
        ({"found_inf": torch.zeros(1, dtype=torch.bool)}, "found_inf.dtype=torch.bool: .*torch.float32"),
    ],
)
@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
def test_wrong_arguments_are_named(changes, message, impl):
    call = toy(**changes)
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        adamw_ema_step_(**call, impl=impl)
    assert all((t == 1).all() for t in toy()["params"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_step_waits_for_no_device_and_can_be_captured(impl):
    case = {"dtype": "fp32", "layout": "contiguous", "emas": (0.9,), "step": 3, "weight_decay": 0.1}
    case |= {"lr": "tensor", "scaled": impl != "foreach", "found": None if impl == "foreach" else 0.0}
    state, expected = State(case, torch.float32, "cuda"), State(case, torch.float32, "cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        State(case, torch.float32, "cuda").run(impl)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.run(impl)
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected.run(impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, t in expected.results().items():
        torch.testing.assert_close(state.results()[name], t)
