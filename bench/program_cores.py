"""Cores of other programs: functions that make a program's network and its main computation with it.

No code of a program is copied here: its modules are imported from its checkout, which must be on `sys.path`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

REPLACED_PACKAGES = (
    "blobfile", "cv2", "hdf5storage", "matplotlib", "motionblur", "mpi4py", "requests", "scipy", "skimage",
    "torchdiffeq", "torchsde", "torchvision", "yaml",
)  # fmt: skip
STEPS = 6
OPTIONS = {
    "num_channels": 64, "num_res_blocks": 1, "channel_mult": "1,2,3", "attention_resolutions": "16",
    "num_heads": 4, "num_head_channels": -1, "num_heads_upsample": -1, "use_scale_shift_norm": True,
    "resblock_updown": True, "use_new_attention_order": False, "use_fp16": False, "use_checkpoint": False,
    "dropout": 0.0, "learn_sigma": True, "class_cond": False,
}  # fmt: skip
SIZE = 64

Core = Callable[[Any, Any], Any]  # (network, x [1, 3, SIZE, SIZE]) to a result


PROGRAM_PACKAGE, ADMFAST_PACKAGE = "guided_diffusion", "admfast.compat.guided_diffusion"


@dataclass(frozen=True)
class Program:
    """A program's checkout and its cores.

    roots: folders from which it imports, relative to the folder of checkouts. parts: by name, functions that
    return its network and a core, which maps (network, x) to a result. packaged: names of parts that also run
    on admfast's own package. runs: how the accelerated network runs, "whole" or "block by block".
    """

    roots: tuple[str, ...]
    parts: dict[str, Callable[..., tuple[Any, Core]]]
    packaged: tuple[str, ...] = ()
    runs: str = "whole"


def published_network(package: str = PROGRAM_PACKAGE, **changes: Any) -> Any:
    """Return a network from `create_model` of a package, which by default is the program's own copy."""
    create = importlib.import_module(f"{package}.script_util").create_model
    return create(**{"image_size": SIZE, **OPTIONS, **changes})


def process(package: str = PROGRAM_PACKAGE, **changes: Any) -> Any:
    """Return the diffusion process of a package, respaced to `STEPS` steps by default."""
    create = importlib.import_module(f"{package}.script_util").create_gaussian_diffusion
    return create(learn_sigma=True, **{"timestep_respacing": str(STEPS), **changes})


def ddpm(package: str = PROGRAM_PACKAGE) -> tuple[Any, Core]:
    """Return the network and core of the published loop."""
    diffusion = process(package)
    net = published_network(package)
    return net, lambda net, x: diffusion.p_sample_loop(net, x.shape, noise=x, device="cpu")


def guided(package: str = PROGRAM_PACKAGE) -> tuple[Any, Core]:
    """Return the network and core of the published loop with a classifier, as in the published script."""
    import torch
    import torch.nn.functional as F

    import admfast.accelerate

    diffusion, y = process(package), {"y": torch.tensor([7])}
    util = importlib.import_module(f"{package}.script_util")
    flags = {**util.classifier_defaults(), "image_size": SIZE, "classifier_width": 64, "classifier_depth": 1}
    args = SimpleNamespace(classifier_scale=1.0, class_cond=False)

    def core(net: Any, x: Any) -> Any:
        is_accelerated = isinstance(net, admfast.accelerate.networks.AcceleratedNet)
        classifier = classifiers[is_accelerated]

        def cond_fn(x: Any, t: Any, y: Any = None) -> Any:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(True)
                logits = classifier(leaf, t)
                chosen = F.log_softmax(logits, dim=-1)[range(len(logits)), y.view(-1)]
                return torch.autograd.grad(chosen.sum(), leaf)[0] * args.classifier_scale

        def model_fn(x: Any, t: Any, y: Any = None) -> Any:
            return net(x, t, y if args.class_cond else None)

        run = diffusion.p_sample_loop
        return run(model_fn, x.shape, noise=x, cond_fn=cond_fn, model_kwargs=dict(y), device="cpu")

    plain_classifier = util.create_classifier(**flags)
    fill_parameters(plain_classifier)
    classifiers = {False: plain_classifier, True: admfast.accelerate(copy.deepcopy(plain_classifier))}
    return published_network(package), core


def training(package: str = PROGRAM_PACKAGE) -> tuple[Any, Core]:
    """Return the network and core of the published training loss and its gradient in every parameter."""
    import torch

    diffusion = process(package)

    def core(net: Any, x: Any) -> Any:
        net.train()
        loss = diffusion.training_losses(net, x, torch.tensor([2]), noise=torch.ones_like(x))["loss"].mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    return published_network(package), core


