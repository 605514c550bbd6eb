"""The planner: its time model compared with sums by hand, its command, advice, refusals, and record of errors."""

import dataclasses
import functools
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.estimate_errors import FITTED_ROWS, HELD_OUT, MEMORY_ROWS, OUTPUT, counted, plan_of, timed
from titan_fast import compiled_graph, estimate_report, masters
from titan_fast import estimate as planner
from titan_fast.advice import Option, ScalingPoint, _batches, _end_when_interrupted, changed, scaling, search
from titan_fast.config import Config, Float8
from titan_fast.errors import ConfigError, TitanFastError
from titan_fast.estimate import Estimate, Plan, estimate
from titan_fast.estimate_report import limits
from titan_fast.float8 import FORWARD, rounded
from titan_fast.gpus import GPUS, calibrated, known_gpu
from titan_fast.memory_count import PARTS as MEMORY_PARTS
from titan_fast.memory_count import Peak
from titan_fast.step_record import Group, Operation, Segment
from titan_fast.step_time import (
    EAGER_HOST,
    FITTED,
    PARTS,
    Fitted,
    Network,
    StepTime,
    collective_seconds,
    compute_seconds,
    gemm_seconds,
    step_time,
)

H100 = GPUS["h100-sxm"]
NODE = Network(8, H100.nic.value)
EXACT = Fitted(gemm=1.0, bandwidth=1.0, interference=0.0)
SMALL = (
    "--model.flavor debug --training.seq_len 256 --training.local_batch_size 8 --gpu h100-sxm --gpus 16 "
    "--compile.enable False"
)


def plan(options: str) -> Plan:
    return planner.plan_of(options.split())[0]


@pytest.fixture(scope="module")
def small() -> Estimate:
    return estimate(plan(SMALL))


def segment(*operations: Operation, phase: str = "forward") -> Segment:
    return Segment(phase, "block 0", 0, 0, list(operations))


def gemm(rows: int, columns: int, inner: int) -> Operation:
    moved = 2.0 * (rows * inner + inner * columns + rows * columns)
    return Operation("gemm", "mm", moved, 2.0 * rows * columns * inner, (rows, columns, inner))


def test_matrix_product_at_full_waves_runs_at_the_table_rate() -> None:
    full = gemm(128 * 132, 256 * 8, 8192)  # 8 tiles for each multiprocessor
    assert gemm_seconds(full, H100, EXACT) == pytest.approx(full.flops / H100.gemm.value)
    for one_more in (gemm(128 * 132, 256 * 8 + 1, 8192), gemm(128 * 132 + 1, 256 * 8, 8192)):
        assert gemm_seconds(one_more, H100, EXACT) > 1.03 * gemm_seconds(full, H100, EXACT)
    thin = gemm(8192, 8, 8192)
    assert gemm_seconds(thin, H100, EXACT) >= thin.nbytes / H100.bandwidth.value
    assert H100.float8 is not None
    eighths = dataclasses.replace(full, element_size=1)
    assert gemm_seconds(eighths, H100, EXACT) == pytest.approx(full.flops / H100.float8.value)
    wide = dataclasses.replace(full, element_size=4)
    assert gemm_seconds(wide, H100, EXACT) == pytest.approx(2 * full.flops / H100.gemm.value)


def test_attention_runs_at_its_backends_rates() -> None:
    forward, backward = (Operation("attention", "attention", flops=1e12, backward=is_it) for is_it in (False, True))
    rates = H100.attention["fa3"]
    assert compute_seconds(forward, H100, "fa3", EXACT) == 1e12 / rates.forward
    assert compute_seconds(backward, H100, "fa3", EXACT) == 1e12 / rates.backward


def test_ring_within_a_node_and_between_nodes() -> None:
    size = 2.0**30
    inside = collective_seconds(Operation("gather", "g", size, group=Group(8, 1)), H100, NODE)
    assert inside == pytest.approx(8.4e-6 + 7 * 3.4e-6 + size * 7 / 8 / H100.nvlink.value)
    across = collective_seconds(Operation("gather", "g", size, group=Group(64, 1)), H100, NODE)
    hops = 8.4e-6 + 56 * 3.4e-6 + 8 * 14.0e-6
    assert across == pytest.approx(hops + size * 63 / 64 / H100.nvlink.value)  # the slower of NVLink and network
    thin = collective_seconds(Operation("gather", "g", size, group=Group(64, 1)), H100, Network(8, 12.5e9))
    assert thin == pytest.approx(hops + size * 7 / 8 / (0.94 * 8 * 12.5e9))
    alone = collective_seconds(Operation("gather", "g", size, group=Group(8, 8)), H100, NODE)
    assert alone == pytest.approx(8.4e-6 + 8 * 14.0e-6 + size * 7 / 8 / (0.94 * H100.nic.value))


def test_sum_over_copies_passes_twice_and_by_a_tree() -> None:
    size = 2.0**30
    copies = collective_seconds(Operation("replicas", "allreduce_", size, group=Group(64, 16)), H100, NODE)
    assert copies == pytest.approx(8.4e-6 + 2 * (6 * 14.0e-6 + size * 63 / 64 / (0.94 * H100.nic.value)))


def test_copies_are_summed_beside_the_computation() -> None:
    found = estimate(plan(f"{SMALL} --parallelism.data_parallel_replicate_degree 4"))
    kinds = [o.kind for s in found.segments if s.unit == "block 1" and s.phase == "backward" for o in s.operations]
    assert kinds.count("replicas") == kinds.count("reduce") == 1


