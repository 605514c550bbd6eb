"""Cross entropy of rows of logits, with their gradient in place.

    logsumexp = max + log(sum of exp(x - max)),  loss = logsumexp - x[label] + z_loss * logsumexp^2
    dx = scale * (exp(x - logsumexp) * (1 + 2 * z_loss * logsumexp) - [column is label])
    both 0 where the label is ignore_index

Shapes: N rows, V vocabulary (or one rank's shard of it, which begins at vocab_offset). A thread keeps one maximum, and
a sum of exponentials relative to it, for each 16 bytes that it loads at once, and merges them at the end of the row.
Otherwise instructions, not bytes, would be the limit: at its copy speed an H100 has time for about 38 per element in
both passes; `cross_entropy_with_grad_` needs 12.

Three ways to use it:
- `cross_entropy`: autograd, out of place, mutates nothing;
- `cross_entropy_with_grad_`: returns losses and overwrites the logits with their gradient. Each row is read twice in
  immediate succession, so the second read hits the level-2 cache if the rows of all resident programs fit in it
  (`titan_kernels.inspect` computes whether they do);
- `cross_entropy_stats` and `cross_entropy_grad_`: the same in two steps, between which ranks that each hold a part of
  the vocabulary reduce the statistics.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titan_kernels.dispatch import eager_function, is_plain_eager, unrecorded_dispatch
from titan_kernels.launch import POINTER, Launch, blocks, empty_rows, power_of_two
from titan_kernels.sharding import no_matrix_product, register_placements
from titan_kernels.validation import require_device, require_dtypes, shape

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's least; with -inf the first rescaling would be inf - inf

# ---- launch

# A row that is read twice should be in cache the second time, and few steps of many columns are fastest: one for a
# vocabulary of 32,000, two for 128,256, with 32 warps. An H100's multiprocessor has room for two and one such blocks:
# 17 and 34 MB are in use at a time, of its cache's 50. In float32 a thread's 64 elements would not fit in registers, so
# it has half the warps: 68 MB, which are read from memory twice.
_LARGE_VOCABULARY = 45_000


def _block(vocab: int) -> tuple[int, int]:
    """(columns per step, warps) if a row is read once: 16 elements per thread, at least 16 bytes a step."""
    block = min(max(power_of_two(vocab), 8), 8192)
    return block, max(block // 512, 1)


def _block_read_twice(vocab: int, dtype: torch.dtype) -> tuple[int, int]:
    """(columns per step, warps) if a row is read twice."""
    if vocab % 16:  # loads are narrow: more than 32 elements per thread would not stay in registers
        block = min(_block(vocab)[0], 4096)
        return block, max(block // 1024, 1)
    if dtype == torch.float32:
        return _block(vocab) if vocab < _LARGE_VOCABULARY else (32768, 16)
    return _block(vocab) if vocab <= 16384 else (min(power_of_two(vocab), 65536), 32)


def _signature(names: str, dtype: torch.dtype) -> dict[str, str]:
    """Triton types by name: logits and their gradient in `dtype`, labels int64, strides integers, the rest float32."""
    special = {"LOGITS": POINTER[dtype], "DLOGITS": POINTER[dtype], "LABELS": "*i64"}
    return {name: special.get(name, "*fp32" if name.isupper() else "i32") for name in names.split()}


def _make(
    name: str, kernel: Any, names: str, vocab: int, dtype: torch.dtype, reads_twice: bool = False, **constexprs: Any
) -> Launch:
    block, warps = _block_read_twice(vocab, dtype) if reads_twice else _block(vocab)
    signature = _signature(names, dtype)
    numbers = ("logits_stride", "dlogits_stride") if vocab % 16 == 0 else ()
    aligned = tuple(name for name in signature if name.isupper() or name in numbers)
    return Launch(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={"VOCAB": vocab, **constexprs, "BLOCK": block},
        num_warps=warps,
        aligned=aligned,
        bytes_read_twice=vocab * dtype.itemsize if reads_twice else 0,
    )


@cache
def _stats_launch(vocab: int, dtype: torch.dtype) -> Launch:
    names = "LOGITS LABELS MAXIMUM SUM_EXP TARGET logits_stride vocab_offset"
    return _make("cross_entropy_stats", _stats_kernel, names, vocab, dtype)


@cache
def _forward_launch(vocab: int, dtype: torch.dtype, ignore_index: int, z_loss: float) -> Launch:
    names = "LOGITS LABELS LOSS MAXIMUM LOG_SUM logits_stride"
    constexprs = {"IGNORE_INDEX": ignore_index, "Z_LOSS": z_loss}
    return _make("cross_entropy_forward", _forward_kernel, names, vocab, dtype, **constexprs)


@cache
def _with_grad_launch(vocab: int, dtype: torch.dtype, ignore_index: int, z_loss: float) -> Launch:
    names = "LOGITS LABELS LOSS SCALE logits_stride"
    constexprs = {"IGNORE_INDEX": ignore_index, "Z_LOSS": z_loss}
    return _make("cross_entropy_with_grad", _with_grad_kernel, names, vocab, dtype, reads_twice=True, **constexprs)


@cache
def _grad_launch(vocab: int, dtype: torch.dtype, ignore_index: int, z_loss: float, autograd: bool) -> Launch:
    names = "LOGITS DLOGITS LABELS MAXIMUM LOG_SUM SCALE logits_stride dlogits_stride vocab_offset"
    name = "cross_entropy_backward" if autograd else "cross_entropy_grad"
    constexprs = {"IGNORE_INDEX": ignore_index, "Z_LOSS": z_loss, "AUTOGRAD": autograd}
    return _make(name, _grad_kernel, names, vocab, dtype, **constexprs)


def launches(vocab: int, dtype: torch.dtype, ignore_index: int = -100, z_loss: float = 0.0) -> list[Launch]:
    """Every launch of the cross entropies over this vocabulary (or this shard of one)."""
    return [
        _forward_launch(vocab, dtype, ignore_index, z_loss),
        _with_grad_launch(vocab, dtype, ignore_index, z_loss),
        *(_grad_launch(vocab, dtype, ignore_index, z_loss, autograd) for autograd in (False, True)),
        _stats_launch(vocab, dtype),
    ]


# ---- statistics and gradient of a row


@triton.jit
def _exp(x):
    """exp by exp2, which is one instruction; tl.exp has three more for results below 2^-126, which are 0 here."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def _row_stats(logits, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """(max, sum of exp(x - max)) of one row."""
    group: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # elements that a thread loads at once
    columns = tl.arange(0, BLOCK)
    maximum = tl.full((BLOCK // group,), _LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK // group,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        inside = start + columns < VOCAB
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf"))
        x = tl.reshape(x.to(tl.float32), (BLOCK // group, group))
        larger = tl.maximum(maximum, tl.max(x, 1))
        sum_exp = sum_exp * _exp(maximum - larger) + tl.sum(_exp(x - larger[:, None]), 1)
        maximum = larger
    row_maximum = tl.max(maximum, 0)
    return row_maximum, tl.sum(sum_exp * _exp(maximum - row_maximum), 0)


@triton.jit
def _gradient(x, columns, target, maximum, log_sum, scale, Z_LOSS: tl.constexpr):
    """d(scale * loss)/dx; `target` is the label's column, or one outside the row. The maximum is subtracted first,
    because log_sum would lose its last bits if added to it."""
    softmax = _exp((x - maximum) - log_sum)  # pyright: ignore
    if Z_LOSS != 0.0:
        softmax *= 1 + 2 * Z_LOSS * (maximum + log_sum)
    return scale * (softmax - (columns == target).to(tl.float32))


@triton.jit
def _powers_of_two(logits, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """(r, sum of 2^(x log2(e) - r)) of one row; r is the maximum of x log2(e) in float32. An exponent is one
    multiply-add, which rounds once; keeping -r instead of r saves the negation. The row is kept in cache, to be read
    again."""
    group: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # elements that a thread loads at once
    columns = tl.arange(0, BLOCK)
    minus_r = tl.full((BLOCK // group,), -_LOWEST, tl.float32)
    total = tl.zeros((BLOCK // group,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        inside = start + columns < VOCAB
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        x = tl.reshape(x.to(tl.float32), (BLOCK // group, group))
        smaller = tl.minimum(minus_r, tl.max(x, 1) * -_LOG2E)
        total = total * tl.exp2(smaller - minus_r) + tl.sum(tl.exp2(tl.fma(x, _LOG2E, smaller[:, None])), 1)
        minus_r = smaller
    minus_row = tl.min(minus_r, 0)
    return -minus_row, tl.sum(total * tl.exp2(minus_row - minus_r), 0)


@triton.jit
def _with_grad_kernel(
    LOGITS, LABELS, LOSS, SCALE, logits_stride,
    VOCAB: tl.constexpr, IGNORE_INDEX: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, whose logits become the gradient of SCALE * loss. To save instructions,

        t = factor x - r,  logsumexp = r / factor + log(sum of 2^t),  softmax = 2^t / sum

    with factor log2(e). Any r near the maximum would do, but beyond 2^30 rounding may move it so far away that powers
    overflow. Numbers of that size are so far apart that only the largest counts, which 2^(x - max) finds as well, so
    there the factor is 1. The gradient is first that of the logsumexp, and then the label's column is corrected, so no
    column is compared with the label. The first loads wait for nothing; an ignored row is read in vain."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * logits_stride
    columns = tl.arange(0, BLOCK)
    label = tl.load(LABELS + row)
    known = (label >= 0) & (label < VOCAB)
    # A label that is no column has no loss: NaN, where torch would stop.
    target = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    scale = tl.load(SCALE)
    r, sum_exp = _powers_of_two(logits, VOCAB, BLOCK)  # pyright: ignore
    factor = tl.full((), _LOG2E, tl.float32)
    if label == IGNORE_INDEX:
        tl.store(LOSS + row, 0.0)
        for start in range(0, VOCAB, BLOCK):
            zeros = tl.zeros((BLOCK,), LOGITS.dtype.element_ty)
            tl.store(logits + start + columns, zeros, mask=start + columns < VOCAB)
    else:
        if not (tl.abs(r) <= 1073741824.0):  # NaN too
            r, sum_exp = _row_stats(logits, VOCAB, BLOCK)  # pyright: ignore
            factor = tl.full((), 1.0, tl.float32)
        log_sum = tl.log(sum_exp)
        logsumexp = r / factor + log_sum
        loss = log_sum - tl.fma(target, factor, -r) / factor
        weight = scale / sum_exp
        if Z_LOSS != 0.0:
            loss += Z_LOSS * logsumexp * logsumexp
            weight *= 1 + 2 * Z_LOSS * logsumexp
        tl.store(LOSS + row, loss)
        tl.debug_barrier()  # the target is read before any thread overwrites it
        for start in range(0, VOCAB, BLOCK):
            inside = start + columns < VOCAB
            x = tl.load(logits + start + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            dx = weight * tl.exp2(tl.fma(x.to(tl.float32), factor, -r))
            tl.store(logits + start + columns, dx.to(x.dtype), mask=inside, eviction_policy="evict_first")
        tl.debug_barrier()  # another thread may have written the label's column
        at_label = weight * tl.exp2(tl.fma(target, factor, -r)) - scale
        tl.store(logits + label, at_label.to(LOGITS.dtype.element_ty), mask=known)


@triton.jit
def _forward_kernel(
    LOGITS, LABELS, LOSS, MAXIMUM, LOG_SUM, logits_stride,
    VOCAB: tl.constexpr, IGNORE_INDEX: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, over the whole vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * logits_stride
    label = tl.load(LABELS + row)
    if label == IGNORE_INDEX:
        tl.store(LOSS + row, 0.0)
        tl.store(MAXIMUM + row, 0.0)
        tl.store(LOG_SUM + row, 0.0)
    else:
        maximum, sum_exp = _row_stats(logits, VOCAB, BLOCK)  # pyright: ignore
        log_sum = tl.log(sum_exp)
        logsumexp = maximum + log_sum
        known = (label >= 0) & (label < VOCAB)
        # A label that is no column has no loss: NaN, where torch would stop.
        target = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
        loss = (maximum - target) + log_sum
        if Z_LOSS != 0.0:
            loss += Z_LOSS * logsumexp * logsumexp
        tl.store(LOSS + row, loss)
        tl.store(MAXIMUM + row, maximum)
        tl.store(LOG_SUM + row, log_sum)


@triton.jit(do_not_specialize=["vocab_offset"])
def _stats_kernel(
    LOGITS, LABELS, MAXIMUM, SUM_EXP, TARGET, logits_stride, vocab_offset, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row of a shard of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * logits_stride
    maximum, sum_exp = _row_stats(logits, VOCAB, BLOCK)  # pyright: ignore
    column = tl.load(LABELS + row) - vocab_offset
    target = tl.load(logits + column, mask=(column >= 0) & (column < VOCAB), other=0.0).to(tl.float32)
    tl.store(MAXIMUM + row, maximum)
    tl.store(SUM_EXP + row, sum_exp)
    tl.store(TARGET + row, target)


@triton.jit(do_not_specialize=["vocab_offset"])
def _grad_kernel(
    LOGITS, DLOGITS, LABELS, MAXIMUM, LOG_SUM, SCALE, logits_stride, dlogits_stride, vocab_offset,
    VOCAB: tl.constexpr, IGNORE_INDEX: tl.constexpr, Z_LOSS: tl.constexpr, AUTOGRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK columns of a row. DLOGITS may be LOGITS. With AUTOGRAD every row has its own SCALE, and
    logsumexp is MAXIMUM + LOG_SUM; otherwise SCALE is one number and LOG_SUM the whole logsumexp."""
    n_blocks = tl.cdiv(VOCAB, BLOCK)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    columns = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCAB
    label = tl.load(LABELS + row)
    valid = label != IGNORE_INDEX
    wanted = tl.where(valid, inside, False)  # triton 3.9's interpreter cannot & a loaded scalar
    x = tl.load(LOGITS + row * logits_stride + columns, mask=wanted, other=0.0).to(tl.float32)
    log_sum = tl.load(LOG_SUM + row)
    maximum = tl.load(MAXIMUM + row) if AUTOGRAD else 0.0
    scale = tl.load(SCALE + row if AUTOGRAD else SCALE)
    dx = tl.where(valid, _gradient(x, columns, label - vocab_offset, maximum, log_sum, scale, Z_LOSS), 0.0)
    tl.store(DLOGITS + row * dlogits_stride + columns, dx.to(DLOGITS.dtype.element_ty), mask=inside)


