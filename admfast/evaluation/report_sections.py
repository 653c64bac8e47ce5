"""Write the sections of a report: each function returns HTML, empty if there is nothing to show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from admfast.evaluation.evaluate import (
    PUBLISHED_COUNT,
    PUBLISHED_MEASURES,
    Evaluation,
    Measure,
    comparable_values,
    published_values,
)
from admfast.evaluation.image_sets import ImageSet, UInt8
from admfast.evaluation.report_choice import Certainty, GridRow, NearestImages
from admfast.evaluation.report_page import (
    Tile,
    escape,
    is_small,
    write_bars,
    write_card,
    write_cards,
    write_profile,
    write_section,
    write_table,
    write_tiles,
)
from admfast.models.published import PUBLISHED, Metric

MOST_BARS = 50  # classes with a bar each
_MISSING_SHOWN = 20

# Name of a measure -> which values are better, and what it says
_SETS = "between the features of the two sets"
_MEANINGS = {
    "Inception Score": ("higher", "Clear classes of single samples, varied classes of all"),
    "classifier score": ("higher", "Clear classes of single samples, varied classes of all"),
    "FID": ("lower", f"Distance {_SETS}"),
    "FD": ("lower", f"Distance {_SETS}"),
    "FD-DINOv2": ("lower", f"Distance {_SETS}"),
    "sFID": ("lower", "The same, of features that keep places in the image"),
    "precision": ("higher", "Quality: share of samples among the reference images"),
    "recall": ("higher", "Variety: share of reference images among the samples"),
    "density": ("higher", "Quality: reference neighbourhoods around a sample"),
    "coverage": ("higher", "Variety: share of reference images near a sample"),
    "KID": ("lower", f"Kernel distance {_SETS}"),
    "KD": ("lower", f"Kernel distance {_SETS}"),
}


@dataclass(frozen=True, eq=False)
class Contents:
    """All that the page shows. side: the most pixels of an image."""

    evaluation: Evaluation
    system: str | None
    settings: Mapping[str, Any]
    samples: ImageSet
    reference: ImageSet | None
    grid: list[GridRow]
    nearest: NearestImages | None
    certainty: Certainty | None
    counts: dict[int, int] | None
    sample_images: dict[int, UInt8]
    reference_images: dict[int, UInt8]
    side: int = 192


def show_number(value: float) -> str:
    """Return a number with 2 decimals, below 2 with 3, and a very small one with 3 digits."""
    if abs(value) >= 2:
        return f"{value:,.2f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


def write_measures(contents: Contents) -> str:
    """Return the table of all measures."""
    measures = contents.evaluation.measures
    if not measures:
        return ""
    intervals = any(measure.interval for measure in measures)
    columns = [
        "Measure",
        "Value",
        *(["95 % interval"] if intervals else []),
        "Better",
        "What it says; how it was computed",
    ]
    rows = [_measure_row(measure, intervals) for measure in measures]
    lead = "Intervals are for other images of one set, in the same neighbourhoods." if intervals else ""
    table = write_table(columns, rows, numbers=range(1, len(columns) - 2))
    return write_section("measures", "Measures", table, lead)


def _measure_row(measure: Measure, intervals: bool) -> list[str]:
    cells = [f'<span class="whole">{escape(measure.name)}</span>', _value(measure.value)]
    if intervals:
        ends = [] if measure.interval is None else [show_number(end) for end in measure.interval]
        cells.append(" – ".join(ends) or '<span class="note">none</span>')
    better, says = _MEANINGS.get(measure.name, ("", ""))
    how = f" <small>{escape(measure.how)}</small>" if measure.how else ""
    return [*cells, f'<span class="whole">{better}</span>', says + how]


def _value(value: float) -> str:
    return f'<data class="value" value="{value!r}">{show_number(value)}</data>'


def write_published(contents: Contents) -> str:
    """Return the published results of the system, below those of the samples."""
    rows = PUBLISHED.get(contents.system or "", ())
    if not rows:
        return ""
    evaluation, table = contents.evaluation, [_published_row(metric) for metric in rows]
    lead = f"Results of {contents.system} by the published evaluator, on {PUBLISHED_COUNT:,} samples."
    values = comparable_values(evaluation)
    if values is not None:
        cells = ["–" if value is None else show_number(value) for value in values]
        table.insert(0, [f"These {len(contents.samples):,} samples", *cells])
    else:
        lead += f" They are of Inception's features: don't compare them with those of {evaluation.features}."
    numbers = range(1, 1 + len(PUBLISHED_MEASURES))
    marked_rows = [] if values is None else [0]
    heads = ["Conditions and source", *PUBLISHED_MEASURES]
    html = write_table(heads, table, numbers, marked_rows=marked_rows)
    return write_section("published", "Published results", html, lead)


def _published_row(metric: Metric) -> list[str]:
    values = published_values(metric)
    cells = ["–" if value is None else f"{value:.2f}" for value in values]
    return [f"{escape(metric.conditions)} <small>{escape(metric.source)}</small>", *cells]


def _sample(contents: Contents, index: int, caption: str = "") -> Tile:
    """Return the tile of a sample."""
    labels = contents.samples.labels
    alt = f"Sample {index}" + ("" if labels is None else f" of class {labels[index]}")
    return Tile(contents.sample_images[index], alt, contents.samples.image_name(index), caption)


def _neighbour(contents: Contents, index: int, distance: float, mark: str = "") -> Tile:
    """Return the tile of a reference image at a distance."""
    assert contents.reference is not None
    labels = contents.reference.labels
    alt = f"Reference image {index}" + ("" if labels is None else f" of class {labels[index]}")
    name, caption = contents.reference.image_name(index), f"{distance:.3g}{mark}"
    return Tile(contents.reference_images[index], alt, name, caption)


def write_grid(contents: Contents) -> str:
    """Return the samples, in rows of a class or in their order."""
    labels, grid, side = contents.samples.labels, contents.grid, contents.side
    if labels is None or grid[0].label is None:
        tiles = [
            _sample(contents, index, "" if labels is None else f"class {labels[index]}")
            for index in grid[0].indices
        ]
        return write_section(
            "samples", "Samples", write_tiles(tiles, side), "The first samples, in their order."
        )
    rows = []
    for row in grid:
        tiles = [_sample(contents, index) for index in row.indices]
        rows.append(f'<div class="row"><h3>Class {row.label}</h3>{write_tiles(tiles, side)}</div>')
    present = len(set(labels.tolist()))
    which = "each class" if len(grid) == present else f"{len(grid)} of {present:,} classes, evenly chosen"
    return write_section("samples", "Samples", "\n".join(rows), f"The first samples of {which}.")


def write_nearest(contents: Contents) -> str:
    """Return some samples with their nearest reference images."""
    nearest = contents.nearest
    if nearest is None:
        return ""
    cards = []
    for index in nearest.examples:
        found = zip(nearest.indices[index], nearest.distances[index], strict=True)
        tiles = [_sample(contents, index, f"<b>No. {index}</b>")]
        tiles += [_neighbour(contents, other, distance) for other, distance in found]
        cards.append(write_card(tiles, contents.side))
    lead = (
        "Evenly chosen samples, each with the reference images whose features are nearest, and the Euclidean"
        " distance of the features. Look for copies."
    )
    size = "" if is_small(contents.sample_images[0]) else " large"
    html = write_cards(cards, f"cards{size}")
    return write_section("nearest", "Nearest reference images", html, lead)


def write_closest(contents: Contents) -> str:
    """Return the samples that are closest to a reference image, with that image."""
    nearest = contents.nearest
    if nearest is None:
        return ""
    cards = []
    for index in nearest.closest:
        other, distance = nearest.indices[index][0], nearest.distances[index][0]
        same = _same(contents.sample_images[index], contents.reference_images[other])
        mark = ' <span class="mark">same pixels</span>' if same else ""
        pair = [
            _sample(contents, index, f"<b>No. {index}</b>"),
            _neighbour(contents, other, distance, mark),
        ]
        cards.append(write_card(pair, contents.side))
    lead = (
        "A copy would be among these. Half of all samples have a reference image within"
        f" {nearest.typical:.3g}"
    )
    if nearest.typical_reference is not None:
        lead += f"; half of the reference images have another one within {nearest.typical_reference:.3g}"
    html = write_cards(cards, "cards pairs")
    return write_section("closest", "Samples closest to a reference image", html, f"{lead}.")


def _same(a: UInt8, b: UInt8) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def write_certainty(contents: Contents) -> str:
    """Return the samples of which the classifier is least and most certain."""
    certainty = contents.certainty
    if certainty is None:
        return ""
    of = "of the sample's own class" if certainty.of_own_class else "of its most probable class"
    parts = []
    for title, chosen in (("Least certain", certainty.least), ("Most certain", certainty.most)):
        tiles = [_sample(contents, index, _certainty_caption(contents, index)) for index in chosen]
        parts.append(f"<h3>{title}</h3>\n{write_tiles(tiles, contents.side)}")
    lead = f"By the probability {of}, which the network of the features computes."
    return write_section("certainty", "Least and most certain samples", "\n".join(parts), lead)


def show_percent(probability: float) -> str:
    """Return a probability in percent with 2 decimals, but none as 0 or 100."""
    if probability < 1e-4:
        return "< 0.01 %"
    return "> 99.99 %" if probability > 0.9999 else f"{100 * probability:.2f} %"


def _certainty_caption(contents: Contents, index: int) -> str:
    certainty, labels = contents.certainty, contents.samples.labels
    assert certainty is not None
    value, likeliest = show_percent(certainty.values[index]), certainty.likeliest[index]
    if not certainty.of_own_class or labels is None:
        return f"<b>{escape(value)}</b>"
    other = "" if likeliest == labels[index] else f", looks like {likeliest}"
    return f"<b>{escape(value)}</b> class {labels[index]}{other}"


def write_classes(contents: Contents) -> str:
    """Return the counts by class: bars, or a summary of more than 50 classes."""
    counts = contents.counts
    if counts is None:
        return ""
    missing = [label for label, count in counts.items() if not count]
    text = f"{len(counts):,} classes; " + (
        "none is missing." if not missing else f"{len(missing):,} missing."
    )
    if len(counts) <= MOST_BARS:
        bars = write_bars({str(label): count for label, count in counts.items()})
        return write_section("classes", "Samples by class", bars, text)
    least, most = (choose(counts, key=lambda label: counts[label]) for choose in (min, max))
    rows = [
        ["Least", f"{counts[least]:,}", f"class {least}"],
        ["Median", f"{median(counts.values()):,.4g}", ""],
        ["Most", f"{counts[most]:,}", f"class {most}"],
        ["Missing", f"{len(missing):,}", _list(missing)],
    ]
    labels = list(counts)
    alt = f"Samples by class, from class {labels[0]} to class {labels[-1]}"
    html = write_table(["Samples of a class", "Number", "Classes"], rows, numbers=[1])
    return write_section(
        "classes", "Samples by class", html + write_profile(list(counts.values()), alt), text
    )


def _list(labels: list[int]) -> str:
    shown = ", ".join(map(str, labels[:_MISSING_SHOWN]))
    return shown + (f" and {len(labels) - _MISSING_SHOWN:,} more" if len(labels) > _MISSING_SHOWN else "")


def write_settings(contents: Contents) -> str:
    """Return the settings as a table."""
    rows = [[escape(name), escape(value)] for name, value in contents.settings.items()]
    return write_section("settings", "Settings", write_table(["Name", "Value"], rows)) if rows else ""