def test_a_gather_hides_behind_what_runs_before_its_weights_are_needed() -> None:
    product = gemm(128 * 132, 256 * 64, 8192)
    gather = Operation("gather", "_allgather_base_", 2.0**28, group=Group(8, 1))
    take = Operation("copy_out", "fsdp.split_with_sizes_copy", 1.0)
    took = collective_seconds(gather, H100, NODE)
    hidden = step_time([segment(gather, product, take)], H100, "cudnn", NODE, fitted=EXACT)
    exposed = step_time([segment(gather, take, product)], H100, "cudnn", NODE, fitted=EXACT)
    assert hidden.parts["exposed FSDP communication"] == 0.0
    assert exposed.parts["exposed FSDP communication"] == pytest.approx(took)  # the host is a step ahead
    assert exposed.seconds - hidden.seconds == pytest.approx(took, rel=0.3)
    slowed = step_time([segment(gather, product, take)], H100, "cudnn", NODE, fitted=Fitted(1.0, 1.0, 0.5))
    assert slowed.parts["slowed by communication"] == pytest.approx(0.5 * took, rel=0.5)


def test_what_is_exposed_of_reductions_and_of_gathers_that_nobody_uses() -> None:
    product, take = gemm(128 * 132, 256 * 64, 8192), Operation("copy_out", "fsdp.split_with_sizes_copy", 1.0)
    reduce = Operation("reduce", "_reduce_scatter_base_", 2.0**28, group=Group(8, 1))
    gather = dataclasses.replace(reduce, kind="gather", name="_allgather_base_")
    took = collective_seconds(reduce, H100, NODE)

    def timed(*operations: Operation) -> StepTime:
        return step_time([segment(*operations)], H100, "cudnn", NODE, fitted=EXACT)

    last = timed(product, reduce)  # the step ends with it
    assert last.parts["exposed FSDP communication"] == pytest.approx(last.collectives) == pytest.approx(took)
    assert last.hidden == pytest.approx(0.0, abs=1e-9)
    pair = timed(reduce, reduce, product)  # the second waits for the first, and is hidden
    assert pair.parts["exposed FSDP communication"] == pytest.approx(took) and pair.hidden == pytest.approx(0.5)
    unused = timed(gather, take, product, gather)
    assert unused.parts["exposed FSDP communication"] == pytest.approx(2 * took)


@pytest.mark.parametrize(("tensor_degree", "between"), [(1, "FSDP"), (4, "FSDP"), (8, "tensor-parallel")])
def test_what_is_waited_for_at_once_counts_to_whose_group_it_is(tensor_degree: int, between: str) -> None:
    total = Operation("blocking", "allreduce_", 2.0**20, group=Group(8, 1))
    parts = step_time([segment(total)], H100, "cudnn", NODE, fitted=EXACT, tensor_degree=tensor_degree).parts
    assert parts[f"exposed {between} communication"] > 0
    assert (
        sum(parts[f"exposed {who} communication"] for who in ("FSDP", "tensor-parallel"))
        == (parts[f"exposed {between} communication"])
    )


def test_collectives_within_layers_begin_when_the_host_has_launched_them() -> None:
    pair = Operation("tensor", "all_reduce", 1.0, group=Group(8, 1)), Operation("wait", "wait_tensor")
    found = step_time([segment(*pair * 10)], H100, "cudnn", NODE, fitted=EXACT, tensor_degree=8)
    assert found.seconds == pytest.approx(20 * EAGER_HOST)


def test_summed_up_operators_are_launched_a_thousand_at_most() -> None:
    for kernels in (500.0, 1000.0, 5000.0):
        found = step_time([segment(Operation("memory", "add", 1.0, kernels=kernels))], H100, "cudnn", NODE)
        assert found.seconds == pytest.approx(min(kernels, 1000.0) * EAGER_HOST), kernels


def test_operators_of_a_step_add_up_to_the_model_flops(small: Estimate) -> None:
    """By hand: 6 FLOPs per token for each element of the matrices."""
    shape, tokens = small.plan.shape, 8 * 256
    matrices = (
        shape.n_layers * shape.dim * (shape.qkv_dim + shape.dim + 3 * shape.ffn_dim) + shape.vocab_size * shape.dim
    )
    products = [o for s in small.segments for o in s.operations if o.kind == "gemm"]
    assert sum(o.flops for o in products) == pytest.approx(6 * matrices * tokens)
    attention = sum(o.flops for s in small.segments for o in s.operations if o.kind == "attention")
    assert attention == pytest.approx(3.5 * 2 * shape.n_layers * tokens * 256 * shape.dim)


SHORT = "--gpu h100-sxm --gpus 1 --model.flavor llama3_1b --training.seq_len 1024 --training.local_batch_size 1 " + (
    " ".join(f"--kernels.{op} reference" for op in ("rms_norm", "rope", "swiglu", "cross_entropy", "reemit"))
)


@pytest.mark.parametrize(
    ("options", "milliseconds", "waits"),
    [
        ("", 81.0, True),
        ("--compile.enable True", 53.7, True),
        ("--compile.enable True --training.cuda_graph True", 28.3, False),
    ],
)
def test_short_steps_wait_for_the_host_as_they_were_measured_to(options: str, milliseconds: float, waits: bool) -> None:
    found = estimate(plan(f"{SHORT} {options}"), check_depth=False)
    assert 1e3 * found.time.seconds == pytest.approx(milliseconds, rel=0.02 if waits else 0.12)
    assert (found.time.parts["waiting for the host"] > 0.1 * found.time.seconds) == waits


def test_replicas_exchange_once_a_step() -> None:
    """Whatever the number of passes, and overlapped with computation, even if every rank holds everything."""

    def collectives(sequences: int, replicas: int) -> StepTime:
        options = f"--parallelism.data_parallel_replicate_degree {replicas} --training.global_batch_size {sequences}"
        return estimate(plan(f"{SMALL} {options}"), check_depth=False).time

    two, three, five = (collectives(128 * passes, 4).collectives for passes in (2, 3, 5))
    assert five - three == pytest.approx(2 * (three - two)) and three - two > 0
    one = collectives(128, 4).collectives
    assert three - two < 0.9 * one  # of which the exchange is a part
    assert collectives(128, 16).collectives > 0


