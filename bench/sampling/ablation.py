"""What each optimisation of our step gives: added one after another, and switched off alone.

Every form is timed in turns with the whole engine, on the same weights and batch, so that the ratio of the
two holds whatever the machine does in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from admfast.engine.options import PLAIN, EngineOptions
from admfast.models.fold import PARTS, FoldOptions
from bench.case import Case, Settings
from bench.registry import PREDICTED_GAINS
from bench.results import Row
from bench.sampling.bout import Bout
from bench.sampling.contender import Contender, Entry
from bench.sampling.ours import Ours
from bench.sampling.subject import Inputs, Subject

WHOLE = "whole engine"
BOUT_SECONDS = {"cuda": 3.0, "cpu": 30.0}
# Everything that the reference operations do in the published code's way.
NO_NORM, NO_ATTENTION = "group_norm_silu=reference", "attention=reference"
NO_FOLD = FoldOptions(conv="library", _without=PARTS - {"channels_last"})
FOLDS = {
    "two_sources": "two sources",
    "residual": "residual in the convolution",
    "qkv_rows": "qkv rows",
    "embeddings": "embeddings at once",
}


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

    What ends it is the engine's defaults.
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
    fold = replace(fold, conv=None)
    forms.append(Form("fastest convolution", replace(prepared, fold=fold)))
    for part, name in FOLDS.items():
        fold = replace(fold, _without=fold._without - {part})
        forms.append(Form(name, replace(prepared, fold=fold)))
    options = forms[-1].options
    if cuda:
        options = replace(options, graph=True)
        forms.append(Form("graph", options))
        options = replace(options, branches=True)
        forms.append(Form("two branches", options))
    return forms


def without(cuda: bool) -> list[Form]:
    """The whole engine less one part."""
    whole = EngineOptions()
    forms = [
        Form("channels-last", _with(whole, _without=frozenset({"channels_last"})), channels_last=False),
        Form("fused norm", whole, NO_NORM),
        Form("fused attention", whole, NO_ATTENTION),
        Form("fused update", whole, "sampler_step=reference"),
        Form("prepared step", replace(whole, prepared=False, graph=False, branches=False)),
        Form("folded convolutions", replace(whole, fold=None)),
        Form("fastest convolution", _with(whole, conv="library")),
        *(Form(name, _with(whole, _without=frozenset({part}))) for part, name in FOLDS.items()),
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
    kind = settings.device.type
    # First those whose gains somebody predicted.
    for subject, batch in sorted(
        pairs, key=lambda pair: (kind, pair[0].name, pair[1]) not in PREDICTED_GAINS
    ):
        whole = _kept(Form(WHOLE).entry(precision))
        ladder = added(settings.cuda)
        if compiled:
            ladder.append(Form("compiled", replace(EngineOptions(), compile=True)))
        lists = {"ablation_added": ladder, "ablation_without": without(settings.cuda)}
        for list_name, forms in lists.items():
            for form in forms:
                entries = [whole, form.entry(precision)]
                bout = Bout(list_name, subject, batch, entries, BOUT_SECONDS[kind])
                yield _case(bout, form, list_name, predicted(kind, subject.name, batch, form.name))


def predicted(kind: str, system: str, batch: int, form: str) -> float | None:
    """The part of the plain step's time that a form was predicted to save; None where nobody did."""
    return PREDICTED_GAINS.get((kind, system, batch), {}).get(form)


def _kept(entry: Entry) -> Entry:
    """An entry whose contender is made once, and serves one bout after another."""
    made: list[Contender] = []

    def make(subject: Subject, inputs: Inputs) -> Contender:
        if not made:
            made.append(entry.make(subject, inputs))
        return made[0]

    return replace(entry, make=make)


def _case(bout: Bout, form: Form, list_name: str, expected: float | None) -> Case:
    """The form's case of a bout, with its ratio to the whole engine."""
    case = next(case for case in bout.cases() if case.provider == form.name)

    def measure(settings: Settings) -> Row:
        row = dict(case.measure(settings))
        whole = bout.found[WHOLE, case.dtype]
        assert not isinstance(whole, Exception)
        ratio: float = 1 / row.pop("faster_than")[f"{WHOLE} {case.dtype}"]
        row |= {"ratio": float(f"{ratio:.5g}"), "whole_ms": whole["ms"]}
        bout.found.clear()
        return row | ({} if expected is None else {"predicted": expected})

    return replace(case, measure=measure)
