"""Rotary embedding on the packed projection.

    q'[i] = q[i] * cos - q[i + E/2] * sin,  q'[i + E/2] = q[i + E/2] * cos + q[i] * sin    (k alike; v is only moved)
    backward: the same with -sin

Shapes: B batch, S sequence, H query heads, K key/value heads, G = H / K query heads per group, E head dimension.
qkv [B, S, K * (G + 2) * E] has, for each key/value head, its G query heads, its key and its value. q, k and v each get
their own memory, [B, S, heads, E]: if v remained a view, attention, which saves v, would keep all of qkv alive until
its backward pass. Only the tables are saved.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titan_kernels.dispatch import eager_function, is_plain_eager, unrecorded_dispatch
from titan_kernels.launch import POINTER, Launch, blocks, power_of_two, rows_of
from titan_kernels.sharding import no_matrix_product, register_placements
from titan_kernels.validation import require_device, require_dtypes, shape

# ---- launch: a program rotates a block of tokens of one group, about 8 pairs per thread and head


def _tokens(head_dim: int) -> int:
    """Tokens per program."""
    return max(1, 1024 // power_of_two(head_dim // 2))


@cache
def _launch(group: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, backward: bool) -> Launch:
    names = ("DQ", "DK", "DV", "COS", "SIN", "DQKV") if backward else ("QKV", "COS", "SIN", "Q", "K", "V")
    strides = (
        [f"d{x}_{dim}_stride" for x in "qkv" for dim in ("batch", "head", "token")] if backward else ["qkv_stride"]
    )
    return Launch(
        name="rope_backward" if backward else "rope_forward",
        kernel=_backward_kernel if backward else _forward_kernel,
        signature={
            **{name: "*fp32" if name in ("COS", "SIN") else POINTER[dtype] for name in names},
            **dict.fromkeys((*strides, "seq_len", "n_tokens"), "i32"),
        },
        constexprs={
            "GROUP": group,
            "KV_HEADS": n_kv_heads,
            "HALF": head_dim // 2,
            "BLOCK": power_of_two(head_dim // 2),
            "TOKENS": _tokens(head_dim),
        },
        num_warps=4,
        aligned=(*names, *strides) if head_dim % 16 == 0 else names,
    )


def launches(n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Launch]:
    """Every launch of rope and its backward pass."""
    group = n_heads // n_kv_heads
    return [_launch(group, n_kv_heads, head_dim, dtype, backward) for backward in (False, True)]


# ---- forward


@triton.jit
def _load_tables(COS, SIN, place, half, inside, HALF: tl.constexpr):
    """cos and sin of each token's place in its sequence, float32."""
    entry = place.to(tl.int64) * HALF + half
    return tl.load(COS + entry, mask=inside, other=0.0), tl.load(SIN + entry, mask=inside, other=0.0)


