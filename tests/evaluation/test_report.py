"""Tests of the HTML report of an evaluation, read back as a tree of elements."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch

from admfast.errors import InvalidArgument, OutputError
from admfast.evaluation import report
from admfast.evaluation.evaluate import Evaluation, Measure
from admfast.evaluation.features import SetFeatures
from admfast.evaluation.image_sets import ArrayImages
from admfast.evaluation.report import write_report
from admfast.evaluation.report_sections import show_number, show_percent
from admfast.evaluation.statistics import statistics_of
from admfast.models.published import PUBLISHED
from tests.evaluation.html_tree import parse, pixels

MEASURES = (
    Measure("Inception Score", 23.456, None, "splits of 5,000"),
    Measure("FID", 4.5678, None, "against the reference's own mu and sigma"),
    Measure("sFID", 5.4321),
    Measure("precision", 0.8123, (0.7912, 0.8345), "k = 3, float16 distances"),
    Measure("recall", 0.5432, (0.5123, 0.5678), "k = 3, float16 distances"),
    Measure("a new measure", 0.00123, None, "some <way>"),
)
WARNINGS = ("only 40 samples & no more", "the samples are <grey>")


def random_images(count, side=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def features_of(images, classes=None, seed=0):
    rows = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))[:, :50] / 255
    probabilities = None
    if classes is not None:
        probabilities = torch.randn(len(images), classes, generator=torch.manual_seed(seed)).softmax(1)
    return SetFeatures(rows, statistics_of(rows), None, probabilities)


def evaluation_of(samples, found, reference=None, other=None, features="inception"):
    sets = [
        None if images is None else {
            "name": images.name,
            "images": len(images),
            "size": f"{images.shape[0]}x{images.shape[1]}",
            "channels": images.shape[2],
        }
        for images in (samples, reference)
    ]  # fmt: skip
    return Evaluation(features, sets[0], sets[1], MEASURES, WARNINGS, found, other)


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a report and reads it back as (text, tree)."""

    def write(
        images,
        labels=None,
        reference=None,
        reference_labels=None,
        classes=None,
        system=None,
        settings=None,
        features="inception",
        name="my samples",
        are_numbers=True,
    ):
        samples = ArrayImages(images, labels, name)
        samples.labels_are_numbers = are_numbers
        other = None if reference is None else ArrayImages(reference, reference_labels, "reference")
        near = None if reference is None else features_of(reference)
        evaluation = evaluation_of(samples, features_of(images, classes), other, near, features)
        path = tmp_path / "report.html"
        write_report(path, evaluation, samples, other, system, settings)
        assert os.listdir(tmp_path) == ["report.html"]
        text = path.read_text(encoding="utf-8")
        return text, parse(text)

    return write


def whole_report(written, **changes):
    """Return a report with all sections."""
    given = {
        "images": random_images(40),
        "labels": np.arange(40) % 4,
        "reference": random_images(60, seed=1),
        "classes": 4,
        "system": "imagenet256",
        "settings": {"steps": 10},
        "features": "classifier",
    }
    return written(**(given | changes))


def tiles(section):
    """Return (figure's caption, image element) of all tiles of a section."""
    return [(figure.text(), figure.all("img")[0]) for figure in section.all("figure")]


def shown(section):
    """Return the numbers of the samples of a section, in order."""
    return [int(re.match(r"Sample (\d+)", image.attributes["alt"])[1]) for _, image in tiles(section)]


def test_measures_are_shown_with_intervals_and_ways(written):
    _, page = written(random_images(40), reference=random_images(30, seed=1))
    head, *rows = page.by_id("measures").rows()
    assert head[:3] == ["Measure", "Value", "95 % interval"]
    assert [row[0] for row in rows] == [measure.name for measure in MEASURES]
    assert [row[1] for row in rows] == ["23.46", "4.57", "5.43", "0.812", "0.543", "0.00123"]
    assert [row[2] for row in rows] == ["none", "none", "none", "0.791 – 0.835", "0.512 – 0.568", "none"]
    assert [row[3] for row in rows] == ["higher", "lower", "lower", "higher", "higher", ""]
    assert all(measure.how in row[4] for measure, row in zip(MEASURES, rows, strict=True))
    exact = [float(data.attributes["value"]) for data in page.all("data")]
    assert exact == [measure.value for measure in MEASURES]


def test_warnings_are_shown_before_the_measures(written):
    text, page = written(random_images(40))
    (box,) = page.all("aside", "warnings")
    assert [item.text() for item in box.all("li")] == [
        "Only 40 samples & no more.",
        "The samples are <grey>.",
    ]
    assert text.index("warnings-title") < text.index('id="measures"')


