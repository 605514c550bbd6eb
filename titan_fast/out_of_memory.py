"""When a device's memory is not enough: what takes how much, and what to change, the cheapest first."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from titan_fast.config import Config, MeshDegrees, grad_accum_steps
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape
from titan_fast.flops import parameter_count

GIB = 1024**3


class OutOfMemory(ConfigError):
    """The model, batch and layout need more memory than the device has."""


@contextmanager
def explained(config: Config, shape: ModelShape, degrees: MeshDegrees, device: torch.device) -> Iterator[None]:
    """Turns torch's error into OutOfMemory with the figures and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"out of memory: {_figures(device)}{str(error).splitlines()[0]}; {state_bytes(shape, degrees)}",
            "in this order: " + "; ".join(f"{i}. {line}" for i, line in enumerate(advice(config, shape, degrees), 1)),
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


def state_bytes(shape: ModelShape, degrees: MeshDegrees) -> str:
    """Weights, gradients and moments of one device, all float32: what no batch size changes."""
    own = 16 * parameter_count(shape) / (degrees.shard * degrees.tensor)
    return (
        f"weights, gradients and moments take {own / GIB:.2f} GiB of it (16 bytes x {parameter_count(shape):,} / "
        f"{degrees.shard * degrees.tensor} devices)"
    )


def advice(config: Config, shape: ModelShape, degrees: MeshDegrees) -> list[str]:
    """What to change for this config, in order of what it costs in speed."""
    training, lines = config.training, []
    batch, tokens = training.local_batch_size, training.local_batch_size * training.seq_len
    if config.loss.chunk_size == 0:
        whole = 4 * tokens * shape.vocab_size / degrees.tensor
        lines.append(f"--loss.chunk_size 2048: the logits of all {tokens:,} tokens are {whole / GIB:.2f} GiB")
    if degrees.replicate > 1:
        own, fewer = degrees.shard * degrees.tensor, degrees.data * degrees.tensor
        lines.append(
            f"--parallelism.data_parallel_replicate_degree 1: state over {fewer} devices instead of {own}, "
            f"{16 * parameter_count(shape) / fewer / GIB:.2f} GiB each"
        )
    if config.parallelism.fsdp_reshard_after_forward == "never":
        lines.append("--parallelism.fsdp_reshard_after_forward default: gathered weights are freed after use")
    if batch > 1:
        keep = training.local_batch_size * degrees.data * grad_accum_steps(training, degrees.data)
        lines.append(
            f"--training.local_batch_size {batch // 2} --training.global_batch_size {keep}: half the activations of "
            f"{tokens:,} tokens, the same batch"
        )
    if config.activation_checkpoint.mode != "full":
        more = "full" if config.activation_checkpoint.mode == "selective" else "selective"
        lines.append(
            f"--activation_checkpoint.mode {more} (now {config.activation_checkpoint.mode}): less is kept for "
            "the backward pass, more is computed twice"
        )
    lines.append(
        f"more devices in data_parallel_shard_degree (now {degrees.shard}) or tensor_parallel_degree (now "
        f"{degrees.tensor})"
    )
    if not training.enable_cpu_offload:
        lines.append("--training.enable_cpu_offload True: state in host memory, slow")
    if training.seq_len > 1:
        lines.append(f"--training.seq_len {training.seq_len // 2}")
    return lines
