"""Recipe of a training run: kind, network, process and every hyper-parameter that can change its result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from admfast import checks
from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument, invalid, nearest
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
    """A training run's settings, as they travel with its folder (`to_dict`, `recipe_from_dict`).

    Attributes:
        kind: "diffusion", "classifier" or "upsampler".
        network: of that kind.
        process: the diffusion process, with the loss it stands for.
        steps: optimiser steps of the whole run.
        batch_size: images a step, over all processes.
        microbatch: images that a process computes at once; None takes its whole share of a batch.
        published_sum: add the microbatches' mean gradients without dividing, as the published loop of
            diffusion models does; else every image weighs the same whatever the microbatch.
        seed: of the weights and of every draw, 0..2^64-1.
        lr: learning rate at its highest. weight_decay: of AdamW.
        warmup: steps over which the rate rises from 0. cooldown: share of the steps, at their end, over which
            it falls to 0. anneal: let it fall to 0 over all steps as published.
        clip: largest norm of the gradient; None leaves it as it is.
        ema: rates of the averages of the weights. ema_warmup: hold a rate down to (1 + step) / (10 + step).
        ema_power: widths, relative to the run, of power-function averages (Karras et al. 2024, eq. 121).
        precision: of the torso: fp32, tf32, bf16, fp16 (with a loss scale), or auto, the device's own.
        sampler: of timesteps, "uniform" or "loss-second-moment".
        drop_classes: share of the images that are shown the null class, the last one of the network.
        noised: show a classifier noised images.
        low_res_size: side of the images that an upsampler enlarges.
        noise_augmentation: largest standard deviation of noise added to these, drawn for each image.
        random_crop, random_flip: of the images.
        validation: images that are kept out of training; their loss is logged at every snapshot.
        freeze: patterns (as of file names) of the parameters that stay as they are.
        checkpointing: what is computed again in the backward pass instead of kept: "none", the "norms" before
            convolutions, the inside of the blocks of "attention", of "all", or k for every k-th.
        max_skipped: steps in a row whose gradient may not be finite before the run stops.
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
            value = _checked(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        wanted = KINDS[self.kind]
        # An upsampler's config is a UNet's too.
        if type(self.network) is not wanted:
            raise invalid("network", self.network.kind, f"a network for the kind {self.kind!r}")
        if self.microbatch is not None and self.microbatch > self.batch_size:
            raise invalid("microbatch", self.microbatch, f"at most batch_size={self.batch_size}")
        if self.steps * self.batch_size > 2**32:
            raise invalid("steps", self.steps, f"at most 2^32 images in all, batch_size={self.batch_size}")
        if not self.ema and not self.ema_power:
            raise invalid("ema", self.ema, "at least one average (0 keeps the weights themselves)")
        self._check_kind()

    def _check_kind(self) -> None:
        """Refuse settings that only another kind has."""
        if (self.low_res_size is None) == (self.kind == "upsampler"):
            allowed = "the side of the small images" if self.kind == "upsampler" else "for an upsampler only"
            raise invalid("low_res_size", self.low_res_size, allowed)
        size = self.network.image_size
        if self.low_res_size is not None and size % self.low_res_size:
            raise invalid("low_res_size", self.low_res_size, f"a divisor of image_size={size}")
        if self.noise_augmentation and self.kind != "upsampler":
            raise invalid("noise_augmentation", self.noise_augmentation, "for an upsampler only")
        if self.kind == "classifier":
            for name, off in (("drop_classes", 0.0), ("sampler", "uniform"), ("published_sum", False)):
                if getattr(self, name) != off:
                    raise invalid(name, getattr(self, name), "not for a classifier")
        elif not self.noised:
            raise invalid("noised", False, "for a classifier only")
        elif self.process.types[1].learned != (self.network.out_channels == 2 * self.network.in_channels):
            given = f"{self.network.out_channels} channels out of {self.network.in_channels}"
            raise invalid("learn_sigma", self.process.types[1].learned, f"as the network has it: {given}")
        if self.drop_classes and not self.classes:
            raise invalid("drop_classes", self.drop_classes, "for a network with two classes or more")

    @property
    def classes(self) -> int | None:
        """Classes that the images have; None without. The null class of `drop_classes` is none of theirs."""
        if isinstance(self.network, ClassifierConfig):
            return self.network.out_channels
        count = self.network.num_classes  # type: ignore[attr-defined]
        return count - 1 if count is not None and self.drop_classes else count

    def rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0).

        lr * min(1, (step + 1) / warmup) * min(1, (steps - step) / (cooldown * steps)); with anneal also
        * (1 - s / steps), where s is the step before, as in the published loop (whose first two steps run at
        the full rate), or for a classifier the step itself, as in its published program.
        """
        rate = self.lr * min(1.0, (step + 1) / max(self.warmup, 1))
        if self.cooldown:
            rate *= min(1.0, (self.steps - step) / max(self.cooldown * self.steps, 1))
        if self.anneal:
            behind = step if self.kind == "classifier" else max(step - 1, 0)
            rate *= 1 - behind / self.steps
        return rate

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "network": self.network.to_dict(), "process": self.process.to_dict()}

    def to_json(self) -> str:
        """Return `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Inverse of `Recipe.to_dict`; raises InvalidArgument that names the field."""
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in values:
        if name not in known:
            raise invalid("recipe", name, f"no such field; {nearest(name, known)}")
    for name in ("network", "process"):
        if not isinstance(values.get(name), Mapping):
            raise invalid("recipe", name, "settings by name")
    network, process = config_from_dict(values["network"]), DiffusionConfig.from_flags(**values["process"])
    try:
        return Recipe(**{**values, "network": network, "process": process})
    except TypeError as error:
        raise InvalidArgument(f"recipe: {error}") from None


def recipe_from_json(text: str) -> Recipe:
    """Inverse of `Recipe.to_json`; raises InvalidArgument."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"recipe: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise invalid("recipe", values, "settings by name")
    return recipe_from_dict(values)


_WHOLE = {"steps": 1, "batch_size": 1, "warmup": 0, "max_skipped": 0, "validation": 0}
_SHARES = {"cooldown": 1.0, "drop_classes": 1.0}
_SWITCHES = ("published_sum", "anneal", "ema_warmup", "noised", "random_crop", "random_flip")
_ONE_OF = {"kind": tuple(KINDS), "sampler": SAMPLERS, "precision": PRECISIONS}


def _checked(name: str, value: Any) -> Any:
    """Return the value of a field in one form; InvalidArgument for a wrong type or range."""
    if name in _WHOLE:
        return checks.whole(name, value, _WHOLE[name])
    if name in _SHARES:
        return checks.real(name, value, least=0, most=_SHARES[name])
    if name in _SWITCHES:
        return checks.switch(name, value)
    if name in _ONE_OF:
        return checks.one_of(name, value, _ONE_OF[name])
    if name == "seed":
        return checks.whole(name, value, 0, 2**64 - 1)
    if name == "lr":
        return checks.real(name, value, above=0)
    if name in ("weight_decay", "noise_augmentation"):
        return checks.real(name, value, least=0)
    if name in ("microbatch", "low_res_size"):
        return None if value is None else checks.whole(name, value, 1)
    if name == "clip":
        return None if value is None else checks.real(name, value, above=0)
    if name == "ema":
        return tuple(checks.real(name, rate, least=0, below=1) for rate in checks.items(value))
    if name == "ema_power":
        return tuple(checks.real(name, width, above=0, below=0.28) for width in checks.items(value))
    if name == "freeze":
        return tuple(str(pattern) for pattern in checks.items(value))
    if name == "checkpointing":
        if isinstance(value, str):
            return checks.one_of(name, value, CHECKPOINTING)
        return checks.whole(name, value, 1)
    return value
