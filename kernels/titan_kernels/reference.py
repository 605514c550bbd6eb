"""Every operator of this package in plain PyTorch: its definition, and what runs when its kernel is off.

Shapes: B batch, S sequence, D model width, H query heads, K key/value heads, G = H / K query heads per group,
E head dimension, F feed-forward width, N rows (any leading dimensions flattened), V vocabulary.

Arithmetic is in float32 (float64 for float64) whatever the input dtype, and is rounded once, at the output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    x: [..., D], weight: [D] -> [..., D] in x's dtype. The multiplication by `weight` is in float32, which is one
    rounding less than in Hugging Face's order.
    """
    wide = _wide(x)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual add and the norm that follows it: `new_residual = x + residual; y = rms_norm(new_residual)`.

    x, residual: [..., D], weight: [D] -> (y, new_residual), both [..., D] in x's dtype. The norm reads the rounded sum,
    so the result equals that of the two steps done separately.
    """
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps), new_residual


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864), half-split as in Hugging Face, on the packed projection.

    qkv: [B, S, K * (G + 2) * E], for each key/value head its G query heads, then its key, then its value.
    cos, sin: [S, E / 2], float32. -> q [B, H, S, E], k [B, K, S, E], v [B, K, S, E] in qkv's dtype: transposed views
    of [B, S, heads, E] memory, which scaled_dot_product_attention reads without a copy.
    """
    batch, seq_len, _ = qkv.shape
    head_dim = 2 * cos.shape[-1]
    group = n_heads // n_kv_heads
    q, k, v = qkv.view(batch, seq_len, n_kv_heads, group + 2, head_dim).split([group, 1, 1], dim=3)
    cos, sin = cos[None, :, None, None, :], sin[None, :, None, None, :]

    def rotate(x: Tensor) -> Tensor:  # [B, S, K, heads, E] -> [B, K * heads, S, E]
        left, right = _wide(x).chunk(2, dim=-1)
        turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        return turned.to(x.dtype).flatten(2, 3).transpose(1, 2)

    # v is copied, because attention keeps it for the backward pass, and a view would keep all of qkv.
    return rotate(q), rotate(k), v.squeeze(3).contiguous().transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020, arXiv:2002.05202). gate, up: [..., F] -> [..., F] in gate's dtype."""
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100, z_loss: float = 0.0) -> Tensor:
    """Cross entropy of each row, 0 where the label is `ignore_index`; `z_loss * logsumexp^2` is added to the others
    (PaLM, arXiv:2204.02311, section 5).

    logits: [N, V], labels: [N] int64 -> [N] float32 (float64 from float64 logits).
    """
    wide = _wide(logits)
    loss = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
    if z_loss:
        valid = labels != ignore_index
        loss = loss + z_loss * torch.where(valid, torch.logsumexp(wide, dim=-1) ** 2, 0.0)
    return loss


def cross_entropy_stats(logits: Tensor, labels: Tensor, vocab_offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of each row over a slice of the vocabulary: (largest logit, sum of exp(logit - largest), the
    label's logit or 0 if the label is not in the slice), [N] float32 each (float64 from float64 logits). Two reductions
    combine slices.

    logits: [N, V_local], the columns vocab_offset .. vocab_offset + V_local of the whole; labels: [N] int64.
    """
    wide = _wide(logits)
    peak = wide.amax(-1)
    total = torch.exp(wide - peak[:, None]).sum(-1)
    column = labels - vocab_offset
    inside = (column >= 0) & (column < logits.shape[-1])
    target = wide.gather(-1, torch.where(inside, column, 0)[:, None]).squeeze(-1)
    return peak, total, torch.where(inside, target, 0.0)


def cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    vocab_offset: int,
    logsumexp: Tensor,
    scale: Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> None:
    """Overwrites a slice of the logits with the gradient of `scale * sum(cross_entropy)`.

    logits, labels, vocab_offset: as in `cross_entropy_stats`; logsumexp: [N] float32 over the whole vocabulary;
    scale: 0-dim float32.
    """
    weight = torch.where(labels != ignore_index, scale, 0.0).to(logsumexp.dtype)
    column = labels - vocab_offset
    inside = (column >= 0) & (column < logits.shape[-1])
    gradient = torch.exp(_wide(logits) - logsumexp[:, None])
    gradient *= (weight * (1.0 + 2.0 * z_loss * logsumexp))[:, None]
    gradient.scatter_add_(-1, torch.where(inside, column, 0)[:, None], -(weight * inside)[:, None])
    logits.copy_(gradient)


@torch.no_grad()
def cross_entropy_with_grad_(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """The losses of `cross_entropy`; overwrites `logits` with d(scale * sum of losses)/dlogits.

    logits: [N, V], not used by anyone else; labels: [N] int64; scale: 0-dim float32 -> [N] float32 (float64 from
    float64 logits). Autograd does not see it: the caller uses the gradient.
    """
    valid = labels != ignore_index
    column = torch.where(valid, labels, 0)[:, None]
    wide = _wide(logits)
    target = wide.gather(-1, column).squeeze(-1)
    logs = F.log_softmax(wide, dim=-1)
    negative_log = -logs.gather(-1, column).squeeze(-1)
    loss = negative_log
    share = weight = torch.where(valid, scale, 0.0).to(wide.dtype)
    if z_loss:
        logsumexp = target + negative_log
        loss = negative_log + z_loss * logsumexp**2
        share = weight * (1.0 + 2.0 * z_loss * logsumexp)
    gradient = logs.exp_()
    gradient *= share[:, None]
    logits.copy_(gradient.scatter_add_(-1, column, -weight[:, None]))
    return torch.where(valid, loss, 0.0)


def norm_linear(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, linear_weights: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """RMSNorm of x (of x + residual if there is one) times each of `linear_weights`.

    x, residual: [..., D]; weight: [D]; linear_weights: [out_i, D]. -> (out_1 [..., out_1], ..., new_residual [..., D]);
    new_residual is x itself without a residual.
    """
    if residual is None:
        y, new_residual = rms_norm(x, weight, eps), x
    else:
        y, new_residual = add_rms_norm(x, residual, weight, eps)
    return *(F.linear(y, matrix) for matrix in linear_weights), new_residual


def swiglu_linear(gate: Tensor, up: Tensor, down_weight: Tensor) -> Tensor:
    """`(silu(gate) * up) @ down_weight^T`. gate, up: [..., F], down_weight: [out, F] -> [..., out]."""
    return F.linear(swiglu(gate, up), down_weight)
