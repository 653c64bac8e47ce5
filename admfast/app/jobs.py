"""Jobs of the page: a queue for a device, which runs one at a time, in order; each can be cancelled."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from admfast.errors import AdmfastError, Unavailable, first_line
from admfast.files.images import encode_png
from admfast.files.levels import to_uint8
from admfast.sampling.loop import Callback, Progress

LOG = logging.getLogger("admfast")
MOST_WAITING = 8
SHOWN_EVERY = 0.1  # seconds between two pictures of the same job
SHOWN_SIDE = 128  # pixels: larger predictions are shown thinned out until the images are finished
_NUMBERS = itertools.count(1)


class State(StrEnum):
    """State of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Cancelled(Exception):
    """A person cancelled the job that is running."""


class Job:
    """Work that the queue runs in its own thread; the page reads the attributes at any time.

    count, stages: of the images, and of the samples that follow one another for each (2 in a cascade).
    number: counts the jobs. title: one line for the queue. state, error: how it stands, and the line that
    says why it failed. share, step: how far it is, 0 to 1 and as text. pictures: a PNG for each image, None
    before there is one. seconds: how long it ran.
    """

    def __init__(self, title: str, count: int, work: Callable[[Callback], Tensor], stages: int = 1) -> None:
        self.number, self.title, self._work, self._stages = next(_NUMBERS), title, work, stages
        self.state, self.error = State.WAITING, ""
        self.share, self.step, self.seconds = 0.0, "", 0.0
        self.pictures: list[bytes | None] = [None] * count
        self._cancelled, self._shown_at = threading.Event(), 0.0

    @property
    def ended(self) -> bool:
        """True once the job will not change any more."""
        return self.state not in (State.WAITING, State.RUNNING)

    def cancel(self) -> None:
        """End the job: at once if it waits, after the step at which it is if it runs."""
        self._cancelled.set()
        if self.state is State.WAITING:
            self.state = State.CANCELLED

    def run(self) -> None:
        """Do the work; every error becomes the state and its line."""
        self.state, begun, state = State.RUNNING, time.perf_counter(), State.FAILED
        try:
            self._show(0, self._work(self._after_step).numpy())
            self.share, state = 1.0, State.FINISHED
        except Cancelled:
            state = State.CANCELLED
        except AdmfastError as error:
            self.error = first_line(error)
        except Exception as error:
            LOG.exception("a job of the page failed")
            self.error = first_line(error)
        self.seconds = time.perf_counter() - begun
        self.state = state

    def _after_step(self, progress: Progress) -> None:
        """Note how far a sample is, show its x_0 now and then, and end it if it is cancelled."""
        if self._cancelled.is_set():
            raise Cancelled
        stage_share, self.step = progress.done / progress.total, f"step {progress.done} of {progress.total}"
        if progress.stage != "base":
            stage_share, self.step = stage_share + 1, f"{self.step} of the upsampler"
        images = progress.first + len(progress.x0) * stage_share / self._stages
        self.share = images / len(self.pictures)
        is_last = progress.done == progress.total
        if is_last or time.perf_counter() - self._shown_at >= SHOWN_EVERY:
            thinned = -(-max(progress.x0.shape[2:]) // SHOWN_SIDE)
            x_0 = progress.x0[..., ::thinned, ::thinned].detach()
            self._show(progress.first, to_uint8(torch.nan_to_num(x_0)).cpu().numpy())
            self._shown_at = time.perf_counter()

    def _show(self, first: int, images: np.ndarray) -> None:
        """Make the pictures of images first, first + 1, ..."""
        self.pictures[first : first + len(images)] = map(encode_png, images)


class JobQueue:
    """The jobs of one device. They run one at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: list[Job] = []  # the running one first
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="admfast jobs", daemon=True)
        self._thread.start()

    def submit(self, job: Job, replaced: Job | None = None) -> Job:
        """Append a job, and cancel the one that it replaces. Raises: Unavailable if too many others wait.

        If the new job is refused, the other one goes on.
        """
        with self._changed:
            waiting = sum(other.state is State.WAITING for other in self._jobs if other is not replaced)
            if waiting >= MOST_WAITING:
                raise Unavailable(f"the queue is full: {waiting} jobs wait; cancel one, or try again later")
            self._jobs.append(job)
            if replaced is not None:
                self.cancel(replaced)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job; one that waits leaves the queue at once."""
        with self._changed:
            job.cancel()
            self._jobs = [other for other in self._jobs if not other.ended]

    @property
    def jobs(self) -> list[Job]:
        """The jobs that run or wait, in order."""
        with self._changed:
            return [job for job in self._jobs if not job.ended]

    def position(self, job: Job) -> int:
        """Return how many jobs come before this one, 0 for the one that runs or has ended."""
        jobs = self.jobs
        return jobs.index(job) if job in jobs else 0

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.cancel()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        """Run jobs until the queue is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._jobs)
                if self._closed:
                    return
                job = self._jobs[0]
                job.state = State.RUNNING
            job.run()
            with self._changed:
                self._jobs = [other for other in self._jobs if not other.ended]
            del job  # not to hold its pictures until the next one comes
