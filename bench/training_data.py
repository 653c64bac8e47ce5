"""`python -m bench.training_data`: measure training images per second, by source and number of workers.

Pictures of 512x512 with the spectrum of photographs become samples of 64x64. The first samples of each kind
are compared with the published preprocessing, which is implemented here with Pillow and measured too.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.command import Bench, bench_main

NAMES = ("jpeg", "png", "cache")
PICTURE, SIZE, QUALITY = 512, 64, 90
PICTURES, BATCH, COMPARED = 48, 16, 8
WORKERS = (0, 1, 2)
WINDOWS, WINDOW_SECONDS = 5, 1.2
# Images per second of a training step of the 64 px model on an H100, at 41 % of the peak of bf16 products.
H100_IMAGES = 493


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return one group for each kind of source."""
    from bench.measure import Case

    def cases(name: str, settings: Any) -> Iterator[Any]:
        shape, kind = {"from": f"{PICTURE} px", "to": f"{SIZE} px"}, "PNG" if name == "png" else "JPEG"
        if name != "cache":
            row = functools.partial(published_row, kind)
            yield Case(f"training_{name}", "uint8", "published", {**shape, "workers": 0}, row)
        for workers in WORKERS[:2] if settings.quick else WORKERS:
            row = functools.partial(loader_row, kind, name == "cache", workers)
            yield Case(f"training_{name}", "uint8", "admfast", {**shape, "workers": workers}, row)

    if settings.cuda:
        raise ValueError("device='cuda': must be cpu, which decodes the images")
    return {name: (1.0, functools.partial(cases, name)) for name in NAMES}


@functools.cache
def pictures(kind: str) -> tuple[bytes, ...]:
    """Return image files whose spectrum falls as 1/f, like that of photographs."""
    draw, files = np.random.default_rng(0), []
    frequency = np.fft.fftfreq(PICTURE)
    distance = np.hypot(frequency[:, None], frequency[None]) + 1 / PICTURE
    for _ in range(PICTURES):
        noise = draw.normal(size=(3, PICTURE, PICTURE)) + 2 * draw.normal(size=(PICTURE, PICTURE))
        field = np.fft.ifft2(np.fft.fft2(noise) / distance).real
        levels = 128 + 50 * field / field.std(axis=(1, 2), keepdims=True)
        picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        picture.save(file := io.BytesIO(), kind, quality=QUALITY)
        files.append(file.getvalue())
    return tuple(files)


def published_preprocessing(content: bytes) -> NDArray[np.uint8]:
    """Apply the published preprocessing to an image file: halve, resize, crop; return [SIZE, SIZE, 3]."""
    picture = Image.open(io.BytesIO(content))
    picture.load()
    while min(picture.size) >= 2 * SIZE:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = SIZE / min(picture.size)
    sides = round(picture.width * scale), round(picture.height * scale)
    array = np.array(picture.resize(sides, Image.Resampling.BICUBIC).convert("RGB"))
    top, left = (array.shape[0] - SIZE) // 2, (array.shape[1] - SIZE) // 2
    return array[top : top + SIZE, left : left + SIZE]


def published_row(kind: str, settings: Any) -> dict[str, Any]:
    """Return the row of the published preprocessing, which runs image by image in this process."""
    files = itertools.cycle(pictures(kind))

    def batch() -> None:
        for content in itertools.islice(files, BATCH):
            published_preprocessing(content)

    return measure_images_per_second(batch, 0, settings)


def loader_row(kind: str, use_cache: bool, workers: int, settings: Any) -> dict[str, Any]:
    """Return the row of our loader with this number of workers; use_cache: whether it uses the cache."""
    from admfast.files.sources import open_source
    from admfast.training.cache import cache_samples
    from admfast.training.samples import Samples, iterate_batches
    from bench.measure import WrongResult

    files = pictures(kind)
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(files):
            (Path(folder) / f"{number:03d}.{kind.lower()}").write_bytes(content)
        samples = Samples(open_source(folder, "none"), 0, SIZE, random_flip=False)
        if use_cache:
            samples = cache_samples(samples, Path(folder) / "cache", threads=1)
        expected = {published_preprocessing(content).tobytes() for content in files}
        for k in range(COMPARED):
            if samples.at(k)[0].permute(1, 2, 0).contiguous().numpy().tobytes() not in expected:
                raise WrongResult(f"sample {k} is not the published preprocessing of an image")
        batches = iterate_batches(samples, (range(n, n + BATCH) for n in itertools.count(0, BATCH)), workers)
        try:
            return measure_images_per_second(functools.partial(next, batches), workers, settings)
        finally:
            batches.close()  # type: ignore[attr-defined]


def measure_images_per_second(batch: Callable[[], Any], workers: int, settings: Any) -> dict[str, Any]:
    """Return a row's fields: images per second of `batch`, the median over several windows of time.

    Images per second and core use the CPU time of this process and its workers, on which other load on the
    machine has little effect.
    """
    from bench.measure import queue_seconds, round_to_5_digits

    for _ in range(2 + 2 * workers):
        batch()
    windows, seconds = (2, 0.2) if settings.quick else (WINDOWS, WINDOW_SECONDS)
    rates, per_core, queued, began = list[float](), list[float](), queue_seconds(), time.perf_counter()
    for _ in range(windows):
        count, start, used = 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() - start < seconds:
            batch()
            count += BATCH
        rates.append(count / (time.perf_counter() - start))
        per_core.append(count / (cpu_seconds() - used))
    waited = max(0.0, queue_seconds() - queued) / (time.perf_counter() - began)
    core = statistics.median(per_core)
    return {
        "images_per_s": round_to_5_digits(statistics.median(rates)),
        "images_per_core_s": round_to_5_digits(core),
        "cores_for_h100": round_to_5_digits(H100_IMAGES / core),
        "samples": windows,
        "waited": round(waited, 3),
    }


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its workers so far; raise Unavailable if not known."""
    from bench.measure import Unavailable

    total = 0
    for process in (multiprocessing.current_process(), *multiprocessing.active_children()):
        tasks = list(Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
        if not tasks:
            raise Unavailable("/proc does not have the CPU time of processes")
        total += sum(int(task.read_text().split()[0]) for task in tasks)
    return total / 1e9


SUMMARY = "Measure training images per second: JPEG, PNG and the decoded cache, with 0, 1 and 2 workers."
main = functools.partial(bench_main, Bench("training_data", SUMMARY, NAMES, groups))

if __name__ == "__main__":
    sys.exit(main())
