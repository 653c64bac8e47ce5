"""The page: its head, its tabs, and the queue that all visitors share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nicegui import ui

from admfast.app.controls import division, plain_button
from admfast.app.gallery import Sample
from admfast.app.jobs import Job, JobQueue, State
from admfast.app.models import AppModel
from admfast.app.sample_tab import SampleTab
from admfast.app.upload_tabs import EnlargeTab, RestoreTab, UploadTab

REFRESH = 0.15  # seconds
STYLE = Path(__file__).with_name("page.css")


def show_page(models: Mapping[str, AppModel], queue: JobQueue) -> None:
    """Build the page for a visitor. When it is closed, its jobs and images end with it."""
    ui.add_css(STYLE.read_text(encoding="utf-8"))
    ui.colors(primary="#3d5a80")
    pipe = next(iter(models.values())).pipe
    with ui.element("header").classes("head"):
        ui.label("admfast").classes("title")
        ui.label(f"{pipe.device}, {pipe.precision}").classes("note")
    with ui.element("main").classes("main-part"):
        tabs = _show_tabs(list(models.values()), queue)
        queue_view = QueueView(queue)

    def refresh() -> None:
        for tab in tabs:
            for gallery in tab.galleries:
                gallery.refresh()
        queue_view.refresh()

    def leave() -> None:
        for tab in tabs:
            tab.close()

    ui.timer(REFRESH, refresh)
    ui.context.client.on_delete(leave)


def _show_tabs(models: list[AppModel], queue: JobQueue) -> list[SampleTab | UploadTab]:
    """Show a tab for each use that a model has; return the tabs."""
    makers = [model for model in models if not model.enlarges]
    with ui.tabs().props("align=left no-caps dense").classes("tabs") as tabs:
        names = {name: ui.tab(name) for name in ("Sample", "Enlarge", "Restore")}
    with ui.tab_panels(tabs, value=names["Sample"], animated=False, keep_alive=True).classes("panels"):
        with ui.tab_panel(names["Sample"]):
            sample = SampleTab(makers, queue)

        def first_image() -> Sample | None:
            return sample.galleries[0].first_sample

        with ui.tab_panel(names["Enlarge"]):
            enlarge = EnlargeTab([model for model in models if model.enlarges], queue, first_image)
        with ui.tab_panel(names["Restore"]):
            restore = RestoreTab([model for model in makers if model.restores], queue, first_image)
    return [sample, enlarge, restore]


class QueueView:
    """The jobs of the device, each with its place and a button that cancels it."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._listed: list[tuple[int, State]] | None = None
        with ui.element("section").classes("queue"):
            self._summary = ui.label().classes("heading")
            self._rows = division("rows")
        self.refresh()

    def refresh(self) -> None:
        """List the jobs anew if one came, began or ended."""
        jobs = self._queue.jobs
        listed = [(job.number, job.state) for job in jobs]
        if listed == self._listed:
            return
        self._listed = listed
        count = "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"
        self._summary.set_text(f"Queue: {count}" if jobs else "Queue: empty")
        self._rows.clear()
        with self._rows:
            for place, job in enumerate(jobs):
                self._show_row(place, job)

    def _show_row(self, place: int, job: Job) -> None:
        with division("row-line"):
            ui.label("runs" if job.state is State.RUNNING else f"waits, number {place}").classes("note")
            ui.label(job.title).classes("job")
            plain_button("Cancel", lambda: self._queue.cancel(job), "link")
