"""Presets of recipes: those of the released networks and of the digits networks that ship with the package.

Networks and processes are those of `admfast.models.presets`. The batch size, learning rate and steps of the
released networks are from tables 11 to 14 of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal and
Nichol 2021). Settings that are not in these tables (annealing, crops, weight decay) are the defaults of the
published training programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from admfast import checks
from admfast.checkpoints.flags_to_options import OPTION_OF_FLAG
from admfast.diffusion import DiffusionConfig
from admfast.diffusion.config import SETTINGS
from admfast.errors import allowed_names, invalid
from admfast.models import ClassifierConfig, NetConfig, UNetConfig, UpsamplerConfig
from admfast.models.presets import preset as model_preset
from admfast.training.recipe import KINDS, Recipe

_NOISE_OF_CLASSIFIERS = DiffusionConfig(noise_schedule="linear", steps=1000)

# Kind -> name of the preset -> name of the network, and settings that differ from the kind's common ones.
_PUBLISHED: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "diffusion": {
        "imagenet64": ("64x64_diffusion", {"steps": 540_000, "batch_size": 2048, "lr": 3e-4}),
        "imagenet128": ("128x128_diffusion", {"steps": 4_360_000}),
        "imagenet256": ("256x256_diffusion", {"steps": 1_980_000}),
        "imagenet512": ("512x512_diffusion", {"steps": 1_940_000}),
        "lsun-bedroom": ("lsun_bedroom", {"steps": 500_000}),
        "lsun-cat": ("lsun_cat", {"steps": 200_000}),
        "lsun-horse": ("lsun_horse", {"steps": 250_000}),
    },
    "upsampler": {
        "imagenet256": ("64_256_upsampler", {"steps": 500_000}),
        "imagenet512": ("128_512_upsampler", {"steps": 1_050_000}),
    },
    "classifier": {
        "imagenet64": ("64x64_classifier", {"batch_size": 1024, "lr": 6e-4, "process": "cosine"}),
        "imagenet128": ("128x128_classifier", {}),
        "imagenet256": ("256x256_classifier", {"steps": 500_000}),
        "imagenet512": ("512x512_classifier", {"steps": 500_000}),
    },
}
_COMMON: dict[str, dict[str, Any]] = {
    "diffusion": {"batch_size": 256, "lr": 1e-4},
    "upsampler": {"batch_size": 256, "lr": 1e-4},
    # The published program for classifiers crops at random and anneals the learning rate.
    "classifier": {"steps": 300_000, "batch_size": 256, "lr": 3e-4, "weight_decay": 0.05, "anneal": True,
                   "random_crop": True},
}  # fmt: skip
# A mirrored digit is not a digit any more.
_DIGITS_COMMON: dict[str, Any] = {
    "warmup": 200, "cooldown": 0.3, "clip": 1.0, "ema_warmup": True, "random_flip": False,
}  # fmt: skip
_DIGITS_BY_KIND: dict[str, dict[str, Any]] = {
    "diffusion": {"steps": 8000, "batch_size": 32, "lr": 6e-4, "ema": (0.9995,), "seed": 0},
    "classifier": {"steps": 2000, "batch_size": 64, "lr": 6e-4, "weight_decay": 0.05, "ema": (0.995,),
                   "seed": 1},
    "upsampler": {"steps": 2500, "batch_size": 32, "lr": 8e-4, "ema": (0.998,), "seed": 2},
}  # fmt: skip
# Published name of a setting -> its name here.
_NAME_HERE_OF_PUBLISHED = {
    **{flag: name for flag, name in OPTION_OF_FLAG.items() if name != "steps"},
    "classifier_attention_resolutions": "attention_resolutions, as downsampling factors",
    "classifier_use_fp16": "precision=fp16", "use_fp16": "precision=fp16", "class_cond": "num_classes",
    "small_size": "low_res_size", "anneal_lr": "anneal", "lr_anneal_steps": "steps, with anneal",
    "iterations": "steps", "ema_rate": "ema", "schedule_sampler": "sampler",
    "data_dir": "--data", "resume_checkpoint": "--from", "save_interval": "--save-every",
    "log_interval": "--log-every",
}  # fmt: skip
DIGITS = "digits32"
PRESETS = {kind: (*_PUBLISHED[kind], DIGITS) for kind in KINDS}


def recipe_from_preset(kind: str, preset: str = DIGITS, **changes: Any) -> Recipe:
    """Return the recipe of a preset (`PRESETS` lists them by kind) with changes.

    changes: fields of `Recipe`, of its network and of its process. `steps` are those of the run,
    `diffusion_steps` those of the process. `num_classes` is the number of classes of the images, also for a
    classifier. With `drop_classes` the network gets one more class, the null class.
    Raises: InvalidArgument.
    """
    checks.one_of("kind", kind, KINDS)
    if preset not in PRESETS[kind]:
        hint = describe_name(str(preset))
        allowed = allowed_names(preset, PRESETS[kind])
        raise invalid("preset", preset, allowed if hint is None else f"{allowed}; {hint}")
    model = model_preset(_model_name(kind, preset))
    if preset == DIGITS:
        settings: dict[str, Any] = {**_DIGITS_COMMON, **_DIGITS_BY_KIND[kind]}
        network, process = model.description.network, model.description.diffusion
    else:
        settings = {**_COMMON[kind], **_PUBLISHED[kind][preset][1]}
        network, process = model.config, model.diffusion
    schedule = settings.pop("process", None)
    process = process or dataclasses.replace(_NOISE_OF_CLASSIFIERS, noise_schedule=schedule or "linear")
    settings |= {"kind": kind, "network": network, "process": process, "low_res_size": model.low_res_size}
    return change_recipe(Recipe(**settings), changes)


def _model_name(kind: str, preset: str) -> str:
    """Return the name of the model that a preset trains."""
    return f"{DIGITS}_{kind}" if preset == DIGITS else _PUBLISHED[kind][preset][0]


def describe_name(name: str) -> str | None:
    """Say whether a name is a preset or a model, and which option takes it; None if it is neither."""
    kinds = [kind for kind in KINDS if name in PRESETS[kind]]
    if kinds:
        commands = ", ".join(f"`admfast train {kind} --preset {name}`" for kind in kinds)
        return f"{name} is the name of a preset: {commands}"
    model = name.removesuffix(".pt")
    for kind in KINDS:
        for preset in PRESETS[kind]:
            if model != _model_name(kind, preset):
                continue
            text = f"{name} is the name of a model: `admfast train {kind} --preset {preset}` trains it anew"
            # The digits' networks ship with the package; released weights are downloaded.
            fetch = f"`admfast fetch {model}` downloads its weights for --from"
            return text if preset == DIGITS else f"{text}, {fetch}"
    return None


def change_recipe(base: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with changes, given as for `recipe_from_preset`. Raises InvalidArgument."""
    parts = split_options(base.kind, changes)
    network = _change_network(base.network, dict(parts["network"]))
    dropping = parts["recipe"].get("drop_classes", base.drop_classes)
    if dropping and ("num_classes" in changes or not base.drop_classes):
        network = _with_null_class(network)
    process = DiffusionConfig.from_flags(**{**base.process.to_dict(), **parts["process"]})
    return dataclasses.replace(base, network=network, process=process, **parts["recipe"])