def ilvr() -> tuple[Any, Core]:
    """Return the network and core of ILVR, which samples with the low frequencies of a reference image."""
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
    """Return the network and core of DPS or MCG: super-resolution by the gradient in x, weights trainable."""
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
    """Return the network and core of DDRM: super-resolution with float timesteps."""
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
    """Return the network and core of DPM-Solver++, which keeps earlier outputs; timesteps are fractional."""
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


def k_diffusion() -> tuple[Any, Core]:
    """Return the network and core of DPM-Solver++(2M) from k-diffusion, with the published network."""
    root = next(path for path in map(Path, sys.path) if (path / "k_diffusion").is_dir())
    package = sys.modules["k_diffusion"] = ModuleType("k_diffusion")  # its __init__ imports other packages
    package.__path__ = [str(root / "k_diffusion")]
    external = importlib.import_module("k_diffusion.external")
    sampling = importlib.import_module("k_diffusion.sampling")
    diffusion = process(timestep_respacing="")

    def core(net: Any, x: Any) -> Any:
        import torch

        denoiser = external.OpenAIDenoiser(net, diffusion)
        with torch.no_grad():
            sigmas = denoiser.get_sigmas(STEPS)
            return sampling.sample_dpmpp_2m(denoiser, x * sigmas[0], sigmas, disable=True)

    return published_network(), core


def diffpir() -> tuple[Any, Core]:
    """Return the network and core of DiffPIR's denoising steps, alternately of DDPM and DDIM."""
    import torch

    model_fn = importlib.import_module("utils.utils_model").model_fn
    diffusion = process()
    bars = torch.tensor(diffusion.alphas_cumprod)

    def core(net: Any, x: Any) -> Any:
        for i in reversed(range(STEPS)):
            with torch.no_grad():
                x = model_fn(
                    x, 0, net, vec_t=torch.tensor([i]), model_out_type="pred_x_prev", diffusion=diffusion,
                    ddim_sample=bool(i % 2), alphas_cumprod=bars,
                )  # fmt: skip
        return x

    return published_network(), core


def ddnm() -> tuple[Any, Core]:
    """Return the network and core of DDNM's colourisation at 256 pixels.

    Its network reads a configuration at every call.
    """
    import torch.nn.functional as F

    class Settings(SimpleNamespace):
        def __getattr__(self, name: str) -> None:  # DDNM expects None for settings that aren't set
            if name.startswith("__"):
                raise AttributeError(name)

        def get(self, name: str, default: Any) -> Any:
            return vars(self).get(name, default)

    jumps = {"t_T": STEPS, "n_sample": 1, "jump_length": 10, "jump_n_sample": 1}
    conf = Settings(
        name="any", diffusion_steps=1000, use_value_logger=False, schedule_jump_params=jumps,
        inpa_inj_sched_prev=True, inpa_inj_sched_prev_cumnoise=False, print_estimated_vars=False,
    )  # fmt: skip
    diffusion = process(conf=conf)
    net = published_network(image_size=256, num_channels=32, conf=conf)

    def core(net: Any, x: Any) -> Any:
        big = F.interpolate(x, size=(256, 256), mode="bicubic")
        task = {"gt": big.flip(-1).clamp(-1, 1), "scale": 4, "resize_y": False, "deg": "colorization"}
        task |= {"save_path": "out", "sigma_y": 0.0, "y": None}
        here = os.getcwd()
        with tempfile.TemporaryDirectory() as place:  # it writes pictures into the current folder
            os.chdir(place)
            try:
                run = diffusion.p_sample_loop_progressive
                return run(net, big.shape, noise=big, model_kwargs=task, device="cpu", conf=conf)["sample"]
            finally:
                os.chdir(here)

    return net, core


def fill_parameters(net: Any) -> None:
    """Give all parameters random values, because the last layers are initially zero and would hide errors."""
    import torch

    from bench.sampling.weights import draw_weight

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(draw_weight(name, parameter.shape, generator))
    net.eval()


def library_core(module: str, class_name: str, gradient: bool, **options: Any) -> tuple[Any, Core]:
    """Return a library's network, and as core its call at a middle noise level or the gradient in x."""
    import torch

    net = getattr(importlib.import_module(module), class_name)(**options)
    middle = 500 if module == "diffusers" else torch.tensor([0.5])

    def call(net: Any, x: Any) -> Any:
        out = net(x, middle)
        return out.sample if module == "diffusers" else out

    def core(net: Any, x: Any) -> Any:
        if gradient:
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(call(net, x).sin().sum(), x)[0]
        with torch.no_grad():
            return call(net, x)

    return net, core


