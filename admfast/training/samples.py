"""The k-th sample of a training run: its image, crop and flip are a function of the run's seed and k alone.

Samples are counted through the whole run. Epoch e is the samples e*N .. e*N + N-1 and has every one of the N
images once, in an order of its own. All draws are words of Philox (`ops/update/noise.py`) under the seed:

    order of epoch e    counter (image, 0, e, ORDER): images by ascending 63-bit key from words 0 and 1
    crop and flip of k  counter (0, 0, k, CROP): words for length, top, left and flip
    what takes the place of a broken image   counter (attempt, 0, k, REPLACEMENT): word 0 chooses the image

One of n things is chosen by word * n >> 32. So any number of processes and workers makes the same samples,
and the place of a run is one number.
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
from admfast.files.images import UInt8
from admfast.ops.update import MASK32, philox4x32_10
from admfast.training.crops import Picture, center_crop, random_crop, reuse_memory, with_channels
from admfast.training.images import BrokenImage, Source


class DataStream(IntEnum):
    """Philox streams of the data: of 5 and up, which training has, those from 64 to 127."""

    ORDER = 64
    CROP = 65
    REPLACEMENT = 66
    HELD_OUT = 67


class Samples:
    """The samples of a run, by number: `samples.at(k)`.

    Args:
        source: where images come from.
        seed: of the run, 0..2^64-1.
        size: side of the samples in pixels.
        channels: 1 (colours become luminance) or 3 (grey is repeated).
        random_crop: cut as published, from 80 to 100 % of the shorter side; False cuts the centre.
        random_flip: mirror every second sample.
        max_broken: how many images of the source may be broken before it is an error; None allows 1 % of
            them, at least one. At least one must be whole.

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
        self.seed = checks.whole("seed", seed, 0, 2**64 - 1)
        self.size = checks.whole("size", size, 1)
        self.channels = checks.whole("channels", channels, 1, 3)
        if self.channels == 2:
            raise invalid("channels", channels, "1 or 3")
        self.random_crop = checks.switch("random_crop", random_crop)
        self.random_flip = checks.switch("random_flip", random_flip)
        allowed = max(1, len(source) // 100) if max_broken is None else max_broken
        self.max_broken = min(checks.whole("max_broken", allowed, 0), len(source) - 1)
        self.broken: dict[int, str] = {}  # index of a broken image -> its name and what is wrong
        self._order = functools.lru_cache(2)(functools.partial(epoch_order, len(source), self.seed))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        vars(self).update(state)
        self._order = functools.lru_cache(2)(functools.partial(epoch_order, len(self.source), self.seed))

    def at(self, k: int) -> tuple[Tensor, int | None]:
        """Return sample `k`: uint8 [C, size, size] and its class, None without classes.

        A broken image is named in a warning, once, and another one takes its place.

        Raises:
            InvalidArgument: for a number outside 0..2^32-1.
            BrokenImage: where more than `max_broken` images are broken.
            AdmfastError: for a source that can't be read.
        """
        known = set(self.broken)
        sample = self.draw(k)
        _warn_of({index: why for index, why in self.broken.items() if index not in known})
        return sample

    def draw(self, k: int) -> tuple[Tensor, int | None]:
        """As `at`, without a warning: what is broken is only added to `broken`."""
        checks.whole("k", k, 0, MASK32)
        for index in self._candidates(k):
            try:
                image = self._cut(with_channels(self.source.decode(index), self.channels), k)
                break
            except BrokenImage as error:
                self.add_broken({index: str(error)})
        label = None if self.source.labels is None else self.source.labels[index]
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), label

    def add_broken(self, found: Mapping[int, str]) -> None:
        """Remember broken images (index -> name and reason). Raises BrokenImage where they are too many."""
        self.broken.update(found)
        if len(self.broken) > self.max_broken:
            first = "; ".join(itertools.islice(self.broken.values(), 3))
            number = f"{len(self.broken)} of {len(self.source)} images are broken, {self.max_broken} may be"
            raise BrokenImage(f"{number}: {first}")

    def _candidates(self, k: int) -> Iterator[int]:
        """The image of sample `k`, then those that take its place, without images known to be broken."""
        count = len(self.source)
        epoch, place = divmod(k, count)
        replacements = (
            self._words(attempt, k, DataStream.REPLACEMENT)[0] * count >> 32 for attempt in itertools.count()
        )
        for index in itertools.chain([int(self._order(epoch)[place])], replacements):
            if index not in self.broken:
                yield index

    def _cut(self, image: Picture, k: int) -> UInt8:
        """The crop and flip of an image that is sample `k`."""
        *crop, flip = self._words(0, k, DataStream.CROP)
        if self.random_crop:
            words = iter(crop)
            cut = random_crop(image, self.size, lambda count: next(words) * count >> 32)
        else:
            cut = center_crop(image, self.size)
        return cut[:, ::-1] if self.random_flip and flip < 2**31 else cut

    def _words(self, element: int, row: int, stream: DataStream) -> tuple[int, ...]:
        key = (self.seed & MASK32, self.seed >> 32)
        return philox4x32_10((element, 0, row, int(stream)), key)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `count` images in an epoch, a permutation [count] int64 (see the file's head)."""
    return permutation(count, seed, epoch, DataStream.ORDER)


def permutation(count: int, seed: int, row: int, stream: DataStream) -> Tensor:
    """Return the images [count] int64 by ascending key of the counters (image, 0, row, stream)."""
    image = torch.arange(count, device="cpu")
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    counter = (image & MASK32, image >> 32, zero + row, zero + int(stream))
    r0, r1, _, _ = philox4x32_10(counter, (zero + (seed & MASK32), zero + (seed >> 32)))
    return ((r0 << 31) | (r1 >> 1)).argsort(stable=True)


@dataclass(frozen=True)
class ImageBatch:
    """Samples by their numbers.

    Attributes:
        ks: number of every sample in the run.
        images: uint8 [N, C, size, size].
        labels: int64 [N]; None without classes.
    """

    ks: tuple[int, ...]
    images: Tensor
    labels: Tensor | None


def loader(samples: Samples, ks: Iterable[Sequence[int]], workers: int = 0) -> Iterator[ImageBatch]:
    """Yield the batches of samples with the numbers `ks`, in order, whoever makes them.

    Args:
        ks: the numbers of every batch; without an end if need be. Workers take them a few batches ahead.
        workers: processes that each make whole batches; 0 makes them in this one. Torch's global generator
            is left as it is.

    Raises: as `Samples.at`; AdmfastError for a worker that ends before its time (as a rule, killed for want
        of memory).
    """
    checks.whole("workers", workers, 0)
    parts: Iterable[_Part]
    if workers == 0:
        reuse_memory()
        parts = map(_Maker(samples).__getitems__, ks)
    else:
        parts = DataLoader(
            _Maker(samples),
            batch_sampler=ks,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # else the global one is drawn from
        )
    try:
        for part in parts:
            fresh = {index: why for index, why in part.broken.items() if index not in samples.broken}
            _warn_of(fresh)
            samples.add_broken(fresh)
            if part.error is not None:
                raise part.error
            assert part.batch is not None
            yield part.batch
    except RuntimeError as error:
        if not workers or isinstance(error, AdmfastError):
            raise
        raise AdmfastError(f"a worker of the data: {first_line(error)}") from error


@dataclass
class _Part:
    """Message of a worker: a batch or why there is none, and what it knows to be broken."""

    batch: ImageBatch | None
    broken: dict[int, str]
    error: AdmfastError | None


class _Maker(Dataset[_Part]):
    """The samples as what a `DataLoader` asks for whole batches."""

    def __init__(self, samples: Samples) -> None:
        # What is broken is the caller's to tell: a copy finds it out by itself.
        self._samples = copy.copy(samples)
        self._samples.broken = dict(samples.broken)

    def __getitems__(self, ks: Sequence[int]) -> _Part:
        try:
            images, labels = zip(*map(self._samples.draw, ks), strict=True)
        # Sent as a value: an exception that crosses the processes becomes many lines of another type.
        except AdmfastError as error:
            return _Part(None, self._samples.broken, error)
        classes = None if labels[0] is None else torch.tensor(labels, device="cpu")
        return _Part(ImageBatch(tuple(ks), torch.stack(images), classes), self._samples.broken, None)


def _begin(worker: int) -> None:
    reuse_memory()
    # Schedulers and Ctrl-C tell all processes to end; the run saves first, and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a SIGTERM to all ends the workers too early
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    """End this worker at a SIGTERM of its parent; pass over those of others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_it_is(part: Any) -> Any:
    return part


def _warn_of(broken: Mapping[int, str]) -> None:
    for why in broken.values():
        warnings.warn(f"skipped a broken image: {why}", stacklevel=3)
