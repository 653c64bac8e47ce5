"""Report on a run: rows of the log, TensorBoard, and grids of samples from the average."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.engine.numerics import peak_memory
from admfast.engine.precision import policy
from admfast.files.atomic import output_error
from admfast.files.images import write_grid
from admfast.models import UNetConfig, build
from admfast.sampling.pipeline import Pipeline
from admfast.training.learner import Learner, Report
from admfast.training.samples import Samples

QUARTERS = 4
EVALUATION = "evaluation/"  # begins the names of an evaluation's measures in the log
GRID_IMAGES, GRID_STEPS = 16, 50
Row = dict[str, float | int]


class Progress:
    """Collector of the reports of steps, which makes rows of means over all processes."""

    def __init__(self, learner: Learner) -> None:
        self._learner, self._reports = learner, list[Report]()
        self._started, self._first = time.perf_counter(), learner.step

    def add(self, report: Report) -> None:
        """Add the report of a step, without reading from the device."""
        self._reports.append(report)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out of the rate: it samples or evaluates and trains nothing."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - started

    def row(self) -> Row | None:
        """Return a row for the steps since the last row, None if there were none; reads from the device.

        It holds the loss and its terms, means over samples before weighting; loss_q1 to loss_q4, the loss of
        the samples in each quarter of the timesteps; the norms of the gradient (mean) and of the parameters;
        the learning rate; with fp16 the loss scale; the number of skipped steps so far; images per second,
        peak memory in bytes, and the seconds that are left.
        """
        learner, recipe = self._learner, self._learner.recipe
        steps = len(self._reports)
        if not steps:
            return None
        row: Row = {"step": learner.step, "images": learner.step * recipe.batch_size, **self._means()}
        row["grad_norm"] = float(torch.stack([report.grad_norm for report in self._reports]).mean())
        row["param_norm"] = float(learner.parameter_norm())
        row["lr"] = self._reports[-1].learning_rate
        if learner.log2_scale is not None:
            row["loss_scale"] = float(learner.log2_scale.exp2())
        row["skipped"] = int(learner.skipped)
        now = time.perf_counter()
        per_step = (now - self._started) / steps
        row["images_per_second"] = recipe.batch_size / per_step
        row["memory"] = peak_memory(learner.world.device)
        row["seconds_left"] = per_step * max(recipe.steps - learner.step, 0)
        self._reports.clear()
        self._started = now
        return row

    def _means(self) -> dict[str, float]:
        """Return the mean of every term, and of the loss by quarter of the timesteps, over all processes."""
        values = {
            name: torch.cat([report.terms[name].double() for report in self._reports])
            for name in self._reports[0].terms
        }
        t = torch.cat([report.t for report in self._reports])
        all_samples = torch.ones_like(values["loss"])
        values_and_masks = {name: (value, all_samples) for name, value in values.items()}
        if self._learner.recipe.noised:
            quarter = t * QUARTERS // self._learner.process.num_timesteps
            for number in range(QUARTERS):
                in_quarter = (quarter == number).double()
                # `where` instead of a product, which would spread a NaN to the other quarters.
                values_and_masks[f"loss_q{number + 1}"] = (
                    values["loss"].where(in_quarter > 0, 0.0),
                    in_quarter,
                )
        sums = torch.stack(
            [torch.stack([value.sum(), count.sum()]) for value, count in values_and_masks.values()]
        )
        sums_and_counts = self._learner.world.all_reduce_sum(sums).tolist()
        return {
            name: total / count
            for name, (total, count) in zip(values_and_masks, sums_and_counts, strict=True)
            if count
        }


def format_row(row: Row, steps: int) -> str:
    """Return a row as one readable line."""
    terms = [name for name in ("loss", "mse", "vb", "acc@1") if name in row]
    shown = ", ".join(f"{name} {row[name]:.4f}" for name in terms)
    minutes, seconds = divmod(round(row["seconds_left"]), 60)
    left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
    return f"step {row['step']} of {steps}: {shown}, {row['images_per_second']:.1f} images/s, {left}"


class TensorBoard:
    """TensorBoard log of a run; it does nothing if tensorboard isn't installed.

    step: number of steps made. Rows of later steps, from before the run was killed, are hidden.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        try:
            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise output_error(run / "tensorboard", error) from error

    def add(self, row: Row) -> None:
        """Write a row's numbers."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def average_net(learner: Learner) -> nn.Module:
    """Return a copy of the network in evaluation mode, with the first average of a run as its weights."""
    with torch.device("meta"):
        net = build(learner.recipe.network)
    weights = learner.averages.weights()
    state = {key: weights.get(key, value) for key, value in learner.net.state_dict().items()}
    net.load_state_dict({key: value.detach().clone() for key, value in state.items()}, assign=True)
    return net.eval().requires_grad_(False)


def average_pipeline(learner: Learner) -> Pipeline:
    """Return the pipeline of the first average of a run, for a diffusion model or an upsampler."""
    recipe = learner.recipe
    return Pipeline(
        "average", average_net(learner), recipe.process,
        policy=policy(recipe.precision, learner.world.device), low_res_size=recipe.low_res_size,
    )  # fmt: skip


def write_sample_grid(path: Path, learner: Learner, samples: Samples) -> None:
    """Sample from the first average with fixed seeds and write the images as a grid.

    Raises: OutputError.
    """
    recipe = learner.recipe
    assert isinstance(recipe.network, UNetConfig)
    pipe = average_pipeline(learner)
    count = GRID_IMAGES
    classes = (
        None if recipe.num_image_classes is None else [i % recipe.num_image_classes for i in range(count)]
    )
    low_res = None
    if recipe.low_res_size is not None:
        low_res = small_images(samples, range(count), recipe.low_res_size).to(learner.world.device)
    if low_res is not None and classes is not None:
        labels = [samples.at(k)[1] for k in range(count)]
        classes = [0 if label is None else label for label in labels]
    steps = min(GRID_STEPS, learner.process.num_timesteps)
    images = pipe.sample(classes=classes, seeds=range(count), steps=steps, low_res=low_res)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from None
    write_grid(path, images.cpu().numpy(), classes)


def small_images(samples: Samples, indices: range, size: int) -> Tensor:
    """Return samples of the run, reduced to the small images [N, C, size, size] that an upsampler takes."""
    x = torch.stack([samples.at(k)[0] for k in indices]).float() / 127.5 - 1
    return F.interpolate(x, (size, size), mode="area")
