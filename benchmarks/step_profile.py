"""Where a step's time goes: device kernels by kind, and the gaps between them, from torch.profiler."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first matching pattern decides. Inductor's names list the operators in a kernel, so they contain nearly every word
# below and come first, recognised by how they begin. Its AdamW is the kernel with a square root and a write in place
# ("rsqrt" is a norm's, "_to_copy" a cast).
KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"^nccl|^_fill$"),  # `_fill` replaces a gather in `fake_world`
    ("matrix products", r"^triton_tem"),
    ("optimizer", r"^triton_(?=.*(?<!r)sqrt)(?=.*(?<!to_)copy_)"),
    ("compiled pointwise and reductions", r"^triton_"),
    ("our kernels", r"^_(forward|backward|backward_wide|sum_partials|stats|with_grad|grad)_kernel|^titan_kernels"),
    ("Liger's kernels", r"^liger|^_(block_)?rms_norm_|^_swiglu_|^_triton_rope|^element_mul_kernel"),
    ("attention", r"flash|fmha|sdpa|attention|cudnn"),
    ("matrix products", r"gemm|cutlass|nvjet|sm\d\d_xmma|cublas|splitk|aten::(mm|addmm|bmm|_scaled_mm)|mkldnn|matmul"),
    ("copies", r"multi_tensor_apply.*native::copy<"),
    ("optimizer", r"adam|lpnorm|multi_tensor_apply"),
    ("copies", r"memcpy|memset|direct_copy|aten::copy_|split_with_sizes|chunk_cat|catarray"),
    (
        "eager pointwise and reductions",
        r"elementwise|reduce|softmax|vectorized|index|gather|scatter|embedding|grad_weight|radix|sort|cub::|aten::",
    ),
)
OTHER = "other"
PROFILED_STEPS = 3
"""How many steps `breakdown` runs: one before the profiler starts, and two that are profiled."""


def kind_of(name: str) -> str:
    """The one of KINDS for the kernel called `name`."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), OTHER)


def breakdown(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Seconds per step of each kind and of the gaps between kernels, and the ten longest kernels.

    Streams overlap, so kinds may add up to more than the step; `idle` is when no kernel ran.
    """
    steps = PROFILED_STEPS - 1
    step()
    # With CUDA the host is not profiled, which would slow it down and make gaps between kernels.
    spans = _spans(_traced(step, device, [_own_activity(device)]), device)
    if not spans and device.type == "cuda":
        spans = _spans(_traced(step, device, [ProfilerActivity.CPU, ProfilerActivity.CUDA]), device)
    if not spans:
        return {"steps": steps, "seconds": {}, "longest": []}
    by_kind: dict[str, float] = {}
    by_name: dict[str, float] = {}
    for name, start, end in spans:
        by_kind[kind_of(name)] = by_kind.get(kind_of(name), 0.0) + (end - start) * 1e-6 / steps
        by_name[name] = by_name.get(name, 0.0) + (end - start) * 1e-6 / steps
    busy, first, last = _union(spans)
    by_kind["idle"] = (last - first - busy) * 1e-6 / steps
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:10]
    return {"steps": steps, "seconds": by_kind, "longest": [[name[:100], seconds] for name, seconds in longest]}


def _own_activity(device: torch.device) -> ProfilerActivity:
    return ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU


def _traced(step: Callable[[], None], device: torch.device, activities: list[ProfilerActivity]) -> profile:
    with profile(activities=activities) as trace:
        for _ in range(PROFILED_STEPS - 1):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return trace


def _spans(trace: profile, device: torch.device) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds: kernels on a GPU; on a CPU operators that call no others."""
    events = [event for event in trace.events() or () if event.time_range.elapsed_us() > 0]
    if device.type == "cuda":
        # The host's annotations are mirrored onto the device's time line.
        chosen = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    else:
        chosen = [e for e in events if e.device_type == DeviceType.CPU and not e.cpu_children]
    return [(e.name, e.time_range.start, e.time_range.end) for e in chosen]


def _union(spans: list[tuple[str, float, float]]) -> tuple[float, float, float]:
    """(time covered by any span, first start, last end)."""
    ordered = sorted((start, end) for _, start, end in spans)
    covered, (begin, until) = 0.0, ordered[0]
    for start, end in ordered[1:]:
        if start > until:
            covered, begin = covered + until - begin, start
        until = max(until, end)
    return covered + until - begin, ordered[0][0], until