# ---- forward


def _vector(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)


def _rows(logits: Tensor) -> Tensor:
    """logits with adjacent columns: themselves, or a copy."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, max, log of the sum of exp(x - max)), each [N] float32."""
    loss, maximum, log_sum = _vector(logits), _vector(logits), _vector(logits)
    if n_rows := loss.numel():
        logits = _rows(logits)
        _forward_launch(logits.shape[1], logits.dtype, ignore_index, z_loss)(
            (n_rows,), logits, labels.contiguous(), loss, maximum, log_sum, logits.stride(0)
        )
    return loss, maximum, log_sum


def _cross_entropy_with_grad_(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    loss = _vector(logits)
    if n_rows := loss.numel():
        _with_grad_launch(logits.shape[1], logits.dtype, ignore_index, z_loss)(
            (n_rows,), logits, labels.contiguous(), loss, scale, logits.stride(0)
        )
    return loss


def _cross_entropy_stats(logits: Tensor, labels: Tensor, vocab_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    maximum, sum_exp, target = _vector(logits), _vector(logits), _vector(logits)
    if maximum.numel():
        logits = _rows(logits)
        _stats_launch(logits.shape[1], logits.dtype)(
            (logits.shape[0],), logits, labels.contiguous(), maximum, sum_exp, target, logits.stride(0), vocab_offset
        )
    return maximum, sum_exp, target


# ---- backward


def _gradient_into(
    dlogits: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor | None, log_sum: Tensor, scale: Tensor,
    vocab_offset: int, ignore_index: int, z_loss: float,
) -> None:  # fmt: skip
    """With a maximum for each row, so is scale, and log_sum is relative to the maximum."""
    n_rows, vocab = logits.shape
    if n_rows:
        log_sum = log_sum.contiguous()
        _grad_launch(vocab, logits.dtype, ignore_index, z_loss, maximum is not None)(
            (n_rows * blocks(vocab, _block(vocab)[0]),),
            logits, dlogits, labels.contiguous(), log_sum if maximum is None else maximum, log_sum, scale.contiguous(),
            logits.stride(0), dlogits.stride(0), vocab_offset,
        )  # fmt: skip


def _cross_entropy_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, log_sum: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    dlogits = empty_rows(logits)
    _gradient_into(dlogits, _rows(logits), labels, maximum, log_sum, dloss, 0, ignore_index, z_loss)
    return dlogits


def _cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    vocab_offset: int,
    logsumexp: Tensor,
    scale: Tensor,
    ignore_index: int,
    z_loss: float,
) -> None:
    _gradient_into(logits, logits, labels, None, logsumexp, scale, vocab_offset, ignore_index, z_loss)


# ---- operators

cross_entropy_op = torch.library.custom_op("titan_kernels::cross_entropy", _cross_entropy, mutates_args=())
backward_op = torch.library.custom_op("titan_kernels::cross_entropy_backward", _cross_entropy_backward, mutates_args=())
with_grad_op = torch.library.custom_op(
    "titan_kernels::cross_entropy_with_grad_", _cross_entropy_with_grad_, mutates_args=("logits",)
)
stats_op = torch.library.custom_op("titan_kernels::cross_entropy_stats", _cross_entropy_stats, mutates_args=())
grad_op = torch.library.custom_op("titan_kernels::cross_entropy_grad_", _cross_entropy_grad_, mutates_args=("logits",))


def _fake_vector(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@cross_entropy_op.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_vector(logits), _fake_vector(logits), _fake_vector(logits)


@backward_op.register_fake
def _(
    dloss: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, log_sum: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    return logits.new_empty(logits.shape)


@with_grad_op.register_fake
def _(logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, z_loss: float) -> Tensor:
    return _fake_vector(logits)


@stats_op.register_fake
def _(logits: Tensor, labels: Tensor, vocab_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_vector(logits), _fake_vector(logits), _fake_vector(logits)


@grad_op.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    vocab_offset: int,
    logsumexp: Tensor,
    scale: Tensor,
    ignore_index: int,
    z_loss: float,
) -> None:
    return None


_run_backward = unrecorded_dispatch(_cross_entropy_backward, backward_op)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, ctx.ignore_index, ctx.z_loss = inputs
    _, maximum, log_sum = output
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.save_for_backward(logits, labels, maximum, log_sum)


def _differentiate(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
    return _run_backward(dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.z_loss), None, None, None


cross_entropy_op.register_autograd(_differentiate, setup_context=_save)
_eager_cross_entropy = eager_function(_cross_entropy, _save, _differentiate)

_ops = torch.ops.titan_kernels
register_flop_formula(
    [
        _ops.cross_entropy,
        _ops.cross_entropy_backward,
        _ops.cross_entropy_with_grad_,
        _ops.cross_entropy_stats,
        _ops.cross_entropy_grad_,
    ]
)(no_matrix_product)

# Sharded over the rows. The two operators that mutate are for chunks of logits, which are plain tensors.
register_placements(_ops.cross_entropy.default, [((0, 0, 0), (0, 0, None, None))])
register_placements(_ops.cross_entropy_backward.default, [((0,), (0, 0, 0, 0, 0, None, None))])
register_placements(_ops.cross_entropy_stats.default, [((0, 0, 0), (0, 0, None))])


# ---- public functions


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100, z_loss: float = 0.0) -> Tensor:
    """Cross entropy of each row, 0 where the label is `ignore_index`; `z_loss * logsumexp^2` is added to the others
    (PaLM, arXiv:2204.02311, section 5).

    logits: [N, V] bfloat16, float16 or float32; labels: [N] int64 -> [N] float32. A label that is neither a column nor
    `ignore_index` gives NaN.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check("cross_entropy", logits, labels)
    if is_plain_eager(logits, labels):
        return _eager_cross_entropy(logits, labels, ignore_index, z_loss)[0]
    return cross_entropy_op(logits, labels, ignore_index, z_loss)[0]


def cross_entropy_with_grad_(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """The losses of `cross_entropy`; overwrites `logits` with d(scale * sum of losses)/dlogits.

    logits: [N, V] with adjacent columns, not used by anyone else; labels: [N] int64; scale: 0-dim float32 on the same
    device -> [N] float32. Autograd does not see it: the caller uses the gradient.

    Raises:
        ValueError: a shape, dtype or device that does not fit, columns that are not adjacent, or rows that overlap.
    """
    _check("cross_entropy_with_grad_", logits, labels)
    _check_in_place("cross_entropy_with_grad_", logits, scale)
    if is_plain_eager(logits, labels, scale):
        torch.autograd.graph.increment_version(logits)
        return _cross_entropy_with_grad_(logits, labels, scale, ignore_index, z_loss)
    return with_grad_op(logits, labels, scale, ignore_index, z_loss)


def cross_entropy_stats(logits: Tensor, labels: Tensor, vocab_offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of each row on a rank that holds columns vocab_offset, vocab_offset + 1, ... of the logits.

    logits: [N, V_shard], labels: [N] int64 -> (max, sum of exp(x - max), logit of the label), each [N] float32; the
    last is 0 if the label is not in the shard, so that the sum over ranks is the logit. Over ranks, with M the greatest
    max: logsumexp = M + log(sum of sum_exp * exp(max - M)), loss = logsumexp - target. Autograd does not see it.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check("cross_entropy_stats", logits, labels)
    if is_plain_eager(logits, labels):
        return _cross_entropy_stats(logits, labels, vocab_offset)
    return stats_op(logits, labels, vocab_offset)


def cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    vocab_offset: int,
    logsumexp: Tensor,
    scale: Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> None:
    """Overwrite a rank's `logits` with d(scale * sum of losses)/dlogits, given the logsumexp over all ranks.

    logits: [N, V_shard] with adjacent columns; labels: [N] int64; logsumexp: [N] float32; scale: 0-dim float32.

    Raises:
        ValueError: a shape, dtype or device that does not fit, columns that are not adjacent, or rows that overlap.
    """
    _check("cross_entropy_grad_", logits, labels)
    _check_in_place("cross_entropy_grad_", logits, scale, logsumexp)
    if is_plain_eager(logits, labels, logsumexp, scale):
        torch.autograd.graph.increment_version(logits)
        _cross_entropy_grad_(logits, labels, vocab_offset, logsumexp, scale, ignore_index, z_loss)
    else:
        grad_op(logits, labels, vocab_offset, logsumexp, scale, ignore_index, z_loss)


def _check(operator: str, logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{operator}: logits have shape {shape(logits)}, need [rows, vocabulary]")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"{operator}: labels have shape {shape(labels)}, logits {shape(logits)}: one label per row")
    if labels.dtype != torch.int64:
        raise ValueError(f"{operator}: labels of shape {shape(labels)} are {labels.dtype}, not torch.int64")
    require_dtypes(operator, logits)
    require_device(operator, _forward_kernel, logits, labels)


def _check_in_place(operator: str, logits: Tensor, scale: Tensor, logsumexp: Tensor | None = None) -> None:
    if torch.is_grad_enabled() and logits.requires_grad:
        raise ValueError(f"{operator}: logits of shape {shape(logits)} require a gradient and would be overwritten")
    if logits.stride(1) != 1:
        raise ValueError(
            f"{operator}: logits of shape {shape(logits)} have strides {logits.stride()}, not adjacent columns"
        )
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"{operator}: logits of shape {shape(logits)} have strides {logits.stride()}: rows that overlap cannot "
            "each become a gradient"
        )
    if scale.dtype != torch.float32 or scale.dim() != 0:
        raise ValueError(f"{operator}: scale of shape {shape(scale)} is {scale.dtype}; needs one number in float32")
    if logsumexp is not None and (logsumexp.shape != logits.shape[:1] or logsumexp.dtype != torch.float32):
        raise ValueError(
            f"{operator}: logsumexp of shape {shape(logsumexp)} is {logsumexp.dtype}; "
            f"logits of shape {shape(logits)} need [{logits.shape[0]}] float32"
        )
    require_device(operator, _forward_kernel, logits, scale, *(() if logsumexp is None else (logsumexp,)))
