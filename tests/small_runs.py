"""Short training runs on random tokens, which are the same in every layout."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_fast.config import Config, from_options, grad_accum_steps, mesh_degrees
from titan_fast.distributed import World
from titan_fast.documents import Separators, any_number_of
from titan_fast.flavors import ModelShape
from titan_fast.loader import Batch
from titan_fast.loss import IGNORE_INDEX
from titan_fast.model import Llama
from titan_fast.ops import build_ops
from titan_fast.optim import build_optimizer, clip_grad_norm_, step_unless
from titan_fast.step import build_model, forward_backward, one_over_valid_tokens, summed_loss, workload

SEQ_LEN, GLOBAL_BATCH = 16, 8


@dataclass(frozen=True)
class Trace:
    """The course of a run: loss and norm of every step, and on rank 0 the whole weights (first, last) and the last
    clipped gradients."""

    losses: list[float]
    norms: list[float]
    first: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    clipped: dict[str, Tensor] = field(default_factory=dict)


def config_of(options: dict[str, Any], world_size: int = 1, passes: int = 1) -> Config:
    """A config for short runs of `passes` forward passes a step; `options` are "table.key": value."""
    basic = {"training.seq_len": SEQ_LEN, "training.global_batch_size": GLOBAL_BATCH,
             "optimizer.lr": 1e-3, "metrics.sample_prompt": "", "loss.chunk_size": 16} | options  # fmt: skip

    def parsed(local_batch_size: int) -> Config:
        settings = {"training.local_batch_size": local_batch_size} | basic
        return from_options({key: [str(value)] for key, value in settings.items()})

    degrees = mesh_degrees(parsed(GLOBAL_BATCH).parallelism, world_size)
    return parsed(GLOBAL_BATCH // degrees.data // passes)


def global_batch(step: int, vocab_size: int) -> Batch:
    """Random tokens of one step; rows differ in how many labels they have, from a whole row to a single token."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, vocab_size, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    labels = text[:, 1:].clone()
    for row in range(GLOBAL_BATCH):
        labels[row, : (row * (SEQ_LEN - 1)) // (GLOBAL_BATCH - 1)] = IGNORE_INDEX
    return Batch(text[:, :-1], labels)


def own_batches(config: Config, world: World, step: int, vocab_size: int) -> list[Batch]:
    """This rank's passes of one step."""
    degrees = mesh_degrees(config.parallelism, world.size)
    whole, dp_rank = global_batch(step, vocab_size), world.rank // degrees.tensor
    passes, size = grad_accum_steps(config.training, degrees.data), config.training.local_batch_size
    first = dp_rank * passes * size
    parts = [slice(at, at + size) for at in range(first, first + passes * size, size)]
    masks = config.training.document_mask
    return [
        Batch(whole.tokens[part], whole.labels[part], bounds_of(whole.tokens[part]) if masks else None)
        for part in parts
    ]


def bounds_of(tokens: Tensor) -> Tensor:
    """Every eighth token id, on average, ends a document."""
    return any_number_of(torch.from_numpy(Separators(None, 0).bounds(tokens.numpy() % 8)))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def named_whole(model: Llama, gradients: bool = False) -> dict[str, Tensor]:
    found = {name: p.grad if gradients else p for name, p in model.named_parameters()}
    return {name: whole(tensor) for name, tensor in found.items() if tensor is not None}


def build(config: Config, shape: ModelShape, world: World) -> Llama:
    degrees = mesh_degrees(config.parallelism, world.size)
    ops = build_ops(config.kernels, world.device, workload(config, shape, degrees))
    return build_model(config, shape, ops, degrees, world.device)


def train(world: World, shape: ModelShape, options: dict[str, Any], passes: int = 1, steps: int = 20) -> Trace:
    """`steps` optimizer steps, as in the training loop."""
    config = config_of(options, world.size, passes)
    degrees = mesh_degrees(config.parallelism, world.size)
    model = build(config, shape, world)
    optimizer = build_optimizer(model, config.optimizer)
    trace = Trace([], [])
    trace.first.update(named_whole(model))
    for step in range(steps):
        batches = own_batches(config, world, step, shape.vocab_size)
        loss = forward_backward(model, batches, one_over_valid_tokens(batches, degrees))
        norm = clip_grad_norm_(model.parameters(), config.training.max_norm, loss)
        if step == steps - 1:
            trace.clipped.update(named_whole(model, gradients=True))
        step_unless(optimizer, torch.zeros(()))
        optimizer.zero_grad(set_to_none=True)
        trace.losses.append(summed_loss(loss, degrees).item())
        trace.norms.append(norm.item())
    trace.last.update(named_whole(model))
    return trace
