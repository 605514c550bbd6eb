"""What the end-to-end benchmark runs: models, batches, and the switches that each is run with.

A `Cell` is one process: a model built once, and variants of it that are timed in turn. Everything that can be switched
on a built model is a variant (kernels, attention, compile, activation checkpointing, loss); what cannot, FSDP2 or not,
makes another cell.
"""

import functools
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
    parity_steps: int = 0
    """Not timed: each variant trains so many steps from the same start, and its losses are compared."""

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
# So short that Python may not keep up: what CUDA graphs are for.
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
    """torchtitan has no tied head, so there is a matrix more in every peer's model and in ours beside it."""
    return replace(workload, name=f"{workload.name} untied", options=workload.options | {"model.tied": False})


def _per_operator() -> tuple[Variant, ...]:
    alone = tuple(
        Variant(f"compiled, {op} alone", COMPILED | REFERENCE | {f"kernels.{op}": "triton"}) for op in OPERATORS
    )
    return (COMPILED_REFERENCE, *alone)


def _recorded() -> tuple[Variant, ...]:
    return tuple(
        Variant(f"{variant.name}, CUDA graph", variant.options | {"training.cuda_graph": True})
        for variant in (COMPILED_AUTO, EAGER_REFERENCE)
    )


def _lever(name: str, options: Options) -> Variant:
    return Variant(name, COMPILED | options)


BASE = _lever("base", {})
ARITHMETIC_LEVERS = (
    BASE,
    _lever("attention cudnn", {"kernels.attention": "cudnn"}),
    _lever("attention flash", {"kernels.attention": "flash"}),
    _lever("attention fa3", {"kernels.attention": "fa3"}),
    _lever("attention fa4", {"kernels.attention": "fa4"}),
    _lever("blocks alone", {"compile.components": ["blocks"]}),
    _lever("blocks and loss", {"compile.components": ["blocks", "loss"]}),
    _lever("blocks, loss and norm", {"compile.components": ["blocks", "loss", "norm"]}),
    _lever("chunk 1024", {"loss.chunk_size": 1024}),
    _lever("chunk 4096", {"loss.chunk_size": 4096}),
    _lever("chunk 0", {"loss.chunk_size": 0}),
    _lever("torch's linear cross entropy", {"loss.implementation": "torch"}),
    _lever("carried residual", {"kernels.carry_residual": True}),
    _lever("no clipping", {"training.max_norm": 0.0}),
    _lever("coordinate descent", {"compile.coordinate_descent": True}),
)
MEMORY_LEVERS = (
    BASE,
    _lever("pointwise", POINTWISE),
    _lever("selective op", SELECTIVE_OP),
    _lever("selective layer", SELECTIVE_LAYER),
    _lever("full", FULL),
)


def _with(workload: Workload, options: Options, words: str) -> Workload:
    return replace(workload, name=f"{workload.name}, {words}", options=workload.options | options)


def _table_cells() -> list[Cell]:
    """What the README shows."""
    eight, seventy = RANK0["8b"], RANK0["70b"]
    return [
        Cell("single", LLAMA_1B, TWO_BY_TWO),
        Cell("single", LLAMA_3B, COMPILED_ONLY),
        Cell("rank0", eight, (COMPILED_AUTO, COMPILED_KERNELS)),
        Cell("rank0", RANK0["13b"], (COMPILED_AUTO,)),
        Cell("slices", slice_of(eight, 4), TWO_BY_TWO),
        *(Cell("slices", slice_of(eight, layers), (COMPILED_AUTO,)) for layers in (2, 8)),
        *(Cell("slices", slice_of(seventy, layers), (COMPILED_AUTO,)) for layers in (2, 4)),
        Cell("rank0-70b", seventy, (COMPILED_AUTO,)),
        *_peers("peers", untied(LLAMA_1B), (PEERS[0], PEERS[1], PEERS[2]), LLAMA_1B),
    ]


def _more_cells() -> list[Cell]:
    """What the 25 minutes leave out: the rest of the 2x2, larger batches, every switch by itself."""
    eight, thirteen, slice4 = RANK0["8b"], RANK0["13b"], slice_of(RANK0["8b"], 4)
    rest = (COMPILED_REFERENCE, EAGER_REFERENCE, EAGER_KERNELS)
    batch4 = replace(untied(LLAMA_1B), batch=4, name="Llama 3.2 1B untied, batch 4")
    seventy = slice_of(RANK0["70b"], 4)
    return [
        Cell("rest-8b", eight, rest, label="rest"),
        Cell("rest-8b", _with(eight, SELECTIVE_OP, "selective op"), (COMPILED_AUTO,)),
        Cell("rest-13b", thirteen, (COMPILED_REFERENCE, COMPILED_KERNELS), label="rest"),
        Cell("rest-13b-eager", thirteen, (EAGER_REFERENCE, EAGER_KERNELS), label="eager"),
        Cell("rest-3b", LLAMA_3B, (EAGER_REFERENCE, EAGER_KERNELS), label="eager"),
        Cell("rest-3b", slice_of(RANK0["70b"], 8), (COMPILED_AUTO,)),
        Cell("rest-70b", RANK0["2-70b"], (COMPILED_AUTO,)),
        Cell("rest-70b", RANK0["2-70b-2"], (COMPILED_AUTO,), label="batch 2"),
        Cell("rest-70b-slice", seventy, rest, label="rest"),
        Cell("levers", slice4, ARITHMETIC_LEVERS, label="one change each"),
        Cell("levers-memory", slice4, MEMORY_LEVERS, label="one kind of recomputation each"),
        Cell("levers-memory", slice4, _per_operator(), label="one kernel each"),
        *_fsdp_policies("levers-memory", slice4),
        *_single_device_paths("levers-optimizer", LLAMA_1B),
        Cell("levers-graph", SHORT_1B, (COMPILED_AUTO, EAGER_REFERENCE, *_recorded()), label="recorded"),
        Cell("levers-autotune", slice4, (_lever("max autotune", {"compile.max_autotune": True}),), label="autotune"),
        *_peers("peers-batch-4", batch4, (PEERS[0], PEERS[1], PEERS[2])),
        *_peers("peers-3b", untied(LLAMA_3B), (PEERS[0], PEERS[1], PEERS[2], PEERS[3]), LLAMA_3B),
        *_peers("peers-8b", _on_one_device(slice4), (PEERS[0], PEERS[2])),
        _parity(),
    ]


