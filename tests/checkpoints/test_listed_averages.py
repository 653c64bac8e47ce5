"""Tests of averages that a file keeps as a list without names, in the order of the parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from admfast.checkpoints import load_network, read_weights
from admfast.errors import CheckpointError
from tests.checkpoints.test_state_dicts import (
    ANSWERS,
    GOOD,
    OPTIMISER,
    RAW,
    assert_taken,
    prefixed,
    saved,
)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_an_average_kept_as_a_list_is_taken_in_the_order_of_the_parameters(tmp_path, legacy):
    """score_sde and torch_ema save such lists. The network's state dict here also has counter tensors."""
    counted = prefixed("module.", RAW) | {"module.out.2.total_ops": torch.zeros(1)}
    average = {"decay": 0.999, "num_updates": 5, "shadow_params": list(GOOD.values())}
    aside = average | {"collected_params": list(RAW.values())}
    for ema in (average, aside):
        path = saved(tmp_path, {"optimizer": OPTIMISER, "model": counted, "ema": ema, "step": 7}, legacy)
        for entry in (None, "ema"):
            weights = read_weights(path, entry=entry)
            assert_taken(weights)
            assert weights.entry == "ema.shadow_params"
            (note,) = weights.notes
            assert "average" in note and "model" in note and "ema.decay" in note
        assert_taken(read_weights(path, entry="model"), RAW)
    net, _ = load_network(path, **ANSWERS)
    assert torch.equal(net.state_dict()["out.2.bias"], GOOD["out.2.bias"])


@pytest.mark.parametrize("wrong", ["one too few", "another shape"])
def test_an_average_kept_as_a_list_that_does_not_fit_is_left_and_why_is_said(tmp_path, wrong):
    values = list(GOOD.values())
    if wrong == "one too few":
        said = [str(len(values) - 1), str(len(values))]
        values = values[:-1]
    else:
        values[3], said = torch.ones(5), ["[5]", str(list(values[3].shape)), list(GOOD)[3]]
    path = saved(tmp_path, {"model": RAW, "ema": {"shadow_params": values, "decay": 0.9}})
    weights = read_weights(path)
    assert_taken(weights, RAW)
    (note,) = weights.notes
    assert "ema.shadow_params" in note and all(part in note for part in said)
    with pytest.raises(CheckpointError, match="ema.shadow_params"):
        read_weights(path, entry="ema")


def exchanged(state, one="out.0.weight", other="out.0.bias"):
    """Return the state dict with the places of two keys of equal shape exchanged."""
    assert state[one].shape == state[other].shape
    places = {one: other, other: one}
    return {places.get(key, key): state[places.get(key, key)] for key in state}


ORDERS = {
    "weight and bias": exchanged,
    "two blocks": lambda state: exchanged(
        state, "middle_block.0.in_layers.2.bias", "middle_block.2.in_layers.2.bias"
    ),
    "alphabetical": lambda state: dict(sorted(state.items())),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("memory", [False, True], ids=["file", "memory"])
def test_a_list_is_left_where_the_keys_are_not_in_the_order_of_parameters(tmp_path, order, memory):
    """A list follows `module.parameters()`; read by these keys, tensors of equal shape would be exchanged."""
    changed = ORDERS[order](RAW)
    content = {"model": changed, "ema": {"shadow_params": list(GOOD.values()), "decay": 0.9}}
    source = content if memory else saved(tmp_path, content)
    weights = read_weights(source)
    assert_taken(weights, changed)
    assert weights.entry == "model"
    (note,) = weights.notes
    assert "ema.shadow_params" in note and "order" in note
    for entry in ("ema", "shadow_params", "ema.shadow_params"):
        with pytest.raises(CheckpointError, match="ema.shadow_params.*order"):
            read_weights(source, entry=entry)
    with pytest.raises(CheckpointError, match="'teacher'") as caught:
        read_weights(source, entry="teacher")
    assert "shadow_params" not in str(caught.value)
    # A second state dict of the network, with its keys in order, makes the list readable.
    both = {**content, "model": exchanged(RAW), "net": RAW}
    assert_taken(read_weights(both, entry="ema"))


def test_a_list_has_the_names_of_projections_of_another_rank(tmp_path):
    flat = [{k: v[..., 0] if v.dim() == 3 else v for k, v in state.items()} for state in (RAW, GOOD)]
    path = saved(tmp_path, {"model": flat[0], "ema": {"shadow_params": list(flat[1].values())}})
    assert_taken(read_weights(path))


@pytest.mark.parametrize(
    "losses", [[0.5, 0.25], [torch.tensor(0.5)], [torch.ones(3)], [], (np.float64(1),)], ids=str
)
def test_numbers_by_the_name_of_an_average_are_no_weights(tmp_path, losses):
    path = saved(tmp_path, {"model": GOOD, "avg_losses": losses})
    weights = read_weights(path)
    assert_taken(weights)
    (note,) = weights.notes
    assert "avg_losses" in note and "holds" not in note and "average" not in note
    with pytest.raises(CheckpointError, match="avg_losses") as caught:
        read_weights(path, entry="avg_losses")
    assert str(caught.value).count("avg_losses") == 1


@pytest.mark.parametrize(
    "content, entries",
    [
        ({"shadow_params": list(GOOD.values()), "decay": 0.9}, [None, "shadow_params"]),
        ({"ema": {"shadow_params": list(GOOD.values())}, "step": torch.tensor(1)}, [None, "ema"]),
        ({"ema": {"shadow_params": list(GOOD.values())}, "conv.weight": torch.ones(3, 3)}, ["ema"]),
        ({"ema": {"shadow_params": tuple(GOOD.values())}, "optimizer": OPTIMISER["param_groups"]}, [None]),
    ],
    ids=["alone", "beside a step", "beside another model", "beside settings"],
)
def test_an_average_without_a_network_that_names_its_tensors_is_called_so(tmp_path, content, entries):
    for entry in entries:
        with pytest.raises(
            CheckpointError, match=f"list of {len(GOOD)} tensors without names.*shadow_params"
        ):
            read_weights(saved(tmp_path, content), entry=entry)
