"""What the end-to-end benchmark runs: models, batches, and the switches that each is run with.

A `Cell` is one process: a model built once, and variants of it that are timed in turn. Everything that can be switched
on a built model is a variant (kernels, attention, compile, activation checkpointing, loss); what cannot, FSDP2 or not,
makes another cell.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from titan_fast.config import Config, from_options, model_shape
from titan_fast.flavors import ModelShape

Kind = Literal["single", "rank0", "slice"]
"""single: true training on one device. rank0: rank 0 of 64 at full depth. slice: rank 0 of 64 with a few layers."""
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
        """Per device and step."""
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
    extended: bool = False
    """Run only with --all."""

    @property
    def name(self) -> str:
        parts = [self.workload.name, self.peer, self.label]
        return " ".join(part for part in parts if part)


OPERATORS = ("rms_norm", "rope", "swiglu", "cross_entropy", "reemit")
REFERENCE: Options = {f"kernels.{operator}": "reference" for operator in OPERATORS}
# reemit replaces the norms and SwiGLU that it contains, so it is a switch of its own and not part of "all kernels".
TRITON: Options = REFERENCE | {f"kernels.{operator}": "triton" for operator in OPERATORS[:-1]}
COMPONENTS = ["blocks", "norm", "loss", "optimizer"]
COMPILED: Options = {"compile.enable": True, "compile.components": COMPONENTS}

EAGER_REFERENCE = Variant("eager, reference", REFERENCE)
EAGER_KERNELS = Variant("eager, kernels", TRITON)
COMPILED_REFERENCE = Variant("compiled, reference", COMPILED | REFERENCE)
COMPILED_KERNELS = Variant("compiled, kernels", COMPILED | TRITON)
COMPILED_AUTO = Variant("compiled, auto", COMPILED)
TWO_BY_TWO = (COMPILED_AUTO, COMPILED_REFERENCE, COMPILED_KERNELS, EAGER_REFERENCE, EAGER_KERNELS)
COMPILED_ONLY = (COMPILED_AUTO, COMPILED_REFERENCE, COMPILED_KERNELS)

NONE: Options = {"activation_checkpoint.mode": "none"}
POINTWISE: Options = {"activation_checkpoint.mode": "pointwise"}
FULL: Options = {"activation_checkpoint.mode": "full"}
SELECTIVE_OP: Options = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
SELECTIVE_LAYER: Options = {
    "activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "2",
}  # fmt: skip
MASTERS: Options = {"parallelism.single_device": "masters"}
PURE: Options = {"parallelism.single_device": "bfloat16"}

# The 3B's float32 state leaves room for one sequence whose norms and products are computed again.
LLAMA_1B = Workload("Llama 3.2 1B", "single", "llama3_1b", 8192, 2, MASTERS | NONE)
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
    """torchtitan has no tied head, so there is a matrix more in every peer's model and in ours beside it."""
    return replace(workload, name=f"{workload.name} untied", options=workload.options | {"model.tied": False})


def _per_operator() -> tuple[Variant, ...]:
    alone = tuple(
        Variant(f"compiled, {op} alone", COMPILED | REFERENCE | {f"kernels.{op}": "triton"}) for op in OPERATORS
    )
    return (COMPILED_REFERENCE, *alone)


def _levers() -> tuple[Variant, ...]:
    """One change each from the first."""

    def lever(name: str, options: Options) -> Variant:
        return Variant(name, COMPILED | options)

    return (
        lever("base", {}),
        lever("attention cudnn", {"kernels.attention": "cudnn"}),
        lever("attention flash", {"kernels.attention": "flash"}),
        lever("attention fa3", {"kernels.attention": "fa3"}),
        lever("attention fa4", {"kernels.attention": "fa4"}),
        lever("blocks alone", {"compile.components": ["blocks"]}),
        lever("blocks and loss", {"compile.components": ["blocks", "loss"]}),
        lever("blocks, loss and norm", {"compile.components": ["blocks", "loss", "norm"]}),
        lever("chunk 1024", {"loss.chunk_size": 1024}),
        lever("chunk 4096", {"loss.chunk_size": 4096}),
        lever("chunk 0", {"loss.chunk_size": 0}),
        lever("torch's linear cross entropy", {"loss.implementation": "torch"}),
        lever("carried residual", {"kernels.carry_residual": True}),
        lever("no clipping", {"training.max_norm": 0.0}),
        lever("pointwise", POINTWISE),
        lever("selective op", SELECTIVE_OP),
        lever("selective layer", SELECTIVE_LAYER),
        lever("full", FULL),
        lever("coordinate descent", {"compile.coordinate_descent": True}),
    )


