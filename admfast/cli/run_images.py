"""Open the images that a command evaluates; `admfast.evaluation` itself doesn't know runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from admfast.evaluation import ImageSet
from admfast.evaluation.image_sets import UInt8, open_images
from admfast.files.paths import user_path
from admfast.runs.collect import FinishedRun
from admfast.runs.manifest import MANIFEST


def open_set(path: str, name: str) -> ImageSet:
    """Return the images of a path; `name` is the argument for errors. A folder may be that of a run."""
    folder = user_path(name, path)
    if (folder / MANIFEST).is_file():
        return RunImages(folder)
    return open_images(path, name)


class RunImages(ImageSet):
    """The images of a finished run, in the order of their seeds."""

    def __init__(self, folder: Path) -> None:
        self._run = FinishedRun(folder)
        manifest = self._run.manifest
        self.path, self.name = folder, str(folder)
        height, width, channels = manifest.shape
        self.shape = (height, width, channels)
        self.labels = manifest.labels_of(range(manifest.images))

    def __len__(self) -> int:
        return self._run.manifest.images

    def settings(self) -> dict[str, Any]:
        """Return the settings that the images were sampled with."""
        manifest = self._run.manifest
        made = {"model": manifest.model, "precision": manifest.precision, "seeds": manifest.seeds}
        return {f"samples: {name}": value for name, value in (made | manifest.request).items()}

    def batches(self, first: int, stop: int, size: int) -> Iterator[UInt8]:
        held: list[UInt8] = []
        for image in self._run.between(first, stop):
            held.append(image)
            if len(held) == size:
                yield np.stack(held)
                held = []
        if held:
            yield np.stack(held)
