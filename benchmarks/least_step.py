"""The least time that a training step could take on a device, from the rates that `limits` measured on it.

It is a sum: every matrix product of the step at the rate that the device reaches on it alone, attention likewise with
its fastest backend, and the bytes that everything else must move at the rate of a large copy. Nothing overlaps, waits
or communicates.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from titan_kernels.traffic import TRAFFIC

from titan_fast.config import Config
from titan_fast.flavors import ModelShape
from titan_fast.flops import parameters

PRODUCTS = ("forward", "grad_input", "grad_weight")
OPTIMIZER_BYTES = {"masters": 30, "bfloat16": 16}
"""Per parameter: the bfloat16 gradient is read twice (norm, update). With masters, the master and two float32 moments
are read and written and the bfloat16 weight is written; without, the weight and two bfloat16 moments are read and
written. FSDP2's float32 gradients and its copies move more, but they are one way to do it and not necessary."""


@dataclass(frozen=True)
class Matrix:
    """`tokens` rows times a weight [columns, inner]."""

    tokens: int
    columns: int
    inner: int

    @property
    def flops(self) -> int:
        """For each of the three products."""
        return 2 * self.tokens * self.columns * self.inner

    @property
    def key(self) -> str:
        return f"{self.tokens}x{self.columns}x{self.inner}"


@dataclass(frozen=True)
class AttentionCall:
    """The causal attention of one block."""

    batch: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Forward, only the unmasked half. The backward pass has 2.5 times as many."""
        return 2 * self.batch * self.n_heads * self.seq_len * self.seq_len * self.head_dim

    @property
    def key(self) -> str:
        return f"{self.batch}x{self.n_heads}/{self.n_kv_heads}x{self.seq_len}x{self.head_dim}"


BLOCK_MATRICES = ("qkv", "out", "gate", "up", "down")


def matrices(shape: ModelShape, tokens: int) -> dict[str, Matrix]:
    """A block's matrices and the head's, by name."""
    dim, ffn = shape.dim, shape.ffn_dim
    return {
        "qkv": Matrix(tokens, shape.qkv_dim, dim),
        "out": Matrix(tokens, dim, dim),
        "gate": Matrix(tokens, ffn, dim),
        "up": Matrix(tokens, ffn, dim),
        "down": Matrix(tokens, dim, ffn),
        "head": Matrix(tokens, shape.vocab_size, dim),
    }


def attention_call(shape: ModelShape, batch: int, seq_len: int) -> AttentionCall:
    return AttentionCall(batch, shape.n_heads, shape.n_kv_heads, seq_len, shape.head_dim)


@dataclass(frozen=True)
class Limits:
    """Measured (or, for a plan, assumed) rates of a device."""

    bandwidth: float
    """Bytes/s, read plus written."""
    gemm: dict[str, dict[str, float]]
    """FLOP/s by matrix (`Matrix.key`) and product."""
    attention: dict[str, dict[str, dict[str, float]]]
    """FLOP/s by call (`AttentionCall.key`), backend and direction; a direction that failed is missing."""
    float8: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """FLOP/s of float8 operands' products by matrix, recipe and product; a recipe that failed has an error instead."""
    assumed_gemm: float = 0.0
    assumed_attention: tuple[float, float] = (0.0, 0.0)

    def product_seconds(self, matrix: Matrix, product: str, float8: str = "") -> float:
        """float8: the recipe, if the operands are float8."""
        if self.assumed_gemm:
            return matrix.flops / self.assumed_gemm
        if float8:
            return matrix.flops / self.float8[matrix.key][float8][product]
        rates = self.gemm.get(matrix.key) or self._most_alike(matrix)
        return matrix.flops / rates[product]

    def _most_alike(self, matrix: Matrix) -> dict[str, float]:
        """For a matrix that was not measured: the same weight with the most rows measured, else the medians."""
        same = [key for key in self.gemm if key.partition("x")[2] == matrix.key.partition("x")[2]]
        if same:
            return self.gemm[max(same, key=lambda key: int(key.partition("x")[0]))]
        return {p: statistics.median(rates[p] for rates in self.gemm.values()) for p in PRODUCTS}

    def knows(self, config: Config, shape: ModelShape) -> bool:
        """Whether the products of this config were measured in its number format."""
        if not config.float8.enable or self.assumed_gemm:
            return True
        found = matrices(shape, config.training.local_batch_size * config.training.seq_len)
        recipe = config.float8.recipe_name
        return all(PRODUCTS[0] in self.float8.get(found[n].key, {}).get(recipe, {}) for n in BLOCK_MATRICES)

    def attention_seconds(self, call: AttentionCall) -> tuple[float, float, str]:
        """(forward, backward, backend), for the backend that is fastest in both together."""
        if not self.attention:
            forward, backward = self.assumed_attention
            return call.flops / forward, 2.5 * call.flops / backward, ""
        found = self.attention.get(call.key)
        if found is None:  # another batch: the rates of the same heads
            like = [key for key in self.attention if key.partition("x")[2] == call.key.partition("x")[2]]
            found = self.attention[like[0] if like else next(iter(self.attention))]
        whole = {name: rates for name, rates in found.items() if {"forward", "backward"} <= rates.keys()}
        times = [(call.flops / r["forward"], 2.5 * call.flops / r["backward"], name) for name, r in whole.items()]
        return min(times, key=lambda time: time[0] + time[1])


