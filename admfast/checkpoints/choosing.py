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

from admfast.checkpoints.differences import shapes_of
from admfast.checkpoints.infer import in_published_order
from admfast.checkpoints.pickles import Record, StoredTensor, entries_of, other_form

ROOTS = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")
LEAVES = ("weight", "bias", "positional_embedding")
# Keys that every network has. The second finds networks that lack the first, for an error that says so.
_ANCHORS = ("time_embed.0.weight", "input_blocks.0.0.weight")
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|avg|shadow)([._\d]|$)")
# ema_pytorch's name for the trained weights, torch_ema's for the stored current ones, and words that negate.
_CURRENT = re.compile(r"(^|[._])(online|collected|non?|not|without)([._]|$)")
# Counters of profilers and trainers in layers. They have no effect on the layers' results.
_COUNTERS = ("total_ops", "total_params", "num_batches_tracked", "n_averaged")
# What to save instead of tensors that aren't dense, by their kind (`other_form`).
_WANTED = {
    "quantized": "dequantized ones",
    "negated": "the results of resolve_neg()",
    "conjugated": "real ones",
    "device": "the results of cpu()",
}
_DEEPEST = 16
HOW = "entry=NAME, an option of load, or --set entry=NAME on the command line"


@dataclass(frozen=True)
class Chosen:
    """State dict that was chosen from a file's contents.

    tensors: tensors, or their places in the file, by key. entry: its name in the file, "" for the top level.
    average: whether it is the average of the weights over training, which is preferred. left: names of the
    other contents. why: why an average among these was not chosen.
    """

    tensors: dict[str, Any]
    entry: str = ""
    average: bool = False
    left: tuple[str, ...] = ()
    why: str = ""

    @property
    def note(self) -> str:
        """One line that says what was chosen and what was left out; empty if nothing was left out."""
        if not self.left:
            return ""
        taken = f"took {self.entry}" if self.entry else "took the network's tensors"
        average = " (the average of the weights over training)" if self.average else ""
        more = f", ... {len(self.left)} in all" if len(self.left) > 6 else ""
        how = "; entry= chooses another" if self.entry else ""
        why = f" ({self.why})" if self.why else ""
        return f"{taken}{average}, left out {', '.join(self.left[:6])}{more}{why}{how}"


def choose(content: Any, entry: str | None = None) -> Chosen:
    """Return the state dict of the network in a file's contents.

    If there are several, the average of the weights over training is preferred to the current weights.

    entry: name of the state dict, or a part of its name; None considers all.

    Raises:
        ValueError: if there is no state dict, none with that name, or if several different ones remain.
    """
    top = entries_of(content)
    if top is None:
        kind = content.name if isinstance(content, Record) else type(content).__name__
        kind = "tensor" if is_tensor(content) else kind
        raise ValueError(f"holds a {kind}, not a state dict")
    if not top:
        raise ValueError("an empty state dict")
    found = dict(_flat(top))
    entry = None if entry is None else str(entry)  # a command line reads 0.9999 as a number
    networks = [network for network in _networks(found) if network.tensors]
    if networks:
        listed, why = _listed_averages(networks, found)
        network = _one_of(networks + listed, entry, why)
        _refuse_other_forms(network, found)
        return _with_left(network, found, "" if network.average else "; ".join(why.values()))
    _refuse_lists_alone(found, entry)
    if any(_is_optimiser(held) for held in (top, *map(entries_of, top.values()))):
        raise ValueError(f"the state of an optimiser, not of a network; no entry in it is a network ({HOW})")
    return _plain(found, entry)


