"""Conversion of whole networks in place; a converted network folds its weights when it is called."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.accelerate import blocks
from admfast.accelerate.blocks import PUBLISHED
from admfast.accelerate.classes import Converted, convert, own_class, restore
from admfast.accelerate.codes import Code, code_of
from admfast.accelerate.diffusers_blocks import DIFFUSERS
from admfast.accelerate.edm import EDM
from admfast.accelerate.makes import Make
from admfast.accelerate.pieces import is_conv
from admfast.accelerate.trials import Conversion
from admfast.accelerate.walks import Walk, walk_of
from admfast.engine.precision import Policy
from admfast.errors import invalid
from admfast.models import convolution, layers
from admfast.models.body import first_parameter_dtype
from admfast.models.fold import FoldableNet, FoldOptions, ProjectedEmbedding
from admfast.models.hooks import submodules
from admfast.models.layers import timestep_embedding
from admfast.models.unet import run_blocks
from admfast.ops.transforms import in_autocast, in_program_trace

MAKES = (PUBLISHED, EDM, DIFFUSERS)


class AcceleratedNet(FoldableNet):
    """A network that was converted in place. It runs our walk, or its own forward block by block.

    accelerated_policy: precision of its torso; None keeps the dtype of its parameters. accelerated_walk: the
    published walk, or the reason why its own forward runs. accelerated_left: names of the modules that run as
    they are, with reasons. accelerated_code: the program's code that ours replaces; if the program changes
    any of it, the conversion is undone at the next call.
    """

    num_passes = 2  # many programs take the gradient in x
    accelerated_policy: Policy | None = None
    accelerated_walk: Walk | str
    accelerated_left: Mapping[str, str] = MappingProxyType({})
    accelerated_code = Code()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.compiler.is_compiling() or self.accelerated_code.holds()):
            restore_network(self)
            return self(*args, **kwargs)
        if not isinstance(self.accelerated_walk, Walk):
            self.fold_now()
        out = super().__call__(*args, **kwargs)
        # The program may call `randn_like` or `view` on the output, which depend on its usual layout.
        return out.contiguous() if isinstance(out, Tensor) else out

    def fold_now(self) -> None:
        """Fold the weights for this call, unless folded weights can't be used in it."""
        if self.training or torch.compiler.is_compiling() or in_program_trace():
            return
        # `parameters()` takes five times as long.
        held = (module._parameters.values() for module in (self, *submodules(self)))
        parameters = [p for values in held for p in values if p is not None]
        # A replica of DataParallel has no parameters, torch.func.functional_call replaces them by plain
        # tensors, and writes to parameters that were made in inference mode can't be detected.
        if not parameters or in_autocast(parameters[0].device):
            return
        if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
            return
        own = self._parameter_dtype()
        policy = self.accelerated_policy
        self.ensure_folded(FOLD, own if policy is None else policy.torso)

    def walked(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the published walk on our blocks; takes the arguments of the program's own method."""
        assert isinstance(self.accelerated_walk, Walk)
        given = self.accelerated_walk.given(args, kwargs)
        self.fold_now()
        x, timesteps, y = given["x"], given["timesteps"], given["y"]
        images = x
        if self.accelerated_walk.kind == "upsampler":
            low_res = F.interpolate(given["low_res"], x.shape[2:], mode="bilinear")
            images = torch.cat([x, low_res], dim=1)
        emb = self._embedding(timesteps, y, len(x))
        h = run_blocks(self, self.enter_torso(images), emb)
        return self.out(h.to(images.dtype)).contiguous()  # type: ignore[operator]

    def _embedding(self, timesteps: Tensor, y: Tensor | None, count: int) -> Tensor | ProjectedEmbedding:
        """Return the embedding of timesteps and classes; a single timestep is used for all images."""
        emb = timestep_embedding(timesteps, self.model_channels)  # type: ignore[arg-type]
        emb = self.time_embed(emb.to(first_parameter_dtype(self.time_embed, emb.dtype)))  # type: ignore[operator, arg-type]
        classes = getattr(self, "num_classes", None)
        walk: Any = self.accelerated_walk
        if (y is not None) != (classes is not None) and (walk.strict or classes is None):
            raise AssertionError("y must be given if and only if the model is class-conditional")
        if y is not None:
            if walk.strict and (y.shape[:1] != (count,) or (y.dim() > 1 and not y.is_floating_point())):
                raise AssertionError(f"y.shape={tuple(y.shape)}: one for each of the {count} images")
            emb = emb + self.label_emb(y)  # type: ignore[operator]
        return self.project_embedding(emb.expand(count, -1) if len(emb) == 1 else emb)


FOLD = FoldOptions()


def make_of(module: nn.Module) -> Make | None:
    """Return the make of a network; None for any other module."""
    return next((make for make in MAKES if make.owns(module)), None)


def refusal(net: nn.Module) -> str | None:
    """Say why a network stays as it is; None if it can be converted."""
    if any(parameter.is_meta for parameter in net.parameters()):
        return "its parameters are on the meta device, without memory"
    make = make_of(net)
    assert make is not None
    return make.refusal(net)


def convert_network(net: Any, policy: Policy | None) -> None:
    """Convert a network in place, after `refusal` and `check_policy` have found nothing against it."""
    make, plan, left, walk = _planned(net)
    known = {id(module) for module, _ in plan}
    code = code_of(net)
    sequences = [m for m in blocks.sequences(net) if _is_known(m, known)] if make is PUBLISHED else []
    for block, conversion in plan:
        conversion(block)
    make.ends(net, isinstance(walk, str))
    for module in sequences:
        # The program may insert a layer of its own later.
        takers = (layers.TimestepBlock, *blocks.takers_of(type(module)))
        convert(module, layers.TimestepEmbedSequential, embedding_block_types=takers)
    ours = _walking(walk.method) if isinstance(walk, Walk) else AcceleratedNet
    convert(
        net, ours, accelerated_walk=walk, accelerated_left=left, accelerated_policy=policy,
        accelerated_code=code, torso=make.torso, projected_width=0, _kinds=(),
    )  # fmt: skip
    if isinstance(walk, Walk):
        if walk.kind != "classifier":
            _split_skips(net)
        net._assign_projection_columns()


def restore_network(net: Any) -> None:
    """Undo the conversion of a network."""
    net.unfold()
    for module in list(net.modules()):
        if isinstance(module, Converted):
            restore(module)


def check_policy(net: Any, policy: Policy | None) -> None:
    """Reject a policy whose torso isn't float32 for a network that runs, or would run, block by block."""
    if policy is None or policy.torso == torch.float32:
        return
    walk = net.accelerated_walk if isinstance(net, AcceleratedNet) else _planned(net)[-1]
    if isinstance(walk, str):
        allowed = f"None or fp32: {own_class(net).__name__} runs block by block; {walk}"
        raise invalid("precision", policy.name, allowed)


def _planned(net: Any) -> tuple[Make, list[tuple[nn.Module, Conversion]], dict[str, str], Walk | str]:
    """Return the make of a network, the plan of its make with what is left, and its walk."""
    make = make_of(net)
    assert make is not None
    plan, left = make.plan(net)
    walk: Walk | str = f"its own forward runs, as in every network of the {make.name} make"
    if make is PUBLISHED:
        walk = _walk(net, {id(module) for module, _ in plan}, left)
    return make, plan, left, walk


def _walk(net: Any, known: set[int], left: dict[str, str]) -> Walk | str:
    """Return the published walk of a network if all its blocks are `known`, or why its own forward runs."""
    walk = walk_of(net)
    if isinstance(walk, Walk) and walk.kind == "classifier" and net.pool not in ("adaptive", "attention"):
        walk = f"pool={net.pool!r} looks at every block"
    if isinstance(walk, Walk) and (left or not all(_is_known(m, known) for m in blocks.sequences(net))):
        walk = f"some blocks run as they are: {', '.join([*left][:3])}"
    return walk


def _is_known(sequence: nn.Module, known: set[int]) -> bool:
    """Tell whether a sequence passes images and embedding on as published, and all its layers are known."""
    return blocks.passes_on(sequence) and all(
        id(layer) in known or is_conv(layer) or not [*layer.parameters()] for layer in sequence.children()
    )


def _split_skips(net: Any) -> None:
    """Set on the output blocks' skip convolutions how many input channels come from the block before.

    The other channels come from the input block. A convolution whose channels don't add up is left as it is.
    """
    outputs = [_channels(block, None) for block in net.input_blocks]
    channels = _channels(net.middle_block, outputs[-1])
    for block in net.output_blocks:
        skip, beside = getattr(block[0], "skip_connection", None), outputs.pop()
        if isinstance(skip, convolution.FoldableConv) and channels is not None and beside is not None:
            if channels + beside == skip.in_channels:  # type: ignore[operator]
                vars(skip).update(split=channels, _added=("split",))
        channels = _channels(block, channels)


def _channels(block: Any, before: int | None) -> int | None:
    """Return the number of output channels of a block; before: that of the block before."""
    for layer in block.children():
        conv = layer
        if isinstance(layer, layers.ResBlock):
            conv = layer.out_layers[3]
        elif isinstance(layer, layers.Upsample | layers.Downsample):
            conv = next(layer.children(), None)
        before = getattr(conv, "out_channels", before)
    return before


@functools.cache
def _walking(method: str) -> type[AcceleratedNet]:
    """Return the subclass of AcceleratedNet whose method of that name runs our walk."""
    return type("WalkedNet", (AcceleratedNet,), {method: AcceleratedNet.walked})
