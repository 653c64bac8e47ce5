"""Find the networks in a program's model, convert them, and report which parts were converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from admfast.accelerate.class_conversion import Converted, original_class_of
from admfast.accelerate.forward_methods import ForwardMethod
from admfast.accelerate.networks import (
    CODE_BASES,
    AcceleratedNet,
    check_policy,
    convert_network,
    find_code_base,
    find_refusal,
)
from admfast.engine.precision import POLICIES
from admfast.errors import allowed_names, invalid
from admfast.models.fold import FoldableNet
from admfast.models.fold.net import FOLD_LOCK

Model = TypeVar("Model")
PRECISIONS = ("fp32", "bf16", "fp16")


def accelerate(model: Model, precision: str | None = None) -> Model:
    """Convert the ADM networks in a model in place, and return the model.

    Every module stays the same object, with its name, parameters, hooks and mode; its class becomes a
    subclass of its own class. Outputs are new contiguous tensors with the dtype that they had before.
    Parameters may be trained, loaded and moved as before. A write to `parameter.data` is noticed only if it
    changes one of the values that are compared at every call: all values of small parameters, some of every
    row and column of large ones. No random number is drawn.

    Args:
        model: a published network (`UNetModel`, `SuperResModel`, `EncoderUNetModel`) from any copy of the
            code, a network of EDM's code, diffusers' `UNet2DModel`, or an object that holds such networks: a
            wrapper, a denoiser, a pipeline.
        precision: dtype in which the torso computes: "fp32", "bf16" or "fp16"; None keeps the dtype of its
            parameters.

    Raises: InvalidArgument for a model with no such network or none that can be converted, and for a
    precision that is unknown or that one of the networks can't use.
    """
    if precision is not None and precision not in PRECISIONS:
        raise invalid("precision", precision, allowed_names(precision, [*PRECISIONS]))
    networks = list(_networks(model))
    if not networks:
        parts = " or ".join(f"{', '.join(known.submodules)} ({known.name})" for known in CODE_BASES)
        allowed = f"a network with the parts {parts}, {_describe_model(model)}"
        raise invalid("model", type(model).__name__, allowed)
    refused = {net: reason for net in networks if (reason := _find_refusal(net))}
    if len(refused) == len(networks):
        net, reason = next(iter(refused.items()))
        raise invalid("model", type(net).__name__, f"must have a network that can be converted: {reason}")
    policy = None if precision is None else POLICIES[precision]
    with FOLD_LOCK:  # two threads may share a network
        convertible = [net for net in networks if net not in refused]
        for net in convertible:  # all before the first is converted
            check_policy(net, policy)
        for net in convertible:
            if isinstance(net, AcceleratedNet):
                net.accelerated_policy = policy
            else:
                convert_network(net, policy)
    return model


def report(model: Any) -> str:
    """Return lines that say which parts of a model's networks are converted, and why the others are not."""
    lines = []
    for net in _networks(model):
        if not isinstance(net, AcceleratedNet):
            lines.append(f"{type(net).__name__}: as it is; {_find_refusal(net) or 'not accelerated'}")
            continue
        forward, name = net.accelerated_forward, original_class_of(net).__name__
        if isinstance(forward, ForwardMethod):
            lines.append(f"{name}: whole, {forward.method} is the published {forward.kind}'s")
        else:
            lines.append(f"{name}: block by block; {forward}")
        counts = Counter(
            original_class_of(m).__name__ for m in net.modules() if isinstance(m, Converted) and m is not net
        )
        lines += [f"  {count} {name}" for name, count in sorted(counts.items())]
        lines.append(f"  folded: {_describe_folding(net)}")
        lines += [f"  {name}: as it is; {reason}" for name, reason in net.accelerated_unconverted.items()]
    return "\n".join(lines)


def _networks(model: Any) -> Iterator[Any]:
    """Yield the networks in a module; of any other object, those in the modules among its attributes."""
    roots = [model] if isinstance(model, nn.Module) else list(getattr(model, "__dict__", {}).values())
    seen_ids: set[int] = set()
    for root in roots:
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if find_code_base(module) and id(module) not in seen_ids and _is_other_code(module):
                seen_ids.add(id(module))
                yield module


def _describe_folding(net: AcceleratedNet) -> str:
    """Say whether a network is folded, and in which dtype its torso computes."""
    if net.is_folded:
        return f"yes, computes in {net.torso_dtype}"
    policy, current = net.accelerated_policy, f"not now, computes in {net.torso_dtype}"
    if policy is None or policy.torso == net.torso_dtype:
        return current
    return f"{current}; {policy.torso} from its first call in evaluation mode"


def _find_refusal(net: Any) -> str | None:
    return None if isinstance(net, AcceleratedNet) else find_refusal(net)


def _is_other_code(module: nn.Module) -> bool:
    return isinstance(module, AcceleratedNet) or not isinstance(module, FoldableNet)


def _describe_model(model: Any) -> str:
    """Say why a model is rejected."""
    if isinstance(model, FoldableNet):
        return "from other code: admfast's own networks need no conversion"
    if isinstance(model, nn.Module):
        return f"but this module has {', '.join(sorted(model._modules)[:6]) or 'no parts'}"
    return "or an object that holds one"
