"""RMSNorm, alone and after the residual add.

    s = x + residual                                  (add_rms_norm; s = x in rms_norm)
    r = 1 / sqrt(mean(s^2) + eps),  y = s * r * w
    ds = r * (w * dy - s * r * mean(w * dy * s * r)) + ds_from_the_residual_stream
    dw = sum over rows of dy * s * r

Shapes: N rows (all leading dimensions), D width. The backward pass reads dy (or two terms of it), s and the residual's
gradient once: one kernel computes ds and float32 partial sums of dw. Each of a fixed number P of programs sums its rows
in order, and a second, small kernel sums the P partials in order. There are no atomics, so equal inputs give equal bits
on one kind of device.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titan_kernels.dispatch import eager_function, is_plain_eager, unrecorded_dispatch
from titan_kernels.launch import MAX_BLOCKS, POINTER, Launch, blocks, empty_rows, power_of_two, rows_of
from titan_kernels.sharding import ROWS, SUM, WHOLE, no_matrix_product, register_row_sharding
from titan_kernels.validation import require_device, require_dtypes, shape

MAX_WIDTH = 65536
_WHOLE_ROW_FORWARD = 16384  # wider rows do not fit the registers of one program
_WHOLE_ROW_BACKWARD = 8192
_PROGRAM_ROWS = 4  # each program of the backward kernel has as many or more
_SUM_COLUMNS = 32

# ---- launch: block width, warps and whatever else depends only on the width


def _forward_blocks(width: int) -> tuple[int, int]:
    """(columns per step, warps): 16 elements per thread if the row is wide enough."""
    block = min(power_of_two(width), _WHOLE_ROW_FORWARD if width <= _WHOLE_ROW_FORWARD else 8192)
    return block, min(max(block // 512, 1), 32)


@cache
def _forward_launch(width: int, dtype: torch.dtype, weight_dtype: torch.dtype, eps: float, add: bool) -> Launch:
    block, warps = _forward_blocks(width)
    pointer = POINTER[dtype]
    return Launch(
        name="add_rms_norm_forward" if add else "rms_norm_forward",
        kernel=_forward_kernel,
        signature={
            **dict.fromkeys(("X", "RESIDUAL"), pointer),
            "WEIGHT": POINTER[weight_dtype],
            **dict.fromkeys(("Y", "NEW_RESIDUAL"), pointer),
            "SCALE": "*fp32",
            **dict.fromkeys(("x_stride", "residual_stride"), "i32"),
        },
        constexprs={"WIDTH": width, "EPS": eps, "ADD": add, "BLOCK": block},
        num_warps=warps,
        bytes_read_twice=(1 + add) * width * dtype.itemsize if width > block else 0,
        aligned=_aligned(width, "X RESIDUAL WEIGHT Y NEW_RESIDUAL SCALE", "x_stride residual_stride"),
    )


def _backward_warps(block: int, dtype: torch.dtype) -> int:
    """8 elements per thread for narrow rows, where 16 spill on sm_100; 16 for rows of 4096 columns or more (in float32
    of more than 4096, where 16 spill on sm_90)."""
    return min(max(block // 512, min(block // 256, 16 if dtype == torch.float32 else 8), 1), 16)


@cache
def _backward_launch(
    width: int, dtype: torch.dtype, weight_dtype: torch.dtype, add: bool, emit: bool, two: bool
) -> Launch:
    """`add`: the residual's gradient is added; `emit`: the normalised output is written again; `two`: the gradient of
    the normalised output is a sum of two."""
    whole = width <= _WHOLE_ROW_BACKWARD
    # An A100's level-2 cache holds four rows of two tensors for each program, but not of three.
    wide_rows, wide_block = (2, 2048 if dtype == torch.float32 else 4096) if two else (4, 2048)
    block = power_of_two(width) if whole else wide_block
    # Chosen so that nothing spills on sm_80, sm_90 and sm_100 at widths that 16 divides (others have narrow loads, and
    # spill from 8191 on): ptxas aims for a number of threads, not for no spills.
    stages = 2 if dtype == torch.float32 or (dtype == torch.float16 and block > 4096) else 3
    wide_warps = 8 if dtype == torch.float32 else 16
    pointer = POINTER[dtype]
    strides = "dy_stride dy2_stride s_stride dresidual_stride"
    return Launch(
        name="rms_norm_backward" + "_add" * add + "_emit" * emit + "_two" * two,
        kernel=_backward_kernel if whole else _backward_wide_kernel,
        signature={
            **dict.fromkeys(("DY", "DY2", "S"), pointer),
            "WEIGHT": POINTER[weight_dtype],
            "SCALE": "*fp32",
            **dict.fromkeys(("DRESIDUAL", "DS", "Y"), pointer),
            "PARTIALS": "*fp32",
            **dict.fromkeys((*strides.split(), "n_rows"), "i32"),
        },
        constexprs={"WIDTH": width, "TWO": two, "ADD": add, "EMIT": emit, "BLOCK": block}
        | ({"STAGES": stages} if whole else {"ROWS": wide_rows}),
        num_warps=_backward_warps(block, dtype) if whole else wide_warps,
        aligned=_aligned(width, "DY DY2 S WEIGHT SCALE DRESIDUAL DS Y PARTIALS", strides),
        bytes_read_twice=0 if whole else wide_rows * (2 + two) * width * dtype.itemsize,  # dy, dy2 and s
        max_resident=MAX_BLOCKS if whole else 1,
    )


@cache
def _sum_launch(width: int, weight_dtype: torch.dtype) -> Launch:
    return Launch(
        name="rms_norm_sum_partials",
        kernel=_sum_partials_kernel,
        signature={"PARTIALS": "*fp32", "DWEIGHT": POINTER[weight_dtype], "n_partials": "i32"},
        constexprs={"WIDTH": width, "ROWS": 64, "COLUMNS": _SUM_COLUMNS},
        num_warps=8,
        aligned=("PARTIALS", "DWEIGHT"),
    )


def _aligned(width: int, pointers: str, strides: str) -> tuple[str, ...]:
    return tuple(pointers.split()) + (tuple(strides.split()) if width % 16 == 0 else ())


def _n_partials(n_rows: int, width: int, device: torch.device) -> int:
    """How many programs run the backward kernel: about as many as a device holds at once (for 3072 and 4096 columns a
    multiprocessor would hold three, and gets two), but no more than one per `_PROGRAM_ROWS` rows.

    A program writes a float32 row of dw that the sum reads: 8 bytes per column, while each of its bfloat16 rows costs
    6, or 8 with a residual. With one row per program that doubles the traffic; with 4 it adds a quarter to a third.
    """
    programs = _multiprocessors(device) * (1 if width > _WHOLE_ROW_BACKWARD else min(8, 8192 // power_of_two(width)))
    return min(blocks(n_rows, _PROGRAM_ROWS), programs)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # for the interpreter: few, so that a program has several rows
    return torch.cuda.get_device_properties(device).multi_processor_count


def launches(
    width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None, eps: float = 1e-5
) -> list[Launch]:
    """Every launch of rms_norm, add_rms_norm and their backward passes at this width."""
    weight_dtype = weight_dtype or dtype
    forward = [_forward_launch(width, dtype, weight_dtype, eps, add) for add in (False, True)]
    backward = [
        _backward_launch(width, dtype, weight_dtype, add, emit, two)
        for emit, two in ((False, False), (True, False), (True, True))
        for add in (False, True)
    ]
    return [*forward, *backward, _sum_launch(width, weight_dtype)]


# ---- forward


@triton.jit
def _load_sum(X, RESIDUAL, columns, inside, ADD: tl.constexpr):
    """In float32: x, or x + residual after rounding to their dtype."""
    x = tl.load(X + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if ADD:
        wide += tl.load(RESIDUAL + columns, mask=inside, other=0.0).to(tl.float32)
        wide = wide.to(X.dtype.element_ty).to(tl.float32)
    return wide


@triton.jit
def _forward_kernel(
    X, RESIDUAL, WEIGHT, Y, NEW_RESIDUAL, SCALE, x_stride, residual_stride,
    WIDTH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row. A row wider than BLOCK is read twice in immediate succession, so that the level-2 cache
    still has it."""
    row = tl.program_id(0).to(tl.int64)
    x = X + row * x_stride
    residual = RESIDUAL + row * residual_stride
    y = Y + row * WIDTH
    new_residual = NEW_RESIDUAL + row * WIDTH
    columns = tl.arange(0, BLOCK)
    if WIDTH <= BLOCK:
        inside = columns < WIDTH
        s = _load_sum(x, residual, columns, inside, ADD)
        weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(s * s, 0) / WIDTH + EPS)
        if ADD:
            tl.store(new_residual + columns, s.to(Y.dtype.element_ty), mask=inside)
        tl.store(y + columns, (s * scale * weight).to(Y.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            s = _load_sum(x, residual, start + columns, start + columns < WIDTH, ADD)
            squares += s * s
        scale = tl.rsqrt(tl.sum(squares, 0) / WIDTH + EPS)
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            s = _load_sum(x, residual, start + columns, inside, ADD)
            weight = tl.load(WEIGHT + start + columns, mask=inside, other=0.0).to(tl.float32)
            if ADD:
                tl.store(new_residual + start + columns, s.to(Y.dtype.element_ty), mask=inside)
            tl.store(y + start + columns, (s * scale * weight).to(Y.dtype.element_ty), mask=inside)
    tl.store(SCALE + row, scale)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, new_residual, scale); without a residual, new_residual is y."""
    width = x.shape[-1]
    y = empty_rows(x)
    new_residual = y if residual is None else empty_rows(x)
    scale = torch.empty(size=x.shape[:-1], dtype=torch.float32, device=x.device)
    if n_rows := scale.numel():
        rows, stride = rows_of(x)
        residual_rows, residual_stride = (rows, stride) if residual is None else rows_of(residual)
        _forward_launch(width, x.dtype, weight.dtype, eps, residual is not None)(
            (n_rows,), rows, residual_rows, weight.contiguous(), y, new_residual, scale, stride, residual_stride
        )
    return y, new_residual, scale


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, scale): scale [...] float32 is 1 / sqrt(mean(x^2) + eps), for the backward pass."""
    y, _, scale = _forward(x, None, weight, eps)
    return y, scale


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, new_residual, scale)."""
    return _forward(x, residual, weight, eps)


# ---- backward


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    DY, DY2, S, WEIGHT, SCALE, DRESIDUAL, DS, Y, PARTIALS, dy_stride, dy2_stride, s_stride, dresidual_stride, n_rows,
    WIDTH: tl.constexpr, TWO: tl.constexpr, ADD: tl.constexpr, EMIT: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program p processes rows p, p + P, ...; weight and the partial sum of dw stay in registers. With 3 STAGES the
    next row is fetched while this one is processed; with 2 Triton has a single buffer, and each row is waited for."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row_index in tl.range(program, n_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.full((), row_index, tl.int64)
        dy = tl.load(DY + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            dy += tl.load(DY2 + row * dy2_stride + columns, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(S + row * s_stride + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(SCALE + row)
        normed *= scale
        dweight += dy * normed
        dnormed = dy * weight
        ds = (dnormed - normed * (tl.sum(dnormed * normed, 0) / WIDTH)) * scale
        if ADD:
            ds += tl.load(DRESIDUAL + row * dresidual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(DS + row * WIDTH + columns, ds.to(DS.dtype.element_ty), mask=inside)
        if EMIT:
            tl.store(Y + row * WIDTH + columns, (normed * weight).to(Y.dtype.element_ty), mask=inside)
    tl.store(PARTIALS + program.to(tl.int64) * WIDTH + columns, dweight, mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_wide_kernel(
    DY, DY2, S, WEIGHT, SCALE, DRESIDUAL, DS, Y, PARTIALS, dy_stride, dy2_stride, s_stride, dresidual_stride, n_rows,
    WIDTH: tl.constexpr, TWO: tl.constexpr, ADD: tl.constexpr, EMIT: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """For rows that do not fit in registers. ROWS rows at a time are read in blocks of columns, first for the mean and
    then for the gradients, the second time from cache if the rows of all programs fit in it: on an H100 in bfloat16 up
    to a width of about 24,000. The program adds to the partial sum of dw, its own row of PARTIALS, once per ROWS rows.
    """
    program = tl.program_id(0)
    partials = PARTIALS + program.to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    for first in range(program * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        scale = tl.load(SCALE + row, mask=row < n_rows, other=0.0)
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = (start + columns)[None, :]
            inside = (row < n_rows) & (column < WIDTH)
            dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
            if TWO:
                dy += tl.load(DY2 + row * dy2_stride + column, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(S + row * s_stride + column, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            products += dy * weight * (s * scale)
        mean = tl.sum(products, 1)[:, None] / WIDTH
        for start in range(0, WIDTH, BLOCK):
            column = (start + columns)[None, :]
            inside = (row < n_rows) & (column < WIDTH)
            dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
            if TWO:
                dy += tl.load(DY2 + row * dy2_stride + column, mask=inside, other=0.0).to(tl.float32)
            normed = tl.load(S + row * s_stride + column, mask=inside, other=0.0).to(tl.float32) * scale
            weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            ds = (dy * weight - normed * mean) * scale
            if ADD:
                ds += tl.load(DRESIDUAL + row * dresidual_stride + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(DS + row * WIDTH + column, ds.to(DS.dtype.element_ty), mask=inside)
            if EMIT:
                tl.store(Y + row * WIDTH + column, (normed * weight).to(Y.dtype.element_ty), mask=inside)
            partial = partials + start + columns
            dweight = tl.sum(dy * normed, 0)
            # Only this program writes it, so for its first rows there is nothing to add to.
            dweight += tl.load(
                partial, mask=tl.where(first != program * ROWS, start + columns < WIDTH, False), other=0.0
            )
            tl.store(partial, dweight, mask=start + columns < WIDTH)


@triton.jit(do_not_specialize=["n_partials"])
def _sum_partials_kernel(PARTIALS, DWEIGHT, n_partials, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dw from its partials [n_partials, WIDTH]: one program per COLUMNS columns."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n_partials, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        inside = (row < n_partials) & (columns[None, :] < WIDTH)
        total += tl.load(PARTIALS + row.to(tl.int64) * WIDTH + columns[None, :], mask=inside, other=0.0)
    tl.store(DWEIGHT + columns, tl.sum(total, 0).to(DWEIGHT.dtype.element_ty), mask=columns < WIDTH)


def _backward(
    dy: Tensor, dy2: Tensor | None, dresidual: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor, emit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(ds, dweight, y) from the gradient dy + dy2 of y; y is written only if `emit`."""
    width = s.shape[-1]
    ds = empty_rows(s)
    y = empty_rows(s) if emit else ds
    n_rows = scale.numel()
    if not n_rows:
        return ds, torch.zeros(width, dtype=weight.dtype, device=s.device), y
    dweight = torch.empty(width, dtype=weight.dtype, device=s.device)
    n_partials = _n_partials(n_rows, width, s.device)
    partials = torch.empty(n_partials, width, dtype=torch.float32, device=s.device)
    dy_rows, dy_stride = rows_of(dy)
    dy2_rows, dy2_stride = (dy_rows, dy_stride) if dy2 is None else rows_of(dy2)
    s_rows, s_stride = rows_of(s)
    dresidual_rows, dresidual_stride = (dy_rows, dy_stride) if dresidual is None else rows_of(dresidual)
    _backward_launch(width, s.dtype, weight.dtype, dresidual is not None, emit, dy2 is not None)(
        (n_partials,), dy_rows, dy2_rows, s_rows, weight.contiguous(), scale, dresidual_rows, ds, y, partials,
        dy_stride, dy2_stride, s_stride, dresidual_stride, n_rows,
    )  # fmt: skip
    _sum_launch(width, weight.dtype)((blocks(width, _SUM_COLUMNS),), partials, dweight, n_partials)
    return ds, dweight, y


