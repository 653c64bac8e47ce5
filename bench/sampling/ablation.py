"""What each optimisation of our step gives: added one after another, and switched off alone.

Every form is timed in turns with the whole engine, on the same weights and batch, so that the ratio of the
two holds whatever the machine does in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from admfast.engine.options import PLAIN, EngineOptions
from admfast.models.fold import FoldOptions
from bench.measure import Case, Settings, short
from bench.results import Row
from bench.sampling.compare import Comparison
from bench.sampling.contender import Contender, Entry
from bench.sampling.ours import Ours
from bench.sampling.subject import Inputs, Subject

WHOLE = "whole engine"
ROUNDS_SECONDS = {"cuda": 3.0, "cpu": 30.0}
# Everything that the reference operations do in the published code's way.
NO_NORM, NO_ATTENTION = "group_norm_silu=reference", "attention=reference"
NO_FOLD = FoldOptions(
    conv="library",
    channels_last=True,
    two_sources=False,
    residual=False,
    qkv_rows=False,
    subpixel=False,
    embeddings=False,
)


@dataclass(frozen=True)
class Form:
    """The engine with some of its parts: see `Ours` for the fields."""

    name: str
    options: EngineOptions = field(default_factory=EngineOptions)
    setting: str = ""
    channels_last: bool = True

    def entry(self, precision: str) -> Entry:
        """The form as a contender."""

        def make(subject: Subject, inputs: Inputs) -> Contender:
            return Ours(
                subject,
                inputs,
                name=self.name,
                precision=precision,
                options=self.options,
                setting=self.setting,
                channels_last=self.channels_last,
            )

        return Entry(self.name, precision, make)


def added(cuda: bool) -> list[Form]:
    """From the plain operations to the whole engine and beyond, one part more in each form.

    The last two are not in the engine's defaults.
    """
    both = f"{NO_NORM},{NO_ATTENTION}"
    prepared = replace(PLAIN, prepared=True)
    forms = [
        Form("plain", PLAIN, both, channels_last=False),
        Form("channels-last", PLAIN, both),
        Form("fused norm", PLAIN, NO_ATTENTION),
        Form("fused attention", PLAIN),
        Form("prepared step", prepared),
        Form("folded convolutions", replace(prepared, fold=NO_FOLD)),
    ]
    fold = NO_FOLD
    for name, change in (
        ("fastest convolution", {"conv": None}),
        ("two sources", {"two_sources": True}),
        ("residual in the convolution", {"residual": True}),
        ("qkv rows", {"qkv_rows": True}),
        ("embeddings at once", {"embeddings": True}),
    ):
        fold = replace(fold, **change)
        forms.append(Form(name, replace(prepared, fold=fold)))
    options = forms[-1].options
    if cuda:
        options = replace(options, graph=True)
        forms.append(Form("graph", options))
        options = replace(options, branches=True)
        forms.append(Form("two branches", options))
    whole = replace(options, graph=True, branches=True)  # without meaning on a CPU
    return [*forms, Form("sub-pixel", _with(whole, subpixel=True))]


def without(cuda: bool) -> list[Form]:
    """The whole engine less one part."""
    whole = EngineOptions()
    forms = [
        Form("channels-last", _with(whole, channels_last=False), channels_last=False),
        Form("fused norm", whole, NO_NORM),
        Form("fused attention", whole, NO_ATTENTION),
        Form("fused update", whole, "sampler_step=reference"),
        Form("prepared step", replace(whole, prepared=False, graph=False, branches=False)),
        Form("folded convolutions", replace(whole, fold=None)),
        Form("fastest convolution", _with(whole, conv="library")),
        Form("two sources", _with(whole, two_sources=False)),
        Form("residual in the convolution", _with(whole, residual=False)),
        Form("qkv rows", _with(whole, qkv_rows=False)),
        Form("embeddings at once", _with(whole, embeddings=False)),
    ]
    if cuda:
        forms.append(Form("graph", replace(whole, graph=False, branches=False)))
        forms.append(Form("two branches", replace(whole, branches=False)))
    return forms


def _with(options: EngineOptions, **changes: object) -> EngineOptions:
    """The options with another fold."""
    assert options.fold is not None
    return replace(options, fold=replace(options.fold, **changes))  # type: ignore[arg-type]


def cases(
    settings: Settings, pairs: Sequence[tuple[Subject, int]], precision: str, compiled: bool = False
) -> Iterator[Case]:
    """A row for every form of every (preset, batch)."""
    ladder = added(settings.cuda)
    if compiled:
        ladder.append(Form("compiled", replace(EngineOptions(), compile=True)))
    lists = {"ablation_added": ladder, "ablation_without": without(settings.cuda)}
    for subject, batch in pairs:
        whole = _kept(Form(WHOLE).entry(precision))
        for kind, forms in lists.items():
            for form in forms:
                entry = form.entry(precision)
                budget = ROUNDS_SECONDS[settings.device.type]
                one = Comparison(kind, subject, batch, [whole, entry], budget)
                yield replace(one.case(entry), measure=partial(_measure, one, entry), together=None)


def _kept(entry: Entry) -> Entry:
    """An entry whose contender is made once, and serves one comparison after another."""
    return replace(entry, make=lru_cache(maxsize=1)(entry.make))


def _measure(one: Comparison, entry: Entry, settings: Settings) -> Row:
    """The form's row, with its ratio to the whole engine."""
    row = dict(one.row_of(entry, settings))
    whole = one.row_of(one.entries[0], settings)
    ratio = 1 / row.pop("faster_than")[f"{WHOLE} {entry.dtype}"]
    return row | {"ratio": short(ratio), "whole_ms": whole["ms"]}
