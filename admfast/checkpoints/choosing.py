"""Find the network's state dict in what a file holds: behind prefixes, in wrappers, beside other things.

Everything that a file holds by name is laid flat ("ema" holding "out.2.bias" gives "ema.out.2.bias"), so that
a wrapper's dict and a prefix of the keys are one thing: an entry.
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
# A key of every network here; the second finds those whose first is missing, so that they can be told so.
_ANCHORS = ("time_embed.0.weight", "input_blocks.0.0.weight")
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|avg|shadow)([._\d]|$)")
# ema_pytorch's name for what is trained, torch_ema's for what is set aside, and words that deny the average.
_CURRENT = re.compile(r"(^|[._])(online|collected|non?|not|without)([._]|$)")
# Values beside weights that say nothing of what a layer computes: counters of profilers and trainers.
_COUNTERS = ("total_ops", "total_params", "num_batches_tracked", "n_averaged")
# What to save instead of tensors of another form (`other_form`).
_WANTED = {
    "quantized": "dequantized ones",
    "negated": "those that resolve_neg() gives",
    "conjugated": "real ones",
    "device": "those that cpu() gives",
}
_DEEPEST = 16
HOW = "entry=NAME, an option of load, or --set entry=NAME on the command line"


@dataclass(frozen=True)
class Chosen:
    """The state dict that was taken of a file: places or tensors by key.

    entry: where it lies, "" for the file's own. average: it is the average over training, taken before
    others. left: what else there is by name. why: why an average among it was left.
    """

    tensors: dict[str, Any]
    entry: str = ""
    average: bool = False
    left: tuple[str, ...] = ()
    why: str = ""

    @property
    def note(self) -> str:
        """One line on what was taken and what was left; empty where everything was taken."""
        if not self.left:
            return ""
        taken = f"took {self.entry}" if self.entry else "took the network's tensors"
        average = " (the average of the weights over training)" if self.average else ""
        more = f", ... {len(self.left)} in all" if len(self.left) > 6 else ""
        how = "; entry= names another" if self.entry else ""
        why = f" ({self.why})" if self.why else ""
        return f"{taken}{average}, left {', '.join(self.left[:6])}{more}{why}{how}"


def choose(content: Any, entry: str | None = None) -> Chosen:
    """Return the state dict that a network is loaded from.

    The one network in it; the average over training before the weights that are trained; what `entry` names.

    Raises:
        ValueError: where there is no state dict, none of that name, or several of equal right.
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
        raise ValueError(f"the state of an optimiser, not of a network; no entry of it is one ({HOW})")
    return _plain(found, entry)


