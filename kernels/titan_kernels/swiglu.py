"""SwiGLU's gated product.

    silu(g) = g * sigmoid(g),  h = silu(g) * u
    dg = dh * u * (sigmoid(g) + silu(g) * (1 - sigmoid(g))),  du = dh * silu(g)

Only the inputs are saved. One pass writes both gradients and, for the matrix product that follows, h again.
Contiguous tensors are treated as one long row; others are read row by row, in place.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titan_kernels.dispatch import eager_function, is_plain_eager, unrecorded_dispatch
from titan_kernels.launch import POINTER, Launch, blocks, empty_rows, rows_of
from titan_kernels.sharding import ROWS, no_matrix_product, register_row_sharding
from titan_kernels.validation import require_device, require_dtypes, shape

# ---- launch: 8 elements (16 bytes of bfloat16) per thread and tensor

_BLOCK = 1024


@cache
def _forward_launch(dtype: torch.dtype) -> Launch:
    return Launch(
        name="swiglu_forward",
        kernel=_forward_kernel,
        signature={
            **dict.fromkeys(("GATE", "UP", "H"), POINTER[dtype]),
            **dict.fromkeys(("gate_stride", "up_stride", "width"), "i32"),
        },
        constexprs={"BLOCK": _BLOCK},
        num_warps=4,
        aligned=("GATE", "UP", "H", "gate_stride", "up_stride", "width"),
    )


@cache
def _backward_launch(dtype: torch.dtype, emit: bool) -> Launch:
    return Launch(
        name="swiglu_backward_emit" if emit else "swiglu_backward",
        kernel=_backward_kernel,
        signature={
            **dict.fromkeys(("DH", "GATE", "UP", "DGATE", "DUP", "H"), POINTER[dtype]),
            **dict.fromkeys(("dh_stride", "gate_stride", "up_stride", "width"), "i32"),
        },
        constexprs={"EMIT": emit, "BLOCK": _BLOCK},
        num_warps=4,
        aligned=("DH", "GATE", "UP", "DGATE", "DUP", "H", "dh_stride", "gate_stride", "up_stride", "width"),
    )


def launches(dtype: torch.dtype) -> list[Launch]:
    """Every launch of swiglu and its backward pass; none depends on the width."""
    return [_forward_launch(dtype), _backward_launch(dtype, False), _backward_launch(dtype, True)]


def _lay_out(*tensors: Tensor) -> tuple[list[tuple[Tensor, int]], int, int]:
    """The tensors as rows, each with its stride; the number of rows, and of columns. One row if all are contiguous."""
    size = tensors[0].numel()
    if all(tensor.is_contiguous() for tensor in tensors):
        return [(tensor, size) for tensor in tensors], 1, size
    width = tensors[0].shape[-1]
    return [rows_of(tensor) for tensor in tensors], size // width, width


# ---- forward


@triton.jit
def _forward_kernel(GATE, UP, H, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """One program per BLOCK columns of a row."""
    n_blocks = (width - 1) // BLOCK + 1  # tl.cdiv would add first, and pass 2^31
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    columns = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(GATE + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(H + row * width + columns, h.to(H.dtype.element_ty), mask=inside)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    h = empty_rows(gate)
    if h.numel():
        ((gate, gate_stride), (up, up_stride)), n_rows, width = _lay_out(gate, up)
        grid = (n_rows * blocks(width, _BLOCK),)
        _forward_launch(gate.dtype)(grid, gate, up, h, gate_stride, up_stride, width)
    return h


# ---- backward


@triton.jit
def _backward_kernel(
    DH, GATE, UP, DGATE, DUP, H, dh_stride, gate_stride, up_stride, width, EMIT: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per BLOCK columns of a row."""
    n_blocks = (width - 1) // BLOCK + 1  # tl.cdiv would add first, and pass 2^31
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    columns = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    dh = tl.load(DH + row * dh_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    out = row * width + columns
    dgate = dh * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(DGATE + out, dgate.to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + out, (dh * silu).to(DUP.dtype.element_ty), mask=inside)
    if EMIT:
        tl.store(H + out, (silu * up).to(H.dtype.element_ty), mask=inside)


def _backward(dh: Tensor, gate: Tensor, up: Tensor, emit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, h); h is written only if `emit`."""
    dgate = empty_rows(gate)
    dup = empty_rows(gate)
    h = empty_rows(gate) if emit else dgate
    if dgate.numel():
        ((dh, dh_stride), (gate, gate_stride), (up, up_stride)), n_rows, width = _lay_out(dh, gate, up)
        grid = (n_rows * blocks(width, _BLOCK),)
        _backward_launch(gate.dtype, emit)(grid, dh, gate, up, dgate, dup, h, dh_stride, gate_stride, up_stride, width)
    return dgate, dup, h


def _swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    dgate, dup, _ = _backward(dh, gate, up, emit=False)
    return dgate, dup


def _swiglu_backward_emit(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, h): h again, so that the forward pass need not save it."""
    return _backward(dh, gate, up, emit=True)


# ---- operators

swiglu_op = torch.library.custom_op("titan_kernels::swiglu", _swiglu, mutates_args=())
backward_op = torch.library.custom_op("titan_kernels::swiglu_backward", _swiglu_backward, mutates_args=())
backward_emit_op = torch.library.custom_op(
    "titan_kernels::swiglu_backward_emit", _swiglu_backward_emit, mutates_args=()
)


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@backward_op.register_fake
def _(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@backward_emit_op.register_fake
def _(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.new_empty(gate.shape)


run_swiglu = unrecorded_dispatch(_swiglu, swiglu_op)
run_backward = unrecorded_dispatch(_swiglu_backward, backward_op)
run_backward_emit = unrecorded_dispatch(_swiglu_backward_emit, backward_emit_op)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
    return run_backward(dh, *ctx.saved_tensors)


swiglu_op.register_autograd(_differentiate, setup_context=_save)
_eager_swiglu = eager_function(_swiglu, _save, _differentiate)

_ops = torch.ops.titan_kernels
register_flop_formula([_ops.swiglu, _ops.swiglu_backward, _ops.swiglu_backward_emit])(no_matrix_product)


def _all_dims(x: Tensor, *_: Any) -> int:
    return x.ndim


register_row_sharding(_ops.swiglu.default, (ROWS,), (ROWS, ROWS), _all_dims)
register_row_sharding(_ops.swiglu_backward.default, (ROWS, ROWS), (ROWS, ROWS, ROWS), _all_dims)
register_row_sharding(_ops.swiglu_backward_emit.default, (ROWS, ROWS, ROWS), (ROWS, ROWS, ROWS), _all_dims)


# ---- public functions


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020, arXiv:2002.05202).

    gate, up: [..., F] of one dtype, bfloat16, float16 or float32 -> [..., F] in that dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that differ, or a device without the kernel.
    """
    check("swiglu", gate, up)
    if is_plain_eager(gate, up):
        return _eager_swiglu(gate, up)
    return swiglu_op(gate, up)


def check(operator: str, gate: Tensor, up: Tensor) -> None:
    """Raise ValueError unless `operator` can multiply gate and up."""
    if gate.shape != up.shape:
        raise ValueError(f"{operator}: gate has shape {shape(gate)}, up has {shape(up)}")
    require_dtypes(operator, gate, up)
    require_device(operator, _forward_kernel, gate, up)
