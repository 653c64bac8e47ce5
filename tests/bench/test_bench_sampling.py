"""Tests of the sampling bench: shared weights, wrong contenders rejected, complete rows, resuming."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import pytest
import torch

from admfast.engine.options import EngineOptions
from admfast.models.presets import SYSTEMS
from bench.command import UNFINISHED
from bench.measure import CALLS, Sample, Settings, Unavailable, WrongResult
from bench.ops.matmul_and_conv import PRODUCT_FLOP
from bench.report import render
from bench.results import ResultFile, read_rows
from bench.runner import measure_case, run
from bench.sampling import ablation, compare, contender, ours, published, startup
from bench.sampling.__main__ import main
from bench.sampling.choice import Choice, choose
from bench.sampling.compare import Comparison, paired_ratio
from bench.sampling.contender import Contender, Entry, make_trial
from bench.sampling.flags import PEERS, PUBLISHED_PATH, add_flags
from bench.sampling.subject import TINY, Inputs, Subject, step_flop, subjects
from bench.sampling.weights import network, random_state, shared_state
from tests.bench.published_stub import published_stub
from tests.bench.test_bench_shapes import TOTALS

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, seconds=0.001, quick=True)
QUICK = ["--device", "cpu", "--quick", "--precisions", "fp32", "--peers", "eager", "--inside"]


def without_classifier(subject: Subject) -> Subject:
    return dataclasses.replace(subject, classifier=None, guidance=0.0)


def test_every_preset_s_step_is_there_once() -> None:
    known = subjects()
    listed = set(known) | {name for subject in known.values() for name in subject.also}
    assert listed == set(SYSTEMS)
    assert known["imagenet256-up"].net.image_size == 256 and known["imagenet256-up"].low_res_size == 64
    assert known["lsun-bedroom"].classifier is None and known["lsun-bedroom"].steps == 1000
    assert known["imagenet256"].guidance == SYSTEMS["imagenet256"].guidance


def test_operations_are_those_of_the_published_networks() -> None:
    step, forward = (
        step_flop(subjects()["imagenet64"]),
        step_flop(without_classifier(subjects()["imagenet64"])),
    )
    assert forward / 1e9 == pytest.approx(TOTALS["unet64"], abs=0.001)
    # Forward and the gradient in x. The published 81.050 includes the unused queries of the pool.
    assert (step - forward) / 1e9 == pytest.approx(81.050, rel=2e-3)


def test_weights_are_shared_and_none_is_zero() -> None:
    first, second = (network(TINY.net, 0, CPU) for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr(), name
        assert not a.requires_grad and float(a.abs().min()) >= 0 and float(a.abs().max()) > 0
    state = random_state(TINY.net, seed=0)
    assert all(torch.equal(state[key], value) for key, value in shared_state(TINY.net, 0, CPU).items())
    assert any(not torch.equal(state[key], value) for key, value in random_state(TINY.net, seed=1).items())


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_step_passes_its_trial(precision: str, guided: bool) -> None:
    subject = TINY if guided else without_classifier(TINY)
    trial = make_trial(subject, Inputs.of(subject, 3, CPU))
    assert trial.ends == (0, 2) and (trial.guidance_scale > 0) == guided
    # The compared values depend on the network: at least a fifth of them are not clipped.
    assert 0.2 < float((trial.x0.abs() < 1).double().mean())
    one = ours.entry(precision).make(subject, trial.inputs)
    with one.running():
        one.ready()
        assert 0 < trial.check(one.run_trial(trial), precision) < 0.05
    assert "group_norm_silu" in one.note()["implementation"]


def test_a_guided_trial_moves_x_by_its_guidance() -> None:
    trial = make_trial(TINY, Inputs.of(TINY, 2, CPU))
    without = dataclasses.replace(trial, guidance_scale=0.0)
    one = ours.entry("fp32").make(TINY, trial.inputs)
    with one.running():
        one.ready()
        moved = one.run_trial(trial)[0] - one.run_trial(without)[0]
    assert float(moved.square().mean().sqrt()) == pytest.approx(contender.GUIDANCE_SIZE, rel=0.2)


class Bent(ours.Ours):
    """Our step with one layer's weights multiplied by 1.1."""

    def prepare(self) -> None:
        super().prepare()
        layer = self.engine.net.middle_block[0].in_layers[2]  # type: ignore[index, union-attr]
        layer.weight.data = 1.1 * layer.weight  # a new tensor: all contenders share the old one
        self.engine.ensure_folded()


