"""The tab that samples images, with one setting or with two side by side on the same seeds."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from admfast.app import controls
from admfast.app.gallery import Gallery
from admfast.app.jobs import JobQueue
from admfast.app.models import AppModel
from admfast.app.settings import Sampling


class SampleTab:
    """Controls at the left, and at the right a gallery, or two."""

    def __init__(self, models: Sequence[AppModel], queue: JobQueue) -> None:
        self._model = models[0]
        with controls.division("tab"):
            with controls.division("controls"):
                controls.choose_model(models, self._choose_model)
                self._classes = controls.ClassChoice(self.start)
                self._seeds = controls.text_field("Seeds", "0-7")
                self._compared = ui.switch("Compare two settings", on_change=self._compare)
                self._sides = [Side("A", self, 2.0), Side("B", self, 5.0)]
                controls.plain_button("Sample", self.start, "main")
            with controls.division("galleries"):
                hint = "Choose a class, or press Sample."
                self.galleries = [Gallery(queue, hint), Gallery(queue, "Press Sample.")]
        self._choose_model(self._model)
        self._compare()

    def close(self) -> None:
        """End the jobs and let go of their images, as the page is closed."""
        for gallery in self.galleries:
            gallery.close()

    def start(self) -> None:
        """Sample with every setting that is shown."""
        for side in self._sides:
            self.start_side(side)

    def start_side(self, side: Side) -> None:
        """Sample with one setting, if it is shown."""
        index = self._sides.index(side)
        if index == 0 or self._compared.value:
            self.galleries[index].start(lambda: self._settings(side))

    def _settings(self, side: Side) -> Sampling:
        """Return what is set. Raises: InvalidArgument."""
        compared = self._compared.value
        return Sampling(
            self._model,
            folder=side.folder if compared else "out/",
            seeds=self._seeds.value,
            classes=self._classes.value,
            steps=side.steps.value,
            solver=side.solver.value,
            guidance=side.guidance.value,
        )

    def _choose_model(self, model: AppModel) -> None:
        """Offer what a model has: its classes, its steps, and guidance if it has a classifier."""
        self._model = model
        self._classes.show(model.pipe.default_classes)
        for side in self._sides:
            side.steps.set_value(model.default_steps)
            side.guidance.set_enabled(model.pipe.classifier is not None)

    def _compare(self) -> None:
        """Show or hide the second setting."""
        second, gallery = self._sides[1], self.galleries[1]
        second.box.set_visibility(self._compared.value)
        self._sides[0].name.set_visibility(self._compared.value)
        gallery.box.set_visibility(self._compared.value)
        if not self._compared.value:
            gallery.cancel()


class Side:
    """One of the two settings: steps, solver and guidance. Guidance samples again when it is let go."""

    def __init__(self, name: str, tab: SampleTab, guidance: float) -> None:
        self.folder = f"out-{name.lower()}/"
        with controls.division("group side") as self.box:
            self.name = ui.label(f"Setting {name}").classes("name")
            with controls.division("pair"):
                with controls.division("group"):
                    self.steps = controls.steps_field(25)
                with controls.division("group"):
                    self.solver = controls.solver_field()
            self.guidance = controls.guidance_slider(guidance, lambda: tab.start_side(self))
