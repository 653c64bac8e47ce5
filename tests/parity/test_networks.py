"""Tests of UNets, upsamplers and classifiers against outputs and gradients of the published classes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from admfast.errors import Unavailable
from admfast.ops import TABLES
from admfast.ops.dispatch import IMPL_VARIABLE
from tests.ops.tolerance import DEVICES
from tests.parity import golden
from tests.parity.nets import conditions, config_of, load_golden_net, procedural_entries, procedural_state

OUT, GRAD = golden.NETWORK_OUTPUT_LIMIT, golden.NETWORK_GRADIENT_LIMIT


def ways() -> list:
    """Return (device, ADMFAST_IMPL, channels last) for the default, the reference and each implementation."""
    found = []
    for device in DEVICES:
        name, marks = (device, ()) if isinstance(device, str) else (device.values[0], device.marks)
        for impl in ("", "reference", *named(name)):
            for channels_last in (False, True) if impl in ("", "reference") else (True,):
                layout = "channels_last" if channels_last else "contiguous"
                key = f"{name}-{impl or 'default'}-{layout}"
                found.append(pytest.param((name, impl, channels_last), marks=marks, id=key))
    return found


def named(device: str) -> list[str]:
    """Return OP=NAME of the available implementations for float32, without Triton's slow interpreter."""
    entries = [(op, entry) for op in ("group_norm_silu", "attention") for entry in TABLES[op].implementations]
    return [
        f"{op}={entry.name}"
        for op, entry in entries
        if entry.reason_missing() is None
        and not (device == "cpu" and entry.name == "triton")
        and (op, entry.name) != ("attention", "cpp")
    ]


@dataclass(frozen=True)
class Way:
    """A device and an implementation for a case. Calling it moves a network or a dict of tensors there."""

    device: str
    impl: str
    channels_last: bool

    def __call__(self, given):
        if isinstance(given, torch.nn.Module):
            given = given.to(self.device)
            return given.to(memory_format=torch.channels_last) if self.channels_last else given
        return {name: value.to(self.device) for name, value in given.items()}

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Skip the test if the named implementation can't run the network's float32 or shapes on a GPU."""
        try:
            yield
        except Unavailable as error:
            if self.device == "cpu" or "=" not in self.impl:
                raise
            pytest.skip(str(error))


@pytest.fixture(params=ways())
def way(request, monkeypatch):
    """Set the environment and return the `Way`."""
    found = Way(*request.param)
    if found.impl:
        monkeypatch.setenv(IMPL_VARIABLE, found.impl)
    return found


def compare_parameter_gradients(net: torch.nn.Module, arrays: dict[str, torch.Tensor]) -> None:
    parameters = dict(net.named_parameters())
    for name in [name for name in arrays if name.startswith("grad_param:")]:
        golden.compare(parameters[name.removeprefix("grad_param:")].grad, arrays[name], GRAD, name)


@pytest.mark.parametrize("path", golden.networks("unet"))
def test_unet(path: Path, way) -> None:
    arrays = way(golden.load_tensors(path.with_name("io.npz")))
    config = golden.load_json(path)
    net = way(load_golden_net(path.parent))
    assert sum(p.numel() for p in net.parameters()) == config["num_params"]
    extra = conditions(net, arrays)
    if "low_res" in extra:
        extra["low_res"].requires_grad_(True)
    x = arrays["x"].requires_grad_(True)
    probes: dict[str, torch.Tensor] = {}
    for name in arrays:
        if name.startswith("probe:"):
            module = net.get_submodule(name.removeprefix("probe:"))
            module.register_forward_hook(lambda _m, _i, out, name=name: probes.__setitem__(name, out[:1]))
    with way.served():
        out = net(x, arrays["t_int"], **extra)
    golden.compare(out, arrays["out_t_int"], OUT, "out_t_int")
    out = net(x, arrays["t_float"], **extra)
    golden.compare(out, arrays["out_t_float"], OUT, "out_t_float")
    for name, value in probes.items():
        golden.compare(value[0].reshape(arrays[name].shape), arrays[name], OUT, name)
    assert set(probes) == {name for name in arrays if name.startswith("probe:")}
    (out * arrays["w_out"]).sum().backward()
    golden.compare(x.grad, arrays["grad_x"], GRAD, "grad_x")
    if "low_res" in extra:
        golden.compare(extra["low_res"].grad, arrays["grad_low_res"], GRAD, "grad_low_res")
    compare_parameter_gradients(net, arrays)


@pytest.mark.parametrize("path", golden.networks("classifier"))
def test_classifier(path: Path, way) -> None:
    arrays = way(golden.load_tensors(path.with_name("io.npz")))
    net = way(load_golden_net(path.parent))
    for kind in ("t_int", "t_float"):
        net.zero_grad()
        x = arrays["x"].clone().requires_grad_(True)
        with way.served():
            logits = net(x, arrays[kind])
        golden.compare(logits, arrays[f"logits_{kind}"], OUT, f"logits_{kind}")
        selected = torch.log_softmax(logits, dim=-1).gather(1, arrays["y"][:, None])[:, 0]
        golden.compare(selected, arrays[f"selected_logp_{kind}"], OUT, f"selected_logp_{kind}")
        selected.sum().backward()
        golden.compare(x.grad, arrays[f"grad_x_{kind}"], GRAD, f"grad_x_{kind}")
    compare_parameter_gradients(net, arrays)


@pytest.mark.parametrize("path", golden.cases(pattern="**/state_dict_procedural.json"))
def test_procedural_weights(path: Path) -> None:
    """The weights that other tests make by a rule equal the published ones, bit by bit and in order."""
    config, listed = golden.load_json(path.with_name("config.json")), procedural_entries(path.parent)
    state = procedural_state({key: entry["shape"] for key, entry in listed.items()}, config["seed"])
    for key, entry in listed.items():
        assert hashlib.sha256(state[key].numpy().tobytes()).hexdigest() == entry["sha256"], key
    if "kwargs" in config and "ctor" in config:
        with torch.device("meta"):
            from admfast.models import build

            net = build(config_of(config["ctor"], config["kwargs"]))
        assert list(net.state_dict()) == list(listed)
