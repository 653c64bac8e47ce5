"""The fused operators: in a folder each, with reference, autograd, implementations and cases."""

from admfast.ops.attention import attention, attention_ref
from admfast.ops.conv import FoldedConv, conv, conv_int8_ref, conv_ref
from admfast.ops.dispatch import TABLES, Implementation, OpTable, record_choices
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

# The folders of the ops. `admfast info`, tests, sanitizers and benches call the ops with the arguments that
# each `cases.py` makes.
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
    "conv_int8_ref",
    "conv_ref",
    "group_norm_silu",
    "group_norm_silu_ref",
    "normal",
    "normal_ref",
    "pack",
    "sampler_step",
    "sampler_step_ref",
    "record_choices",
]
