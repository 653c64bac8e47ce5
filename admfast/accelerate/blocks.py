"""Recognise the published blocks among a network's modules, and convert them.

A block is recognised by what it consists of, by the names and numbers in its code, and by its results: a copy
with random parameters must give the same before and after the conversion. What fails any of these stays as it
is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from admfast.accelerate.classes import convert, own_class
from admfast.accelerate.codes import ACTIVATION, BLOCKS, NORM, foreign
from admfast.models import convolution, layers
from admfast.ops.conv import FoldedConv
from admfast.ops.transforms import deriving

RES_BLOCK = ("in_layers", "h_upd", "x_upd", "emb_layers", "out_layers", "skip_connection")
ATTENTION_BLOCK = ("norm", "qkv", "attention", "proj_out")


class _Watchful(convolution.FoldableConv):
    """A convolution that may be called without its network, which would have renewed its form."""

    @property
    def folded(self) -> FoldedConv | None:
        # A compiled program would not see that weights were written to.
        found = None if torch.compiler.is_compiling() else super().folded
        return found if found is None or found.holds else None


def _watchful(ours: type[convolution.FoldableConv]) -> type[nn.Module]:
    return type(ours.__name__, (_Watchful, ours), {})


CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _watchful(convolution.Conv1d),
    nn.Conv2d: _watchful(convolution.Conv2d),
    nn.Conv3d: _watchful(convolution.Conv3d),
}
POINTWISE = _watchful(convolution.PointwiseConv1d)
# Rounding leaves far more than half the digits of a result.
SAME = torch.finfo(torch.float32).eps ** 0.5

Conversion = Callable[[Any], None]


def conversion_of(block: nn.Module) -> Conversion | str:
    """Return what converts a block of a known make with all its parts, or why there is no such thing."""
    name = own_class(block).__name__
    if _patched(block):
        return f"{name}: somebody gave it another forward"
    try:
        candidates = _candidates(block)
        if not candidates:
            return f"{name} isn't a published block"
        if reason := foreign(own_class(block), BLOCKS):
            return f"{name}: {reason}"
        found = next((conversion for conversion in candidates if agrees(block, conversion)), None)
    except Exception as error:  # a block of others may be anything
        return f"{name}: a copy of it can't be tried ({type(error).__name__})"
    return found or f"{name} gives other results than the published block"


def make_of(block: nn.Module) -> tuple[Any, ...]:
    """Return what blocks have in common that differ in sizes alone."""
    parts = tuple(own_class(part) for part in block.modules())
    own = vars(block).items()
    settings = tuple(item for item in own if isinstance(item[1], bool | str | float))
    norms = tuple((part.num_groups, part.eps) for part in block.modules() if isinstance(part, nn.GroupNorm))
    # With one head both orders of q, k and v are the same.
    heads = _heads(block) if "attention" in block._modules else None
    return parts, settings, norms, heads, _patched(block)


def _patched(block: nn.Module) -> bool:
    return any({"forward", "_forward"} & vars(part).keys() for part in block.modules())


def _candidates(block: Any) -> list[Conversion]:
    names = set(block._modules)
    if names == set(RES_BLOCK) and _is_res_block(block):
        return [_convert_res_block]
    if names == set(ATTENTION_BLOCK) and _is_attention_block(block):
        return [partial(_convert_attention_block, legacy_order=legacy) for legacy in (True, False)]
    if names in ({"conv"}, {"op"}) and getattr(block, "use_conv", None) is True:
        (conv,) = block._modules.values()
        kind = layers.Upsample if names == {"conv"} else layers.Downsample
        return [partial(_convert_resampling, kind=kind)] if _is_conv(conv) else []
    return []


def _is_conv(module: Any) -> bool:
    return type(module) in CONVOLUTIONS


def _is_norm(module: Any) -> bool:
    """Tell whether a module is a group norm with weight and bias, whatever it does about dtypes."""
    if not isinstance(module, nn.GroupNorm) or module.weight is None or module.bias is None:
        return False
    if foreign(own_class(module), NORM):
        return False
    with deriving():
        norm: Any = bare_copy(module)
        x = 0.01 * random(2, module.num_channels, 3, 3, seed=1).to(norm.weight.device)  # so that eps matters
        wanted = nn.functional.group_norm(x, module.num_groups, norm.weight, norm.bias, module.eps)
        return close(norm(x.clone()), wanted)


def _is_silu(module: Any) -> bool:
    if type(module) is nn.SiLU:
        return True
    if foreign(own_class(module), ACTIVATION):
        return False
    x = torch.linspace(-8, 8, 65, device="cpu")
    with deriving():
        return close(module(x.clone()), nn.functional.silu(x))


def _is_res_block(block: Any) -> bool:
    inside, outside, projection = (
        tuple(block._modules[n] or ()) for n in ("in_layers", "out_layers", "emb_layers")
    )
    return (
        [len(inside), len(outside), len(projection)] == [3, 4, 2]
        and _is_norm(inside[0])
        and _is_norm(outside[0])
        and _is_conv(inside[2])
        and _is_conv(outside[3])
        and all(map(_is_silu, (inside[1], outside[1], projection[0])))
        and type(outside[2]) is nn.Dropout
        and isinstance(projection[1], nn.Linear)
        and projection[1].bias is not None
        and (type(block.skip_connection) is nn.Identity or _is_conv(block.skip_connection))
        and isinstance(getattr(block, "use_scale_shift_norm", None), bool)
        and isinstance(getattr(block, "use_checkpoint", None), bool)
    )


def _convert_res_block(block: Any) -> None:
    resample = None
    if not isinstance(block.h_upd, nn.Identity):
        resample = "down" if hasattr(block.h_upd, "op") else "up"
    for norm in (block.in_layers[0], block.out_layers[0]):
        convert(norm, layers.Norm)
    for conv in (block.in_layers[2], block.out_layers[3], block.skip_connection):
        convert_conv(conv)
    convert(block, layers.ResBlock, resample=resample, projection=slice(0), _kinds=None)
    block._built()


def _is_attention_block(block: Any) -> bool:
    products = (block.qkv, block.proj_out)
    return (
        _is_norm(block.norm)
        and all(type(product) is nn.Conv1d and product.kernel_size == (1,) for product in products)
        and isinstance(_heads(block), int)
        and isinstance(getattr(block, "use_checkpoint", None), bool)
    )


def _heads(block: Any) -> Any:
    return getattr(block.attention, "n_heads", getattr(block, "num_heads", None))


def _convert_attention_block(block: Any, legacy_order: bool) -> None:
    heads = _heads(block)
    rows = layers.legacy_rows(block.qkv.out_channels, heads) if legacy_order else None
    convert(block.norm, layers.Norm)
    convert(block.qkv, POINTWISE, rows=rows)
    convert(block.proj_out, POINTWISE)
    convert(block.attention, layers.Attention, num_heads=heads, legacy_order=legacy_order)
    convert(block, layers.AttentionBlock, _kinds=None)
    block._built()


def _convert_resampling(block: Any, kind: type[nn.Module]) -> None:
    (conv,) = block._modules.values()
    convert_conv(conv)
    convert(block, kind)


def convert_conv(conv: nn.Module) -> None:
    """Convert a convolution of torch's own class; leave any other module as it is."""
    if _is_conv(conv):
        convert(conv, CONVOLUTIONS[type(conv)])


