"""Tests of the page's queue: order, progress, cancelling, a full queue, and work that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from admfast.app.jobs import MOST_WAITING, Job, JobQueue, State
from admfast.errors import InvalidArgument, Unavailable
from admfast.sampling.load import load
from admfast.sampling.loop import Progress

PIXELS = torch.zeros(1, 4, 4, 1, dtype=torch.uint8)


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    made = JobQueue()
    yield made
    made.close()


def progress(done: int, total: int, count: int = 1, first: int = 0, stage: str = "base") -> Progress:
    x = torch.zeros(count, 1, 4, 4)
    return Progress(done, total, total - done, 0.0, x, x, first, stage)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


class Work:
    """Work that makes steps until it is let go, or for 5 s; it remembers how many of its kind ran at once."""

    running, most = 0, 0

    def __init__(self) -> None:
        self.let_go, self.steps = threading.Event(), 0

    def __call__(self, callback):
        Work.running += 1
        Work.most = max(Work.most, Work.running)
        try:
            while not self.let_go.wait(0.005) and self.steps < 1000:
                self.steps += 1
                callback(progress(1, 2))
        finally:
            Work.running -= 1
        return PIXELS


def test_jobs_run_in_order_one_at_a_time(queue):
    works = [Work() for _ in range(3)]
    jobs = [queue.submit(Job(f"{i}", 1, work)) for i, work in enumerate(works)]
    wait_for(lambda: jobs[0].state is State.RUNNING)
    assert [queue.position(job) for job in jobs] == [0, 1, 2] and queue.jobs == jobs
    for job, work in zip(jobs, works, strict=True):
        wait_for(lambda work=work: work.steps > 0)
        work.let_go.set()
        wait_for(lambda job=job: job.ended)
    assert [job.state for job in jobs] == [State.FINISHED] * 3 and Work.most == 1 and queue.jobs == []


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_at_its_step(queue):
    first, second, third = Work(), Work(), Work()
    jobs = [queue.submit(Job("job", 1, work)) for work in (first, second, third)]
    wait_for(lambda: first.steps > 0)
    queue.cancel(jobs[1])
    assert jobs[1].state is State.CANCELLED and queue.position(jobs[2]) == 1
    queue.cancel(jobs[0])
    wait_for(lambda: third.steps > 0)
    assert jobs[0].state is State.CANCELLED and second.steps == 0
    third.let_go.set()
    wait_for(lambda: jobs[2].state is State.FINISHED)


def test_ten_requests_at_once_fill_the_queue_and_break_nothing(queue):
    works = [Work() for _ in range(MOST_WAITING + 1)]
    queue.submit(Job("runs", 1, works[0]))
    wait_for(lambda: works[0].steps > 0)
    for work in works[1:]:
        queue.submit(Job("waits", 1, work))
    with pytest.raises(Unavailable, match=f"the queue is full: {MOST_WAITING}"):
        queue.submit(Job("too many", 1, Work()))
    for work in works:
        work.let_go.set()
    wait_for(lambda: queue.jobs == [])


@pytest.mark.parametrize(
    "error, line",
    [(InvalidArgument("steps=0: 1 or more"), "steps=0: 1 or more"), (RuntimeError("one\ntwo"), "one")],
)
def test_an_error_is_one_line_and_the_next_job_runs(queue, error, line):
    def fail(callback):
        raise error

    failed = queue.submit(Job("fails", 1, fail))
    good = queue.submit(Job("works", 1, lambda callback: PIXELS))
    wait_for(lambda: good.ended)
    assert (failed.state, failed.error, good.state) == (State.FAILED, line, State.FINISHED)


def test_images_appear_batch_by_batch_in_a_cascade_of_two_stages():
    seen = []

    def work(callback):
        for first in (0, 2):
            for stage in ("base", "upsampler"):
                for done in (1, 2):
                    callback(progress(done, 2, 2, first, stage))
                    seen.append((job.share, job.step, sum(p is not None for p in job.pictures)))
        return PIXELS.expand(4, -1, -1, -1)

    job = Job("cascade", 4, work, stages=2)
    job.run()
    assert [share for share, _, _ in seen] == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
    assert seen[3][1:] == ("step 2 of 2 of the upsampler", 2) and seen[-1][2] == 4
    assert all(picture.startswith(b"\x89PNG") for picture in job.pictures)


def test_a_cancelled_sample_leaves_the_pipeline_as_it_was(queue):
    pipe = load("digits32", device="cpu", precision="fp32")
    settings = {"classes": [3], "seeds": [0, 1], "steps": 8, "solver": "ddim"}
    wanted = pipe.sample(**settings)
    at_step_two = threading.Event()

    def work(callback):
        def step(at: Progress) -> None:
            if at.done == 2:
                at_step_two.set()
                wait_for(job._cancelled.is_set)
            assert at.done <= 2, "a step after the one that was cancelled"
            callback(at)

        return pipe.sample(**settings, callback=step)

    job = Job("cancelled", 2, work)
    queue.submit(job)
    assert at_step_two.wait(20)
    queue.cancel(job)
    wait_for(lambda: job.ended)
    assert job.state is State.CANCELLED and job.step == "step 1 of 8"
    assert pipe.sample(**settings).equal(wanted)
