"""The model of a config and the gradient of one step: what a run computes, apart from data, logs and checkpoints."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titan_fast.config import Config, MeshDegrees, grad_accum_steps
from titan_fast.flavors import ModelShape
from titan_fast.loader import Batch
from titan_fast.loss import IGNORE_INDEX, LinearCrossEntropy, root_gradient, torch_linear_cross_entropy
from titan_fast.masters import keep_weights
from titan_fast.model import Llama, init_weights
from titan_fast.ops import Ops, Workload
from titan_fast.parallel import (
    build_mesh,
    finish_gradients,
    free_gathered_weights,
    gradients_are_wide,
    parallelize,
    precision,
    replicate_only_after_last,
    weights_kept,
)


def workload(config: Config, shape: ModelShape, degrees: MeshDegrees) -> Workload:
    """What one device computes in a pass, for the choice of kernels."""
    tokens = config.training.local_batch_size * config.training.seq_len
    gpu = torch.device("cuda")  # only there are kernels chosen by measurement
    return Workload(
        shape,
        tokens,
        degrees.tensor,
        config.loss.chunk_size,
        compiled=config.compile.takes("blocks", "model"),
        loss_compiled=config.compile.takes("loss", "model"),
        dtype=str(precision(config.training, gpu).param).removeprefix("torch."),
        pointwise=config.activation_checkpoint.mode == "pointwise",
        float8=config.float8.recipe_name if config.float8.enable else None,
        wide_gradients=gradients_are_wide(config, degrees, gpu),
        carries_residual=residual_is_carried(config, degrees),
        document_mask=config.training.document_mask,
    )


def residual_is_carried(config: Config, degrees: MeshDegrees) -> bool:
    """`kernels.carry_residual` on a GPU, with None resolved: 0.9% of an H100's step with the 8B, in equal memory."""
    if config.kernels.carry_residual is not None:
        return config.kernels.carry_residual
    compiled = config.compile.takes("blocks", "model")
    unknown = config.float8.enable or degrees.tensor > 1
    return compiled and config.activation_checkpoint.mode == "none" and not unknown


def meta_model(config: Config, shape: ModelShape, ops: Ops) -> Llama:
    """The whole model on the meta device, which takes no memory."""
    loss = torch_linear_cross_entropy
    if config.loss.implementation == "chunked":
        loss = LinearCrossEntropy(ops, config.loss.chunk_size, config.loss.z_loss)
    # Sampled text may be longer than a training sequence; a prompt has at most one token a byte.
    sample = len(config.metrics.sample_prompt.encode()) + 1 + config.metrics.sample_tokens
    with torch.device("meta"):
        return Llama(shape, ops, loss, max_seq_len=max(config.training.seq_len, sample))


def build_model(config: Config, shape: ModelShape, ops: Ops, degrees: MeshDegrees, device: torch.device) -> Llama:
    """The model, parallel and initialised; no process ever holds more of it than its own part."""
    model = meta_model(config, shape, ops)
    dtypes = precision(config.training, device)
    parallelize(model, build_mesh(degrees, device), dtypes, config)
    model.to_empty(device="cpu" if config.training.enable_cpu_offload else device)
    model.tie()
    init_weights(model, config.debug.seed)
    model.cos, model.sin = model.cos.to(device), model.sin.to(device)  # offloading is for parameters only
    kept = weights_kept(config, degrees.data * degrees.tensor, dtypes)
    keep_weights(model, kept, accumulates=grad_accum_steps(config.training, degrees.data) > 1)
    return model


def one_over_valid_tokens(batches: Sequence[Batch], degrees: MeshDegrees) -> Tensor:
    """1 / (tokens with a label in the global batch), 0-dim float32 on the device. Scaled by it, the loss is the mean
    over tokens, even where ranks have different numbers of labels."""
    valid = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in batches]).sum().float()
    dist.all_reduce(valid)
    return degrees.tensor / valid.clamp(min=1.0)


def forward_backward(model: Llama, batches: Sequence[Batch], scale: Tensor) -> Tensor:
    """Leaves the gradient of the global batch in the parameters and returns this rank's part of the loss, 0-dim
    float32. `batches` are the passes of one optimizer step, `scale` is `one_over_valid_tokens` of them."""
    total = torch.zeros_like(scale)
    for i, batch in enumerate(batches):
        replicate_only_after_last(model, is_last=i == len(batches) - 1)
        loss = model(batch.tokens, batch.labels, scale, bounds=batch.bounds)
        loss.backward(root_gradient(loss))
        total += loss.detach()
    finish_gradients(model)
    return total


def summed_loss(loss: Tensor, degrees: MeshDegrees) -> Tensor:
    """The loss of the global batch from each rank's part of it, both 0-dim float32."""
    loss = loss.clone()
    dist.all_reduce(loss)
    return loss / degrees.tensor


@torch.no_grad()
def validation_loss(model: Llama, batches: Iterator[Sequence[Batch]], steps: int, degrees: MeshDegrees) -> float:
    """The mean over the next `steps` global batches of their loss per token."""
    losses = []
    for _ in range(steps):
        passes = next(batches)
        scale = one_over_valid_tokens(passes, degrees)
        losses += [model(batch.tokens, batch.labels, scale, bounds=batch.bounds) for batch in passes]
    free_gathered_weights(model)
    return summed_loss(torch.stack(losses).sum(), degrees).item() / steps
