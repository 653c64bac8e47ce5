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
from admfast.checkpoints.loading import check_fit, count_values_by_dtype, identify_weights
from admfast.checkpoints.reading import Weights, read_weights
from admfast.checkpoints.structure import describe_structure
from admfast.files.paths import user_path
from admfast.models import ClassifierConfig, NetConfig, UNetConfig, UpsamplerConfig, build
from admfast.models.hooks import keep_fused
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


def count_forward_work(
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
        inputs = make_network_inputs(config, batch, sides)
    counter = FlopCounterMode(display=False)
    live = LiveBytes(net, inputs)
    # Fused kernels don't run on meta tensors, and the counter can't count them. `keep_fused`: because of
    # the counter's hooks on every module, the network would otherwise run layer by layer.
    with override_impl("reference"), torch.no_grad(), keep_fused(), counter, live:
        net(**inputs)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    return ForwardWork(counter.get_total_flops(), weights, live.peak)


def count_guidance_flops(config: ClassifierConfig, sides: Sequence[int] | None = None) -> int:
    """Count the floating-point operations of the guidance gradient for one image, on meta tensors.

    They are those of the classifier's forward pass and of its gradient with respect to x, without
    recomputation. sides: see `count_forward_work`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    with torch.device("meta"):
        net = build(config).requires_grad_(False)
        x, t = make_network_inputs(config, 1, sides).values()
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
    rows += [("note", note) for note in weights.notes]
    try:
        info = identify_weights(weights, preset=preset, options=options)
    except AmbiguousCheckpoint as error:
        rows += [("network", describe_structure(error.structure)), *_size_rows(weights)]
        rows.append(("missing", str(error).removeprefix(f"{weights.path}: ")))
    else:
        check_fit(weights, info, options)
        rows += _identity_rows(info, check_values)
        rows += _config_rows(info.config, info)
        rows += _size_rows(weights)
        rows += _work_rows(info.config, batch, dtype)
    if check_values:
        rows.append(("values", describe_non_finite(weights.tensors)))
    return rows


def describe_non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return `all finite`, or the numbers of NaN and infinite values and the first tensor that has any."""
    nan = infinite = 0
    affected_keys = []
    for key, value in tensors.items():
        if not value.is_floating_point() or bool(torch.isfinite(value).all()):
            continue
        nan += int(value.isnan().sum())
        infinite += int(value.isinf().sum())
        affected_keys.append(key)
    if not affected_keys:
        return "all finite"
    return (
        f"{nan:,} NaN and {infinite:,} infinite in {len(affected_keys)} tensors, the first {affected_keys[0]}"
    )


def _identity_rows(info: ModelInfo, may_read_file: bool) -> list[Row]:
    """Return the rows that say which model the file is. may_read_file: compute its hash."""
    names = [model.name for model in info.candidates]
    if info.preset is not None and info.preset in info.candidates:
        comparison = _compare_with_published_file(info.preset, info.path, may_read_file)
        model = f"has the keys and shapes of {info.preset.name}{comparison}"
    elif info.candidates:
        model = f"has the keys and shapes of {', '.join(names)}, which differ only in dropout"
    else:
        shipped = [model.name for model in MODELS.values() if model.shipped_path == info.path.resolve()]
        model = f"{shipped[0]}, as shipped" if shipped else "none of the released models"
    rows = [("network", info.config.kind), ("model", model), ("source", info.source)]
    if info.assumed:
        rows.append(("assumed", ", ".join(info.assumed)))
    return rows


def _compare_with_published_file(published: ModelPreset, path: Path, may_read_file: bool) -> str:
    """Say whether the file is the published one, judged by its size and hash if these are known."""
    size = path.stat().st_size
    if published.size is None:
        return "; size and hash of the published file are not known"
    if path.suffix != ".pt":
        return "; in another format than the published file"
    if size != published.size:
        return f"; its size differs from the published file: {size:,}, not {published.size:,} bytes"
    hash_name, expected = ("sha256", published.sha256) if published.sha256 else ("md5", published.md5)
    if not may_read_file or expected is None:
        return "; its size is that of the published file"
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, hash_name).hexdigest()
    if actual == expected:
        return f"; it is the published file, by size and {hash_name}"
    return f"; its {hash_name} differs from the published file"


