"""Measure digits whose deep features are kept for several steps, as DeepCache does (Ma et al. 2023).

    python -m bench.feature_cache

At every `every`-th step the whole network runs. At the others only its first `blocks` input blocks and its
last `blocks` output blocks run, on what the output blocks before them gave at the last whole step.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor, nn

import admfast
from admfast.engine.step import Batch
from admfast.models.layers import call_block, call_head
from admfast.ops.update import Stream, as_seeds, normal
from admfast.sampling.functions import FunctionStep
from admfast.sampling.loop import run_rows
from admfast.solvers import make_solver
from admfast.training.digit_images import MAX_GREY_LEVEL, NUM_CLASSES, block_means, load_digits
from bench.quality import Array, measure
from bench.results import markdown_table

COUNT, BATCH = 1000, 50
# Solver, spacing, steps, blocks that always run (0: all of them), steps between two whole ones.
SETTINGS = (
    ("unipc", "log-snr", 10, 0, 1),
    ("unipc", "log-snr", 20, 0, 1),
    ("unipc", "log-snr", 20, 2, 2),
    ("unipc", "log-snr", 20, 3, 2),
    ("dpmpp:sde=true", None, 10, 0, 1),
    ("dpmpp:sde=true", None, 20, 0, 1),
    ("dpmpp:sde=true", None, 20, 2, 2),
    ("dpmpp:sde=true", None, 20, 3, 2),
)


class CachedNetwork(nn.Module):
    """A UNet of 2-D images whose deep features are kept between whole steps."""

    def __init__(self, net: Any, blocks: int, every: int) -> None:
        super().__init__()
        self.net, self.blocks, self.every, self.step = net, blocks or len(net.input_blocks), every, 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the network's output; the steps of a batch must come in order."""
        net, count = self.net, len(self.net.input_blocks)
        is_whole = self.step % self.every == 0
        self.step += 1
        emb, h, skips = net.embed_conditions(t, y), net.enter_torso(x), []
        for block in net.input_blocks[: count if is_whole else self.blocks]:
            h = call_block(block, h, emb)
            skips.append(h)
        if is_whole:
            h = call_block(net.middle_block, h, emb)
            for block in net.output_blocks[: count - self.blocks]:
                h = call_block(block, h, emb, skips.pop())
            self.deep = h
        h = self.deep
        for block in net.output_blocks[count - self.blocks :]:
            h = call_block(block, h, emb, skips.pop())
        return call_head(net.out, h, x.dtype)


def sample(pipe: admfast.Pipeline, setting: tuple[Any, ...]) -> tuple[Array, float]:
    """Return unguided samples as [COUNT, 64] on the scale 0..16, and the seconds that they took."""
    name, spacing, steps, blocks, every = setting
    solver = make_solver(name)
    table = solver.table(pipe.diffusion.build(solver.respacing_for(steps, spacing)), clip=True)
    shape, found, start = (BATCH, 1, *pipe.spatial), [], time.monotonic()
    for first in range(0, COUNT, BATCH):
        seeds = as_seeds(range(first, first + BATCH))
        labels = seeds % NUM_CLASSES
        net = CachedNetwork(pipe.net, blocks, every)
        x = normal(seeds, shape[1:], 0, Stream.X_T) * table.noise_scale
        batch = Batch(table=table, shape=shape, seeds=seeds)
        found.append(run_rows(table, FunctionStep(batch, partial(net, y=labels), x)).x)
    levels = (torch.cat(found).clamp(-1, 1) + 1) * (MAX_GREY_LEVEL / 2)
    return block_means(levels).flatten(1).double().numpy(), time.monotonic() - start


def main() -> None:
    """Print a table of the settings."""
    torch.set_num_threads(1)
    pipe = admfast.load("digits32", device="cpu", precision="fp32")
    digits, labels = load_digits()
    real, classes = digits.flatten(1).double().numpy(), labels.numpy()
    classifier = SVC(gamma=0.001).fit(real, classes)
    real_subset = real[np.random.default_rng(0).permutation(len(real))[:COUNT]]
    rows = []
    for setting in SETTINGS:
        samples, seconds = sample(pipe, setting)
        quality = measure(samples, np.arange(COUNT) % NUM_CLASSES, real, classifier, real_subset)
        rows.append((*setting, quality.frechet, quality.nearest_neighbour, quality.recall, seconds))
        print(f"{setting}: {seconds:.0f} s", flush=True)
    heads = ("solver", "spacing", "steps", "blocks", "every", "frechet", "1-NN", "recall", "seconds")
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    main()
