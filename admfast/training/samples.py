"""Make the k-th sample of a training run; its image, crop and flip depend only on the run's seed and k.

Samples are numbered through the whole run. Epoch e consists of samples e*N .. e*N + N-1 and has each of the N
images once, in its own order. All draws are words of Philox (`ops/update/noise.py`) with the seed as key:

    order of epoch e    counter (image, 0, e, ORDER): images by ascending 63-bit key from words 0 and 1
    crop and flip of k  counter (0, 0, k, CROP): words for length, top, left and flip
    replacement for a broken image   counter (attempt, 0, k, REPLACEMENT): word 0 chooses the image

A number in 0..n-1 is drawn as word * n >> 32. So any number of processes and workers makes the same samples,
and the position of a run is one number.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from admfast import checks
from admfast.errors import AdmfastError, first_line, invalid
from admfast.files.images import Picture, UInt8
from admfast.files.sources import BrokenImage, Source
from admfast.ops.update import MASK32, philox4x32_10
from admfast.training.crops import center_crop, convert_channels, let_pillow_reuse_memory, random_crop


class DataStream(IntEnum):
    """Philox streams of the images, 64 to 127; `TrainStream` has the other streams."""

    ORDER = 64
    CROP = 65
    REPLACEMENT = 66
    HELD_OUT = 67


class Samples:
    """The samples of a run, by number: `samples.at(k)`.

    Args:
        source: the images.
        seed: seed of the run, 0..2^64-1.
        size: side of the samples in pixels.
        channels: 1 (colours become luminance) or 3 (grey is repeated).
        random_crop: crop at random as published, 80 to 100 % of the shorter side; False crops the centre.
        random_flip: mirror half of the samples, chosen at random.
        max_broken: number of images that may be broken before it is an error; None allows 1 %, at least one.
            In any case one image must be intact.

    Raises InvalidArgument for a value that isn't allowed.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        size: int,
        channels: int = 3,
        random_crop: bool = False,
        random_flip: bool = True,
        max_broken: int | None = None,
    ) -> None:
        self.source = source
        self.seed = checks.whole_number("seed", seed, 0, 2**64 - 1)
        self.size = checks.whole_number("size", size, 1)
        self.channels = checks.whole_number("channels", channels, 1, 3)
        if self.channels == 2:
            raise invalid("channels", channels, "1 or 3")
        self.random_crop = checks.boolean("random_crop", random_crop)
        self.random_flip = checks.boolean("random_flip", random_flip)
        allowed = max(1, len(source) // 100) if max_broken is None else max_broken
        self.max_broken = min(checks.whole_number("max_broken", allowed, 0), len(source) - 1)
        self.broken: dict[int, str] = {}  # index of a broken image -> its name and the error
        self._order = functools.lru_cache(2)(functools.partial(epoch_order, len(source), self.seed))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        vars(self).update(state)
        self._order = functools.lru_cache(2)(functools.partial(epoch_order, len(self.source), self.seed))

    def at(self, k: int) -> tuple[Tensor, int | None]:
        """Return sample `k`: uint8 [C, size, size] and its class, None without classes.

        A broken image is named in a warning, once, and replaced by another one.

        Raises:
            InvalidArgument: for a number outside 0..2^32-1.
            BrokenImage: if more than `max_broken` images are broken.
            AdmfastError: if the source can't be read.
        """
        broken_before = set(self.broken)
        sample = self.at_without_warnings(k)
        _warn_about({index: why for index, why in self.broken.items() if index not in broken_before})
        return sample

    def at_without_warnings(self, k: int) -> tuple[Tensor, int | None]:
        """Return sample `k` as `at` does, without warnings; broken images are only added to `broken`."""
        checks.whole_number("k", k, 0, MASK32)
        for index in self._candidates(k):
            try:
                image = self._crop_and_flip(convert_channels(self.source.decode(index), self.channels), k)
                break
            except BrokenImage as error:
                self.add_broken({index: str(error)})
        label = None if self.source.labels is None else self.source.labels[index]
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), label

    def add_broken(self, newly_broken: Mapping[int, str]) -> None:
        """Add broken images (index -> name and error). Raises BrokenImage if there are too many."""
        self.broken.update(newly_broken)
        if len(self.broken) > self.max_broken:
            first_errors = "; ".join(itertools.islice(self.broken.values(), 3))
            number = f"{len(self.broken)} of {len(self.source)} images are broken (limit {self.max_broken})"
            raise BrokenImage(f"{number}: {first_errors}")

    def _candidates(self, k: int) -> Iterator[int]:
        """Yield the index of sample `k`'s image, then of replacements, without images known to be broken."""
        count = len(self.source)
        epoch, position = divmod(k, count)
        replacements = (
            self._random_words(attempt, k, DataStream.REPLACEMENT)[0] * count >> 32
            for attempt in itertools.count()
        )
        for index in itertools.chain([int(self._order(epoch)[position])], replacements):
            if index not in self.broken:
                yield index

    def _crop_and_flip(self, image: Picture, k: int) -> UInt8:
        """Return an image, cropped and flipped as sample `k`."""
        *crop, flip = self._random_words(0, k, DataStream.CROP)
        if self.random_crop:
            words = iter(crop)
            cropped = random_crop(image, self.size, lambda count: next(words) * count >> 32)
        else:
            cropped = center_crop(image, self.size)
        return cropped[:, ::-1] if self.random_flip and flip < 2**31 else cropped

    def _random_words(self, element: int, row: int, stream: DataStream) -> tuple[int, ...]:
        key = (self.seed & MASK32, self.seed >> 32)
        return philox4x32_10((element, 0, row, int(stream)), key)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `count` images in an epoch, int64 [count] (see the head of the file)."""
    return permutation(count, seed, epoch, DataStream.ORDER)


def permutation(count: int, seed: int, row: int, stream: DataStream) -> Tensor:
    """Return 0..count-1, int64, sorted by the 63-bit keys of the counters (image, 0, row, stream)."""
    image = torch.arange(count, device="cpu")
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    counter = (image & MASK32, image >> 32, zero + row, zero + int(stream))
    r0, r1, _, _ = philox4x32_10(counter, (zero + (seed & MASK32), zero + (seed >> 32)))
    return ((r0 << 31) | (r1 >> 1)).argsort(stable=True)


@dataclass(frozen=True)
class ImageBatch:
    """Batch of samples.

    Attributes:
        sample_ids: number of every sample in the run.
        images: uint8 [N, C, size, size].
        labels: int64 [N]; None without classes.
    """

    sample_ids: tuple[int, ...]
    images: Tensor
    labels: Tensor | None


def iterate_batches(
    samples: Samples, id_batches: Iterable[Sequence[int]], workers: int = 0
) -> Iterator[ImageBatch]:
    """Yield the batches of samples with the numbers `id_batches`, in order, for any number of workers.

    Args:
        id_batches: the numbers of the samples of each batch; may be endless. Workers run a few batches ahead.
        workers: number of processes that each make whole batches; 0 makes them in this process. The state of
            torch's global generator doesn't change.

    Raises: see `Samples.at`; AdmfastError if a worker dies (usually because the system killed it for lack of
        memory).
    """
    checks.whole_number("workers", workers, 0)
    messages: Iterable[_WorkerMessage]
    if workers == 0:
        let_pillow_reuse_memory()
        messages = map(_BatchDataset(samples).__getitems__, id_batches)
    else:
        messages = DataLoader(
            _BatchDataset(samples),
            batch_sampler=id_batches,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise DataLoader draws from the global one
        )
    try:
        for message in messages:
            newly_broken = {
                index: why for index, why in message.broken.items() if index not in samples.broken
            }
            _warn_about(newly_broken)
            samples.add_broken(newly_broken)
            if message.error is not None:
                raise message.error
            assert message.batch is not None
            yield message.batch
    except RuntimeError as error:
        if not workers or isinstance(error, AdmfastError):
            raise
        raise AdmfastError(f"a worker that makes samples failed: {first_line(error)}") from error


@dataclass
class _WorkerMessage:
    """Message of a worker: a batch or an error, and the broken images that it knows."""

    batch: ImageBatch | None
    broken: dict[int, str]
    error: AdmfastError | None


class _BatchDataset(Dataset[_WorkerMessage]):
    """Dataset that gives a `DataLoader` whole batches of samples."""

    def __init__(self, samples: Samples) -> None:
        # A copy with its own `broken`: the loader finds new ones by comparing it with the caller's.
        self._samples = copy.copy(samples)
        self._samples.broken = dict(samples.broken)

    def __getitems__(self, sample_ids: Sequence[int]) -> _WorkerMessage:
        try:
            images, labels = zip(*map(self._samples.at_without_warnings, sample_ids), strict=True)
        # Returned as a value: DataLoader would raise a worker's exception with a traceback of many lines.
        except AdmfastError as error:
            return _WorkerMessage(None, self._samples.broken, error)
        classes = None if labels[0] is None else torch.tensor(labels, device="cpu")
        return _WorkerMessage(
            ImageBatch(tuple(sample_ids), torch.stack(images), classes), self._samples.broken, None
        )


def _start_worker(worker: int) -> None:
    let_pillow_reuse_memory()
    # Schedulers and Ctrl-C signal all processes. The workers must live until the run has saved its state.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a SIGTERM to all ends the workers too early
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    """End this worker on a SIGTERM from its parent; ignore one from another process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _identity(part: Any) -> Any:
    return part


def _warn_about(broken: Mapping[int, str]) -> None:
    for why in broken.values():
        warnings.warn(f"skipped a broken image: {why}", stacklevel=3)
