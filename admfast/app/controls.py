"""Small elements of the page: choices of model, class, solver and numbers, and texts to copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nicegui import ui
from nicegui.element import Element

from admfast.app.models import AppModel
from admfast.app.settings import LARGEST_GUIDANCE, MOST_STEPS
from admfast.sampling.request import AUTO
from admfast.solvers import list_solvers

MOST_CHIPS = 20  # more classes are typed
SOLVER_NAMES = [AUTO, "dpmpp:sde=true", *(text.partition(":")[0] for text in list_solvers("noise"))]


def division(classes: str) -> Element:
    """Return a plain box with these style classes, to be used as a context."""
    return ui.element("div").classes(classes)


def heading(text: str) -> ui.label:
    """Return a small heading over a group of controls."""
    return ui.label(text).classes("heading")


def plain_button(text: str, on_click: Callable[[], Any] | None, classes: str = "chip") -> Element:
    """Return a button without the library's looks."""
    with ui.element("button").classes(classes).props("type=button") as button:
        ui.label(text)
    if on_click is not None:
        button.on("click", on_click, args=[])
    return button


def choose_model(models: Sequence[AppModel], on_change: Callable[[AppModel], None]) -> None:
    """Show a choice of models, if there are several."""
    by_name = {model.name: model for model in models}
    heading("Model")
    if len(by_name) == 1:
        ui.label(models[0].name).classes("value")
        return
    choice = ui.select([*by_name], value=models[0].name)
    choice.on_value_change(lambda event: on_change(by_name[event.value]))
    choice.props("outlined dense options-dense aria-label=model").classes("wide")


class ClassChoice:
    """The class of the images: buttons for a few classes, a text field for many, nothing without classes.

    value: such as "3", "" for every class in turn. all_text: the button for every class.
    """

    def __init__(self, on_click: Callable[[], Any] | None = None, all_text: str = "all") -> None:
        self.value, self._on_click, self._all_text = "", on_click, all_text
        self._field: ui.input | None = None
        self._box = division("group")
        self._buttons: dict[str, Element] = {}

    def show(self, count: int | None) -> None:
        """Offer `count` classes; None offers none."""
        self.value = ""
        self._buttons, self._field = {}, None
        self._box.clear()
        if count is None:
            return
        with self._box:
            heading("Class")
            if count > MOST_CHIPS:
                self._field = ui.input(
                    placeholder=f"0-{count - 1}, such as 207,360; empty: {self._all_text}",
                    on_change=self._type,
                )
                self._field.props("outlined dense aria-label=classes").classes("wide")
                return
            with division("chips"):
                for value in ["", *map(str, range(count))]:
                    self._buttons[value] = plain_button(value or self._all_text, partial(self._click, value))
        self._mark()

    def _type(self, event: Any) -> None:
        self.value = event.value

    def choose(self, value: str) -> None:
        """Choose a class, or several as they are typed."""
        self.value = value
        self._mark()
        if self._field is not None:
            self._field.set_value(value)

    def _click(self, value: str) -> None:
        self.choose(value)
        if self._on_click is not None:
            self._on_click()

    def _mark(self) -> None:
        """Show which button is chosen."""
        for value, button in self._buttons.items():
            button.props["aria-pressed"] = "true" if value == self.value else "false"


def text_field(label: str, value: str) -> ui.input:
    """Return a field for a text."""
    heading(label)
    return ui.input(value=value).props(f"outlined dense aria-label={label.lower()}").classes("wide")


def steps_field(value: int) -> ui.number:
    """Return the field for the number of steps."""
    heading("Steps")
    return (
        ui.number(value=value, min=1, max=MOST_STEPS, precision=0)
        .props("outlined dense aria-label=steps")
        .without_auto_validation()
        .classes("wide")
    )


def solver_field() -> ui.input:
    """Return the field for the solver: a text, such as ddim:eta=0.5, or one of a menu."""
    heading("Solver")
    field = ui.input(value=AUTO).props("outlined dense aria-label=solver").classes("wide")
    with field.add_slot("append"), ui.icon("arrow_drop_down").classes("cursor-pointer"), ui.menu():
        for name in SOLVER_NAMES:
            ui.menu_item(name, partial(field.set_value, name)).props("dense")
    return field


def labelled_slider(
    label: str, value: float, most: float, step: float, on_release: Callable[[], Any] | None = None
) -> ui.slider:
    """Return a slider from 0 to `most` that shows its number; on_release is called when it is let go."""
    with division("line"):
        heading(label)
        number = ui.label().classes("value")
    slider = ui.slider(min=0, max=most, step=step, value=value).props(f"aria-label={label.lower()}")
    number.bind_text_from(slider, "value", lambda shown: f"{shown:g}" if shown is not None else "")
    if on_release is not None:
        slider.on("change", on_release, args=[])
    return slider


def guidance_slider(value: float, on_release: Callable[[], Any]) -> ui.slider:
    """Return the slider for the scale of the classifier's gradient."""
    return labelled_slider("Guidance", min(value, LARGEST_GUIDANCE), LARGEST_GUIDANCE / 2, 0.1, on_release)


def copied_text(label: str, parts: Sequence[str]) -> None:
    """Show a text with a button that copies it; a browser that forbids copying gets it selected.

    parts: of the text; of several, none is broken.
    """
    with division("copied"):
        with division("line"):
            heading(label)
            button = plain_button("Copy", None, "link")
        with division("code" if len(parts) == 1 else "code unbroken") as shown:
            for part in parts:
                ui.label(part)
        button.on(
            "click",
            js_handler=f"""(event) => {{
                const text = getHtmlElement({shown.id}), button = event.currentTarget.firstElementChild;
                if (navigator.clipboard) navigator.clipboard.writeText(text.textContent);
                else getSelection().selectAllChildren(text);
                button.textContent = navigator.clipboard ? "Copied" : "Selected";
                setTimeout(() => (button.textContent = "Copy"), 1500);
            }}""",
        )
