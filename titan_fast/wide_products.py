"""Products of bfloat16 matrices in float32, the dtype in which tensor cores sum: written, or added up, without
rounding.

On a GPU they are torch's `mm` and `addmm` with an `out_dtype`. Those do not exist on a CPU, Inductor cannot compile
them for one, and torch 2.11 cannot infer the shape of `addmm`'s result. So they are wrapped in operators of our own,
which run, compile and are counted in the same way everywhere."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import mm_flop, register_flop_formula


@torch.library.custom_op("titan_fast::product", mutates_args=())
def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left [M, K] @ right [K, N] -> [M, N] in `dtype`: float32, or that of both."""
    if left.device.type == "cuda" and dtype != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


@product.register_fake
def _(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)


@torch.library.custom_op("titan_fast::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [M, N] += left [M, K] @ right [K, N]; total is float32, or of their dtype."""
    if left.device.type == "cuda" and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


@add_product_.register_fake
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    return None


def linear(x: Tensor, weight: Tensor, port: Tensor) -> Tensor:
    """x [..., in] and weight [out, in] -> x weight^T [..., out]. The weight's gradient goes to `port` [out, in], in the
    dtype of that."""
    return _Linear.apply(x, weight, port)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, port: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wide = port.dtype
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[2]:
            dw = product(dy.flatten(0, -2).t(), x.flatten(0, -2), ctx.wide)
        return dx, None, dw


@register_flop_formula(torch.ops.titan_fast.product)
def _(left_shape: torch.Size, right_shape: torch.Size, *_: Any, **__: Any) -> int:
    return mm_flop(left_shape, right_shape)


@register_flop_formula(torch.ops.titan_fast.add_product_)
def _(total_shape: torch.Size, left_shape: torch.Size, right_shape: torch.Size, *_: Any, **__: Any) -> int:
    return mm_flop(left_shape, right_shape)
