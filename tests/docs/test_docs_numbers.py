"""Tests that the docs' numbers equal the committed rows, and that the README's equal the docs'."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from admfast.ops import TABLES
from bench.results import read_rows
from tests.docs.pages import ROOT, text_of

RESULTS = ROOT / "bench" / "results"
XEON, H100 = "intel-xeon-processor-model-207-2-of-2-cpus", "nvidia-h100-80gb-hbm3"
AMX = "intel-xeon-processor-model-207-2-of-2-cpus-amx"
EPYC = "amd-epyc-model-17-2-of-2-cpus"
# Folder of the rows, dtype of admfast, dtype of the published code.
MACHINES = {"H100": (H100, "auto", "fp16"), "Xeon": (XEON, "fp32", "fp32")}


def tables(page: str) -> Iterator[list[dict[str, str]]]:
    """Yield the tables of a page; each row is a dict from column to cell."""
    for found in re.findall(r"(?:^\|.*\|\n)+", text_of(page), re.M):
        head, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found.splitlines()
        )
        yield [dict(zip(head, row, strict=True)) for row in rows]


def table(page: str, *columns: str) -> list[dict[str, str]]:
    """Return the only table of a page with these columns."""
    (found,) = (rows for rows in tables(page) if rows and set(columns) <= set(rows[0]))
    return found


def says(cell: str, value: float) -> bool:
    """Tell whether a cell equals the value, rounded to the cell's digits (half a digit either way)."""
    number = cell.removesuffix("%").strip()
    digits = len(number.partition("e")[0].partition(".")[2])
    unit = 10.0 ** (int(number.partition("e")[2] or 0) - digits)
    return abs(float(number) - value * (100 if cell.endswith("%") else 1)) <= 0.5 * unit * (1 + 1e-9)


def test_a_cell_says_its_value():
    assert says("58.4", 58.395) and says("2548", 2547.7) and says("4e-05", 4.36e-05) and says("99.6%", 0.996)
    assert not says("58.5", 58.395) and not says("2549", 2547.7) and not says("5e-05", 4.36e-05)


def row_of(
    folder: str, bench: str, provider: str, dtype: str, kind: str = "", **shape: Any
) -> dict[str, Any]:
    """Return the only committed row of a provider at a shape."""
    rows = read_rows(RESULTS / folder / f"{bench}.jsonl")
    (found,) = (
        row for row in rows
        if (row["provider"], row["dtype"]) == (provider, dtype) and "ms" in row
        and kind in ("", row["kind"]) and shape.items() <= row["shape"].items()
    )  # fmt: skip
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_the_guided_steps_are_those_that_were_measured(page):
    for row in table(page, "published, ms", "admfast, ms", "times as fast"):
        folder, ours, theirs = MACHINES[re.split("[, ]", row["machine"])[0]]
        shape = {"system": row["model"], "batch": int(row["batch"])}
        measured = row_of(folder, "sampling", "admfast", ours, **shape)
        published = row_of(folder, "sampling", "published", theirs, **shape)
        assert says(row["admfast, ms"], measured["ms"]) and says(row["published, ms"], published["ms"]), row
        assert says(row["times as fast"], measured["faster_than"][f"published {theirs}"]), row


def test_the_other_contenders_are_those_that_were_measured():
    for row in table("docs/speed.md", "channels-last and frozen, ms"):
        folder, ours, theirs = MACHINES[re.split("[, ]", row["machine"])[0]]
        shape = {"system": row["model"], "batch": int(row["batch"])}
        frozen = row_of(folder, "sampling", "published, channels-last", theirs, **shape)
        half = row_of(folder, "sampling", "admfast", "auto" if ours == "auto" else "bf16", **shape)
        assert says(row["channels-last and frozen, ms"], frozen["ms"]), row
        assert says(row["admfast bfloat16, ms"], half["ms"]), row


