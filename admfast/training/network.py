"""Build the network of a run: its first weights, its frozen parameters, and its precision."""

from __future__ import annotations

import dataclasses
import fnmatch
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from admfast.checkpoints import Weights, compare, read_weights, shapes_of
from admfast.engine.precision import POLICIES, policy
from admfast.errors import CheckpointError, Unavailable, invalid
from admfast.models import NetConfig, UNetConfig, build
from admfast.models.fold import FoldableNet
from admfast.models.layers import AttentionBlock, ResBlock
from admfast.training.recipe import Recipe

State = dict[str, Tensor]


def build_network(recipe: Recipe, initial_weights: str | PathLike[str] | None = None) -> nn.Module:
    """Return the network of a recipe in training mode, with random weights from the recipe's seed.

    initial_weights: file whose weights the network starts with instead of random ones: any that
    `admfast.load` reads, also a run's folder. Its network may differ from the recipe's only in dropout
    and the number of classes. If the number of classes differs, parameters with a row for each class
    start from random weights. If the recipe only adds a null class, only the row of that class does.
    Raises: CheckpointError, InvalidArgument.
    """
    with torch.random.fork_rng(devices=[]):
        # Seeds are taken modulo 2^63, torch's limit: a larger seed gives the network of another seed.
        torch.manual_seed(recipe.seed % 2**63)
        net = build(recipe.network)
    if initial_weights is not None:
        net.load_state_dict(_match_classes(net.state_dict(), read_weights(initial_weights), recipe))
    freeze(net, recipe.freeze)
    set_checkpointing(net, recipe.checkpointing)
    return net.train()


def _match_classes(random_state: State, weights: Weights, recipe: Recipe) -> State:
    """Return the weights of a file for the network of a recipe, which may have another number of classes."""
    file_tensors = {key: value.float() for key, value in weights.tensors.items()}
    description = weights.description
    if description is not None and (difference := _describe_difference(description.network, recipe.network)):
        raise invalid("from", str(weights.path), f"a network like the recipe's; {difference}")
    if recipe.kind == "classifier":
        class_keys = [key for key in random_state if key.startswith("out.")]
    else:
        class_keys = [key for key in random_state if key.startswith("label_emb.")]
    # A file without classes gets a random class embedding; any other missing key is an error.
    state = {
        key: file_tensors.get(key, random_state[key] if key == "label_emb.weight" else None)
        for key in random_state
    }
    for key in class_keys:
        old, new = file_tensors.get(key), random_state[key]
        if old is None or old.shape == new.shape or old.shape[1:] != new.shape[1:]:
            continue
        state[key] = new.clone()
        if recipe.drop_classes and len(new) == len(old) + 1:  # a null class after the file's
            state[key][: len(old)] = old  # type: ignore[index]
    shapes = shapes_of({key: value for key, value in state.items() if value is not None})
    unknown = {
        key: tuple(file_tensors[key].shape)
        for key in file_tensors
        if key not in random_state and key != "label_emb.weight"
    }
    if differences := compare({**shapes, **unknown}, shapes_of(random_state)):
        raise CheckpointError(f"{weights.path}: does not fit the recipe's network: {differences.summary()}")
    return {key: value for key, value in state.items() if value is not None}


def _fields_to_compare(network: NetConfig) -> dict[str, Any]:
    """Return the fields that must be equal for one network to begin from the other's weights."""
    fields = network.to_dict()
    names = ["dropout", "use_checkpoint", "num_classes"]
    if not isinstance(network, UNetConfig):
        names.append("out_channels")
    return {name: value for name, value in fields.items() if name not in names}


def _describe_difference(old: NetConfig, new: NetConfig) -> str:
    old_fields, new_fields = _fields_to_compare(old), _fields_to_compare(new)
    differing = [name for name in old_fields | new_fields if old_fields.get(name) != new_fields.get(name)]
    return ", ".join(
        f"{name} is {old_fields.get(name)}, the recipe has {new_fields.get(name)}" for name in differing
    )


def freeze(net: nn.Module, patterns: tuple[str, ...]) -> None:
    """Turn off the gradients of parameters whose names match a pattern.

    Raises InvalidArgument if a pattern matches no parameter, or none is left to train.
    """
    for pattern in patterns:
        matching = [p for name, p in net.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise invalid("freeze", pattern, "a pattern that matches parameters, such as input_blocks.*")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise invalid("freeze", patterns, "at least one parameter must be left to train")


def set_checkpointing(net: nn.Module, mode: str | int) -> None:
    """Choose the values that the backward pass computes again, instead of keeping them.

    mode: "none"; "norms", the outputs of norms before the convolutions of residual blocks; "attention",
    everything inside attention blocks; "all", everything inside all blocks; or k, everything inside every
    k-th block in the order of the network.
    """
    blocks = [module for module in net.modules() if isinstance(module, ResBlock | AttentionBlock)]
    for number, block in enumerate(blocks):
        block.recomputes_norms = mode == "norms"  # type: ignore[assignment]
        if isinstance(mode, int):
            block.use_checkpoint = number % mode == mode - 1
        else:
            attention = mode == "attention" and isinstance(block, AttentionBlock)
            block.use_checkpoint = mode == "all" or attention


def resolve_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with the precision "auto" replaced: bf16 on a GPU, fp32 on a CPU.

    A CPU trains faster in float32 even with AMX, because its convolutions then run by Winograd's algorithm.
    The run stores the precision, so that it continues with it on any device. Raises Unavailable.
    """
    if recipe.precision != "auto":
        policy(recipe.precision, device)
        return recipe
    return dataclasses.replace(recipe, precision="fp32" if device.type == "cpu" else "bf16")


def set_precision(net: nn.Module, precision: str) -> None:
    """Make the torso of a network compute in a precision, with parameters and gradients in float32.

    Each weight is rounded when it is used, and its gradient is accumulated in float32. Norms and softmax
    accumulate in float32; embeddings and the last layer compute in float32.
    Raises: Unavailable for a network that isn't one of this package's.
    """
    dtype = POLICIES[precision].torso
    if isinstance(net, FoldableNet):
        net.training_dtype = None if dtype == torch.float32 else dtype
    elif dtype != torch.float32:
        raise Unavailable(f"precision={precision!r}: only for the networks of this package")
