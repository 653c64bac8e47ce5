"""Train in the folder of a run, with snapshots, a log, grids of samples, and signals that end the run.

    images of step s     samples s * B .. s * B + B - 1 of the run, a part of them for every process
    position of a run    the number of steps made: the seed and it determine all samples and draws

So a run that was killed and continues from its newest snapshot makes the same steps as one that was not.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Self

import torch

from admfast import checks
from admfast.checkpoints.snapshots import SnapshotWriter
from admfast.distributed import World
from admfast.engine.numerics import fixed_numerics, peak_memory
from admfast.errors import AdmfastError, NonFiniteError, invalid
from admfast.files.sources import Source
from admfast.interrupts import ENDING_SIGNALS
from admfast.sampling.pipeline import Pipeline
from admfast.training import folder
from admfast.training.cache import cache_samples
from admfast.training.folder import Say
from admfast.training.images import check_classes
from admfast.training.learner import Learner
from admfast.training.loss import Batch, make_batch
from admfast.training.network import build_network, resolve_precision
from admfast.training.progress import (
    EVALUATION,
    Progress,
    TensorBoard,
    average_pipeline,
    format_row,
    write_sample_grid,
)
from admfast.training.recipe import Recipe
from admfast.training.samples import ImageBatch, Samples, iterate_batches
from admfast.training.validation import split_source, validation_losses

Evaluate = Callable[[Pipeline], Mapping[str, float]]  # measures of a pipeline by name


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Settings of a run that change no result: how often it writes files, and how it loads images.

    Attributes:
        save_every, log_every, grid_every, evaluate_every: steps between snapshots, rows of the log, grids of
            samples, and evaluations (see `train`); grid_every=0 makes no grids, evaluate_every=0 evaluates
            never.
        keep: number of snapshots to keep.
        workers: processes that make samples, for each process of the run; 0 makes them in the process itself.
        cache: where decoded images are cached: "memory", a folder, or None for no cache.
        async_save: copy the state into host memory, and write the snapshot during the next steps; None does
            this only on a GPU.
    """

    save_every: int = 1000
    log_every: int = 100
    grid_every: int = 0
    evaluate_every: int = 0
    keep: int = 3
    workers: int = 0
    cache: str | None = None
    async_save: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("save_every", 1),
            ("log_every", 1),
            ("grid_every", 0),
            ("evaluate_every", 0),
            ("keep", 1),
            ("workers", 0),
        ):
            checks.whole_number(name, getattr(self, name), least)


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`: the number of steps made, and the signal that ended the run early, if one did."""

    step: int
    signal: int | None = None


class SignalRecorder:
    """Context that records SIGINT, SIGTERM and SIGHUP, so that the loop can save and end.

    A second signal is handled as before the block. A signal that is ignored (as under nohup) stays ignored.

    Attributes: received: number of the signal that was received, 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._old_handlers: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # handlers can be set only there
            for number in ENDING_SIGNALS:
                # None means a handler that was not set from Python; it could not be restored.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._old_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        while self._old_handlers:
            signal.signal(*self._old_handlers.popitem())  # type: ignore[arg-type]

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self.__exit__()
            signal.raise_signal(number)
        self.received = number


def build_samples(
    recipe: Recipe, source: Source, cache: str | None = None, held_out: bool = False
) -> Samples:
    """Return the samples of a run. held_out: return those of its validation images instead.

    cache: see `LoopOptions`.
    Raises: InvalidArgument if the classes don't fit the network, or too many images are held out.
    """
    check_classes(source, recipe.num_image_classes)
    source = split_source(source, recipe.seed, recipe.validation)[held_out]
    network = recipe.network
    samples = Samples(
        source, recipe.seed, network.image_size, network.in_channels, recipe.random_crop, recipe.random_flip
    )
    if cache is None:
        return samples
    return cache_samples(samples, None if cache == "memory" else cache)


def local_sample_ids(recipe: Recipe, world: World, step: int) -> Iterator[range]:
    """Yield the numbers of this process's samples in each step, from `step` to the run's last."""
    own_part = world.local_samples(recipe.batch_size)
    for first in range(step * recipe.batch_size, recipe.steps * recipe.batch_size, recipe.batch_size):
        yield range(first + own_part.start, first + own_part.stop)


def train(
    recipe: Recipe,
    source: Source,
    out: str | PathLike[str],
    loop_options: LoopOptions | None = None,
    world: World | None = None,
    initial_weights: str | PathLike[str] | None = None,
    say: Say = print,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Train in the folder `out` up to the recipe's last step, from its newest snapshot if there is one.

    initial_weights: weights file whose values a new run starts with; ignored if the run has a snapshot.
    say: called with each message. evaluate: called in every process, every `evaluate_every` steps and after
    the last, with the pipeline of the first average; the log gets a row with the measures that it returns.
    Raises: InvalidArgument if the recipe isn't that of the folder; CheckpointError if no snapshot is intact;
    OutputError if something can't be written (older snapshots are kept); NonFiniteError if too many steps in
    a row had no finite gradient; BrokenImage if too many images are broken.
    """
    run, loop_options, world = Path(out), loop_options or LoopOptions(), world or World()
    say = say if world.is_first else _print_nothing
    samples = build_samples(recipe, source, loop_options.cache)
    validation = (
        build_samples(recipe, source, loop_options.cache, held_out=True) if recipe.validation else None
    )
    recipe = resolve_precision(recipe, world.device)
    with folder.lock_run_folder(run, world), _numerics(recipe, world), SignalRecorder() as signals:
        recipe, environment = folder.match_existing_run(
            run, recipe, folder.environment_of(world, source), world, say
        )
        state = folder.load_newest_state(run, world, say)
        net = build_network(recipe, initial_weights if state is None else None).to(world.device)
        learner = Learner(recipe, net, world)
        if state is not None:
            learner.load_state_dict(state)
            if recipe.steps < learner.step:
                requirement = f"at least {learner.step}, the steps that {run} has made"
                raise invalid("steps", recipe.steps, requirement)
            say(f"goes on after step {learner.step}")
            del state
        # Only now, because a recipe that makes no network must not begin a run.
        if world.is_first:
            folder.write_run_file(run, recipe, environment)
        return _TrainingLoop(run, learner, samples, validation, loop_options, signals, say, evaluate).steps()


class _TrainingLoop:
    """Loop over the steps of a run, which writes snapshots, the log and grids."""

    def __init__(
        self,
        run_folder: Path,
        learner: Learner,
        samples: Samples,
        validation: Samples | None,
        loop_options: LoopOptions,
        signals: SignalRecorder,
        say: Say,
        evaluate: Evaluate | None,
    ) -> None:
        self.run_folder, self.learner, self.evaluate = run_folder, learner, evaluate
        self.samples, self.validation = samples, validation
        self.loop_options, self.signals, self.say = loop_options, signals, say
        self.progress, self.is_writer = Progress(learner), learner.world.is_first
        on_gpu = learner.world.device.type == "cuda"
        asynchronous = on_gpu if loop_options.async_save is None else loop_options.async_save
        self.snapshot_writer = SnapshotWriter(run_folder, loop_options.keep, learner.step, asynchronous)
        self.tensorboard = TensorBoard(run_folder, learner.step) if self.is_writer else None
        if self.is_writer:
            folder.truncate_log(run_folder, learner.step)

    def steps(self) -> TrainResult:
        """Make the remaining steps."""
        with self.snapshot_writer:
            return self._steps()

    def _steps(self) -> TrainResult:
        learner, recipe, world = self.learner, self.learner.recipe, self.learner.world
        signal_number = 0
        for images in iterate_batches(
            self.samples, local_sample_ids(recipe, world, learner.step), self.loop_options.workers
        ):
            batch = make_batch(
                recipe, learner.sampler, images.sample_ids, images.images, images.labels, world.device
            )
            self.progress.add(learner.update(batch))
            self.snapshot_writer.check()
            last = learner.step == recipe.steps
            signal_number = world.all_reduce_max(self.signals.received)
            save_due = last or signal_number or learner.step % self.loop_options.save_every == 0
            log_due = save_due or learner.step % self.loop_options.log_every == 0
            if log_due or world.device.type == "cpu":
                self._check(batch)
            if log_due:
                self._log(with_validation=bool(save_due) and not signal_number)
            if save_due:
                self._save()
            if signal_number:
                break  # the sender of the signal may not wait for a grid
            with self.progress.paused():
                if self._is_due(self.loop_options.grid_every):
                    self._grid()
                if self.evaluate is not None and self._is_due(self.loop_options.evaluate_every):
                    self._evaluate(self.evaluate)
        if self.tensorboard is not None:
            self.tensorboard.close()
        return TrainResult(learner.step, signal_number or None)

    def _is_due(self, interval: int) -> bool:
        """Tell whether something that happens every `interval` steps (0: never) and at the end is due."""
        step, steps = self.learner.step, self.learner.recipe.steps
        return interval > 0 and (step == steps or step % interval == 0)

    def _evaluate(self, evaluate: Evaluate) -> None:
        """Evaluate the first average; log the measures."""
        measures = evaluate(average_pipeline(self.learner))
        if self.is_writer and self.tensorboard is not None:
            logged = {f"{EVALUATION}{name}": value for name, value in measures.items()}
            row = {"step": self.learner.step, **logged}
            folder.append_log(self.run_folder, row)
            self.tensorboard.add(row)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
            self.say(f"step {self.learner.step}: {shown}")

    def _check(self, batch: Batch) -> None:
        try:
            self.learner.check_finite(batch)
        except NonFiniteError as error:
            saved_step = self.snapshot_writer.saved
            remainder = (
                f"the newest snapshot is that of step {saved_step}" if saved_step else "nothing was saved yet"
            )
            raise NonFiniteError(f"{error}; {remainder}") from None

    def _log(self, with_validation: bool) -> None:
        row = self.progress.row()
        if row is not None and self.is_writer and self.tensorboard is not None:
            if with_validation and self.validation is not None:
                row |= validation_losses(self.learner, self.validation)
            folder.append_log(self.run_folder, row)
            self.tensorboard.add(row)
            self.say(format_row(row, self.learner.recipe.steps))

    def _save(self) -> None:
        learner = self.learner
        if self.is_writer:
            power_averages = {name: learner.averages.weights(name) for name in learner.averages.powers}
            self.snapshot_writer.write(learner.step, learner.state_dict(), power_averages)
        else:
            self.snapshot_writer.saved = learner.step

    def _grid(self) -> None:
        if self.is_writer and self.learner.recipe.kind != "classifier":
            path = self.run_folder / folder.GRIDS / f"{self.learner.step:08d}.png"
            write_sample_grid(path, self.learner, self.samples)


@dataclass(frozen=True)
class RunCost:
    """Cost of a run: seconds of one step, peak memory in bytes, and seconds of all steps."""

    step_seconds: float
    memory: int
    run_seconds: float


def dry_run(
    recipe: Recipe, source: Source, loop_options: LoopOptions | None = None, world: World | None = None
) -> RunCost:
    """Make two steps without a run's folder, and measure the second. Raises: see `train`."""
    loop_options, world = loop_options or LoopOptions(), world or World()
    samples = build_samples(recipe, source, loop_options.cache)
    recipe = resolve_precision(recipe, world.device)
    step_seconds: list[float] = []
    with _numerics(recipe, world):
        learner = Learner(recipe, build_network(recipe).to(world.device), world)
        batches = iter(iterate_batches(samples, local_sample_ids(recipe, world, 0), loop_options.workers))
        for _ in range(2):
            started = time.perf_counter()
            images: ImageBatch | None = next(batches, None)
            if images is None:
                break
            batch = make_batch(
                recipe, learner.sampler, images.sample_ids, images.images, images.labels, world.device
            )
            report = learner.update(batch)
            if not bool(report.grad_norm.isfinite()):
                learner.check_finite(batch)
            step_seconds.append(time.perf_counter() - started)
    if not step_seconds:
        raise AdmfastError("there is no step to try")
    return RunCost(step_seconds[-1], peak_memory(world.device), step_seconds[-1] * recipe.steps)


@contextlib.contextmanager
def _numerics(recipe: Recipe, world: World) -> Iterator[None]:
    """Set torch's numerical settings for a run; at the end restore them, and the number of threads."""
    threads = torch.get_num_threads()
    try:
        with fixed_numerics(world.device, tf32=recipe.precision == "tf32"):
            yield
    finally:
        torch.set_num_threads(threads)


def _print_nothing(text: str) -> None:
    """Print nothing: another process prints the messages."""
