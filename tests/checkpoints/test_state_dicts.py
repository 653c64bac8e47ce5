"""Tests of checkpoints with more than a state dict: which entry is read, and what is ignored or ambiguous."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import logging
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from admfast.checkpoints import describe, load_network, read_weights
from admfast.errors import CheckpointError, InvalidArgument
from admfast.models import build
from tests.small import SMALL_UNET
from tests.tools.random_checkpoint import random_state

ANSWERS = {"image_size": 16, "num_head_channels": 32, "use_new_attention_order": False}
GOOD = random_state(SMALL_UNET)
RAW = random_state(SMALL_UNET, seed=1)
OPTIMISER = {
    "state": {0: {"exp_avg": torch.ones(3), "step": 3}},
    "param_groups": [{"lr": 1e-4, "params": [0]}],
}


class Unknown:
    """A class that the reader of a file doesn't have. It counts its instances."""

    made = 0

    def __init__(self, **attributes):
        type(self).made += 1
        self.__dict__.update(attributes)

    def __setstate__(self, state):
        type(self).made += 1
        self.__dict__.update(state)


def saved(tmp_path, content, legacy=False):
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    return tmp_path / "x.pt"


def assert_taken(weights, wanted=GOOD):
    assert list(weights.tensors) == list(wanted)
    assert all(torch.equal(value, wanted[key]) for key, value in weights.tensors.items())


