"""Kernels that may come to replace ours: written, tested and compiled ahead of time, and not yet timed on a GPU.

`benchmarks.kernel_settings` times each in turn with the one it would replace, whose arguments it takes. What wins moves
into `titan_kernels`; what does not goes.
"""

import importlib
from typing import Any

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST: Any = importlib.import_module("titan_kernels.cross_entropy")._LOWEST  # the package has a function of this name


@triton.jit
def cross_entropy_lean(
    LOGITS, LABELS, LOSS, MAXIMUM, LOG_SUM, SCALE, logits_stride,
    VOCAB: tl.constexpr, IGNORE_INDEX: tl.constexpr, Z_LOSS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `cross_entropy_with_grad_` launches it, in about half of the instructions: 12 an element for 24.

    Powers are of 2, relative to an r in place of the maximum, so that an exponent is one multiply-add and rounds once:

        t = x log2(e) - r,  sum = sum of 2^t,  logsumexp = (r + log2(sum)) / log2(e),  softmax = 2^t / sum

    r is the maximum of x log2(e), as float32 has it; any number near it would do. The gradient at the label's column is
    written for itself when the others are there: nothing is compared for each column. And nothing is waited for before
    the first loads: a row that is to be ignored is read in vain."""
    tl.static_assert(GRADIENT)
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * logits_stride
    columns = tl.arange(0, BLOCK)
    group: tl.constexpr = 128 // LOGITS.dtype.element_ty.primitive_bitwidth  # elements that a thread loads at once
    label = tl.load(LABELS + row)
    known = (label >= 0) & (label < VOCAB)
    target = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    scale = tl.load(SCALE)
    relative_to = tl.full((BLOCK // group,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK // group,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        inside = start + columns < VOCAB
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        x = tl.reshape(x.to(tl.float32), (BLOCK // group, group))
        larger = tl.maximum(relative_to, tl.max(x, 1) * _LOG2E)
        total = total * tl.exp2(relative_to - larger) + tl.sum(tl.exp2(x * _LOG2E - larger[:, None]), 1)
        relative_to = larger
    if label == IGNORE_INDEX:
        tl.store(LOSS + row, 0.0)
        tl.store(MAXIMUM + row, 0.0)
        tl.store(LOG_SUM + row, 0.0)
        for start in range(0, VOCAB, BLOCK):
            zeros = tl.zeros((BLOCK,), LOGITS.dtype.element_ty)
            tl.store(logits + start + columns, zeros, mask=start + columns < VOCAB)
    else:
        r = tl.max(relative_to, 0)
        sum_exp = tl.sum(total * tl.exp2(relative_to - r), 0)
        log_sum = tl.log(sum_exp)
        logsumexp = r / _LOG2E + log_sum
        loss = log_sum - (target * _LOG2E - r) / _LOG2E
        weight = scale / sum_exp
        if Z_LOSS != 0.0:
            loss += Z_LOSS * logsumexp * logsumexp
            weight *= 1 + 2 * Z_LOSS * logsumexp
        tl.store(LOSS + row, loss)
        tl.store(MAXIMUM + row, r / _LOG2E)
        tl.store(LOG_SUM + row, log_sum)
        tl.debug_barrier()  # the target is read before any thread overwrites it
        for start in range(0, VOCAB, BLOCK):
            inside = start + columns < VOCAB
            x = tl.load(logits + start + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            dx = weight * tl.exp2(x.to(tl.float32) * _LOG2E - r)
            tl.store(logits + start + columns, dx.to(x.dtype), mask=inside, eviction_policy="evict_first")
        tl.debug_barrier()  # the thread that wrote there may be another
        at_label = weight * tl.exp2(target * _LOG2E - r) - scale
        tl.store(logits + label, at_label.to(LOGITS.dtype.element_ty), mask=known)
