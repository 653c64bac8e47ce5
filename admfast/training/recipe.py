"""Recipe of a training run: kind, network, process and every hyper-parameter that can change its result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from admfast import checks
from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument, allowed_names, invalid
from admfast.models import ClassifierConfig, NetConfig, UNetConfig, UpsamplerConfig, config_from_dict

Kind = Literal["diffusion", "classifier", "upsampler"]
KINDS: dict[str, type[NetConfig]] = {
    "diffusion": UNetConfig,
    "classifier": ClassifierConfig,
    "upsampler": UpsamplerConfig,
}
SAMPLERS = ("uniform", "loss-second-moment")
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
CHECKPOINTING = ("none", "norms", "attention", "all")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run. They are stored in its folder (`to_dict`, `recipe_from_dict`).

    Attributes:
        kind: "diffusion", "classifier" or "upsampler".
        network: configuration of a network of that kind.
        process: the diffusion process, which also determines the loss.
        steps: optimiser steps of the whole run.
        batch_size: images per step, over all processes.
        microbatch: images that a process computes at once; None takes its whole share of a batch.
        published_sum: add up the mean gradients of the microbatches without dividing by their number, as the
            published loop of diffusion models does; otherwise all images have the same weight.
        seed: seed of the initial weights and of all random draws, 0..2^64-1.
        lr: highest learning rate. weight_decay: that of AdamW.
        warmup: steps over which the learning rate rises from 0. cooldown: share of the steps, at the end,
            over which it falls to 0. anneal: decrease it to 0 over all steps, as published.
        clip: largest norm of the gradient; None doesn't clip.
        ema: rates of the averages of the weights. ema_warmup: limit rates to at most
            (1 + step) / (10 + step).
        ema_power: widths, relative to the run, of power-function averages (Karras et al. 2024, eq. 121).
        precision: precision of the torso: fp32, tf32, bf16, fp16 (with a loss scale), or auto, which depends
            on the device.
        sampler: sampler of the timesteps, "uniform" or "loss-second-moment".
        drop_classes: share of the images that get the null class instead of their own. It is the network's
            last class.
        noised: train a classifier on noised images.
        low_res_size: side in pixels of the images that an upsampler enlarges.
        noise_augmentation: largest standard deviation of the noise that is added to these images; it is drawn
            uniformly for each image.
        random_crop: crop images at random. random_flip: mirror half of them, chosen at random.
        validation: number of images that are held out; their loss is logged at every snapshot.
        freeze: patterns (as for file names) of the names of parameters that are not trained.
        checkpointing: values that the backward pass computes again instead of keeping them: "none"; "norms",
            the outputs of norms before convolutions; everything inside the blocks: "attention", "all", or k
            for every k-th block.
        max_skipped: number of steps in a row that may be skipped because their gradient isn't finite; the run
            stops after one more.
    Raises: InvalidArgument.
    """

    kind: Kind
    network: NetConfig
    process: DiffusionConfig
    steps: int
    batch_size: int
    lr: float
    microbatch: int | None = None
    published_sum: bool = False
    seed: int = 0
    weight_decay: float = 0.0
    warmup: int = 0
    cooldown: float = 0.0
    anneal: bool = False
    clip: float | None = None
    ema: tuple[float, ...] = (0.9999,)
    ema_warmup: bool = False
    ema_power: tuple[float, ...] = ()
    precision: str = "auto"
    sampler: str = "uniform"
    drop_classes: float = 0.0
    noised: bool = True
    low_res_size: int | None = None
    noise_augmentation: float = 0.0
    random_crop: bool = False
    random_flip: bool = True
    validation: int = 0
    freeze: tuple[str, ...] = ()
    checkpointing: str | int = "none"
    max_skipped: int = 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _check_field(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        config_class = KINDS[self.kind]
        # Not isinstance: the configuration of an upsampler is also that of a UNet.
        if type(self.network) is not config_class:
            raise invalid("network", self.network.kind, f"a network for the kind {self.kind!r}")
        if self.microbatch is not None and self.microbatch > self.batch_size:
            raise invalid("microbatch", self.microbatch, f"at most batch_size={self.batch_size}")
        if self.steps * self.batch_size > 2**32:
            raise invalid("steps", self.steps, f"at most 2^32 images in all, batch_size={self.batch_size}")
        if not self.ema and not self.ema_power:
            raise invalid("ema", self.ema, "at least one average (0 keeps the weights themselves)")
        self._check_kind()

    def _check_kind(self) -> None:
        """Reject settings that only another kind of network has."""
        if (self.low_res_size is None) == (self.kind == "upsampler"):
            allowed = "the side of the small images" if self.kind == "upsampler" else "for an upsampler only"
            raise invalid("low_res_size", self.low_res_size, allowed)
        size = self.network.image_size
        if isinstance(self.network, UNetConfig) and any(size % unit for unit in self.network.side_divisors()):
            raise invalid("image_size", size, f"a multiple of {self.network.side_divisors()[-1]}")
        if self.low_res_size is not None and size % self.low_res_size:
            raise invalid("low_res_size", self.low_res_size, f"a divisor of image_size={size}")
        if self.noise_augmentation and self.kind != "upsampler":
            raise invalid("noise_augmentation", self.noise_augmentation, "for an upsampler only")
        if self.kind == "classifier":
            for name, default in (("drop_classes", 0.0), ("sampler", "uniform"), ("published_sum", False)):
                if getattr(self, name) != default:
                    raise invalid(name, getattr(self, name), "not for a classifier")
        elif not self.noised:
            raise invalid("noised", False, "for a classifier only")
        elif self.process.types[1].learned != (self.network.out_channels == 2 * self.network.in_channels):
            channels = f"{self.network.out_channels} output and {self.network.in_channels} input channels"
            raise invalid("learn_sigma", self.process.types[1].learned, f"must fit a network with {channels}")
        if self.drop_classes and not self.num_image_classes:
            raise invalid("drop_classes", self.drop_classes, "for a network with two classes or more")

    @property
    def num_image_classes(self) -> int | None:
        """Number of classes of the images, without the null class of `drop_classes`; None without classes."""
        if isinstance(self.network, ClassifierConfig):
            return self.network.out_channels
        count = self.network.num_classes  # type: ignore[attr-defined]
        return count - 1 if count is not None and self.drop_classes else count

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0).

        It is lr * min(1, (step + 1) / warmup) * min(1, (steps - step) / (cooldown * steps)). With anneal it
        is also multiplied by (1 - s / steps). There s = max(step - 1, 0), as in the published loop, whose
        first two steps have the full rate; for a classifier s = step, as in its published program.
        """
        rate = self.lr * min(1.0, (step + 1) / max(self.warmup, 1))
        if self.cooldown:
            rate *= min(1.0, (self.steps - step) / max(self.cooldown * self.steps, 1))
        if self.anneal:
            steps_done = step if self.kind == "classifier" else max(step - 1, 0)
            rate *= 1 - steps_done / self.steps
        return rate

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "network": self.network.to_dict(), "process": self.process.to_dict()}

    def to_json(self) -> str:
        """Return `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a dict from `Recipe.to_dict`. Raises InvalidArgument, which names the field."""
    field_names = [field.name for field in dataclasses.fields(Recipe)]
    for name in values:
        if name not in field_names:
            raise invalid("recipe", name, f"no such field; {allowed_names(name, field_names)}")
    for name in ("network", "process"):
        if not isinstance(values.get(name), Mapping):
            raise invalid("recipe", name, "must hold settings by name")
    network, process = config_from_dict(values["network"]), DiffusionConfig.from_flags(**values["process"])
    try:
        return Recipe(**{**values, "network": network, "process": process})
    except TypeError as error:
        raise InvalidArgument(f"recipe: {error}") from None


def recipe_from_json(text: str) -> Recipe:
    """Return the recipe of a text from `Recipe.to_json`. Raises InvalidArgument."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"recipe: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise invalid("recipe", values, "must hold settings by name")
    return recipe_from_dict(values)


_SMALLEST_INTEGERS = {"steps": 1, "batch_size": 1, "warmup": 0, "max_skipped": 0, "validation": 0}
_LARGEST_SHARES = {"cooldown": 1.0, "drop_classes": 1.0}
_BOOLEANS = ("published_sum", "anneal", "ema_warmup", "noised", "random_crop", "random_flip")
_CHOICES = {"kind": tuple(KINDS), "sampler": SAMPLERS, "precision": PRECISIONS}


def _check_field(name: str, value: Any) -> Any:
    """Return the value of a field in its type. Raises InvalidArgument for a wrong type or range."""
    if name in _SMALLEST_INTEGERS:
        return checks.whole_number(name, value, _SMALLEST_INTEGERS[name])
    if name in _LARGEST_SHARES:
        return checks.finite_float(name, value, least=0, most=_LARGEST_SHARES[name])
    if name in _BOOLEANS:
        return checks.boolean(name, value)
    if name in _CHOICES:
        return checks.one_of(name, value, _CHOICES[name])
    if name == "seed":
        return checks.whole_number(name, value, 0, 2**64 - 1)
    if name == "lr":
        return checks.finite_float(name, value, above=0)
    if name in ("weight_decay", "noise_augmentation"):
        return checks.finite_float(name, value, least=0)
    if name in ("microbatch", "low_res_size"):
        return None if value is None else checks.whole_number(name, value, 1)
    if name == "clip":
        return None if value is None else checks.finite_float(name, value, above=0)
    if name == "ema":
        return tuple(checks.finite_float(name, rate, least=0, below=1) for rate in checks.as_list(value))
    if name == "ema_power":
        return tuple(checks.finite_float(name, width, above=0, below=0.28) for width in checks.as_list(value))
    if name == "freeze":
        return tuple(str(pattern) for pattern in checks.as_list(value))
    if name == "checkpointing":
        if isinstance(value, str):
            return checks.one_of(name, value, CHECKPOINTING)
        return checks.whole_number(name, value, 1)
    return value
