"""Small models of every kind that the project trains."""

from titan_fast.flavors import ModelShape, RopeScaling

LLAMA2 = ModelShape(64, 2, 4, 4, 96, vocab_size=131, max_seq_len=64)
LLAMA3 = ModelShape(64, 2, 8, 2, 96, vocab_size=128, max_seq_len=64, rope_theta=500_000.0)
LLAMA31 = ModelShape(
    64, 2, 4, 2, 96, vocab_size=128, max_seq_len=512, rope_theta=500_000.0,
    rope_scaling=RopeScaling(factor=8.0, original_max_seq_len=64),
)  # fmt: skip
TIED = ModelShape(64, 2, 4, 2, 96, vocab_size=128, max_seq_len=64, rope_theta=500_000.0, tied=True)

ALL = {"llama2": LLAMA2, "llama3": LLAMA3, "llama3.1": LLAMA31, "tied": TIED}
