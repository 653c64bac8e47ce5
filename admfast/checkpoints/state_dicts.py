"""Find the network's state dict in the contents of a file: under prefixes, in wrappers, among other values.

Nested names are flattened first: "out.2.bias" within "ema" becomes "ema.out.2.bias". So a nested dict and a
prefix of the keys are the same thing. Its name is called an entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from admfast.checkpoints.complete_network import is_in_published_order
from admfast.checkpoints.differences import shapes_of
from admfast.checkpoints.pickles import PickledObject, StoredTensor, named_values, non_dense_kind

NETWORK_ROOTS = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")
PARAMETER_NAMES = ("weight", "bias", "positional_embedding")
# Keys that every network has. The second finds networks that lack the first, for an error that says so.
_KEYS_OF_EVERY_NETWORK = ("time_embed.0.weight", "input_blocks.0.0.weight")
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|avg|shadow)([._\d]|$)")
# ema_pytorch's name for the trained weights, torch_ema's for the stored current ones, and words that negate.
_NOT_AVERAGE = re.compile(r"(^|[._])(online|collected|non?|not|without)([._]|$)")
# Counters of profilers and trainers in layers. They have no effect on the layers' results.
_COUNTER_NAMES = ("total_ops", "total_params", "num_batches_tracked", "n_averaged")
# Advice on what to save instead of tensors that aren't dense, by their kind (`non_dense_kind`).
_HOW_TO_SAVE = {
    "quantized": "dequantized ones",
    "negated": "the results of resolve_neg()",
    "conjugated": "real ones",
    "device": "the results of cpu()",
}
_MAX_DEPTH = 16
HOW_TO_GIVE_ENTRY = "entry=NAME, an option of load, or --set entry=NAME on the command line"


@dataclass(frozen=True)
class NetworkEntry:
    """State dict of a network that a file holds.

    tensors: tensors, or their places in the file, by key. name: its name in the file, "" for the top level.
    is_average: whether it is the average of the weights over training, which is preferred. ignored: names of
    the file's other contents. why_no_average: the reason why an average in the file can't be used.
    """

    tensors: dict[str, Any]
    name: str = ""
    is_average: bool = False
    ignored: tuple[str, ...] = ()
    why_no_average: str = ""

    @property
    def summary(self) -> str:
        """One line that names the state dict and the ignored contents; empty if nothing is ignored."""
        if not self.ignored:
            return ""
        used = f"used {self.name}" if self.name else "used the network's tensors"
        average = " (the average of the weights over training)" if self.is_average else ""
        names = ", ".join(self.ignored[:6]) + (
            f", ... ({len(self.ignored)} names)" if len(self.ignored) > 6 else ""
        )
        reason = f" ({self.why_no_average})" if self.why_no_average else ""
        hint = "; the option entry chooses another state dict" if self.name else ""
        return f"{used}{average}, ignored {names}{reason}{hint}"


def find_network_entry(content: Any, entry: str | None = None) -> NetworkEntry:
    """Return the state dict of the network in a file's contents.

    If there are several, the average of the weights over training is preferred to the current weights.

    entry: name of the state dict, or a part of its name; None considers all.

    Raises:
        ValueError: if there is no state dict, none with that name, or if several different ones remain.
    """
    top = named_values(content)
    if top is None:
        kind = content.name if isinstance(content, PickledObject) else type(content).__name__
        kind = "tensor" if is_tensor(content) else kind
        raise ValueError(f"holds a {kind}, not a state dict")
    if not top:
        raise ValueError("an empty state dict")
    leaves = dict(_flatten(top))
    entry = None if entry is None else str(entry)  # a command line reads 0.9999 as a number
    networks = [network for network in _find_networks(leaves) if network.tensors]
    if networks:
        averages, reasons = _name_average_lists(networks, leaves)
        network = _select_network(networks + averages, entry, reasons)
        _reject_other_parameters(network, leaves)
        return _with_ignored(network, leaves, "" if network.is_average else "; ".join(reasons.values()))
    _reject_unnamed_lists(leaves, entry)
    if any(_is_optimiser(values) for values in (top, *map(named_values, top.values()))):
        raise ValueError(
            f"the state of an optimiser, not of a network; no entry in it is a network ({HOW_TO_GIVE_ENTRY})"
        )
    return _other_state_dict(leaves, entry)


def _flatten(
    node: Mapping[Any, Any], path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its dotted name; yield None as the value of a key that isn't text.

    The parts of a trainer may hold each other. If an object was visited before, only the tensors directly in
    it are yielded again, because a state dict may have two names.
    """
    seen = set() if seen is None else seen
    for key, value in node.items():
        inner = named_values(value) if len(path) < _MAX_DEPTH else None
        name = (*path, str(key))
        if not inner:
            yield ".".join(name), value if isinstance(key, str) else None
        elif id(value) not in seen:
            seen.add(id(value))
            yield from _flatten(inner, name, seen)
        else:
            tensors = ((part, leaf) for part, leaf in inner.items() if is_tensor(leaf))
            yield from ((".".join((*name, str(part))), tensor) for part, tensor in tensors)


