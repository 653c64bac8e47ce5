"""Images for training, under the names of the published `image_datasets.py`."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from admfast.errors import invalid
from admfast.training.crops import center_crop, random_crop

__all__ = ["ImageDataset", "center_crop_arr", "load_data", "random_crop_arr"]
_ENDINGS = (".jpg", ".jpeg", ".png", ".gif")


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield batches endlessly: images, float32 [N, 3, H, W] in [-1, 1], and {"y": classes int64 [N]} or {}.

    data_dir: searched with its subfolders. class_cond: an image's class is its file name up to the first "_".
    deterministic: do not shuffle; images come in the order of their paths. Raises: InvalidArgument if
    `data_dir` is no folder, or if a process has fewer images than `batch_size`.
    """
    if not data_dir or not os.path.isdir(data_dir):
        raise invalid("data_dir", data_dir, "a folder of images")
    files = _list_image_files_recursively(data_dir)
    classes = None
    if class_cond:
        names = [Path(path).name.split("_")[0] for path in files]
        class_number = {name: i for i, name in enumerate(sorted(set(names)))}
        classes = [class_number[name] for name in names]
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dataset = ImageDataset(image_size, files, classes, rank, size, random_crop, random_flip)
    if len(dataset) < batch_size:
        raise invalid("batch_size", batch_size, f"at most the {len(dataset)} images of a process")
    loader = DataLoader(dataset, batch_size, shuffle=not deterministic, num_workers=1, drop_last=True)
    while True:
        yield from loader


def _list_image_files_recursively(data_dir: str) -> list[str]:
    """Return the paths of the images in a folder and its subfolders, sorted by name within each folder."""
    paths = []
    for entry in sorted(os.listdir(data_dir)):
        path = os.path.join(data_dir, entry)
        if os.path.splitext(entry)[1].lower() in _ENDINGS and not os.path.isdir(path):
            paths.append(path)
        elif os.path.isdir(path):
            paths += _list_image_files_recursively(path)
    return paths


class ImageDataset(Dataset[tuple[Any, dict[str, Any]]]):
    """The images of this process, cropped to squares: (float32 [3, H, W] in [-1, 1], {"y": class} or {}).

    A process has every `num_shards`-th image, starting with number `shard`.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ) -> None:
        self.resolution = resolution
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.random_crop, self.random_flip = random_crop, random_flip

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[Any, dict[str, Any]]:
        with Image.open(self.local_images[idx]) as file:
            image = file.convert("RGB")
        crop = random_crop_arr if self.random_crop else center_crop_arr
        pixels = crop(image, self.resolution)
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        scaled = pixels.astype(np.float32) / 127.5 - 1
        labels = {}
        if self.local_classes is not None:
            labels["y"] = np.array(self.local_classes[idx], dtype=np.int64)
        return np.transpose(scaled, [2, 0, 1]), labels


def center_crop_arr(pil_image: Image.Image, image_size: int) -> npt.NDArray[np.uint8]:
    """Return the middle square, uint8 [size, size, 3]; see `admfast.training.crops.center_crop`."""
    return center_crop(pil_image, image_size)


def random_crop_arr(
    pil_image: Image.Image, image_size: int, min_crop_frac: float = 0.8, max_crop_frac: float = 1.0
) -> npt.NDArray[np.uint8]:
    """Return a random square drawn by Python's `random`; see `admfast.training.crops.random_crop`."""
    return random_crop(pil_image, image_size, random.randrange, min_crop_frac, max_crop_frac)