def test_parts_add_up_and_json_has_its_keys(small: Estimate) -> None:
    found = json.loads(json.dumps(small.to_dict()))
    assert {
        "fits",
        "peak_memory_gib",
        "memory_parts_gib",
        "step_seconds",
        "step_parts_seconds",
        "tokens_per_second",
        "mfu_titan",
    } <= set(found)
    assert sum(found["step_parts_seconds"].values()) == pytest.approx(found["step_seconds"])
    assert sum(found["memory_parts_gib"].values()) == pytest.approx(found["device_memory_gib"])
    assert found["tokens_per_second"] == pytest.approx(8 * 256 / found["step_seconds"])
    assert found["fits"] is True


def test_a_tensor_parallel_group_shares_its_tokens(small: Estimate) -> None:
    halves = dataclasses.replace(small, plan=plan(f"{SMALL} --parallelism.tensor_parallel_degree 2"))
    assert halves.tokens_per_second == pytest.approx(small.tokens_per_second / 2)  # of steps that take as long


def test_what_the_device_holds_beside_torchs_memory(small: Estimate) -> None:
    """Two communicators, for the shards and the world; what is allocated once and kept leaves no gaps."""
    kept = small.memory_parts["parameters"] + small.memory_parts["optimizer state"]
    assert small.beside_torch["NCCL"] == 2 * 0.3 * 2**30
    assert small.beside_torch["allocator slack"] == pytest.approx(0.04 * (small.peak_memory - kept))

    for words, communicators in (
        ("--gpus 1", 0),
        ("--parallelism.data_parallel_replicate_degree 2", 3),
        ("--parallelism.data_parallel_replicate_degree 2 --parallelism.tensor_parallel_degree 2", 4),
    ):
        other = dataclasses.replace(small, plan=plan(f"{SMALL} {words}"))
        assert other.beside_torch["NCCL"] == communicators * 0.3 * 2**30, words


def test_cublas_has_less_workspace_on_an_a100(small: Estimate) -> None:
    older = dataclasses.replace(small, plan=plan(SMALL.replace("h100-sxm", "a100-80gb")))
    assert [found.memory_parts["cuBLAS workspace"] for found in (small, older)] == [32 * 2**20, 8.125 * 2**20]


def test_what_fits_has_room_for_what_torch_does_not_count_too(small: Estimate) -> None:
    for room, fits in ((small.device_memory, True), (small.device_memory - 1, False)):
        gpu = dataclasses.replace(H100, memory=dataclasses.replace(H100.memory, value=room))
        assert dataclasses.replace(small, plan=dataclasses.replace(small.plan, gpu=gpu)).fits is fits


def test_options_of_the_planners_own() -> None:
    assert plan(f"{SMALL} --nic-gbps 10").network == Network(8, 1.25e9) and plan(SMALL).network == NODE
    assert plan(f"{SMALL} --all-blocks").whole and not plan(SMALL).whole


def test_a_tensor_parallel_group_alone_has_no_communication_of_fsdp() -> None:
    alone = estimate(plan(f"{SMALL} --gpus 2 --parallelism.tensor_parallel_degree 2"), check_depth=False).time
    assert alone.parts["exposed tensor-parallel communication"] > 0 == alone.parts["exposed FSDP communication"]


def test_recomputation_costs_time_and_saves_memory() -> None:
    bare, full = (estimate(plan(f"{SMALL} --activation_checkpoint.mode {mode}")) for mode in ("none", "full"))
    blocks = [s for s in bare.segments if s.phase == "forward" and s.unit.startswith("block")]
    forward = [o.flops for s in blocks for o in s.operations]
    again = [o.flops for s in full.segments for o in s.operations if o.recomputed]
    assert 0.5 * sum(forward) < sum(again) < sum(forward)
    assert not any(o.flops for s in bare.segments for o in s.operations if o.recomputed)
    assert full.time.parts["recomputation"] > 100 * bare.time.parts["recomputation"]
    assert full.peak_memory < bare.peak_memory
    assert full.time.seconds > bare.time.seconds


def test_accumulated_passes_take_their_time(small: Estimate) -> None:
    four = estimate(plan(f"{SMALL} --training.global_batch_size 512"))
    assert four.plan.passes == 4
    assert 3.0 < four.time.seconds / small.time.seconds < 4.5


def test_compiled_step_moves_fewer_bytes_and_is_traced(small: Estimate) -> None:
    compiled = estimate(plan(f"{SMALL} --compile.enable True"))
    ours, eager = (
        sum(o.nbytes for s in e.segments if s.unit == "block 1" for o in s.operations if o.kind == "memory")
        for e in (compiled, small)
    )
    assert ours < 0.6 * eager
    assert compiled.fullest.peak.parts["saved activations"] < small.fullest.peak.parts["saved activations"]


def test_a_model_in_one_graph_is_counted_as_its_parts() -> None:
    one = f"{SMALL} --gpus 1 --compile.enable True --training.mixed_precision_param bfloat16 --loss.chunk_size 512"
    parts = estimate(plan(f"{one} --compile.components blocks norm loss optimizer"))
    whole = estimate(plan(f"{one} --compile.components model optimizer"))
    assert whole.segments == parts.segments
    assert "counted as blocks, norm and loss" in estimate_report.table(whole)[-1]
    assert "counted as" not in estimate_report.table(parts)[-1]


