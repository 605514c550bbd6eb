"""A step on random tokens before any data is read: too little memory shows now, not after hours of preparing data."""

import logging

import torch

from titan_fast.checkpoint import tensors_of
from titan_fast.config import Config, MeshDegrees, grad_accum_steps
from titan_fast.documents import many
from titan_fast.loader import Batch
from titan_fast.model import Llama
from titan_fast.step import forward_backward

log = logging.getLogger(__name__)


def is_wanted(config: Config, device: torch.device) -> bool:
    """What `training.dry_step` means on this device."""
    wish = config.training.dry_step
    return wish == "always" or (wish == "auto" and device.type == "cuda")


def take(
    model: Llama, optimizer: torch.optim.Optimizer, config: Config, degrees: MeshDegrees, device: torch.device
) -> None:
    """Forward and backward of a full batch (of two where gradients accumulate), with the optimizer's state allocated.
    The loss is scaled by 0 and no step is taken, so the model stays as it was."""
    compiles = ", which compiles all but the optimizer" if config.compile.enable else ""
    log.info("a first step on random tokens, to see that it fits (training.dry_step)%s", compiles)
    training = config.training
    generator = torch.Generator(device=device).manual_seed(0)
    size = (training.local_batch_size, training.seq_len)
    tokens = torch.randint(0, model.shape.vocab_size, size, generator=generator, device=device)
    passes = min(2, grad_accum_steps(training, degrees.data))
    bounds = many(*size, device) if training.document_mask else None
    labels = tokens.clone()  # a graph of one tensor for both would serve no later step
    forward_backward(model, [Batch(tokens, labels, bounds)] * passes, torch.zeros((), device=device))
    tensors_of(model, optimizer)
    optimizer.zero_grad(set_to_none=True)