def _flat(
    node: Mapping[Any, Any], path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Every leaf by its dotted name; a tensor without a name of text is no tensor of a state dict.

    Of what is met again, as the parts of a trainer hold each other, only its own tensors come once more: a
    state dict may have two names.
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
    """Tell whether a leaf is a tensor, or the place of one."""
    return isinstance(value, Tensor | StoredTensor)


def _networks(found: Mapping[str, Any]) -> list[Chosen]:
    """Every network in it, by the prefixes of the keys that all networks have."""
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
    """Tell whether a name says that what it names is an average over training."""
    return bool(_AVERAGE.search(name.lower()) and not _CURRENT.search(name.lower()))


def _of_a_network(key: str) -> bool:
    """Tell whether a key is like a network's, not like schedules, counters and other models' layers."""
    return key.split(".", 1)[0] in ROOTS and key.rsplit(".", 1)[-1] in LEAVES


def _averages_without_dots(network: Chosen, found: Mapping[str, Any]) -> list[Chosen]:
    """The average that some trainers keep under names without dots: model_ema.diffusion_modelout2bias."""
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
    """Tell whether a value is an average of parameters without their names; lists of numbers are none."""
    several = isinstance(value, list | tuple) and all(map(is_tensor, value))
    return several and _says_average(name) and any(len(one.shape) > 1 for one in value)


def _listed_averages(networks: list[Chosen], found: Mapping[str, Any]) -> tuple[list[Chosen], dict[str, str]]:
    """The averages that some trainers keep as a list, and by name why others aren't.

    score_sde and torch_ema list `module.parameters()`. The keys are those of a network in the same file with
    as many tensors, of these shapes, whose keys are in the order of its parameters, as `state_dict()` writes
    them. In any other order two parameters of one shape could be exchanged unnoticed.
    """
    averages: list[Chosen] = []
    why: dict[str, str] = {}
    lists = {name: value for name, value in found.items() if _is_listed_average(name, value)}
    if not lists:  # the order of a network's parameters takes building it
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
            why[name] = f"{name} has no names, and the keys of {where} are not in the order of parameters"
        elif len(shapes) != len(of[0]):
            why[name] = f"{name} holds {len(shapes)} tensors, not {len(of[0])} as the network"
        else:
            rows = zip(ordered[0].tensors, of[0], shapes, strict=True)
            key, needs, has = next(row for row in rows if row[1] != row[2])
            why[name] = f"{name} has {list(has)} in the place of {key}, not {list(needs)}"
    return averages, why


def _refuse_lists_alone(found: Mapping[str, Any], entry: str | None) -> None:
    """Refuse an average without names where the file holds no network to name its tensors."""
    if entry is None and any(is_tensor(value) and len(value.shape) for value in found.values()):
        return  # another model's tensors, of which more can be said
    for name, value in found.items():
        if _is_listed_average(name, value) and _names(entry, name):
            raise ValueError(
                f"holds an average as a list of {len(value)} tensors without names ({name}), and no network "
                "to name them; save the network's state dict"
            )


def _names(entry: str | None, name: str) -> bool:
    """Tell whether an entry asked for names this one, or a part of its path; None names all."""
    return entry is None or f".{entry}." in f".{name}."


def _refuse_other_forms(network: Chosen, found: Mapping[str, Any]) -> None:
    """Refuse a part of the network in a form that isn't its weights: leaving it out is another network."""
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
                f"holds {name}, which is no weight or bias as a tensor (pruned, parametrised or of NumPy?); "
                "save the network's plain state dict"
            )


def _refuse_odd_tensors(found: Mapping[str, Any]) -> None:
    """Refuse tensors that aren't dense memory holding their values, calling them what they are."""
    for name, value in found.items():
        for part in value if isinstance(value, list | tuple) else (value,):  # a packed layer is a tuple
            form = other_form(part)
            if form is not None:
                wanted = _WANTED.get(form, "dense ones that hold values")
                raise ValueError(f"holds {form} tensors ({name}); save {wanted}")


def _same(one: Chosen, other: Chosen) -> bool:
    """Tell whether two entries are one state dict under two names."""
    if one.tensors.keys() != other.tensors.keys():
        return False
    pairs = ((value, other.tensors[key]) for key, value in one.tensors.items())
    return all(a is b or (isinstance(a, StoredTensor) and a == b) for a, b in pairs)


def _one_of(networks: list[Chosen], entry: str | None, why: Mapping[str, str]) -> Chosen:
    """The network that is asked for, or the only average, or the only network."""
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
    """Add what is left, and why: the names of everything else, cut where they part from the entry."""
    prefix = f"{network.entry}." if network.entry else ""
    taken = {id(value) for value in network.tensors.values()}
    left: dict[str, None] = {}
    for name, value in found.items():
        if id(value) in taken or name == network.entry:
            continue
        if name.startswith(prefix):
            key = name.removeprefix(prefix)
            inside = key.split(".", 1)[0] in ROOTS  # a counter in a layer: named whole
            left[prefix + (key if inside else key.split(".", 1)[0])] = None
            continue
        parts, own = name.split("."), prefix.split(".")
        shared = next(i for i in range(len(parts)) if i >= len(own) or parts[i] != own[i])
        left[".".join(parts[: shared + 1])] = None
    return Chosen(network.tensors, network.entry, network.average, tuple(left), why)


def _is_optimiser(held: Mapping[Any, Any] | None) -> bool:
    return held is not None and {"state", "param_groups"} <= held.keys()


def _plain(found: Mapping[str, Any], entry: str | None) -> Chosen:
    """The state dict of something else than a network, for a message that says what it isn't."""
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
