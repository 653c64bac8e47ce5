"""Tests of the profile bench: classes of kernels by name, overlapping kernels, gaps, and the rows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bench.measure import Sample, sample, sample_in_turns
from bench.profile import (
    CLASSES,
    GAPS,
    OTHER,
    WHOLE,
    choose_num_steps,
    classify,
    main,
    trace_from_device,
    trace_from_host,
    trace_steps,
    union_length,
)
from bench.results import read_rows
from bench.sampling import ours
from bench.sampling.contender import STEPS_PER_CHUNK
from bench.sampling.subject import TINY, Inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "convolution"),
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
            "convolution",
        ),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float>", "convolution"),
        ("cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816dgrad_optimized_f16_256x64>", "convolution"),
        ("admfast::group_norm_silu_fwd", "norm"),
        ("GroupNormSiluFnBackward", "norm"),
        ("_group_norm_silu_fwd_kernel", "norm"),
        ("void at::native::RowwiseMomentsCUDAKernel<c10::Half>", "norm"),
        ("aten::native_group_norm_backward", "norm"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::addmm", "product"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "product"),
        ("admfast::sampler_step_", "update"),
        ("embedding", "embedding"),
        ("aten::copy_", OTHER),
        ("aten::convert_element_type", OTHER),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", OTHER),
        ("Memcpy DtoD (Device -> Device)", OTHER),
    ],
)
def test_classes_by_name(name: str, kind: str) -> None:
    assert classify(name) == kind


def test_overlapping_kernels_are_covered_once() -> None:
    assert union_length([]) == 0
    assert union_length([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5


@dataclass
class Span:
    start: float
    end: float

    def elapsed_us(self) -> float:
        return self.end - self.start


@dataclass
class Event:
    name: str
    start: float
    end: float
    self_us: float = 0.0
    cpu_parent: object = None
    on_device: bool = False

    @property
    def time_range(self) -> Span:
        return Span(self.start, self.end)

    @property
    def self_cpu_time_total(self) -> float:
        return self.self_us

    @property
    def device_type(self) -> torch.autograd.DeviceType:
        return torch.autograd.DeviceType.CUDA if self.on_device else torch.autograd.DeviceType.CPU


def test_the_host_s_time_goes_to_the_outermost_class_and_the_rest_is_gaps() -> None:
    whole = Event(WHOLE, 0, 2000)
    conv = Event("aten::conv2d", 0, 1000, self_us=300, cpu_parent=whole)
    copy = Event("aten::copy_", 0, 500, self_us=500, cpu_parent=conv)
    other = Event("aten::add", 1000, 1400, self_us=400, cpu_parent=whole)
    outside = Event("aten::zeros", 3000, 9000, self_us=6000)
    trace = trace_from_host([whole, conv, copy, other, outside], steps=2)
    assert trace.ms == {"convolution": 0.4, OTHER: 0.2, GAPS: 0.4}
    assert trace.wall_ms == 1.0 and sum(trace.row()["shares"].values()) == pytest.approx(1)
    assert trace.names["aten::copy_"] == (0.25, 0.5)


def test_the_device_s_gaps_are_when_nothing_runs() -> None:
    events = [
        Event(WHOLE, 0, 1000),
        Event("cudaLaunchKernel", 0, 5),
        Event("cudaGraphLaunch", 5, 9),
        Event("cudaStreamSynchronize", 9, 900),
        Event("flash_fwd_kernel", 100, 300, on_device=True),
        Event("_group_norm_silu_fwd_kernel", 200, 400, on_device=True),
        Event(WHOLE, 0, 1000, on_device=True),
    ]
    trace = trace_from_device(events, steps=1)
    assert trace.ms == {"attention": 0.2, "norm": 0.2, GAPS: 0.7}
    assert (trace.launches, trace.kernels) == (2, 2)


def test_a_real_trace_on_the_cpu() -> None:
    contender = ours.entry("fp32").make(TINY, Inputs.of(TINY, 1, CPU))
    with contender.running():
        contender.ready()
    trace = trace_steps(contender, 2)
    for name in ("convolution", "norm", "attention", "embedding", "update", OTHER):
        assert trace.ms[name] > 0, name
    assert sum(trace.ms.values()) == pytest.approx(trace.wall_ms, rel=0.01)
    assert set(trace.ms) <= set(CLASSES)


def test_the_program_profiles_each_step(tmp_path) -> None:
    flags = [
        "--device",
        "cpu",
        "--quick",
        "--precisions",
        "fp32",
        "--peers",
        "eager",
        "--guided-diffusion",
        "",
    ]
    assert main([*flags, "--inside", "--out", str(tmp_path)]) == 0
    mine, missing = read_rows(tmp_path / "profile.jsonl")
    assert missing["status"] == "none"
    assert set(mine["class_ms"]) == set(CLASSES) == set(mine["shares"])
    for name in ("convolution", "norm", "attention", "embedding", "update"):
        assert mine["class_ms"][name] > 0, name
    assert sum(mine["shares"].values()) == pytest.approx(1, abs=0.01)
    text = (tmp_path / "profile.md").read_text()
    assert "| operation |" in text and "elementwise and copies" in text


def test_how_many_steps_are_profiled() -> None:
    assert choose_num_steps(5000.0, 250, False) == 1
    assert choose_num_steps(200.0, 250, False) == 5
    assert choose_num_steps(2.0, 250, False) == STEPS_PER_CHUNK
    assert choose_num_steps(2.0, 10, False) == 10 and choose_num_steps(2.0, 250, True) == 2


def test_samples_are_taken_in_turns() -> None:
    order: list[str] = []

    def taker(name: str, ms: float):
        def take(count: int) -> Sample:
            order.append(f"{name}{count}")
            return Sample(ms, ms, 0.0)

        return take

    found = sample_in_turns(
        {"a": taker("a", 100), "b": taker("b", 4)}, 0.1, 3, steps_per_chunk=25, max_steps=40
    )
    # First one step of each, to choose the sample sizes; for `a` it is also the first sample. A sample of the
    # quick `b` has 25 steps. Every second round goes backwards.
    assert order == ["a1", "b1", "b25", "b25", "a1", "a1", "b25"]
    assert [len(samples) for samples in found.values()] == [3, 3]
    order.clear()
    assert [
        len(s) for s in sample_in_turns({"a": taker("a", 1)}, 1.0, 9, max_steps=40, budget=-1).values()
    ] == [1]
    assert order == ["a1", "a40"]


def test_a_sample_is_per_step() -> None:
    seen: list[int] = []
    found = sample(seen.append, 5)
    assert seen == [0, 1, 2, 3, 4]
    assert 0 < found.host_ms <= found.ms < 100
