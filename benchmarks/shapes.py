"""What is measured: operators at the sizes of Llama models, alone and between the matrix products they live with."""

from dataclasses import dataclass
from typing import Literal

from titan_kernels.llama_shapes import LLAMA, LlamaShape
from titan_kernels.traffic import TRAFFIC, Traffic

Context = Literal["alone", "block"]
"""`alone`: the operator by itself. `block`: the piece of a decoder block around it, matrix products included."""

OPERATORS = ("rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy", "reemit", "block", "block_carried")
SEQ_LEN = 2048  # of each sequence; 8192 tokens are four. Attention in the piece around rope stays small this way.
LOSS_CHUNK = 2048  # rows of logits that exist at a time
SMOKE_MODEL = LlamaShape("smoke", width=64, ffn_width=96, n_heads=4, n_kv_heads=2, head_dim=16, vocab=160)


@dataclass(frozen=True)
class Case:
    """One operator at one shape, on one rank."""

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
        """Norms run on a share of the tokens under tensor parallelism (sequence parallel), the loss on a chunk."""
        if self.op in ("rms_norm", "add_rms_norm"):
            return self.tokens // self.tensor_parallel
        return min(self.tokens, LOSS_CHUNK) if self.op == "cross_entropy" else self.tokens

    @property
    def seq_len(self) -> int:
        return min(self.tokens, SEQ_LEN)

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
        """The least bytes of the operator; None where matrix products are what mostly moves."""
        return TRAFFIC[self.op](**self.sizes) if self.context == "alone" else None

    @property
    def switch(self) -> tuple[str, dict[str, int]] | None:
        """The switch of titan_kernels.choice that this case informs, and the call's sizes in its terms. Whole blocks
        inform none: they check what the switches choose together."""
        if self.op.startswith("block"):
            return None
        if self.op == "reemit":
            return "reemit", {"rows": self.rows, "width": self.model.width, "ffn_width": self.model.ffn_width}
        op = "rms_norm" if self.op == "add_rms_norm" else self.op
        return op, {name: size for name, size in self.sizes.items() if name != "seq_len"}


def cases(smoke: bool) -> list[Case]:
    """Alone: three models, whole and one of eight shards, two batch sizes. In a block: the corners of that.

    Compilation, not measurement, is what a full run spends its time on; the block cases are few for that reason.
    """
    if smoke:
        return [Case(op, SMOKE_MODEL, 1, 8, context) for op in OPERATORS for context in _contexts(op)]
    found = []
    for op in OPERATORS:
        for name in ("llama3_8b", "llama2_13b", "llama3_70b"):
            for degree in (1, 8):
                for tokens in (8192, 2048):
                    for context in _contexts(op):
                        if context == "alone" or _is_corner(op, name, degree, tokens):
                            found.append(Case(op, LLAMA[name].shard(degree), degree, tokens, context))
    return found


def _contexts(op: str) -> tuple[Context, ...]:
    return ("block",) if op in ("reemit", "block", "block_carried") else ("alone", "block")


def _is_corner(op: str, name: str, degree: int, tokens: int) -> bool:
    if op.startswith("block") and degree > 1:
        return False  # a shard of a block is joined by communication, which is not measured here
    if tokens == 2048:
        return name == "llama3_8b" and degree == 1
    return name != "llama2_13b" or degree == 1
