"""The sizes of the Llama models that the kernels are compiled and measured for."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that one rank computes with: widths of a decoder block, and the vocabulary."""

    name: str
    width: int
    ffn_width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int

    def shard(self, degree: int) -> "LlamaShape":
        """The sizes of one of `degree` tensor-parallel ranks: heads, feed-forward columns and vocabulary are divided,
        the model width is not (norms run on some of the rows instead).

        Raises:
            ValueError: a size is not divisible by `degree`.
        """
        divided = {field: getattr(self, field) for field in ("ffn_width", "n_heads", "n_kv_heads", "vocab")}
        for field, size in divided.items():
            if size % degree:
                raise ValueError(f"{self.name}: {field} {size} is not divisible by {degree} tensor-parallel ranks")
        return replace(self, **{field: size // degree for field, size in divided.items()})


# Sizes from the config.json of the published checkpoints.
LLAMA = {
    shape.name: shape
    for shape in (
        LlamaShape("llama3.2_1b", 2048, 8192, 32, 8, 64, 128256),
        LlamaShape("llama3.2_3b", 3072, 8192, 24, 8, 128, 128256),
        LlamaShape("llama2_7b", 4096, 11008, 32, 32, 128, 32000),
        LlamaShape("llama3_8b", 4096, 14336, 32, 8, 128, 128256),
        LlamaShape("llama2_13b", 5120, 13824, 40, 40, 128, 32000),
        LlamaShape("llama2_70b", 8192, 28672, 64, 8, 128, 32000),
        LlamaShape("llama3_70b", 8192, 28672, 64, 8, 128, 128256),
        LlamaShape("llama3_405b", 16384, 53248, 128, 8, 128, 128256),
    )
}
