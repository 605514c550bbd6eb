"""Counted memory, compared with sums by hand and with a real allocator."""

import dataclasses
import itertools

import pytest
import torch

from benchmarks.estimate_errors import counted_peak, measured_config, measured_peak
from titan_fast.config import mesh_degrees, model_shape, parse
from titan_fast.counted_step import count_step, fake_world
from titan_fast.deep_step import deep_step, period
from titan_fast.flops import parameters
from titan_fast.memory_count import GRANULE, PARTS, MemoryCounter, Peak
from titan_fast.ops import build_ops
from titan_fast.step import workload
from titan_fast.step_record import Operation, Segment

DEBUG = (
    "--model.flavor debug --training.mixed_precision_param bfloat16 --training.seq_len 256 "
    "--training.local_batch_size 8 --compile.enable False"
)


def segments(options: str, world: int, n_layers: int, passes: int = 1) -> list[Segment]:
    config = parse(f"{DEBUG} {options}".split())
    shape, degrees = model_shape(config.model), mesh_degrees(config.parallelism, world)
    ops = build_ops(config.kernels, torch.device("cpu"), workload(config, shape, degrees))
    with fake_world(world):
        return count_step(config, dataclasses.replace(shape, n_layers=n_layers), ops, degrees, passes)


def part(step: list[Segment], phase: str, unit: str, name: str) -> float:
    return next(s for s in step if (s.phase, s.unit) == (phase, unit)).peak.parts[name]


def test_counts_rounds_resizes_and_forgets() -> None:
    counter = MemoryCounter()
    with counter.watching_resizes():
        first = torch.empty(300, dtype=torch.float32)
        counter.see(first)
        counter.see(first[10:20])  # a view has no memory of its own
        assert counter.total == 3 * GRANULE
        counter.see(second := torch.empty(1000, dtype=torch.uint8))
        first.untyped_storage().resize_(0)
        assert counter.total == 2 * GRANULE
        first.untyped_storage().resize_(2048)
        assert counter.total == 2 * GRANULE + 2048
        del second
        counter.pulse(4096)
    assert counter.total == 2048
    peak = counter.peak(0, len(counter.events))
    assert peak.total == 2048 + 4096
    assert peak.parts["unsharded parameters"] == 2048


@pytest.mark.parametrize("world", [4, 32])
def test_state_is_the_shard_of_every_parameter(world: int) -> None:
    """By hand: float32 parameters, their gradients and two moments, each divided by the ranks."""
    step = segments("--activation_checkpoint.mode full", world, n_layers=3)
    shape = dataclasses.replace(model_shape(parse([*DEBUG.split()]).model), n_layers=3)
    shard = 4 * parameters(shape).total / world
    n_tensors = 3 * 7 + 3
    for name, tensors in (("parameters", 1), ("gradients", 1), ("optimizer state", 2)):
        found = part(step, "optimizer", "all parameters", name)
        assert tensors * shard <= found <= tensors * (shard + n_tensors * GRANULE), name


def test_full_recomputation_keeps_block_inputs_alone() -> None:
    """By hand: bfloat16 [B, S, D] for each block; the embedding's output is the first block's input."""
    step = segments("--activation_checkpoint.mode full --loss.chunk_size 256", 4, n_layers=4)
    stream = 2 * 8 * 256 * model_shape(parse([*DEBUG.split()]).model).dim
    kept = [part(step, "forward", f"block {block}", "saved activations") for block in range(4)]
    assert [later - earlier for earlier, later in itertools.pairwise(kept)] == [stream] * 3


