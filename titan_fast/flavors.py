"""The shapes of Llama 2 and 3: every number that defines a model, and nothing that needs torch."""

from dataclasses import dataclass

MOST = 2**31
"""Of any size, so that what is absurd is refused before it is counted with."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary wavelengths (`rope_type: llama3` in Hugging Face's config.json)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """Hyperparameters of one Llama. `max_seq_len` is the longest sequence that it was trained or extended for."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    """The head is the embedding's matrix."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def qkv_dim(self) -> int:
        """Rows of the packed projection: every query head, key head and value head."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def problems(self) -> list[str]:
        """Sentences that say why this is not a Llama; empty if it is one."""
        found = [
            f"{name} {value} is not positive and finite"
            for name, value in vars(self).items()
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < float("inf")
        ]
        most = {"n_layers": 10_000}
        found += [
            f"{name} {value} is more than {most.get(name, MOST):,}"
            for name, value in vars(self).items()
            if isinstance(value, int) and value > most.get(name, MOST)
        ]
        if found:
            return found
        if self.dim % self.n_heads:
            found.append(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        elif self.head_dim % 2:
            found.append(f"head dimension {self.head_dim} (dim / n_heads) is odd, and rotary embedding turns pairs")
        if self.n_heads % self.n_kv_heads:
            found.append(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if (scaling := self.rope_scaling) is not None:
            found += [
                f"rope_scaling's {name} {value} is not positive and at most {MOST:,}"
                for name, value in vars(scaling).items()
                if not 0 < value <= MOST
            ]
            if scaling.low_freq_factor >= scaling.high_freq_factor:
                found.append(
                    f"rope_scaling's low_freq_factor {scaling.low_freq_factor} is not below its high_freq_factor "
                    f"{scaling.high_freq_factor}"
                )
        return found


def _llama2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> ModelShape:
    return ModelShape(dim, n_layers, n_heads, n_kv_heads, ffn_dim, vocab_size=32_000, max_seq_len=4096)


def _llama3(dim: int, n_layers: int, n_heads: int, ffn_dim: int) -> ModelShape:
    return ModelShape(dim, n_layers, n_heads, 8, ffn_dim, vocab_size=128_256, max_seq_len=8192, rope_theta=500_000.0)


def _llama3_extended(
    dim: int, n_layers: int, n_heads: int, ffn_dim: int, *, factor: float, tied: bool = False
) -> ModelShape:
    """Llama 3.1 and 3.2: extended to 131,072 tokens."""
    scaling = RopeScaling(factor=factor)
    return ModelShape(dim, n_layers, n_heads, 8, ffn_dim, 128_256, 131_072, 500_000.0, scaling, tied=tied)


FLAVORS: dict[str, ModelShape] = {
    # A Llama 3 that two CPU cores train in two minutes: grouped queries, a vocabulary that fits its corpus.
    "debug": ModelShape(192, 4, 6, 2, 512, vocab_size=4096, max_seq_len=2048, rope_theta=500_000.0),
    "llama2_7b": _llama2(4096, 32, 32, 32, 11_008),
    "llama2_13b": _llama2(5120, 40, 40, 40, 13_824),
    "llama2_70b": _llama2(8192, 80, 64, 8, 28_672),
    "llama3_8b": _llama3(4096, 32, 32, 14_336),
    "llama3_70b": _llama3(8192, 80, 64, 28_672),
    "llama3.1_8b": _llama3_extended(4096, 32, 32, 14_336, factor=8.0),
    "llama3.1_70b": _llama3_extended(8192, 80, 64, 28_672, factor=8.0),
    "llama3.1_405b": _llama3_extended(16_384, 126, 128, 53_248, factor=8.0),
    "llama3_1b": _llama3_extended(2048, 16, 32, 8192, factor=32.0, tied=True),  # Llama 3.2 1B
    "llama3_3b": _llama3_extended(3072, 28, 24, 8192, factor=32.0, tied=True),  # Llama 3.2 3B
}
