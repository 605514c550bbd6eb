"""One rank of any world on any machine: `--job.dry_run True --job.world_size 512`.

The model is built and parallelized as rank 0 of that many GPUs, and goes through the shapes of one step: forward,
backward, clipping, optimizer. Tensors have no memory and collectives no partners, so nothing is computed. What cannot
work in the cluster fails here with the same sentence, except for data, tokenizer and kernels, which are not checked.
"""

import dataclasses
import time
from collections.abc import Iterable

import torch

from titan_fast import checkpointer, distributed, ops, parallel
from titan_fast.config import Config, Kernels, MeshDegrees, grad_accum_steps, mesh_degrees, model_shape, tokens_per_step
from titan_fast.counted_step import count_step, fake_world
from titan_fast.deep_step import DeepStep, deep_step, period
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape
from titan_fast.flops import parameter_count
from titan_fast.ops import Ops
from titan_fast.profiling import check_profiling
from titan_fast.step import residual_is_carried, workload

OFFLOADED = ("parameters", "optimizer state")
"""Parts of memory that `training.enable_cpu_offload` keeps in the host's; the same at every moment of a step."""

# The cluster's device. This machine need not have one to name it.
GPU = torch.device("cuda")


def dry_run(config: Config) -> None:
    """Prints what a rank of `job.world_size` holds in a step; ConfigError where it could not run."""
    if (started := distributed.world_size()) > 1:
        raise ConfigError(
            f"job.dry_run under torchrun, which started {started} processes: two launch methods at once",
            "start one process, `python -m titan_fast.train --job.dry_run True`, and name the others in job.world_size",
        )
    began = time.perf_counter()
    size = config.job.world_size or 1
    degrees = mesh_degrees(config.parallelism, size, "--job.world_size")
    shape = model_shape(config.model)
    passes = grad_accum_steps(config.training, degrees.data)
    check_profiling(config.profiling, GPU)
    parallel.check(config, shape, degrees, GPU)
    checkpointer.check(config, GPU)
    ops.check(config.kernels, degrees.tensor)
    config = as_on_a_gpu(config, degrees)
    reference = ops.build_ops(config.kernels, torch.device("cpu"), workload(config, shape, degrees))
    with fake_world(size):
        step = one_step(config, shape, reference, degrees, min(passes, 2))
    for name, text in description(config, shape, degrees, step, time.perf_counter() - began):
        print(f"{name:<22} {text}", flush=True)  # noqa: T201


def as_on_a_gpu(config: Config, degrees: MeshDegrees) -> Config:
    """`config` with everything that depends on the device resolved as on a GPU, but with the reference for every
    operator: shapes, and what is saved for the backward pass, are the same whatever computes them."""
    dtypes = parallel.precision(config.training, GPU)
    name = str(dtypes.param).removeprefix("torch.")
    off = "reference"
    kernels = Kernels(off, off, off, off, off, carry_residual=residual_is_carried(config, degrees))
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, mixed_precision_param=name),
        parallelism=dataclasses.replace(
            config.parallelism,
            enable_async_tensor_parallel=False,
            fsdp_wide_gradients=parallel.gradients_are_wide(config, degrees, GPU),
        ),
        kernels=kernels,
    )


def one_step(config: Config, shape: ModelShape, ops: Ops, degrees: MeshDegrees, passes: int) -> DeepStep:
    """The step's memory; needs a process group of that size. All blocks after the first few are alike, so a deep model
    need not be counted block by block."""

    def count(n_layers: int) -> list:
        return count_step(config, dataclasses.replace(shape, n_layers=n_layers), ops, degrees, passes)

    return deep_step(count, shape.n_layers, period(config.activation_checkpoint))


def description(
    config: Config, shape: ModelShape, degrees: MeshDegrees, step: DeepStep, seconds: float
) -> Iterable[tuple[str, str]]:
    """What is printed, line by line: (name, text)."""
    training, peak = config.training, step.peak
    size = degrees.replicate * degrees.shard * degrees.tensor
    passes = grad_accum_steps(training, degrees.data)
    yield "dry run", f"rank 0 of {size}, nothing computed; {config.model.flavor}, {parameter_count(shape):,} parameters"
    yield "mesh", f"{degrees.replicate} replicate x {degrees.shard} shard x {degrees.tensor} tensor"
    products = f", the blocks' products {config.float8.recipe_name} in float8" if config.float8.enable else ""
    yield (
        "precision",
        f"{training.mixed_precision_param}{products}, gradients summed in {training.mixed_precision_reduce}",
    )
    yield "kernels", "operators by their reference; a kernel may save less"
    yield (
        "tokens per step",
        f"{training.local_batch_size} sequences x {training.seq_len} tokens x {degrees.data} data-parallel x {passes} "
        f"accumulated = {tokens_per_step(training, degrees.data):,}",
    )
    yield "sharded over", f"{degrees.shard * degrees.tensor} ranks: parameters, gradients and optimizer state of a rank"
    on_host = OFFLOADED if training.enable_cpu_offload else ()
    for part, nbytes in peak.peak.parts.items():
        if nbytes:
            yield f"  {part}", memory(nbytes) + ", in host memory" * (part in on_host)
    total = peak.peak.total - sum(peak.peak.parts.get(part, 0.0) for part in on_host)
    yield "fullest moment", f"{memory(total)}, in {peak.phase} of {peak.unit}, without what torch reserves"
    yield "counted", f"{step.how}; {seconds:.0f} s"


def memory(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"