def is_tensor(value: Any) -> bool:
    """Tell whether a leaf is a tensor or a tensor's place in the file."""
    return isinstance(value, Tensor | StoredTensor)


def _find_networks(leaves: Mapping[str, Any]) -> list[NetworkEntry]:
    """Return every network in the contents, found by the keys that all networks have."""
    prefixes = {
        name.removesuffix(known_key): None
        for known_key in _KEYS_OF_EVERY_NETWORK
        for name in leaves
        if name == known_key or name.endswith(f".{known_key}")
    }
    networks: list[NetworkEntry] = []
    for prefix in prefixes:
        key_of_name = {name: name.removeprefix(prefix) for name in leaves if name.startswith(prefix)}
        tensors = {
            key: leaves[name]
            for name, key in key_of_name.items()
            if _is_parameter_key(key) and is_tensor(leaves[name])
        }
        networks.append(NetworkEntry(tensors, prefix.rstrip("."), _is_average_name(prefix)))
        networks += _find_averages_without_dots(networks[-1], leaves)
    return networks


def _is_average_name(name: str) -> bool:
    """Tell whether a name is that of an average over training."""
    return bool(_AVERAGE.search(name.lower()) and not _NOT_AVERAGE.search(name.lower()))


def _is_parameter_key(key: str) -> bool:
    """Tell whether a key looks like a network's; those of schedules, counters and other models don't."""
    return key.split(".", 1)[0] in NETWORK_ROOTS and key.rsplit(".", 1)[-1] in PARAMETER_NAMES


def _find_averages_without_dots(network: NetworkEntry, leaves: Mapping[str, Any]) -> list[NetworkEntry]:
    """Return averages whose keys have no dots, as some trainers write: model_ema.diffusion_modelout2bias."""
    path = network.name.split(".") if network.name else []
    averages = []
    for depth in range(len(path)):
        average_name = ".".join([*path[:depth], "model_ema"])
        dotless_names = {key: "".join([*path[depth + 1 :], key]).replace(".", "") for key in network.tensors}
        if dotless_names and all(
            is_tensor(leaves.get(f"{average_name}.{name}")) for name in dotless_names.values()
        ):
            tensors = {key: leaves[f"{average_name}.{name}"] for key, name in dotless_names.items()}
            averages.append(NetworkEntry(tensors, average_name, True))
    return averages


def _is_average_list(name: str, value: Any) -> bool:
    """Tell whether a value is an average stored as a list of parameters, not just a list of numbers."""
    several = isinstance(value, list | tuple) and all(map(is_tensor, value))
    return several and _is_average_name(name) and any(len(tensor.shape) > 1 for tensor in value)


