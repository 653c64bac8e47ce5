"""A gallery of the page: the images of one job as they form, and the lines that make them again."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nicegui import ui
from nicegui.element import Element

from admfast.app.controls import copied_text, division, plain_button
from admfast.app.jobs import Job, JobQueue, State
from admfast.app.settings import Settings
from admfast.errors import AdmfastError
from admfast.files.images import encode_png

CRISP_SIDE = 64  # pixels: images up to this side are enlarged without blending
EMPTY = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"  # one clear pixel


@dataclass(frozen=True)
class Sample:
    """An image of a gallery as a PNG, its class, and how many classes its model has."""

    picture: bytes
    label: int | None
    classes: int | None


class Gallery:
    """The images of the job that was started last. All its jobs end when the page is closed."""

    def __init__(self, queue: JobQueue, hint: str) -> None:
        self._queue = queue
        self.job: Job | None = None
        self._settings: Settings | None = None
        self._captions: list[str] = []
        self._images: list[Element] = []
        self._shown: list[bytes | None] = []
        with ui.element("section").classes("gallery") as self.box:
            self._summary = ui.label()
            with division("line"):
                self._status = ui.label(hint).classes("status")
                self._cancel = plain_button("Cancel", self.cancel, "link")
            self._bar = ui.linear_progress(value=0, show_value=False, size="3px").props("instant-feedback")
            self._error = ui.label().classes("error").props("role=alert")
            self._tiles = division("tiles")
            self._lines = division("lines")
        self._error.set_visibility(False)
        self.refresh()

    def start(self, make_settings: Callable[[], Settings]) -> None:
        """Start a job in place of the last one. If it is refused, a line says so and the last goes on."""
        try:
            settings = make_settings()
            settings.check()
            stages = 1 if settings.model.pipe.upsampler is None else 2
            job = Job(settings.title, len(settings.seed_list), settings.run, stages)
            self._queue.submit(job, replaced=self.job)
        except AdmfastError as error:
            self.show_error(str(error))
            return
        self.show_error("")
        self.job, self._settings = job, settings
        self._summary.set_text(settings.summary)
        self._show_tiles(settings)
        self._show_lines(settings)
        self.refresh()

    def show_error(self, text: str) -> None:
        """Show one line about what went wrong; "" hides it."""
        self._error.set_text(text)
        self._error.set_visibility(bool(text))

    def cancel(self) -> None:
        """Cancel the job, if it runs or waits."""
        if self.job is not None:
            self._queue.cancel(self.job)

    def close(self) -> None:
        """Cancel the job and let go of it and of its pictures."""
        self.cancel()
        self.job, self._settings, self._shown = None, None, []

    @property
    def first_sample(self) -> Sample | None:
        """The first image, once the job has finished."""
        job, settings = self.job, self._settings
        if job is None or settings is None or job.state is not State.FINISHED:
            return None
        picture, classes = job.pictures[0], settings.image_classes
        label = None if classes is None else classes[0]
        return None if picture is None else Sample(picture, label, settings.model.pipe.default_classes)

    def refresh(self) -> None:
        """Show how the job stands now, and the images that changed."""
        job = self.job
        self._cancel.set_visibility(job is not None and not job.ended)
        runs = job is not None and job.state is State.RUNNING
        self._bar.classes(**({"remove": "unseen"} if runs else {"add": "unseen"}))
        if job is None:
            return
        if (text := self._status_text(job)) != self._status.text:
            self._status.set_text(text)
            if job.error:
                self.show_error(job.error)
        self._bar.set_value(job.share)
        for i, picture in enumerate(job.pictures):
            if picture is not None and picture is not self._shown[i]:
                self._images[i].props["src"] = data_uri(picture)
                self._images[i].classes(remove="old")
                self._shown[i] = picture

    def _status_text(self, job: Job) -> str:
        """Return one line on where the job is."""
        if job.state is State.WAITING:
            return f"waiting, number {self._queue.position(job)} in the queue"
        if job.state is State.RUNNING:
            return job.step or "begins"
        if job.state is State.FINISHED:
            return f"finished in {job.seconds:.1f} s"
        return f"{job.state.value} at {job.step}" if job.step else job.state.value

    def _show_tiles(self, settings: Settings) -> None:
        """Make a tile for each image; of the same seeds and classes, faded ones stay until they change."""
        self._shown = [None] * len(settings.seed_list)
        captions = [settings.model.name, *settings.captions]
        if captions == self._captions:
            for image in self._images:
                image.classes("old")
            return
        self._captions, self._images = captions, []
        crisp = " crisp" if max(settings.model.pipe.spatial) <= CRISP_SIDE else ""
        self._tiles.clear()
        with self._tiles:
            for caption in settings.captions:
                with ui.element("figure"):
                    image = ui.element("img").classes(f"tile{crisp}")
                    image.props["src"], image.props["alt"] = EMPTY, caption
                    with ui.element("figcaption"):
                        for part in caption.split(" · "):
                            ui.label(part)
                self._images.append(image)

    def _show_lines(self, settings: Settings) -> None:
        """Show the lines that make these images again, and the files that they read."""
        self._lines.clear()
        with self._lines:
            if command := settings.command_line():
                copied_text("Command line", [f"{part} " for part in command])
            copied_text("Python", [settings.python_lines()])
            for name, image in settings.files.items():
                content = encode_png(image)
                save = partial(ui.download.content, content, name)
                plain_button(f"Save {name}, which these lines read", save, "link")


def data_uri(picture: bytes) -> str:
    """Return a PNG as the address that shows it."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
