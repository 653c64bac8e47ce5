"""Sample images into a folder: PNG files as they are finished, then a labelled grid and the published npz."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from admfast.errors import AdmfastError, invalid
from admfast.files.atomic import folder_removed_if_empty, make_folder
from admfast.files.image_files import sample_name
from admfast.files.images import read_image, write_grid, write_png
from admfast.files.levels import from_uint8, to_uint8
from admfast.files.locks import folder_locked
from admfast.files.npz import write_streamed
from admfast.files.paths import user_path
from admfast.interrupts import delay_signals
from admfast.runs.describe import make_manifest
from admfast.runs.folder import SampleFolder
from admfast.runs.manifest import BALANCED, Manifest, read_manifest
from admfast.runs.progress import ProgressBar, step_shares
from admfast.sampling.loop import Progress, RunRecord, run
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import Plan, plan, requested_images
from admfast.sampling.request import SampleRequest

GRID_LIMIT, GRID_COLUMNS = 400, 20  # most images in a grid, and in one of its rows
PNG_CHANNELS = (1, 3, 4)


@dataclass
class SampleRun:
    """One call of `admfast sample` without `--num`: the images, their settings, and the folder for them.

    If the folder holds images of the same settings, the run makes only those that are missing.

    Attributes:
        pipe: the pipeline. request: the request; `seeds` and `classes` list those of every image.
        out: folder for the files; made if it is missing. Without `overwrite` it must not hold samples of
            other settings. With it, older samples stay until the new set is complete and replaces them; if
            the run ends before that, its finished images stay in OUT/unfinished.
        intermediates: also write x_0 after every so many steps, as PNG files; 0 for none.
        class_names: names for the grid's rows.
        low_res: uint8 [N, h, w, C], the images to enlarge if the pipeline is itself an upsampler.
    """

    pipe: Pipeline
    request: SampleRequest
    out: Path
    overwrite: bool = False
    intermediates: int = 0
    class_names: Sequence[str] | None = None
    low_res: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        self.out = user_path("out", self.out)
        self.seeds, self.classes, _ = requested_images(self.request, self.pipe)
        if self.request.output != "uint8" or self.request.callback is not None:
            actual = f"output={self.request.output!r}, callback={self.request.callback!r}"
            raise invalid("request", actual, "output='uint8' and no callback: a run writes files")
        self.made = 0  # images that this call made
        self._finished: set[int] = set()
        self._record = RunRecord()  # of all batches
        self._grid_images: dict[int, NDArray[np.uint8]] = {}  # of the grid; all others are only on the disk
        self._intermediates_before_images: list[Path] = []  # written before the first image was finished
        self._folder = SampleFolder(self.out, self.overwrite)
        config = self.pipe.config
        if config.dims != 2 or config.in_channels not in PNG_CHANNELS:
            actual = f"{config.dims}-D images of {config.in_channels} channels"
            raise invalid("pipe", actual, "PNG files are 2-D, of 1, 3 or 4 channels; see Pipeline.sample")
        if self.intermediates < 0:
            raise invalid("intermediates", self.intermediates, "0 for none, or every so many steps")

    @property
    def finished(self) -> int:
        """Number of images that are finished, also by earlier runs of the same settings."""
        return len(self._finished)

    @property
    def written_folder(self) -> Path:
        """Folder that holds the images finished so far."""
        return self._folder.write_folder

    def check(self) -> Plan:
        """Check settings and folder before anything is written; return the plan of all images.

        A batch size that isn't given is that of the run which the folder holds.
        """
        found = None if self.overwrite or self.request.batch_size is not None else read_manifest(self.out)
        if found is not None and found.files == "png":
            self.request = replace(self.request, batch_size=found.batch_size)
        request = self.request
        if self.low_res is not None:
            n, height, width, channels = self.low_res.shape
            # Only its shape matters here: don't make a float copy of all images.
            request = replace(
                request, low_res=torch.zeros(1, 1, 1, 1, device="cpu").expand(n, channels, height, width)
            )
        full_plan = plan(request, self.pipe)
        self._manifest = self._make_manifest(full_plan)
        self._folder.check(self._manifest)
        return full_plan

    def _make_manifest(self, full_plan: Plan) -> Manifest:
        """Return the manifest of these images: a single shard, a file for each image."""
        classes = BALANCED if self.request.classes is None else self.classes
        return make_manifest(
            self.pipe, self.request, full_plan, seeds=self.seeds, classes=classes,
            batch_size=full_plan.batch_size, shard_size=len(self.seeds), files="png", low_res=self.low_res,
        )  # fmt: skip

    def run(self) -> list[Path]:
        """Sample and write all files; return the paths of the grid and of the npz.

        If the run ends early (Ctrl-C, NaN in a later batch, a full disk), the finished images stay in
        `written_folder`, with their grid and npz if these can be written. Else nothing stays.
        """
        full_plan = self.check()
        shares, size = step_shares(full_plan), full_plan.batch_size
        del full_plan  # frees its tensors of all images on the device
        with folder_removed_if_empty(self.out), folder_locked(self.out, "sampling", required=False):
            self._folder.open(self._manifest)
            self._finished = {i for i in range(len(self.seeds)) if self._png_path(i).exists()}
            self._sample_all(size, shares)
            paths = self._write_grid_and_npz()
            self._folder.publish()
        return [self.out / path.name for path in paths]

    def _sample_all(self, size: int, shares: dict[str, float]) -> None:
        """Sample and write missing images with a progress bar; an error leaves the finished images.

        A batch of which an image is missing is made again as a whole, so that it has the same bits.
        """
        count = len(self.seeds)
        missing = [
            i for i in range(0, count, size) if not self._finished.issuperset(range(i, min(i + size, count)))
        ]
        missing_images = sum(min(first + size, count) - first for first in missing)
        try:
            with ProgressBar(count, count - missing_images) as bar:
                for first in missing:
                    self._sample_batch(first, size, shares, bar)
        except BaseException:
            # The error that ended the run is the one to report.
            with contextlib.suppress(AdmfastError):
                self._write_grid_and_npz()
            if not self._finished:  # the same run can then be started again
                for path in self._intermediates_before_images:
                    path.unlink(missing_ok=True)
            self._folder.close(keeps_manifest=bool(self._finished))
            raise

    def _sample_batch(self, first: int, size: int, shares: dict[str, float], bar: ProgressBar) -> None:
        """Sample and write images first..first+size-1."""
        images = slice(first, first + size)

        def report_progress(progress: Progress) -> None:
            bar.advance(progress, shares)
            if self.intermediates and progress.done % self.intermediates == 0:
                self._write_intermediate(first + progress.first, progress)

        tensors = {name: getattr(self.request, name) for name in ("noise", "x_start", "step_noise")}
        if tensors["step_noise"] is not None:  # [steps, N, ...]
            tensors["step_noise"] = tensors["step_noise"][:, images]
        for name in ("noise", "x_start"):
            tensors[name] = None if tensors[name] is None else tensors[name][images]
        request = replace(
            self.request,
            **tensors,
            seeds=self.seeds[images],
            classes=None if self.classes is None else self.classes[images],
            low_res=None if self.low_res is None else from_uint8(torch.from_numpy(self.low_res[images])),
            callback=report_progress,
            batch_size=size,
        )
        for i, image in enumerate(run(plan(request, self.pipe), self._record).numpy(), first):
            with delay_signals():  # so that every file written is counted
                write_png(self._png_path(i), image)
                if i < GRID_LIMIT:
                    self._grid_images[i] = image
                self.made += 1
                self._finished.add(i)

    def _png_path(self, i: int) -> Path:
        """Return the path of image i."""
        name = sample_name(i, None if self.classes is None else self.classes[i], self.seeds[i])
        return self._folder.write_folder / "images" / name

    def _write_grid_and_npz(self) -> list[Path]:
        """Write the grid and the npz of the finished images; write each even if the other fails."""
        if not self._finished:
            return []
        indices = sorted(self._finished)
        labels = None if self.classes is None else np.array([self.classes[i] for i in indices])
        shape = (len(indices), *self._manifest.shape)
        npz = self._folder.write_folder / f"samples_{'x'.join(map(str, shape))}.npz"
        grid = self._folder.write_folder / "grid.png"
        try:
            write_streamed(npz, shape, map(self._read, indices), labels)
        except AdmfastError:
            with contextlib.suppress(AdmfastError):
                self._write_grid(grid, indices, labels)
            raise
        self._write_grid(grid, indices, labels)
        self._folder.remove_older_archives(npz)
        return [grid, npz]

    def _read(self, i: int) -> NDArray[np.uint8]:
        """Return a finished image, from its file if it isn't kept for the grid."""
        return self._grid_images[i] if i in self._grid_images else read_image(self._png_path(i))

    def _write_grid(self, path: Path, indices: list[int], labels: NDArray[np.int64] | None) -> None:
        """Write the first images as one picture, with a row for every class."""
        images = np.stack([self._read(i) for i in indices[:GRID_LIMIT]])
        labels = None if labels is None else labels[:GRID_LIMIT]
        if labels is None:
            columns = math.ceil(math.sqrt(len(images)))
        else:
            columns = min(int(np.unique(labels, return_counts=True)[1].max()), GRID_COLUMNS)
        write_grid(path, images, labels, self.class_names, columns)

    def _write_intermediate(self, first: int, progress: Progress) -> None:
        """Write the x_0 of a batch after a step as PNG files."""
        folder = self._folder.write_folder / "intermediates"
        make_folder(folder)
        stage = "" if progress.stage == "base" else f"_{progress.stage}"
        for i, image in enumerate(to_uint8(progress.x0).cpu().numpy()):
            path = folder / f"{first + i:06d}{stage}_step{progress.done:04d}.png"
            if not self._finished:
                self._intermediates_before_images.append(path)
            write_png(path, image)