class NoNoise(ours.Ours):
    """Our step with different noise."""

    def run_trial(self, trial: contender.Trial) -> tuple[torch.Tensor, torch.Tensor]:
        self.inputs = dataclasses.replace(self.inputs, seeds=self.inputs.seeds + 1)
        return super().run_trial(trial)


class Unguided(ours.Ours):
    """Our step with the guidance 10 % too strong."""

    def run_trial(self, trial: contender.Trial) -> tuple[torch.Tensor, torch.Tensor]:
        return super().run_trial(dataclasses.replace(trial, guidance_scale=1.1 * trial.guidance_scale))


@pytest.mark.parametrize("kind", [Bent, NoNoise, Unguided])
def test_a_wrong_contender_is_reported_and_not_timed(kind: type[Contender]) -> None:
    entries = [ours.entry("fp32"), Entry("wrong", "fp32", kind)]
    rows = [measure_case(case, SETTINGS) for case in Comparison("guided_step", TINY, 1, entries).cases()]
    assert [row["status"] for row in rows] == ["ok", "wrong"], rows
    assert "relative error" in rows[1]["reason"] and "ms" not in rows[1]
    assert rows[0]["faster_than"] == {}


def test_rows_say_all_that_is_to_be_reported() -> None:
    entries = [ours.entry("fp32"), ours.entry("bf16")]
    rows = [measure_case(case, SETTINGS) for case in Comparison("guided_step", TINY, 2, entries).cases()]
    for row in rows:
        assert row["status"] == "ok", row
        assert row["ms_q20"] <= row["ms"] <= row["ms_q80"] and len(row["rounds_ms"]) == row["samples"]
        assert row["flop"] == 2 * step_flop(TINY)
        assert row["tflops"] == pytest.approx(row["flop"] / row["ms"] / 1e9, rel=1e-3)
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"] / TINY.steps, rel=1e-3)
        assert row["rel_err"] > 0 and row["steps"] == TINY.steps and row["implementation"]
        json.dumps(row)
    one, other = rows
    assert one["faster_than"] == {"admfast bf16": pytest.approx(paired_ratio(other, one), rel=1e-3)}


class Fails(ours.Ours):
    """A contender that can't be made."""

    def prepare(self) -> None:
        raise MemoryError("no room")


def test_one_that_fails_costs_only_its_own_row() -> None:
    entries = [Entry("broken", "fp32", Fails), ours.entry("fp32")]
    rows = [measure_case(case, SETTINGS) for case in Comparison("guided_step", TINY, 1, entries).cases()]
    assert [row["status"] for row in rows] == ["oom", "ok"]


@pytest.mark.slow
def test_what_was_measured_together_is_written_whatever_the_time(tmp_path) -> None:
    now = [0.0]
    made = []

    class Slow(ours.Ours):
        def prepare(self) -> None:
            super().prepare()
            made.append(self.name)
            now[0] += 100.0

    entries = [Entry(name, "fp32", lambda s, i, name=name: Slow(s, i, name=name)) for name in "ab"]
    groups = {
        "steps": (
            1.0,
            lambda s: [c for kind in "xy" for c in Comparison(kind, TINY, 1, entries).cases()],
        )
    }
    results = ResultFile(tmp_path / "r.jsonl")
    (report,) = run(SETTINGS, results, 50.0, groups, clock=lambda: now[0])
    assert (report.measured, report.left) == (2, 2) and made == ["a", "b"]
    (report,) = run(SETTINGS, results, 1000.0, groups, clock=lambda: now[0])
    assert (report.found, report.measured, report.left) == (2, 2, 0)


@pytest.mark.parametrize(
    "variant", [published.EAGER, published.CHANNELS_LAST], ids=lambda variant: variant.name
)
def test_the_published_code_is_driven_as_its_script_does(variant: published.NetworkVariant, tmp_path) -> None:
    with published_stub(tmp_path / "checkout") as path:
        entry = published.entry(variant, path, CPU)
        (row,) = [measure_case(c, SETTINGS) for c in Comparison("guided_step", TINY, 2, [entry]).cases()]
    assert row["status"] == "ok" and entry.name == variant.name, row
    assert row["rel_err"] < 1e-4


