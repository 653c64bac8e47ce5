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
from bench.measure import Case, Settings, short
from bench.results import Row
from bench.sampling.compare import Comparison
from bench.sampling.contender import Entry
from bench.sampling.ours import Ours
from bench.sampling.subject import Subject

WHOLE = "whole engine"
ROUNDS_SECONDS = {"cuda": 3.0, "cpu": 30.0}
# Settings that run these ops as the published code does.
NO_NORM, NO_ATTENTION = "group_norm_silu=reference", "attention=reference"
FOLDS = {
    "two_sources": "two sources",
    "residual": "residual in the convolution",
    "qkv_rows": "qkv rows",
    "embeddings": "embeddings at once",
}


@dataclass(frozen=True)
class Form:
    """A variant of the engine, with some of its parts; the fields are those of `Ours`.

    precision: its own, "" for that of the whole engine.
    """

    name: str
    options: EngineOptions = field(default_factory=EngineOptions)
    setting: str = ""
    precision: str = ""

    def entry(self, precision: str) -> Entry:
        """Return the entry of the variant, in the given precision unless it has its own."""
        made = replace(self, precision=self.precision or precision)
        return Entry(self.name, precision, partial(Ours, **vars(made)), compiles=self.options.compile)


def added(cuda: bool) -> list[Form]:
    """Return variants from the plain operations to the engine's defaults; each has one part more."""
    both = f"{NO_NORM},{NO_ATTENTION}"
    forms = [
        Form("plain", PLAIN, both),
        Form("fused norm", PLAIN, NO_ATTENTION),
        Form("fused attention", PLAIN),
    ]

    def then(name: str, **changes: object) -> None:
        forms.append(Form(name, replace(forms[-1].options, **changes)))  # type: ignore[arg-type]

    missing = PARTS - {"channels_last"}
    then("prepared step", prepared=True)
    then("folded convolutions", fold=FoldOptions(conv="library", _without=missing))
    then("fastest convolution", fold=FoldOptions(_without=missing))
    for part, name in FOLDS.items():
        missing -= {part}
        then(name, fold=FoldOptions(_without=missing))
    then("graph" if cuda else "replay", graph=True)
    if cuda:
        then("two branches", branches=True)
    return forms


def without(cuda: bool) -> list[Form]:
    """Return variants of the whole engine, each without one part."""
    whole = EngineOptions()

    def less(part: str) -> EngineOptions:
        return replace(whole, fold=FoldOptions(_without=frozenset({part})))

    forms = [
        Form("channels-last", less("channels_last")),
        Form("fused norm", whole, NO_NORM),
        Form("fused attention", whole, NO_ATTENTION),
        Form("fused update", whole, "sampler_step=reference"),
        Form("prepared step", replace(whole, prepared=False, graph=False, branches=False)),
        Form("folded convolutions", replace(whole, fold=None)),
        Form("fastest convolution", replace(whole, fold=FoldOptions(conv="library"))),
        *(Form(name, less(part)) for part, name in FOLDS.items()),
    ]
    forms.append(Form("graph" if cuda else "replay", replace(whole, graph=False, branches=False)))
    if cuda:
        forms.append(Form("two branches", replace(whole, branches=False)))
    return forms


def cases(
    settings: Settings, pairs: Sequence[tuple[Subject, int]], precision: str, compiled: bool = False
) -> Iterator[Case]:
    """Yield a case for every variant of every (preset, batch)."""
    ladder = added(settings.cuda)
    if compiled:
        ladder.append(Form("compiled", replace(EngineOptions(), compile=True)))
    if not settings.cuda and precision == "bf16":
        ladder.append(Form("3x3 convolutions of 8 bits", precision="int8"))
    lists = {"ablation_added": ladder, "ablation_without": without(settings.cuda)}
    for subject, batch in pairs:
        whole = Form(WHOLE).entry(precision)
        whole = replace(whole, make=lru_cache(maxsize=1)(whole.make))  # made once for all variants
        for kind, forms in lists.items():
            for form in forms:
                entry = form.entry(precision)
                budget = ROUNDS_SECONDS[settings.device.type]
                one = Comparison(kind, subject, batch, [whole, entry], budget)
                yield replace(one.case(entry), measure=partial(_measure, one, entry), together=None)


def _measure(one: Comparison, entry: Entry, settings: Settings) -> Row:
    """Return the variant's row, with `ratio`: its time divided by that of the whole engine."""
    row = dict(one.row_of(entry, settings))
    whole = one.row_of(one.entries[0], settings)
    ratio = 1 / row.pop("faster_than")[f"{WHOLE} {entry.dtype}"]
    return row | {"ratio": short(ratio), "whole_ms": whole["ms"]}
