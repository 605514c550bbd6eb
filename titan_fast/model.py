"""Llama 2 and 3 in plain PyTorch: no parallelism, no compile, no choice of kernel (those come in through `ops`).

Shapes: B batch, S sequence, D model width, H query heads, K key/value heads, E head dimension, F feed-forward width,
V vocabulary. With tensor parallelism H, K and F are what this device holds, so they are taken from the tensors' shapes.
"""

import hashlib
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_fast.flavors import ModelShape
from titan_fast.ops import REFERENCE, Ops
from titan_fast.shards import copy_shard

# What the head calls when it is given labels: (x, weight, labels, scale) -> loss; see loss.py.
LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
RopeTables = tuple[Tensor, Tensor]


def rope_tables(shape: ModelShape, seq_len: int, device: torch.device | str | None = None) -> RopeTables:
    """cos and sin of every position's angles, [seq_len, E / 2] float32 each.

    Frequencies are Su et al.'s theta^(-2i/E); Llama 3.1 keeps the short wavelengths, divides the long ones by `factor`
    and blends between (meta-llama/llama-models, `apply_scaling`).
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    if (scaling := shape.rope_scaling) is not None:
        turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # full turns over the original context
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        frequencies = frequencies * keep + frequencies / scaling.factor * (1.0 - keep)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


class KVCache:
    """Keys and values of the T positions seen so far, for one attention layer: [B, K, T, E] each."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [B, K, S, E] of new tokens -> those of all tokens so far."""
        if self.keys is not None and self.values is not None:
            k, v = torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
        self.keys, self.values = k, v
        return k, v


