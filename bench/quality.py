"""Measure the quality of digit samples: class accuracy, Frechet distance, neighbours, precision and recall.

`python -m bench.quality` samples the digits32 system and compares the samples with the 1,797 real
digits as vectors of 64 pixels: block means reduce images to 8x8, on the digits' scale of 0 to 16.
It may be stopped at any time and keeps the finished rows. The exit status is that of the other benches
(`bench.command`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

import admfast
from admfast.evaluation import frechet_distance, precision_recall
from admfast.models.presets import SYSTEMS
from admfast.sampling.guides import NetworkGuide, by_classifier, by_null_class, by_weak_network
from admfast.training.digit_images import MAX_GREY_LEVEL, NUM_CLASSES, block_means, load_digits
from bench.command import STARTUP_SECONDS, UNFINISHED, end_with_parent, supervise
from bench.results import conditions, environment, markdown_table

BATCH = 50
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """One way of sampling: solver, steps, guidance, spacing of the timesteps (None: the solver's).

    guidance: the classifier's scale, or a guide by a network.
    """

    solver: str
    steps: int
    guidance: float | NetworkGuide
    spacing: str | None = None

    @property
    def name(self) -> str:
        guided = f"guidance {self.guidance:g}" if isinstance(self.guidance, float) else str(self.guidance)
        spacing = f" {self.spacing}" if self.spacing else ""
        return f"{self.solver} {self.steps}{spacing}, {guided if self.guidance else 'unguided'}"


# Each set is (solver, spacing, counts of steps); every count is measured with guidance and without.
_SETS = {
    "published": (("ddpm", None, (50,)), ("ddim", None, (25, 10))),
    "solvers": (
        ("ddpm", None, (50, 25, 10)),
        ("ddim", None, (50, 25, 10, 5)),
        ("unipc", None, (10, 5)),
        ("unipc", "log-snr", (20, 10, 5)),
        ("dpmpp", None, (10, 5)),
        ("dpmpp:sde=true", None, (50, 25, 20, 10, 5)),
        ("deis", None, (10, 5)),
        ("ipndm", None, (10, 5)),
        ("heun", None, (19, 9)),
    ),
    "ten": (
        ("ddim", None, (25,)),
        ("unipc", None, (10,)),
        ("unipc", "log-snr", (10,)),
        ("dpmpp:sde=true", None, (10,)),
    ),
}
SETS = {
    name: tuple(
        Setting(solver, steps, guidance, spacing)
        for solver, spacing, counts in entries
        for steps in counts
        for guidance in (2.0, 0.0)
    )
    for name, entries in _SETS.items()
}


# Ways to guide the same 20 steps.
GUIDES = (
    by_classifier(1.0),
    by_classifier(2.0),
    by_classifier(2.0, every=2),
    by_classifier(2.0, every=2, reuse=True),
    by_classifier(2.0, count=5, reuse=True),
    by_classifier(2.0, interval=(200, 800)),
    by_classifier((0.0, 4.0)),
    by_classifier((4.0, 0.0)),
)
SETS["guidance"] = tuple(Setting("dpmpp:sde=true", 20, guide) for guide in GUIDES)
# With --null-class, or with --weak, which name the network that guides.
for _set, _guide in (("null-class", by_null_class), ("weak", by_weak_network)):
    SETS[_set] = tuple(
        Setting("dpmpp:sde=true", 20, _guide(scale, interval))
        for scale in (1.0, 1.25, 1.5, 2.0)
        for interval in (None, (200, 800))[: 1 + (scale > 1)]
    )


@dataclass(frozen=True)
class Quality:
    """Measures of one set of samples; the functions below compute them."""

    accuracy: float
    frechet: float
    nearest_neighbour: float
    precision: float
    recall: float
    copies: float


def nearest_distances(points: Array, among: Array, k: int) -> Array:
    """Return the Euclidean distances [N, k] of points to their k nearest among others, in ascending order."""
    same_points = points is among
    distances = (
        NearestNeighbors(n_neighbors=k + same_points, algorithm="brute").fit(among).kneighbors(points)[0]
    )
    return distances[:, same_points:]  # a point is its own nearest neighbour


def nearest_neighbour_accuracy(a: Array, b: Array) -> float:
    """Return the accuracy of guessing a point's set from its nearest neighbour; 0.5: sets look the same."""
    is_same_set = [
        nearest_distances(same_set, same_set, 1) < nearest_distances(same_set, other_set, 1)
        for same_set, other_set in ((a, b), (b, a))
    ]
    return float(np.concatenate(is_same_set).mean())


def share_of_copies(samples: Array, real: Array) -> float:
    """Return the share of samples that are nearer to a real digit than 99 % of real digits are to another."""
    return float(
        (nearest_distances(samples, real, 1) < np.percentile(nearest_distances(real, real, 1), 1)).mean()
    )


def measure(
    samples: Array, classes: npt.NDArray[np.int64], real: Array, classifier: SVC, real_subset: Array
) -> Quality:
    """Return all measures of samples [N, 64] that were generated as `classes` [N].

    classifier: trained on digits. real_subset: as many real digits as samples, or all if there are fewer.
    """
    precision, recall = precision_recall(samples, real, half=False)
    return Quality(
        accuracy=float((classifier.predict(samples) == classes).mean()),
        frechet=frechet_distance(samples, real),
        nearest_neighbour=nearest_neighbour_accuracy(samples[: len(real_subset)], real_subset),
        precision=precision,
        recall=recall,
        copies=share_of_copies(samples, real),
    )


def measure_halves(real: Array, labels: npt.NDArray[np.int64], rounds: int = 10) -> Quality:
    """Return mean measures of one random half of the real digits against the other, as of a perfect model."""
    qualities = []
    for seed in range(rounds):
        order = np.random.default_rng(seed).permutation(len(real))
        a, b = order[: len(real) // 2], order[len(real) // 2 :]
        classifier = SVC(gamma=0.001).fit(real[b], labels[b])
        qualities.append(measure(real[a], labels[a], real[b], classifier, real[b][: len(a)]))
    return Quality(*(float(np.mean([getattr(q, name) for q in qualities])) for name in asdict(qualities[0])))


def sample(
    pipe: admfast.Pipeline, setting: Setting, count: int, first_seed: int
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return `count` samples as [count, 64] on the scale 0..16, and their classes, in equal shares."""
    classes = np.arange(count) % NUM_CLASSES
    guidance: dict[str, Any] = {
        "guides" if isinstance(setting.guidance, NetworkGuide) else "guidance": setting.guidance
    }
    images = pipe.sample(
        classes.tolist(),
        range(first_seed, first_seed + count),
        solver=setting.solver,
        steps=setting.steps,
        spacing=setting.spacing,
        batch_size=BATCH,
        **guidance,
    )
    levels = images.movedim(-1, 1).float() * (MAX_GREY_LEVEL / 255)
    return block_means(levels).flatten(1).double().numpy(), classes


def table(rows: dict[str, Quality]) -> str:
    """Return the results as a Markdown table."""
    names = [entry.name.replace("_", " ") for entry in fields(Quality)]
    return markdown_table(("samples", *names), [(name, *asdict(q).values()) for name, q in rows.items()])


def weight_hashes(model: str, classifier: str | None, weak: str | None = None) -> dict[str, str]:
    """Return the SHA-256 of every weights file that is measured, by file name."""
    is_system = model in SYSTEMS
    paths = [part.shipped_path for part in SYSTEMS[model].models] if is_system else [model, classifier]
    existing = [Path(path) for path in (*paths, weak) if path is not None]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in existing}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", default="digits32", help="system or weights file (default: digits32)")
    parser.add_argument("--classifier", default=None, help="classifier file, for a --model that is a file")
    parser.add_argument("--weak", default=None, help="file of a weak network, for --set weak")
    parser.add_argument("--precision", default="auto", help="of the networks (default: auto)")
    parser.add_argument("--count", type=int, default=1000, help="samples per setting (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--set", choices=SETS, default="published", help="settings (default: published)")
    parser.add_argument("--only", default="", help="settings to run: text in their names (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the rows (default: none)")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all (default: %(default)g)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process that measures
    return parser.parse_args(argv)


def predict_seconds(pipe: admfast.Pipeline, setting: Setting, count: int) -> float:
    """Return the expected seconds for `count` samples, from one batch of few steps: one for each scale."""
    count_per_batch, seconds = min(BATCH, count), math.inf
    scales = getattr(setting.guidance, "guidance_scale", 0.0)
    steps = len(scales) if isinstance(scales, tuple) else 1
    for _ in range(2):  # the first one is slow, because it prepares the step
        start = time.monotonic()
        sample(pipe, replace(setting, steps=steps), count_per_batch, 0)
        seconds = min(seconds, time.monotonic() - start)
    return seconds / steps * setting.steps * count / count_per_batch


def run(args: argparse.Namespace) -> int:
    """Sample and measure every setting, write rows and conditions after each, and print a table."""
    end = time.monotonic() + args.budget
    torch.manual_seed(0)
    pipe = admfast.load(args.model, classifier=args.classifier, weak=args.weak, precision=args.precision)
    digits, labels = load_digits()
    real, classes = digits.flatten(1).double().numpy(), labels.numpy()
    classifier = SVC(gamma=0.001).fit(real, classes)
    real_subset = real[np.random.default_rng(0).permutation(len(real))[: args.count]]
    # Read before measuring, because files may change in the half hour that it takes.
    document = {
        "samples": args.count,
        "first_seed": args.seed,
        "precision": pipe.policy.name,
        **environment(pipe.device),
        "date": conditions(pipe.device)["date"],
        "weights": weight_hashes(args.model, args.classifier, args.weak),
    }
    rows, slow = {"two halves of the real digits": measure_halves(real, classes)}, {}
    rates: dict[str, float] = {}

    def write() -> None:
        if args.out is not None:
            document["rows"] = {name: asdict(quality) for name, quality in rows.items()} | slow
            document["images_per_second"] = rates
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    write()
    for setting in SETS[args.set]:
        by_classifier_here = getattr(setting.guidance, "network", "classifier") == "classifier"
        if args.only not in setting.name or (setting.guidance and by_classifier_here and not pipe.classifier):
            continue
        seconds, left = predict_seconds(pipe, setting, args.count), end - time.monotonic()
        if seconds > left:
            slow[setting.name] = f"too slow: about {seconds:.0f} s, {max(0.0, left):.0f} s are left"
            print(f"{setting.name}: {slow[setting.name]}", file=sys.stderr, flush=True)
            write()
            continue
        started = time.monotonic()
        samples, classes_of_samples = sample(pipe, setting, args.count, args.seed)
        rates[setting.name] = args.count / (time.monotonic() - started)
        rows[setting.name] = measure(samples, classes_of_samples, real, classifier, real_subset)
        print(f"{setting.name}: {rates[setting.name]:.3g} images/s", file=sys.stderr, flush=True)
        write()
    print(table(rows))
    return UNFINISHED if slow else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench by its command line; a user's error is one line with exit status 2."""
    args = parse_arguments(argv)
    if not args.inside:
        words = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "bench.quality", *words, "--inside"]
        return supervise(command, args.budget + STARTUP_SECONDS)
    end_with_parent()
    try:
        return run(args)
    except admfast.AdmfastError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
