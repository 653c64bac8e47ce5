"""Make a training batch from samples and draws, and compute the loss of the three kinds of network on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.diffusion import GaussianDiffusion, training_losses
from admfast.errors import invalid
from admfast.models import UNetConfig
from admfast.training.draws import TrainStream, draw_normals, draw_uniforms
from admfast.training.recipe import Recipe
from admfast.training.timesteps import UniformSampler


@dataclass(frozen=True)
class Batch:
    """Samples and the random draws that belong to them.

    Attributes:
        sample_ids: number of every sample in the run.
        images: float32 [N, C, H, W] in -1..1.
        t: timesteps, int64 [N]. noise: like the images.
        weights: factors of the losses, float32 [N]; ones if timesteps are drawn uniformly.
        labels: classes, int64 [N]; None for a network without classes.
        low_res: small images [N, C, h, w] for an upsampler; None for other networks.
    """

    sample_ids: tuple[int, ...]
    images: Tensor
    t: Tensor
    noise: Tensor
    weights: Tensor
    labels: Tensor | None = None
    low_res: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def split(self, size: int) -> list[Batch]:
        """Return the batch in parts of `size` samples; the last part may be smaller."""
        parts = []
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            parts.append(
                Batch(self.sample_ids[part], *(None if v is None else v[part] for v in self._values()))  # type: ignore[arg-type]
            )
        return parts

    def _values(self) -> tuple[Tensor | None, ...]:
        return self.images, self.t, self.noise, self.weights, self.labels, self.low_res


def make_batch(
    recipe: Recipe,
    sampler: UniformSampler,
    sample_ids: Sequence[int],
    images: Tensor,
    labels: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """Return the batch of some samples: their images with timesteps, noise and all other random draws.

    recipe: recipe of the run. sampler: draws the timesteps. sample_ids: numbers of the samples in the run.
    images: uint8 [N, C, H, W]. labels: int64 [N]; required if the network has classes.
    Raises: InvalidArgument if labels are missing.
    """
    seed, sample_ids = recipe.seed, tuple(sample_ids)
    x = images.to(device).float() / 127.5 - 1
    t, weights = sampler.choose(draw_uniforms(seed, sample_ids, TrainStream.TIMESTEP))
    if recipe.kind == "classifier" and not recipe.noised:
        t = torch.zeros_like(t)
    noise = draw_normals(seed, sample_ids, tuple(x.shape[1:]), TrainStream.NOISE, device)
    classes = (
        None
        if recipe.num_image_classes is None
        else _labels_with_null_class(recipe, sample_ids, labels).to(device)
    )
    low_res = (
        None if recipe.low_res_size is None else _low_res_images(recipe, recipe.low_res_size, sample_ids, x)
    )
    return Batch(
        sample_ids,
        _channels_last(x),
        t.to(device),
        _channels_last(noise),
        weights.to(device),
        classes,
        low_res,
    )


def _channels_last(x: Tensor) -> Tensor:
    """Return images in channels-last layout, in which convolutions and norms run fastest."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _labels_with_null_class(recipe: Recipe, sample_ids: Sequence[int], labels: Tensor | None) -> Tensor:
    """Return the classes, some of them replaced by the null class, which is the network's last."""
    if labels is None:
        raise invalid("labels", None, "classes of the images: the network has classes")
    if not recipe.drop_classes:
        return labels
    assert isinstance(recipe.network, UNetConfig) and recipe.network.num_classes is not None
    dropped = draw_uniforms(recipe.seed, sample_ids, TrainStream.CLASS) < recipe.drop_classes
    return torch.where(dropped, recipe.network.num_classes - 1, labels)


def _low_res_images(recipe: Recipe, side: int, sample_ids: Sequence[int], x: Tensor) -> Tensor:
    """Return the small images for an upsampler: means over blocks, as published, with the recipe's noise."""
    small = F.interpolate(x, (side,) * (x.dim() - 2), mode="area")
    if not recipe.noise_augmentation:
        return small
    strength = (
        draw_uniforms(recipe.seed, sample_ids, TrainStream.LOW_RES_STRENGTH) * recipe.noise_augmentation
    )
    noise = draw_normals(recipe.seed, sample_ids, tuple(small.shape[1:]), TrainStream.LOW_RES_NOISE, x.device)
    return small + strength.to(x.device).float().view(-1, *(1,) * (x.dim() - 1)) * noise


def loss_terms(net: nn.Module, recipe: Recipe, process: GaussianDiffusion, batch: Batch) -> dict[str, Tensor]:
    """Return the loss of every sample and its terms, [N] each, not yet multiplied by `batch.weights`.

    Diffusion model, upsampler: `training_losses` of the process. Classifier: cross-entropy of the class of
    the noised image (of the clean image if the recipe has noised=False), and whether the true class has the
    largest logit ("acc@1") or one of the five largest ("acc@5").
    Source: the published `image_train`, `super_res_train` and `classifier_train`.

    process: `recipe.process.build()`. Differentiable in the network's parameters.
    """
    if recipe.kind != "classifier":
        conditions = {"y": batch.labels, "low_res": batch.low_res}
        model_kwargs = {name: value for name, value in conditions.items() if value is not None}
        return training_losses(process, net, batch.images, batch.t, batch.noise, model_kwargs)
    x = process.q_sample(batch.images, batch.t, batch.noise) if recipe.noised else batch.images
    logits = net(x, process.model_t(batch.t)).float()
    if batch.labels is None:
        raise invalid("labels", None, "classes of the images: a classifier learns them")
    best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
    return {
        "loss": F.cross_entropy(logits, batch.labels, reduction="none"),
        "acc@1": best[:, 0].float(),
        "acc@5": best.any(dim=1).float(),
    }
