"""Tests of building blocks against the published ones: embeddings, attention, pools, norms, resampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from admfast.models.layers import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    Norm,
    ResBlock,
    Upsample,
    timestep_embedding,
)
from admfast.ops import TABLES, attention
from tests.parity import golden

LIMIT = golden.NETWORK_OUTPUT_LIMIT
COMPONENTS = golden.cases("unet", "components", pattern="config.json")


def with_state(module: torch.nn.Module, arrays: dict[str, torch.Tensor], prefix: str) -> torch.nn.Module:
    """Load the stored weights whose names begin with `prefix`, and return the module in evaluation mode."""
    module.load_state_dict(
        {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    )
    return module.eval()


@pytest.mark.parametrize("path", COMPONENTS)
def test_timestep_embedding(path: Path) -> None:
    arrays = golden.load_tensors(path.with_name("io.npz"))
    # Frequencies are float32 exponentials. Processors round them differently, by one bit, which t multiplies.
    limit = max(LIMIT, torch.finfo(torch.float32).eps * float(arrays["timesteps"].abs().max()))
    for dim, period in golden.load_json(path)["temb"]:
        name = f"temb_dim{dim}_maxperiod{period}"
        golden.compare(timestep_embedding(arrays["timesteps"], dim, period), arrays[name], limit, name)


FLOAT32 = [e.name for e in TABLES["attention"].implementations if not e.reason_missing() and e.name != "cpp"]


@pytest.mark.parametrize("impl", FLOAT32)
@pytest.mark.parametrize("path", COMPONENTS)
def test_attention_orders(path: Path, impl: str) -> None:
    arrays = golden.load_tensors(path.with_name("io.npz"))
    for i, (_batch, heads, _width, _length) in enumerate(golden.load_json(path)["qkv"]):
        tokens = arrays[f"qkv{i}_in"].transpose(1, 2).contiguous()
        for order in ("legacy", "new"):
            out = attention(tokens, heads, legacy_order=order == "legacy", impl=impl).transpose(1, 2)
            golden.compare(out, arrays[f"qkv{i}_{order}_out"], LIMIT, f"qkv{i}_{order}_out")


@pytest.mark.parametrize("path", COMPONENTS)
def test_attention_pool(path: Path) -> None:
    arrays = golden.load_tensors(path.with_name("io.npz"))
    for i, kwargs in enumerate(golden.load_json(path)["pool"]):
        pool = with_state(AttentionPool2d(**kwargs), arrays, f"pool{i}_state:")
        golden.compare(pool(arrays[f"pool{i}_in"]), arrays[f"pool{i}_out"], LIMIT, f"pool{i}_out")


@pytest.mark.parametrize("path", COMPONENTS)
def test_residual_blocks(path: Path) -> None:
    arrays = golden.load_tensors(path.with_name("io.npz"))
    for i, kwargs in enumerate(golden.load_json(path)["res"]):
        block = with_state(ResBlock(**kwargs), arrays, f"res{i}_state:")
        out = block(arrays[f"res{i}_in"], arrays[f"res{i}_emb"])
        golden.compare(out, arrays[f"res{i}_out"], LIMIT, f"res{i}_out")


@pytest.mark.parametrize("path", COMPONENTS)
def test_attention_blocks(path: Path) -> None:
    arrays = golden.load_tensors(path.with_name("io.npz"))
    for i, kwargs in enumerate(golden.load_json(path)["attn"]):
        channels = kwargs["channels"]
        heads = kwargs.get("num_heads") or channels // kwargs["num_head_channels"]
        block = AttentionBlock(
            channels, heads, use_new_attention_order=kwargs.get("use_new_attention_order", False)
        )
        with_state(block, arrays, f"attn{i}_state:")
        golden.compare(block(arrays[f"attn{i}_in"]), arrays[f"attn{i}_out"], LIMIT, f"attn{i}_out")


@pytest.mark.parametrize("path", COMPONENTS)
def test_norm(path: Path) -> None:
    arrays = golden.load_tensors(path.with_name("io.npz"))
    norm = Norm(golden.load_json(path)["gn"]["channels"])
    norm.load_state_dict({"weight": arrays["gn_weight"], "bias": arrays["gn_bias"]})
    golden.compare(norm(arrays["gn_in"]), arrays["gn_out"], LIMIT, "gn_out")
    golden.compare(norm(arrays["gn_small_in"]), arrays["gn_small_out"], LIMIT, "gn_small_out")
    half = norm(arrays["gn_in"].half())
    assert half.dtype == torch.float16
    # Both sides round a float32 result to float16 once, so they differ by at most one unit in the last place.
    golden.compare(half.float(), arrays["gn_out_from_half"].float(), 2**-10, "gn_out_from_half")


@pytest.mark.parametrize("path", COMPONENTS)
def test_resampling(path: Path) -> None:
    arrays = golden.load_tensors(path.with_name("io.npz"))
    up, down = Upsample(32, False), Downsample(32, False)
    golden.compare(up(arrays["updown_in"]), arrays["up_noconv_out"], LIMIT, "up_noconv_out")
    golden.compare(down(arrays["updown_in"]), arrays["down_noconv_out"], LIMIT, "down_noconv_out")
    golden.compare(down(arrays["down_odd_in"]), arrays["down_noconv_odd_out"], LIMIT, "down_noconv_odd_out")