def test_the_steps_with_amx_are_those_that_were_measured():
    columns = {"OpenVINO, ms": ("openvino", "bf16"), "bfloat16, ms": ("admfast", "bf16")}
    columns |= {"int8, ms": ("admfast", "int8")}
    for row in table("docs/speed.md", *columns):
        kind = "guided_step" if row["step"] == "guided" else "step"
        shape = {"system": "imagenet64", "batch": int(row["batch"])}
        cells = {name: cell for name in columns if (cell := row[name]) != "-"}
        assert len(cells) == (2 if row["step"] == "guided" else 3)
        for name, cell in cells.items():
            assert says(cell, row_of(AMX, "sampling", *columns[name], kind, **shape)["ms"]), row


def test_the_norms_are_those_that_were_measured():
    for row in table("docs/speed.md", "channels, side"):
        channels, side = map(int, row["channels, side"].split(","))
        for variant in ("plain", "adaptive"):
            shape = {"channels": channels, "side": side, "batch": 1, "variant": variant}
            measured = row_of(XEON, "kernels", "cpp", "bf16", "group_norm_silu", **shape)
            assert says(row[f"{variant}, ms"], measured["ms"]), row


def test_the_training_steps_are_those_that_were_measured():
    for row in table("docs/training.md", "images/s", "error of the gradient"):
        program, precision = row[""].split(",")[:2]
        dtype = "bf16" if "bfloat16" in precision else "fp32"
        provider = "published, channels-last" if "channels-last" in row[""] else program
        measured = row_of(EPYC, "training", provider, dtype, system="adm64", batch=4)
        for column, name in (("ms", "ms"), ("images/s", "images_per_s"), ("peak memory, MB", "peak_mb")):
            assert says(row[column], measured[name]), row
        assert says(row["error of the gradient"], measured["rel_err"]), row


def test_the_programs_are_those_that_were_measured():
    for row in table("docs/accelerate.md", "program", "core"):
        shape = {"program": row["program"].rpartition("/")[2], "core": row["core"].strip("`"), "threads": 1}
        own = row_of(EPYC, "programs", "program", "fp32", **shape)
        accelerated = row_of(EPYC, "programs", "accelerated", "fp32", **shape)
        assert says(row["its own, ms"], own["ms"]) and says(row["accelerated, ms"], accelerated["ms"]), row
        assert says(row["times as fast"], own["ms"] / accelerated["ms"]), row
        assert says(row["largest difference"], accelerated["rel_err"]), row


def test_the_quality_of_the_digits_is_that_which_was_measured():
    columns = {
        "class right": "accuracy",
        "Frechet distance": "frechet",
        "1-NN accuracy": "nearest_neighbour",
        "precision": "precision",
        "recall": "recall",
        "near copies": "copies",
    }
    measured = json.loads((RESULTS / "digits32" / "quality.json").read_text())["rows"]
    rows = table("docs/accuracy.md", *columns)
    assert {row["samples"] for row in rows} == set(measured)
    for row in rows:
        assert all(says(row[column], measured[row["samples"]][name]) for column, name in columns.items()), row


def test_the_quality_of_8_bits_is_that_which_was_measured():
    folder = RESULTS / "digits32"
    documents = {
        name: json.loads((folder / f"quality{name}.json").read_text())
        for name in ("", "_int8", "_seeds1000", "_seeds1000_ddim")
    }
    assert [one.get("precision") for one in documents.values()] == ["fp32", "int8", "fp32", "fp32"]
    other_seeds = documents["_seeds1000"]["rows"] | documents["_seeds1000_ddim"]["rows"]
    measured = {
        "int8": documents["_int8"]["rows"],
        "float32": documents[""]["rows"],
        "float32, other seeds": other_seeds,
    }
    rows = table("docs/accuracy.md", "Frechet distance of", *measured)
    assert len(rows) == 4
    for row in rows:
        for name, samples in measured.items():
            assert says(row[name], samples[row["Frechet distance of"]]["frechet"]), row


