"""Make the manifest of a run: its resolved settings, and the fingerprints of its networks."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from admfast.runs.manifest import BALANCED, Manifest, format_ranges
from admfast.sampling.auto import resolve
from admfast.sampling.guides import requested_scale
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import Plan
from admfast.sampling.request import SampleRequest

_TENSORS = ("noise", "x_start", "step_noise")


def make_manifest(
    pipe: Pipeline,
    request: SampleRequest,
    plan: Plan,
    *,
    seeds: Sequence[int],
    classes: str | Sequence[int] | None = BALANCED,
    batch_size: int,
    shard_size: int,
    files: str,
    low_res: NDArray[np.uint8] | None = None,
) -> Manifest:
    """Return the manifest of a run.

    Settings that the request leaves to the pipeline are written as their values, so that it doesn't matter
    whether they are given. Tensors are named by their fingerprints.

    plan: of the request, for any of its images. classes: see `Manifest`; not used for a model without
    classes. low_res: the images to enlarge, if the pipeline is itself an upsampler.

    Raises: InvalidArgument for a request that JSON can't hold (one with functions).
    """
    request, _ = resolve(request, pipe)
    up = pipe.upsampler
    networks: dict[str, Any] = {"net": pipe.net}
    if plan.uses_classifier:
        networks["classifier"] = pipe.classifier
    if any(row.weak for row in plan.guidance):
        networks["weak"] = pipe.weak
    processes = {"net": pipe.diffusion}
    if up is not None:
        networks["upsampler"], processes["upsampler"] = up.net, up.diffusion
    num_classes = pipe.default_classes
    labels = classes if isinstance(classes, str) or classes is None else list(map(int, classes))
    sides = plan.sides
    return Manifest(
        images=len(seeds),
        seeds=format_ranges(seeds),
        classes=None if num_classes is None else labels,
        num_classes=num_classes,
        shape=[*sides.get("upsampler", sides["base"]), pipe.config.in_channels],
        batch_size=batch_size,
        shard_size=shard_size,
        files=files,
        model=pipe.name,
        weights={name: fingerprint(net) for name, net in networks.items()},
        precision=pipe.precision,
        process={name: _plain(process.to_dict()) for name, process in processes.items()},
        request=_resolved_settings(pipe, request, plan, low_res),
    )


def _resolved_settings(
    pipe: Pipeline, request: SampleRequest, plan: Plan, low_res: NDArray[np.uint8] | None
) -> dict[str, Any]:
    """Return the settings of a request that are the same for all images, ready for JSON."""
    up = pipe.upsampler
    tensors = {name: getattr(request, name) for name in _TENSORS if getattr(request, name) is not None}
    if low_res is not None:
        tensors["low_res"] = torch.from_numpy(low_res)
    # Which timestep an image begins from is checked together with x_start, which JSON can't hold.
    settings = {} if request.t_start is None else {"t_start": request.t_start}
    nothing: Any = dict.fromkeys(_TENSORS)
    by_guide = any(getattr(guide, "network", "") == "classifier" for guide in request.guides)
    resolved = replace(
        request,
        **nothing,
        seeds=None, classes=None, batch_size=None, low_res=None, callback=None, every=1, t_start=None,
        steps=request.steps if request.respacing is not None else request.steps or pipe.steps,
        upsampler_steps=None if up is None else request.upsampler_steps or up.steps,
        guidance=None if by_guide else requested_scale(request, pipe.guidance),
        size=plan.sides["base"],
    )  # fmt: skip
    return {**json.loads(resolved.to_json()), **settings} | {
        name: _hash_tensor(tensor) for name, tensor in tensors.items()
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they are after a way through JSON."""
    return json.loads(json.dumps(settings))


def fingerprint(net: nn.Module) -> str:
    """Return a hash of a network's parameters and buffers: names, shapes, dtypes, and CRC-32 of the values.

    CRC-32 takes a quarter of the time of SHA-256: 0.3 s a gigabyte.
    """
    state = net.state_dict()
    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        hashes = list(pool.map(_hash_tensor, state.values()))
    lines = [f"{name} {value}" for name, value in zip(state, hashes, strict=True)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _hash_tensor(tensor: Tensor) -> str:
    """Return dtype, shape and CRC-32 of a tensor, as text."""
    values = tensor.detach().contiguous().cpu().view(-1)
    data = values.view(torch.uint8).numpy() if values.numel() else np.zeros(0, np.uint8)
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {zlib.crc32(data.data):08x}"
