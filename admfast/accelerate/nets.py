"""Networks of others, converted in place: they fold at their calls, and run whole or block by block."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.accelerate import blocks
from admfast.accelerate.blocks import Conversion
from admfast.accelerate.classes import Converted, convert, restore
from admfast.accelerate.codes import methods_of
from admfast.accelerate.walks import Walk, walk_of
from admfast.engine.precision import Policy
from admfast.errors import invalid
from admfast.models import convolution, layers
from admfast.models.body import dtype_of
from admfast.models.fold import FoldableNet, FoldOptions, Projected
from admfast.models.hooks import parts
from admfast.models.layers import timestep_embedding
from admfast.models.unet import through_blocks
from admfast.ops.layout import channels_last
from admfast.ops.transforms import in_autocast, in_program

PARTS = ("time_embed", "input_blocks", "middle_block", "out")


class AcceleratedNet(FoldableNet):
    """A network that was converted in place. Its walk is the client's, block by block, or ours.

    accelerated_policy: what its torso computes in; None: what its parameters are. accelerated_walk: the
    published walk, or why its own runs. accelerated_left: modules that run as they are, and why.
    accelerated_code: the methods that ours stand for; who exchanges one gets the network as it was.
    """

    directions = 2  # many clients want the gradient in x
    accelerated_policy: Policy | None = None
    accelerated_walk: Walk | str
    accelerated_left: Mapping[str, str] = MappingProxyType({})
    accelerated_code: Sequence[tuple[type, str, Any]] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(vars(part).get(name) is not method for part, name, method in self.accelerated_code):
            restore_network(self)
            return self(*args, **kwargs)
        if not isinstance(self.accelerated_walk, Walk):
            self.fold_now()
        out = super().__call__(*args, **kwargs)
        # Whoever draws noise like it, or views it, counts on the layout that the published network gives.
        return out.contiguous() if isinstance(out, Tensor) else out

    def fold_now(self) -> None:
        """Fold for this call, where forms may be used in it."""
        if self.training or torch.compiler.is_compiling() or in_program():
            return
        # `parameters()` takes five times as long.
        held = (module._parameters.values() for module in (self, *parts(self)))
        parameters = [p for values in held for p in values if p is not None]
        # A replica of DataParallel has none, torch.func.functional_call puts plain tensors in their place,
        # and of those made in inference mode nobody could tell whether they were written to.
        if not parameters or in_autocast(parameters[0].device):
            return
        if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
            return
        own = self._parameter_dtype()
        policy = self.accelerated_policy
        self.ensure_folded(FOLD, own if policy is None else policy.torso)

    def walked(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the published walk through our blocks; arguments as of the client's method."""
        assert isinstance(self.accelerated_walk, Walk)
        given = self.accelerated_walk.given(args, kwargs)
        self.fold_now()
        x, timesteps, y = given["x"], given["timesteps"], given["y"]
        images = x
        if self.accelerated_walk.kind == "upsampler":
            low_res = F.interpolate(given["low_res"], x.shape[2:], mode="bilinear")
            images = torch.cat([x, low_res], dim=1)
        emb = self._embedding(timesteps, y, len(x))
        h = through_blocks(self, self.entering(images), emb)
        return self.out(h.to(images.dtype)).contiguous()  # type: ignore[operator]

    def _embedding(self, timesteps: Tensor, y: Tensor | None, count: int) -> Tensor | Projected:
        """Return the embedding of timesteps and classes as the blocks take it; one timestep may serve all."""
        emb = timestep_embedding(timesteps, self.model_channels)  # type: ignore[arg-type]
        emb = self.time_embed(emb.to(dtype_of(self.time_embed, emb.dtype)))  # type: ignore[operator, arg-type]
        classes = getattr(self, "num_classes", None)
        walk: Any = self.accelerated_walk
        if (y is not None) != (classes is not None) and (walk.strict or classes is None):
            raise AssertionError("y must be given if and only if the model is class-conditional")
        if y is not None:
            if walk.strict and y.shape[:1] != (count,):
                raise AssertionError(f"y.shape={tuple(y.shape)}: one for each of the {count} images")
            emb = emb + self.label_emb(y)  # type: ignore[operator]
        return self.projected(emb.expand(count, -1) if len(emb) == 1 else emb)