@pytest.mark.parametrize(
    ("samples", "files"),
    [
        ("samples", ["ten", "ten_seeds1000", "ten_seeds2000"]),
        ("1,797 samples", ["ten_all_seeds0", "ten_all_seeds2000", "ten_all_seeds4000"]),
    ],
)
def test_the_quality_of_few_steps_is_that_which_was_measured(samples, files):
    columns = {"Frechet distance": "frechet", "1-NN accuracy": "nearest_neighbour", "recall": "recall"}
    measured = [json.loads((RESULTS / "digits32" / f"quality_{name}.json").read_text()) for name in files]
    assert len({found["first_seed"] for found in measured}) == 3
    rows = table("docs/accuracy.md", samples, "recall, three sets")
    assert {row[samples] for row in rows} == set(measured[0]["rows"]) - {"two halves of the real digits"}
    for row in rows:
        for column, name in columns.items():
            values = [found["rows"][row[samples]][name] for found in measured]
            low, high = row[f"{column}, three sets"].split(" to ")
            assert says(low, min(values)) and says(high, max(values)), row


def test_the_images_a_second_of_the_solvers_are_those_that_were_measured():
    measured = json.loads((RESULTS / "amd-epyc-model-17-2-of-2-cpus" / "quality_speed.json").read_text())
    assert (measured["precision"], measured["threads"], measured["dirty"]) == ("fp32", 2, False)
    rates = measured["images_per_second"]
    for row in table("docs/accuracy.md", "steps", "images a second, unguided"):
        for kind in ("unguided", "guidance 2"):
            assert says(row[f"images a second, {kind}"], rates[f"{row['steps']}, {kind}"]), row
    by_evaluations: dict[tuple[str, str], list[float]] = {}
    for name, rate in rates.items():
        steps, kind = name.split(", ")
        by_evaluations.setdefault((steps.split()[1], kind), []).append(rate)
    assert all(max(found) <= 1.2 * min(found) for found in by_evaluations.values())


def test_the_times_of_evaluation_are_those_that_were_measured():
    measured = json.loads((RESULTS / AMX / "evaluation.json").read_text())
    names = ["precision_recall_s", "precision_recall_memory", "statistics_s", "frechet_distance_s"]
    names += ["images_per_second", "plain_images_per_second"]
    (rows,) = (found for found in tables("docs/evaluation.md") if set(found[0]) == {"what", "value"})
    for row, name in zip(rows, names, strict=True):
        number, _, unit = row["value"].partition(" ")
        assert says(number, measured[name] / (1e9 if unit == "GB" else 1)), row
    assert measured["inception_error"] <= 1e-4 and measured["rows"] == 10_000


def test_the_quality_by_kind_of_guidance_is_that_which_was_measured():
    columns = {"Frechet distance": "frechet", "1-NN accuracy": "nearest_neighbour"}
    columns |= {"precision": "precision", "recall": "recall"}
    measured = {}
    for name in ("guidance", "weak", "null_class"):
        measured |= json.loads((RESULTS / "digits32" / f"quality_{name}.json").read_text())["rows"]
    by_guide = {name.partition(", ")[2]: found for name, found in measured.items() if ", " in name}
    by_guide["nothing"] = by_guide.pop("weak network 1")
    guide = "twenty steps of `dpmpp:sde=true`, guided by"
    rows = table("docs/accuracy.md", guide)
    assert {row[guide] for row in rows} == set(by_guide)
    for row in rows:
        assert all(says(row[column], by_guide[row[guide]][name]) for column, name in columns.items()), row


def test_the_accuracy_of_the_readme_is_that_of_the_docs():
    columns = ("largest error found", "limit")
    whole = {row["what"]: [row[name] for name in columns] for row in table("docs/accuracy.md", *columns)}
    for row in table("README.md", *columns):
        assert whole[row["what"]] == [row[name] for name in columns]


@pytest.mark.parametrize("op", TABLES)
def test_the_table_of_ops_names_every_implementation(op):
    page = text_of("docs/architecture.md")
    (row,) = (line for line in page.splitlines() if re.match(rf"\| [^|]*`{op}`", line))
    assert {name for name in TABLES[op].names() if name != "reference"} <= set(re.findall(r"`([\w-]+)`", row))


def test_every_page_of_the_docs_is_in_the_readme_or_the_navigation():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert pages <= named