def _config_rows(config: NetConfig, info: ModelInfo) -> list[Row]:
    """Return the rows of the configuration, the diffusion process, and the facts about the training."""
    head_text = _with_unit(config.num_heads, "head")
    if config.num_head_channels != -1:
        head_text = f"heads of {config.num_head_channels} channels"
    qkv_order = "new" if config.use_new_attention_order else "legacy"
    attention_factors = ", ".join(map(str, config.attention_resolutions)) or "none (only in the middle block)"
    resampling = "in residual blocks" if config.resblock_updown else "by convolutions"
    if not config.resblock_updown and not config.conv_resample:
        resampling = "nearest and average"
    embedding_use = "scale and shift" if config.use_scale_shift_norm else "added"
    block_text = f"{_with_unit(config.num_res_blocks, 'residual block')} a level, dropout {config.dropout:g}"
    rows = [
        ("image", f"{config.image_size}x{config.image_size}, {_with_unit(config.in_channels, 'channel')}"),
        ("widths", ", ".join(map(str, config.widths())) + f" (base {config.model_channels})"),
        ("blocks", f"{block_text}, embedding {embedding_use}, resampling {resampling}"),
        ("attention", f"{head_text}, {qkv_order} qkv order, at downsampling {attention_factors}"),
    ]
    if isinstance(config, UNetConfig):
        classes = f"{config.num_classes} classes" if config.num_classes else "unconditional"
        rows.append(("output", f"{_with_unit(config.out_channels, 'channel')}, {classes}"))
    else:
        rows.append(("output", f"{config.out_channels} classes, pool {getattr(config, 'pool', '')}"))
    if info.diffusion is not None:
        settings = ", ".join(f"{name}={value}" for name, value in info.diffusion.to_dict().items())
        rows.append(("diffusion", settings))
    if info.training:
        rows.append(("training", ", ".join(f"{name}={value}" for name, value in info.training.items())))
    return rows


def _size_rows(weights: Weights) -> list[Row]:
    """Return the rows of parameters, dtypes on disk, and the nearest released model if it differs."""
    total = sum(value.numel() for value in weights.tensors.values())
    dtypes = ", ".join(f"{count:,} {name}" for name, count in count_values_by_dtype(weights.tensors).items())
    rows = [
        ("parameters", f"{total:,} in {len(weights.tensors)} tensors"),
        ("on disk", dtypes),
    ]
    nearest = nearest_preset(shapes_of(weights.tensors))
    if nearest is not None and nearest[1]:
        rows.append(("nearest", f"{nearest[0].name}; the file differs from it: {nearest[1].summary()}"))
    return rows


def _work_rows(config: NetConfig, batch: int, dtype: torch.dtype) -> list[Row]:
    """Return the rows of the GFLOP of a forward pass and of its memory at a batch size."""
    single = count_forward_work(config, 1, dtype)
    batched = single if batch == 1 else count_forward_work(config, batch, dtype)
    name = str(dtype).removeprefix("torch.")
    total = batched.weight_bytes + batched.activation_bytes
    return [
        ("work", f"{single.flops / 1e9:,.1f} GFLOP an image and forward pass (2 a multiply-add)"),
        (
            "memory",
            f"{_format_bytes(total)} at batch {batch}, torso {name}: weights "
            f"{_format_bytes(batched.weight_bytes)} + activations {_format_bytes(batched.activation_bytes)} "
            "(tensors alive at once in an eager pass without gradient)",
        ),
    ]


def _with_unit(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _format_bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def make_network_inputs(
    config: NetConfig, batch: int, sides: Sequence[int] | None = None
) -> dict[str, Tensor]:
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
        excluded = [*net.parameters(), *inputs.values()]
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
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
        if key in self._excluded or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)
