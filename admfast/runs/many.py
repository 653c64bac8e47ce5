"""Sample many images in shards, by any number of processes that share a folder and nothing else."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from admfast.errors import OutputError, invalid
from admfast.files.atomic import check_writable, folder_removed_if_empty
from admfast.files.paths import user_path
from admfast.interrupts import delay_signals
from admfast.runs.describe import make_manifest
from admfast.runs.folder import check_no_training_run, find_sample_files
from admfast.runs.leases import Lease, Leases
from admfast.runs.manifest import BALANCED, RANDOM, Manifest, create_manifest, read_manifest
from admfast.runs.progress import ProgressBar, step_shares
from admfast.runs.shards import LEASES, ShardFiles, shard_name
from admfast.sampling.loop import Progress, RunRecord, run
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import Plan, plan
from admfast.sampling.request import LARGEST_SEED, SampleRequest

# By default a shard has the least number of batches that hold this many images, or this part of the run:
# at the end, when there are fewer shards left than processes, at most the time of one shard is lost.
SHARD_IMAGES, SHARD_PART = 1000, 1 / 200
MOST_IMAGES = 10**9  # more is taken for a mistake
POLL = 1.0  # seconds between two looks at the work of others
ADVICE = "give another folder, or remove this one"


@dataclass
class ShardedRun:
    """This process's part of a run in shards.

    Attributes:
        pipe: the pipeline. request: settings of the images; its seeds and classes are not used.
        out: folder of the run. num: number of images. first_seed: seed of the first; the others follow.
        classes: "balanced", "random", or a list that is repeated.
        shard_size: images of a shard, a multiple of the batch size; None chooses, or takes the run's.
        rank, processes: number of this process and of all, if known: each begins at another shard.
        shows_bar: show a progress bar.
        leases: made for the folder by default.
        made: number of images that this process made. begun: the folder is this run's.
    """

    pipe: Pipeline
    request: SampleRequest
    out: Path
    num: int
    first_seed: int = 0
    classes: str | Sequence[int] = BALANCED
    shard_size: int | None = None
    rank: int = 0
    processes: int = 1
    shows_bar: bool = True
    leases: Leases | None = None
    poll: float = POLL
    made: int = 0
    begun: bool = False
    _record: RunRecord = field(default_factory=RunRecord)
    _lease: Lease | None = None

    def __post_init__(self) -> None:
        self.out = user_path("out", self.out)
        if not 1 <= self.num <= MOST_IMAGES:
            raise invalid("num", self.num, f"1 to {MOST_IMAGES}")
        if self.first_seed + self.num - 1 > LARGEST_SEED:
            raise invalid("seeds", self.first_seed, f"a first seed of at most {LARGEST_SEED - self.num + 1}")
        if self.shard_size is not None and self.shard_size < 1:
            raise invalid("shard", self.shard_size, "1 or more")
        self._started = time.monotonic()

    def check(self) -> Plan:
        """Check settings and folder before anything is written; return the plan of one image."""
        one_image = self._request_of([self.first_seed], self._first_class())
        one_plan = plan(one_image, self.pipe)
        self._check_folder()
        found = read_manifest(self.out)
        self.manifest = self._new_manifest(one_plan, found)
        if found is not None:
            found.check_same(self.manifest, self.out, ADVICE)
        self._shares = step_shares(one_plan)
        return one_plan

    def _first_class(self) -> list[int] | None:
        """Return a class for the check of one image: of a list the largest, which may be too large."""
        if isinstance(self.classes, str):
            if self.classes == RANDOM and self.pipe.num_classes is None:
                raise invalid("classes", self.classes, f"{self.pipe.name} has no classes")
            return None
        return [max(self.classes)]

    def _check_folder(self) -> None:
        """Raise OutputError for a file, a training run's folder, or samples of older versions."""
        check_no_training_run(self.out)
        if read_manifest(self.out) is None and (files := find_sample_files(self.out)):
            contents = f"holds {len(files)} files of samples without a manifest"
            raise OutputError(f"out={str(self.out)!r}: {contents}; {ADVICE}")

    def _new_manifest(self, one_plan: Plan, found: Manifest | None) -> Manifest:
        """Return the manifest of this request; sizes that aren't given are those of the folder's run."""
        batch_size = one_plan.batch_size
        if self.request.batch_size is None and found is not None:
            batch_size = found.batch_size
        shard_size = self.shard_size or (found.shard_size if found is not None else None)
        if shard_size is None:
            least = min(SHARD_IMAGES, self.num * SHARD_PART)
            shard_size = max(1, math.ceil(least / batch_size)) * batch_size
        if self.shard_size is not None and shard_size % batch_size:
            raise invalid("shard", shard_size, f"a multiple of the batch size, {batch_size}")
        return make_manifest(
            self.pipe, self.request, one_plan, seeds=range(self.first_seed, self.first_seed + self.num),
            classes=self.classes, batch_size=batch_size, shard_size=shard_size, files="npz",
        )  # fmt: skip

    def _request_of(
        self, seeds: Sequence[int], classes: Sequence[int] | None, **changes: Any
    ) -> SampleRequest:
        return replace(self.request, seeds=seeds, classes=classes, **changes)

    def finished_images(self) -> int:
        """Return how many images of the run are finished, by all processes."""
        return ShardFiles(self.out, self.manifest).finished_images()

    def run(self) -> None:
        """Work on shards until all are finished, by this process or by others.

        Raises OutputError if a file can't be written, also if another request came first into the folder.
        """
        with folder_removed_if_empty(self.out):
            check_writable(self.out / "file")
            create_manifest(self.out, self.manifest).check_same(self.manifest, self.out, ADVICE)
            self.files, self.begun = ShardFiles(self.out, self.manifest), True
            if self.leases is None:
                self.leases = Leases(self.out / LEASES)
            try:
                with ProgressBar(self.num, self.finished_images(), self.shows_bar) as self._bar:
                    self._work_until_finished()
            finally:
                if self._lease is not None:  # a signal came before its shard was begun, or within its release
                    self._lease.release()
            self.files.remove_empty_folders()

    def _work_until_finished(self) -> None:
        """Take one shard after another; wait while other processes work on all that are left."""
        count = self.manifest.shards
        first = self.rank * count // self.processes
        while len(done := self.files.finished_shards()) < count:
            self._bar.move_to(self.finished_images())
            took_one = False
            for shard in itertools.chain(range(first, count), range(first)):
                if shard not in done and self._take(shard):
                    took_one = True
                    break
            if not took_one:
                time.sleep(self.poll)

    def _take(self, shard: int) -> bool:
        """Work on a shard, unless another process does; return whether it could be taken."""
        assert self.leases is not None
        with delay_signals():  # so that a lease that is made is released
            lease = self._lease = self.leases.acquire(shard_name(shard), self._report)
        if lease is None:
            return False
        try:
            # Another process may have finished it since the folder was listed.
            if shard in self.files.finished_shards():
                self.files.remove_parts(shard)
            else:
                self._make(shard, lease)
        finally:
            lease.release()
            self._lease = None
        return True

    def _report(self) -> dict[str, Any]:
        """Return what the lease says about this process."""
        return {"images": self.made, "seconds": round(time.monotonic() - self._started, 3)}

    def _make(self, shard: int, lease: Lease) -> None:
        """Sample the batches of a shard that are missing, then write the shard."""
        batches = self.manifest.batches(shard)
        try:
            for _ in range(3):  # again only if a batch's file is damaged
                for number in sorted(set(range(len(batches))) - self.files.finished_batches(shard)):
                    if lease.is_lost():
                        return
                    self._make_batch(shard, number, batches[number])
                if lease.is_lost() or self.files.finish(shard):
                    return
        except OutputError:
            # Whoever took the lease over, as from a process that was suspended, may remove what this writes.
            if not lease.is_lost() and shard not in self.files.finished_shards():
                raise
            return
        raise OutputError(f"{self.files.part(shard, 0).parent}: its files are damaged as soon as written")

    def _make_batch(self, shard: int, number: int, images: range) -> None:
        """Sample a batch and write it."""
        labels = self.manifest.labels_of(images)
        request = self._request_of(
            self.manifest.seeds_of(images).tolist(),
            None if labels is None else labels.tolist(),
            callback=self._advance,
            batch_size=self.manifest.batch_size,
        )
        pixels = run(plan(request, self.pipe), self._record).numpy()
        with delay_signals():
            self.files.write_part(shard, number, pixels)
            self.made += len(images)

    def _advance(self, progress: Progress) -> None:
        self._bar.advance(progress, self._shares)