def call_and_gradient(
    name: str, module: str, class_name: str, **options: Any
) -> dict[str, Callable[..., tuple[Any, Core]]]:
    """Return the parts of a library's network by name: its call, and its gradient in x."""
    kinds = {name: False, f"{name}, gradient": True}
    return {
        part: functools.partial(library_core, module, class_name, gradient, **options)
        for part, gradient in kinds.items()
    }


_EDM: dict[str, Any] = {"img_resolution": SIZE, "model_channels": 64, "num_blocks": 1, "pretrained": None}
_LEVELS: dict[str, Any] = {
    "sample_size": SIZE, "block_out_channels": (64, 128, 192, 256), "layers_per_block": 1,
}  # fmt: skip
_AS_ADM: dict[str, Any] = {
    "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
    "attention_head_dim": 64,
}  # fmt: skip

PROGRAMS = {
    "guided-diffusion": Program(
        ("guided-diffusion",),
        {"p_sample_loop": ddpm, "classifier guidance": guided, "training_losses": training},
        packaged=("p_sample_loop", "classifier guidance", "training_losses"),
    ),
    "ilvr_adm": Program(("ilvr_adm",), {"ILVR": ilvr}),
    "diffusion-posterior-sampling": Program(
        ("diffusion-posterior-sampling",),
        {"DPS": functools.partial(dps, "ps"), "MCG": functools.partial(dps, "mcg")},
    ),
    "ddrm": Program(("ddrm",), {"DDRM": ddrm}),
    "DDNM": Program(("DDNM/hq_demo",), {"DDNM": ddnm}, runs="block by block"),
    "DiffPIR": Program(("DiffPIR",), {"DiffPIR": diffpir}),
    "dpm-solver": Program(("dpm-solver/examples/ddpm_and_guided-diffusion",), {"DPM-Solver++": dpm_solver}),
    "k-diffusion": Program(("k-diffusion", "guided-diffusion"), {"DPM-Solver++ (2M)": k_diffusion}),
    # The libraries are installed with their dependencies into the folder `libraries` (pip install --target).
    "deepinv": Program(
        ("libraries",),
        call_and_gradient("ADMUNet", "deepinv.models", "ADMUNet", **_EDM)
        | call_and_gradient("DDPM++", "deepinv.models", "NCSNpp", model_type="ddpm", **_EDM),
        runs="block by block",
    ),
    "diffusers": Program(
        ("libraries",),
        call_and_gradient("UNet2DModel", "diffusers", "UNet2DModel", **_LEVELS)
        | call_and_gradient("UNet2DModel as ADM", "diffusers", "UNet2DModel", **_LEVELS, **_AS_ADM),
        runs="block by block",
    ),
}


# The process that runs a core


class _StandIn(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importer of empty modules, for packages that aren't installed or don't work with torch's CPU build."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.partition(".")[0] in self._packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _without_cuda() -> None:
    """Make code with a hard-coded device "cuda" use the CPU."""
    import torch

    to, ones = torch.Tensor.to, torch.ones

    def here(value: Any) -> Any:
        return "cpu" if value == "cuda" else value

    torch.Tensor.cuda = lambda t, *_, **__: t  # type: ignore[assignment, method-assign]
    torch.Tensor.to = lambda t, *a, **k: to(t, *map(here, a), **k)  # type: ignore[assignment, method-assign]
    torch.ones = lambda *a, device=None, **k: ones(*a, device=here(device), **k)  # type: ignore[assignment]


def load_core(folder: str, program: str, part: str) -> tuple[Any, Core]:
    """Make a program's checkout importable in this process; return a network and a core of the program."""
    import torch

    sys.meta_path.append(StandIns(REPLACED_PACKAGES))
    sys.path[:0] = [str(Path(folder) / root) for root in PROGRAMS[program].roots]
    if not torch.cuda.is_available():
        _without_cuda()
    net, core = PROGRAMS[program].parts[part]()
    fill_parameters(net)
    return net, core


def images() -> Any:
    """Return the images from which the cores start, [1, 3, SIZE, SIZE]."""
    import torch

    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def result_of(net: Any, core: Core, x: Any) -> Any:
    """Return a core's result for images x, with a fixed seed for its random numbers."""
    import torch

    torch.manual_seed(0)
    return core(net, x).detach()


def main(argv: Sequence[str] | None = None) -> int:
    """Save the result of an unmodified core: `python -m bench.program_cores FOLDER PROGRAM PART OUT`."""
    import torch

    folder, program, part, out = sys.argv[1:] if argv is None else argv
    torch.save(result_of(*load_core(folder, program, part), images()), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