def _name_average_lists(
    networks: list[NetworkEntry], leaves: Mapping[str, Any]
) -> tuple[list[NetworkEntry], dict[str, str]]:
    """Return the averages that are stored as lists, and for each unusable list the reason, by its name.

    score_sde and torch_ema store `module.parameters()` as a list. Its tensors get the keys of a network in
    the same file that has the same shapes in the same order. The keys of that network must be in the order of
    its `state_dict()`; otherwise two parameters of equal shape could be swapped unnoticed.
    """
    averages: list[NetworkEntry] = []
    reasons: dict[str, str] = {}
    lists = {name: value for name, value in leaves.items() if _is_average_list(name, value)}
    if not lists:  # skips checking the order, for which the network is built
        return averages, reasons
    ordered_networks = [network for network in networks if is_in_published_order(shapes_of(network.tensors))]
    for name, value in lists.items():
        shapes = [tuple(tensor.shape) for tensor in value]
        shapes_of_networks = [list(shapes_of(network.tensors).values()) for network in ordered_networks]
        if shapes in shapes_of_networks:
            keys = ordered_networks[shapes_of_networks.index(shapes)].tensors
            averages.append(NetworkEntry(dict(zip(keys, value, strict=True)), name, True))
        elif not ordered_networks:
            where = networks[0].name or "the network"
            reasons[name] = (
                f"{name} has no names, and the keys of {where} are not in the order of its parameters"
            )
        elif len(shapes) != len(shapes_of_networks[0]):
            reasons[name] = (
                f"{name} holds {len(shapes)} tensors, but the network has {len(shapes_of_networks[0])}"
            )
        else:
            rows = zip(ordered_networks[0].tensors, shapes_of_networks[0], shapes, strict=True)
            key, expected, found = next(row for row in rows if row[1] != row[2])
            reasons[name] = f"{name} has shape {list(found)} in the place of {key}, not {list(expected)}"
    return averages, reasons


def _reject_unnamed_lists(leaves: Mapping[str, Any], entry: str | None) -> None:
    """Reject an average that is a list of tensors if the file holds no network that gives them names."""
    if entry is None and any(is_tensor(value) and len(value.shape) for value in leaves.values()):
        return  # another model's tensors, which a later error describes better
    for name, value in leaves.items():
        if _is_average_list(name, value) and _entry_matches(entry, name):
            raise ValueError(
                f"holds an average as a list of {len(value)} tensors without names ({name}), and no network "
                "to name them; save the network's state dict"
            )


def _entry_matches(entry: str | None, name: str) -> bool:
    """Tell whether `entry` is this name or a part of its path; None matches every name."""
    return entry is None or f".{entry}." in f".{name}."


def _reject_other_parameters(network: NetworkEntry, leaves: Mapping[str, Any]) -> None:
    """Reject a network with a weight or bias that isn't a plain tensor, instead of ignoring that tensor."""
    prefix = f"{network.name}." if network.name else ""
    network_leaves = {
        name: leaf
        for name, leaf in leaves.items()
        if name.startswith(prefix) and name.removeprefix(prefix).split(".", 1)[0] in NETWORK_ROOTS
    }
    _reject_non_dense(network_leaves | network.tensors)
    for name, leaf in leaves.items():
        key = name.removeprefix(prefix)
        if leaf is None or not (is_tensor(leaf) or key.rsplit(".", 1)[-1] in PARAMETER_NAMES):
            continue
        if (
            name in network_leaves
            and key not in network.tensors
            and key.rsplit(".", 1)[-1] not in _COUNTER_NAMES
        ):
            raise ValueError(
                f"holds {name}, which is not a plain weight or bias (pruned, parametrised, a NumPy array?); "
                "save the network's plain state dict"
            )


