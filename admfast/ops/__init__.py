"""Floor 1: the fused operators, a room each: public function, reference, autograd, implementations, cases."""

from admfast.ops.attention import attention, attention_ref
from admfast.ops.conv import FoldedConv, conv, conv_ref
from admfast.ops.dispatch import TABLES, Implementation, OpTable, watch
from admfast.ops.norm import group_norm_silu, group_norm_silu_ref
from admfast.ops.update import (
    Clip,
    PackedTable,
    Row,
    SamplerState,
    Stream,
    as_seeds,
    normal,
    normal_ref,
    pack,
    sampler_step,
    sampler_step_ref,
)

# The folders here; `admfast info`, tests, sanitizers and benches call the ops with what their `cases.py` say.
ROOMS = ("attention", "conv", "norm", "update")

__all__ = [
    "ROOMS",
    "TABLES",
    "Clip",
    "FoldedConv",
    "Implementation",
    "OpTable",
    "PackedTable",
    "Row",
    "SamplerState",
    "Stream",
    "as_seeds",
    "attention",
    "attention_ref",
    "conv",
    "conv_ref",
    "group_norm_silu",
    "group_norm_silu_ref",
    "normal",
    "normal_ref",
    "pack",
    "sampler_step",
    "sampler_step_ref",
    "watch",
]