def test_without_recomputation_a_block_keeps_what_its_operators_need() -> None:
    """By hand, with kernels that save their inputs: [tokens, .] in bfloat16 of two norm inputs and outputs, q, k, v
    and the attention's output, gate, up and their product; in float32 two norms' scales and logsumexp."""
    pytest.importorskip("triton")
    shape = model_shape(parse([*DEBUG.split()]).model)
    config = parse([*DEBUG.split()])
    degrees, tokens = mesh_degrees(config.parallelism, 4), 8 * 256
    kernels = dataclasses.replace(config.kernels, rms_norm="triton", rope="triton", swiglu="triton")
    ops = build_ops(kernels, torch.device("cpu"), workload(config, shape, degrees), "sm_90")
    with fake_world(4):
        step = count_step(config, shape, ops, degrees, 1)
    forward = [part(step, "forward", f"block {b}", "saved activations") for b in (1, 2)]
    per_token = 2 * (4 * shape.dim + shape.qkv_dim + shape.dim + 3 * shape.ffn_dim) + 4 * (2 + shape.n_heads)
    assert forward[1] - forward[0] == pytest.approx(tokens * per_token, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        "--activation_checkpoint.mode none",
        "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option 2",
        "--activation_checkpoint.mode full --optimizer.implementation for-loop",
        "--parallelism.tensor_parallel_degree 2 --activation_checkpoint.mode pointwise",
    ],
)
def test_a_deep_step_from_shallow_ones_is_the_counted_one(options: str) -> None:
    config = parse(options.split())

    def count(n_layers: int) -> list[Segment]:
        return segments(options, 8, n_layers)

    every = period(config.activation_checkpoint)
    depth = 6 * every  # the least that is not counted as a whole
    grown = deep_step(count, depth, every)
    whole = deep_step(count, depth, whole=True)
    assert "continued" in grown.how
    assert [(s.phase, s.unit) for s in grown.segments] == [(s.phase, s.unit) for s in whole.segments]
    for ours, theirs in zip(grown.segments, whole.segments, strict=True):
        assert ours.peak.total == pytest.approx(theirs.peak.total, rel=1e-4)
        moved = [sum(o.nbytes for o in segment.operations) for segment in (ours, theirs)]
        assert moved[0] == pytest.approx(moved[1], rel=1e-4), (ours.phase, ours.unit)
        kernels = [sum(o.kernels for o in segment.operations) for segment in (ours, theirs)]
        assert kernels[0] == pytest.approx(kernels[1]), (ours.phase, ours.unit)
    assert grown.peak.unit == whole.peak.unit


def test_blocks_that_differ_are_all_counted() -> None:
    def count(n_layers: int) -> list[Segment]:
        step = segments("--activation_checkpoint.mode full", 4, n_layers)
        if n_layers == 5:
            step[3].peak = dataclasses.replace(step[3].peak, total=2 * step[3].peak.total)
        return step

    assert "not alike" in deep_step(count, 6).how


@pytest.mark.parametrize(
    ("peak", "moved", "alike"), [(1.0, 1.0, True), (1.0001, 1.0, False), (1.0, 1.0001, False), (1.0, 1.000001, True)]
)
def test_blocks_may_differ_by_rounding_alone(peak: float, moved: float, alike: bool) -> None:
    """Here at the third depth, in all blocks."""

    def block(number: int, phase: str, last: bool) -> Segment:
        found = Operation("memory", "add", 1e10 * (moved if last else 1.0))
        total = 1e10 * (number + 1) * (peak if last else 1.0)
        return Segment(phase, f"block {number}", 0, 0, [found], Peak(total, dict.fromkeys(PARTS, 0.0)))

    def count(n_layers: int) -> list[Segment]:
        blocks = range(n_layers)
        forward, backward = ([block(i, phase, n_layers == 5) for i in blocks] for phase in ("forward", "backward"))
        return [*forward, Segment("head", "head", 0, 0, peak=Peak(0.0, dict.fromkeys(PARTS, 0.0))), *backward[::-1]]

    assert ("not alike" not in deep_step(count, 8).how) == alike


def test_accumulation_holds_the_first_pass_gradients_in_the_second() -> None:
    step = segments("--activation_checkpoint.mode full", 4, n_layers=3, passes=2)
    held = [s.peak.parts["gradients"] for s in step if (s.phase, s.unit) == ("forward", "block 1")]
    assert held[0] == 0.0
    assert held[1] == part(step, "optimizer", "all parameters", "gradients")


@pytest.mark.parametrize(("mode", "dtype", "world"), [("none", "bfloat16", 4), ("full", "float32", 1)])
def test_count_against_a_real_allocator(mode: str, dtype: str, world: int) -> None:
    """Compared with torch.profiler's record of all CPU allocations in a real step; the aim is 5%."""
    config = measured_config(mode, dtype, n_layers=2, seq_len=64)
    assert counted_peak(config, world) == pytest.approx(measured_peak(config, world), rel=0.01)