def test_a_checkout_that_is_none_says_so(tmp_path) -> None:
    for path, words in (("", "--guided-diffusion"), (str(tmp_path), "no guided_diffusion/unet.py")):
        entry = published.entry(published.EAGER, path, CPU)
        (case,) = Comparison("guided_step", TINY, 1, [entry]).cases()
        row = measure_case(case, SETTINGS)
        assert row["status"] == "none" and words in row["reason"]


def test_an_import_that_fails_is_a_reason(tmp_path) -> None:
    with published_stub(tmp_path / "checkout") as path:
        (tmp_path / "checkout" / "guided_diffusion" / "respace.py").write_text("import no_such_module_at_all")
        with pytest.raises(Unavailable, match="no_such_module_at_all"):
            published.modules(path)


def test_the_real_published_code_agrees() -> None:
    import os

    path = os.environ.get(PUBLISHED_PATH)
    if not path:
        pytest.skip(f"{PUBLISHED_PATH} names no checkout of the published code")
    entries = [published.entry(variant, path, CPU) for variant in (published.EAGER, published.CHANNELS_LAST)]
    rows = [measure_case(case, SETTINGS) for case in Comparison("guided_step", TINY, 2, entries).cases()]
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    assert all(row["rel_err"] < 1e-5 for row in rows)


def test_the_ladder_ends_at_the_engine_s_defaults() -> None:
    for cuda in (True, False):
        variants = ablation.added_variants(cuda)
        names = [variant.name for variant in variants]
        assert len(set(names)) == len(names)
        whole, reached = EngineOptions(), variants[-1].options
        assert reached == (whole if cuda else dataclasses.replace(whole, branches=False))
        assert len({variant.name for variant in ablation.reduced_variants(cuda)}) == len(
            ablation.reduced_variants(cuda)
        )


@pytest.mark.slow
def test_an_ablation_s_rows_are_ratios_to_the_whole_engine() -> None:
    chosen = [c for c in ablation.cases(SETTINGS, [(TINY, 1)], "fp32") if c.provider in ("plain", "qkv rows")]
    row_fields = [
        {"kind": c.kind, "provider": c.provider, "dtype": c.dtype, "shape": c.shape} for c in chosen
    ]
    rows = [
        row | measure_case(c, SETTINGS) | {"device": "a CPU"}
        for c, row in zip(chosen, row_fields, strict=True)
    ]
    assert [row["kind"] for row in rows] == ["ablation_added", "ablation_added", "ablation_without"]
    for row in rows:
        assert row["status"] == "ok" and row["whole_ms"] > 0 and row["ratio"] > 0, row
    text = render("sampling", rows)
    assert "What each part adds" in text and "plain" in text and "less one part" in text


def test_a_step_on_a_cpu_has_its_share_of_the_products_between_the_rounds(monkeypatch) -> None:
    monkeypatch.setattr(compare, "product_taker", lambda dtype: lambda count: Sample(2.0, 2.0, 0.0))
    entries = [ours.entry("fp32"), ours.entry("bf16")]
    for case in Comparison("guided_step", TINY, 1, entries).cases():
        row = measure_case(case, SETTINGS)
        assert row["product_tflops"] == pytest.approx(PRODUCT_FLOP / 2e9, rel=1e-4)
        shares = [row["flop"] / ms / 1e9 / row["product_tflops"] for ms in row["rounds_ms"]]
        assert row["product_share"] == pytest.approx(statistics.median(shares), rel=1e-3)


def test_the_ladder_in_bf16_ends_with_convolutions_of_8_bits() -> None:
    names = [c.provider for c in ablation.cases(SETTINGS, [(TINY, 1)], "bf16") if c.kind == "ablation_added"]
    assert names[-2:] == ["replay", "3x3 convolutions of 8 bits"]


def test_start_up_is_told_in_parts(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    startup.print_seconds(time.time(), "tiny", batch=1, steps=2, precision="auto")
    times = json.loads(capsys.readouterr().out)
    assert set(times) == {"import_s", "weights_s", "prepare_s", "first_s", "second_s"}
    monkeypatch.setattr(startup, "first_image", lambda row_fields, environment: times)
    (case,) = startup.cases(SETTINGS, [(TINY, 4), (TINY, 2)], "fp32")
    assert case.shape["batch"] == 2
    row = measure_case(case, SETTINGS)
    assert row["cold_s"] == pytest.approx(times["import_s"] + times["prepare_s"] + times["first_s"], abs=2e-3)


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="nothing"):
        startup.first_image({"system": "nothing", "batch": 1, "steps": 1, "precision": "auto"}, {})


