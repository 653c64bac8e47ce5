"""Report on a weights file, and on the work and memory of a forward pass, for `admfast inspect`."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from admfast.checkpoints.differences import nearest_preset, shapes_of
from admfast.checkpoints.infer import AmbiguousCheckpoint, ModelInfo
from admfast.checkpoints.loading import check_fit, identify_weights, values_by_dtype
from admfast.checkpoints.reading import Weights, read_weights
from admfast.checkpoints.structure import summary
from admfast.files.paths import user_path
from admfast.models import ClassifierConfig, NetConfig, UNetConfig, UpsamplerConfig, build
from admfast.models.hooks import staying_fused
from admfast.models.presets import MODELS, ModelPreset
from admfast.ops.dispatch import override_impl

Row = tuple[str, str]


@dataclass(frozen=True)
class ForwardWork:
    """Work of one forward pass without gradient.

    Attributes:
        flops: floating-point operations of convolutions and matrix products, 2 for a multiply-add.
        weight_bytes: size of all parameters.
        activation_bytes: largest size of the tensors that are alive at the same time, without parameters and
            inputs.
    """

    flops: int
    weight_bytes: int
    activation_bytes: int


def forward_work(
    config: NetConfig,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    sides: Sequence[int] | None = None,
) -> ForwardWork:
    """Count the work of a forward pass by running the network on meta tensors, which have no memory.

    The network runs eagerly with the reference implementations, its torso in `dtype`. Fused implementations
    need less memory. Fragmentation of the allocator and workspaces of libraries take more.

    sides: sides of the images in pixels; None takes those that the network was trained for.
    """
    # Imported here because it imports triton, which `import admfast` must not do.
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = build(config)
        net.convert_torso(dtype)  # type: ignore[operator]
        inputs = network_inputs(config, batch, sides)
    counter = FlopCounterMode(display=False)
    live = LiveBytes(net, inputs)
    # Fused kernels don't run on meta tensors, and the counter can't count them. `staying_fused`: because of
    # the counter's hooks on every module, the network would otherwise run layer by layer.
    with override_impl("reference"), torch.no_grad(), staying_fused(), counter, live:
        net(**inputs)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    return ForwardWork(counter.get_total_flops(), weights, live.peak)


def guidance_flops(config: ClassifierConfig, sides: Sequence[int] | None = None) -> int:
    """Count the floating-point operations of the guidance gradient for one image, on meta tensors.

    They are those of the classifier's forward pass and of its gradient with respect to x, without
    recomputation. sides: see `forward_work`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with torch.device("meta"):
        net = build(config).requires_grad_(False)
        x, t = network_inputs(config, 1, sides).values()
    with override_impl("reference"), FlopCounterMode(display=False) as counter:
        net(x.requires_grad_(True), t).sum().backward()  # the counter can't follow torch.autograd.grad
    return counter.get_total_flops()


def describe(
    path: str | PathLike[str],
    *,
    preset: str | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    check_values: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Report on a weights file as (subject, finding) rows.

    Args:
        path: .pt, .pth or .safetensors.
        preset, options: see `load_network`; the options may include `entry`.
        batch: number of images, for the memory.
        dtype: dtype of the torso, for the memory.
        check_values: read every value to count NaN and infinities.

    Raises:
        CheckpointError, InvalidArgument: see `load_network`; but missing options are a row of the report, not
            an error.
    """
    options = dict(options or {})
    path = user_path("path", path)
    weights = read_weights(path, values=check_values, entry=options.pop("entry", None))
    rows = [("file", f"{weights.path}, {os.path.getsize(weights.path):,} bytes")]
    rows += [("entry", weights.entry)] if weights.entry else []
    rows += [("beside", note) for note in weights.notes]
    try:
        info = identify_weights(weights, preset=preset, options=options)
    except AmbiguousCheckpoint as question:
        rows += [("network", summary(question.structure)), *_sizes(weights)]
        rows.append(("open", str(question).removeprefix(f"{weights.path}: ")))
    else:
        check_fit(weights, info, options)
        rows += _identity_rows(info, check_values)
        rows += _config_rows(info.config, info)
        rows += _sizes(weights)
        rows += _work_rows(info.config, batch, dtype)
    if check_values:
        rows.append(("values", non_finite(weights.tensors)))
    return rows


def non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return `all finite`, or the numbers of NaN and infinite values and the first tensor that has any."""
    nan = infinite = 0
    spoiled = []
    for key, value in tensors.items():
        if not value.is_floating_point() or bool(torch.isfinite(value).all()):
            continue
        nan += int(value.isnan().sum())
        infinite += int(value.isinf().sum())
        spoiled.append(key)
    if not spoiled:
        return "all finite"
    return f"{nan:,} NaN and {infinite:,} infinite in {len(spoiled)} tensors, the first {spoiled[0]}"


def _identity_rows(info: ModelInfo, read: bool) -> list[Row]:
    """Return the rows that say which model the file is. read: whether the whole file may be read."""
    names = [model.name for model in info.candidates]
    if info.preset is not None and info.preset in info.candidates:
        model = f"has the keys and shapes of {info.preset.name}{_as_published(info.preset, info.path, read)}"
    elif info.candidates:
        model = f"has the keys and shapes of {', '.join(names)}, which differ only in dropout"
    else:
        shipped = [model.name for model in MODELS.values() if model.shipped_path == info.path.resolve()]
        model = f"{shipped[0]}, as shipped" if shipped else "none of the released models"
    rows = [("network", info.config.kind), ("model", model), ("known from", info.source)]
    if info.assumed:
        rows.append(("assumed", ", ".join(info.assumed)))
    return rows


def _as_published(known: ModelPreset, path: Path, read: bool) -> str:
    """Say whether the file is the published one, judged by its size and hash if these are known."""
    size = path.stat().st_size
    if known.size is None:
        return "; size and hash of the published file are not known"
    if path.suffix != ".pt":
        return "; in another format than the published file"
    if size != known.size:
        return f"; its size differs from the published file: {size:,}, not {known.size:,} bytes"
    name, wanted = ("sha256", known.sha256) if known.sha256 else ("md5", known.md5)
    if not read or wanted is None:
        return "; its size is that of the published file"
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, name).hexdigest()
    if found == wanted:
        return f"; it is the published file, by size and {name}"
    return f"; its {name} differs from the published file"