def test_the_title_names_the_samples_their_numbers_and_the_date(written):
    _, page = written(random_images(40, side=6), reference=random_images(30, channels=1))
    assert page.all("title")[0].text() == "Evaluation of my samples"
    assert page.all("h1")[0].text() == "my samples"
    terms = [term.text() for term in page.all("dt")]
    facts = dict(zip(terms, (fact.text() for fact in page.all("dd")), strict=True))
    assert facts["Samples"] == "40 images, 6 × 6 pixels, RGB – my samples"
    assert facts["Reference"] == "30 images, 8 × 8 pixels, grey – reference"
    assert facts["Features"] == "inception"
    assert re.fullmatch(r"\d+ [A-Z][a-z]+ \d{4}, \d\d:\d\d", facts["Date"])
    assert re.match(r"\d{4}-\d\d-\d\dT", page.all("time")[0].attributes["datetime"])


@pytest.mark.parametrize("system", ["imagenet512-up", "imagenet256-uncond", "lsun-horse"])
def test_all_published_rows_of_a_system_are_below_the_samples_values(written, system):
    _, page = written(random_images(40), system=system)
    head, ours, *rows = page.by_id("published").rows()
    assert head[1:] == ["FID", "sFID", "Inception Score", "precision", "recall"]
    assert ours == ["These 40 samples", "4.57", "5.43", "23.46", "0.812", "0.543"]
    assert len(rows) == len(PUBLISHED[system])
    for row, metric in zip(rows, PUBLISHED[system], strict=True):
        values = (metric.fid, metric.sfid, metric.inception_score, metric.precision, metric.recall)
        assert row[0] == f"{metric.conditions} {metric.source}"
        assert row[1:] == ["–" if value is None else f"{value:.2f}" for value in values]


def test_published_values_are_not_compared_with_other_features(written):
    _, page = written(random_images(40), system="lsun-cat", features="dinov2 (large)")
    section = page.by_id("published")
    assert [row[1] for row in section.rows()] == ["FID", "5.57"]
    assert "don't compare" in section.text()


@pytest.mark.parametrize("system", [None, "digits32"])
def test_a_system_without_published_results_has_no_such_section(written, system):
    _, page = written(random_images(40), system=system)
    assert page.by_id("published") is None


def test_nothing_is_loaded(written):
    text, page = whole_report(written)
    for element in page.walk():
        assert element.tag not in ("script", "iframe", "object", "embed", "video", "audio", "base", "form")
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert value.startswith(("data:", "#")), (element.tag, value)
            assert "url(" not in (value or "")
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    (policy,) = [m for m in page.all("meta") if "http-equiv" in m.attributes]
    assert "default-src 'none'" in policy.attributes["content"]