def split_options(kind: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return options by part: those of "recipe", "network" and "process". Raises InvalidArgument."""
    names = {
        "recipe": {field.name for field in dataclasses.fields(Recipe)} - {"kind", "network", "process"},
        "network": {field.name for field in dataclasses.fields(KINDS[kind])} | {"num_classes"},
        "process": set(SETTINGS),
    }
    parts: dict[str, dict[str, Any]] = {part: {} for part in names}
    for name, value in options.items():
        # "steps" are those of the run; those of the process have their published name, diffusion_steps.
        if name == "diffusion_steps":
            parts["process"]["steps"] = value
            continue
        part = next((part for part, field_names in names.items() if name in field_names), None)
        if part is None:
            hint = allowed_names(name, sorted(set().union(*names.values())))
            if name in _NAME_HERE_OF_PUBLISHED:
                hint = f"here {_NAME_HERE_OF_PUBLISHED[name]}"
            raise invalid(name, value, f"no such setting of a {kind} run; {hint}")
        parts[part][name] = value
    return parts


def _change_network(network: NetConfig, options: dict[str, Any]) -> NetConfig:
    """Return a network with changed fields; the classes of a classifier are its output channels."""
    if isinstance(network, ClassifierConfig) and "num_classes" in options:
        options["out_channels"] = options.pop("num_classes")
    if isinstance(network, UNetConfig) and "in_channels" in options:
        options.setdefault("out_channels", options["in_channels"] * (2 if network.learn_sigma else 1))
    return dataclasses.replace(network, **options)


def _with_null_class(network: NetConfig) -> NetConfig:
    """Return a network with one more class."""
    if not isinstance(network, UNetConfig | UpsamplerConfig) or network.num_classes is None:
        raise invalid("drop_classes", "given", "for a network with classes")
    return dataclasses.replace(network, num_classes=network.num_classes + 1)
