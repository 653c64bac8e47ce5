"""Tests of prepared steps: equal to FunctionStep, with fixed buffers and no synchronization with the host."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from admfast.engine.engine import Engine, out_of_memory
from admfast.engine.guidance import RowGuidance
from admfast.engine.options import PLAIN, EngineOptions
from admfast.engine.precision import POLICIES
from admfast.engine.step import ROWS_GRANULARITY, Batch, PreparedStep, StepKey
from admfast.errors import InvalidArgument, Unavailable
from admfast.models.fold import FoldOptions
from admfast.ops.update import SolverTable, as_seeds
from admfast.sampling import loop
from admfast.sampling.functions import bind_conditions
from admfast.sampling.loop import run_rows
from admfast.sampling.pipeline import Pipeline
from admfast.solvers import ddpm
from tests.small import CLASSES, PROCESS, cascade, classifier, pipeline, randn, unet, upsampler

SEEDS = [3, 2**63, 7]
LABELS = [0, 3, 1]
UNFOLDED = EngineOptions(fold=None)


def both(options: EngineOptions = UNFOLDED, make=pipeline, **parts) -> tuple[Pipeline, Pipeline]:
    """Return the same pipeline twice: with prepared steps, and with plain function calls."""
    return make(options=options, **parts), make(options=PLAIN, **parts)


def images(pipe: Pipeline, **settings) -> Tensor:
    return pipe.sample(**{"classes": LABELS, "seeds": SEEDS, "output": "float", **settings})


SETTINGS = {
    "ddpm": {},
    "ddpm without guidance": {"guidance": 0},
    "ddim": {"solver": "ddim", "steps": 7},
    "ddim with noise": {"solver": "ddim", "eta": 0.7},
    "inverse": {"solver": "ddim-inverse", "x_start": randn(3, 1, 8, 8).clamp(-1, 1)},
    "from the middle": {"x_start": randn(3, 1, 8, 8), "t_start": 600, "steps": 9},
    "recorded noise": {"step_noise": randn(4, 3, 1, 8, 8, seed=4), "noise": randn(3, 1, 8, 8, seed=5)},
    "guided at some timesteps": {"guidance_interval": (200, 800), "steps": 6},
    "guided at none": {"guidance_interval": (0, 0.5), "steps": 2, "solver": "ddim"},
    "two batches": {"batch_size": 2},
    "reference": {"impl": "reference"},
}


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 25])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_prepared_step_is_the_functions_bit_for_bit(name, rows_at_a_time):
    # Without folding, both call the same networks on the same numbers.
    prepared, plain = both(dataclasses.replace(UNFOLDED, rows_at_a_time=rows_at_a_time))
    assert torch.equal(images(prepared, **SETTINGS[name]), images(plain, **SETTINGS[name]))


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 25])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "inverse", "guided at some timesteps"])
def test_embeddings_made_together_change_nothing(name, rows_at_a_time):
    options = EngineOptions(fold=FoldOptions(conv="library"), rows_at_a_time=rows_at_a_time)
    prepared, plain = both(options)
    got, wanted = images(prepared, **SETTINGS[name]), images(plain, **SETTINGS[name])
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert any(prepared.engine._steps.values())
    assert all("net" in step.embeddings for step in prepared.engine._steps.values())


@pytest.mark.parametrize("make", [cascade], ids=["cascade"])
def test_upsamplers_have_steps_of_their_own(make):
    got, wanted = (images(pipe) for pipe in both(make=make))
    up = Pipeline("up", upsampler(2), PROCESS, steps=3, options=UNFOLDED)
    low_res = randn(3, 1, 4, 4).clamp(-1, 1)
    alone = up.sample(LABELS, SEEDS, low_res=low_res, output="float")
    plain = Pipeline("up", upsampler(2), PROCESS, steps=3, options=PLAIN)
    assert torch.equal(got, wanted)
    assert torch.equal(alone, plain.sample(LABELS, SEEDS, low_res=low_res, output="float"))


def test_unconditional_and_fixed_variance_networks():
    for changes in ({"num_classes": None}, {"learn_sigma": False, "out_channels": 1}):
        changes = {k: v for k, v in changes.items() if k != "learn_sigma"}
        process = (
            PROCESS if "out_channels" not in changes else dataclasses.replace(PROCESS, learn_sigma=False)
        )
        got, wanted = (
            images(pipe) for pipe in both(net=unet(**changes), diffusion=process, classifier=classifier(1))
        )
        assert torch.equal(got, wanted)


def test_an_image_does_not_depend_on_the_batch():
    pipe = pipeline()
    together = images(pipe)
    for i, seed in enumerate(SEEDS):
        alone = images(pipe, classes=LABELS[i], seeds=seed)
        assert (together[i] - alone[0]).abs().max() < 1e-4


# The buffers


def step_of(guided: bool = True, options: EngineOptions | None = None, steps: int = 4) -> tuple:
    """Return a prepared step filled with a batch, that batch, and its initial x."""
    options = options or EngineOptions()
    engine = Engine(unet().requires_grad_(False), classifier(1).requires_grad_(False), options=options)
    engine.ensure_folded()
    batch, x = make_batch(ddpm().table(PROCESS.build(str(steps))), guided), randn(3, 1, 8, 8)
    step = engine.step(batch)
    step.fill(batch, x)
    return step, batch, x


def make_batch(table: SolverTable, guided: bool = True, **changes) -> Batch:
    """Return a batch of three images for all rows of a table."""
    settings = {"seeds": as_seeds(SEEDS), "labels": torch.tensor(LABELS), **changes}
    guidance = (RowGuidance(2.0 if guided else 0.0),) * len(table)
    return Batch(**{"table": table, "shape": (3, 1, 8, 8), "guidance": guidance, **settings})


def pointers(step: PreparedStep) -> dict[str, int]:
    """Return the address of every tensor that a body reads or writes."""
    found = {
        f"{where}.{name}": t for where in ("state", "table") for name, t in vars(getattr(step, where)).items()
    }
    found |= dict(vars(step).items()) | {f"embeddings {n}": t.values for n, t in step.embeddings.items()}
    return {name: t.data_ptr() for name, t in found.items() if isinstance(t, Tensor)}


def test_buffers_stay_where_they_are():
    step, batch, x = step_of()
    before = pointers(step)
    assert {"state.x", "table.device", "labels", "seeds", "label_weights", "counters", "timesteps"} <= set(
        before
    )
    for scale, steps in ((2.0, 4), (1.0, 7)):
        table = ddpm().table(PROCESS.build(str(steps)))
        step.fill(make_batch(table, guidance=(RowGuidance(scale),) * steps), x)
        run_rows(table, step)
        assert pointers(step) == before


def test_a_step_serves_other_tables_labels_seeds_and_scales():
    pipe = pipeline()
    first = images(pipe)
    others = [images(pipe, steps=9, guidance=3.0), images(pipe, classes=2), images(pipe, seeds=[1, 2, 3])]
    assert len(pipe.engine._steps) == 1 and torch.equal(images(pipe), first)
    fresh = pipeline()
    again = [images(fresh, steps=9, guidance=3.0), images(fresh, classes=2), images(fresh, seeds=[1, 2, 3])]
    assert all(torch.equal(a, b) for a, b in zip(others, again, strict=True))


def test_the_images_given_back_are_not_the_buffer():
    pipe = pipeline()
    first = images(pipe)
    kept = first.clone()
    images(pipe, seeds=[11, 12, 13])
    assert torch.equal(first, kept)


class Watched(TorchDispatchMode):
    """A mode that rejects operations that transfer data between device and host or synchronize them."""

    # Operations that read a value, have a size that depends on one, or make a tensor from Python numbers.
    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "lift_fresh", "_pin_memory")

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        self.names.add(name)
        assert name not in self.FORBIDDEN, name
        return function(*args, **(kwargs or {}))


class Asked(TorchFunctionMode):
    """A mode that rejects calls that synchronize a GPU but dispatch no operation on a CPU."""

    FORBIDDEN = ("item", "tolist", "numpy", "__array__", "cpu", "cuda", "is_nonzero", "pin_memory")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", str(function)), kwargs or {}
        assert name not in self.FORBIDDEN and not (name.startswith("__") and name[2:-2] in PYTHON), name
        if name == "to":
            targets = [*args[1:], *kwargs.values()]
            assert not any(isinstance(target, torch.device | str | Tensor) for target in targets), targets
        if name == "tensor" or name == "as_tensor":
            raise AssertionError(name)
        return function(*args, **kwargs)


PYTHON = ("bool", "int", "float", "index", "complex")


@pytest.mark.parametrize(
    "question",
    [
        lambda t: t.tolist(),
        lambda t: t.numpy(),
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: t.to(torch.device("cpu")),
        lambda t: t.to(device="cpu"),
        lambda t: t[0].item(),
        lambda t: int(t[0]),
        lambda t: bool(t[0]),
        lambda t: t + torch.tensor([1, 2]),
    ],
)
def test_what_asks_the_host_is_seen(question):
    counters = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(AssertionError), Asked(), Watched():
        question(counters)


@pytest.mark.parametrize("guided", [True, False])
def test_a_body_asks_the_host_for_nothing(guided):
    step, _, _ = step_of(guided)
    step.advance(0)  # libraries initialise in their first calls
    with torch.no_grad(), Asked(), Watched() as seen:
        for _ in range(2):
            step.body(RowGuidance(float(guided)).kind)
    assert "sampler_step_" in seen.names and int(step.counters[0]) == 3


@pytest.mark.parametrize("guided", [True, False])
def test_a_body_is_one_graph_for_the_compiler(guided):
    step, batch, x = step_of(guided)
    wanted = run_rows(batch.table, step).x.clone()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        (kind,) = step.bodies
        compiled = torch.compile(lambda: step.body(kind), fullgraph=True, backend="aot_eager")
        step.fill(batch, x)
        step.bodies[kind] = compiled
        got = run_rows(batch.table, step).x
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_keys_say_what_needs_another_step():
    _, batch, _ = step_of()
    key = StepKey.of(batch, True)
    guided, unguided = RowGuidance(2.0), RowGuidance()
    assert (key.kinds, key.max_rows, key.low_res, key.noise_given) == (
        (guided.kind,),
        ROWS_GRANULARITY,
        None,
        False,
    )
    mixed = dataclasses.replace(batch, guidance=(guided, unguided) * 2)
    assert set(StepKey.of(mixed, True).kinds) == {guided.kind, unguided.kind}
    given = make_batch(batch.table, False, step_noise=randn(4, 3, 1, 8, 8), low_res=randn(3, 1, 4, 4))
    key = StepKey.of(given, True)
    assert key.noise_given and key.low_res == (3, 1, 4, 4) and key.kinds == (unguided.kind,)
    long = ddpm().table(dataclasses.replace(PROCESS, steps=1500).build(""))
    assert StepKey.of(make_batch(long), True).max_rows == 2 * ROWS_GRANULARITY


def test_a_trainable_classifier_is_refused():
    net, guide = unet().requires_grad_(False), classifier(1)
    _, batch, _ = step_of()
    with pytest.raises(InvalidArgument, match="classifier='trainable'"):
        PreparedStep(net, guide, None, StepKey.of(batch, True), torch.device("cpu"), EngineOptions())


# The engine that keeps steps


def test_the_step_used_longest_ago_makes_room():
    pipe = pipeline(options=EngineOptions(max_cached_steps=2))
    for count in (1, 2, 3, 1):
        images(pipe, seeds=range(count), classes=0)
    kept = [key.shape[0] for key, _ in pipe.engine._steps]
    assert kept == [3, 1]


def test_changed_weights_are_taken_up_by_kept_steps():
    pipe, fresh = pipeline(), pipeline()
    images(pipe)
    step = next(iter(pipe.engine._steps.values()))
    for net in (pipe.net, fresh.net):
        with torch.no_grad():
            net.out[2].bias.add_(0.3)
    assert torch.equal(images(pipe), images(fresh))
    assert next(iter(pipe.engine._steps.values())) is step


def test_forms_in_new_memory_drop_kept_steps():
    pipe = pipeline()
    images(pipe)
    step = next(iter(pipe.engine._steps.values()))
    pipe.net.to(torch.float32)  # keeps the folded weights
    pipe.net.unfold()
    images(pipe)
    assert next(iter(pipe.engine._steps.values())) is not step


def test_python_functions_run_row_by_row_and_it_is_said(caplog):
    pipe = pipeline()
    with caplog.at_level(logging.INFO, logger="admfast"):
        images(pipe, guidance_fn=lambda x, t: torch.zeros_like(x))
        images(pipe, denoised_fn=lambda x0: x0.clamp(-0.5, 0.5))
    assert ["guides" in caplog.messages[0], "denoised_fn" in caplog.messages[1]] == [True, True]
    assert not pipe.engine._steps


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate")],
    ids=["cuda", "cpu"],
)
def test_batches_that_do_not_fit_are_halved(error, monkeypatch, caplog):
    real, sizes = loop.sample_batch, []

    def limited(plan, notes):
        sizes.append(plan.shape[0])
        if plan.shape[0] > 2:
            raise error
        return real(plan, notes)

    pipe = pipeline()
    wanted = images(pipe, seeds=range(7), batch_size=2)
    images(pipe, seeds=range(7))
    assert [key.shape[0] for key, _ in pipe.engine._steps] == [2, 1, 7]
    monkeypatch.setattr(loop, "sample_batch", limited)
    got = images(pipe, seeds=range(7))
    assert sizes == [7, 4, 2, 2, 2, 1] and torch.equal(got, wanted)
    # The kept step of 7 images was dropped to make room for the smaller batches.
    assert [key.shape[0] for key, _ in pipe.engine._steps] == [2, 1]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "out of memory with 7 images at a time: going on with 4",
        "out of memory with 4 images at a time: going on with 2",
    ]


def test_other_errors_and_single_images_are_not_tried_again(monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(loop, "sample_batch", broken)
    with pytest.raises(RuntimeError, match="something else"):
        images(pipeline())

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loop, "sample_batch", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        images(pipeline(), seeds=1, classes=0)
    assert not out_of_memory(RuntimeError("something else"))


@pytest.mark.parametrize("interval", [(800, 200), (1, 2, 3), "200,800", (0, float("nan"))])
def test_intervals_that_are_not_are_named(interval):
    with pytest.raises(InvalidArgument, match="^guidance_interval="):
        images(pipeline(), guidance_interval=interval)


def test_an_interval_without_guidance_is_refused():
    with pytest.raises(InvalidArgument, match="guidance_interval=.*without guidance there is nothing"):
        images(pipeline(), guidance_interval=(0, 500), guidance=0)


def test_an_interval_guides_there_alone():
    pipe, seen = pipeline(options=PLAIN), []
    images(
        pipe, steps=10, guidance_interval=(300, 600), guidance_fn=lambda x, t: seen.append(int(t[0])) or 0 * x
    )
    kept = pipe.process("10").schedule.timestep_map
    assert seen == [t for t in reversed(kept) if 300 <= t <= 600] and 0 < len(seen) < 10


@pytest.mark.parametrize(
    "given, message",
    [
        ({"compile": 1}, "compile=1: True or False"),
        ({"rows_at_a_time": 0}, "rows_at_a_time=0"),
        ({"max_cached_steps": 0}, "max_cached_steps=0"),
        ({"fold": 3}, "fold=3: FoldOptions, or None for nothing"),
        ({"fold": True}, "fold=True: FoldOptions, or None for nothing"),
        ({"compile": True, "compile_cache": 3}, "compile_cache=3: the path of a folder, or None"),
    ],
)
def test_options_that_are_not_are_named(given, message):
    with pytest.raises(InvalidArgument, match=message):
        EngineOptions(**given)


def test_policies_say_what_every_part_computes_in():
    from admfast.engine.precision import policy

    assert policy("auto", torch.device("cuda")).parts()["classifier"] == "bfloat16"
    assert POLICIES["fp16"].parts()["torso"] == "float16" and str(POLICIES["tf32"]) == "tf32"
    with pytest.raises(Unavailable, match="precision='tf32': only on a CUDA device"):
        policy("tf32", torch.device("cpu"))
    with pytest.raises(InvalidArgument, match="precision='fp8': nearest: fp32, fp16"):
        policy("fp8", torch.device("cpu"))


def test_half_precision_steps_are_near_and_keep_the_parameters():
    wanted = images(pipeline())
    for name, limit in (("bf16", 0.1), ("fp16", 0.02)):
        pipe = pipeline(policy=POLICIES[name])
        got = images(pipe)
        assert 0 < (got - wanted).abs().mean() < limit
        assert {p.dtype for net in (pipe.net, pipe.classifier) for p in net.parameters()} == {torch.float32}


def test_the_conditions_of_a_row_reach_the_network_as_by_functions():
    # FunctionStep calls `bind_conditions`; a prepared step passes labels and condition itself.
    net = upsampler().requires_grad_(False)
    x, low_res, labels = randn(2, 1, 16, 16), randn(2, 1, 8, 8), torch.tensor([1, CLASSES - 1])
    t = torch.full((2,), 500)
    wanted = bind_conditions(net, labels, low_res)(x, t)
    assert torch.equal(net(x, t, y=labels, low_res=low_res), wanted)


def test_steps_are_kept_within_the_memory_allowed():
    pipe = pipeline(options=EngineOptions(max_cached_bytes=1))
    images(pipe)
    images(pipe, classes=0, seeds=1)
    assert [key.shape[0] for key, _ in pipe.engine._steps] == [1]
    (step,) = pipe.engine._steps.values()
    assert step.memory == step.nbytes >= 2 * step.state.x.nbytes