def convert_head(head: nn.Module) -> None:
    """Convert the last layers where they are a norm, SiLU and something else."""
    if type(head) is nn.Sequential and len(head) > 2 and _is_norm(head[0]) and _is_silu(head[1]):
        convert(head[0], layers.Norm)
        for layer in head:
            convert_conv(layer)
        convert(head, layers.Head, _kinds=None)
        head._built()  # type: ignore[operator]


def passes_on(sequence: nn.Module) -> bool:
    """Tell whether a sequence only hands the embedding to those of its layers that take it."""
    cls = own_class(sequence)
    if not isinstance(sequence, nn.Sequential) or cls is nn.Sequential or foreign(cls, BLOCKS):
        return False
    if "forward" in vars(sequence):
        return False

    class Taker(*takers_of(cls)):  # type: ignore[misc]
        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            return x + 2 * emb

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    trial: Any = cls.__new__(cls)  # type: ignore[call-overload]
    nn.Module.__init__(trial)
    for i, kind in enumerate((Taker, Other, Taker)):
        layer: Any = kind.__new__(kind)
        nn.Module.__init__(layer)
        trial.add_module(str(i), layer)
    x, emb = random(2, seed=1), random(2, seed=2)
    try:
        return close(trial(x.clone(), emb.clone()), 3 * (x + 2 * emb) + 2 * emb)
    except Exception:  # it wants another kind of layers
        return False


def takers_of(cls: type) -> tuple[type, ...]:
    """Return the classes, beside torch's, that a class of sequences derives from."""
    bases = [part for part in cls.__mro__[1:] if part not in nn.Sequential.__mro__]
    return tuple(bases) or (nn.Module,)


# Trials on copies


def agrees(block: nn.Module, conversion: Conversion) -> bool:
    """Tell whether a copy of a block gives the same before and after a conversion."""
    with deriving(), torch.random.fork_rng(_generators()):
        trial = bare_copy(block)
        given = [[scale * t for t in _inputs(trial)] for scale in (1.0, 0.01)]
        wanted = [trial(*(t.clone() for t in tensors)) for tensors in given]
        conversion(trial)
        return all(close(trial(*tensors), w) for tensors, w in zip(given, wanted, strict=True))


def _generators() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def close(found: Any, wanted: Any) -> bool:
    """Tell whether two results are the same to rounding."""
    if not isinstance(wanted, Tensor) or not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= SAME * wanted.abs().max())


def bare_copy(module: nn.Module) -> nn.Module:
    """Return a copy in float32 and evaluation mode, without hooks; parameters are random: zeros hide much."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
    with deriving():
        bare = copy.deepcopy(module, memo).float().eval()
        for name, parameter in bare.named_parameters():
            values = random(*parameter.shape, seed=len(name)).to(parameter.device)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4.0
            parameter.requires_grad_(False).copy_(values / fan_in**0.5)
    return bare


def random(*shape: int, seed: int) -> Tensor:
    """Return fixed normal numbers; torch's own generators stay where they are."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32
    )


def _inputs(block: Any) -> list[Tensor]:
    """Return images, and an embedding where a block takes one."""
    device = next(block.parameters()).device
    if set(block._modules) == set(RES_BLOCK):
        conv, width = block.in_layers[2], block.emb_layers[1].in_features
        x = random(2, conv.in_channels, *(8,) * (conv.weight.dim() - 2), seed=1)
        return [x.to(device), random(2, width, seed=2).to(device)]
    weight = next(p for p in block.parameters() if p.dim() > 1)
    dims = 2 if "qkv" in block._modules else weight.dim() - 2
    return [random(2, weight.shape[1], *(8,) * dims, seed=1).to(device)]
