"""How far off the planner is: for rows that were fitted, rows that were not, and measured memory.

    python -m benchmarks.estimate_errors [--fit] [--output benchmarks/results/estimate_errors.json]

--fit fits the three constants of titan_fast.step_time again; the file then has their new values.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from titan_kernels.choice import SHAPE_KEYS
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.provenance import commit
from titan_fast.config import Config, parse
from titan_fast.counted_step import count_step, fake_world
from titan_fast.deep_step import DeepStep, deep_step, period
from titan_fast.estimate import Estimate, Plan, estimate, on_gpu
from titan_fast.gpus import GPUS
from titan_fast.ops import Ops, build_ops
from titan_fast.step import workload
from titan_fast.step_time import FITTED, Fitted, Network, step_time

OUTPUT = Path(__file__).parent / "results" / "estimate_errors.json"


@dataclass(frozen=True)
class Row:
    """A published run. `ops`: with whose operators, torchtitan's of 2024 ("titan") or ours ("ours")."""

    name: str
    options: str
    gpu: str
    gpus: int
    tokens_per_second: float
    source: str
    ops: str = "ours"


_TORCHTITAN = "torchtitan docs/performance.md, 2024"
_EAGER = "--compile.enable False --optimizer.implementation foreach --loss.chunk_size 0 --kernels.rms_norm triton"


def _seed(name: str, flavor: str, seq_len: int, batch: int, mode: str, option: str, tokens: float) -> Row:
    options = (
        f"--model.flavor {flavor} --training.seq_len {seq_len} --training.local_batch_size {batch} "
        f"--activation_checkpoint.mode {mode} --activation_checkpoint.selective_ac_option {option} {_EAGER}"
    )
    return Row(name, options, "a100-80gb", 64, tokens, _TORCHTITAN, "titan")


FITTED_ROWS = (
    _seed("Llama 3 8B, selective layer", "llama3_8b", 8192, 1, "selective", "2", 2904),
    _seed("Llama 3 8B, selective op", "llama3_8b", 8192, 1, "selective", "op", 2973),
    _seed("Llama 3 70B, full", "llama3_70b", 8192, 1, "full", "op", 331),
    _seed("Llama 2 13B, none", "llama2_13b", 4096, 2, "none", "op", 2162),
    _seed("Llama 2 13B, selective layer", "llama2_13b", 4096, 2, "selective", "2", 1914),
    _seed("Llama 2 13B, selective op", "llama2_13b", 4096, 2, "selective", "op", 1904),
    _seed("Llama 2 70B, selective op", "llama2_70b", 4096, 1, "selective", "op", 355),
    _seed("Llama 2 70B, full, batch 2", "llama2_70b", 4096, 2, "full", "op", 353),
)
# Published: out of memory; fits at more than batch 2.
MEMORY_ROWS = (
    (_seed("Llama 2 70B, selective op, batch 2", "llama2_70b", 4096, 2, "selective", "op", 0), False),
    (_seed("Llama 2 70B, full, batch 4", "llama2_70b", 4096, 4, "full", "op", 0), True),
)

# Other programs have neither our kernels nor our optimizer.
_NO_KERNELS = " ".join(f"--kernels.{operator} reference" for operator in SHAPE_KEYS)
_COMPILED = f"--compile.enable True --compile.components blocks norm loss {_NO_KERNELS}"

