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
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Self

import torch

from admfast import checks
from admfast.checkpoints.snapshots import SnapshotWriter
from admfast.engine.numerics import fixed_numerics, peak_memory
from admfast.errors import AdmfastError, NonFiniteError, invalid
from admfast.interrupts import ENDING_SIGNALS
from admfast.training import folder
from admfast.training.cache import cached
from admfast.training.distributed import World
from admfast.training.folder import Say
from admfast.training.images import Source, check_classes
from admfast.training.loss import Batch, batch_of
from admfast.training.network import build_network, resolved_precision
from admfast.training.progress import Board, Progress, in_words, write_samples
from admfast.training.recipe import Recipe
from admfast.training.samples import ImageBatch, Samples, loader
from admfast.training.update import Learner
from admfast.training.validation import split, validation_losses


@dataclass(frozen=True, kw_only=True)
class Habits:
    """Settings of a run that change no result: how often it writes files, and how it loads images.

    Attributes:
        save_every, log_every, grid_every: steps between snapshots, rows of the log, and grids of samples;
            grid_every=0 makes no grids.
        keep: number of snapshots to keep.
        workers: processes that make samples, for each process of the run; 0 makes them in the process itself.
        cache: where decoded images are cached: "memory", a folder, or None for no cache.
        async_save: copy the state into host memory, and write the snapshot during the next steps; None does
            this only on a GPU.
    """

    save_every: int = 1000
    log_every: int = 100
    grid_every: int = 0
    keep: int = 3
    workers: int = 0
    cache: str | None = None
    async_save: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("save_every", 1),
            ("log_every", 1),
            ("grid_every", 0),
            ("keep", 1),
            ("workers", 0),
        ):
            checks.whole_number(name, getattr(self, name), least)


@dataclass(frozen=True)
class Outcome:
    """Result of `train`: the number of steps made, and the signal that ended the run early, if one did."""

    step: int
    signal: int | None = None


class Signals:
    """Context that records SIGINT, SIGTERM and SIGHUP, so that the loop can save and end.

    A second signal is handled as before the block. A signal that is ignored (as under nohup) stays ignored.

    Attributes: came: number of the signal that was received, 0 if there was none.
    """

    def __init__(self) -> None:
        self.came = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # handlers can be set only there
            for number in ENDING_SIGNALS:
                # None means a handler that was not set from Python; it could not be restored.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            self.__exit__()
            signal.raise_signal(number)
        self.came = number


def samples_of(recipe: Recipe, source: Source, cache: str | None = None, held_out: bool = False) -> Samples:
    """Return the samples of a run. held_out: return those of its validation images instead.

    cache: see `Habits`.
    Raises: InvalidArgument if the classes don't fit the network, or too many images are held out.
    """
    check_classes(source, recipe.classes)
    source = split(source, recipe.seed, recipe.validation)[held_out]
    network = recipe.network
    samples = Samples(
        source, recipe.seed, network.image_size, network.in_channels, recipe.random_crop, recipe.random_flip
    )
    if cache is None:
        return samples
    return cached(samples, None if cache == "memory" else cache)


def numbers(recipe: Recipe, world: World, step: int) -> Iterator[range]:
    """Yield the numbers of this process's samples in each step, from `step` to the run's last."""
    share = world.share(recipe.batch_size)
    for first in range(step * recipe.batch_size, recipe.steps * recipe.batch_size, recipe.batch_size):
        yield range(first + share.start, first + share.stop)


def train(
    recipe: Recipe,
    source: Source,
    out: str | PathLike[str],
    habits: Habits | None = None,
    world: World | None = None,
    start: str | PathLike[str] | None = None,
    say: Say = print,
) -> Outcome:
    """Train in the folder `out` up to the recipe's last step, from its newest snapshot if there is one.

    start: weights file to begin from, if the run has no snapshot yet. say: called with each message.
    Raises: InvalidArgument if the recipe isn't that of the folder; CheckpointError if no snapshot is intact;
    OutputError if something can't be written (older snapshots are kept); NonFiniteError if too many steps in
    a row had no finite gradient; BrokenImage if too many images are broken.
    """
    run, habits, world = Path(out), habits or Habits(), world or World()
    say = say if world.first else _silent
    samples = samples_of(recipe, source, habits.cache)
    validation = samples_of(recipe, source, habits.cache, held_out=True) if recipe.validation else None
    recipe = resolved_precision(recipe, world.device)
    with folder.held(run, world), _numerics(recipe, world), Signals() as signals:
        recipe, facts = folder.agreed(run, recipe, folder.surroundings(world, source), world, say)
        state = folder.resume(run, world, say)
        net = build_network(recipe, start if state is None else None).to(world.device)
        learner = Learner(recipe, net, world)
        if state is not None:
            learner.load_state_dict(state)
            if recipe.steps < learner.step:
                allowed = f"at least {learner.step}, the steps that {run} has made"
                raise invalid("steps", recipe.steps, allowed)
            say(f"goes on after step {learner.step}")
            del state
        # Only now, because a recipe that makes no network must not begin a run.
        if world.first:
            folder.write_run_file(run, recipe, facts)
        return _Run(run, learner, samples, validation, habits, signals, say).steps()