@triton.jit
def _turn(SOURCE, OUT, source, out, cos, sin, inside, HALF: tl.constexpr):
    """Rotate the pairs at offsets `source`, and store them at offsets `out`. A thread owns both halves of its pairs."""
    left = tl.load(SOURCE + source, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(SOURCE + source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + out, (left * cos - right * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT + out + HALF, (right * cos + left * sin).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _move(SOURCE, OUT, source, out, inside, HALF: tl.constexpr):
    """Copy a head unchanged."""
    tl.store(OUT + out, tl.load(SOURCE + source, mask=inside), mask=inside)
    tl.store(OUT + out + HALF, tl.load(SOURCE + source + HALF, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["seq_len", "n_tokens"])
def _forward_kernel(
    QKV, COS, SIN, Q, K, V, qkv_stride, seq_len, n_tokens,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program per TOKENS tokens of one group; neighbouring programs share the tokens, and so the tables."""
    kv_head = tl.program_id(0) % KV_HEADS
    token = (tl.program_id(0) // KV_HEADS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    half = tl.arange(0, BLOCK)[None, :]
    inside = (token < n_tokens) & (half < HALF)
    cos, sin = _load_tables(COS, SIN, token % seq_len, half, inside, HALF)  # pyright: ignore
    source = token * qkv_stride + kv_head * ((GROUP + 2) * 2 * HALF) + half
    q = (token * KV_HEADS + kv_head) * (GROUP * 2 * HALF) + half
    kv = (token * KV_HEADS + kv_head) * (2 * HALF) + half
    for head in tl.static_range(GROUP):
        _turn(QKV, Q, source + head * 2 * HALF, q + head * 2 * HALF, cos, sin, inside, HALF)
    _turn(QKV, K, source + GROUP * 2 * HALF, kv, cos, sin, inside, HALF)
    _move(QKV, V, source + (GROUP + 1) * 2 * HALF, kv, inside, HALF)


def _rope(qkv: Tensor, cos: Tensor, sin: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) [B, heads, S, E]. It takes the group's size and not the number of heads, which differs in a shard."""
    batch, seq_len, n_kv_heads, head_dim = _sizes(qkv, cos, group)
    q, k, v = _empty_heads(qkv, batch, seq_len, n_kv_heads, group, head_dim)
    if qkv.numel():
        rows, stride = rows_of(qkv)
        n_tokens = batch * seq_len
        _launch(group, n_kv_heads, head_dim, qkv.dtype, False)(
            (blocks(n_tokens, _tokens(head_dim)) * n_kv_heads,),
            rows, cos.contiguous(), sin.contiguous(), q, k, v, stride, seq_len, n_tokens,
        )  # fmt: skip
    return q, k, v


def _sizes(qkv: Tensor, cos: Tensor, group: int) -> tuple[int, int, int, int]:
    """(batch, seq_len, n_kv_heads, head_dim). The width is checked again, because here it can be that of a shard."""
    batch, seq_len, width = qkv.shape
    head_dim = 2 * cos.shape[1]
    n_kv_heads = width // ((group + 2) * head_dim)  # no divmod: sizes may be symbolic
    if width % ((group + 2) * head_dim):
        raise ValueError(
            f"rope: qkv of shape {shape(qkv)} does not divide into groups of {group + 2} heads of {head_dim}"
        )
    return batch, seq_len, n_kv_heads, head_dim


def _empty_heads(
    like: Tensor, batch: int, seq_len: int, n_kv_heads: int, group: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, heads, S, E] with the strides of transposed [B, S, heads, E] memory."""
    q, k, v = (
        like.new_empty_strided(
            (batch, heads, seq_len, head_dim), (seq_len * heads * head_dim, head_dim, heads * head_dim, 1)
        )
        for heads in (n_kv_heads * group, n_kv_heads, n_kv_heads)
    )
    return q, k, v


# ---- backward


@triton.jit(do_not_specialize=["seq_len", "n_tokens"])
def _backward_kernel(
    DQ, DK, DV, COS, SIN, DQKV,
    dq_batch_stride, dq_head_stride, dq_token_stride,
    dk_batch_stride, dk_head_stride, dk_token_stride,
    dv_batch_stride, dv_head_stride, dv_token_stride,
    seq_len, n_tokens,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Like the forward kernel, from three gradients, in whatever layout attention returned them, to the packed one."""
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    token = (tl.program_id(0) // KV_HEADS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    half = tl.arange(0, BLOCK)[None, :]
    inside = (token < n_tokens) & (half < HALF)
    # Divided in the type of n_tokens, 32 bits below 2^31 tokens: a division in 64 bits is a function call.
    index = token.to(n_tokens.dtype)
    batch, place = (index // seq_len).to(tl.int64), (index % seq_len).to(tl.int64)
    cos, sin = _load_tables(COS, SIN, place, half, inside, HALF)  # pyright: ignore
    out = (token * KV_HEADS + kv_head) * ((GROUP + 2) * 2 * HALF) + half
    dq = batch * dq_batch_stride + kv_head * GROUP * dq_head_stride + place * dq_token_stride + half
    dk = batch * dk_batch_stride + kv_head * dk_head_stride + place * dk_token_stride + half
    dv = batch * dv_batch_stride + kv_head * dv_head_stride + place * dv_token_stride + half
    for head in tl.static_range(GROUP):
        _turn(DQ, DQKV, dq, out + head * 2 * HALF, cos, -sin, inside, HALF)
        dq += dq_head_stride
    _turn(DK, DQKV, dk, out + GROUP * 2 * HALF, cos, -sin, inside, HALF)
    _move(DV, DQKV, dv, out + (GROUP + 1) * 2 * HALF, inside, HALF)


def _rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dqkv [B, S, K * (G + 2) * E], contiguous, from gradients [B, heads, S, E] of any strides."""
    batch, n_heads, seq_len, head_dim = dq.shape
    n_kv_heads = dk.shape[1]
    group = n_heads // n_kv_heads
    dqkv = dq.new_empty(batch, seq_len, n_kv_heads * (group + 2) * head_dim)
    if dqkv.numel():
        dq, dk, dv = (x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, dv))
        n_tokens = batch * seq_len
        _launch(group, n_kv_heads, head_dim, dq.dtype, True)(
            (blocks(n_tokens, _tokens(head_dim)) * n_kv_heads,),
            dq, dk, dv, cos.contiguous(), sin.contiguous(), dqkv,
            *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], seq_len, n_tokens,
        )  # fmt: skip
    return dqkv


# ---- operators

rope_op = torch.library.custom_op("titan_kernels::rope", _rope, mutates_args=())
backward_op = torch.library.custom_op("titan_kernels::rope_backward", _rope_backward, mutates_args=())


@rope_op.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq_len, n_kv_heads, head_dim = _sizes(qkv, cos, group)
    return _empty_heads(qkv, batch, seq_len, n_kv_heads, group, head_dim)


@backward_op.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, n_heads, seq_len, head_dim = dq.shape
    return dq.new_empty((batch, seq_len, (n_heads + 2 * dk.shape[1]) * head_dim))


_run_backward = unrecorded_dispatch(_rope_backward, backward_op)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None]:
    return _run_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None


rope_op.register_autograd(_differentiate, setup_context=_save)
_eager_rope = eager_function(_rope, _save, _differentiate)

_ops = torch.ops.titan_kernels
register_flop_formula([_ops.rope, _ops.rope_backward])(no_matrix_product)

# Sharded over the batch; over the sequence, with the tables; over the key/value heads, each with its group.
register_placements(
    _ops.rope.default,
    [((0, 0, 0), (0, None, None, None)), ((2, 2, 2), (1, 0, 0, None)), ((1, 1, 1), (2, None, None, None))],
)
register_placements(
    _ops.rope_backward.default, [((0,), (0, 0, 0, None, None)), ((1,), (2, 2, 2, 0, 0)), ((2,), (1, 1, 1, None, None))]
)


# ---- public function


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864), half-split as in Hugging Face, on the packed projection.

    qkv: [B, S, K * (G + 2) * E] bfloat16, float16 or float32: for each key/value head its G query heads, then its key,
    then its value. cos, sin: [S, E / 2] float32. -> q [B, H, S, E], k [B, K, S, E], v [B, K, S, E] in qkv's dtype:
    transposed views of [B, S, heads, E] memory, which scaled_dot_product_attention reads without a copy. The tables
    get no gradient.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check(qkv, cos, sin, n_heads, n_kv_heads)
    group = n_heads // n_kv_heads
    if is_plain_eager(qkv, cos, sin):
        return _eager_rope(qkv, cos, sin, group)
    return rope_op(qkv, cos, sin, group)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int) -> None:
    if n_kv_heads < 1 or n_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"rope: n_heads {n_heads} is not a multiple of n_kv_heads {n_kv_heads} (qkv has shape {shape(qkv)})"
        )
    if qkv.dim() != 3:
        raise ValueError(f"rope: qkv has shape {shape(qkv)}, needs [batch, sequence, width]")
    n_packed = n_heads + 2 * n_kv_heads
    head_dim = qkv.shape[2] // n_packed
    if qkv.shape[2] % n_packed:
        raise ValueError(f"rope: qkv of shape {shape(qkv)} is not {n_heads} + 2 * {n_kv_heads} heads wide")
    if head_dim % 2 or not head_dim:
        raise ValueError(f"rope: qkv of shape {shape(qkv)} has {n_packed} heads of dimension {head_dim}: not even")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (qkv.shape[1], head_dim // 2):
            raise ValueError(
                f"rope: {name} has shape {shape(table)}, qkv of shape {shape(qkv)} with {n_packed} heads needs "
                f"[{qkv.shape[1]}, {head_dim // 2}]"
            )
        if table.dtype != torch.float32:
            raise ValueError(f"rope: {name} of shape {shape(table)} is {table.dtype}; the tables are float32")
    require_dtypes("rope", qkv)
    require_device("rope", _forward_kernel, qkv, cos, sin)
