"""The blocks that ADM networks are made of; parameter names are those of the released checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.errors import invalid
from admfast.models.config import GROUPS
from admfast.models.convolution import PointwiseConv1d, conv_nd
from admfast.models.dropout import Dropout
from admfast.models.fold import ProjectedEmbedding
from admfast.models.hooks import FusedBlock, has_hooks, hook_checks_skipped, must_call_as_published
from admfast.models.recompute import maybe_checkpoint, recompute_in_backward
from admfast.ops.attention import attention
from admfast.ops.norm import group_norm_silu
from admfast.ops.resample import avg_pool_down, nearest_up
from admfast.ops.transforms import has_op_observer, needs_autograd

Net = TypeVar("Net", bound=nn.Module)
_NO_CONTEXT: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def zero_parameters(module: Net) -> Net:
    """Set all parameters of `module` to zero and return it; ADM initializes the ends of branches this way."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Compute `[cos(t f_i), sin(t f_i)]` with `f_i = max_period^(-i / half)`, `half = dim // 2`.

    Source: Vaswani et al. 2017, with the order and the divisor of the published ADM code; an odd `dim` is
    padded with a zero. `timesteps` [N], integer or float, in the unit of the original schedule (0..999).
    Returns [N, dim], computed in float32. Not meant to be differentiated.
    """
    half = dim // 2
    # Frequencies are computed on the device: from the host they would be an upload per step.
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = timesteps[:, None].float() * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class Norm(nn.GroupNorm):
    """GroupNorm with 32 groups and eps 1e-5, which `group_norm_silu` fuses with the operations around it."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels, eps=1e-5)

    def forward(self, x: Tensor, *, silu: bool = False, **options: Any) -> Tensor:  # type: ignore[override]
        """Apply `group_norm_silu` with this layer's parameters; `options` are its other keyword arguments."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=silu, **options)

    def recomputation(self, x: Tensor, **options: Any) -> Callable[[], Tensor]:
        """Return a function that computes this call's result again, even if the module was replaced since."""
        arguments: Any = (x.detach(), self.weight.detach(), self.bias.detach(), self.num_groups, self.eps)
        keywords: Any = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options.items()}
        return partial(group_norm_silu, *arguments, **keywords)


class TimestepBlock(nn.Module):
    """A module that also gets the embedding: `forward(x, emb)`."""


