"""Configurations of the three kinds of networks, and functions that make them from the published flags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from admfast import checks
from admfast.errors import allowed_names, invalid

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]
POOLS: tuple[Pool, ...] = ("adaptive", "attention", "spatial", "spatial_v2")

# Multipliers that the published flags imply for an image size; the 512 upsampler uses those of 256.
DEFAULT_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
GROUPS = 32


_POSITIVE_INTEGER_FIELDS = (
    "image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "num_heads"
)  # fmt: skip
_OPTIONAL_INTEGER_FIELDS = ("num_head_channels", "num_heads_upsample")
SWITCHES = (
    "conv_resample", "use_checkpoint", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order"
)  # fmt: skip


def check_field(field: str, value: Any, name: str | None = None) -> Any:
    """Return the checked and normalized value of a configuration's field.

    name: the field's name in errors, if the value comes from a flag with another name.
    Raises: InvalidArgument for a wrong type or range.
    """
    name = name or field
    if field in _POSITIVE_INTEGER_FIELDS:
        return checks.whole_number(name, value, 1)
    if field in _OPTIONAL_INTEGER_FIELDS:
        return checks.whole_number(name, value, 1, special=-1)
    if field in SWITCHES:
        return checks.boolean(name, value)
    if field == "num_classes":
        return None if value is None else checks.whole_number(name, value, 1)
    if field == "attention_resolutions":
        return tuple(checks.whole_numbers(name, value, 1))
    if field == "channel_mult":
        return _check_multipliers(name, value)
    if field == "dropout":
        return checks.finite_float(name, value, least=0, below=1)
    if field == "dims":
        return checks.whole_number(name, value, 1, 3)
    if field == "pool":
        return checks.one_of(name, value, POOLS)
    return value


def _check_multipliers(name: str, value: object) -> tuple[Any, ...]:
    """Return numbers above 0, one per level, as a tuple; a single number counts as one level."""
    multipliers = [checks.to_python(item) for item in checks.as_list(checks.to_python(value))]
    for item in multipliers:
        checks.finite_float(name, item, above=0)
    if not multipliers:
        raise invalid(name, value, "one multiplier above 0 per level, at least one level")
    return tuple(multipliers)


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    """Options that all networks have, with the names of the published constructors.

    Attributes:
        image_size: side of the (square) training image in pixels; the networks also run on other sizes.
        in_channels: channels of one image (the upsampler, which gets two images, doubles them itself).
        model_channels: base width; level l has `int(channel_mult[l] * model_channels)` channels.
        out_channels: channels of the output, or classes of a classifier.
        num_res_blocks: residual blocks per level.
        attention_resolutions: downsampling factors (not image sides) at which attention is applied.
        dropout: probability of dropout before the second convolution of residual blocks.
        channel_mult: width multipliers, one per level, highest resolution first.
        conv_resample: resample with convolutions (else by nearest neighbours and averages); no effect with
            `resblock_updown`.
        dims: 1, 2 or 3 spatial dimensions.
        use_checkpoint: recompute blocks in the backward pass instead of storing their activations.
        num_heads: attention heads, if `num_head_channels` is -1.
        num_head_channels: channels per attention head; -1 means that `num_heads` applies.
        num_heads_upsample: heads in the up path, or -1 for `num_heads`; no effect with `num_head_channels`.
        use_scale_shift_norm: the embedding scales and shifts the second norm's output (else it is added to
            the norm's input).
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: rows of qkv weights are ordered [3, h, d] (else the legacy [h, 3, d]).
    """

    image_size: int
    in_channels: int = 3
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropout: float = 0.0
    channel_mult: tuple[float, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    use_checkpoint: bool = False
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False

    kind: ClassVar[str] = "net"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, check_field(field.name, getattr(self, field.name)))
        for mult in self.channel_mult:
            width = int(mult * self.model_channels)
            if width < 1 or width % GROUPS:
                product = f"{mult} * {self.model_channels} gives {width}"
                allowed = f"every level's width must be a multiple of {GROUPS}; {product}"
                raise invalid("channel_mult", self.channel_mult, allowed)
        for width, attends in zip(self.widths(), self.levels_with_attention(), strict=True):
            if attends:
                self._check_heads(width)
        self._check_heads(self.widths()[-1])

    def _check_heads(self, width: int) -> None:
        """Raise InvalidArgument if the heads don't divide `width`, the channels of an attention block."""
        if self.num_head_channels != -1:
            if self.num_head_channels < 1 or width % self.num_head_channels:
                raise invalid("num_head_channels", self.num_head_channels, f"-1, or a divisor of {width}")
            return
        for name, heads in (("num_heads", self.num_heads), ("num_heads_upsample", self.heads_upsample())):
            if heads < 1 or width % heads:
                raise invalid(name, heads, f"must divide {width} channels")

    def widths(self) -> tuple[int, ...]:
        """Return the channels of every level, highest resolution first."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    def levels_with_attention(self) -> tuple[bool, ...]:
        """Return, for every level, whether attention follows its residual blocks."""
        return tuple(2**level in self.attention_resolutions for level in range(len(self.channel_mult)))

    def heads_upsample(self) -> int:
        """Return the number of heads in the up path, if `num_head_channels` is -1."""
        return self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample

    def heads(self, width: int, up_path: bool = False) -> int:
        """Return the number of heads of an attention block with `width` channels."""
        if self.num_head_channels != -1:
            return width // self.num_head_channels
        return self.heads_upsample() if up_path else self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON, with `kind` ("unet", "upsampler" or "classifier") first."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetConfig):
    """Configuration of a UNet; `num_classes` is None for an unconditional one."""

    num_classes: int | None = None
    kind: ClassVar[str] = "unet"

    @property
    def outputs_images(self) -> bool:
        """Tell whether the output has the input's channels, or twice as many (learned variance).

        Sampling needs this. A network whose input channels also hold conditions has fewer output channels.
        """
        return self.out_channels in (self.in_channels, 2 * self.in_channels)

    def side_divisors(self) -> tuple[int, ...]:
        """Return, for each side of an image, a number that must divide it because levels halve the side."""
        # A volume's first side is never halved.
        factor = 2 ** (len(self.channel_mult) - 1)
        return (1, factor, factor) if self.dims == 3 else (factor,) * self.dims

    @property
    def learn_sigma(self) -> bool:
        """Tell whether the second half of the output channels is the variance."""
        return self.out_channels == 2 * self.in_channels


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig(UNetConfig):
    """Configuration of a UNet whose input is x and an enlarged low-resolution image; see `Upsampler`.

    `in_channels` counts the channels of x only.
    """

    kind: ClassVar[str] = "upsampler"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.outputs_images:
            allowed = f"{self.in_channels} or, with learned variance, {2 * self.in_channels}"
            raise invalid("out_channels", self.out_channels, allowed)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(NetConfig):
    """Configuration of a noisy-image classifier (down half of a UNet); `out_channels` counts the classes."""

    pool: Pool = "adaptive"
    kind: ClassVar[str] = "classifier"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "attention" and self.num_head_channels == -1:
            raise invalid("num_head_channels", -1, "the attention pool needs the channels of a head")
        if self.dims != 2 and self.pool in ("adaptive", "attention"):
            raise invalid("pool", self.pool, "with dims other than 2: 'spatial' or 'spatial_v2'")

    def pool_downsampling(self) -> int:
        """Return the downsampling factor at the pool."""
        return 2 ** (len(self.channel_mult) - 1)


CONFIG_KINDS: dict[str, type[NetConfig]] = {
    config.kind: config for config in (UNetConfig, UpsamplerConfig, ClassifierConfig)
}


def config_from_dict(values: Mapping[str, Any]) -> NetConfig:
    """Return the configuration that `to_dict` wrote.

    Raises: InvalidArgument for a missing field, or an unknown kind or field, with the nearest names.
    """
    values = dict(values)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in CONFIG_KINDS:
        raise invalid("kind", kind, allowed_names(kind, CONFIG_KINDS))
    cls = CONFIG_KINDS[kind]
    field_names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in field_names:
            raise invalid("config", name, f"no such field of a {kind}; {allowed_names(name, field_names)}")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise invalid("config", field.name, f"a {kind} needs this field")
    return cls(**values)


def parse_channel_mult(text: str | Sequence[float], image_size: int) -> tuple[float, ...]:
    """Read "0.5,1,1" or a sequence as multipliers; "" gives the published default for the image size."""
    if not isinstance(text, str):
        return tuple(text)
    if not text.strip():
        if image_size not in DEFAULT_CHANNEL_MULT:
            sizes_with_default = f"there is one for {sorted(DEFAULT_CHANNEL_MULT)}"
            raise invalid(
                "channel_mult", text, f"no default for image size {image_size} ({sizes_with_default})"
            )
        return DEFAULT_CHANNEL_MULT[image_size]
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise invalid("channel_mult", text, "numbers above 0 separated by commas, such as 0.5,1,2")
    return tuple(int(value) if value.is_integer() else value for value in values)


def parse_attention_resolutions(
    text: str | Sequence[int], image_size: int, name: str = "attention_resolutions"
) -> tuple[int, ...]:
    """Turn image sides ("32,16,8") into downsampling factors of `image_size`, as the published flags do.

    Sides larger than the image are dropped. name: the flag's name in errors.
    """
    try:
        sides = (
            [int(part) for part in text.split(",") if part.strip()] if isinstance(text, str) else list(text)
        )
    except ValueError:
        raise invalid(name, text, "image sides separated by commas, such as 32,16,8") from None
    if any(side < 1 for side in sides):
        raise invalid(name, text, "image sides of 1 or more")
    return tuple(image_size // side for side in sides if side <= image_size)


def unet_config_from_flags(
    *,
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str | Sequence[float] = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    num_classes: int = 1000,
    attention_resolutions: str | Sequence[int] = "16,8",
    in_channels: int = 3,
    **options: Any,
) -> UNetConfig:
    """Build the configuration that the published `create_model` flags describe.

    Unlike `create_model`, it allows any `num_classes` and `in_channels`, and fractional multipliers.
    `options` are flags that have the name of a `UNetConfig` field (num_heads, dropout, ...).
    """
    return UNetConfig(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=parse_attention_resolutions(attention_resolutions, image_size),
        channel_mult=parse_channel_mult(channel_mult, image_size),
        num_classes=num_classes if class_cond else None,
        **options,
    )


def upsampler_config_from_flags(*, large_size: int, small_size: int, **flags: Any) -> UpsamplerConfig:
    """Build the configuration that the published `sr_create_model` flags describe.

    The default multipliers for 512 are those of 256. `small_size` is the side of the low-resolution image. It
    is checked but not stored, because the network accepts any side.
    """
    if not 0 < small_size <= large_size:
        raise invalid("small_size", small_size, f"1 to large_size={large_size}")
    if flags.get("channel_mult", "") == "" and large_size == 512:
        flags["channel_mult"] = DEFAULT_CHANNEL_MULT[256]
    return UpsamplerConfig(**dataclasses.asdict(unet_config_from_flags(image_size=large_size, **flags)))


def classifier_config_from_flags(
    *,
    image_size: int,
    classifier_width: int = 128,
    classifier_depth: int = 2,
    classifier_attention_resolutions: str | Sequence[int] = "32,16,8",
    classifier_use_scale_shift_norm: bool = True,
    classifier_resblock_updown: bool = True,
    classifier_pool: Pool = "attention",
    num_classes: int = 1000,
    in_channels: int = 3,
    num_head_channels: int = 64,
    channel_mult: str | Sequence[float] = "",
    dropout: float = 0.0,
) -> ClassifierConfig:
    """Build the configuration that the published `create_classifier` flags describe."""
    return ClassifierConfig(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=parse_attention_resolutions(
            classifier_attention_resolutions, image_size, "classifier_attention_resolutions"
        ),
        channel_mult=parse_channel_mult(channel_mult, image_size),
        num_head_channels=num_head_channels,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
        dropout=dropout,
    )
