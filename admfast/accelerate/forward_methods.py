"""Recognise the method of a network that passes images through its blocks as the published forward does.

A method counts as a published forward if it uses only the names that the published code uses, and gives the
same results on a stub network whose blocks are small functions. It may be any `forward...` method. A network
whose forward was changed keeps it, and runs block by block.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.accelerate.class_conversion import original_class_of
from admfast.accelerate.code_inspection import (
    EMBEDDING_NAMES,
    find_function_difference,
    has_comparison_other_than_equality,
)
from admfast.accelerate.equivalence import is_close, random_normal
from admfast.models.layers import timestep_embedding
from admfast.ops.transforms import plain_eager_mode

_COMMON_NAMES = (
    *("th", "torch", "nn", "F", "shape", "type", "dtype", "append", "cat"),
    *("time_embed", "timestep_embedding", "model_channels", "input_blocks", "middle_block", "out"),
)
ALLOWED_NAMES = {
    "unet": {*_COMMON_NAMES, "num_classes", "label_emb", "output_blocks", "pop"},
    "upsampler": {"th", "torch", "nn", "F", "functional", "shape", "interpolate", "cat", "super", "forward"},
    "classifier": {*_COMMON_NAMES, "pool", "startswith", "mean"},
}
ALLOWED_NUMBERS = {-1, 0, 1, 2, 3}


@dataclass(frozen=True)
class ForwardMethod:
    """A method of a network that computes what a published forward computes.

    kind: a key of ALLOWED_NAMES. method: its name. names: its argument names. accepts_kwargs: whether it also
    takes arguments of other names. requires_labels: whether it raises if a network with classes gets none.
    """

    kind: str
    method: str
    names: tuple[str, ...]
    accepts_kwargs: bool
    requires_labels: bool

    def bind_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by their published names. Raise TypeError if the method would."""
        by_name = dict(zip(self.names, args, strict=False)) | kwargs
        unknown = [] if self.accepts_kwargs else [name for name in kwargs if name not in self.names]
        repeated = [name for name in kwargs if name in self.names[: len(args)]]
        missing = [name for name in self.names[:2] if name not in by_name]
        if len(args) > len(self.names) or unknown or repeated or missing:
            wrong = ", ".join(unknown + repeated + missing) or f"{len(args)} by position"
            raise TypeError(f"{self.method}() takes {', '.join(self.names)}; wrong or missing: {wrong}")
        published = ("x", "timesteps", "low_res" if self.kind == "upsampler" else "y")
        return {
            "y": None,
            **kwargs,
            **{a: by_name.get(b) for a, b in zip(published, self.names, strict=False)},
        }


def recognise_forward(net: nn.Module) -> ForwardMethod | str:
    """Return the method that is a published forward, or the reason why the network's own forward must run."""
    cls = original_class_of(net)
    kinds = ["unet", "upsampler"] if hasattr(net, "output_blocks") else ["classifier"]
    reasons: dict[float, str] = {}
    for method in sorted({name for part in cls.__mro__ if part is not nn.Module for name in vars(part)}):
        function = getattr(cls, method)
        if not method.startswith("forward") or method in vars(net):
            continue
        for kind in kinds:
            reason = _find_difference(net, cls, function, kind)
            if reason is None:
                code = function.__code__
                _, *names = code.co_varnames[: _argument_counts(code)[0]]
                accepts_kwargs = bool(code.co_flags & inspect.CO_VARKEYWORDS)
                return ForwardMethod(
                    kind, method, tuple(names), accepts_kwargs, _needs_labels(net, function, kind)
                )
            reasons.setdefault(_name_overlap(function, kind), f"{method} {reason}")
    return reasons[max(reasons)] if reasons else "there is no method forward"