def _reject_non_dense(leaves: Mapping[str, Any]) -> None:
    """Reject tensors that aren't dense (quantized, sparse, ...); the error names their kind."""
    for name, value in leaves.items():
        for tensor in value if isinstance(value, list | tuple) else (value,):  # quantized layers: a tuple
            kind = non_dense_kind(tensor)
            if kind is not None:
                replacement = _HOW_TO_SAVE.get(kind, "dense ones with values")
                raise ValueError(f"holds {kind} tensors ({name}); save {replacement}")


def _is_same_state_dict(first: NetworkEntry, second: NetworkEntry) -> bool:
    """Tell whether two entries are one state dict under two names."""
    if first.tensors.keys() != second.tensors.keys():
        return False
    pairs = ((value, second.tensors[key]) for key, value in first.tensors.items())
    return all(a is b or (isinstance(a, StoredTensor) and a == b) for a, b in pairs)


def _select_network(
    networks: list[NetworkEntry], entry: str | None, reasons: Mapping[str, str]
) -> NetworkEntry:
    """Return the network that `entry` names, else the only average, else the only network."""
    names = ", ".join(network.name or "(the file's own keys)" for network in networks)
    if entry is not None:
        with_this_name = [network for network in networks if network.name == entry]
        below_this_name = [network for network in networks if _entry_matches(entry, network.name)]
        networks = with_this_name or below_this_name
        if not networks:
            hints = "; ".join(reasons[name] for name in reasons if _entry_matches(entry, name))
            hint = f" ({hints})" if hints else ""
            raise ValueError(f"has no entry {entry!r} with a network's weights{hint}; there are: {names}")
    first, *others = [network for network in networks if network.is_average] or networks
    if not all(_is_same_state_dict(first, other) for other in others):
        raise ValueError(
            f"holds the weights of several networks: {names}; give one of these as {HOW_TO_GIVE_ENTRY}"
        )
    return first


def _with_ignored(network: NetworkEntry, leaves: Mapping[str, Any], why_no_average: str) -> NetworkEntry:
    """Return the network with the names of the ignored contents, cut after the first part that differs."""
    prefix = f"{network.name}." if network.name else ""
    used_ids = {id(value) for value in network.tensors.values()}
    ignored: dict[str, None] = {}
    for name, value in leaves.items():
        if id(value) in used_ids or name == network.name:
            continue
        if name.startswith(prefix):
            key = name.removeprefix(prefix)
            is_network_key = key.split(".", 1)[0] in NETWORK_ROOTS  # a counter in a layer: give its full name
            ignored[prefix + (key if is_network_key else key.split(".", 1)[0])] = None
            continue
        parts, prefix_parts = name.split("."), prefix.split(".")
        num_shared = next(
            i for i in range(len(parts)) if i >= len(prefix_parts) or parts[i] != prefix_parts[i]
        )
        ignored[".".join(parts[: num_shared + 1])] = None
    return NetworkEntry(network.tensors, network.name, network.is_average, tuple(ignored), why_no_average)


def _is_optimiser(values: Mapping[Any, Any] | None) -> bool:
    return values is not None and {"state", "param_groups"} <= values.keys()


def _other_state_dict(leaves: Mapping[str, Any], entry: str | None) -> NetworkEntry:
    """Return a state dict that isn't a network's; a later error names its missing keys."""
    tensors = {name: value for name, value in leaves.items() if is_tensor(value)}
    if entry is not None:
        prefix = f"{entry}."
        leaves = {name: value for name, value in leaves.items() if name.startswith(prefix)}
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    _reject_non_dense(leaves)
    if not tensors:
        where = f" under {entry!r}" if entry is not None else ""
        raise ValueError(f"holds no tensors by name{where} ({_quote_first(list(leaves))}): not a state dict")
    return NetworkEntry(
        tensors, entry or "", ignored=tuple(name for name in leaves if not is_tensor(leaves[name]))
    )


def _quote_first(names: list[str]) -> str:
    quoted = ", ".join(repr(name) for name in names[:4])
    return quoted + (", ..." if len(names) > 4 else "")
