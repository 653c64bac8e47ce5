"""Time the measures of `admfast.evaluation` and the features of Inception, beside a plain network in PyTorch.

    python -m bench.evaluation --out evaluation.json

Weights are random: the time depends only on the layers. Features are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.evaluation import InceptionFeatures, frechet_distance, precision_recall, statistics_of
from admfast.evaluation.inception_layers import BLOCKS, CLASSES, FEATURES, STEM, Branch, Conv
from admfast.evaluation.resize import resize_bilinear
from admfast.host import peak_memory
from bench.results import conditions, environment, markdown_table

ROWS, BATCH, ROUNDS, LIMIT = 10_000, 32, 5, 1e-4


class _Conv(nn.Module):
    """A convolution, its batch norm and ReLU, as the FID port has them."""

    def __init__(self, conv: Conv, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, conv.channels, conv.kernel, conv.stride, conv.padding, bias=False)
        self.bn = nn.BatchNorm2d(conv.channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class PlainInception(nn.Module):
    """The FID Inception with ordinary modules, and the FID port's names."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for conv in STEM:
            if conv is not None:
                self.add_module(conv.name, _Conv(conv, channels))
                channels = conv.channels
        for name, branches in BLOCKS.items():
            block, total = nn.Module(), 0
            for branch in branches:
                width = channels
                for i, conv in enumerate(branch.convs):
                    second = branch.split and i == len(branch.convs) - 1
                    block.add_module(conv.name, _Conv(conv, branch.convs[-3].channels if second else width))
                    width = conv.channels
                total += width * (1 + branch.split)
            self.add_module(name, block)
            channels = total
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features [N, 2048] of images, uint8 [N, H, W, 3]."""
        x = (resize_bilinear(images.movedim(-1, 1), 299, 299) - 128) / 128
        for conv in STEM:
            x = F.max_pool2d(x, 3, 2) if conv is None else getattr(self, conv.name)(x)
        for name, branches in BLOCKS.items():
            block = getattr(self, name)
            x = torch.cat([part for branch in branches for part in self._branch(block, branch, x)], 1)
        return x.mean((2, 3))

    def _branch(self, block: nn.Module, branch: Branch, x: Tensor) -> list[Tensor]:
        if branch.pool == "reduce":
            return [F.max_pool2d(x, 3, 2)]
        if branch.pool == "maximum":
            x = F.max_pool2d(x, 3, 1, 1)
        elif branch.pool == "average":
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        for conv in branch.convs[: len(branch.convs) - 2 * branch.split]:
            x = getattr(block, conv.name)(x)
        return [getattr(block, conv.name)(x) for conv in branch.convs[-2:]] if branch.split else [x]


def seconds(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@torch.no_grad()
def time_inception(rounds: int) -> dict[str, Any]:
    """Return images a second of both networks, timed in turns, and the error of the features."""
    torch.manual_seed(0)
    plain = PlainInception().eval()
    for name, tensor in plain.state_dict().items():
        if name.endswith("conv.weight"):  # so that no layer's outputs fade or are cut off
            nn.init.kaiming_normal_(tensor, nonlinearity="relu")
        elif name.endswith("running_var"):
            tensor.uniform_(0.8, 1.2)
    ours = InceptionFeatures(plain.state_dict())
    images = torch.randint(0, 256, (BATCH, 64, 64, 3), dtype=torch.uint8)
    expected, found = plain(images), ours(images).pooled
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= LIMIT:  # NaN too
        raise SystemExit(f"evaluation: the features differ by {error:.2g}, the limit is {LIMIT:g}")
    runs = {"plain": lambda: plain(images), "admfast": lambda: ours(images)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    plain_rate, rate = (BATCH / float(np.median(times[name])) for name in ("plain", "admfast"))
    rates = {"plain_images_per_second": plain_rate, "images_per_second": rate}
    return {**rates, "inception_ratio": rate / plain_rate, "inception_error": error}


def time_measures(rows: int) -> dict[str, Any]:
    """Return seconds of precision and recall, of statistics and of a Frechet distance, and the peak
    memory."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((rows, FEATURES), dtype=np.float32) for _ in range(2))
    before = peak_memory()
    result = {"precision_recall_s": seconds(lambda: precision_recall(a, b))}
    result["precision_recall_float32_s"] = seconds(lambda: precision_recall(a, b, half=False))
    result["precision_recall_memory"] = peak_memory() - before + a.nbytes + b.nbytes
    result["statistics_s"] = seconds(lambda: statistics_of(a))
    both = statistics_of(a), statistics_of(b)
    return result | {"frechet_distance_s": seconds(lambda: frechet_distance(*both)), "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="feature rows (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of Inception (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (default: none)")
    args = parser.parse_args(argv)
    device = torch.device("cpu")
    numbers = time_measures(args.rows) | time_inception(args.rounds)
    print(markdown_table(("number", "value"), list(numbers.items())))
    if args.out is not None:
        when = {"date": conditions(device)["date"]}
        args.out.write_text(json.dumps({**environment(device), **when, **numbers}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
