"""Sample images into a folder: PNG files as they are finished, then a labelled grid and the published npz."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from admfast.engine.images import to_uint8
from admfast.engine.loop import Progress
from admfast.errors import NonFiniteError, OutputError, invalid
from admfast.files.atomic import output_error, write_bytes
from admfast.files.images import write_grid, write_png
from admfast.files.npz import write_samples
from admfast.pipeline import Pipeline

GRID_LIMIT, GRID_COLUMNS = 400, 20  # images that a grid shows at most, in all and of a class side by side
PNG_CHANNELS = (1, 3, 4)


@dataclass
class SampleRun:
    """One call of `admfast sample`: which images, with which settings, into which folder.

    Attributes:
        pipe: the pipeline. classes, seeds: as of `Pipeline.sample`, one entry an image.
        out: folder; made where it is missing. It must not hold samples already, unless `overwrite`: then they
            are removed when the first new image is there.
        settings: keyword arguments of `Pipeline.sample`.
        batch_size: images at a time; None chooses.
        intermediates: keep x_0 of every so many steps as PNG files too; 0 for none.
        class_names: names for the grid's rows.
    """

    pipe: Pipeline
    classes: Sequence[int] | None
    seeds: Sequence[int]
    out: Path
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    overwrite: bool = False
    intermediates: int = 0
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._images: list[NDArray[np.uint8]] = []
        self._old: list[Path] = []
        config = self.pipe.config
        if config.dims != 2 or config.in_channels not in PNG_CHANNELS:
            given = f"{config.dims}-D images of {config.in_channels} channels"
            raise invalid("pipe", given, "PNG files are 2-D, of 1, 3 or 4 channels; see Pipeline.sample")
        if self.intermediates < 0:
            raise invalid("intermediates", self.intermediates, "0 for none, or every so many steps")
        if self.batch_size is not None and self.batch_size < 1:
            raise invalid("batch_size", self.batch_size, "1 or more")

    def run(self) -> list[Path]:
        """Sample and write; returns the grid's and the npz's path.

        Ctrl-C, or NaN in a later batch, leaves the images that are finished, with their grid and npz.
        """
        steps = self._rows()
        self._prepare()
        size = self.batch_size or self.pipe.images_at_a_time
        shown = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        # Not shown before the first step, so that what is refused until then is one line.
        bar = tqdm(total=len(self.seeds) * steps, unit="step", bar_format=shown, delay=math.inf)
        try:
            with bar:
                for first in range(0, len(self.seeds), size):
                    self._batch(first, size, steps, bar)
        except (KeyboardInterrupt, NonFiniteError):
            self._finish()
            raise
        return self._finish()

    def _batch(self, first: int, size: int, steps: int, bar: tqdm) -> None:
        """Sample and write images first..first+size-1."""
        seeds = list(self.seeds[first : first + size])
        classes = None if self.classes is None else list(self.classes[first : first + size])

        def progressed(progress: Progress) -> None:
            bar.delay = 0
            bar.update(len(progress.x))
            spent = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{bar.n / steps / spent:.2f} images/s" if spent else "", refresh=False)
            if self.intermediates and progress.done % self.intermediates == 0:
                self._write_intermediate(first + progress.first, progress)

        images = self.pipe.sample(classes, seeds, callback=progressed, batch_size=size, **self.settings)
        self._remove_old()
        for i, image in enumerate(images.numpy()):
            label = "" if classes is None else f"_class{classes[i]}"
            write_png(self.out / "images" / f"{first + i:06d}{label}_seed{seeds[i]}.png", image)
            self._images.append(image)

    def _rows(self) -> int:
        """Callbacks of one image: rows of the base and of the upsampler."""
        settings, up = self.settings, self.pipe.upsampler
        if settings.get("respacing") is not None:
            steps = self.pipe.process(settings["respacing"]).num_timesteps
        else:
            steps = settings.get("steps") or self.pipe.steps
        return steps + (0 if up is None else settings.get("upsampler_steps") or up.steps)

    def _prepare(self) -> None:
        """Make the folder, and refuse one that can't be written or holds samples already."""
        folder = self.out / "images"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(folder, error) from None
        patterns = ("images/*.png", "intermediates/*.png", "samples_*.npz", "grid.png")
        self._old = [path for pattern in patterns for path in self.out.glob(pattern)]
        if self._old and not self.overwrite:
            held = f"holds {len(self._old)} files of samples already"
            raise OutputError(f"out={str(self.out)!r}: {held}; give another folder, or --overwrite")
        write_bytes(self.out / ".writable", b"")
        (self.out / ".writable").unlink()

    def _remove_old(self) -> None:
        """Remove what the folder held, once there is something to put in its place."""
        while self._old:
            self._old.pop().unlink(missing_ok=True)

    def _finish(self) -> list[Path]:
        """Write the grid and the npz of the images that are finished."""
        if not self._images:
            return []
        images = np.stack(self._images)
        count = len(images)
        labels = None if self.classes is None else np.asarray(self.classes[:count], dtype=np.int64)
        shape = "x".join(str(side) for side in images.shape)
        npz, grid = self.out / f"samples_{shape}.npz", self.out / "grid.png"
        write_samples(npz, images, labels)
        shown, labels = images[:GRID_LIMIT], None if labels is None else labels[:GRID_LIMIT]
        if labels is None:
            columns = math.ceil(math.sqrt(len(shown)))
        else:
            columns = min(int(np.unique(labels, return_counts=True)[1].max()), GRID_COLUMNS)
        write_grid(grid, shown, labels, self.class_names, columns)
        return [grid, npz]

    def _write_intermediate(self, first: int, progress: Progress) -> None:
        """Write the x_0 of a batch after some step."""
        self._remove_old()
        folder = self.out / "intermediates"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise output_error(folder, error) from None
        stage = "" if progress.stage == "base" else f"_{progress.stage}"
        for i, image in enumerate(to_uint8(progress.x0).cpu().numpy()):
            write_png(folder / f"{first + i:06d}{stage}_step{progress.done:04d}.png", image)