def _on_one_device(workload: Workload) -> Workload:
    return replace(workload, name=f"{workload.name}, one device", kind="single")


def _single_device_paths(part: str, workload: Workload) -> list[Cell]:
    """What is kept of weights, and how AdamW runs: another optimizer each."""
    fsdp = replace(workload, options=workload.options | {"parallelism.single_device": "fsdp"})
    whole = Variant("whole model", {"compile.enable": True, "compile.components": ["model", "optimizer"]})
    fused = Variant("fused AdamW", COMPILED | {"compile.components": ["blocks", "norm", "loss"]})
    foreach = Variant("foreach AdamW", fused.options | {"optimizer.implementation": "foreach"})
    return [
        Cell(part, fsdp, (fused,), label="FSDP2 on one device"),
        Cell(part, fsdp, (foreach,), label="FSDP2 on one device, foreach"),
        Cell(part, workload, (fused,), label="masters, AdamW by buckets"),
        Cell(part, workload, (COMPILED_AUTO, whole), label="masters, one-pass AdamW"),
    ]


def _fsdp_policies(part: str, workload: Workload) -> list[Cell]:
    changes = {
        "never reshard": {"parallelism.fsdp_reshard_after_forward": "never"},
        "bfloat16 reduction": {"training.mixed_precision_reduce": "bfloat16"},
    }
    return [
        Cell(part, replace(workload, options=workload.options | options), (BASE,), label=label)
        for label, options in changes.items()
    ]


PEERS = ("torchtitan pure bfloat16", "torchtitan as shipped", "Hugging Face + Liger", "Hugging Face")


def _peers(part: str, workload: Workload, peers: tuple[str, ...], masters: Workload | None = None) -> list[Cell]:
    """Peers in pure bfloat16 (but for torchtitan as it is shipped) and ours in it before and after them: what that
    moves in between is drift. `masters`: ours with float32 masters as well, which is more work than theirs."""
    pure = replace(workload, options=workload.options | PURE | NONE)
    ours = Cell(part, pure, (COMPILED_AUTO,), label="pure bfloat16")
    cells = [ours, *(Cell(part, pure, (Variant("compiled"),), peer=peer) for peer in peers)]
    if masters is not None:
        cells.append(Cell(part, masters, (COMPILED_AUTO,), label="masters"))
    return [*cells, replace(ours, label="pure bfloat16, again")]


PARITY_STEPS = 200


def _parity() -> Cell:
    """Plain eager PyTorch first; the rest is compared with it."""
    two = replace(slice_of(LLAMA_1B, 2), kind="single", seq_len=2048)
    plain = replace(EAGER_REFERENCE, name="plain")
    switched = [v for v in (*ARITHMETIC_LEVERS, *MEMORY_LEVERS[1:]) if v.name not in ("base", "no clipping")]
    variants = (plain, *TWO_BY_TWO[:3], EAGER_KERNELS, *_recorded(), *switched)
    return Cell("parity", two, variants, parity_steps=PARITY_STEPS)


TABLE_PARTS = ("limits", "single", "rank0", "peers", "slices", "rank0-70b")
"""What one command runs, the most telling first; `limits` has no cells."""
PARTS = (*TABLE_PARTS, *dict.fromkeys(cell.part for cell in _more_cells()))


def cells(parts: tuple[str, ...]) -> list[Cell]:
    """What `parts` consist of."""
    return [cell for cell in (*_table_cells(), *_more_cells()) if cell.part in parts]


# A rehearsal without a GPU: the same cells on a model that a CPU core steps in a fraction of a second.
SMOKE_MODEL: Options = {
    "model.dim": 32, "model.n_heads": 4, "model.n_kv_heads": 2, "model.ffn_dim": 48, "model.vocab_size": 128,
    "loss.chunk_size": 8,
}  # fmt: skip
SMOKE_SEQ_LEN, SMOKE_WORLD = 8, 4


def rehearsed(cell: Cell) -> Cell:
    """`cell` at tiny sizes; layers of a slice stay, other models get one."""
    options = cell.workload.options | SMOKE_MODEL | {"model.n_layers": cell.workload.options.get("model.n_layers", 1)}
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
    words = {key: tuple(map(str, value)) if isinstance(value, list) else (str(value),) for key, value in merged.items()}
    return _parsed(tuple(words.items()))


@functools.cache
def _parsed(words: tuple[tuple[str, tuple[str, ...]], ...]) -> Config:
    return from_options({key: list(value) for key, value in words})


def shape_of(workload: Workload, smoke: bool) -> ModelShape:
    return model_shape(config_of(workload, {}, smoke).model)