def test_links_lead_to_sections(written):
    _, page = whole_report(written)
    targets = [link.attributes["href"].removeprefix("#") for link in page.all("a")]
    assert targets == [section.attributes["id"] for section in page.all("section")]
    ids = [element.attributes["id"] for element in page.walk() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    named = [element.attributes.get("aria-labelledby") for element in page.walk()]
    assert {name for name in named if name} <= set(ids)


def test_a_reader_that_sees_no_images_is_told_what_they_are(written):
    _, page = whole_report(written)
    assert page.all("html")[0].attributes["lang"] == "en"
    images = page.all("img")
    assert images and all(re.match(r"(Sample|Reference image) \d+", i.attributes["alt"]) for i in images)
    scopes = {cell.attributes.get("scope") for cell in page.all("th")}
    assert scopes == {"col", "row"}


HOSTILE = "<script>alert(1)</script>\"'&amp; ]]> \udc80"


def test_hostile_text_is_escaped(written):
    images = random_images(40)
    settings = {HOSTILE: HOSTILE, "list": [HOSTILE]}
    text, page = written(images, settings=settings, features=HOSTILE, name=HOSTILE, system=HOSTILE)
    assert not page.all("script") and "<script" not in text
    readable = HOSTILE.replace("\udc80", r"\udc80")
    assert page.all("h1")[0].text() == readable
    assert page.all("title")[0].text() == f"Evaluation of {readable}"
    assert page.by_id("settings").rows()[1] == [readable, readable]
    assert page.all("img")[0].attributes["title"] == f"{readable}[0]"


def test_settings_are_shown_in_their_order(written):
    settings = {"steps": 250, "guides": None, "scale": 1.5, "classes": [1, 2]}
    _, page = written(random_images(40), settings=settings)
    rows = page.by_id("settings").rows()
    assert rows == [["Name", "Value"], *([name, str(value)] for name, value in settings.items())]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_samples_are_shown_pixel_for_pixel_by_class(written, channels):
    images, labels = random_images(40, channels=channels), np.arange(40) % 4
    _, page = written(images, labels)
    section = page.by_id("samples")
    assert [heading.text() for heading in section.all("h3")] == [f"Class {label}" for label in range(4)]
    assert shown(section) == [index for label in range(4) for index in range(label, 32, 4)]
    for index, (_, image) in zip(shown(section), tiles(section), strict=True):
        assert np.array_equal(pixels(image), images[index])
        assert image.attributes["alt"] == f"Sample {index} of class {labels[index]}"
        assert image.attributes["class"] == "small"


def test_without_labels_the_first_samples_are_shown_and_nothing_by_class(written):
    _, page = written(random_images(70))
    assert shown(page.by_id("samples")) == list(range(64))
    assert page.by_id("classes") is None and not page.by_id("samples").all("h3")


def test_without_a_reference_there_are_no_nearest_images(written):
    _, page = written(random_images(40))
    assert page.by_id("nearest") is None and page.by_id("closest") is None
    assert "Reference" not in [term.text() for term in page.all("dt")]


def test_a_copy_is_found_and_marked(written):
    images, reference = random_images(40), random_images(60, seed=1)
    images[29] = reference[47]
    _, page = written(images, reference=reference, reference_labels=np.arange(60))
    (caption, sample), (distance, copy), *others = tiles(page.by_id("closest"))
    assert (caption, distance) == ("No. 29", "0 same pixels")
    assert copy.attributes["alt"] == "Reference image 47 of class 47"
    assert np.array_equal(pixels(copy), reference[47]) and np.array_equal(pixels(sample), reference[47])
    assert len(others) == 14 and not any("same pixels" in caption for caption, _ in others)


def test_nearest_images_are_those_by_the_features(written):
    images, reference = random_images(40), random_images(60, seed=1)
    _, page = written(images, reference=reference)
    cards = page.by_id("nearest").all("div", "card")
    assert len(cards) == 8
    a, b = (features_of(x).pooled.double() for x in (images, reference))
    distances = torch.cdist(a, b)
    for card, index in zip(cards, [0, 6, 11, 17, 22, 28, 33, 39], strict=True):
        (caption, sample), *found = tiles(card)
        assert caption == f"No. {index}" and np.array_equal(pixels(sample), images[index])
        values, order = distances[index].sort()
        assert [float(caption) for caption, _ in found] == pytest.approx(values[:5].tolist(), rel=5e-3)
        for (_, image), expected in zip(found, order, strict=False):
            assert np.array_equal(pixels(image), reference[expected])
    closest = distances.min(1).values.argsort()[:8].tolist()
    numbers = [caption for caption, _ in tiles(page.by_id("closest")) if caption.startswith("No.")]
    assert numbers == [f"No. {index}" for index in closest]


def test_certainty_is_of_the_own_class_by_a_classifier_of_these_classes(written):
    images, labels = random_images(40), np.arange(40) % 4
    _, page = written(images, labels, classes=4, features="classifier")
    section = page.by_id("certainty")
    assert "own class" in section.text()
    own = features_of(images, 4).probabilities[torch.arange(40), torch.from_numpy(labels)]
    order = own.argsort().tolist()
    assert shown(section) == order[:16] + order[::-1][:16]
    likeliest = features_of(images, 4).probabilities.argmax(1)
    for index, (caption, _) in zip(shown(section), tiles(section), strict=True):
        other = "" if likeliest[index] == labels[index] else f", looks like {likeliest[index]}"
        assert caption == f"{100 * own[index]:.2f} % class {labels[index]}{other}"


@pytest.mark.parametrize(
    ("labels", "features", "are_numbers"),
    [
        (None, "classifier", True),
        (np.arange(40) % 5, "classifier", True),
        (np.arange(40) % 4, "inception", True),
        (np.arange(40) % 4, "classifier", False),
    ],
    ids=["no labels", "other classes", "Inception's classes", "ranks of names"],
)
def test_certainty_is_the_largest_probability_elsewhere(written, labels, features, are_numbers):
    images = random_images(40)
    _, page = written(images, labels, classes=4, features=features, are_numbers=are_numbers)
    section = page.by_id("certainty")
    assert "most probable class" in section.text()
    largest = features_of(images, 4).probabilities.max(1).values
    order = largest.argsort().tolist()
    assert shown(section) == order[:16] + order[::-1][:16]


def test_without_probabilities_there_is_no_certainty(written):
    _, page = written(random_images(40), np.arange(40) % 4)
    assert page.by_id("certainty") is None


def test_samples_are_counted_by_class(written):
    labels = np.repeat([0, 1, 3], [5, 20, 15])
    _, page = written(random_images(40), labels)
    bars = page.by_id("classes").all("li")
    assert [bar.text() for bar in bars] == ["0 5", "1 20", "2 0", "3 15"]
    widths = [bar.all("i")[0].attributes["style"] for bar in bars]
    assert widths == ["width: 25%", "width: 100%", "width: 0%", "width: 75%"]
    assert "1 missing" in page.by_id("classes").text()


def test_a_classifier_s_class_without_samples_counts_as_missing(written):
    _, page = written(random_images(40), np.arange(40) % 4, classes=6, features="classifier")
    assert [bar.text() for bar in page.by_id("classes").all("li")][4:] == ["4 0", "5 0"]


def test_many_classes_are_summarised(written):
    labels = np.repeat([0, 7, 99], [5, 20, 15])
    _, page = written(random_images(40), labels)
    section = page.by_id("classes")
    rows = {row[0]: row[1:] for row in section.rows()[1:]}
    assert rows["Least"] == ["0", "class 1"] and rows["Most"] == ["20", "class 7"]
    assert rows["Median"] == ["0", ""] and rows["Missing"][0] == "97"
    assert rows["Missing"][1].startswith("1, 2, 3, 4, 5, 6, 8,") and rows["Missing"][1].endswith("77 more")
    assert not section.all("li") and len(section.all("svg")) == 1


@pytest.mark.parametrize(("side", "most"), [(200, 192), (512, 192), (63, 63), (64, 64)])
def test_large_images_are_reduced_and_small_ones_kept(written, side, most):
    images = np.broadcast_to(random_images(4, side=1), (4, side, side, 3))
    _, page = written(images)
    image = page.by_id("samples").all("img")[0]
    assert pixels(image).shape == (most, most, 3)
    assert np.array_equal(pixels(image)[0, 0], images[0, 0, 0])
    assert (image.attributes.get("class") == "small") == (side < 64)


def test_the_file_stays_below_its_size_by_smaller_images(written, tmp_path, monkeypatch):
    images, reference = random_images(40, side=200), random_images(40, side=200, seed=1)
    monkeypatch.setattr(report, "MOST_BYTES", 5_000_000)
    _, page = written(images, reference=reference)
    size = max(pixels(image).shape[0] for image in page.all("img"))
    assert (tmp_path / "report.html").stat().st_size <= 5_000_000 and size == 96


def test_print_and_dark_rules_are_there(written):
    text, page = written(random_images(40))
    style = page.all("style")[0].text()
    for rule in ("@media print", "size: A4", "break-inside: avoid", "table-header-group", "pixelated"):
        assert rule in style
    assert "prefers-color-scheme: dark" in style and style.count("{") == style.count("}")


def test_few_images_are_enough(written):
    _, page = written(random_images(2), [0, 1], reference=random_images(2, seed=1), classes=2)
    assert shown(page.by_id("samples")) == [0, 1] and len(shown(page.by_id("certainty"))) == 2
    assert len(page.by_id("nearest").all("img")) == 6


def test_an_old_report_stays_if_the_new_one_fails(tmp_path):
    images = ArrayImages(random_images(4))
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(InvalidArgument, match="evaluation"):
        found = features_of(random_images(5))
        write_report(path, evaluation_of(images, found), images)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]
    with pytest.raises(OutputError, match="missing"):
        found = features_of(random_images(4))
        write_report(tmp_path / "missing" / "r.html", evaluation_of(images, found), images)


def test_images_of_two_channels_are_refused(tmp_path):
    images = ArrayImages(random_images(4, channels=2))
    found = features_of(random_images(4))
    with pytest.raises(InvalidArgument, match="samples"):
        write_report(tmp_path / "r.html", evaluation_of(images, found), images)


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.678, "12,345.68"), (2.0, "2.00"), (1.9999, "2.000"), (0.0, "0.000"), (-0.0001234, "-0.000123")],
)
def test_numbers_are_shown_with_fitting_digits(value, text):
    assert show_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "> 99.99 %"),
        (0.99995, "> 99.99 %"),
        (0.9999, "99.99 %"),
        (0.123456, "12.35 %"),
        (0.0, "< 0.01 %"),
    ],
)
def test_a_probability_is_never_shown_as_certain(value, text):
    assert show_percent(value) == text