class Head(FusedBlock, nn.Sequential):
    """A sequence that runs a norm and SiLU at its beginning as one operation."""

    def __init__(self, *layers: Any):
        super().__init__(*layers)
        # A slice of a head is also made by this constructor, and may begin with other layers.
        if [type(layer) for layer in self][:2] == [Norm, nn.SiLU]:
            self._record_part_types()

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Run the layers on `x`, in `dtype` unless that is None; the norm converts it on its way."""
        layer_by_layer = self.must_run_layer_by_layer()
        if dtype is not None and (layer_by_layer or torch.promote_types(x.dtype, dtype) != dtype):
            x, dtype = x.to(dtype), None
        if layer_by_layer:
            return super().forward(x)
        norm, _, *layers = self._modules.values()
        x = norm(x, silu=True, dtype=dtype)  # type: ignore[misc]
        for layer in layers:
            x = layer(x)  # type: ignore[misc]
        return x


class Upsample(nn.Module):
    """Nearest-neighbour doubling, followed by a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.use_conv = use_conv
        if use_conv:
            self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = nearest_up(x)
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halving by a 3x3 convolution of stride two if `use_conv`, else by averaging."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.use_conv = use_conv
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op: nn.Module = conv_nd(
                dims, channels, out_channels or channels, 3, stride=stride, padding=1
            )
        elif out_channels not in (None, channels):
            raise invalid("out_channels", out_channels, f"averaging keeps the {channels} channels")
        else:
            self.op = AveragePoolDown()

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class AveragePoolDown(nn.Module):
    """`avg_pool_down` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool_down(x)


class ResidualBlock(FusedBlock):
    """A block that computes `x_skip + conv(act(GN(conv(act(GN(x))), emb)))` with fused operations.

    Norm, SiLU and resampling run as one operation, and the last convolution adds the skip.

    resample: "up", "down" or None; resamples the branch after the first norm and SiLU, and the skip.
    use_scale_shift_norm: the projected embedding is scale (first half) and shift (second half) of the second
    norm's output; else it is added to that norm's input.
    """

    resample: str | None = None
    use_scale_shift_norm: bool
    recomputes_norms = False  # recompute norms in the backward pass, instead of storing their outputs

    def _forward_fused(
        self, x: Tensor, emb: Any, x2: Tensor | None,
        norm: Any, conv: Any, out_norm: Any, dropout: Any, out_conv: Any,
    ) -> Tensor:  # fmt: skip
        recomputes, block_input = self.recomputes_norms, x
        # Not resampled, the skip is x: the norm's backward pass then adds its gradient.
        norm_returns_skip = self.resample is not None or (x2 is None and needs_autograd(x))
        h = norm(x, silu=True, resample=self.resample, x2=x2, with_skip=norm_returns_skip)
        if norm_returns_skip:
            (h, x), x2 = h, None
        context = _NO_CONTEXT
        if recomputes and self.resample is None:
            context = recompute_in_backward(h, norm.recomputation(block_input, silu=True, x2=x2))
        with context:
            h, x_bias = convolve_without_bias(conv, h)
        projected = self._project_embedding(emb)  # [N, C] or [N, 2C]
        if self.use_scale_shift_norm:
            scale, shift = projected.chunk(2, dim=1)
            modulation = {"scale": scale, "shift": shift, "x_bias": x_bias}
        elif x_bias is None:
            h, modulation = h + _broadcast_over_positions(projected, h), {}
        else:
            modulation = {"x_bias": projected + x_bias}
        normed = out_norm(h, silu=True, **modulation)
        dropped = dropout(normed)
        context = _NO_CONTEXT
        if recomputes and dropped is normed:
            context = recompute_in_backward(normed, out_norm.recomputation(h, silu=True, **modulation))
        with context:
            return out_conv(dropped, self._connect_skip(x, x2))

    def _project_embedding(self, emb: Any) -> Tensor:
        """Return the block's own projection of the embedding."""
        raise NotImplementedError

    def _connect_skip(self, x: Tensor, x2: Tensor | None) -> Tensor:
        """Return the tensor to which the branch is added; x and x2 are resampled already."""
        raise NotImplementedError


