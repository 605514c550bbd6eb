"""When a device runs out of memory: what takes how much, and what to change, cheapest first."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from titan_fast.config import ActivationCheckpoint, Config, MeshDegrees, grad_accum_steps, sequences_per_step
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape
from titan_fast.flops import parameter_count
from titan_fast.parallel import gradients_are_wide, precision, weights_kept

GIB = 1024**3
SMALL_CHUNK = 2048
"""Tokens per chunk: their logits are small, and the head's product is still fast."""
_OVER_ALL = " --parallelism.data_parallel_shard_degree -1"
_NO_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class OutOfMemory(ConfigError):
    """The model, batch and layout need more memory than the device has."""


@contextmanager
def explained(config: Config, shape: ModelShape, degrees: MeshDegrees, device: torch.device) -> Iterator[None]:
    """Turns torch's error into OutOfMemory with the figures and what to change."""
    try:
        yield
    except RuntimeError as error:
        # On a GPU it has a class of its own; for host memory only torch's words tell it from other errors.
        if not isinstance(error, torch.OutOfMemoryError) and _NO_HOST_MEMORY not in str(error):
            raise
        state, lines = state_text(config, shape, degrees, device), advice(config, shape, degrees, device)
        raise OutOfMemory(
            f"out of memory: {_figures(device)}{str(error).splitlines()[0]}; {state}",
            "in this order: " + "; ".join(f"{i}. {line}" for i, line in enumerate(lines, 1)),
            where=str(device),
        ) from error


def _figures(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return (
        f"peak {allocated / GIB:.2f} GiB in tensors, {reserved / GIB:.2f} GiB held by torch, {free / GIB:.2f} of "
        f"{total / GIB:.2f} GiB free; "
    )


def state_bytes(config: Config, degrees: MeshDegrees, device: torch.device) -> int:
    """Bytes per parameter for weight, gradient and two moments, which do not depend on the batch."""
    kept = weights_kept(config, degrees.data * degrees.tensor, precision(config.training, device))
    if kept == "bfloat16":
        return 8
    # Where gradients are summed in float32, bfloat16 ones exist only for a moment.
    sums = kept == "masters" and grad_accum_steps(config.training, degrees.data) > 1
    return 18 if sums else 16


def state_text(config: Config, shape: ModelShape, degrees: MeshDegrees, device: torch.device) -> str:
    if config.training.enable_cpu_offload and device.type == "cuda":
        return "weights, gradients and moments are in host memory"
    each, devices = state_bytes(config, degrees, device), degrees.shard * degrees.tensor
    return (
        f"weights, gradients and moments take {each * parameter_count(shape) / devices / GIB:.2f} GiB of it "
        f"({each} bytes x {parameter_count(shape):,} / {devices} devices)"
    )


def advice(config: Config, shape: ModelShape, degrees: MeshDegrees, device: torch.device) -> list[str]:
    """What to change in this config, in order of what it costs in speed."""
    training, lines = config.training, []
    batch, tokens = training.local_batch_size, training.local_batch_size * training.seq_len
    chunk = min(config.loss.chunk_size or tokens, tokens)
    wide = gradients_are_wide(config, degrees, device)
    # More than two chunks need a float32 sum of the head's gradient. Unless that gradient is float32 anyway, this takes
    # more memory than it saves with fewer tokens.
    worth_it = wide or tokens > 2 * shape.dim
    if config.loss.implementation == "chunked" and chunk > SMALL_CHUNK and worth_it:
        logits = precision(training, device).param.itemsize * chunk * shape.vocab_size / degrees.tensor
        lines.append(f"--loss.chunk_size {SMALL_CHUNK}: the logits of {chunk:,} tokens are {logits / GIB:.2f} GiB")
    if degrees.replicate > 1:
        now, then = degrees.shard * degrees.tensor, degrees.data * degrees.tensor
        over_all = "" if config.parallelism.data_parallel_shard_degree == -1 else _OVER_ALL
        lines.append(
            f"--parallelism.data_parallel_replicate_degree 1{over_all}: state over {then} devices instead of {now}, "
            f"{state_bytes(config, degrees, device) * parameter_count(shape) / then / GIB:.2f} GiB each"
        )
    if config.parallelism.fsdp_reshard_after_forward == "never":
        lines.append("--parallelism.fsdp_reshard_after_forward default: gathered weights are freed after use")
    if wide:
        lines.append("--parallelism.fsdp_wide_gradients False: a block's gradients are bfloat16 until they are reduced")
    if batch > 1:
        keep = sequences_per_step(training, degrees.data)
        fewer = max(each for each in range(1, batch // 2 + 1) if keep // degrees.data % each == 0)
        lines.append(
            f"--training.local_batch_size {fewer} --training.global_batch_size {keep}: activations of "
            f"{fewer * training.seq_len:,} tokens instead of {tokens:,}, the same batch"
        )
    if recomputes := _recomputes_more(config.activation_checkpoint):
        lines.append(f"{recomputes}: less is kept for the backward pass, more is computed twice")
    lines.append(
        f"more devices in data_parallel_shard_degree (now {degrees.shard}) or tensor_parallel_degree (now "
        f"{degrees.tensor})"
    )
    if device.type == "cuda" and not training.enable_cpu_offload:
        lines.append("--training.enable_cpu_offload True: state in host memory, slow")
    if training.seq_len > 1:
        lines.append(f"--training.seq_len {training.seq_len // 2}")
    return lines


def _recomputes_more(now: ActivationCheckpoint) -> str:
    """The option with which less is kept than now; "" where there is none."""
    if now.mode == "memory_budget":
        lower = now.memory_budget / 2 if now.memory_budget > 0.1 else 0
        return f"--activation_checkpoint.memory_budget {lower:g} (now {now.memory_budget:g})" * (now.memory_budget > 0)
    if now.mode == "selective":
        return "" if now.selective_ac_option == "1" else "--activation_checkpoint.mode full (now selective)"
    return "" if now.mode == "full" else f"--activation_checkpoint.mode selective (now {now.mode})"