# Assumed for an H100 SXM, for plans before anything is measured.
ASSUMED_H100 = Limits(2.9e12, {}, {}, assumed_gemm=700e12, assumed_attention=(600e12, 500e12))


def limits_from(content: dict[str, Any]) -> Limits:
    """From the JSON that `limits` writes."""
    found = content["rates"]["bandwidth"], content["gemm_by_shape"], content["attention_by_call"]
    return Limits(*found, content.get("float8_by_shape", {}))


def least_step(limits: Limits, config: Config, shape: ModelShape, world: int) -> dict[str, float]:
    """The seconds of each part of one device's least step, and their "total", which includes "recomputed": what the
    configured activation checkpointing adds. In float8, blocks' products have float8's rates, and casts, which could be
    part of what makes their input, cost nothing."""
    training = config.training
    tokens = training.local_batch_size * training.seq_len
    found = matrices(shape, tokens)
    call = attention_call(shape, training.local_batch_size, training.seq_len)
    forward, backward, _ = limits.attention_seconds(call)
    gemm = sum(limits.product_seconds(found["head"], product) for product in PRODUCTS)
    recipe = _recipe(config)
    gemm += shape.n_layers * sum(limits.product_seconds(found[n], p, recipe) for n in BLOCK_MATRICES for p in PRODUCTS)
    parts: dict[str, float] = {
        "matrix products": gemm,
        "attention": shape.n_layers * (forward + backward),
        "memory-bound": (shape.n_layers * block_bytes(shape, tokens, training.seq_len) + end_bytes(shape, tokens))
        / limits.bandwidth,
        "optimizer": _optimizer_bytes(config) * parameters(shape).total / world / limits.bandwidth,
        "recomputed": _recomputed(limits, config, shape, found, forward),
    }
    return parts | {"total": sum(parts.values())}


def _recipe(config: Config) -> str:
    return config.float8.recipe_name if config.float8.enable else ""


def _optimizer_bytes(config: Config) -> int:
    return OPTIMIZER_BYTES["bfloat16" if config.parallelism.single_device == "bfloat16" else "masters"]


def block_bytes(shape: ModelShape, tokens: int, seq_len: int) -> int:
    """What a block's operators between matrix products must move, forward and backward."""
    heads = {"n_heads": shape.n_heads, "n_kv_heads": shape.n_kv_heads, "head_dim": shape.head_dim}
    norms = 2 * TRAFFIC["add_rms_norm"](rows=tokens, width=shape.dim).total
    rope = TRAFFIC["rope"](rows=tokens, seq_len=seq_len, **heads).total
    return norms + rope + TRAFFIC["swiglu"](rows=tokens, width=shape.ffn_dim).total


def end_bytes(shape: ModelShape, tokens: int) -> int:
    """Embedding, last norm and cross entropy, forward and backward, in bfloat16."""
    rows = 2 * tokens * shape.dim
    embedding = 2 * rows + rows + 2 * shape.vocab_size * shape.dim
    norm = TRAFFIC["rms_norm"](rows=tokens, width=shape.dim).total
    return embedding + norm + TRAFFIC["cross_entropy"](rows=tokens, vocab=shape.vocab_size).total


def _recomputed(limits: Limits, config: Config, shape: ModelShape, found: dict[str, Matrix], forward: float) -> float:
    """Seconds of what the mode recomputes at least. With memory_budget that is unknown, and counted as 0."""
    settings, layers = config.activation_checkpoint, float(shape.n_layers)
    training = config.training
    tokens = training.local_batch_size * training.seq_len
    # Norms and products are written again; that they are then read is part of any backward pass.
    again = {
        "norms": 2 * TRAFFIC["rms_norm"](rows=tokens, width=shape.dim).forward,
        "swiglu": TRAFFIC["swiglu"](rows=tokens, width=shape.ffn_dim).forward,
    }
    pointwise = sum(again.values()) / limits.bandwidth

    def products(*names: str) -> float:
        return sum(limits.product_seconds(found[name], "forward", _recipe(config)) for name in names)

    if settings.mode == "pointwise":
        return layers * pointwise
    if settings.mode == "selective" and settings.selective_ac_option == "op":
        return layers * (pointwise + products("out", "up"))  # the second and the fourth of a block
    if settings.mode == "selective" and settings.selective_ac_option == "attention":
        return layers * (pointwise + products("out", "gate", "up"))
    if settings.mode == "full" or settings.mode == "selective":
        blocks = layers if settings.mode == "full" else layers // int(settings.selective_ac_option)
        return blocks * (pointwise + forward + products("qkv", "out", "gate", "up"))  # nothing reads down's output
    return 0.0