_8B = "--model.flavor llama3_8b --training.seq_len 8192"
_70B = f"--model.flavor llama3_70b --training.seq_len 8192 --training.local_batch_size 2 {_COMPILED}"
_SAC = f"--training.local_batch_size 2 --activation_checkpoint.mode selective {_COMPILED}"
_BARE = (
    "--training.local_batch_size 1 --compile.enable False --optimizer.implementation fused --loss.chunk_size 0 "
    f"{_NO_KERNELS}"
)
_LLMQ = (
    "--parallelism.single_device masters --training.seq_len 1024 --training.local_batch_size 4 "
    f"--training.global_batch_size 512 --compile.enable True {_NO_KERNELS}"
)
_MAXTEXT = "--activation_checkpoint.mode selective"
HELD_OUT = (
    Row("NeMo 8B, context parallel 2, 8 GPUs", f"{_8B} --training.local_batch_size 1 --training.global_batch_size 128 "
        f"{_COMPILED}", "h100-sxm", 8, 10_682, "dgxc-benchmarking v25.04; another program and layout"),
    Row("torchtitan 8B compiled, 8 GPUs", f"{_8B} {_SAC}", "h100-500w", 8, 6667, "llama3_h100_202412_torchtitan.md"),
    Row("torchtitan 8B compiled, 128 GPUs", f"{_8B} {_SAC}", "h100-500w", 128, 6514, "the same"),
    Row("torchtitan 8B whole graph, 8 GPUs", f"{_8B} --training.local_batch_size 1 {_COMPILED}", "h100-500w",
        8, 7890, "torchtitan PR 3429; another compiler"),
    Row("torchtitan 8B eager, 8 GPUs", f"{_8B} {_BARE}", "h100-500w", 8, 7380,
        "SimpleFSDP PR; its recomputation is not said, none is taken", "titan"),
    Row("torchtitan 8B eager, 64 GPUs", f"{_8B} {_BARE}", "h100-500w", 64, 5097, "the same", "titan"),
    Row("MaxText 70B, 256 GPUs", f"{_70B} {_MAXTEXT}", "h100-sxm", 256, 1061, "dgxc-benchmarking v25.02; another "
        "program, which keeps q, k and v"),
    Row("MaxText 70B, 2048 GPUs", f"{_70B} {_MAXTEXT}", "h100-sxm", 2048, 1061 * 50.1 / 51.6, "the same"),
    Row("llmq 3B, one GPU", f"--model.flavor llama3_3b {_LLMQ}", "h100-sxm", 1, 30_900, "llmq H100x1.md; C++, bf16"),
    Row("llmq 7B, one GPU", f"--model.flavor llama2_7b {_LLMQ}", "h100-sxm", 1, 13_860, "llmq H100x1.md; C++, bf16"),
)  # fmt: skip


