"""The network of a run: fresh or from a weights file, with classes of its own, frozen and recomputed in part."""

from __future__ import annotations

import dataclasses
import fnmatch
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from admfast.checkpoints import ModelInfo, load_network
from admfast.engine.precision import POLICIES, policy
from admfast.errors import Unavailable, invalid
from admfast.models import NetConfig, UNetConfig, build
from admfast.models.fold import FoldableNet
from admfast.models.layers import AttentionBlock, ResBlock
from admfast.training.recipe import Recipe

State = dict[str, Tensor]


def build_network(recipe: Recipe, start: str | PathLike[str] | None = None) -> nn.Module:
    """Return the network of a recipe in training mode, its weights a function of the recipe's seed.

    start: weights file to begin from (any that `admfast.load` reads, a run's folder too). Its network must be
        the recipe's but for dropout and the number of classes: what has a row for each class begins anew where
        the number differs. With a null class more than the file has classes, only that row does.
    Raises: CheckpointError, InvalidArgument.
    """
    with torch.random.fork_rng(devices=[]):
        # torch's seeds end at 2^63; those above give the network of another seed.
        torch.manual_seed(recipe.seed % 2**63)
        net = build(recipe.network)
    if start is not None:
        given, info = load_network(start)
        net.load_state_dict(_fitted(net.state_dict(), given.state_dict(), recipe, info), strict=True)
    freeze(net, recipe.freeze)
    set_checkpointing(net, recipe.checkpointing)
    return net.train()


def network_of(start: str | PathLike[str], **options: Any) -> ModelInfo:
    """Return what a weights file is; options as for `load_network`. Raises CheckpointError."""
    return load_network(start, **options)[1]


def _fitted(fresh: State, given: State, recipe: Recipe, info: ModelInfo) -> State:
    """Return the weights of a file for the network of a recipe, whose classes may be others."""
    old, new = info.config, recipe.network
    if _without_classes(old) != _without_classes(new):
        raise invalid("from", str(info.path), f"a network like the recipe's; {_difference(old, new)}")
    if classes_of(old) == classes_of(new):
        return given
    known = classes_of(old) or 0
    null_row = recipe.drop_classes > 0 and classes_of(new) == known + 1
    state = dict(given)
    for key in fresh:
        if key not in given:
            state[key] = fresh[key]  # the classes of a network that had none
        elif given[key].shape != fresh[key].shape:
            state[key] = fresh[key].clone()
            if null_row:
                state[key][:known] = given[key]
    return {key: state[key] for key in fresh}


def classes_of(network: NetConfig) -> int | None:
    """Return the number of classes that a network knows, a null class included; None without."""
    if isinstance(network, UNetConfig):
        return network.num_classes
    return network.out_channels


def _without_classes(network: NetConfig) -> dict[str, Any]:
    """Return what must be equal in two networks for one to begin as the other."""
    fields = network.to_dict()
    names = ["dropout", "use_checkpoint", "num_classes"]
    if not isinstance(network, UNetConfig):
        names.append("out_channels")
    return {name: value for name, value in fields.items() if name not in names}


def _difference(old: NetConfig, new: NetConfig) -> str:
    a, b = _without_classes(old), _without_classes(new)
    differing = [name for name in a | b if a.get(name) != b.get(name)]
    return ", ".join(f"{name} is {a.get(name)} there, {b.get(name)} here" for name in differing)


def freeze(net: nn.Module, patterns: tuple[str, ...]) -> None:
    """Let parameters whose names fit a pattern need no gradient. Raises InvalidArgument where none fits."""
    for pattern in patterns:
        found = [p for name, p in net.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise invalid("freeze", pattern, "a pattern that fits parameters, such as input_blocks.*")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise invalid("freeze", patterns, "at least one parameter must be left to train")


def set_checkpointing(net: nn.Module, which: str | int) -> None:
    """Choose the blocks that the backward pass computes again instead of keeping what is inside them.

    which: "none", "attention", "all", or k for every k-th block in the order of the network.
    """
    blocks = [module for module in net.modules() if isinstance(module, ResBlock | AttentionBlock)]
    for number, block in enumerate(blocks):
        if isinstance(which, int):
            block.use_checkpoint = number % which == which - 1
        else:
            attention = which == "attention" and isinstance(block, AttentionBlock)
            block.use_checkpoint = which == "all" or attention


def resolved_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with "auto" replaced by what it means on the device.

    Stored with the run, so that it goes on as it began wherever that is. Raises Unavailable.
    """
    if recipe.precision != "auto":
        policy(recipe.precision, device)
        return recipe
    torso = policy("auto", device).torso
    name = next(name for name, known in POLICIES.items() if known.torso == torso and not known.tf32)
    return dataclasses.replace(recipe, precision=name)


def set_precision(net: nn.Module, precision: str) -> None:
    """Let the torso of a network compute in a precision, with parameters and gradients in float32.

    Each weight is rounded where it is used, and its gradient is added up in float32. Norms and softmax
    accumulate in float32, embeddings and the last layer compute in it.
    Raises: Unavailable for a network of another make.
    """
    dtype = POLICIES[precision].torso
    if isinstance(net, FoldableNet):
        net.training_dtype = None if dtype == torch.float32 else dtype
    elif dtype != torch.float32:
        raise Unavailable(f"precision={precision!r}: only for the networks of this package")
