"""Measure each optimisation of our step: parts of the engine added one after another, and each one left out.

Every variant is timed in turns with the whole engine, on the same weights and batch, so that other load on
the machine does not change the ratio of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from admfast.engine.options import PLAIN, EngineOptions
from admfast.models.fold import PARTS, FoldOptions
from bench.measure import Case, Settings, round_to_5_digits
from bench.results import Row
from bench.sampling.compare import Comparison
from bench.sampling.contender import Entry
from bench.sampling.ours import Ours
from bench.sampling.subject import Subject

WHOLE = "whole engine"
SECONDS_OF_ALL_ROUNDS = {"cuda": 3.0, "cpu": 30.0}
# Settings that run these ops as the published code does.
NO_NORM, NO_ATTENTION = "group_norm_silu=reference", "attention=reference"
FOLD_PARTS = {
    "two_sources": "two sources",
    "residual": "residual in the convolution",
    "qkv_rows": "qkv rows",
    "embeddings": "embeddings at once",
}


@dataclass(frozen=True)
class EngineVariant:
    """A variant of the engine, with some of its parts; the fields are those of `Ours`.

    precision: its own, "" for that of the whole engine.
    """

    name: str
    options: EngineOptions = field(default_factory=EngineOptions)
    impl_setting: str = ""
    precision: str = ""

    def entry(self, precision: str) -> Entry:
        """Return the entry of the variant, in the given precision unless it has its own."""
        made = replace(self, precision=self.precision or precision)
        return Entry(self.name, precision, partial(Ours, **vars(made)), compiles=self.options.compile)


def added_variants(cuda: bool) -> list[EngineVariant]:
    """Return variants from the plain operations to the engine's defaults; each has one part more."""
    both = f"{NO_NORM},{NO_ATTENTION}"
    variants = [
        EngineVariant("plain", PLAIN, both),
        EngineVariant("fused norm", PLAIN, NO_ATTENTION),
        EngineVariant("fused attention", PLAIN),
    ]

    def add(name: str, **changes: object) -> None:
        variants.append(EngineVariant(name, replace(variants[-1].options, **changes)))  # type: ignore[arg-type]

    missing = PARTS - {"channels_last"}
    add("prepared step", prepared=True)
    add("folded convolutions", fold=FoldOptions(conv="library", _without=missing))
    add("fastest convolution", fold=FoldOptions(_without=missing))
    for part, name in FOLD_PARTS.items():
        missing -= {part}
        add(name, fold=FoldOptions(_without=missing))
    add("graph" if cuda else "replay", graph=True)
    if cuda:
        add("two branches", branches=True)
    return variants


def reduced_variants(cuda: bool) -> list[EngineVariant]:
    """Return variants of the whole engine, each without one part."""
    whole = EngineOptions()

    def without_fold_part(part: str) -> EngineOptions:
        return replace(whole, fold=FoldOptions(_without=frozenset({part})))

    variants = [
        EngineVariant("channels-last", without_fold_part("channels_last")),
        EngineVariant("fused norm", whole, NO_NORM),
        EngineVariant("fused attention", whole, NO_ATTENTION),
        EngineVariant("fused update", whole, "sampler_step=reference"),
        EngineVariant("prepared step", replace(whole, prepared=False, graph=False, branches=False)),
        EngineVariant("folded convolutions", replace(whole, fold=None)),
        EngineVariant("fastest convolution", replace(whole, fold=FoldOptions(conv="library"))),
        *(EngineVariant(name, without_fold_part(part)) for part, name in FOLD_PARTS.items()),
    ]
    variants.append(EngineVariant("graph" if cuda else "replay", replace(whole, graph=False, branches=False)))
    if cuda:
        variants.append(EngineVariant("two branches", replace(whole, branches=False)))
    return variants


def cases(
    settings: Settings, pairs: Sequence[tuple[Subject, int]], precision: str, compiled: bool = False
) -> Iterator[Case]:
    """Yield a case for every variant of every (preset, batch)."""
    added = added_variants(settings.cuda)
    if compiled:
        added.append(EngineVariant("compiled", replace(EngineOptions(), compile=True)))
    if not settings.cuda and precision == "bf16":
        added.append(EngineVariant("3x3 convolutions of 8 bits", precision="int8"))
    lists = {"ablation_added": added, "ablation_without": reduced_variants(settings.cuda)}
    for subject, batch in pairs:
        whole = EngineVariant(WHOLE).entry(precision)
        whole = replace(whole, make=lru_cache(maxsize=1)(whole.make))  # made once for all variants
        for kind, variants in lists.items():
            for variant in variants:
                entry = variant.entry(precision)
                budget = SECONDS_OF_ALL_ROUNDS[settings.device.type]
                comparison = Comparison(kind, subject, batch, [whole, entry], budget)
                yield replace(
                    comparison.case(entry), measure=partial(_measure, comparison, entry), measured_with=None
                )


def _measure(comparison: Comparison, entry: Entry, settings: Settings) -> Row:
    """Return the variant's row, with `ratio`: its time divided by that of the whole engine."""
    row = dict(comparison.row_of(entry, settings))
    whole = comparison.row_of(comparison.entries[0], settings)
    ratio = 1 / row.pop("faster_than")[f"{WHOLE} {entry.dtype}"]
    return row | {"ratio": round_to_5_digits(ratio), "whole_ms": whole["ms"]}
