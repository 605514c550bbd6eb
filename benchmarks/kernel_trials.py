"""Kernels that may come to replace ours: written, tested and compiled ahead of time, and not yet timed on a GPU.

`benchmarks.kernel_settings` times each in turn with the one it would replace, whose arguments it takes. What wins moves
into `titan_kernels`; what does not goes.
"""

import importlib
from typing import Any

import triton
import triton.language as tl

_loss: Any = importlib.import_module("titan_kernels.cross_entropy")  # the package has a function of this name
_exp, _gradient, _LOWEST = _loss._exp, _loss._gradient, _loss._LOWEST


@triton.jit
def cross_entropy_staged(
    LOGITS, LABELS, LOSS, MAXIMUM, LOG_SUM, SCALE, logits_stride,
    VOCAB: tl.constexpr, IGNORE_INDEX: tl.constexpr, Z_LOSS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As `cross_entropy_with_grad_` launches it, but rows pass through shared memory, to which STAGES - 1 blocks are
    under way at any time, in place of registers, to which a burst is fetched, waited for and worked on. Nothing is
    waited for before the first blocks are asked for: a row that is to be ignored is read in vain."""
    tl.static_assert(GRADIENT)
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * logits_stride
    columns = tl.arange(0, BLOCK)
    group: tl.constexpr = 128 // LOGITS.dtype.element_ty.primitive_bitwidth  # elements that a thread loads at once
    label = tl.load(LABELS + row)
    known = (label >= 0) & (label < VOCAB)
    target = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    scale = tl.load(SCALE)
    maximum = tl.full((BLOCK // group,), _LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK // group,), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
        inside = start + columns < VOCAB
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        x = tl.reshape(x.to(tl.float32), (BLOCK // group, group))
        larger = tl.maximum(maximum, tl.max(x, 1))
        sum_exp = sum_exp * _exp(maximum - larger) + tl.sum(_exp(x - larger[:, None]), 1)
        maximum = larger
    if label == IGNORE_INDEX:
        tl.store(LOSS + row, 0.0)
        tl.store(MAXIMUM + row, 0.0)
        tl.store(LOG_SUM + row, 0.0)
        for start in range(0, VOCAB, BLOCK):
            zeros = tl.zeros((BLOCK,), LOGITS.dtype.element_ty)
            tl.store(logits + start + columns, zeros, mask=start + columns < VOCAB)
    else:
        row_maximum = tl.max(maximum, 0)
        log_sum = tl.log(tl.sum(sum_exp * _exp(maximum - row_maximum), 0))
        logsumexp = row_maximum + log_sum
        loss = (row_maximum - target) + log_sum
        if Z_LOSS != 0.0:
            loss += Z_LOSS * logsumexp * logsumexp
        tl.store(LOSS + row, loss)
        tl.store(MAXIMUM + row, row_maximum)
        tl.store(LOG_SUM + row, log_sum)
        tl.debug_barrier()  # the target is read before any thread overwrites it
        for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
            inside = start + columns < VOCAB
            x = tl.load(logits + start + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            dx = _gradient(x.to(tl.float32), start + columns, label, row_maximum, log_sum, scale, Z_LOSS)
            tl.store(logits + start + columns, dx.to(x.dtype), mask=inside, eviction_policy="evict_first")


@triton.jit
def cross_entropy_ahead(
    LOGITS, LABELS, LOSS, MAXIMUM, LOG_SUM, SCALE, logits_stride,
    VOCAB: tl.constexpr, IGNORE_INDEX: tl.constexpr, Z_LOSS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Likewise, but each BLOCK of a row is fetched to registers before the one before it is worked on. Without, all
    warps of the one block on a multiprocessor wait for memory, then all work: on an H100 at 128,256 columns it issues
    in 42% of its cycles and moves 3% more bytes than it must, in 1.22 times the time of a copy."""
    tl.static_assert(GRADIENT)
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * logits_stride
    columns = tl.arange(0, BLOCK)
    group: tl.constexpr = 128 // LOGITS.dtype.element_ty.primitive_bitwidth  # elements that a thread loads at once
    label = tl.load(LABELS + row)
    x = tl.load(logits + columns, mask=columns < VOCAB, other=-float("inf"), eviction_policy="evict_last")
    known = (label >= 0) & (label < VOCAB)
    target = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    scale = tl.load(SCALE)
    maximum = tl.full((BLOCK // group,), _LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK // group,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        ahead = start + BLOCK + columns
        following = tl.load(logits + ahead, mask=ahead < VOCAB, other=-float("inf"), eviction_policy="evict_last")
        wide = tl.reshape(x.to(tl.float32), (BLOCK // group, group))
        larger = tl.maximum(maximum, tl.max(wide, 1))
        sum_exp = sum_exp * _exp(maximum - larger) + tl.sum(_exp(wide - larger[:, None]), 1)
        maximum = larger
        x = following
    if label == IGNORE_INDEX:
        tl.store(LOSS + row, 0.0)
        tl.store(MAXIMUM + row, 0.0)
        tl.store(LOG_SUM + row, 0.0)
        for start in range(0, VOCAB, BLOCK):
            zeros = tl.zeros((BLOCK,), LOGITS.dtype.element_ty)
            tl.store(logits + start + columns, zeros, mask=start + columns < VOCAB)
    else:
        x = tl.load(logits + columns, mask=columns < VOCAB, other=0.0, eviction_policy="evict_first")
        row_maximum = tl.max(maximum, 0)
        log_sum = tl.log(tl.sum(sum_exp * _exp(maximum - row_maximum), 0))
        logsumexp = row_maximum + log_sum
        loss = (row_maximum - target) + log_sum
        if Z_LOSS != 0.0:
            loss += Z_LOSS * logsumexp * logsumexp
        tl.store(LOSS + row, loss)
        tl.store(MAXIMUM + row, row_maximum)
        tl.store(LOG_SUM + row, log_sum)
        tl.debug_barrier()  # the target is read before any thread overwrites it
        for start in range(0, VOCAB, BLOCK):
            ahead = start + BLOCK + columns
            following = tl.load(logits + ahead, mask=ahead < VOCAB, other=0.0, eviction_policy="evict_first")
            dx = _gradient(x.to(tl.float32), start + columns, label, row_maximum, log_sum, scale, Z_LOSS)
            inside = start + columns < VOCAB
            tl.store(logits + start + columns, dx.to(x.dtype), mask=inside, eviction_policy="evict_first")
            x = following
