"""Tests of a gallery without a browser: which of a visitor's jobs go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("nicegui", reason="the page's packages aren't installed: pip install -e '.[app]'")
from nicegui import Client, ui

from admfast.app.gallery import Gallery
from admfast.app.jobs import MOST_WAITING, Job, JobQueue, State
from admfast.app.settings import Sampling
from tests.app.test_app_jobs import Work, wait_for


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    made = JobQueue()
    yield made
    made.close()


@pytest.fixture
def works(monkeypatch) -> list[Work]:
    """Return the list of the works of the jobs that galleries start, which sample nothing."""
    made: list[Work] = []

    def run(settings: Sampling, callback) -> torch.Tensor:
        made.append(Work())
        return made[-1](callback)

    monkeypatch.setattr(Sampling, "run", run)
    return made


def test_a_start_that_a_full_queue_refuses_leaves_the_running_job(models, queue, works):
    with Client(ui.page("")):
        gallery = Gallery(queue, "")
        gallery.start(lambda: Sampling(models["digits32"], seeds="0"))
        running = gallery.job
        wait_for(lambda: running.state is State.RUNNING and len(works) == 1)
        others = [queue.submit(Job("waits", 1, Work())) for _ in range(MOST_WAITING)]
        gallery.start(lambda: Sampling(models["digits32"], seeds="1"))
        assert gallery._error.text.startswith("the queue is full: 8 jobs wait")
        assert gallery.job is running and queue.jobs == [running, *others]
        steps = works[0].steps
        wait_for(lambda: works[0].steps > steps)
        # A job that waits makes room for the one that replaces it, and leaves a line of its own.
        last = Gallery(queue, "")
        last.job = others[-1]
        last.start(lambda: Sampling(models["digits32"], seeds="1"))
        assert last._error.text == "" and others[-1].state is State.CANCELLED
        assert queue.jobs == [running, *others[:-1], last.job]
        queue.cancel(others[0])
        gallery.start(lambda: Sampling(models["digits32"], seeds="1"))
        assert gallery._error.text == "" and gallery.job is not running
        wait_for(lambda: running.state is State.CANCELLED)
