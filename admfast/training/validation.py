"""Hold images out of the training of a run, and compute the loss of its average on them.

    the N images        the first N in a random order, which is drawn as an epoch's, with the stream HELD_OUT
    draws of image i    those of sample 2^32 - N + i, which are the last numbers that training can reach

So the loss is that of the same images, timesteps and noise at every snapshot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from admfast.errors import invalid
from admfast.files.images import Picture
from admfast.files.sources import Source
from admfast.training.learner import Learner
from admfast.training.loss import loss_terms, make_batch
from admfast.training.network import set_precision
from admfast.training.progress import average_net
from admfast.training.samples import DataStream, Samples, permutation
from admfast.training.timesteps import UniformSampler


class SubsetSource:
    """Source with the images of another source that have these indices."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self._indices = source, tuple(indices)
        labels = source.labels
        self.labels = None if labels is None else tuple(labels[index] for index in self._indices)
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def identity(self) -> str:
        digest = hashlib.sha256(repr(self._indices).encode()).hexdigest()
        return f"{self._source.identity()} part {digest}"

    def decode(self, index: int) -> Picture:
        return self._source.decode(self._indices[index])


def split_source(source: Source, seed: int, count: int) -> tuple[Source, Source]:
    """Return the source of the training images, in their order, and that of `count` held-out images.

    Raises: InvalidArgument if no image would be left to train on.
    """
    if not count:
        return source, SubsetSource(source, ())
    if count >= len(source):
        raise invalid("validation", count, f"fewer than the {len(source)} images")
    order = permutation(len(source), seed, 0, DataStream.HELD_OUT).tolist()
    return SubsetSource(source, sorted(order[count:])), SubsetSource(source, order[:count])


@torch.no_grad()
def validation_losses(learner: Learner, samples: Samples) -> dict[str, float]:
    """Return the mean loss of the first average of the weights on all samples, and the means of its terms.

    They are named validation_loss and so on. Dropout is off, and timesteps are drawn uniformly. Reads from
    the device.

    samples: those of the held-out images.
    """
    recipe, device = learner.recipe, learner.world.device
    sampler, count = UniformSampler(learner.process.num_timesteps), len(samples.source)
    net = average_net(learner)
    set_precision(net, recipe.precision)
    size = recipe.microbatch or recipe.batch_size
    sums: dict[str, float] = {}
    for first in range(0, count, size):
        indices = range(first, min(first + size, count))
        images, labels = zip(*map(samples.at, indices), strict=True)
        label_tensor = None if labels[0] is None else torch.tensor(labels, device="cpu")
        sample_ids = [2**32 - count + index for index in indices]
        batch = make_batch(recipe, sampler, sample_ids, torch.stack(images), label_tensor, device)
        for name, values in loss_terms(net, recipe, learner.process, batch).items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    return {f"validation_{name}": total / count for name, total in sums.items()}
