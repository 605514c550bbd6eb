"""A norm or a gated product and the matrix products after it, as one unit of autograd.

    norm_linear:    y = rms_norm(x + residual),  out_i = y @ W_i^T
    swiglu_linear:  h = silu(gate) * up,         out = h @ W^T

A weight's gradient needs y (or h). With separate operators autograd saves it. Here the backward kernel, which has its
factors in registers anyway, writes it again: an extra write instead of an extra tensor kept per layer. At width 4096,
feed-forward width 14336 and 8192 tokens in bfloat16 these are 2 * 67 + 235 MB per layer.

The matrix products are torch's own, and remain visible to the compiler, checkpoint policies and DTensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_kernels.rms_norm import check as check_norm
from titan_kernels.rms_norm import run_add_rms_norm, run_rms_norm
from titan_kernels.rms_norm import run_backward as run_norm_backward
from titan_kernels.rms_norm import run_backward_emit as run_norm_backward_emit
from titan_kernels.swiglu import check as check_swiglu
from titan_kernels.swiglu import run_backward as run_swiglu_backward
from titan_kernels.swiglu import run_backward_emit as run_swiglu_backward_emit
from titan_kernels.swiglu import run_swiglu
from titan_kernels.validation import require_one_device, shape


def _weight_gradient(dout: Tensor, y: Tensor) -> Tensor:
    """dW [out, in] = dout^T @ y over all leading dimensions."""
    return dout.flatten(0, -2).t() @ y.flatten(0, -2)


def _sum_of_products(products: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of dout [..., out] @ W [out, D] over one or more pairs of them."""
    (dout, matrix), *others = products
    total = dout @ matrix
    for dout, matrix in others:
        total = total + dout @ matrix
    return total


class _NormLinear(torch.autograd.Function):
    """x, residual or None, weight, eps, matrices -> the products, and with a residual new_residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        if residual is None:
            y, scale = run_rms_norm(x, weight, eps)
            stream = ()
            ctx.save_for_backward(x, weight, scale, *matrices)
        else:
            y, new_residual, scale = run_add_rms_norm(x, residual, weight, eps)
            stream = (new_residual,)
            ctx.save_for_backward(new_residual, weight, scale, *matrices)
        ctx.added = residual is not None
        ctx.set_materialize_grads(False)
        return *(F.linear(y, matrix) for matrix in matrices), *stream

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, scale, *matrices = ctx.saved_tensors
        dresidual = gradients[len(matrices)] if ctx.added else None
        used = [(i, dout) for i, dout in enumerate(gradients[: len(matrices)]) if dout is not None]
        dmatrices: list[Tensor | None] = [None] * len(matrices)
        if not used:
            return dresidual, dresidual, None, None, *dmatrices
        products = [(dout, matrices[i]) for i, dout in used]
        if any(ctx.needs_input_grad[4:]):
            *others, (last, matrix) = products
            # The kernel adds the last product to the others. They have no names, so they are freed before those below.
            ds, dweight, y = run_norm_backward_emit(
                last @ matrix, _sum_of_products(others) if others else None, dresidual, s, weight, scale
            )
            for i, dout in used:
                dmatrices[i] = _weight_gradient(dout, y) if ctx.needs_input_grad[4 + i] else None
        else:
            ds, dweight = run_norm_backward(_sum_of_products(products), dresidual, s, weight, scale)
        return ds, ds if ctx.added else None, dweight, None, *dmatrices


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, matrix)
        return F.linear(run_swiglu(gate, up), matrix)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, matrix = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return *run_swiglu_backward(dout @ matrix, gate, up), None
        # dout @ matrix has no name, so it is freed before the product below.
        dgate, dup, h = run_swiglu_backward_emit(dout @ matrix, gate, up)
        return dgate, dup, _weight_gradient(dout, h)


def norm_linear(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, linear_weights: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """RMSNorm of x (of x + residual if there is one) times each of `linear_weights`; y is not saved.

    x, residual: [..., D] of one dtype; weight: [D] in that dtype or float32; linear_weights: [out_i, D] in x's dtype.
    -> (out_1 [..., out_1], ..., new_residual [..., D]), in x's dtype; new_residual is x itself without a residual.

    x and residual may be one tensor, as may two of `linear_weights`, but not in torch 2.13's `compile(fullgraph=True)`,
    which refuses an autograd.Function that is given a tensor twice.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or autocast is on.
    """
    check_norm("norm_linear", x, residual, weight)
    if not linear_weights:
        raise ValueError("norm_linear: needs at least one of linear_weights")
    for matrix in linear_weights:
        _check_matrix("norm_linear", x, matrix)
    outputs = _NormLinear.apply(x, residual, weight, eps, *linear_weights)
    return outputs if residual is not None else (*outputs, x)


def swiglu_linear(gate: Tensor, up: Tensor, down_weight: Tensor) -> Tensor:
    """`(silu(gate) * up) @ down_weight^T`; the gated product is not saved.

    A checkpoint around it recomputes the whole unit, including the matrix product, before which recomputation of
    separate operators would stop.

    gate, up: [..., F]; down_weight: [out, F], all of one dtype -> [..., out].

    Raises:
        ValueError: a shape, dtype or device that does not fit, or autocast is on.
    """
    check_swiglu("swiglu_linear", gate, up)
    _check_matrix("swiglu_linear", gate, down_weight)
    return _SwigluLinear.apply(gate, up, down_weight)


def _check_matrix(operator: str, x: Tensor, matrix: Tensor) -> None:
    if x.dim() < 2 or matrix.dim() != 2 or matrix.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{operator}: a matrix of shape {shape(matrix)} does not multiply rows of {shape(x)}; "
            f"needs [out, {x.shape[-1]}]"
        )
    if matrix.dtype != x.dtype:
        raise ValueError(f"{operator}: a matrix of shape {shape(matrix)} is {matrix.dtype}, x is {x.dtype}")
    require_one_device(operator, x, matrix)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{operator}: autocast is on for {x.device.type}, which would multiply in another dtype than the backward "
            "pass; call it within torch.autocast(..., enabled=False)"
        )
