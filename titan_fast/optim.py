"""AdamW, its parameter groups, the learning rate of each step, and gradient clipping over any mesh."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_fast import config
from titan_fast.masters import OnePassAdamW, gradient_of
from titan_fast.shards import copies, local


def build_optimizer(
    model: nn.Module, settings: config.Optimizer, compiled: Callable[[Any], Any] | None = None
) -> torch.optim.AdamW:
    """AdamW over the model's parameters; norms and the embedding form a group of their own where they do not decay.
    compiled: a compiler that turns the update into one pass over each tensor (`compilation.optimizer_compiler`), or
    None."""
    decays, spared = [], []
    for name, parameter in model.named_parameters():
        spare = "norm.weight" in name or name.endswith("embedding.weight")
        (spared if spare and not settings.decay_norms_and_embeddings else decays).append(parameter)
    groups = [{"params": decays, "weight_decay": settings.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    numbers = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    if compiled is not None or any(hasattr(p, "master") for p in decays):
        return OnePassAdamW(groups, compiled, **numbers)
    fused, foreach = settings.implementation == "fused", settings.implementation == "foreach"
    return torch.optim.AdamW(groups, fused=fused, foreach=foreach, **numbers)


def learning_rate(step: int, settings: config.LrScheduler, peak: float, training_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 1: linear warm-up, a stable part, then decay.

    The warm-up ends with the peak at step `warmup_steps`; the decay ends with `min_lr_factor * peak` at the
    schedule's last step and stays there. "sqrt" is 1 - sqrt(progress) (Hägele et al. 2024, arXiv:2405.18392).
    """
    total = settings.total_steps or training_steps
    warmup = min(settings.warmup_steps, total)
    if step <= warmup:
        return peak * step / warmup
    decay = _decay_steps(settings, total)
    if step <= total - decay or decay == 0:
        return peak
    progress = min((step - (total - decay)) / decay, 1.0)
    left = {
        "linear": 1.0 - progress,
        "sqrt": 1.0 - math.sqrt(progress),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[settings.decay_type]
    return peak * (settings.min_lr_factor + (1.0 - settings.min_lr_factor) * left)


def _decay_steps(settings: config.LrScheduler, total: int) -> int:
    most = total - min(settings.warmup_steps, total)
    return most if settings.decay_ratio is None else min(round(total * settings.decay_ratio), most)


def rate_at(step: int, tables: dict[str, dict[str, Any]]) -> float:
    """`learning_rate` of a config as tables."""
    names = {field.name for field in dataclasses.fields(config.LrScheduler)}
    settings = config.LrScheduler(**{key: value for key, value in tables["lr_scheduler"].items() if key in names})
    return learning_rate(step, settings, tables["optimizer"]["lr"], tables["training"]["steps"])


def describe_schedule(settings: config.LrScheduler, peak: float, training_steps: int) -> str:
    """The schedule in words, or that its warm-up is too long for it."""
    total = settings.total_steps or training_steps
    if settings.warmup_steps >= total:
        every = "all " if total >= training_steps else ""
        return (
            f"rises for {every}{total:,} steps to {peak:.2e}: lr_scheduler.warmup_steps {settings.warmup_steps:,} "
            "leaves none to decay"
        )
    decay = _decay_steps(settings, total)
    parts = [f"{peak:.2e} after {settings.warmup_steps:,} warm-up steps" if settings.warmup_steps else f"{peak:.2e}"]
    if settings.decay_ratio is not None:
        parts.append(f"stable to step {total - decay:,}")
    if decay:
        parts.append(f"{settings.decay_type} to {peak * settings.min_lr_factor:.2e} at step {total:,}")
    return ", ".join(parts)


def clip_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float, loss: Tensor, summed: Tensor | None = None
) -> Tensor:
    """`clip_grad_norm_` for what `optimizer` updates. An optimizer that can scale gradients while it reads them is
    given the factor instead, which spares a pass over all of them."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    if not isinstance(optimizer, OnePassAdamW):
        return clip_grad_norm_(parameters, max_norm, loss, summed)
    norm = global_norm([g for g in map(gradient_of, parameters) if g is not None], loss, summed)
    optimizer.factor = _clip_factor(norm, max_norm) if max_norm else None
    return norm


def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, loss: Tensor, summed: Tensor | None = None
) -> Tensor:
    """Scales the gradients so that their global L2 norm is at most `max_norm` (0: only measures it). Returns the norm
    before that; see `global_norm`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(gradients, loss, summed)
    if max_norm and gradients:
        # With offloading, gradients are in host memory and their norm is not.
        torch._foreach_mul_([local(g) for g in gradients], _clip_factor(norm, max_norm).to(gradients[0].device))
    return norm


def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def global_norm(gradients: list[Tensor], loss: Tensor, summed: Tensor | None = None) -> Tensor:
    """The L2 norm of all gradients over all ranks, 0-dim float32, the same on every rank. The host does not wait.

    This works even where parameters are sharded over different meshes, as with FSDP and tensor parallelism: a gradient
    that several ranks hold counts in part on each of them, and one all-reduce over the world adds everything up. `loss`
    is this rank's; where it is not finite, the norm becomes NaN on every rank. `summed`, 1-dim float32, takes part in
    the same all-reduce and is replaced by its sum over the ranks.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(copies(gradient), []).append(gradient)
    total = loss.float() * 0.0
    # Divided by a Python number for each group: a tensor of them would have to be copied to the device, with a wait.
    for number, group in by_copies.items():
        norms = torch.stack(torch._foreach_norm([local(g) for g in group], 2, torch.float32))
        total = total + (norms.square().sum() / number).to(total.device)
    if dist.is_initialized():
        shared = total[None] if summed is None else torch.cat([total[None], summed])
        dist.all_reduce(shared)
        total = shared[0]
        if summed is not None:
            summed.copy_(shared[1:])
    return total.sqrt()


def step_unless(optimizer: torch.optim.AdamW, bad: Tensor) -> None:
    """One optimizer step, or none at all (neither weights nor moments nor step counts) where `bad`, a 0-dim float32
    tensor, is not zero. The fused implementation decides on the device; the others ask the host, which waits."""
    if optimizer.defaults["fused"]:
        # This is how GradScaler tells a fused optimizer to skip a step. The copy is made here because AdamW would not
        # wait for one to host memory, where offloaded parameters are.
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        optimizer.found_inf = bad.to(device)  # type: ignore[attr-defined]
        optimizer.step()
    elif not bad.item():
        optimizer.step()
