"""The handwritten digits as 32x32 training images, and the three networks that ship trained on them.

`python -m admfast.training.digits {diffusion,classifier,upsampler} --out DIR` trains one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.checkpoints import write_weights
from admfast.diffusion import DiffusionConfig, GaussianDiffusion, training_losses
from admfast.errors import AdmfastError, invalid
from admfast.models import (
    NetConfig,
    build,
    classifier_config_from_flags,
    unet_config_from_flags,
    upsampler_config_from_flags,
)
from admfast.models.description import Description
from admfast.training.digit_images import CLASSES, LEVELS, block_means, enlarge, load_digits
from admfast.training.loop import Batch, TrainConfig, train

DIFFUSION = DiffusionConfig(noise_schedule="linear", steps=1000, learn_sigma=True)


def to_model_range(levels: Tensor) -> Tensor:
    """Map levels 0..16 to -1..1."""
    return levels * (2 / LEVELS) - 1


@dataclass(frozen=True)
class Recipe:
    """A network on the digits: its configuration, its training and its loss."""

    net: NetConfig
    training: TrainConfig
    loss: Callable[[nn.Module, GaussianDiffusion, Batch], dict[str, Tensor]]


def denoising_loss(net: nn.Module, diffusion: GaussianDiffusion, batch: Batch) -> dict[str, Tensor]:
    """The published hybrid loss (Nichol & Dhariwal 2021, eq. 16) of the class-conditional network."""
    return training_losses(diffusion, net, batch.images, batch.t, batch.noise, {"y": batch.labels})


def upsampling_loss(net: nn.Module, diffusion: GaussianDiffusion, batch: Batch) -> dict[str, Tensor]:
    """The same loss with the 8x8 image as condition."""
    condition = {"y": batch.labels, "low_res": block_means(batch.images)}
    return training_losses(diffusion, net, batch.images, batch.t, batch.noise, condition)


def classification_loss(net: nn.Module, diffusion: GaussianDiffusion, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of the class of a noisy image, and the share of right answers."""
    logits = net(diffusion.q_sample(batch.images, batch.t, batch.noise), diffusion.model_t(batch.t))
    right = (logits.argmax(dim=1) == batch.labels).float()
    return {"loss": F.cross_entropy(logits, batch.labels, reduction="none"), "accuracy": right}


_UNET: dict[str, Any] = dict(
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    num_head_channels=32,
    learn_sigma=True,
    class_cond=True,
    num_classes=CLASSES,
    use_scale_shift_norm=True,
    resblock_updown=True,
    use_new_attention_order=True,
)
_DIFFUSION = unet_config_from_flags(
    image_size=32, channel_mult=(1, 1, 3), attention_resolutions="8", dropout=0.1, **_UNET
)
_UPSAMPLER = upsampler_config_from_flags(
    large_size=32, small_size=8, channel_mult=(1, 1), attention_resolutions="", **_UNET
)
_CLASSIFIER = classifier_config_from_flags(
    image_size=32,
    in_channels=1,
    num_classes=CLASSES,
    classifier_width=32,
    classifier_depth=1,
    classifier_attention_resolutions="8",
    channel_mult=(1, 1, 2),
    num_head_channels=32,
    dropout=0.1,
)

RECIPES: dict[str, Recipe] = {
    "diffusion": Recipe(
        _DIFFUSION,
        TrainConfig(steps=8000, batch_size=32, lr=6e-4, ema_decay=0.9995, seed=0),
        denoising_loss,
    ),
    "classifier": Recipe(
        _CLASSIFIER,
        TrainConfig(steps=2000, batch_size=64, lr=6e-4, weight_decay=0.05, ema_decay=0.995, seed=1),
        classification_loss,
    ),
    "upsampler": Recipe(
        _UPSAMPLER,
        TrainConfig(steps=2500, batch_size=32, lr=8e-4, ema_decay=0.998, seed=2),
        upsampling_loss,
    ),
}


def batches(diffusion: GaussianDiffusion, config: TrainConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches of digits with uniform timesteps and Gaussian noise, all drawn from `generator`."""
    digits, labels = load_digits()
    images = to_model_range(enlarge(digits))
    if config.batch_size > len(images):
        raise invalid("batch_size", config.batch_size, f"at most the {len(images)} digits")
    while True:
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(config.batch_size)[: len(images) // config.batch_size]:
            x = images[chosen]
            t = torch.randint(diffusion.num_timesteps, (len(chosen),), generator=generator)
            yield Batch(x, labels[chosen], t, torch.randn(x.shape, generator=generator))


def export(network: str, ema: nn.Module, config: TrainConfig, step: int, path: Path) -> None:
    """Write averaged weights as float16 safetensors with the description that `admfast.load` reads."""
    recipe = RECIPES[network]
    facts = {
        "data": "load_digits of scikit-learn (1797 images), enlarged to 32x32 by enlarge()",
        "command": f"python -m admfast.training.digits {network} --out DIR",
        "steps": step,
        **{name: value for name, value in dataclasses.asdict(config).items() if name != "steps"},
    }
    process = None if network == "classifier" else DIFFUSION
    write_weights(path, ema.state_dict(), Description(recipe.net, process, facts), torch.float16)


def main(argv: Sequence[str] | None = None) -> int:
    """Train one of the digits networks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m admfast.training.digits", description=__doc__)
    parser.add_argument("network", choices=sorted(RECIPES))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights, state and log; resumed from"
    )
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: the recipe's)")
    args = parser.parse_args(argv)
    recipe = RECIPES[args.network]
    try:
        more = {} if args.steps is None else {"steps": args.steps}
        config = dataclasses.replace(recipe.training, **more)
        diffusion = DIFFUSION.build()
        torch.manual_seed(config.seed)
        net = build(recipe.net).train()
        ema = train(
            net,
            lambda batch: recipe.loss(net, diffusion, batch),
            lambda generator: batches(diffusion, config, generator),
            config,
            args.out,
        )
        path = args.out / f"{args.network}.safetensors"
        export(args.network, ema, config, config.steps, path)
        print(path.resolve())
    except AdmfastError as error:
        print(f"admfast: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