class ResBlock(ResidualBlock, TimestepBlock):
    """`x_skip + conv(act(GN(conv(act(GN(x))), emb)))`, with optional resampling (Dhariwal & Nichol 2021).

    With `use_scale_shift_norm` the projected embedding is scale (first half) and shift (second half) of the
    second norm's output; else it is added to that norm's input. `up`/`down` resample the branch after the
    first norm and SiLU, and the skip. With a second source `x2`, the input is the concatenation `[x, x2]`.

    If a part has a hook or was replaced, the block runs layer by layer.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resample = "up" if up else "down" if down else None
        self.in_layers = nn.Sequential(
            Norm(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.h_upd, self.x_upd = _resamplers(channels, dims, self.resample)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            Norm(out_channels),
            nn.SiLU(),
            Dropout(p=dropout),
            zero_parameters(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        self.projection = slice(0)  # this block's columns in the joined projections; the network sets it
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)
        self._record_part_types()

    def forward(self, x: Tensor, emb: Tensor | ProjectedEmbedding, x2: Tensor | None = None) -> Tensor:
        return maybe_checkpoint(self, x, emb, x2)

    def _forward(self, x: Tensor, emb: Tensor | ProjectedEmbedding, x2: Tensor | None = None) -> Tensor:
        if self.must_run_layer_by_layer():
            return self._forward_layer_by_layer(x if x2 is None else torch.cat([x, x2], dim=1), emb)
        # Through `_modules`, because this runs at every step: a module's attribute costs 0.5 us, an item 1.5.
        modules: Any = self._modules
        norm, _, conv = modules["in_layers"]._modules.values()
        out_norm, _, dropout, out_conv = modules["out_layers"]._modules.values()
        return self._forward_fused(x, emb, x2, norm, conv, out_norm, dropout, out_conv)

    def _forward_layer_by_layer(self, x: Tensor, emb: Tensor | ProjectedEmbedding) -> Tensor:
        """Call every part by itself, with the input that it gets in the published block."""
        h = x
        if self.resample is None:
            h = self.in_layers(h)
        else:
            *before, conv = self.in_layers
            for layer in before:
                h = layer(h)
            h, x = conv(self.h_upd(h)), self.x_upd(x)
        projected = self._project_embedding(emb if isinstance(emb, Tensor) else emb.for_published_block())
        projected = _broadcast_over_positions(projected, h)
        if self.use_scale_shift_norm:
            norm, *after = self.out_layers
            scale, shift = projected.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
            for layer in after:
                h = layer(h)
        else:
            h = self.out_layers(h + projected)
        return self.skip_connection(x) + h

    def _project_embedding(self, emb: Tensor | ProjectedEmbedding) -> Tensor:
        if isinstance(emb, ProjectedEmbedding):
            return emb.values[:, self.projection]
        return self.emb_layers(emb)

    def _connect_skip(self, x: Tensor, x2: Tensor | None) -> Tensor:
        connection = self._modules["skip_connection"]
        if isinstance(connection, nn.Identity):
            return x if x2 is None else torch.cat([x, x2], dim=1)
        return connection(x, x2=x2)  # type: ignore[misc]


def _resamplers(channels: int, dims: int, resample: str | None) -> tuple[nn.Module, nn.Module]:
    """Return the modules that resample a block's branch and its skip."""
    if resample is None:
        identity = nn.Identity()  # one module under two names, as published
        return identity, identity
    kind = Upsample if resample == "up" else Downsample
    return kind(channels, False, dims), kind(channels, False, dims)


