"""Tests that torch's tools for tracing, counting and rewriting work on a folded network."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from admfast.models.fold import FoldOptions
from admfast.ops.conv.winograd import amplification
from tests.ops.tolerance import assert_within
from tests.small import SMALL_CLASSIFIER, SMALL_UNET, randn, with_weights

N = 2
T, Y = torch.tensor([20, 700]), torch.tensor([1, 3])


def made(config=SMALL_UNET, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a small folded network with the released models' options."""
    net = with_weights(config).requires_grad_(False)
    net.fold(FoldOptions(), dtype)
    return net


def given(net: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x = randn(N, 3, 16, 16, dtype=dtype)
    return (x, T, Y) if getattr(net.config, "num_classes", None) is not None else (x, T)


CONFIGS = {"unet": SMALL_UNET, "classifier": SMALL_CLASSIFIER}


def assert_the_network(found: Tensor, config, growth: tuple[float, float] = (1.0, 1.0)) -> None:
    """Compare an output with the plain network's, within its error. For `growth` see `assert_within`."""
    plain = with_weights(config).requires_grad_(False)
    truth = copy.deepcopy(plain).double()
    with torch.no_grad():
        exact = truth(*given(truth, torch.float64))
        assert_within(found.detach(), plain(*given(plain)), exact, "output", growth=growth)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "with gradients"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_traced_network_is_made_of_torch_s_operations(name, recorded):
    net = made(CONFIGS[name])
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(net, given(net), check_trace=False)
    kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert kinds <= {"aten", "prim"}
    assert all("PythonOp" not in node.kind() for node in traced.inlined_graph.nodes())
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert_the_network(torch.jit.load(buffer)(*given(net)), CONFIGS[name])
    assert set(traced.state_dict()) == set(net.state_dict())


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_network_is_made_of_torch_s_operations(strict):
    net = made()
    with torch.no_grad():
        program = torch.export.export(net, given(net), strict=strict)
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {op.namespace for op in operators if hasattr(op, "namespace")} == {"aten"}
    assert set(program.state_dict) == set(net.state_dict())
    assert_the_network(program.module()(*given(net)), SMALL_UNET)


def work(net: nn.Module) -> int:
    """Return the FLOPs of all products of a forward pass, 2 per multiply-add, from the layers' sizes."""
    found: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            found.append(2 * out.numel() * weight[0].numel())
        elif hasattr(module, "legacy_order"):  # q k^T and its product with v
            n, width, s = inputs[0].shape
            found.append(2 * 2 * n * s * s * width // 3)

    handles = [module.register_forward_hook(count) for module in net.modules()]
    with torch.no_grad():
        net(*given(net))
    for handle in handles:
        handle.remove()
    return sum(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_s_counter_counts_every_product_once(name):
    net = made(CONFIGS[name])
    expected = work(net)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = net(*given(net))
    assert_the_network(out, CONFIGS[name])
    assert counter.get_total_flops() == expected
    parts = counter.get_flop_counts()
    conv = net.middle_block[0].in_layers[2]
    alone = 2 * N * conv.weight.numel() * (16 // 2 ** (len(net.config.channel_mult) - 1)) ** 2
    name = f"{type(net).__name__}.middle_block.0.in_layers.2"
    assert sum(parts[name].values()) == alone


def test_a_gradient_in_x_costs_what_the_forward_costs():
    net = made(SMALL_CLASSIFIER)
    forward = work(net)
    x, t = given(net)
    # The embedding doesn't depend on the image, so its products have no gradient.
    linear = [net.time_embed, *(m.emb_layers for m in net.modules() if hasattr(m, "emb_layers"))]
    embedding = sum(2 * N * p.numel() for part in linear for p in part.parameters() if p.dim() == 2)
    with FlopCounterMode(display=False) as counter:
        net(x.requires_grad_(True), t).sum().backward()
    products = sum(2 * 2 * N * s * s * width // 3 for s, width in attended(net))
    # Each of attention's two products has two gradients.
    assert counter.get_total_flops() == 2 * forward - embedding + products


def attended(net: nn.Module) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    handles = [
        m.register_forward_hook(lambda _m, i, _o: found.append((i[0].shape[2], i[0].shape[1])))
        for m in net.modules()
        if hasattr(m, "legacy_order")
    ]
    with torch.no_grad():
        net(*given(net))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_replaces_the_linear_layers():
    net = made()
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    seen: list[str] = []
    for name, module in quantised.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            module.register_forward_hook(lambda _m, _i, _o, name=name: seen.append(name))
    with torch.no_grad():
        found, exact = quantised(*given(net)), net(*given(net))
    assert set(seen) == {name for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    # Weights and embeddings are rounded to 8 bits.
    assert 0 < (found - exact).norm() < 2**-4 * exact.norm()


def test_functional_call_pickles_and_copies():
    net = made()
    parameters = {name: p.clone() for name, p in net.named_parameters()}
    for found in (
        torch.func.functional_call(net, parameters, given(net)),
        pickle.loads(pickle.dumps(net))(*given(net)),
        copy.deepcopy(net)(*given(net)),
    ):
        assert_the_network(found, SMALL_UNET)


def test_a_replica_has_tensors_of_its_own_and_no_folded_form(monkeypatch):
    """torch.nn.DataParallel makes such replicas, whose tensors are attributes and not parameters."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def twice(tensors, devices, detach=False):
        return [[2 * t for t in tensors]] * len(devices)

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", twice)
    net = made()
    (replica,) = module.replicate(net, [0], detach=True)
    wanted = with_weights(SMALL_UNET).requires_grad_(False)
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter.mul_(2)
        assert torch.equal(replica(*given(net)), wanted(*given(net)))
    assert net.is_folded


def test_a_compiled_network_is_the_network():
    net = made()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*given(net)), net(*given(net)))
        seen: list[Tensor] = []
        net.middle_block[0].out_layers[3].register_forward_hook(lambda _m, _x, out: seen.append(out))
        torch._dynamo.reset()  # torch.compile doesn't notice new hooks
        found = torch.compile(net, backend="eager")(*given(net))
    # Winograd's terms are larger, so it rounds more.
    assert_the_network(found, SMALL_UNET, growth=amplification())
    assert seen