class Entrance(layers.TimestepEmbedSequential):
    """The first block of a network that runs block by block: images enter with their channels together."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor | Projected, x2: Tensor | None = None
    ) -> Tensor:
        folded = getattr(self[0], "folded", None)
        if folded is not None:
            x = channels_last(x.to(folded.dtype))
        return super().forward(x, emb, x2)


FOLD = FoldOptions()


def is_network(module: nn.Module) -> bool:
    """Tell whether a module has the parts of an ADM network, itself: wrappers hand on what others have."""
    return all(module._modules.get(name) is not None for name in PARTS)


def convert_network(net: Any, policy: Policy | None) -> None:
    """Convert a network in place; nothing of it changes where that can't be done.

    Raises: InvalidArgument.
    """
    if any(parameter.is_meta for parameter in net.parameters()):
        raise invalid("model", type(net).__name__, "a network with memory, not on the meta device")
    walk = walk_of(net)
    if isinstance(walk, Walk) and walk.kind == "classifier" and net.pool not in ("adaptive", "attention"):
        walk = f"pool={net.pool!r} looks at every block"
    plan, left = _plan(net)
    known = {id(module) for module, _ in plan}
    sequences = [module for module in _sequences(net) if _is_known(module, known)]
    if isinstance(walk, Walk) and (left or len(sequences) < len(_sequences(net))):
        walk = f"some blocks run as they are: {', '.join([*left][:3])}"
    check_policy(policy, walk)
    code = methods_of(net)
    for block, conversion in plan:
        conversion(block)
    stem = net.input_blocks[0]
    for layer in stem.children():
        blocks.convert_conv(layer)
    for module in sequences:
        enters = module is stem and isinstance(walk, str)
        # Somebody may put a layer of his own in later.
        takers = (layers.TimestepBlock, *blocks.takers_of(type(module)))
        convert(module, Entrance if enters else layers.TimestepEmbedSequential, takers=takers)
    blocks.convert_head(net.out)
    ours = _walking(walk.method) if isinstance(walk, Walk) else AcceleratedNet
    convert(
        net, ours, accelerated_walk=walk, accelerated_left=left, accelerated_policy=policy,
        accelerated_code=code, projected_width=0, _kinds=(),
    )  # fmt: skip
    if isinstance(walk, Walk):
        if walk.kind != "classifier":
            _split_skips(net)
        net._lay_out_projections()


def restore_network(net: Any) -> None:
    """Make a network again what it was before its conversion."""
    net.unfold()
    for module in list(net.modules()):
        if isinstance(module, Converted):
            restore(module)


def check_policy(policy: Policy | None, walk: Walk | str) -> None:
    """Refuse another dtype for a network whose own code takes the images from block to block."""
    if policy is not None and policy.torso != torch.float32 and isinstance(walk, str):
        raise invalid("precision", policy.name, f"None or fp32: the network runs block by block; {walk}")


def _sequences(net: Any) -> list[nn.Module]:
    """Return the blocks of a network, each a sequence of layers; once where it is used twice."""
    found = [*net.input_blocks, net.middle_block, *getattr(net, "output_blocks", ())]
    return list(dict.fromkeys(found))


def _plan(net: Any) -> tuple[list[tuple[nn.Module, Conversion]], dict[str, str]]:
    """Return the layers that can be converted and how, and of the others with parameters why not."""
    names = {id(module): name for name, module in net.named_modules()}
    layers_ = list(dict.fromkeys(layer for block in _sequences(net) for layer in block.children()))
    stem = [*net.input_blocks[0].children()]
    layers_ = [layer for layer in layers_ if layer not in stem and [*layer.parameters()]]
    found: dict[Any, Conversion | str] = {}
    # The smallest of each make stands for all.
    for layer in sorted(layers_, key=lambda layer: sum(p.numel() for p in layer.parameters())):
        make = blocks.make_of(layer)
        if make not in found:
            found[make] = blocks.conversion_of(layer)
    plan, left = [], {}
    for layer in layers_:
        conversion = found[blocks.make_of(layer)]
        if isinstance(conversion, str):
            left[names[id(layer)]] = conversion
        else:
            plan.append((layer, conversion))
    return plan, left


def _is_known(sequence: nn.Module, known: set[int]) -> bool:
    """Tell whether a sequence hands on as published, and all its layers are known."""
    return blocks.passes_on(sequence) and all(
        id(layer) in known or type(layer) in blocks.CONVOLUTIONS or not [*layer.parameters()]
        for layer in sequence.children()
    )


def _split_skips(net: Any) -> None:
    """Tell the skips of the output blocks how many of their channels come from below, where that is clear."""
    outputs = [_channels(block, None) for block in net.input_blocks]
    channels = _channels(net.middle_block, outputs[-1])
    for block in net.output_blocks:
        skip, beside = getattr(block[0], "skip_connection", None), outputs.pop()
        if isinstance(skip, convolution.FoldableConv) and channels is not None and beside is not None:
            if channels + beside == skip.in_channels:  # type: ignore[operator]
                vars(skip).update(split=channels, _added=("split",))
        channels = _channels(block, channels)


def _channels(block: Any, before: int | None) -> int | None:
    """Return how many channels a block puts out."""
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
    """Return the class whose method of that name is our walk."""
    return type("WalkedNet", (AcceleratedNet,), {method: AcceleratedNet.walked})