def titan_rope(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding in complex arithmetic, as in that program: equal memory and traffic, but other results."""
    batch, seq_len, _ = qkv.shape
    group = n_heads // n_kv_heads
    q, k, v = qkv.view(batch, seq_len, n_kv_heads, group + 2, 2 * cos.shape[-1]).split([group, 1, 1], dim=3)
    turn = torch.complex(cos, sin)[None, :, None, None, :]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype).flatten(2, 3).transpose(1, 2)

    return rotate(q), rotate(k), v.squeeze(3).transpose(1, 2)


def titan_ops(ops: Ops) -> Ops:
    """SwiGLU as two eager operators in bfloat16, and its rotary embedding."""
    return dataclasses.replace(ops, rope=titan_rope, swiglu=lambda gate, up: F.silu(gate) * up)


_THEIR_BUFFERS = ["--parallelism.fsdp_buffers", "flat"]
"""The published runs used FSDP2's own collectives."""


def plan_of(row: Row) -> Plan:
    gpu = GPUS[row.gpu]
    return Plan(
        on_gpu(parse(row.options.split() + _THEIR_BUFFERS)), gpu, row.gpus, Network(min(8, row.gpus), gpu.nic.value)
    )


def counted(plan: Plan, ops_of: str) -> DeepStep:
    """The step as titan_fast.estimate.estimate counts it, but with the published program's operators."""
    config, shape, degrees = plan.config, plan.shape, plan.degrees
    kernels = dataclasses.replace(config.kernels, attention="flash")
    ops = build_ops(kernels, torch.device("cpu"), workload(config, shape, degrees), plan.gpu.architecture)
    ops = titan_ops(ops) if ops_of == "titan" else ops
    with fake_world(plan.gpus):
        return deep_step(
            lambda n: count_step(config, dataclasses.replace(shape, n_layers=n), ops, degrees, min(2, plan.passes)),
            shape.n_layers,
            period(config.activation_checkpoint),
        )


def timed(plan: Plan, step: DeepStep, fitted: Fitted = FITTED) -> Estimate:
    time = step_time(step.segments, plan.gpu, plan.attention, plan.network, plan.passes, fitted, plan.degrees.tensor)
    return Estimate(plan, step.segments, step.how, time)


@dataclass(frozen=True)
class Line:
    """The seconds of a row's step, which are nearly linear in 1 / gemm, 1 / bandwidth and interference."""

    at: float
    slopes: tuple[float, float, float]
    published: float

    def error(self, fitted: Fitted) -> float:
        x = _coordinates(fitted)
        seconds = self.at + sum(s * (a - b) for s, a, b in zip(self.slopes, x, _coordinates(FITTED), strict=True))
        return self.published / seconds - 1.0


def _coordinates(fitted: Fitted) -> tuple[float, float, float]:
    return 1 / fitted.gemm, 1 / fitted.bandwidth, fitted.interference


def line_of(plan: Plan, step: DeepStep, tokens_per_second: float) -> Line:
    at = timed(plan, step)
    slopes = []
    for name in ("gemm", "bandwidth", "interference"):
        moved = dataclasses.replace(FITTED, **{name: getattr(FITTED, name) + 0.02})
        distance = sum(_coordinates(moved)) - sum(_coordinates(FITTED))
        slopes.append((timed(plan, step, moved).time.seconds - at.time.seconds) / distance)
    published_seconds = at.tokens_per_second * at.time.seconds / tokens_per_second
    return Line(at.time.seconds, (slopes[0], slopes[1], slopes[2]), published_seconds)


def fit(lines: Sequence[Line]) -> Fitted:
    """The constants with the least mean absolute error, in hundredths and within physically sensible bounds."""
    grid = itertools.product(
        [i / 100 for i in range(70, 101)], [i / 100 for i in range(40, 101, 5)], [i / 100 for i in range(0, 61, 5)]
    )
    return min((Fitted(*point) for point in grid), key=lambda f: sum(abs(line.error(f)) for line in lines))


def fitted_table(refit: bool) -> dict[str, Any]:
    """The eight rows: the error with the constants in use, and with those of a fit without the row."""
    plans = [plan_of(row) for row in FITTED_ROWS]
    steps = [counted(plan, row.ops) for plan, row in zip(plans, FITTED_ROWS, strict=True)]
    lines = [line_of(p, s, row.tokens_per_second) for p, s, row in zip(plans, steps, FITTED_ROWS, strict=True)]
    rows = []
    for i, (row, plan, step) in enumerate(zip(FITTED_ROWS, plans, steps, strict=True)):
        found = timed(plan, step)
        without = fit([line for j, line in enumerate(lines) if j != i])
        rows.append(
            _row(row, found)
            | {"fits": found.fits, "published_fits": True}
            | {"left_out_error": round(lines[i].error(without), 4), "left_out_constants": dataclasses.asdict(without)}
        )
    errors, left = [abs(r["error"]) for r in rows], [abs(r["left_out_error"]) for r in rows]
    return {
        "constants": dataclasses.asdict(fit(lines) if refit else FITTED),
        "mean_absolute_error": round(sum(errors) / len(errors), 4),
        "worst_error": max(errors),
        "left_out_mean_absolute_error": round(sum(left) / len(left), 4),
        "left_out_worst_error": max(left),
        "rows": rows,
    }


def _row(row: Row, found: Estimate) -> dict[str, Any]:
    return {
        "name": row.name,
        "published": round(row.tokens_per_second, 1),
        "predicted": round(found.tokens_per_second, 1),
        "error": round(found.tokens_per_second / row.tokens_per_second - 1.0, 4),
        "device_memory_gib": round(found.device_memory / 2**30, 2),
        "source": row.source,
    }


def memory_table() -> list[dict[str, Any]]:
    found = []
    for row, fits in MEMORY_ROWS:
        plan = plan_of(row)
        answer = timed(plan, counted(plan, row.ops))
        memory = round(answer.device_memory / 2**30, 2)
        found.append({"name": row.name, "published_fits": fits, "fits": answer.fits, "device_memory_gib": memory})
    return found


def held_out_table() -> list[dict[str, Any]]:
    found = []
    for row in HELD_OUT:
        plan = plan_of(row)
        answer = timed(plan, counted(plan, "titan")) if row.ops == "titan" else estimate(plan)
        found.append(_row(row, answer) | {"fits": answer.fits})
    return found


def measured_config(mode: str, dtype: str, n_layers: int = 4, seq_len: int = 512) -> Config:
    """A model small enough to run for real on a CPU."""
    return parse(
        f"--model.flavor debug --model.dim 512 --model.n_heads 8 --model.n_kv_heads 4 --model.ffn_dim 1408 "
        f"--model.n_layers {n_layers} --model.vocab_size 8192 "
        f"--training.seq_len {seq_len} --training.local_batch_size 4 --training.mixed_precision_param {dtype} "
        f"--activation_checkpoint.mode {mode} --compile.enable False --optimizer.implementation foreach".split()
    )


def measured_peak(config: Config, world: int) -> float:
    """The most bytes allocated on the CPU during a real step of a real model, as rank 0 of `world`: what exists before
    the step plus torch.profiler's record of every allocation."""
    from titan_fast.config import mesh_degrees, model_shape
    from titan_fast.loader import Batch
    from titan_fast.optim import build_optimizer, clip_grad_norm_
    from titan_fast.step import build_model, forward_backward, one_over_valid_tokens

    shape, degrees, device = model_shape(config.model), mesh_degrees(config.parallelism, world), torch.device("cpu")
    with fake_world(world):
        ops = build_ops(config.kernels, device, workload(config, shape, degrees))
        model = build_model(config, shape, ops, degrees, device)
        optimizer = build_optimizer(model, config.optimizer)
        tokens = torch.randint(0, shape.vocab_size, (config.training.local_batch_size, config.training.seq_len))
        batches = [Batch(tokens, tokens.clone())]

        def step() -> None:
            loss = forward_backward(model, batches, one_over_valid_tokens(batches, degrees))
            clip_grad_norm_(model.parameters(), config.training.max_norm, loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        kept = [*model.parameters(), *model.buffers(), *state, tokens, tokens]
        before = sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in kept)
        return before + _most_allocated(step)


def _most_allocated(step: Callable[[], None]) -> int:
    """The highest sum of allocations minus frees during `step`, which leaves nothing behind. Under load the profiler
    may lose a record; then the sum at the end is not 0, and the step is repeated."""
    for _ in range(5):
        with torch.profiler.profile(profile_memory=True) as profile:
            step()
        events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        sums = list(itertools.accumulate(change for _, change in sorted(changes, key=lambda pair: pair[0])))
        if abs(sums[-1]) < 2**20:
            return max(sums)
    raise RuntimeError("torch.profiler lost records of allocations in five runs: the machine is too busy")


def counted_peak(config: Config, world: int) -> float:
    from titan_fast.config import mesh_degrees, model_shape

    shape, degrees = model_shape(config.model), mesh_degrees(config.parallelism, world)
    ops = build_ops(config.kernels, torch.device("cpu"), workload(config, shape, degrees))
    with fake_world(world):
        segments = count_step(config, shape, ops, degrees, passes=1, for_gpu=False)
    return max(segment.peak.total for segment in segments)


MEASURED = tuple(itertools.product(("none", "full", "selective", "pointwise"), ("bfloat16", "float32"), (1, 4)))


def measured_table() -> list[dict[str, Any]]:
    found = []
    for mode, dtype, world in MEASURED:
        config = measured_config(mode, dtype)
        measured, predicted = measured_peak(config, world), counted_peak(config, world)
        found.append(
            {"recompute": mode, "dtype": dtype, "world": world}
            | {"measured_mib": round(measured / 2**20, 2), "counted_mib": round(predicted / 2**20, 2)}
            | {"error": round(predicted / measured - 1.0, 4)}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    found = {
        "what": "predicted tokens/s per GPU against published runs; counted peak memory against measured CPU "
        "allocations of small models. No GPU run of this project is in it yet.",
        "commit": commit(),
        "fitted": fitted_table(arguments.fit),
        "memory": memory_table(),
        "held_out": held_out_table(),
        "measured_on_cpu": measured_table(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
