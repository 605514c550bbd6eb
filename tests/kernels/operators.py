"""Every operator with small inputs, for the tests that are the same for all."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import titan_kernels
import torch
from titan_kernels import reference
from torch import Tensor

every_size = pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [*product((1, 3, 64), (1, 7, 127, 128, 129, 1000, 4096), (torch.bfloat16, torch.float16, torch.float32))],
)


def with_gaps(x: Tensor) -> Tensor:
    """A copy of x whose rows do not lie side by side; one of fewer than two dimensions as it is."""
    if x.dim() < 2:
        return x
    wide = x.detach().new_zeros(*x.shape[:-1], x.shape[-1] + 16)
    wide[..., : x.shape[-1]] = x.detach()
    return wide[..., : x.shape[-1]].requires_grad_(x.requires_grad)


@dataclass(frozen=True)
class Operator:
    """A differentiable operator: `inputs` are its tensors that get gradients."""

    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[int], tuple[Tensor, ...]]
    """Of the number of rows (tokens), on CPU in float32; the rows are the first dimension that can vary."""


def _cos_sin(seq_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.arange(seq_len, device=like.device)[:, None] * torch.tensor(
        [1.0, 0.1, 0.01, 0.001], device=like.device
    )
    return torch.cos(angle), torch.sin(angle)


def _rope(module: Any) -> Callable[[Tensor], Any]:
    return lambda qkv: module.rope(qkv, *_cos_sin(qkv.shape[1], qkv), 4, 2)


def _cross_entropy(module: Any) -> Callable[[Tensor], Any]:
    return lambda logits: module.cross_entropy(
        logits, torch.arange(logits.shape[0], device=logits.device) % logits.shape[1], ignore_index=2, z_loss=1e-2
    )


def _norm_linear(module: Any) -> Callable[..., Any]:
    return lambda x, residual, weight, a, b: module.norm_linear(x, residual, weight, 1e-5, (a, b))


def _randn(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for shape in shapes)


OPERATORS = [
    Operator(
        "rms_norm",
        lambda x, weight: titan_kernels.rms_norm(x, weight, 1e-5),
        lambda x, weight: reference.rms_norm(x, weight, 1e-5),
        lambda rows: _randn((rows, 2, 32), (32,)),
    ),
    Operator(
        "add_rms_norm",
        lambda x, residual, weight: titan_kernels.add_rms_norm(x, residual, weight, 1e-5),
        lambda x, residual, weight: reference.add_rms_norm(x, residual, weight, 1e-5),
        lambda rows: _randn((rows, 2, 32), (rows, 2, 32), (32,)),
    ),
    Operator("rope", _rope(titan_kernels), _rope(reference), lambda rows: _randn((rows, 5, 64))),
    Operator("swiglu", titan_kernels.swiglu, reference.swiglu, lambda rows: _randn((rows, 2, 48), (rows, 2, 48))),
    Operator(
        "cross_entropy",
        _cross_entropy(titan_kernels),
        _cross_entropy(reference),
        lambda rows: _randn((rows, 48)),
    ),
    Operator(
        "norm_linear",
        _norm_linear(titan_kernels),
        _norm_linear(reference),
        lambda rows: _randn((rows, 2, 32), (rows, 2, 32), (32,), (16, 32), (8, 32)),
    ),
    Operator(
        "swiglu_linear",
        titan_kernels.swiglu_linear,
        reference.swiglu_linear,
        lambda rows: _randn((rows, 2, 48), (rows, 2, 48), (16, 48)),
    ),
]