def _cells() -> list[Cell]:
    one, three, eight = LLAMA_1B, LLAMA_3B, slice_of(RANK0["8b"], 4)
    cells = [
        Cell("single", one, TWO_BY_TWO),
        Cell("single", three, TWO_BY_TWO),
        Cell("rank0", RANK0["8b"], COMPILED_ONLY),
        Cell("rank0", RANK0["8b"], (EAGER_REFERENCE, EAGER_KERNELS), label="pointwise eager", extended=True),
        Cell("rank0", _with(RANK0["8b"], SELECTIVE_OP, "selective op"), (COMPILED_AUTO,)),
        Cell("rank0", RANK0["13b"], (COMPILED_AUTO, COMPILED_REFERENCE)),
        Cell("rank0", RANK0["13b"], (COMPILED_KERNELS, EAGER_REFERENCE, EAGER_KERNELS), label="rest", extended=True),
        Cell("rank0-70b", RANK0["70b"], (COMPILED_AUTO,)),
        Cell("rank0-70b", RANK0["2-70b"], (COMPILED_AUTO,)),
        Cell("rank0-70b", RANK0["2-70b-2"], (COMPILED_AUTO,), extended=True),
        Cell("rank0-70b", RANK0["70b"], (COMPILED_REFERENCE, COMPILED_KERNELS), label="rest", extended=True),
        *(Cell("slices", slice_of(RANK0["8b"], n), TWO_BY_TWO) for n in SLICE_LAYERS),
        Cell("slices", slice_of(RANK0["70b"], 2), TWO_BY_TWO),
        *(Cell("slices", slice_of(RANK0["70b"], n), COMPILED_ONLY[:1]) for n in SLICE_LAYERS[1:]),
        Cell("levers", eight, _per_operator(), label="one kernel each"),
        Cell("levers", eight, _levers(), label="one change each"),
        Cell("levers", eight, (Variant("max autotune", COMPILED | {"compile.max_autotune": True}),), extended=True),
    ]
    cells += _single_device_paths(one) + _fsdp_policies(eight) + _peers()
    return cells


def _with(workload: Workload, options: Options, words: str) -> Workload:
    return replace(workload, name=f"{workload.name}, {words}", options=workload.options | options)


def _single_device_paths(workload: Workload) -> list[Cell]:
    """What is kept of weights, and how AdamW runs: another optimizer each."""
    fsdp = replace(workload, options=workload.options | {"parallelism.single_device": "fsdp"})
    whole = Variant("whole model", {"compile.enable": True, "compile.components": ["model", "optimizer"]})
    fused = Variant("fused AdamW", COMPILED | {"compile.components": ["blocks", "norm", "loss"]})
    foreach = Variant("foreach AdamW", fused.options | {"optimizer.implementation": "foreach"})
    return [
        Cell("levers", fsdp, (fused,), label="FSDP2 on one device"),
        Cell("levers", fsdp, (foreach,), label="FSDP2 on one device, foreach"),
        Cell("levers", workload, (fused,), label="masters, AdamW by buckets"),
        Cell("levers", workload, (COMPILED_AUTO, whole), label="masters, one-pass AdamW"),
    ]


def _fsdp_policies(workload: Workload) -> list[Cell]:
    changes = {
        "never reshard": {"parallelism.fsdp_reshard_after_forward": "never"},
        "bfloat16 reduction": {"training.mixed_precision_reduce": "bfloat16"},
    }
    return [
        Cell("levers", replace(workload, options=workload.options | options), (Variant("base", COMPILED),), label=label)
        for label, options in changes.items()
    ]


PEERS = ("torchtitan pure bfloat16", "torchtitan as shipped", "Hugging Face + Liger", "Hugging Face")


def _peers() -> list[Cell]:
    """Every peer and, before and after them, ours on the same untied model: what it moves in between is drift."""
    cells = []
    for workload, batches in ((untied(LLAMA_1B), (2, 4)), (untied(LLAMA_3B), (1,))):
        pure = replace(workload, options=workload.options | PURE | NONE)
        ours = Cell("peers", pure, (COMPILED_AUTO,), label="pure bfloat16")
        cells.append(ours)
        for batch in batches:
            sized = replace(pure, batch=batch, name=pure.name + (f", batch {batch}" if batch != pure.batch else ""))
            if batch != pure.batch:
                cells.append(replace(ours, workload=sized))
            cells += [
                Cell("peers", sized, (Variant("compiled"),), peer=peer)
                for peer in PEERS[: None if batch == pure.batch else 3]
            ]
        cells.append(Cell("peers", workload, (COMPILED_AUTO,), label="masters"))
        cells.append(replace(ours, label="pure bfloat16, again"))
    eight = replace(slice_of(RANK0["8b"], 4), kind="single", options=RANK0["8b"].options | PURE | {"model.n_layers": 4})
    cells.append(Cell("peers", eight, (COMPILED_AUTO,), label="pure bfloat16"))
    cells += [Cell("peers", eight, (Variant("compiled"),), peer=peer) for peer in (PEERS[0], PEERS[2])]
    return cells


PARTS = ("limits", "single", "rank0", "rank0-70b", "slices", "levers", "peers")
"""In the order in which they are worth running; `limits` has no cells."""


def cells(parts: tuple[str, ...], extended: bool) -> list[Cell]:
    """What `parts` consist of."""
    return [cell for cell in _cells() if cell.part in parts and (extended or not cell.extended)]


# A rehearsal without a GPU: the same cells on a model that a CPU core steps in a fraction of a second.
SMOKE_MODEL: Options = {
    "model.dim": 32, "model.n_heads": 4, "model.n_kv_heads": 2, "model.ffn_dim": 48, "model.vocab_size": 128,
    "loss.chunk_size": 8,
}  # fmt: skip
SMOKE_SEQ_LEN, SMOKE_WORLD = 16, 4


def rehearsed(cell: Cell) -> Cell:
    """`cell` at tiny sizes; layers of a slice stay, other models get two."""
    options = cell.workload.options | SMOKE_MODEL | {"model.n_layers": cell.workload.options.get("model.n_layers", 2)}
    return replace(cell, workload=replace(cell.workload, seq_len=SMOKE_SEQ_LEN, options=options))


def config_of(workload: Workload, variant: Options, smoke: bool) -> Config:
    """The resolved settings of a variant. A rehearsal computes in bfloat16 too, which a CPU would not by itself."""
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
    words = {key: [str(v) for v in value] if isinstance(value, list) else [str(value)] for key, value in merged.items()}
    return from_options(words)


def shape_of(workload: Workload, smoke: bool) -> ModelShape:
    return model_shape(config_of(workload, {}, smoke).model)