def _flat(
    node: Mapping[Any, Any], path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its dotted name; the value of a key that isn't text is yielded as None.

    The parts of a trainer may hold each other. If an object was visited before, only the tensors directly in
    it are yielded again, because a state dict may have two names.
    """
    seen = set() if seen is None else seen
    for key, value in node.items():
        inner = entries_of(value) if len(path) < _DEEPEST else None
        name = (*path, str(key))
        if not inner:
            yield ".".join(name), value if isinstance(key, str) else None
        elif id(value) not in seen:
            seen.add(id(value))
            yield from _flat(inner, name, seen)
        else:
            own = ((part, held) for part, held in inner.items() if is_tensor(held))
            yield from ((".".join((*name, str(part))), held) for part, held in own)


def is_tensor(value: Any) -> bool:
    """Tell whether a leaf is a tensor or a tensor's place in the file."""
    return isinstance(value, Tensor | StoredTensor)


def _networks(found: Mapping[str, Any]) -> list[Chosen]:
    """Return every network in the contents, found by the keys that all networks have."""
    prefixes = {
        name.removesuffix(anchor): None
        for anchor in _ANCHORS
        for name in found
        if name == anchor or name.endswith(f".{anchor}")
    }
    networks: list[Chosen] = []
    for prefix in prefixes:
        names = {name: name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        keys = {
            key: found[name] for name, key in names.items() if _of_a_network(key) and is_tensor(found[name])
        }
        networks.append(Chosen(keys, prefix.rstrip("."), _says_average(prefix)))
        networks += _averages_without_dots(networks[-1], found)
    return networks


def _says_average(name: str) -> bool:
    """Tell whether a name is that of an average over training."""
    return bool(_AVERAGE.search(name.lower()) and not _CURRENT.search(name.lower()))


def _of_a_network(key: str) -> bool:
    """Tell whether a key looks like a network's; those of schedules, counters and other models don't."""
    return key.split(".", 1)[0] in ROOTS and key.rsplit(".", 1)[-1] in LEAVES


def _averages_without_dots(network: Chosen, found: Mapping[str, Any]) -> list[Chosen]:
    """Return averages whose keys have no dots, as some trainers write: model_ema.diffusion_modelout2bias."""
    path = network.entry.split(".") if network.entry else []
    averages = []
    for at in range(len(path)):
        entry = ".".join([*path[:at], "model_ema"])
        under = {key: "".join([*path[at + 1 :], key]).replace(".", "") for key in network.tensors}
        if under and all(is_tensor(found.get(f"{entry}.{name}")) for name in under.values()):
            tensors = {key: found[f"{entry}.{name}"] for key, name in under.items()}
            averages.append(Chosen(tensors, entry, True))
    return averages


def _is_listed_average(name: str, value: Any) -> bool:
    """Tell whether a value is an average stored as a list of parameters, not just a list of numbers."""
    several = isinstance(value, list | tuple) and all(map(is_tensor, value))
    return several and _says_average(name) and any(len(one.shape) > 1 for one in value)


def _listed_averages(networks: list[Chosen], found: Mapping[str, Any]) -> tuple[list[Chosen], dict[str, str]]:
    """Return the averages that are stored as lists, and for each unusable list the reason, by its name.

    score_sde and torch_ema store `module.parameters()` as a list. Its tensors get the keys of a network in
    the same file that has the same shapes in the same order. The keys of that network must be in the order of
    its `state_dict()`; otherwise two parameters of equal shape could be swapped unnoticed.
    """
    averages: list[Chosen] = []
    why: dict[str, str] = {}
    lists = {name: value for name, value in found.items() if _is_listed_average(name, value)}
    if not lists:  # skips checking the order, for which the network is built
        return averages, why
    ordered = [network for network in networks if in_published_order(shapes_of(network.tensors))]
    for name, value in lists.items():
        shapes = [tuple(one.shape) for one in value]
        of = [list(shapes_of(network.tensors).values()) for network in ordered]
        if shapes in of:
            keys = ordered[of.index(shapes)].tensors
            averages.append(Chosen(dict(zip(keys, value, strict=True)), name, True))
        elif not ordered:
            where = networks[0].entry or "the network"
            why[name] = f"{name} has no names, and the keys of {where} are not in the order of its parameters"
        elif len(shapes) != len(of[0]):
            why[name] = f"{name} holds {len(shapes)} tensors, but the network has {len(of[0])}"
        else:
            rows = zip(ordered[0].tensors, of[0], shapes, strict=True)
            key, needs, has = next(row for row in rows if row[1] != row[2])
            why[name] = f"{name} has shape {list(has)} in the place of {key}, not {list(needs)}"
    return averages, why


def _refuse_lists_alone(found: Mapping[str, Any], entry: str | None) -> None:
    """Reject an average that is a list of tensors if the file holds no network that gives them names."""
    if entry is None and any(is_tensor(value) and len(value.shape) for value in found.values()):
        return  # another model's tensors, which a later error describes better
    for name, value in found.items():
        if _is_listed_average(name, value) and _names(entry, name):
            raise ValueError(
                f"holds an average as a list of {len(value)} tensors without names ({name}), and no network "
                "to name them; save the network's state dict"
            )


def _names(entry: str | None, name: str) -> bool:
    """Tell whether `entry` is this name or a part of its path; None matches every name."""
    return entry is None or f".{entry}." in f".{name}."


def _refuse_other_forms(network: Chosen, found: Mapping[str, Any]) -> None:
    """Reject a network with a weight or bias that isn't a plain tensor, instead of leaving it out."""
    prefix = f"{network.entry}." if network.entry else ""
    own = (name for name in found if name.startswith(prefix))
    inside = {name: found[name] for name in own if name.removeprefix(prefix).split(".", 1)[0] in ROOTS}
    _refuse_odd_tensors(inside | network.tensors)
    for name, value in found.items():
        key = name.removeprefix(prefix)
        if value is None or not (is_tensor(value) or key.rsplit(".", 1)[-1] in LEAVES):
            continue
        if name in inside and key not in network.tensors and key.rsplit(".", 1)[-1] not in _COUNTERS:
            raise ValueError(
                f"holds {name}, which is not a plain weight or bias (pruned, parametrised, a NumPy array?); "
                "save the network's plain state dict"
            )


def _refuse_odd_tensors(found: Mapping[str, Any]) -> None:
    """Reject tensors that aren't dense (quantized, sparse, ...); the error names their kind."""
    for name, value in found.items():
        for part in value if isinstance(value, list | tuple) else (value,):  # quantized layers: a tuple
            form = other_form(part)
            if form is not None:
                wanted = _WANTED.get(form, "dense ones with values")
                raise ValueError(f"holds {form} tensors ({name}); save {wanted}")


def _same(one: Chosen, other: Chosen) -> bool:
    """Tell whether two entries are one state dict under two names."""
    if one.tensors.keys() != other.tensors.keys():
        return False
    pairs = ((value, other.tensors[key]) for key, value in one.tensors.items())
    return all(a is b or (isinstance(a, StoredTensor) and a == b) for a, b in pairs)


def _one_of(networks: list[Chosen], entry: str | None, why: Mapping[str, str]) -> Chosen:
    """Return the network that `entry` names, else the only average, else the only network."""
    names = ", ".join(network.entry or "(the file's own keys)" for network in networks)
    if entry is not None:
        exact = [network for network in networks if network.entry == entry]
        under = [network for network in networks if _names(entry, network.entry)]
        networks = exact or under
        if not networks:
            reasons = "; ".join(why[name] for name in why if _names(entry, name))
            wrong = f" ({reasons})" if reasons else ""
            raise ValueError(f"has no entry {entry!r} with a network's weights{wrong}; there are: {names}")
    first, *others = [network for network in networks if network.average] or networks
    if not all(_same(first, other) for other in others):
        raise ValueError(f"holds the weights of several networks: {names}; give one of these as {HOW}")
    return first


def _with_left(network: Chosen, found: Mapping[str, Any], why: str) -> Chosen:
    """Return the network with `why` and `left`. Names in `left` are cut after the first part that differs."""
    prefix = f"{network.entry}." if network.entry else ""
    taken = {id(value) for value in network.tensors.values()}
    left: dict[str, None] = {}
    for name, value in found.items():
        if id(value) in taken or name == network.entry:
            continue
        if name.startswith(prefix):
            key = name.removeprefix(prefix)
            inside = key.split(".", 1)[0] in ROOTS  # a counter in a layer: give its full name
            left[prefix + (key if inside else key.split(".", 1)[0])] = None
            continue
        parts, own = name.split("."), prefix.split(".")
        shared = next(i for i in range(len(parts)) if i >= len(own) or parts[i] != own[i])
        left[".".join(parts[: shared + 1])] = None
    return Chosen(network.tensors, network.entry, network.average, tuple(left), why)


def _is_optimiser(held: Mapping[Any, Any] | None) -> bool:
    return held is not None and {"state", "param_groups"} <= held.keys()


def _plain(found: Mapping[str, Any], entry: str | None) -> Chosen:
    """Return a state dict that isn't a network's; a later error says what it lacks."""
    tensors = {name: value for name, value in found.items() if is_tensor(value)}
    if entry is not None:
        prefix = f"{entry}."
        found = {name: value for name, value in found.items() if name.startswith(prefix)}
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    _refuse_odd_tensors(found)
    if not tensors:
        where = f" under {entry!r}" if entry is not None else ""
        raise ValueError(f"holds no tensors by name{where} ({_quoted(list(found))}): not a state dict")
    return Chosen(tensors, entry or "", left=tuple(name for name in found if not is_tensor(found[name])))


def _quoted(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown + (", ..." if len(names) > 4 else "")