def _name_overlap(function: Any, kind: str) -> float:
    """Return the share of names that a method and the published forward both use, of those that one uses."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    used = set(getattr(code, "co_names", ()))
    return len(used & ALLOWED_NAMES[kind]) / len(used | ALLOWED_NAMES[kind])


def _argument_counts(code: CodeType) -> tuple[int, int]:
    """Return the number of named arguments of a function, and the number with *args and **kwargs counted."""
    named = code.co_argcount + code.co_kwonlyargcount
    variadic = [code.co_flags & flag for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS)]
    return named, named + sum(map(bool, variadic))


def _find_difference(net: Any, cls: type, function: Any, kind: str) -> str | None:
    """Say how a method of a class differs from the published forward of a kind; None if it does not."""
    reason = find_function_difference(function, ALLOWED_NAMES[kind], ALLOWED_NUMBERS)
    if reason is not None:
        return reason
    if has_comparison_other_than_equality(function):
        return "makes a comparison that the published forward doesn't"
    code: CodeType = function.__code__
    num_published = 3 if kind == "classifier" else 4  # self, x, timesteps, y or low_res
    num_named, num_all = _argument_counts(code)
    if num_named < num_published:
        return "takes other arguments than the published one"
    other_arguments = set(code.co_varnames[num_published:num_all]) & _local_variables_read(code)
    if kind == "upsampler":  # passes its unknown arguments on
        other_arguments -= set(code.co_varnames[num_named:num_all])
        base: Any = next((part for part in cls.__mro__[1:] if "forward" in vars(part)), nn.Module)
        reason = _find_difference(net, base, base.forward, "unet")
        if reason is not None:
            return f"calls one that {reason}"
    if other_arguments:
        return f"uses {', '.join(sorted(other_arguments)[:3])}, which the published one doesn't"
    embedding = function.__globals__.get("timestep_embedding")
    if inspect.isfunction(embedding) and (
        reason := find_function_difference(embedding, EMBEDDING_NAMES, ALLOWED_NUMBERS)
    ):
        return f"calls a timestep_embedding that {reason}"
    with plain_eager_mode():
        for positional, labels in _trial_arguments(net, kind):
            try:
                stub = _stub_network(net)
                output = function(stub, *(t.clone() for t in positional), **labels)
            except Exception as error:  # a program's method may raise anything on a stub
                return f"isn't the published one: {type(error).__name__} on a small network"
            if not is_close(output, _REFERENCES[kind](stub, *positional, **labels)):
                return "isn't the published one: other results on a small network"
    return None


# (timesteps, sides) of each trial: one timestep per image, height and width of the images.
_TRIAL_TIMES = (
    ((3.0, 700.0), (4, 4)),
    ((0.0,), (4, 6)),
    ((0.25, 999.5, 1.0), (6, 4)),
    ((0, 1, 2, 500, 999), (4, 4)),
)


def _trial_arguments(net: Any, kind: str) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
    """Yield (positional, named) arguments for a forward: images, timesteps, and labels if there are classes.

    Images have the network's number of channels. An upsampler's labels are passed by name.
    """
    stem = next((p for p in net.input_blocks[0].parameters() if p.dim() > 2), None)
    channels = 2 if stem is None else stem.shape[1]
    channels = max(channels // 2, 1) if kind == "upsampler" else channels
    classes = getattr(net, "num_classes", None)
    for times, sides in _TRIAL_TIMES:
        count = len(times)
        positional = [random_normal(count, channels, *sides, seed=1), torch.tensor(times, device="cpu")]
        labels = []
        if isinstance(classes, int) and kind != "classifier":
            labels = [torch.arange(count, device="cpu").flip(0) * (classes - 1) // max(count - 1, 1)]
        if kind == "upsampler":
            low_res = random_normal(count, channels, 2, 2, seed=9)
            yield [*positional, low_res], {"y": labels[0]} if labels else {}
        else:
            yield [*positional, *labels], {}


def _needs_labels(net: Any, function: Any, kind: str) -> bool:
    """Tell whether a method raises when a network with classes is called without labels."""
    *_, ((x, t, *more), _) = _trial_arguments(net, kind)
    stub = _stub_network(net)
    if stub.num_classes is None:
        stub.num_classes = 2
    try:
        function(stub, x, t, *(more if kind == "upsampler" else []))
    except Exception:  # the method may raise any exception
        return True
    return False


def _local_variables_read(code: CodeType) -> set[str]:
    """Return the local variables that a function reads."""
    read: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_FAST"):
            read |= set(instruction.argval) if isinstance(instruction.argval, tuple) else {instruction.argval}
    return read


class _StubBlock:
    """A block of a stub network: maps images, and an embedding if given, to images of `channels` channels."""

    def __init__(self, seed: int, channels: int = 2):
        self.weights, self.channels = random_normal(3, seed=seed).tolist(), channels

    def __call__(self, h: Tensor, emb: Tensor | None = None) -> Tensor:
        a, b, c = self.weights
        h = (a * h[:, :1] + b * h[:, -1:]).sin()
        h = torch.cat([(i + 1) * h for i in range(self.channels)], dim=1)
        return h if emb is None else h + c * emb[:, : self.channels, None, None]


def _stub_network(net: Any) -> Any:
    """Return an uninitialised instance of a network's class whose blocks are small functions.

    It has the network's settings. Its output has nine channels, more than an image has.
    """
    cls: Any = original_class_of(net)
    stub: Any = cls.__new__(cls)
    nn.Module.__init__(stub)
    settings = {
        name: value for name, value in vars(net).items() if isinstance(value, bool | int | float | str)
    }
    classes = getattr(net, "num_classes", None)
    width = getattr(net, "model_channels", 8)
    project, table = random_normal(width, 4, seed=20), random_normal(classes or 2, 4, seed=21)
    vars(stub).update(settings)
    vars(stub).update(
        model_channels=width, num_classes=classes, dtype=torch.float32,
        time_embed=lambda e: e @ project, label_emb=lambda y: table[y],
        input_blocks=[_StubBlock(i) for i in range(3)], middle_block=_StubBlock(5),
        output_blocks=[_StubBlock(i) for i in range(6, 9)], out=_StubBlock(10, channels=9),
    )  # fmt: skip
    return stub


# References: the forward passes in plain PyTorch


def forward_ref(net: Any, x: Tensor, timesteps: Tensor, y: Tensor | None = None, up: bool = True) -> Tensor:
    """Compute a network's output in plain PyTorch: blocks, skips by concatenation, last layers.

    up: whether to run the output blocks, which a classifier doesn't have.
    """
    emb = net.time_embed(timestep_embedding(timesteps, net.model_channels))
    if y is not None:
        emb = emb + net.label_emb(y)
    h, skips = x, []
    for block in net.input_blocks:
        h = block(h, emb)
        skips.append(h)
    h = net.middle_block(h, emb)
    for block in net.output_blocks if up else ():
        h = block(torch.cat([h, skips.pop()], dim=1), emb)
    return net.out(h)


def upsampler_forward_ref(
    net: Any, x: Tensor, timesteps: Tensor, low_res: Tensor, y: Tensor | None = None
) -> Tensor:
    """Compute an upsampler's output in plain PyTorch: `forward_ref` of x with the enlarged image appended."""
    enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
    return forward_ref(net, torch.cat([x, enlarged], dim=1), timesteps, y)


_REFERENCES: dict[str, Callable[..., Tensor]] = {
    "unet": forward_ref,
    "upsampler": upsampler_forward_ref,
    "classifier": partial(forward_ref, up=False),
}