def _config_rows(config: NetConfig, info: ModelInfo) -> list[Row]:
    """Return the rows of the configuration, the diffusion process, and the facts about the training."""
    heads = _count(config.num_heads, "head")
    if config.num_head_channels != -1:
        heads = f"heads of {config.num_head_channels} channels"
    order = "new" if config.use_new_attention_order else "legacy"
    factors = ", ".join(map(str, config.attention_resolutions)) or "none (only in the middle block)"
    resampling = "in residual blocks" if config.resblock_updown else "by convolutions"
    if not config.resblock_updown and not config.conv_resample:
        resampling = "nearest and average"
    embedding = "scale and shift" if config.use_scale_shift_norm else "added"
    blocks = f"{_count(config.num_res_blocks, 'residual block')} a level, dropout {config.dropout:g}"
    rows = [
        ("image", f"{config.image_size}x{config.image_size}, {_count(config.in_channels, 'channel')}"),
        ("widths", ", ".join(map(str, config.widths())) + f" (base {config.model_channels})"),
        ("blocks", f"{blocks}, embedding {embedding}, resampling {resampling}"),
        ("attention", f"{heads}, {order} qkv order, at downsampling {factors}"),
    ]
    if isinstance(config, UNetConfig):
        classes = f"{config.num_classes} classes" if config.num_classes else "unconditional"
        rows.append(("output", f"{_count(config.out_channels, 'channel')}, {classes}"))
    else:
        rows.append(("output", f"{config.out_channels} classes, pool {getattr(config, 'pool', '')}"))
    if info.diffusion is not None:
        settings = ", ".join(f"{name}={value}" for name, value in info.diffusion.to_dict().items())
        rows.append(("diffusion", settings))
    if info.training:
        rows.append(("training", ", ".join(f"{name}={value}" for name, value in info.training.items())))
    return rows


def _sizes(weights: Weights) -> list[Row]:
    """Return the rows of parameters, dtypes on disk, and the nearest released model if it differs."""
    total = sum(value.numel() for value in weights.tensors.values())
    dtypes = ", ".join(f"{count:,} {name}" for name, count in values_by_dtype(weights.tensors).items())
    rows = [
        ("parameters", f"{total:,} in {len(weights.tensors)} tensors"),
        ("on disk", dtypes),
    ]
    near = nearest_preset(shapes_of(weights.tensors))
    if near is not None and near[1]:
        rows.append(("nearest", f"{near[0].name}, from which it differs: {near[1].summary()}"))
    return rows


def _work_rows(config: NetConfig, batch: int, dtype: torch.dtype) -> list[Row]:
    """Return the rows of the GFLOP of a forward pass and of its memory at a batch size."""
    one = forward_work(config, 1, dtype)
    many = one if batch == 1 else forward_work(config, batch, dtype)
    name = str(dtype).removeprefix("torch.")
    total = many.weight_bytes + many.activation_bytes
    return [
        ("work", f"{one.flops / 1e9:,.1f} GFLOP an image and forward pass (2 a multiply-add)"),
        (
            "memory",
            f"{_gib(total)} at batch {batch}, torso {name}: weights {_gib(many.weight_bytes)} + activations "
            f"{_gib(many.activation_bytes)} (tensors alive at once in an eager pass without gradient)",
        ),
    ]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def network_inputs(config: NetConfig, batch: int, sides: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Return uninitialised arguments of the network's forward, on the default device.

    sides: sides of the images in pixels; None takes those that the network was trained for.
    """
    sides = [config.image_size] * config.dims if sides is None else sides
    inputs = {"x": torch.empty(batch, config.in_channels, *sides), "timesteps": torch.empty(batch)}
    if isinstance(config, UNetConfig) and config.num_classes is not None:
        inputs["y"] = torch.empty(batch, dtype=torch.long)
    if isinstance(config, UpsamplerConfig):
        inputs["low_res"] = torch.empty(batch, config.in_channels, *(max(side // 4, 1) for side in sides))
    return inputs


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of storages that are alive, without those of the network's parameters and inputs.

    Finalisers of the storages tell it when they are freed.

    Attributes: now: bytes that are alive. peak: largest value of `now` so far.
    """

    def __init__(self, net: nn.Module, inputs: Mapping[str, Tensor]):
        super().__init__()
        given = [*net.parameters(), *inputs.values()]
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._alive: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._given or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)