def test_wide_gradients_are_not_widened() -> None:
    """One pass less over each block's gradients, which would read bfloat16 and write float32."""
    narrow, wide = (
        estimate(plan(f"{SMALL} --compile.enable True --parallelism.fsdp_wide_gradients {on}")) for on in (False, True)
    )
    shape = narrow.plan.shape
    matrices = shape.dim * (shape.qkv_dim + shape.dim + 3 * shape.ffn_dim)

    def in_block(found: Estimate, kind: str) -> tuple[float, float]:
        steps = [o for s in found.segments if (s.phase, s.unit) == ("backward", "block 1") for o in s.operations]
        return sum(o.nbytes for o in steps if o.kind == kind), sum(o.flops for o in steps if o.kind == kind)

    (moved, flops), (moved_wide, flops_wide) = in_block(narrow, "gemm"), in_block(wide, "gemm")
    assert flops_wide == flops and moved_wide - moved == 2 * matrices
    assert in_block(narrow, "memory")[0] - in_block(wide, "memory")[0] == pytest.approx(6 * matrices, rel=1e-3)
    assert in_block(narrow, "reduce") == in_block(wide, "reduce")


@pytest.mark.parametrize("mode", ["none", "full", "pointwise", "selective"])
def test_wide_gradients_change_nothing_of_what_compiled_blocks_keep(mode: str) -> None:
    words = f"{SMALL} --compile.enable True --activation_checkpoint.mode {mode} --parallelism.fsdp_wide_gradients"
    narrow, wide = (estimate(plan(f"{words} {on}")) for on in (False, True))
    saved = [max(s.peak.parts["saved activations"] for s in one.segments) for one in (narrow, wide)]
    again = [sum(o.flops for s in one.segments for o in s.operations if o.recomputed) for one in (narrow, wide)]
    assert saved[0] == pytest.approx(saved[1], abs=2**15) and again[0] == again[1]  # but for the ports' own few bytes


@needs_triton
def test_kernels_are_counted_in_compiled_blocks() -> None:
    words = " ".join(f"--kernels.{name} triton" for name in ("rms_norm", "rope", "swiglu", "cross_entropy"))
    found = estimate(plan(f"{SMALL} --compile.enable True {words}"))
    names = {o.name for s in found.segments for o in s.operations}
    ours = {"add_rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu_backward", "cross_entropy_with_grad_"}
    assert names > {f"titan_kernels.{name}" for name in ours}


def test_wide_gradients_cost_a_product_where_eager_blocks_are_computed_again() -> None:
    """So they are not used there, unless asked for."""
    full = f"{SMALL} --activation_checkpoint.mode full"
    again = {
        words: sum(o.flops for s in estimate(plan(f"{full} {words}")).segments for o in s.operations if o.recomputed)
        for words in ("", "--parallelism.fsdp_wide_gradients True", "--compile.enable True")
    }
    shape, training = plan(full).shape, plan(full).config.training
    down = 2 * shape.dim * shape.ffn_dim * training.local_batch_size * training.seq_len * shape.n_layers
    unasked, asked, compiled = again.values()
    assert compiled == pytest.approx(unasked, rel=1e-12) and asked == pytest.approx(unasked + down, rel=1e-12)


def test_float8_products_are_counted_as_such() -> None:
    found = estimate(plan(f"{SMALL} --compile.enable True --float8.enable True"))
    products = [o for s in found.segments if s.unit == "block 1" for o in s.operations if o.kind == "gemm"]
    shape, tokens = found.plan.shape, 8 * 256
    weights = shape.dim * (shape.qkv_dim + shape.dim + 3 * shape.ffn_dim)
    assert {o.element_size for o in products} == {1} and len(products) == 15
    assert sum(o.flops for o in products) == 6 * weights * tokens


@pytest.mark.parametrize(("recipe", "passes"), [("tensorwise", 2), ("rowwise", 1)])
def test_one_scale_for_a_tensor_is_a_pass_of_its_own(recipe: str, passes: int) -> None:
    """It is only known when all has been read, which must then be read again for the cast; a row's is known earlier."""

    def cast_and_multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        eighths = rounded(x.exp(), FORWARD, recipe)
        return torch._scaled_mm(eighths.values, weight.t(), eighths.scale, scale, out_dtype=torch.bfloat16)

    x, weight = torch.ones(64, 32, dtype=torch.bfloat16), torch.ones(48, 32).to(FORWARD)
    scale = torch.ones(()) if recipe == "tensorwise" else torch.ones(1, 48)
    graph = make_fx(cast_and_multiply, tracing_mode="fake")(x, weight, scale)
    moved = sum(o.nbytes for o in compiled_graph.GraphPlan.of(graph, backward=False).operations if o.kind == "memory")
    assert moved == pytest.approx(passes * x.nbytes + x.numel(), abs=3 * 4 * 64)  # and the scales, 4 bytes each


