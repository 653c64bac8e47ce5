"""The tabs that take an image: one enlarges it, one fills in a part of it that is hidden."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from nicegui import run, ui
from nicegui.events import UploadEventArguments

from admfast.app import controls
from admfast.app.gallery import EMPTY, Gallery, Sample, data_uri
from admfast.app.jobs import JobQueue
from admfast.app.models import AppModel
from admfast.app.settings import Enlargement, Restoration, Settings
from admfast.app.uploads import MOST_BYTES, Upload, convert_upload
from admfast.errors import InvalidArgument, invalid
from admfast.files.images import encode_png

Receiver = Callable[[UploadEventArguments], Coroutine[Any, Any, None]]
FirstImage = Callable[[], Sample | None]  # returns the first image of the tab that samples
IN_TURN = "each in turn"


class UploadTab:
    """Controls at the left with the image as the network gets it, and at the right a gallery."""

    verb: str
    classes: controls.ClassChoice

    def __init__(self, models: Sequence[AppModel], queue: JobQueue, first_image: FirstImage) -> None:
        self.model, self._first_image = models[0], first_image
        self._file: tuple[str, bytes] | None = None
        self.upload: Upload | None = None
        with controls.division("tab"):
            with controls.division("controls"):
                controls.choose_model(models, self._choose_model)
                self._show_upload()
                with controls.division("preview") as self.preview:
                    self._picture = ui.element("img").classes("tile crisp")
                    self._picture.props["alt"] = "the image as the model gets it"
                self._note = ui.label().classes("note")
                self.add_controls()
                controls.plain_button(self.verb, self._start, "main")
            with controls.division("galleries"):
                self.gallery = Gallery(queue, f"Choose an image, then press {self.verb}.")
        self._choose_model(self.model)

    @property
    def galleries(self) -> list[Gallery]:
        """The gallery, in a list."""
        return [self.gallery]

    def close(self) -> None:
        """End the job and let go of its images and of the upload, as the page is closed."""
        self.gallery.close()
        self._file, self.upload = None, None

    def add_controls(self) -> None:
        """Add what this tab sets, `classes` among it."""
        raise NotImplementedError

    def side(self) -> int:
        """Return the side of the image that the model takes."""
        raise NotImplementedError

    def settings(self, upload: Upload) -> Settings:
        """Return what is set. Raises: InvalidArgument."""
        raise NotImplementedError

    def _show_upload(self) -> None:
        """Show the field for a file."""
        controls.heading("Image")
        ui.upload(
            label=f"Choose a file (up to {MOST_BYTES / 1e6:g} MB)",
            auto_upload=True,
            max_file_size=MOST_BYTES,
            on_upload=_weakly(self._receive),
            on_rejected=lambda: self.gallery.show_error(_too_large()),
        ).props("flat bordered accept=image/*").classes("wide")
        with controls.division("line"):
            controls.plain_button("Take the first sample", self._take_sample, "link")
            self._inverted = ui.switch("invert", on_change=self._convert).props("dense size=sm")

    async def _receive(self, event: UploadEventArguments) -> None:
        """Take an uploaded file."""
        if event.file.size() > MOST_BYTES:
            self.gallery.show_error(_too_large())
            return
        self._file = event.file.name, await event.file.read()
        event.sender.reset()  # type: ignore[attr-defined]
        await self._convert()

    async def _take_sample(self) -> None:
        """Take the first image of the tab that samples, and its class."""
        sample = self._first_image()
        if sample is None:
            self.gallery.show_error("there is no sampled image yet: sample one in the first tab")
            return
        self._file = "the sampled image", sample.picture
        if sample.label is not None and sample.classes == self.model.pipe.default_classes:
            self.classes.choose(str(sample.label))
        await self._convert()

    async def _convert(self) -> None:
        """Convert the file for the model, and show the result."""
        if self._file is None:
            return
        channels, inverted = self.model.pipe.config.in_channels, bool(self._inverted.value)
        try:
            self.upload = await run.io_bound(convert_upload, *self._file, self.side(), channels, inverted)
        except InvalidArgument as error:
            self.upload, self._file = None, None
            self.gallery.show_error(str(error))
            self._note.set_text("")
        else:
            self.gallery.show_error("")
            self._note.set_text(self.upload.note if self.upload else "")
        self._show_picture()

    def _show_picture(self) -> None:
        """Show the converted image, if there is one."""
        self.preview.set_visibility(self.upload is not None)
        source = EMPTY if self.upload is None else data_uri(encode_png(self.upload.image))
        self._picture.props["src"] = source

    def _choose_model(self, model: AppModel) -> None:
        """Offer what a model has, and forget the image, which was converted for another."""
        self.model, self._file, self.upload = model, None, None
        self.classes.show(model.pipe.default_classes)
        self._note.set_text(f"The model takes {self.side()}x{self.side()} pixels; your image is converted.")
        self._show_picture()

    def _start(self) -> None:
        """Start the job."""
        self.gallery.start(lambda: self.settings(self._required_upload()))

    def _required_upload(self) -> Upload:
        if self.upload is None:
            raise invalid("upload", None, "an image: choose a file first")
        return self.upload


class EnlargeTab(UploadTab):
    """The tab that enlarges an image."""

    verb = "Enlarge"

    def add_controls(self) -> None:
        self.classes = controls.ClassChoice(all_text=IN_TURN)
        with controls.division("pair"):
            with controls.division("group"):
                self.steps = controls.steps_field(25)
            with controls.division("group"):
                self.solver = controls.solver_field()
        self.seed = controls.text_field("Seed", "0")

    def side(self) -> int:
        return self.model.pipe.low_res_size or self.model.pipe.spatial[0] // 4

    def settings(self, upload: Upload) -> Enlargement:
        return Enlargement(
            self.model,
            image=upload.image,
            seeds=self.seed.value,
            classes=self.classes.value,
            steps=self.steps.value,
            solver=self.solver.value,
        )


class RestoreTab(UploadTab):
    """The tab that hides a box of an image and fills it in."""

    verb = "Restore"

    def add_controls(self) -> None:
        with self.preview:
            self._hidden = controls.division("hidden-box").props("aria-label=hidden")
        self._rows, self._columns = (self._range(name) for name in ("Hidden rows", "Hidden columns"))
        self.classes = controls.ClassChoice(all_text=IN_TURN)
        with controls.division("pair"):
            with controls.division("group"):
                self.steps = controls.steps_field(50)
            with controls.division("group"):
                self.seeds = controls.text_field("Seeds", "0-3")
        self.strength = controls.labelled_slider("Strength", 0.5, 2, 0.05)

    def _range(self, label: str) -> ui.range:
        """Return a slider with two ends, for the rows or columns to hide."""
        side = self.side()
        controls.heading(label)
        value: dict[str, float] = {"min": side * 5 // 16, "max": side * 11 // 16}
        return ui.range(min=0, max=side, value=value, on_change=self._show_box).props(
            f'label aria-label="{label.lower()}"'
        )

    def _choose_model(self, model: AppModel) -> None:
        super()._choose_model(model)
        side = self.side()
        for ends in (self._rows, self._columns):
            ends.props["max"] = side
            ends.set_value({"min": side * 5 // 16, "max": side * 11 // 16})
        self._show_box()

    def _show_box(self, _: Any = None) -> None:
        """Draw the box over the image."""
        rows, columns, percent = self._rows.value, self._columns.value, 100 / self.side()
        if not (isinstance(rows, dict) and isinstance(columns, dict)):
            return  # only a message that the page itself doesn't send
        sides = {"top": rows["min"], "left": columns["min"]}
        sides |= {"height": rows["max"] - rows["min"], "width": columns["max"] - columns["min"]}
        self._hidden.style("; ".join(f"{name}: {value * percent:.2f}%" for name, value in sides.items()))

    def side(self) -> int:
        return self.model.pipe.spatial[0]

    def settings(self, upload: Upload) -> Restoration:
        rows, columns = self._rows.value, self._columns.value
        return Restoration(
            self.model,
            image=upload.image,
            box=(rows["min"], columns["min"], rows["max"], columns["max"]),
            seeds=self.seeds.value,
            classes=self.classes.value,
            steps=self.steps.value,
            strength=self.strength.value,
        )


def _weakly(method: Receiver) -> Receiver:
    """Return a function that calls a method without holding its object.

    FastAPI keeps the last thousands of routes' functions in a cache of its own. NiceGUI makes such a function
    for each upload element, and it holds the element's handler for that long.
    """
    reference = weakref.WeakMethod(method)

    async def receive(event: UploadEventArguments) -> None:
        called = reference()
        if called is not None:
            await called(event)

    return receive


def _too_large() -> str:
    """Return the line about a file that is too large, or no image, as the browser finds it."""
    return str(invalid("upload", "the file", f"an image of at most {MOST_BYTES / 1e6:g} MB"))
