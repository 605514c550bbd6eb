"""What the end-to-end benchmark runs: models, batches and switches.

A `Cell` is one process: a model built once, and variants of it that are timed in turn. Everything that can be switched
on a built model is a variant (kernels, attention, compile, activation checkpointing, loss); what cannot, such as FSDP2,
needs another cell. A search is a cell whose variants are batches.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from titan_fast.config import Config, from_options, model_shape
from titan_fast.flavors import ModelShape

Kind = Literal["single", "rank0", "slice"]
"""single: real training on one device. rank0: rank 0 of 64 at full depth. slice: rank 0 of 64 with a few layers."""
Options = dict[str, Any]
WORLD = 64


@dataclass(frozen=True)
class Workload:
    """A model and a batch."""

    name: str
    kind: Kind
    flavor: str
    seq_len: int
    batch: int
    options: Options = field(default_factory=dict)
    """`table.key` -> value, for every variant."""

    @property
    def world(self) -> int:
        return 1 if self.kind == "single" else WORLD

    @property
    def tokens(self) -> int:
        """Tokens per device and step."""
        return self.batch * self.seq_len


@dataclass(frozen=True)
class Variant:
    """One way to run a built model."""

    name: str
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One process."""

    part: str
    workload: Workload
    variants: tuple[Variant, ...]
    peer: str = ""
    """Whose training step; empty for ours."""
    label: str = ""
    """What distinguishes it from other cells of the same workload."""
    parity_steps: int = 0
    """Not timed: each variant trains so many steps from the same start, and its losses are compared."""
    searches: bool = False
    """Each variant is a larger batch than the one before; they are tried in turn until one does not fit."""
    extra_seconds: float = 0.0
    """How much longer the compiler takes than without tuning: added to the plan and to the process's time limits."""

    @property
    def name(self) -> str:
        parts = [self.workload.name, self.peer, self.label]
        return " ".join(part for part in parts if part)


FLASH_PACKAGES = ("fa3", "fa4")
"""Values of `kernels.attention` that need a package, which then is torch's flash for the whole process."""
OPERATORS = ("rms_norm", "rope", "swiglu", "cross_entropy", "reemit")
REFERENCE: Options = {f"kernels.{operator}": "reference" for operator in OPERATORS}
# reemit replaces the norms and SwiGLU that it contains, so it is a separate switch and not part of "all kernels".
TRITON: Options = REFERENCE | {f"kernels.{operator}": "triton" for operator in OPERATORS[:-1]}
COMPILED: Options = {"compile.enable": True}

EAGER_REFERENCE = Variant("eager, reference", REFERENCE)
EAGER_KERNELS = Variant("eager, kernels", TRITON)
COMPILED_REFERENCE = Variant("compiled, reference", COMPILED | REFERENCE)
COMPILED_KERNELS = Variant("compiled, kernels", COMPILED | TRITON)
COMPILED_AUTO = Variant("compiled, auto", COMPILED)
TWO_BY_TWO = (COMPILED_AUTO, COMPILED_REFERENCE, COMPILED_KERNELS, EAGER_REFERENCE, EAGER_KERNELS)

NONE: Options = {"activation_checkpoint.mode": "none"}
POINTWISE: Options = {"activation_checkpoint.mode": "pointwise"}
FULL: Options = {"activation_checkpoint.mode": "full"}
SELECTIVE_OP: Options = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
SELECTIVE_ATTENTION: Options = SELECTIVE_OP | {"activation_checkpoint.selective_ac_option": "attention"}
SELECTIVE_LAYER: Options = {
    "activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "2",
}  # fmt: skip
MASTERS: Options = {"parallelism.single_device": "masters"}
PURE: Options = {"parallelism.single_device": "bfloat16"}

# The 3B's float32 state leaves room for one sequence, with norms and products recomputed.
LLAMA_1B = Workload("Llama 3.2 1B", "single", "llama3_1b", 8192, 2, MASTERS | NONE)
# So short that Python may not keep up, which is what CUDA graphs are for.
SHORT_1B = replace(LLAMA_1B, name="Llama 3.2 1B, short", seq_len=1024, batch=1)
LLAMA_3B = Workload("Llama 3.2 3B", "single", "llama3_3b", 8192, 1, MASTERS | POINTWISE)
RANK0 = {
    "8b": Workload("Llama 3 8B", "rank0", "llama3_8b", 8192, 1, NONE),
    "13b": Workload("Llama 2 13B", "rank0", "llama2_13b", 4096, 2, NONE),
    "70b": Workload("Llama 3 70B", "rank0", "llama3_70b", 8192, 1, FULL),
    "2-70b": Workload("Llama 2 70B", "rank0", "llama2_70b", 4096, 1, SELECTIVE_OP),
    "2-70b-2": Workload("Llama 2 70B", "rank0", "llama2_70b", 4096, 2, FULL),
}
SLICE_LAYERS = (2, 4, 8)


def slice_of(workload: Workload, layers: int) -> Workload:
    """The same model with fewer layers."""
    name = f"{workload.name}, {layers} layers"
    return replace(workload, name=name, kind="slice", options=workload.options | {"model.n_layers": layers})


def untied(workload: Workload) -> Workload:
    """With a separate head, which every peer's model and ours beside it have, because torchtitan has no tied one."""
    return replace(workload, name=f"{workload.name} untied", options=workload.options | {"model.tied": False})


# For a rehearsal without a GPU: the same cells, with a model whose step takes a CPU core a fraction of a second.
SMOKE_MODEL: Options = {
    "model.dim": 32, "model.n_heads": 4, "model.n_kv_heads": 2, "model.ffn_dim": 48, "model.vocab_size": 128,
    "loss.chunk_size": 8, "optimizer.lr": 3e-3,
}  # fmt: skip
SMOKE_SEQ_LEN, SMOKE_WORLD = 16, 4


def ranks(workload: Workload, smoke: bool) -> int:
    """How many ranks there are; a rehearsal has fewer."""
    return SMOKE_WORLD if smoke and workload.world > 1 else workload.world


def rehearsed(cell: Cell) -> Cell:
    """`cell` at tiny sizes; a slice keeps its layers, other models get one."""
    options = cell.workload.options | SMOKE_MODEL | {"model.n_layers": cell.workload.options.get("model.n_layers", 1)}
    return replace(cell, workload=replace(cell.workload, seq_len=SMOKE_SEQ_LEN, options=options))


def config_of(workload: Workload, variant: Options, smoke: bool) -> Config:
    """The resolved settings of a variant. Rehearsals are in bfloat16 too, which is not a CPU's default."""
    basic: Options = {
        "model.flavor": workload.flavor,
        "training.seq_len": workload.seq_len,
        "training.local_batch_size": workload.batch,
        "training.mixed_precision_param": "bfloat16",
        "optimizer.lr": 1e-4,
        "metrics.sample_prompt": "\n",
        "compile.backend": "aot_eager" if smoke else "inductor",
    }
    merged = basic | workload.options | variant
    words = {key: tuple(map(str, value)) if isinstance(value, list) else (str(value),) for key, value in merged.items()}
    return _parsed(tuple(words.items()))


@functools.cache
def _parsed(words: tuple[tuple[str, tuple[str, ...]], ...]) -> Config:
    return from_options({key: list(value) for key, value in words})


def shape_of(workload: Workload, smoke: bool) -> ModelShape:
    return model_shape(config_of(workload, {}, smoke).model)