def test_what_is_written_in_place_is_written_once_and_takes_no_memory() -> None:
    """The compiled AdamW reads master, moments and gradient, and writes master, moments and weight."""
    counter = compiled_graph.Counter()
    compiled = torch.compile(masters.update, backend=counter, fullgraph=True, dynamic=False)
    with FakeTensorMode(), torch.no_grad(), counter.recorder as recorder:
        weight, gradient = (torch.empty(1024, 512, dtype=torch.bfloat16) for _ in range(2))
        master, mean, square = (torch.empty(1024, 512) for _ in range(3))
        numbers = torch.empty(6)
        recorder.memory.see((weight, gradient, master, mean, square, numbers))
        recorder.mark("optimizer", "all")
        before = recorder.memory.total
        compiled(weight, master, gradient, mean, square, numbers, 0.9, 0.95, 1e-8)
        (step,) = recorder.finish()
    assert sum(o.nbytes for o in step.operations) == 30 * weight.numel() + numbers.nbytes
    assert step.peak.total == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--model.flavor debug --gpu h100 --gpus 8",
            ["unknown GPU 'h100'", "did you mean h100-sxm", "b200", "titan_fast/gpus.py"],
        ),
        (f"{SMALL.replace('16', '12')}", ["12 GPUs are not whole nodes of 8"]),
        (
            f"{SMALL} --gpus 24 --parallelism.data_parallel_replicate_degree 2",
            ["each copy of the weights lies on 12 GPUs, which are neither whole nodes of 8 nor equal parts of one"],
        ),
        (
            f"{SMALL} --gpus 24 --parallelism.data_parallel_replicate_degree 4",
            ["each copy of the weights lies on 6 GPUs", "change parallelism.data_parallel_replicate_degree"],
        ),
        (
            f"{SMALL} --gpus 12 --gpus-per-node 3 --parallelism.tensor_parallel_degree 2",
            ["each tensor-parallel group lies on 2 GPUs", "whole nodes of 3", "change parallelism.tensor_parallel"],
        ),
        (
            f"{SMALL} --parallelism.tensor_parallel_degree 3",
            ["the world size is 16; change the degrees in [parallelism] or --gpus"],
        ),
        (f"{SMALL} --training.seq_len 255 --parallelism.tensor_parallel_degree 2", ["seq_len 255 is not divisible by"]),
        (f"{SMALL} --training.global_batch_size 7", ["training.global_batch_size 7 is not divisible"]),
        (f"{SMALL} --activation_checkpoint.mode memory_budget", ["memory_budget", "compile.enable"]),
        (f"{SMALL} --training.sequence 7", ["unknown key"]),
        (f"{SMALL} --nic-gbps 0", ["--nic-gbps is 0.0, not positive and at most 2^20"]),
        (f"{SMALL} --gpus 1000000000", ["--gpus is 1000000000, not positive and at most 2^20"]),
        (f"{SMALL} --gpus {10**400}", ["--gpus is 1000"]),
        (
            f"{SMALL} --scaling --gpus-per-node 7",
            ["--scaling is for 256 GPUs and more, which are not whole nodes of 7"],
        ),
        (f"{SMALL} --job.world-size=4", ["job.world_size is for titan_fast.train"]),
        (f"{SMALL} --job.world_size 4", ["job.world_size is for titan_fast.train; --gpus says it here"]),
        (f"{SMALL} --job.print_config True", ["are for titan_fast.train"]),
        (f"{SMALL} --kernels.attention math", ["no rate of attention 'math' is known for h100-sxm"]),
        (
            f"{SMALL.replace('h100-sxm', 'a100-80gb')} --float8.enable True",
            ["a100-80gb has no float8 products", "h200"],
        ),
        (f"{SMALL} --training.enable_cpu_offload True", ["enable_cpu_offload", "does not count"]),
        (f"{SMALL} --training.mixed_precision_param float32", ["float32", "plan for bfloat16"]),
    ],
)
def test_refusals_say_what_and_what_to_do(options: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        estimate(plan(options))
    for word in words:
        assert word in str(caught.value)


def test_attention_within_documents_is_timed_as_what_computes_it() -> None:
    found = [plan(f"{SMALL} --training.document_mask {masked}").attention for masked in (False, True)]
    assert found == ["cudnn", "flash"]


def test_groups_of_whole_nodes_equal_parts_and_within_one_node_can_be_timed() -> None:
    for gpus, copies in ((24, 1), (24, 3), (24, 6), (24, 24), (6, 2), (6, 1)):
        words = f"{SMALL} --gpus {gpus} --parallelism.data_parallel_replicate_degree {copies}"
        planner.check(plan(words))


def test_pictures_need_a_folder_before_anything_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "pictures", "/proc/pictures", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="no folder for --plot"):
            plan(f"{SMALL} --plot {place}")
    with pytest.raises(ConfigError, match="no rate of attention"):
        plan(f"{SMALL} --kernels.attention math --plot {tmp_path / 'pictures'}")
    assert not (tmp_path / "pictures").exists()


def test_a_picture_for_which_there_is_no_room_is_refused_after_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "memory.png").symlink_to("/dev/full")
    monkeypatch.setattr(sys, "argv", ["estimate", *SMALL.split(), "--plot", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        planner.main()
    out, error = capsys.readouterr()
    assert "tokens/s per GPU" in out
    assert stopped.value.code == 2 and error.count("\n") == 1 and "no picture can be written: No space" in error


def test_tables_name_the_formula_of_mfu_and_the_peak() -> None:
    option = Option({"training.local_batch_size": 1}, 100.0, 0.5, 10.0)
    point = ScalingPoint("FSDP", 256, 1, 256, 100.0, 0.5, 10.0, True, 1.0, 0.0)
    for config, says in ((Config(), False), (Config(float8=Float8(enable=True)), True)):
        for lines in (
            estimate_report.options_table([option], [], config),
            estimate_report.scaling_table([point], config),
        ):
            assert any("MFU titan" in line for line in lines)
            assert any("bfloat16's peak" in line for line in lines) is says


def rows(lines: list[str], unit: str) -> dict[str, float]:
    found = [re.fullmatch(rf"  (.+?) +([\d,.]+) {unit} *[\d.]+%", line) for line in lines]
    return {row[1]: float(row[2].replace(",", "")) for row in found if row is not None}


def test_table_has_all_parts_that_are_worth_a_line_largest_first(small: Estimate) -> None:
    lines = estimate_report.table(small)
    memory = {name: value / 2**30 for name, value in (small.memory_parts | small.beside_torch).items()}
    for shown, parts, step in (
        (rows(lines, "GiB"), memory, 0.01),
        (rows(lines, "ms"), {name: 1e3 * value for name, value in small.time.parts.items()}, 0.1),
    ):
        assert list(shown.values()) == sorted(shown.values(), reverse=True)
        assert set(shown) == {name for name, value in parts.items() if value >= 0.0005 * sum(parts.values())}
        assert all(value == pytest.approx(parts[name], abs=step) for name, value in shown.items())
    eighths = dataclasses.replace(small, plan=plan(f"{SMALL} --compile.enable True --float8.enable True"))
    assert [any("of bfloat16's peak" in line for line in estimate_report.table(one)) for one in (small, eighths)] == [
        False, True,
    ]  # fmt: skip


def test_limits_are_what_takes_more_than_4_percent_largest_first(small: Estimate) -> None:
    parts = {"matrix products": 0.71, "memory-bound": 0.03, "waiting for the host": 0.05, "recomputation": 0.09}
    between = "exposed tensor-parallel communication"
    slow = dataclasses.replace(small, time=StepTime(dict.fromkeys(PARTS, 0.0) | parts | {between: 0.12}))
    assert [line.partition(";")[0] for line in limits(slow)] == [
        f"limit: {name} of the step"
        for name in (f"{between} is 12%", "recomputation is 9%", "waiting for the host is 5%")
    ]
    assert limits(slow)[0].endswith("lower tensor_parallel_degree, or async tensor parallel")
    config = changed(small.plan.config, {"parallelism.enable_async_tensor_parallel": True})
    overlapped = dataclasses.replace(slow, plan=dataclasses.replace(small.plan, config=config))
    assert limits(overlapped)[0].endswith("lower tensor_parallel_degree")
    fast = dataclasses.replace(small, time=StepTime(dict.fromkeys(PARTS, 0.0) | {"attention": 1.0}))
    assert limits(fast) == ["limit: matrix products and attention; nothing else is large"]


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ("logits and loss", "lower loss.chunk_size"),
        ("optimizer state", "shard over more GPUs"),
        ("saved activations", "recompute more"),
    ],
)
def test_what_takes_most_of_a_memory_that_is_too_small_is_advised_on(small: Estimate, part: str, hint: str) -> None:
    peak = Peak(2**37, dict.fromkeys(MEMORY_PARTS, 0.0) | {part: 2.0**37})
    full = dataclasses.replace(small, segments=[Segment("forward", "block 0", 0, 0, peak=peak)])
    line, over = limits(full)[0], (full.device_memory - H100.memory.value) / 2**30
    assert f"memory, {over:.1f} GiB too much, most of it {part}; {hint}" in line and over > 0


