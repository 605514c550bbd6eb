"""Attention within documents (`training.document_mask`): a token sees those before it in its own document alone.

Where documents begin is found in the tokens, by the EOS and BOS between them. A batch of B sequences of S tokens
carries it as `bounds`, int32 [N + 1]: the places at which its N documents begin in the B S tokens read one after
another, and at the end B S. A document that goes on in the next sequence counts as another one there. Rotary positions
are not begun again in each document, because attention depends on the distance between two tokens alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from titan_fast.errors import ConfigError

SHORT = 64
"""Tokens of a document in a step on random tokens."""

Attention = Callable[..., Tensor]
"""(q [B, H, S, E], k, v [B, K, T, E], bounds or None) -> [B, H, S, E]."""

VARLEN = torch.ops.torch_attn._varlen_attn.default
"""What torch's attention over packed sequences is in a graph."""

# torch 2.13 wants to be told of grouped heads; 2.11 takes them as they are.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class Separators:
    """What a tokenizer puts between documents: EOS, and BOS where its family has one."""

    bos_id: int | None
    eos_id: int

    def bounds(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [B, S] -> int32 [N + 1]."""
        begins = np.ones(tokens.shape, bool)
        begins[:, 1:] = tokens[:, :-1] == self.eos_id
        if self.bos_id is not None:  # it may be the same token as EOS
            begins[:, 1:] &= tokens[:, 1:] == self.bos_id
        return np.append(np.flatnonzero(begins), tokens.size).astype(np.int32)


def check(attention: str, dtype: str) -> None:
    """ConfigError for what cannot work on CUDA: another `kernels.attention` than flash, activations in float32."""
    if dtype == "float32":
        raise ConfigError(
            "training.document_mask takes no float32 on CUDA, in which this run computes",
            "use --training.mixed_precision_param bfloat16, or turn it off",
        )
    if attention not in ("auto", "flash", "fa3", "fa4"):
        raise ConfigError(
            f"kernels.attention {attention!r} cannot stay within documents on CUDA, as training.document_mask wants",
            "use auto or flash",
        )


def split_in_two(batch: int, seq_len: int, device: torch.device) -> Tensor:
    """The bounds of a batch whose sequences each have two documents, to compare attention on."""
    begins = torch.arange(0, batch * seq_len, seq_len, dtype=torch.int32, device=device)
    both = torch.stack((begins, begins + seq_len // 3), 1).flatten()
    return any_number_of(torch.cat((both, both.new_tensor([batch * seq_len]))))


def many(batch: int, seq_len: int, device: torch.device) -> Tensor:
    """The bounds of a batch of short documents, which take most memory on a GPU."""
    begins = [row * seq_len + place for row in range(batch) for place in range(0, seq_len, SHORT)]
    return any_number_of(torch.tensor([*begins, batch * seq_len], dtype=torch.int32, device=device))


def any_number_of(bounds: Tensor) -> Tensor:
    """`bounds`, of which the compiler is told that the number of documents changes; else it would compile for each."""
    torch._dynamo.maybe_mark_dynamic(bounds, 0)
    return bounds


def visible(bounds: Tensor, batch: int, seq_len: int) -> Tensor:
    """Which keys each query sees, bool [B, 1, S, S]."""
    places = torch.arange(batch * seq_len, device=bounds.device)
    document = torch.bucketize(places, bounds, right=True).view(batch, 1, seq_len)
    before = torch.ones(seq_len, seq_len, dtype=torch.bool, device=bounds.device).tril()
    return (document[..., :, None] == document[..., None, :]) & before


def with_flash(attention: Attention) -> Attention:
    """`attention`, but within documents by torch's flash kernels for packed sequences, which compute nothing between
    documents. For CUDA, bfloat16 or float16. FlashAttention 2's backward pass takes float32 memory for the queries of
    128 tokens more for each document: 2 MiB with the 8B's heads."""

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)  # [B, H, S, E] -> [B S, H, E]

    def run(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> Tensor:
        if bounds is None:
            return attention(q, k, v)
        batch, seq_len = q.shape[0], q.shape[2]
        # A document is at most a sequence. To say how long the longest is, the host would have to wait for the GPU.
        lengths = bounds, bounds, seq_len, seq_len
        out = varlen_attn(packed(q), packed(k), packed(v), *lengths, window_size=(-1, 0), **_GROUPED)
        assert isinstance(out, Tensor)
        return out.unflatten(0, (batch, seq_len)).transpose(1, 2)

    return run