def _rms_norm_backward(
    dy: Tensor, dresidual: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(ds, dweight)."""
    ds, dweight, _ = _backward(dy, None, dresidual, s, weight, scale, emit=False)
    return ds, dweight


def _rms_norm_backward_emit(
    dy: Tensor, dy2: Tensor | None, dresidual: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(ds, dweight, y): y again, so that the forward pass need not save it. Its gradient is dy, or dy + dy2, which are
    added in float32 and not rounded."""
    return _backward(dy, dy2, dresidual, s, weight, scale, emit=True)


# ---- operators

rms_norm_op = torch.library.custom_op("titan_kernels::rms_norm", _rms_norm, mutates_args=())
add_rms_norm_op = torch.library.custom_op("titan_kernels::add_rms_norm", _add_rms_norm, mutates_args=())
backward_op = torch.library.custom_op("titan_kernels::rms_norm_backward", _rms_norm_backward, mutates_args=())
backward_emit_op = torch.library.custom_op(
    "titan_kernels::rms_norm_backward_emit", _rms_norm_backward_emit, mutates_args=()
)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@backward_op.register_fake
def _(dy: Tensor, dresidual: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight.shape)


@backward_emit_op.register_fake
def _(
    dy: Tensor, dy2: Tensor | None, dresidual: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight.shape), s.new_empty(s.shape)


# For norm_linear.
run_rms_norm = unrecorded_dispatch(_rms_norm, rms_norm_op)
run_add_rms_norm = unrecorded_dispatch(_add_rms_norm, add_rms_norm_op)
run_backward = unrecorded_dispatch(_rms_norm_backward, backward_op)
run_backward_emit = unrecorded_dispatch(_rms_norm_backward_emit, backward_emit_op)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if dy is None:
        return None, None, None
    return *run_backward(dy, None, *ctx.saved_tensors), None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, new_residual, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(new_residual, inputs[2], scale)


def _differentiate_add(
    ctx: Any, dy: Tensor | None, dresidual: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """x and the residual have the same gradient, and both get the same tensor."""
    if dy is None:
        return dresidual, dresidual, None, None
    ds, dweight = run_backward(dy, dresidual, *ctx.saved_tensors)
    return ds, ds, dweight, None


rms_norm_op.register_autograd(_differentiate, setup_context=_save)
add_rms_norm_op.register_autograd(_differentiate_add, setup_context=_save_add)
_eager_rms_norm = eager_function(_rms_norm, _save, _differentiate)
_eager_add_rms_norm = eager_function(_add_rms_norm, _save_add, _differentiate_add)

_ops = torch.ops.titan_kernels
register_flop_formula([_ops.rms_norm, _ops.add_rms_norm, _ops.rms_norm_backward, _ops.rms_norm_backward_emit])(
    no_matrix_product
)


def _leading_dims(x: Tensor, *_: Any) -> int:
    return x.ndim - 1


_BACKWARD_INPUTS = (ROWS, ROWS, ROWS, WHOLE, ROWS)
register_row_sharding(_ops.rms_norm.default, (ROWS, ROWS), (ROWS, WHOLE, None), _leading_dims)
register_row_sharding(_ops.add_rms_norm.default, (ROWS, ROWS, ROWS), (ROWS, ROWS, WHOLE, None), _leading_dims)
register_row_sharding(_ops.rms_norm_backward.default, (ROWS, SUM), _BACKWARD_INPUTS, _leading_dims)
register_row_sharding(_ops.rms_norm_backward_emit.default, (ROWS, SUM, ROWS), (ROWS, *_BACKWARD_INPUTS), _leading_dims)


# ---- public functions


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    x: [..., D] bfloat16, float16 or float32; weight: [D] in x's dtype or float32 -> [..., D] in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or D over 65,536.
    """
    check("rms_norm", x, None, weight)
    if is_plain_eager(x, weight):
        return _eager_rms_norm(x, weight, eps)[0]
    return rms_norm_op(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual add and the norm that follows it: `new_residual = x + residual; y = rms_norm(new_residual)`.

    x, residual: [..., D] of one dtype; weight: [D] in that dtype or float32 -> (y, new_residual), both [..., D] in x's
    dtype, contiguous. The norm reads the rounded sum. In the backward pass one tensor is the gradient of both x and the
    residual.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or D over 65,536.
    """
    check("add_rms_norm", x, residual, weight)
    if is_plain_eager(x, residual, weight):
        return _eager_add_rms_norm(x, residual, weight, eps)[:2]
    return add_rms_norm_op(x, residual, weight, eps)[:2]


def check(operator: str, x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    """Raise ValueError unless `operator` can normalise x, after adding `residual` if there is one."""
    if x.dim() == 0 or not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{operator}: takes rows of 1 to {MAX_WIDTH} numbers, got shape {shape(x)}")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"{operator}: weight has shape {shape(weight)}, x of shape {shape(x)} needs [{x.shape[-1]}]")
    others = () if residual is None else (residual,)
    for other in others:
        if other.shape != x.shape:
            raise ValueError(f"{operator}: residual has shape {shape(other)}, x has {shape(x)}")
    if weight.dtype == torch.float32:
        require_dtypes(operator, x, *others)
    else:
        require_dtypes(operator, x, weight, *others)
    require_device(operator, _forward_kernel, x, weight, *others)
