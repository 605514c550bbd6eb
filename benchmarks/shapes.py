"""What is measured: operators at the sizes of Llama models, alone and in their decoder block."""

from dataclasses import dataclass, replace
from typing import Literal

from titan_kernels.llama_shapes import LLAMA, LlamaShape
from titan_kernels.traffic import TRAFFIC, Traffic

Context = Literal["alone", "block"]
"""`alone`: the operator by itself. `block`: a whole decoder block, or for the loss the head's matrix products too."""

ALONE = ("rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy", "cross_entropy_sharded")
BLOCKS = ("block", "block_carried")
"""A decoder block of titan_fast.model; carried: blocks pass the residual on separately, as one of a pair."""
OPERATORS = (*ALONE, *BLOCKS, "head")
UNITS = ("norm_linear", "swiglu_linear")
"""Measured alone for the host's time; on the device, as part of a block."""

DTYPE = "bfloat16"
SEQ_LEN = 2048  # so 8192 tokens are four sequences, and attention is a small part of a block
LOSS_CHUNK = 8192  # rows of logits at a time, by default
SMOKE_MODEL = LlamaShape("smoke", width=64, ffn_width=96, n_heads=4, n_kv_heads=2, head_dim=16, vocab=160)


@dataclass(frozen=True)
class Case:
    """One operator, block or head at one shape, on one rank."""

    op: str
    model: LlamaShape
    """Already this rank's shard."""
    tensor_parallel: int
    tokens: int
    context: Context

    @property
    def key(self) -> str:
        return f"{self.op}-{self.model.name}-tp{self.tensor_parallel}-{self.tokens}-{self.context}"

    @property
    def rows(self) -> int:
        """With tensor parallelism norms run on a part of the tokens (sequence parallel); the loss runs on a chunk."""
        if self.op in ("rms_norm", "add_rms_norm"):
            return self.tokens // self.tensor_parallel
        return min(self.tokens, LOSS_CHUNK) if self.op.startswith("cross_entropy") else self.tokens

    @property
    def seq_len(self) -> int:
        return min(self.tokens, SEQ_LEN)

    @property
    def whole(self) -> LlamaShape:
        """The unsharded model."""
        model, degree = self.model, self.tensor_parallel
        divided = ("ffn_width", "n_heads", "n_kv_heads", "vocab")
        return replace(model, **{name: degree * getattr(model, name) for name in divided})

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of the operator's byte formula."""
        model = self.model
        if self.op in ("rms_norm", "add_rms_norm"):
            return {"rows": self.rows, "width": model.width}
        if self.op == "rope":
            heads = {"n_heads": model.n_heads, "n_kv_heads": model.n_kv_heads, "head_dim": model.head_dim}
            return {"rows": self.rows, "seq_len": self.seq_len, **heads}
        if self.op == "swiglu":
            return {"rows": self.rows, "width": model.ffn_width}
        return {"rows": self.rows, "vocab": model.vocab}

    @property
    def traffic(self) -> Traffic | None:
        """The operator's least bytes; None with matrix products."""
        if self.context != "alone" or self.op in UNITS:
            return None
        return TRAFFIC[self.op](**self.sizes)


def cases(smoke: bool) -> list[Case]:
    """Alone: three models, whole and one of eight shards, at two batch sizes. Others: see `_is_measured`."""
    if smoke:
        whole = [Case(op, SMOKE_MODEL, 1, 8, _context(op)) for op in OPERATORS if op != "cross_entropy_sharded"]
        shard = SMOKE_MODEL.shard(2)
        sharded = ("rms_norm", "add_rms_norm", "cross_entropy_sharded", "block")
        return whole + [Case(op, shard, 2, 8, _context(op)) for op in sharded]
    found = []
    for op in OPERATORS:
        for name in ("llama3_8b", "llama2_13b", "llama3_70b"):
            for degree in (1, 8):
                for tokens in (8192, 2048):
                    if _is_measured(op, name, degree, tokens):
                        found.append(Case(op, LLAMA[name].shard(degree), degree, tokens, _context(op)))
    return found


def _context(op: str) -> Context:
    return "alone" if op in ALONE or op in UNITS else "block"


def _is_measured(op: str, name: str, degree: int, tokens: int) -> bool:
    """A full run spends its time on compilation, not measurement, so there are few blocks."""
    if op.startswith("cross_entropy"):
        # Llama 3 has one vocabulary, and a chunk's rows do not depend on the batch: the default, and a smaller one that
        # may be better.
        is_chunk = tokens == LOSS_CHUNK or (name == "llama3_8b" and degree == 1)
        return (degree > 1) == (op == "cross_entropy_sharded") and is_chunk and name != "llama3_70b"
    if op == "head":
        return name == "llama3_8b" and degree == 1 and tokens == 8192
    if op == "block_carried":
        return name != "llama2_13b" and degree == 1 and tokens == 8192
    if op == "block":
        if tokens == 2048:
            return name == "llama3_8b" and degree == 1
        return degree == 1 or name != "llama2_13b"
    return True