def prefixed(prefix, state=GOOD):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.diffusion_model.", "a.b.c.d."]
)
def test_a_prefix_of_every_key_is_none(tmp_path, prefix):
    path = saved(tmp_path, prefixed(prefix))
    weights = read_weights(path)
    assert_taken(weights)
    assert (weights.entry, weights.notes) == (prefix.rstrip("."), ())
    save_file(prefixed(prefix), tmp_path / "x.safetensors")
    assert read_weights(tmp_path / "x.safetensors").tensors.keys() == GOOD.keys()
    assert dict(describe(path, options=ANSWERS))["entry"] == prefix.rstrip(".")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "content, entry, left",
    [
        ({"state_dict": GOOD, "epoch": 3}, "state_dict", ["epoch"]),
        ({"model": GOOD, "step": 5}, "model", ["step"]),
        ({"model": RAW, "ema": GOOD, "opt": OPTIMISER, "step": 1}, "ema", ["model", "opt", "step"]),
        ({"model": RAW, "model_ema": prefixed("module.")}, "model_ema.module", ["model"]),
        ({"ema_0.9999": GOOD, "state_dict": RAW}, "ema_0.9999", ["state_dict"]),
        ({"ema_model": GOOD, "model": RAW}, "ema_model", ["model"]),
        ({"state_dict": RAW, "state_dict_ema": GOOD}, "state_dict_ema", ["state_dict"]),
        ({"net": RAW, "ema": {"shadow": GOOD, "decay": 0.999}}, "ema.shadow", ["net", "ema.decay"]),
        (
            {"ema": {**prefixed("ema_model."), **prefixed("online_model.", RAW), "step": torch.tensor(1)}},
            "ema.ema_model",
            ["ema.online_model", "ema.step"],
        ),
        ({**prefixed("model.diffusion_model."), "betas": torch.ones(9), "vae.w": torch.ones(2)},
         "model.diffusion_model", ["betas", "vae"]),
        ({**GOOD, "betas": torch.ones(9), "alphas_cumprod": torch.ones(9)}, "", ["betas", "alphas_cumprod"]),
        ({**GOOD, "out.2.total_ops": torch.zeros(1)}, "", ["out.2.total_ops"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_network_s_state_dict_is_taken_the_average_first(tmp_path, content, entry, left, legacy):
    weights = read_weights(saved(tmp_path, content, legacy))
    assert_taken(weights)
    assert weights.entry == entry
    (note,) = weights.notes
    assert all(name in note for name in (entry, *left)) and "\n" not in note
    assert ("average" in note) == ("ema" in entry)


def test_an_average_without_dots_in_its_names_is_found(tmp_path):
    averaged = {f"model_ema.{('diffusion_model.' + key).replace('.', '')}": v for key, v in GOOD.items()}
    content = {"state_dict": {**prefixed("model.diffusion_model.", RAW), **averaged}}
    # The averages' names, which have no dots, are in the same state dict as the network's.
    weights = read_weights(saved(tmp_path, content["state_dict"]))
    assert_taken(weights)
    assert_taken(read_weights(saved(tmp_path, content)))
    assert_taken(read_weights(tmp_path / "x.pt", entry="model.diffusion_model"), RAW)


def test_entry_names_another(tmp_path, caplog):
    path = saved(tmp_path, {"model": RAW, "ema": GOOD, "best": {"module": RAW}, "opt": OPTIMISER})
    assert_taken(read_weights(path, entry="model"), RAW)
    assert_taken(read_weights(path, entry="best"), RAW)
    assert_taken(read_weights(saved(tmp_path, {"ema": {"0.5": RAW, "0.9": GOOD}}), entry=0.9))
    path = saved(tmp_path, {"model": RAW, "ema": GOOD, "best": {"module": RAW}, "opt": OPTIMISER})
    with pytest.raises(CheckpointError, match="'teacher'.*model, ema, best.module"):
        read_weights(path, entry="teacher")
    with caplog.at_level(logging.WARNING, "admfast"):
        net, _ = load_network(path, entry="model", **ANSWERS)
    assert torch.equal(net.state_dict()["out.2.bias"], RAW["out.2.bias"])
    (line,) = caplog.messages
    assert str(path) in line and "model" in line and "ema" in line
    report = dict(describe(path, options={**ANSWERS, "entry": "model"}))
    assert report["entry"] == "model" and "ema" in report["note"]


@pytest.mark.parametrize(
    "content",
    [
        {"model": GOOD, "best": RAW},
        {"ema_0.99": GOOD, "ema_0.999": RAW, "model": RAW},
        {**GOOD, **prefixed("teacher.", RAW)},
    ],
    ids=["two models", "two averages", "one inside"],
)
def test_entries_of_equal_right_are_asked_about(tmp_path, content):
    with pytest.raises(CheckpointError, match="entry=") as caught:
        read_weights(saved(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_one_state_dict_under_two_names_is_one(tmp_path):
    assert_taken(read_weights(saved(tmp_path, {"model": GOOD, "net": GOOD})))


def test_an_optimiser_is_no_network(tmp_path):
    for content in (OPTIMISER, {"optimizer": OPTIMISER, "epoch": 4}):
        with pytest.raises(CheckpointError, match="optimiser.*entry="):
            read_weights(saved(tmp_path, content))


@pytest.mark.parametrize("key", ["out.2.bias", "time_embed.0.weight", "input_blocks.0.0.weight"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_missing_tensor_is_still_refused(tmp_path, key, prefix):
    state = {name: value for name, value in GOOD.items() if name != key}
    path = saved(tmp_path, {"model": prefixed(prefix, state), "betas": torch.ones(3)})
    with pytest.raises(CheckpointError, match="missing|no time_embed"):
        load_network(path, **ANSWERS)


def test_a_layer_too_many_is_still_refused(tmp_path):
    path = saved(tmp_path, {**GOOD, "input_blocks.1.0.encoder_kv.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="unexpected"):
        load_network(path, **ANSWERS)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_beside_the_tensors_are_read_without_being_made(tmp_path, legacy, protocol):
    beside = {
        "args": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("runs/1")),
        "lr": np.float64(0.5),
        "history": np.arange(6.0).reshape(2, 3),
        "when": datetime.datetime(2021, 7, 1),
        "config": Unknown(name="adm", tags={"a", "b"}, nested=Unknown(x=1)),
        "counts": collections.Counter("abc"),
        "defaults": collections.defaultdict(list, a=[1]),
        "ordered": collections.OrderedDict(a=1),
        "shape": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "bytes": b"123",
        "array": bytearray(b"456"),
        "frozen": frozenset([1]),
        "big": 2**200,
        "complex": 1j,
        "nothing": None,
    }
    torch.save(
        {"model": collections.OrderedDict(GOOD), **beside},
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    Unknown.made = 0
    weights = read_weights(tmp_path / "x.pt")
    assert_taken(weights)
    assert Unknown.made == 0
    assert f"{len(beside)} names" in weights.notes[0] or all(name in weights.notes[0] for name in beside)


def test_a_pickled_module_is_read_as_its_state_dict(tmp_path):
    net = build(SMALL_UNET)
    net.load_state_dict(GOOD)
    weights = read_weights(saved(tmp_path, {"net": torch.nn.DataParallel(net), "epoch": 3}))
    assert_taken(weights)
    assert weights.entry == "net.module"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_of_every_make(tmp_path, legacy):
    base = torch.arange(24.0)
    state = {
        "parameter": torch.nn.Parameter(base[:4].clone()),
        "needs_grad": base[:4].clone().requires_grad_(),
        "view": base[6:12].view(2, 3),
        "overlapping": base[8:14],
        "transposed": base.view(4, 6).t(),
        "expanded": torch.ones(1).expand(3, 5),
        "scalar": torch.tensor(3.5),
        "empty": torch.ones(0, 4),
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "whole": torch.arange(5),
        "truth": torch.tensor([True, False]),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    state["tied"] = state["parameter"]
    if not legacy:
        state["float8"] = base.to(torch.float8_e4m3fn)
    found = read_weights(saved(tmp_path, state, legacy)).tensors
    assert list(found) == list(state)
    for key, value in state.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(found[key].double(), value.detach().double()), key
        assert not found[key].requires_grad and type(found[key]) is torch.Tensor


def test_loaded_parameters_share_no_memory(tmp_path):
    """Parameters that are tied, transposed or views of one buffer in the file get separate memory."""
    state = dict(GOOD)
    flat = torch.cat([state["out.0.weight"], state["out.0.bias"]])
    count = len(state["out.0.weight"])
    state["out.0.weight"], state["out.0.bias"] = flat[:count], flat[count:]
    state["input_blocks.1.0.in_layers.0.bias"] = state["input_blocks.1.0.in_layers.0.weight"]
    state["time_embed.0.weight"] = state["time_embed.0.weight"].t().contiguous().t()
    net, _ = load_network(saved(tmp_path, state), **ANSWERS)
    found = dict(net.named_parameters())
    assert all(value.is_contiguous() for value in found.values())
    assert all(torch.equal(found[key].detach(), value) for key, value in state.items())
    with torch.no_grad():
        found["input_blocks.1.0.in_layers.0.weight"].zero_()
        found["out.0.weight"].zero_()
    for key in ("input_blocks.1.0.in_layers.0.bias", "out.0.bias"):
        assert torch.equal(found[key].detach(), state[key])


@pytest.mark.parametrize("form", [lambda v: v[..., None], lambda v: v[..., 0]], ids=["2-D", "linear"])
def test_projections_of_another_rank_have_the_same_numbers(tmp_path, form):
    state = {key: form(value) if value.dim() == 3 else value for key, value in GOOD.items()}
    assert sum(state[key].shape != value.shape for key, value in GOOD.items()) == 8
    assert_taken(read_weights(saved(tmp_path, state)))
    wide = {
        key: value[..., None].expand(*value.shape, 3) if value.dim() == 3 else value
        for key, value in GOOD.items()
    }
    with pytest.raises(CheckpointError, match="with another shape"):
        load_network(saved(tmp_path, wide), **ANSWERS)


@pytest.mark.parametrize(
    "name", ["non_ema", "state_dict_without_ema", "swapped_model", "no_ema", "model_not_averaged"]
)
def test_a_name_that_denies_the_average_is_none(tmp_path, name):
    with pytest.raises(CheckpointError, match="entry="):
        read_weights(saved(tmp_path, {"model": RAW, name: GOOD}))
    weights = read_weights(saved(tmp_path, {name: RAW, "ema0.9999": GOOD}))
    assert_taken(weights)
    assert weights.entry == "ema0.9999"


@pytest.mark.parametrize(
    "form",
    [
        {
            "label_emb.weight_orig": GOOD["label_emb.weight"],
            "label_emb.weight_mask": GOOD["label_emb.weight"],
        },
        {"label_emb.parametrizations.weight.original": GOOD["label_emb.weight"]},
        {"label_emb.weight": GOOD["label_emb.weight"].numpy()},
    ],
    ids=["pruned", "parametrised", "numpy"],
)
def test_a_layer_in_another_form_is_not_left_out(tmp_path, form):
    state = {key: value for key, value in GOOD.items() if key != "label_emb.weight"} | form
    for source in (saved(tmp_path, state), state):
        with pytest.raises(CheckpointError, match="label_emb"):
            read_weights(source)


def test_objects_that_hold_each_other_are_met_once(tmp_path):
    parts = [Unknown() for _ in range(12)]
    for part in parts:
        part.__dict__.update({f"part{i}": other for i, other in enumerate(parts)})
    weights = read_weights(saved(tmp_path, {"state_dict": GOOD, "trainer": parts[0]}))
    assert_taken(weights)
    assert weights.entry == "state_dict"
    shared = {"a": 1}
    for _ in range(14):
        shared = {name: shared for name in ("a", "b", "c", "d")}
    assert_taken(read_weights(saved(tmp_path, {"state_dict": GOOD, "settings": shared})))


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_without_values_or_dense_memory_are_named(kind):
    odd = GOOD["out.2.bias"].to("meta") if kind == "meta" else GOOD["out.2.bias"].to_sparse()
    with pytest.raises(CheckpointError, match="out.2.bias"):
        read_weights(GOOD | {"out.2.bias": odd})


def test_a_closed_file_is_named(tmp_path):
    with open(saved(tmp_path, GOOD), "rb") as file:
        pass
    with pytest.raises(InvalidArgument, match="^weights="):
        read_weights(file)


@pytest.mark.parametrize("metadata", [["a"], "hello", {"admfast": 3}])
def test_metadata_of_another_kind_are_no_safetensors(tmp_path, metadata):
    save_file(GOOD, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8 : 8 + size])).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with pytest.raises(CheckpointError, match="x.safetensors"):
        read_weights(tmp_path / "x.safetensors")


def test_a_path_that_the_system_does_not_take_is_named():
    with pytest.raises(InvalidArgument, match="^weights="):
        read_weights("x" * 5000 + ".pt")
