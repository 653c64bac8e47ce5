"""Write the report of an evaluation: one HTML file with measures, warnings and images, without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from os import PathLike
from pathlib import PurePath
from typing import Any

from admfast import __version__
from admfast.errors import invalid
from admfast.evaluation.evaluate import Evaluation
from admfast.evaluation.image_sets import ImageSet, UInt8
from admfast.evaluation.inception import InceptionFeatures
from admfast.evaluation.report_choice import (
    choose_grid,
    count_classes,
    find_nearest,
    rank_by_certainty,
)
from admfast.evaluation.report_page import escape, write_page
from admfast.evaluation.report_sections import (
    Contents,
    write_certainty,
    write_classes,
    write_closest,
    write_grid,
    write_measures,
    write_nearest,
    write_published,
    write_settings,
)
from admfast.files.atomic import write_text
from admfast.files.images import MODES

# The first side, in pixels, with which the file is small enough is the most that images have.
SIDES, MOST_BYTES = (192, 160, 128, 96), 9_500_000


def write_report(
    path: str | PathLike[str],
    evaluation: Evaluation,
    samples: ImageSet,
    reference: ImageSet | None = None,
    system: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of an evaluation as one HTML file below 10 MB, whole or not at all.

    It shows the measures beside published ones, warnings, samples by class, nearest reference images, the
    least and most certain samples, counts by class, and settings. It loads nothing, has no script, and prints
    on A4. Memory: distances of all samples to their 5 nearest reference images, and about 200 images.

    Args:
        path: file name, used as given.
        evaluation: of these samples, reference and features.
        reference: None leaves out nearest images.
        system: name in `PUBLISHED` whose results are shown; for any other name or None, none are.
        settings: names and values, shown as text in their order.

    Raises:
        InvalidArgument: if features and images differ in number, images can't be read, or they have other
            than 1, 3 or 4 channels.
        OutputError: if the file can't be written.
    """
    for name, images, features in (
        ("samples", samples, evaluation.sample_features),
        ("reference", reference, evaluation.reference_features),
    ):
        if images is not None and images.shape[2] not in MODES:
            raise invalid(name, f"images of {images.shape[2]} channels", "1, 3 or 4 channels")
        if images is not None and features is not None and len(images) != len(features.pooled):
            raise invalid(
                "evaluation", f"features of {len(features.pooled)} images", f"{len(images)}, as {name}"
            )
    contents = _collect(evaluation, samples, reference, system, settings or {})
    for side in SIDES:
        page = _write(replace(contents, side=side))
        if len(page.encode()) <= MOST_BYTES:
            break
    write_text(path, page)


def _collect(
    evaluation: Evaluation,
    samples: ImageSet,
    reference: ImageSet | None,
    system: str | None,
    settings: Mapping[str, Any],
) -> Contents:
    """Choose the images to show, and read each once."""
    features, reference_features = evaluation.sample_features, evaluation.reference_features
    labels, probabilities = samples.labels, features.probabilities
    grid = choose_grid(len(samples), labels)
    nearest = certainty = None
    if reference is not None and reference_features is not None:
        nearest = find_nearest(features, reference_features)
    if probabilities is not None:
        # Inception's classes have other numbers than ImageNet's labels.
        are_known = samples.labels_are_numbers and evaluation.features != InceptionFeatures.name
        known = labels if are_known else None
        certainty = rank_by_certainty(probabilities, known)
    counts = None
    if labels is not None:
        known_classes = certainty.classes if certainty is not None and certainty.of_own_class else 0
        counts = count_classes(labels, known_classes)
    shown = {index for row in grid for index in row.indices}
    neighbours: set[int] = set()
    if nearest is not None:
        shown.update(nearest.examples, nearest.closest)
        neighbours.update(*(nearest.indices[i] for i in nearest.examples))
        neighbours.update(nearest.indices[i][0] for i in nearest.closest)
    if certainty is not None:
        shown.update(certainty.least, certainty.most)
    return Contents(
        evaluation, system, settings, samples, reference, grid, nearest, certainty, counts,
        _read(samples, shown), {} if reference is None else _read(reference, neighbours),
    )  # fmt: skip


def _read(images: ImageSet, indices: set[int]) -> dict[int, UInt8]:
    """Return images by index."""
    order = sorted(indices)
    return dict(zip(order, images.pick(order), strict=True))


def _write(contents: Contents) -> str:
    """Return the page."""
    sections = {
        "measures": ("Measures", write_measures(contents)),
        "published": ("Published results", write_published(contents)),
        "samples": ("Samples", write_grid(contents)),
        "nearest": ("Nearest reference images", write_nearest(contents)),
        "closest": ("Closest samples", write_closest(contents)),
        "certainty": ("Least and most certain", write_certainty(contents)),
        "classes": ("Samples by class", write_classes(contents)),
        "settings": ("Settings", write_settings(contents)),
    }
    written = {name: pair for name, pair in sections.items() if pair[1]}
    links = "\n".join(f'<a href="#{name}">{escape(title)}</a>' for name, (title, _) in written.items())
    title = f"Evaluation of {contents.evaluation.samples['name']}"
    parts = [_header(contents, links), _warnings(contents.evaluation.warnings), "<main>"]
    parts += [section for _, section in written.values()]
    parts += ["</main>", f'<footer class="note">Written by admfast {escape(__version__)}.</footer>']
    return write_page(title, "\n".join(parts))


def _header(contents: Contents, links: str) -> str:
    """Return the title, what was compared, and the links to the sections."""
    evaluation, now = contents.evaluation, datetime.now().astimezone()
    name = str(evaluation.samples["name"])
    title = name if contents.samples.path is None else PurePath(name).name
    facts = [("Samples", _describe(evaluation.samples))]
    if evaluation.reference is not None:
        facts.append(("Reference", _describe(evaluation.reference)))
    facts.append(("Features", escape(evaluation.features)))
    date = f"{now.day} {now:%B %Y, %H:%M}"
    facts.append(("Date", f'<time datetime="{now.isoformat(timespec="seconds")}">{date}</time>'))
    rows = "\n".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in facts)
    return (
        f'<header>\n<div class="kicker">Evaluation of samples</div>\n<h1>{escape(title)}</h1>'
        f'\n<dl>\n{rows}\n</dl>\n<nav aria-label="Sections">\n{links}\n</nav>\n</header>'
    )


def _describe(images: Mapping[str, Any]) -> str:
    kind = {1: ", grey", 3: ", RGB"}.get(images["channels"], "")
    size = str(images["size"]).replace("x", " × ")
    count = "1 image" if images["images"] == 1 else f"{images['images']:,} images"
    return f"{count}, {escape(size)} pixels{kind} – {escape(images['name'])}"


def _warnings(warnings: Iterable[str]) -> str:
    items = "\n".join(f"<li>{escape(text[:1].upper() + text[1:])}.</li>" for text in warnings)
    if not items:
        return ""
    title = '<h2 id="warnings-title">Read the measures with care</h2>'
    return (
        f'<aside class="warnings" aria-labelledby="warnings-title">\n{title}\n<ul>\n{items}\n</ul>\n</aside>'
    )