def test_scaling_says_from_where_communication_costs_much_and_what_does_not_fit() -> None:
    points = [
        ScalingPoint("FSDP", gpus, 1, gpus, 100.0, 0.5, 10.0, gpus > 256, 1.0, cost)
        for gpus, cost in ((256, 0.04), (512, 0.06), (1024, 0.08))
    ]
    lines = estimate_report.scaling_table(points, Config())
    assert ["does not fit" in line for line in lines] == [False, True, False, False, False, False]
    assert lines[-2:] == [
        "FSDP: communication costs more than 5% of the step from 512 GPUs on",
        "HSDP: communication costs more than 5% of the step nowhere here",
    ]


def test_calibration_replaces_rates_and_is_of_the_same_device(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "rates": {"gemm": 6e14, "attention_forward": 5e14}}))
    found = calibrated(H100, path)
    assert found.gemm.value == 6e14
    assert "measured on NVIDIA H100" in found.gemm.source
    assert found.attention["cudnn"].forward == 5e14
    assert found.bandwidth == H100.bandwidth
    with pytest.raises(ConfigError, match="calibration is of 'NVIDIA H100 80GB HBM3', and --gpu is a100-80gb"):
        calibrated(GPUS["a100-80gb"], path)
    head = '{"device": "NVIDIA H100 80GB HBM3"'
    for text in (
        "{",
        "[]",
        "[" * 100_000,
        head + ', "rates": {"gemm": true}}',
        head + ', "rates": {"gemm": 1e99}}',
        head + "}",
        head + ', "rates": {"gemm": -1}}',
        head + ', "rates": {"speed": 1}}',
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match="it needs"):
            calibrated(H100, path)


@pytest.mark.parametrize(
    "rates",
    [
        {"gemm": 700.0}, {"gemm": 1e15}, {"attention_forward": 500.0}, {"attention_backward": 1e15},
        {"bandwidth": 3000.0}, {"bandwidth": 7e12}, {"nvlink": 350.0}, {"nic": 400.0}, {"gemm": float("nan")},
        {"gemm": 10**400},
    ],
)  # fmt: skip
def test_calibration_in_other_units_is_refused(tmp_path: Path, rates: dict[str, float]) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "rates": rates}))
    with pytest.raises(ConfigError, match=r"and on h100-sxm it is between .*; mind the units"):
        calibrated(H100, path)


def test_calibration_of_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    content = {"device": "NVIDIA H100 80GB HBM3", "rates": {"attention_forward": 5e14}}
    for backend in ("blub", ["flash"]):
        (tmp_path / "results.json").write_text(json.dumps(content | {"attention": backend}))
        with pytest.raises(ConfigError, match=r"attention is .*; it is one of "):
            calibrated(H100, tmp_path / "results.json")


def test_every_rate_has_a_source() -> None:
    for gpu in GPUS.values():
        rates = [v for v in vars(gpu).values() if hasattr(v, "source")] + list(gpu.attention.values())
        assert len(rates) >= 7
        assert all(len(rate.source) > 10 for rate in rates)
        assert gpu.default_attention in gpu.attention
        assert gpu.gemm.value < gpu.peak


