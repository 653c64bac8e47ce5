"""Networks of others, converted in place: they fold at their calls, and run whole or block by block."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.accelerate import blocks
from admfast.accelerate.blocks import Conversion
from admfast.accelerate.classes import convert
from admfast.accelerate.walks import Walk, walk_of
from admfast.engine.precision import Policy
from admfast.models import layers
from admfast.models.body import dtype_of
from admfast.models.fold import FoldableNet, FoldOptions, Projected
from admfast.models.layers import call_block, timestep_embedding
from admfast.ops.layout import channels_last
from admfast.ops.transforms import in_autocast, in_program

PARTS = ("time_embed", "input_blocks", "middle_block", "out")


class AcceleratedNet(FoldableNet):
    """A network that was converted in place. Its walk is the client's, block by block, or ours.

    policy: what its torso computes in; None: what its parameters are.
    """

    directions = 2  # many clients want the gradient in x
    policy: Policy | None = None
    walk: Walk | str  # or why there is none
    left: dict[str, str]  # modules that run as they are, and why

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.walk, Walk):
            self._fold_now()
        out = super().__call__(*args, **kwargs)
        # Whoever draws noise like it, or views it, counts on the layout that the published network gives.
        return out.contiguous() if isinstance(out, Tensor) else out

    def _fold_now(self) -> None:
        """Fold for this call, where forms may be used in it."""
        parameter = next(self.parameters(), None)  # none in a replica of DataParallel
        if parameter is None or self.training or torch.compiler.is_compiling() or in_program():
            return
        if any(part.is_inference() for part in self.parameters()):
            return  # nobody could tell whether they were written to
        if not in_autocast(parameter.device):
            self.ensure_folded(FOLD, self._parameter_dtype() if self.policy is None else self.policy.torso)

    def walked(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the published walk through our blocks; arguments as of the client's method."""
        assert isinstance(self.walk, Walk)
        given = self.walk.given(args, kwargs)
        self._fold_now()
        x, timesteps, y = given["x"], given["timesteps"], given["y"]
        images = x
        if self.walk.kind == "upsampler":
            low_res = F.interpolate(given["low_res"], x.shape[2:], mode="bilinear")
            images = torch.cat([x, low_res], dim=1)
        emb = self._embedded(timesteps, y, len(x))
        h = self.entering(images)
        skips = []
        for block in self.input_blocks:  # type: ignore[union-attr]
            h = call_block(block, h, emb)
            skips.append(h)
        h = call_block(self.middle_block, h, emb)  # type: ignore[arg-type]
        if self.walk.kind != "classifier":
            for block in self.output_blocks:  # type: ignore[union-attr]
                h = call_block(block, h, emb, skips.pop())
        return self.out(h.to(images.dtype)).contiguous()  # type: ignore[operator]

    def _embedded(self, timesteps: Tensor, y: Tensor | None, count: int) -> Tensor | Projected:
        """Return the embedding of timesteps and classes as the blocks take it; one timestep may serve all."""
        emb = timestep_embedding(timesteps, self.model_channels)  # type: ignore[arg-type]
        emb = self.time_embed(emb.to(dtype_of(self.time_embed, emb.dtype)))  # type: ignore[operator, arg-type]
        classes = getattr(self, "num_classes", None)
        assert (y is not None) == (classes is not None), "y must be given exactly where the model has classes"
        if y is not None:
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
    """Tell whether a module has the parts of an ADM network."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS)


def convert_network(net: Any, policy: Policy | None) -> None:
    """Convert a network in place; nothing of it changes where that can't be done."""
    walk = walk_of(net)
    if isinstance(walk, Walk) and walk.kind == "classifier" and net.pool not in ("adaptive", "attention"):
        walk = f"pool={net.pool!r} looks at every block"
    plan, left = _plan(net)
    known = {id(module) for module, _ in plan}
    sequences = [module for module in _sequences(net) if _passes_on(module, known)]
    if isinstance(walk, Walk) and (left or len(sequences) < len(_sequences(net))):
        walk = f"some blocks run as they are: {', '.join([*left][:3])}"
    for block, conversion in plan:
        conversion(block)
    stem = net.input_blocks[0]
    for layer in stem.children():
        blocks.convert_conv(layer)
    for module in sequences:
        enters = module is stem and isinstance(walk, str)
        # Somebody may put a layer of his own in later.
        others = [part for part in type(module).__mro__[1:] if part not in nn.Sequential.__mro__]
        takers = (layers.TimestepBlock, *others)
        convert(module, Entrance if enters else layers.TimestepEmbedSequential, takers=takers)
    blocks.convert_head(net.out)
    ours = _walking(walk.method) if isinstance(walk, Walk) else AcceleratedNet
    convert(net, ours, walk=walk, left=left, policy=policy, projected_width=0, _kinds=())
    if isinstance(walk, Walk):
        if walk.kind != "classifier":
            _split_skips(net)
        net._lay_out_projections()


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


def _passes_on(sequence: nn.Module, known: set[int]) -> bool:
    """Tell whether a sequence hands the embedding to its residual blocks alone, and knows all its layers."""
    if not isinstance(sequence, nn.Sequential) or type(sequence) is nn.Sequential:
        return False
    if set(type(sequence).forward.__code__.co_names) - {"isinstance", "TimestepBlock"}:
        return False
    return all(
        id(layer) in known or type(layer) in blocks.CONVOLUTIONS or not [*layer.parameters()]
        for layer in sequence
    )


def _split_skips(net: Any) -> None:
    """Tell the 1x1 skips of the output blocks how many of their channels come from below."""
    channels = net.middle_block[-1].out_layers[3].out_channels
    for block in net.output_blocks:
        skip = block[0].skip_connection
        if not isinstance(skip, nn.Identity):
            vars(skip).update(split=channels, _added=("split",))
        channels = block[0].out_layers[3].out_channels


@functools.cache
def _walking(method: str) -> type[AcceleratedNet]:
    """Return the class whose method of that name is our walk."""
    return type("WalkedNet", (AcceleratedNet,), {method: AcceleratedNet.walked})