def convolve_without_bias(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return `conv(x)` and None; or without the bias, and the bias, if the next norm adds it at no cost."""
    method = getattr(conv, "without_bias", None)
    # A hook must see the convolution as it is.
    if method is None or (not hook_checks_skipped() and has_hooks((conv,))):
        return conv(x), None
    return method(x)


def _broadcast_over_positions(values: Tensor, h: Tensor) -> Tensor:
    """Return values [N, C] as [N, C, 1, ...], to broadcast over the positions of `h`, in its dtype."""
    return values.to(h.dtype)[(...,) + (None,) * (h.dim() - 2)]


class Attention(nn.Module):
    """`ops.attention` between a block's two products: [N, 3C, S] -> [N, C, S], qkv in the published order."""

    def __init__(self, num_heads: int, legacy_order: bool):
        super().__init__()
        self.num_heads, self.legacy_order = num_heads, legacy_order

    def forward(self, qkv: Tensor) -> Tensor:
        tokens = qkv.transpose(1, 2)
        # A qkv layer that a user put in may give an output that is not channels-last.
        tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
        # torch's FLOP counter counts the reference's two products, but not all of torch's attention kernels.
        impl = "reference" if has_op_observer() else None
        return attention(tokens, self.num_heads, legacy_order=self.legacy_order, impl=impl).transpose(1, 2)

    def attend_tokens(self, qkv: Tensor, reordered: bool = False) -> Tensor:
        """Return attention [N, S, C] of qkv [N, S, 3C], without calling the module's hooks.

        reordered: the rows of legacy qkv are already in the new order.
        """
        return attention(qkv, self.num_heads, legacy_order=self.legacy_order and not reordered)


def legacy_row_order(count: int, num_heads: int) -> list[int]:
    """Return the indices that bring legacy rows of qkv weights, [h, 3, d], into the new order, [3, h, d]."""
    return torch.arange(count, device="cpu").view(num_heads, 3, -1).transpose(0, 1).flatten().tolist()


class AttentionBlock(FusedBlock):
    """`x + proj_out(attention(qkv(GN(x))))` over all positions (Ho et al. 2020), tokens channels-last.

    If a part has a hook or was replaced, the block runs layer by layer.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        use_new_attention_order: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        if channels % num_heads:
            raise invalid("num_heads", num_heads, f"must divide the {channels} channels")
        self.use_checkpoint = use_checkpoint
        self.norm = Norm(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels, 1)
        self.attention = Attention(num_heads, legacy_order=not use_new_attention_order)
        if self.attention.legacy_order:
            self.qkv.rows = legacy_row_order(3 * channels, num_heads)
        self.proj_out = zero_parameters(PointwiseConv1d(channels, channels, 1))
        self._record_part_types()

    def forward(self, x: Tensor) -> Tensor:
        return maybe_checkpoint(self, x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.must_run_layer_by_layer():
            flat = x.flatten(2)
            return (flat + self.proj_out(self.attention(self.qkv(self.norm(flat))))).reshape(x.shape)
        modules: Any = self._modules  # see `ResBlock`
        norm, qkv_conv, attention, proj_out = modules.values()
        h, x = norm(x, with_skip=True) if needs_autograd(x) else (norm(x), x)
        qkv = qkv_conv(h.flatten(2), any_order=True).transpose(1, 2)  # [N, S, 3C]
        h = attention.attend_tokens(qkv, qkv_conv.reordered)
        return proj_out(h.transpose(1, 2), x.flatten(2)).reshape(x.shape)


class AttentionPool2d(FusedBlock):
    """Attend from the mean token over all positions and project (the pool of CLIP, Radford et al. 2021).

    x: [N, embed_dim, H, W] with H*W = spacial_dim^2. Returns [N, output_dim]; an `output_dim` of None is
    `embed_dim`. The qkv rows are in the new order.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ):
        super().__init__()
        if embed_dim % num_heads_channels:
            raise invalid("num_heads_channels", num_heads_channels, f"must divide the {embed_dim} channels")
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = nn.Conv1d(embed_dim, 3 * embed_dim, 1)
        self.c_proj = nn.Conv1d(embed_dim, embed_dim if output_dim is None else output_dim, 1)
        self.attention = Attention(embed_dim // num_heads_channels, legacy_order=False)
        self._record_part_types()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [N, S, C]
        table = self.positional_embedding.t().to(tokens.dtype)
        if tokens.shape[1] + 1 != table.shape[0]:
            raise invalid(
                "x.shape", tuple(x.shape), f"the attention pool was built for {table.shape[0] - 1} positions"
            )
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + table
        if self.must_run_layer_by_layer():
            return self.c_proj(self.attention(self.qkv_proj(tokens.transpose(1, 2))))[:, :, 0]
        qkv = F.linear(tokens, self.qkv_proj.weight.squeeze(-1), self.qkv_proj.bias)
        pooled = self.attention.attend_tokens(qkv)[:, 0]
        return F.linear(pooled, self.c_proj.weight.squeeze(-1), self.c_proj.bias)


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that passes the embedding to its `TimestepBlock`s, and `x2` to its first layer."""

    embedding_block_types: tuple[type, ...] = (TimestepBlock,)  # classes of the layers that get the embedding

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor | ProjectedEmbedding, x2: Tensor | None = None
    ) -> Tensor:
        for layer in self._modules.values():
            if isinstance(layer, self.embedding_block_types):
                x = call_block(layer, x, emb, x2)
            else:
                x = layer(x if x2 is None else torch.cat([x, x2], dim=1))  # type: ignore[misc]
            x2 = None
        return x


def call_block(
    block: nn.Module, x: Tensor, emb: Tensor | ProjectedEmbedding, x2: Tensor | None = None
) -> Tensor:
    """Call one of our blocks with both sources; other or hooked blocks get them concatenated."""
    if type(block).forward in _FUSED_FORWARDS and not must_call_as_published(block):
        return block(x, emb, x2)
    x = x if x2 is None else torch.cat([x, x2], dim=1)
    return block(x, emb if isinstance(emb, Tensor) else emb.for_published_block())


def call_head(head: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Call a network's last layers with `x` in `dtype`, in the fastest way if they are our own `Head`."""
    if type(head).forward is Head.forward and not must_call_as_published(head):
        return head(x, dtype)
    return head(x.to(dtype))


_FUSED_FORWARDS = (ResBlock.forward, TimestepEmbedSequential.forward)
