"""`python -m bench.programs --programs FOLDER`: programs of others by their own networks, and accelerated.

FOLDER holds checkouts under the names of their repositories. Each program's core runs in a process of its
own, as it stands and by `admfast.accelerate`, in turns and from the same seed; results are compared before
times. Nothing of a program is copied here. Modules of which a core needs nothing (MPI, torchvision) are stood
in for.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from bench.command import Bench, bench_main

PROGRAMS_PATH = "ADMFAST_PROGRAMS"
STOOD_IN = ("blobfile", "matplotlib", "motionblur", "mpi4py", "requests", "scipy", "torchvision", "yaml")
ROUNDS, STEPS = 5, 6
# A millionth more of each pixel moves a result as rounding does; an error may be ten times that.
NUDGE, ALLOWED = 1e-6, 10
OPTIONS = {
    "num_channels": 64, "num_res_blocks": 1, "channel_mult": "1,2,3", "attention_resolutions": "16",
    "num_heads": 4, "num_head_channels": -1, "num_heads_upsample": -1, "use_scale_shift_norm": True,
    "resblock_updown": True, "use_new_attention_order": False, "use_fp16": False, "use_checkpoint": False,
    "dropout": 0.0, "learn_sigma": True, "class_cond": False,
}  # fmt: skip
SIZE = 64

Core = Callable[[Any, Any], Any]  # (network, x [1, 3, SIZE, SIZE]) to a result


@dataclass(frozen=True)
class Program:
    """A checkout: where below it imports begin, what makes its network, and its core by the network."""

    root: str
    parts: dict[str, Callable[[], tuple[Any, Core]]]


def published_network(**changes: Any) -> Any:
    """Return the network that `create_model` of the program's own copy makes."""
    create = importlib.import_module("guided_diffusion.script_util").create_model
    return create(image_size=SIZE, **{**OPTIONS, **changes})


def process(**changes: Any) -> Any:
    """Return the diffusion of the program's own copy, with as many steps as are run."""
    create = importlib.import_module("guided_diffusion.script_util").create_gaussian_diffusion
    return create(learn_sigma=True, timestep_respacing=str(STEPS), **changes)


def ddpm() -> tuple[Any, Core]:
    """The published loop."""
    diffusion = process()
    return published_network(), lambda net, x: diffusion.p_sample_loop(net, x.shape, noise=x, device="cpu")


def training() -> tuple[Any, Core]:
    """A published training loss, and its gradient in every parameter."""
    import torch

    diffusion = process()

    def core(net: Any, x: Any) -> Any:
        net.train()
        loss = diffusion.training_losses(net, x, torch.tensor([2]), noise=torch.ones_like(x))["loss"].mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    return published_network(), core


