"""Weights between this project and Hugging Face's `LlamaForCausalLM`: names, and q, k, v packed into one matrix.

Both rotate half-split, so no rows are permuted within a head.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from titan_fast.flavors import ModelShape

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}
_QKV = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")


def pack_qkv(q: Tensor, k: Tensor, v: Tensor, shape: ModelShape) -> Tensor:
    """q: [H E, D], k, v: [K E, D] -> [(H + 2 K) E, D], by key/value head: its queries, its key, its value."""
    parts = [matrix.view(shape.n_kv_heads, -1, shape.dim) for matrix in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def unpack_qkv(qkv: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_qkv`."""
    group = shape.n_heads // shape.n_kv_heads
    rows = [group * shape.head_dim, shape.head_dim, shape.head_dim]
    q, k, v = qkv.view(shape.n_kv_heads, -1, shape.dim).split(rows, dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def from_hf(weights: Mapping[str, Tensor], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of every parameter, from Hugging Face's names; one at a time, so that a lazy mapping stays
    lazy."""
    for ours, theirs in _TOP.items():
        if ours != "head.weight" or not shape.tied:
            yield ours, weights[theirs]
    for i in range(shape.n_layers):
        for ours, theirs in _BLOCK.items():
            yield f"blocks.{i}.{ours}", weights[f"model.layers.{i}.{theirs}"]
        q, k, v = (weights[f"model.layers.{i}.{name}"] for name in _QKV)
        yield f"blocks.{i}.attention.qkv.weight", pack_qkv(q, k, v, shape)


def to_hf(weights: Mapping[str, Tensor], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, tensor) of every parameter, from ours; the inverse of `from_hf`."""
    for ours, theirs in _TOP.items():
        if ours != "head.weight" or not shape.tied:
            yield theirs, weights[ours]
    for i in range(shape.n_layers):
        for ours, theirs in _BLOCK.items():
            yield f"model.layers.{i}.{theirs}", weights[f"blocks.{i}.{ours}"]
        parts = unpack_qkv(weights[f"blocks.{i}.attention.qkv.weight"], shape)
        for name, part in zip(_QKV, parts, strict=True):
            yield f"model.layers.{i}.{name}", part


def hf_config(shape: ModelShape) -> dict[str, object]:
    """The config.json of this shape."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_seq_len,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    if (scaling := shape.rope_scaling) is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return config