def test_the_program_writes_rows_and_goes_on(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "cases", lambda *arguments: ())
    flags = [*QUICK, "--only", "steps,matmul", "--out", str(tmp_path / "o")]
    with published_stub(tmp_path / "checkout") as path:
        flags += ["--guided-diffusion", path]
        assert main([*flags, "--budget", "1e-9"]) == UNFINISHED
        assert main(flags) == 0
    rows = [r for r in read_rows(tmp_path / "o" / "sampling.jsonl") if r["kind"] == "guided_step"]
    assert [row["provider"] for row in rows] == ["admfast", published.EAGER.name]
    assert all(row["revision"] and row["device"] and row["date"] for row in rows)
    text = (tmp_path / "o" / "sampling.md").read_text()
    assert "x published" in text and "of ceiling" in text
    capsys.readouterr()
    assert main(flags) == 0  # nothing is left to measure, so even the checkout isn't needed
    assert "steps: 0 rows, 2 from before" in capsys.readouterr().out


def test_peers_without_names_are_all_peers() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for flags, peers in ((["--peers"], PEERS), (["--peers", "eager,compiled"], ("eager", "compiled"))):
        chosen = choose(parser.parse_args([*flags, "--systems", "digits32", "--batches", "1"]), SETTINGS)
        assert chosen.peers == peers and chosen.compiled
        cases = [case for one in chosen.comparisons(SETTINGS) for case in one.cases()]
        # Compiling takes minutes, so contenders that compile have a higher limit.
        limits = {"compiled" in case.provider: case.limit for case in cases}
        assert limits[True] > limits[False]


def test_all_presets_share_the_budget() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = ["--all", "--batches", "1", "--precisions", "fp32", "--guided-diffusion", ""]
    arguments = parser.parse_args(flags)
    arguments.budget = 540.0
    settings = dataclasses.replace(SETTINGS, quick=False)
    found = list(choose(arguments, settings).comparisons(settings))
    names = {one.subject.name for one in found}
    assert names == set(subjects()) and len(found) == len(names)
    assert sum(one.budget for one in found) <= arguments.budget / 2
    # A step of 512 px takes up to 40 s, and its trial takes three.
    assert all(case.limit > CALLS * 40 for one in found for case in one.cases())


def test_a_contender_that_can_t_be_had_is_left_out() -> None:
    entries = [ours.entry("fp32"), Entry("broken", "fp32", Fails)]
    one = Comparison("guided_step", TINY, 1, entries)
    first, broken = one.cases()
    one.leave_out(broken)
    row = measure_case(first, SETTINGS)
    assert row["status"] == "ok" and row["faster_than"] == {}
    assert list(one.results) == entries[:1]


def test_each_contender_is_announced_before_it_is_made() -> None:
    events: list[str] = []

    class Tells(ours.Ours):
        def prepare(self) -> None:
            events.append("made")
            super().prepare()

    settings = dataclasses.replace(SETTINGS, begin=lambda case: events.append(case.provider))
    entries = [Entry(name, "fp32", lambda s, i, name=name: Tells(s, i, name=name)) for name in "ab"]
    measure_case(Comparison("guided_step", TINY, 1, entries).cases()[0], settings)
    assert events == ["a", "made", "b", "made"]


def test_a_step_is_guided_where_its_preset_is() -> None:
    known = subjects()
    pairs = ((known["imagenet64"], 1), (known["lsun-bedroom"], 1))
    choice = Choice(pairs, ("fp32",), ("eager",), "somewhere")
    found = [(b.kind, b.subject.name, [e.name for e in b.entries]) for b in choice.comparisons(SETTINGS)]
    assert found == [
        ("guided_step", "imagenet64", ["admfast", "published"]),
        ("step", "lsun-bedroom", ["admfast", "published"]),
    ]
    notes = {case.shape["system"]: case.note for case in choice.cases(SETTINGS)}
    assert notes["imagenet64"] == {} and "lsun-cat" in notes["lsun-bedroom"]["also"]


def test_a_trial_s_limit_is_the_precision_s_budget() -> None:
    trial = make_trial(TINY, Inputs.of(TINY, 1, CPU))
    off = trial.x_next * 1.01, trial.x0
    assert trial.check(off, "fp16") == pytest.approx(0.01, rel=0.01)
    with pytest.raises(WrongResult):
        trial.check(off, "fp32")