def ilvr() -> tuple[Any, Core]:
    """ILVR: low frequencies of a reference image, by the program's own loop."""
    import torch

    resizer, diffusion = importlib.import_module("resizer").Resizer, process()
    shape = (1, 3, SIZE, SIZE)
    small = (1, 3, SIZE // 4, SIZE // 4)
    resizers = resizer(shape, 1 / 4), resizer(small, 4)
    reference = {"ref_img": torch.linspace(-1, 1, 3 * SIZE * SIZE).view(shape)}

    def core(net: Any, x: Any) -> Any:
        return diffusion.p_sample_loop(
            net, x.shape, noise=x, device="cpu", model_kwargs=reference, resizers=resizers, range_t=0
        )

    return published_network(), core


def dps(conditioning: str) -> tuple[Any, Core]:
    """DPS or MCG: super-resolution by the gradient in x, through trainable weights."""
    modules = ("unet", "gaussian_diffusion", "condition_methods", "measurements")
    code = SimpleNamespace(**{n: importlib.import_module(f"guided_diffusion.{n}") for n in modules})
    net = code.unet.create_model(image_size=SIZE, **OPTIONS)
    sampler = code.gaussian_diffusion.create_sampler(
        "ddpm", 1000, "linear", "epsilon", "learned_range", False, True, False, str(STEPS)
    )
    shape = (1, 3, SIZE, SIZE)
    operator = code.measurements.get_operator(
        "super_resolution", in_shape=shape, scale_factor=4, device="cpu"
    )
    noiser = code.measurements.get_noise("gaussian", sigma=0.0)
    method = code.condition_methods.get_conditioning_method(conditioning, operator, noiser, scale=0.3)

    def core(net: Any, x: Any) -> Any:
        y = operator.forward(0.5 * x.detach().flip(-1))
        run = sampler.p_sample_loop
        return run(net, x.detach().clone(), y, method.conditioning, record=False, save_root="")

    return net, core


def ddrm() -> tuple[Any, Core]:
    """DDRM: super-resolution, float timesteps."""
    import torch

    steps = importlib.import_module("functions.denoising").efficient_generalized_steps
    kind = importlib.import_module("functions.svd_replacement").SuperResolution
    betas, times = torch.linspace(1e-4, 0.02, 1000), list(range(0, 1000, 1000 // STEPS))

    def core(net: Any, x: Any) -> Any:
        operator = kind(3, SIZE, 4, "cpu")
        y = operator.H(0.5 * x.flip(-1))
        return steps(x, times, net, betas, operator, y, 0.05, 1.0, 0.85, 1.0)[0][-1]

    return published_network(), core


def dpm_solver() -> tuple[Any, Core]:
    """DPM-Solver++: earlier outputs are kept, timesteps are fractions."""
    import torch

    code = importlib.import_module("dpm_solver.sampler")
    unet = importlib.import_module("models.guided_diffusion.unet").UNetModel
    net = unet(
        image_size=SIZE, in_channels=3, model_channels=64, out_channels=6, num_res_blocks=1,
        attention_resolutions=(4,), channel_mult=(1, 2, 3), num_heads=4, use_scale_shift_norm=True,
        resblock_updown=True,
    )  # fmt: skip
    schedule = code.NoiseScheduleVP("discrete", betas=torch.linspace(1e-4, 0.02, 1000))

    def core(net: Any, x: Any) -> Any:
        model = code.model_wrapper(lambda v, t: net(v, t)[:, :3], schedule, guidance_type="uncond")
        solver = code.DPM_Solver(model, schedule, algorithm_type="dpmsolver++")
        with torch.no_grad():
            return solver.sample(x, steps=STEPS, order=2, method="multistep")

    return net, core


PROGRAMS = {
    "guided-diffusion": Program("", {"p_sample_loop": ddpm, "training_losses": training}),
    "ilvr_adm": Program("", {"ILVR": ilvr}),
    "diffusion-posterior-sampling": Program(
        "", {"DPS": functools.partial(dps, "ps"), "MCG": functools.partial(dps, "mcg")}
    ),
    "ddrm": Program("", {"DDRM": ddrm}),
    "dpm-solver": Program("examples/ddpm_and_guided-diffusion", {"DPM-Solver++": dpm_solver}),
}


# In the process of one program


class _StandIn(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules for packages that aren't installed, or don't work beside a CPU build of torch."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.partition(".")[0] in self._packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def tell(folder: str, program: str, part: str, threads: int, rounds: int) -> None:
    """Measure a part of a program in this process; print one line of JSON."""
    import torch

    import admfast.accelerate

    sys.meta_path.append(StandIns(STOOD_IN))
    chosen = PROGRAMS[program]
    sys.path.insert(0, str(Path(folder) / program / chosen.root))
    torch.set_num_threads(threads)
    to = torch.Tensor.to
    if not torch.cuda.is_available():  # some write the device down
        torch.Tensor.cuda = lambda t, *_, **__: t  # type: ignore[assignment, method-assign]
        torch.Tensor.to = lambda t, *a, **k: to(t, *("cpu" if v == "cuda" else v for v in a), **k)  # type: ignore[assignment, method-assign]
    net, core = chosen.parts[part]()
    fill(net)
    fast = admfast.accelerate(copy.deepcopy(net))
    x = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def run(network: Any, images: Any) -> tuple[Any, float]:
        torch.manual_seed(0)
        began = time.perf_counter()
        result = core(network, images)
        return result.detach(), time.perf_counter() - began

    wanted, _ = run(net, x)
    found, first = run(fast, x)
    nudged, _ = run(net, x * (1 + NUDGE))
    seconds: dict[str, list[float]] = {"program": [], "accelerated": []}
    for _ in range(rounds):
        for name, network in (("program", net), ("accelerated", fast)):
            seconds[name].append(run(network, x)[1])
    largest = float(wanted.abs().max())
    print(
        json.dumps(
            {
                "error": float((found - wanted).abs().max()) / largest,
                "nudge": float((nudged - wanted).abs().max()) / largest,
                "first": first,
                "walk": admfast.accelerate.report(fast).partition("\n")[0],
                **{name: [1e3 * value for value in values] for name, values in seconds.items()},
            }
        )
    )


def fill(net: Any) -> None:
    """Give all parameters random values: the last layers begin at zero, and would hide everything."""
    import torch

    from bench.sampling.weights import drawn

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(drawn(name, parameter.shape, generator))
    net.eval()


# The bench


@functools.cache
def measured(folder: str, program: str, part: str, threads: int, rounds: int) -> dict[str, Any]:
    """Return what the process of one part says."""
    from bench.measure import in_a_process

    code = f"from bench.programs import tell; tell({folder!r}, {program!r}, {part!r}, {threads}, {rounds})"
    return in_a_process(code, os.environ)  # type: ignore[no-any-return]


def row(arguments: tuple[Any, ...], provider: str, settings: Any) -> dict[str, Any]:
    """Return the row of the program's own network or of the accelerated one."""
    from bench.measure import WrongResult, short

    found = measured(*arguments, 1 if settings.quick else ROUNDS)
    if not found["error"] <= ALLOWED * found["nudge"]:  # NaN is wrong
        raise WrongResult(f"error {found['error']:.1e}, where {NUDGE:g} of x makes {found['nudge']:.1e}")
    fields: dict[str, Any] = {"ms": short(statistics.median(found[provider]))}
    if provider == "accelerated":
        fields |= {"rel_err": found["error"], "runs_on": found["walk"].partition(":")[2].strip()}
    return fields


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return one group a program that is there."""
    from bench.measure import Case

    if settings.cuda:
        raise ValueError("device='cuda': the programs' cores are measured on a CPU")
    folder = Path(arguments.programs)
    there = [name for name in PROGRAMS if (folder / name).is_dir()]
    if not there:
        raise ValueError(f"programs={str(folder)!r}: a folder with one of {', '.join(PROGRAMS)}")

    def cases(name: str, settings: Any) -> Iterator[Any]:
        for part in PROGRAMS[name].parts:
            for threads in (1, 2):
                where = (str(folder.resolve()), name, part, threads)
                for provider in ("program", "accelerated"):
                    shape = {"program": name, "core": part, "threads": threads}
                    yield Case("program", "fp32", provider, shape, functools.partial(row, where, provider))

    return {name: (1.0, functools.partial(cases, name)) for name in there}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the checkouts."""
    parser.add_argument(
        "--programs",
        metavar="FOLDER",
        default=os.environ.get(PROGRAMS_PATH, "programs"),
        help=f"checkouts by the names of their repositories (default: {PROGRAMS_PATH}, or programs)",
    )


SUMMARY = "Measure programs of others by their own networks and by accelerated ones."
main = functools.partial(bench_main, Bench("programs", SUMMARY, tuple(PROGRAMS), groups, add_flags))

if __name__ == "__main__":
    sys.exit(main())