def test_a_gpu_is_known_by_its_name_and_a_slower_one_is_not_taken_for_it() -> None:
    assert known_gpu("h200").name == "h200"
    for name, hint in (
        ("NVIDIA H200", "h200"),
        ("h200-sxm", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("a10", "a100-80gb"),
    ):
        with pytest.raises(ConfigError, match=rf"unknown GPU '{name}' \[--gpu\]; did you mean {hint}\? known"):
            known_gpu(name)
    for slower in ("h200-nvl", "NVIDIA H100 PCIe"):
        with pytest.raises(ConfigError, match=rf"unknown GPU '{slower}' \[--gpu\]; known"):
            known_gpu(slower)


def test_search_lists_what_fits_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_fast.advice._WORTH_DOUBLING", float("inf"))
    monkeypatch.setattr("titan_fast.advice._RECOMPUTE", ({"mode": "full"},))
    wide = plan(SMALL)
    wide = dataclasses.replace(wide, network=dataclasses.replace(wide.network, gpus_per_node=2))
    found, refusals = search(wide)
    assert not refusals
    speeds = [option.tokens_per_second for option in found]
    assert speeds == sorted(speeds, reverse=True)
    assert {o.changes["parallelism.tensor_parallel_degree"] for o in found} == {1, 2}
    assert {o.changes["training.local_batch_size"] for o in found} == {1, 2, 8}  # the config's own
    assert {o.changes["activation_checkpoint.mode"] for o in found} == {"full"}
    tight = dataclasses.replace(wide, gpu=dataclasses.replace(H100, memory=dataclasses.replace(H100.memory, value=1e9)))
    assert search(tight) == ([], [])
    assert "nothing fits" in estimate_report.options_table([], [], Config())[0]


def test_search_tries_all_recomputation_and_keeps_weights_where_they_are_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[tuple[int, tuple[str, ...], str]] = []

    def batches(plan: Plan, degree: int, recompute: dict[str, str], reshard: str) -> tuple[list[Option], str]:
        tried.append((degree, tuple(recompute.values()), reshard))
        return [], ""

    monkeypatch.setattr("titan_fast.advice._batches", batches)
    search(plan(f"{SMALL} --gpus 2"))
    modes = [("none",), ("pointwise",), *(("selective", option) for option in ("op", "2", "attention")), ("full",)]
    places = ((1, "default"), (1, "never"), (2, "default"))
    assert set(tried) == {(degree, mode, reshard) for degree, reshard in places for mode in modes}


def test_a_worker_is_interrupted_silently_unless_the_planner_ignores_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler, then in ((signal.SIG_IGN, signal.SIG_IGN), (signal.default_int_handler, signal.SIG_DFL)):
            signal.signal(signal.SIGINT, handler)
            _end_when_interrupted()
            assert signal.getsignal(signal.SIGINT) == then
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_search_whose_process_is_killed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_fast.advice._end_when_interrupted", functools.partial(os._exit, 9))
    with pytest.raises(TitanFastError, match=r"was killed, perhaps out of memory.*; search on fewer processors"):
        search(plan(SMALL), processes=2)


@pytest.fixture
def one_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """A series that ends with the second batch, except for the config's own."""
    monkeypatch.setattr("titan_fast.advice._WORTH_DOUBLING", float("inf"))
    monkeypatch.setattr("titan_fast.advice._RECOMPUTE", ({"mode": "none"},))
    monkeypatch.setattr("titan_fast.advice._tensor_degrees", lambda plan: [1])


def batches(words: str) -> list[int]:
    options, _ = search(plan(f"{SMALL} {words} --parallelism.fsdp_reshard_after_forward never"))
    return sorted({option.changes["training.local_batch_size"] for option in options})


@pytest.mark.usefixtures("one_series")
def test_search_tries_what_divides_the_global_batch_and_the_configs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batches("--training.local_batch_size 6") == [1, 2, 6]
    monkeypatch.setattr("titan_fast.advice._WORTH_DOUBLING", 0.0)
    assert batches("--gpus 2 --training.local_batch_size 1 --training.global_batch_size 12") == [1, 2, 3, 6]
    assert batches("--gpus 2 --training.local_batch_size 1 --training.global_batch_size 18") == [1, 3, 9]


@pytest.mark.parametrize(
    ("words", "counted"),
    [
        ("--training.local_batch_size 7", [1, 2, 4, 7, 8, 16, 32, 64]),
        ("--training.local_batch_size 100", [1, 2, 4, 8, 16, 32, 64, 100]),
        ("--training.local_batch_size 1 --training.global_batch_size 61440", [1, 2, 4, 8, 16, 32, 64]),
        ("--training.local_batch_size 7 --training.global_batch_size 5376", [1, 2, 4, 7, 8, 16, 28, 56]),
    ],
)
def test_a_series_ends_where_a_doubling_brings_less_than_one_percent(
    words: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here from 32 to 64 and from 28 to 56; smaller increases, such as from 7 to 8, do not end it."""

    class Answer:
        fits, device_memory = True, 0

        def __init__(self, plan: Plan, check_depth: bool) -> None:
            batch = plan.config.training.local_batch_size
            self.tokens_per_second = 60_000 * batch / (batch + 0.5)

        def mfu(self) -> dict[str, float]:
            return {"titan": 0.5}

    monkeypatch.setattr("titan_fast.advice.estimate", Answer)
    options, _ = _batches(plan(f"{SMALL} {words}"), 1, {"mode": "full"}, "default")
    assert [option.changes["training.local_batch_size"] for option in options] == counted
    wide = plan(f"{SMALL} {words} --parallelism.fsdp_wide_gradients True")
    for degree, freed in ((1, False), (2, True)):  # which tensor parallelism excludes
        options, _ = _batches(wide, degree, {"mode": "full"}, "default")
        assert all(("parallelism.fsdp_wide_gradients" in option.changes) == freed for option in options)


def test_search_frees_a_shard_degree_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_fast.advice._WORTH_DOUBLING", float("inf"))
    monkeypatch.setattr("titan_fast.advice._RECOMPUTE", ({"mode": "none"},))
    monkeypatch.setattr("titan_fast.advice._tensor_degrees", lambda plan: [2])
    options, refusals = search(plan(f"{SMALL} --parallelism.data_parallel_shard_degree 16"))
    assert options and not refusals
    assert "data_parallel_shard_degree=-1" in estimate_report.options_table(options, refusals, Config())[-1]


@pytest.mark.usefixtures("one_series")
def test_search_says_what_was_refused_where_nothing_was_not() -> None:
    wrong = plan(SMALL)
    wrong = dataclasses.replace(wrong, gpus=12)
    options, refusals = search(wrong)
    assert options == [] and len(refusals) == 1
    assert "12 GPUs are not whole nodes of 8" in estimate_report.options_table(options, refusals, Config())[0]


def test_scaling_exposes_communication_sooner_without_copies() -> None:
    slow = plan(f"{SMALL} --nic-gbps 10")
    points = scaling(slow, sizes=(64, 1024))
    fsdp, hsdp = ([p for p in points if p.kind == kind] for kind in ("FSDP", "HSDP"))
    assert fsdp[1].tokens_per_second < fsdp[0].tokens_per_second
    assert hsdp[1].tokens_per_second > fsdp[1].tokens_per_second
    assert (hsdp[1].replicate, hsdp[1].shard) == (128, 8), "a copy fits a node"
    assert 0.0 < hsdp[1].communication < fsdp[1].communication < 1.0
    assert scaling(plan(f"{SMALL} --nic-gbps 10 --gpus 1"), sizes=(64,)) == points[:2], "whatever --gpus is"


def test_copies_take_the_fewest_nodes_in_which_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def point(plan: Plan, kind: str, size: int, copies: int) -> ScalingPoint:
        return ScalingPoint(kind, size, copies, size // copies, 100.0, 0.5, 10.0, copies <= 2, 1.0, 0.0)

    monkeypatch.setattr("titan_fast.advice._point", point)
    assert [(p.kind, p.replicate, p.fits) for p in scaling(plan(SMALL), sizes=(64,))] == [
        ("FSDP", 1, True), ("HSDP", 2, True),
    ]  # fmt: skip


def test_scaling_has_no_copies_smaller_than_a_tensor_parallel_group() -> None:
    wide = plan(f"{SMALL} --gpus-per-node 1 --parallelism.tensor_parallel_degree 2")
    (point,) = [p for p in scaling(wide, sizes=(16,)) if p.kind == "HSDP"]
    assert (point.replicate, point.shard) == (8, 1)


def test_what_scaling_cannot_run_is_refused_before_anything_is_counted() -> None:
    one = f"{SMALL} --gpus 1 --parallelism.single_device masters"
    plan(one)
    with pytest.raises(ConfigError, match=r"--scaling plans for 256 GPUs.*masters is for one device.*leave --scaling"):
        plan(f"{one} --scaling")
    plan(f"{SMALL} --gpus-per-node 1 --parallelism.tensor_parallel_degree 2 --scaling")
    plan(f"{SMALL} --training.global_batch_size 128 --scaling")  # it is of a GPU's batch
    with pytest.raises(ConfigError, match=r"--scaling plans for 256 GPUs.*needs several shards"):  # of the copies
        plan(f"{SMALL} --gpus-per-node 1 --parallelism.fsdp_wide_gradients True --scaling")


def test_what_is_on_already_is_not_advised() -> None:
    host = [planner.estimate(plan(f"{SMALL} --compile.enable {on}")) for on in ("False", "True")]
    eager, compiled = (" ".join(limits(found)) for found in host)
    assert "enable compile" in eager and "enable compile" not in compiled


def test_command_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["estimate", *SMALL.split(), "--plot", str(tmp_path / "pictures")])
    planner.main()
    text = capsys.readouterr().out
    assert "fits" in text
    assert "tokens/s per GPU" in text
    for name in ("memory.png", "step.png"):
        assert (tmp_path / "pictures" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setattr(sys, "argv", ["estimate", *SMALL.split(), "--json"])
    planner.main()
    assert json.loads(capsys.readouterr().out)["gpus"] == 16


def test_command_searches_and_scales(
    small: Estimate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option = Option({"training.local_batch_size": 1}, 100.0, 0.5, 10.0)
    point = ScalingPoint("FSDP", 256, 1, 256, 100.0, 0.5, 10.0, True, 1.0, 0.0)
    monkeypatch.setattr(planner, "estimate", lambda plan: small)
    monkeypatch.setattr("titan_fast.advice.search", lambda *_: ([option], ["a refusal"]))
    monkeypatch.setattr("titan_fast.advice.scaling", lambda _: [point])
    monkeypatch.setattr(sys, "argv", ["estimate", *SMALL.split(), "--search", "--scaling"])
    planner.main()
    lines = capsys.readouterr().out.splitlines()
    for table in (
        estimate_report.table(small),
        estimate_report.options_table([option], ["a refusal"], small.plan.config),
        estimate_report.scaling_table([point], small.plan.config),
    ):
        assert set(table) <= set(lines)
    monkeypatch.setattr(sys, "argv", ["estimate", *SMALL.split(), "--search", "--scaling", "--json"])
    planner.main()
    answer = json.loads(capsys.readouterr().out)
    assert answer["search"] == [dataclasses.asdict(option)] and answer["search_refusals"] == ["a refusal"]
    assert answer["scaling"] == [dataclasses.asdict(point)]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(OUTPUT.read_text())


def test_recorded_errors_are_within_the_aims(record: dict[str, Any]) -> None:
    fitted = record["fitted"]
    assert fitted["mean_absolute_error"] <= 0.03
    assert fitted["worst_error"] <= 0.06
    assert fitted["constants"] == dataclasses.asdict(FITTED)
    assert all(row["fits"] for row in fitted["rows"])
    assert [row["fits"] for row in record["memory"]] == [fits for _, fits in MEMORY_ROWS]
    assert all(abs(row["error"]) <= 0.05 for row in record["measured_on_cpu"])
    assert [row["name"] for row in record["held_out"]] == [row.name for row in HELD_OUT]


@needs_triton
@pytest.mark.parametrize("index", [3, 6])
def test_record_is_up_to_date(record: dict[str, Any], index: int) -> None:
    row = FITTED_ROWS[index]
    ours = plan_of(row)
    found = timed(ours, counted(ours, row.ops))
    assert found.tokens_per_second == pytest.approx(record["fitted"]["rows"][index]["predicted"], rel=1e-3)
    assert found.device_memory / 2**30 == pytest.approx(record["fitted"]["rows"][index]["device_memory_gib"], abs=0.05)