class _Run:
    """Loop over the steps of a run, which writes snapshots, the log and grids."""

    def __init__(
        self,
        run: Path,
        learner: Learner,
        samples: Samples,
        validation: Samples | None,
        habits: Habits,
        signals: Signals,
        say: Say,
    ) -> None:
        self.run, self.learner, self.samples, self.validation = run, learner, samples, validation
        self.habits, self.signals, self.say = habits, signals, say
        self.progress, self.writes = Progress(learner), learner.world.first
        on_gpu = learner.world.device.type == "cuda"
        beside = on_gpu if habits.async_save is None else habits.async_save
        self.saves = SnapshotWriter(run, habits.keep, learner.step, beside)
        self.board = Board(run, learner.step) if self.writes else None
        if self.writes:
            folder.cut_log(run, learner.step)

    def steps(self) -> Outcome:
        """Make the remaining steps."""
        with self.saves:
            return self._steps()

    def _steps(self) -> Outcome:
        learner, recipe, world = self.learner, self.learner.recipe, self.learner.world
        signal_number = 0
        for images in loader(self.samples, numbers(recipe, world, learner.step), self.habits.workers):
            batch = batch_of(recipe, learner.sampler, images.ks, images.images, images.labels, world.device)
            self.progress.add(learner.update(batch))
            self.saves.check()
            last = learner.step == recipe.steps
            signal_number = world.most(self.signals.came)
            due = last or signal_number or learner.step % self.habits.save_every == 0
            logs = due or learner.step % self.habits.log_every == 0
            if logs or world.device.type == "cpu":
                self._check(batch)
            if logs:
                self._log(validates=bool(due) and not signal_number)
            if due:
                self._save()
            if signal_number:
                break  # the sender of the signal may not wait for a grid
            if self.habits.grid_every and (last or learner.step % self.habits.grid_every == 0):
                self._grid()
        if self.board is not None:
            self.board.close()
        return Outcome(learner.step, signal_number or None)

    def _check(self, batch: Batch) -> None:
        try:
            self.learner.check(batch)
        except NonFiniteError as error:
            saved = self.saves.saved
            kept = f"the newest snapshot is that of step {saved}" if saved else "nothing was saved yet"
            raise NonFiniteError(f"{error}; {kept}") from None

    def _log(self, validates: bool) -> None:
        row = self.progress.row()
        if row is not None and self.writes and self.board is not None:
            if validates and self.validation is not None:
                row |= validation_losses(self.learner, self.validation)
            folder.append_log(self.run, row)
            self.board.add(row)
            self.say(in_words(row, self.learner.recipe.steps))

    def _save(self) -> None:
        learner = self.learner
        if self.writes:
            powers = {name: learner.averages.weights(name) for name in learner.averages.powers}
            self.saves.write(learner.step, learner.state_dict(), powers)
        else:
            self.saves.saved = learner.step

    def _grid(self) -> None:
        if self.writes and self.learner.recipe.kind != "classifier":
            path = self.run / folder.GRIDS / f"{self.learner.step:08d}.png"
            write_samples(path, self.learner, self.samples)


@dataclass(frozen=True)
class Trial:
    """Cost of a run: seconds of one step, peak memory in bytes, and seconds of all steps."""

    step_seconds: float
    memory: int
    run_seconds: float


def dry_run(
    recipe: Recipe, source: Source, habits: Habits | None = None, world: World | None = None
) -> Trial:
    """Make two steps without a run's folder, and measure the second. Raises: see `train`."""
    habits, world = habits or Habits(), world or World()
    samples = samples_of(recipe, source, habits.cache)
    recipe = resolved_precision(recipe, world.device)
    taken: list[float] = []
    with _numerics(recipe, world):
        learner = Learner(recipe, build_network(recipe).to(world.device), world)
        ahead = iter(loader(samples, numbers(recipe, world, 0), habits.workers))
        for _ in range(2):
            started = time.perf_counter()
            images: ImageBatch | None = next(ahead, None)
            if images is None:
                break
            batch = batch_of(recipe, learner.sampler, images.ks, images.images, images.labels, world.device)
            report = learner.update(batch)
            if not bool(report.grad_norm.isfinite()):
                learner.check(batch)
            taken.append(time.perf_counter() - started)
    if not taken:
        raise AdmfastError("there is no step to try")
    return Trial(taken[-1], peak_memory(world.device), taken[-1] * recipe.steps)


@contextlib.contextmanager
def _numerics(recipe: Recipe, world: World) -> Iterator[None]:
    """Set torch's numerical settings for a run; at the end restore them, and the number of threads."""
    threads = torch.get_num_threads()
    try:
        with fixed_numerics(world.device, tf32=recipe.precision == "tf32"):
            yield
    finally:
        torch.set_num_threads(threads)


def _silent(text: str) -> None:
    """Print nothing: another process prints the messages."""
