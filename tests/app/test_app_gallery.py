"""Tests of the page without a browser: which of a visitor's jobs go on, and that nothing of a visit stays."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("nicegui", reason="the page's packages aren't installed: pip install -e '.[app]'")
from nicegui import Client, core, ui
from nicegui.elements.upload_files import SmallFileUpload

from admfast.app.controls import ClassChoice
from admfast.app.gallery import Gallery
from admfast.app.jobs import MOST_WAITING, Job, JobQueue, State
from admfast.app.page import show_page
from admfast.app.settings import Sampling
from admfast.app.upload_tabs import EnlargeTab, RestoreTab
from admfast.app.uploads import Upload
from admfast.files.images import encode_png
from tests.app.test_app_jobs import PIXELS, Work, wait_for


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


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client(ui.page(""))
    yield made
    made.delete()


def test_a_start_that_a_full_queue_refuses_leaves_the_running_job(models, queue, works, client):
    with client:
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


@pytest.mark.parametrize("count, shown", [(10, "3"), (1000, "207"), (None, "")])
def test_a_class_can_be_chosen_for_a_person(client, count, shown):
    with client:
        choice = ClassChoice(all_text="each in turn")
        choice.show(count)
        if count is not None:
            choice.choose(shown)
        assert choice.value == shown
        if choice._field is not None:
            assert choice._field.value == shown
        pressed = [text for text, button in choice._buttons.items() if button.props["aria-pressed"] == "true"]
        assert pressed == [shown] * (count == 10)


def test_the_class_of_a_first_sample_without_a_choice_is_that_of_its_seed(models, queue, client, monkeypatch):
    monkeypatch.setattr(Sampling, "run", lambda settings, callback: PIXELS.expand(2, -1, -1, -1))
    with client:
        gallery = Gallery(queue, "")
        assert gallery.first_sample is None
        gallery.start(lambda: Sampling(models["digits32"], seeds="17,3"))
        wait_for(lambda: gallery.job.ended)
        assert (gallery.first_sample.label, gallery.first_sample.classes) == (7, 10)
        assert gallery.first_sample.picture == encode_png(PIXELS[0].numpy())


LARGE = (Client, Gallery, EnlargeTab, RestoreTab, Job, Upload)


def living() -> Counter[str]:
    """Count the objects that a visit makes and that hold something large."""
    gc.collect()
    return Counter(type(made).__name__ for made in gc.get_objects() if type(made) in LARGE)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        await asyncio.sleep(0.05)


async def visit(models, queue) -> None:
    """Open the page, sample, upload an image to both tabs that take one, and leave."""
    client = Client(ui.page(""))
    with client:
        show_page(models, queue)
    tabs = [made for made in gc.get_objects() if type(made) in (EnlargeTab, RestoreTab)]
    tabs = [tab for tab in tabs if tab.gallery.box in client.elements.values()]
    with client:
        tabs[0].gallery.start(lambda: Sampling(models["digits32"], seeds="0"))
        job = tabs[0].gallery.job
        await until(lambda: job.state is State.FINISHED)
    content = encode_png(PIXELS[0].numpy())
    for element in client.elements.values():
        if isinstance(element, ui.upload):
            await element.handle_uploads([SmallFileUpload("a.png", "image/png", content)])
    await until(lambda: all(tab.upload is not None for tab in tabs))
    client.delete()
    for tab in tabs:
        assert (tab.upload, tab._file, tab.gallery.job, tab.gallery._shown) == (None, None, None, [])


def test_nothing_large_stays_of_visits_that_ended(models, queue, monkeypatch):
    monkeypatch.setattr(Sampling, "run", lambda settings, callback: PIXELS)
    before = living()

    async def visits() -> None:
        monkeypatch.setattr(core, "loop", asyncio.get_running_loop())
        for _ in range(3):
            await visit(models, queue)
        await until(lambda: not living() - before)

    asyncio.run(visits())