class Norm(nn.Module):
    """RMSNorm, together with the residual add before it where there is one: as one operator they pass over memory
    once."""

    def __init__(self, dim: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual: [B, S, D] -> (normalised, new residual), where the new residual is x (+ residual)."""
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class Linear(nn.Linear):
    """A matrix of a block, without a bias. `ops` decides in which precision it is multiplied."""

    def __init__(self, n_in: int, n_out: int, ops: Ops) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight)


class Attention(nn.Module):
    """Causal grouped-query attention.

    q, k and v are one matrix. Its rows are grouped by key/value head: that head's queries, its key, its value. So
    cutting the rows into equal parts gives each device whole groups."""

    def __init__(self, shape: ModelShape, ops: Ops) -> None:
        super().__init__()
        self.head_dim, self.group, self.ops = shape.head_dim, shape.n_heads // shape.n_kv_heads, ops
        self.qkv = Linear(shape.dim, shape.qkv_dim, ops)
        self.out = Linear(shape.dim, shape.dim, ops)

    def forward(
        self, x: Tensor, rope: RopeTables, cache: KVCache | None = None, bounds: Tensor | None = None
    ) -> Tensor:
        """x: [B, S, D] -> [B, S, D]."""
        return self.attend(self.qkv(x), rope, cache, bounds)

    def attend(
        self, qkv: Tensor, rope: RopeTables, cache: KVCache | None = None, bounds: Tensor | None = None
    ) -> Tensor:
        """qkv: [B, S, (H + 2 K) E] -> [B, S, D]."""
        n_kv_heads = qkv.shape[-1] // ((self.group + 2) * self.head_dim)
        q, k, v = self.ops.rope(qkv, *rope, n_kv_heads * self.group, n_kv_heads)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = self.ops.attention(q, k, v, bounds)  # [B, H, S, E]
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU. Gate and up stay two matrices: if they were packed, the compiler could not fuse their product into the
    backward pass."""

    def __init__(self, shape: ModelShape, ops: Ops) -> None:
        super().__init__()
        self.gate = Linear(shape.dim, shape.ffn_dim, ops)
        self.up = Linear(shape.dim, shape.ffn_dim, ops)
        self.down = Linear(shape.ffn_dim, shape.dim, ops)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, D] -> [B, S, D]."""
        return self.down(self.ops.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, shape: ModelShape, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = Norm(shape.dim, shape.norm_eps, ops)
        self.attention = Attention(shape, ops)
        self.feed_forward_norm = Norm(shape.dim, shape.norm_eps, ops)
        self.feed_forward = FeedForward(shape, ops)
        self.carry_residual, self.ops = ops.carry_residual, ops

    def _forward_in_units(
        self,
        norm_linear: Callable[..., tuple[Tensor, ...]],
        swiglu_linear: Callable[[Tensor, Tensor, Tensor], Tensor],
        x: Tensor,
        residual: Tensor | None,
        rope: RopeTables,
        cache: KVCache | None,
        bounds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The same arithmetic, but each norm and the SwiGLU product form a unit with the matrices after it, which saves
        less for the backward pass."""
        norm, attention = self.attention_norm, self.attention
        qkv, stream = norm_linear(x, residual, norm.weight, norm.eps, (attention.qkv.weight,))
        x = attention.attend(qkv, rope, cache, bounds)
        norm, feed_forward = self.feed_forward_norm, self.feed_forward
        matrices = (feed_forward.gate.weight, feed_forward.up.weight)
        gate, up, stream = norm_linear(x, stream, norm.weight, norm.eps, matrices)
        return swiglu_linear(gate, up, feed_forward.down.weight), stream

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rope: RopeTables,
        cache: KVCache | None = None,
        bounds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x, residual: [B, S, D] -> the same pair for the next block, whose sum is the residual stream.

        The last add is done here; with `carry_residual` it is left to the next block's first norm, which reads both.
        """
        if self.ops.norm_linear is not None and self.ops.swiglu_linear is not None:
            units = self.ops.norm_linear, self.ops.swiglu_linear
            x, stream = self._forward_in_units(*units, x, residual, rope, cache, bounds)
        else:
            y, stream = self.attention_norm(x, residual)
            y, stream = self.feed_forward_norm(self.attention(y, rope, cache, bounds), stream)
            x = self.feed_forward(y)
        return (x, stream) if self.carry_residual else (x + stream, None)


class Head(nn.Module):
    """The last projection; with labels also the loss, so that the logits of a whole batch need never exist at once."""

    def __init__(self, shape: ModelShape, loss: LossFunction | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.dim))
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """x: [B, S, D] -> logits [B, S, V]; with labels [B, S], the scaled sum of losses, 0-dim float32."""
        if labels is None:
            return F.linear(x, self.weight)
        assert self.loss is not None and scale is not None, "a Head that is given labels needs a loss and its scale"
        return self.loss(x, self.weight, labels, scale)


class Llama(nn.Module):
    """Building it on the meta device is free. After `to_empty` has given it memory, `init_weights` fills that."""

    cos: Tensor
    sin: Tensor
    embedding: nn.Embedding

    def __init__(
        self, shape: ModelShape, ops: Ops = REFERENCE, loss: LossFunction | None = None, max_seq_len: int | None = None
    ) -> None:
        """max_seq_len: the length of the rotary tables; the shape's own if None."""
        super().__init__()
        self.shape = shape
        self.max_seq_len = max_seq_len or shape.max_seq_len
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        self.blocks = nn.ModuleList(Block(shape, ops) for _ in range(shape.n_layers))
        self.norm = Norm(shape.dim, shape.norm_eps, ops)
        self.head = Head(shape, loss)
        self.tie()
        self.register_buffer("cos", torch.empty(self.max_seq_len, shape.head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(self.max_seq_len, shape.head_dim // 2), persistent=False)
        self.init_buffers()

    def tie(self) -> None:
        """Makes embedding and head share one parameter where the shape says so. To be called again after `to_empty` or
        anything else that gives modules new parameters."""
        if self.shape.tied:
            self.head.weight = cast(nn.Parameter, self.embedding.weight)

    def init_buffers(self) -> None:
        """Fills the rotary tables, which `to_empty` leaves uninitialised."""
        if not self.cos.is_meta:
            self.cos, self.sin = rope_tables(self.shape, self.max_seq_len, self.cos.device)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        caches: list[KVCache] | None = None,
        start: int = 0,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """tokens: [B, S] int64 -> logits [B, S, V]; with labels [B, S] and a 0-dim float32 scale, the scaled sum of
        the tokens' losses, 0-dim float32. `caches` (one a block) and `start`, the position of the first token, are
        for generation. bounds: attention stays within these documents; see documents.py."""
        rope = self.cos[start : start + tokens.shape[1]], self.sin[start : start + tokens.shape[1]]
        x, residual = self.embedding(tokens), None
        for i, block in enumerate(self.blocks):
            x, residual = block(x, residual, rope, caches[i] if caches else None, bounds)
        x, _ = self.norm(x, residual)
        return self.head(x, labels, scale)


def init_values(name: str, like: torch.Size, shape: ModelShape, seed: int, device: torch.device | str) -> Tensor:
    """The whole initial float32 tensor of the parameter `name`. With one torch, on one kind of device
    with as many multiprocessors (CUDA deals its random numbers out over them), it depends on (seed, name) alone, so
    every way of sharding cuts the same tensor. Values are close to torchtitan's: normal with a deviation of 0.02,
    truncated at three deviations; the two matrices that write to the residual stream are scaled down with depth, the
    head by the width. (torchtitan also scales the up projection, can scale layer by layer, and truncates only the head
    in this way.)"""
    if name.endswith("norm.weight"):
        return torch.ones(like, device=device)
    # torch's CPU generator uses only 32 bits of its seed, so both go through a hash to reach all of them.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "little"))
    deviation = 0.02
    if name == "embedding.weight" and not shape.tied:
        deviation = 1.0
    elif name in ("embedding.weight", "head.weight"):
        deviation = shape.dim**-0.5
    elif name.endswith(("attention.out.weight", "feed_forward.down.weight")):
        deviation = 0.02 / math.sqrt(2 * shape.n_layers)
    values = torch.empty(like, device=device)
    return nn.init.trunc_normal_(values, 0.0, deviation, -3 * deviation, 3 * deviation, generator=generator)


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Gives every parameter its initial values, sharded (DTensor) or whole. Only one whole parameter exists at a
    time."""
    for name, parameter in model.named_parameters():
        values = init_values(name, parameter.shape, model.shape, seed, parameter.device)
        copy_shard(parameter, values)
    model.init_buffers()
