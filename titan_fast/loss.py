"""The head's matrix product and cross entropy in one, a chunk of tokens at a time, so that only a chunk's logits exist.

The gradient is computed in the forward pass already, in place of each chunk's logits (the idea of Liger and of "Cut
your losses", arXiv:2411.09009); the backward pass only scales it. With tensor parallelism each rank holds a slice of
the vocabulary, and the ranks exchange three numbers per token instead of its logits."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from titan_fast.ops import Ops
from titan_fast.wide_products import add_product_, product

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LinearCrossEntropy:
    """`loss(x, weight, labels, scale)`: the sum over tokens of the cross entropy of `x @ weight.T`, times `scale`."""

    ops: Ops
    chunk_size: int = 0
    """Tokens per chunk; 0 takes all at once."""
    z_loss: float = 0.0
    """Weight of logsumexp squared, which is added in training; in evaluation the loss is the cross entropy alone."""
    vocab_group: dist.ProcessGroup | None = None
    """The ranks among which the vocabulary is split; None: not split."""
    vocab_offset: int = 0
    """This rank's first row of the whole weight."""
    port: Tensor | None = field(default=None, compare=False)
    """If given, the weight's gradient goes to this tensor's `grad`, in its dtype; see wide_gradients.py."""

    def __call__(self, x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """x: [..., D], weight: [V, D] (a DTensor's local rows are taken), labels: [...] int64 with IGNORE_INDEX where
        there is none, scale: 0-dim float32 on x's device -> 0-dim float32."""
        if isinstance(weight, DTensor):
            weight = weight.to_local()
        # The autograd function cannot tell: its needs_input_grad is that of the tensors even under no_grad.
        trains = torch.is_grad_enabled()
        return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, self.port, labels.flatten(), scale, self, trains)

    def differentiate_(self, logits: Tensor, labels: Tensor, scale: Tensor, wanted: bool) -> Tensor:
        """The sum of the rows' losses; `logits`, [N, V] of this rank, become their gradient times `scale` if wanted."""
        if self.vocab_group is None and wanted:
            return self.ops.cross_entropy_with_grad_(logits, labels, scale, IGNORE_INDEX, self.z_loss).sum()
        logsumexp, target = self._statistics(logits, labels)
        losses = logsumexp - target
        if wanted:
            if self.z_loss:  # 0 times a square that overflows would be NaN
                losses = losses + self.z_loss * logsumexp.square()
            self.ops.cross_entropy_grad_(logits, labels, self.vocab_offset, logsumexp, scale, IGNORE_INDEX, self.z_loss)
        return torch.where(labels != IGNORE_INDEX, losses, 0.0).sum()

    def _statistics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(logsumexp, target logit) of each row over the whole vocabulary, float32 [N]."""
        peak, total, target = self.ops.cross_entropy_stats(logits, labels, self.vocab_offset)
        if self.vocab_group is not None:
            highest = peak.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, self.vocab_group)
            sums = torch.stack((total * torch.exp(peak - highest), target))
            dist.all_reduce(sums, dist.ReduceOp.SUM, self.vocab_group)
            peak, (total, target) = highest, sums
        return peak + torch.log(total), target


def has_torch_loss() -> bool:
    """Whether this torch has its own linear cross entropy (2.13 has, 2.11 has not)."""
    return hasattr(F, "linear_cross_entropy")


def torch_linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """What `LinearCrossEntropy` computes, by torch.nn.functional.linear_cross_entropy, which chooses its own chunks."""
    if isinstance(weight, DTensor):
        weight = weight.to_local()
    fused, options = F.linear_cross_entropy, nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    # Its own sum would be rounded to x's dtype, for bfloat16 by up to 0.4%.
    losses = fused(
        x.flatten(0, -2), weight, labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX, options=options
    )
    return losses.float().sum() * scale


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        port: Tensor | None,
        labels: Tensor,
        scale: Tensor,
        loss: LinearCrossEntropy,
        trains: bool,
    ) -> Tensor:
        rows = x.shape[0]
        step = loss.chunk_size or max(rows, 1)
        wants_x, wants_weight = (trains and wanted for wanted in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if wants_x else None
        # More than two chunks are summed in float32, since a bfloat16 sum is rounded again with each chunk. With two,
        # that one extra rounding is accepted: float32 would take three times the memory traffic.
        sum_dtype = torch.float32 if rows > 2 * step and weight.dtype != torch.float64 else weight.dtype
        if port is not None:
            sum_dtype = port.dtype
        grad_weight: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, rows, step):
            chunk, chunk_labels = x[start : start + step], labels[start : start + step]
            logits = F.linear(chunk, weight)
            total += loss.differentiate_(logits, chunk_labels, scale, wants_x or wants_weight)
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[start : start + step])
            if wants_weight:
                if grad_weight is None:
                    grad_weight = product(logits.T, chunk, sum_dtype)
                else:
                    add_product_(grad_weight, logits.T, chunk)
            del logits  # or they would live until the next chunk's logits are made
        if wants_weight and grad_weight is None:  # no token at all
            grad_weight = torch.zeros_like(weight, dtype=sum_dtype)
        if grad_x is not None and loss.vocab_group is not None:
            dist.all_reduce(grad_x, dist.ReduceOp.SUM, loss.vocab_group)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.has_port, ctx.weight_dtype = port is not None, weight.dtype if port is None else port.dtype
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        if _is_root_gradient(grad):
            grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
        else:
            grad_x = None if grad_x is None else _times(grad_x, grad)
            if grad_weight is not None and grad_weight.dtype == ctx.weight_dtype:
                grad_weight = _times(grad_weight, grad)
            elif grad_weight is not None:  # scaled and rounded in one pass
                rounded = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
                grad_weight = torch.mul(grad_weight, grad, out=rounded)
        of_weight = (None, grad_weight) if ctx.has_port else (grad_weight, None)
        return grad_x, *of_weight, None, None, None, None


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, by a kernel for lists: that of `*` is not vectorised where a factor is a 0-dim tensor on the
    device."""
    return torch._foreach_mul([x], factor.to(x.dtype))[0]


def root_gradient(loss: Tensor) -> Tensor:
    """1, to be passed to `loss.backward` of a graph that is not kept. It is marked: where the loss's backward pass gets
    this very tensor, it need not multiply, which spares a pass over the head's gradient."""
    gradient = torch.ones_like(loss)
    gradient.is_one = True  # type: ignore[attr-defined]
    return gradient


def _is_root_gradient(gradient: Tensor) -> bool:
    return not torch.compiler.is_compiling() and getattr(gradient, "is_one", False)
