"""Every process of the end-to-end benchmark, by parts: those of the README's table, and others."""

from dataclasses import replace

from benchmarks.workloads import (
    COMPILED,
    COMPILED_AUTO,
    COMPILED_KERNELS,
    COMPILED_REFERENCE,
    EAGER_KERNELS,
    EAGER_REFERENCE,
    FULL,
    LLAMA_1B,
    LLAMA_3B,
    NONE,
    OPERATORS,
    POINTWISE,
    PURE,
    RANK0,
    REFERENCE,
    SELECTIVE_ATTENTION,
    SELECTIVE_LAYER,
    SELECTIVE_OP,
    SHORT_1B,
    TWO_BY_TWO,
    Cell,
    Options,
    Variant,
    Workload,
    slice_of,
    untied,
)


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
ATTENTION_LEVERS = (
    _lever("attention cudnn", {"kernels.attention": "cudnn"}),
    _lever("attention flash", {"kernels.attention": "flash"}),
)
# Each replaces torch's flash attention for the whole process, so each has its own.
FA4: Options = {"kernels.attention": "fa4"}
NEW_FLASH_LEVERS = (_lever("attention fa3", {"kernels.attention": "fa3"}), _lever("attention fa4", FA4))
CARRIED: Options = {"kernels.carry_residual": True}
NOT_CARRIED: Options = {"kernels.carry_residual": False}
SCOPE_LEVERS = (
    _lever("blocks alone", {"compile.components": ["blocks"]}),
    _lever("blocks and loss", {"compile.components": ["blocks", "loss"]}),
    _lever("blocks, loss and norm", {"compile.components": ["blocks", "loss", "norm"]}),
    _lever("residual not carried", NOT_CARRIED),
)
# `auto` uses our loss near where it was measured, 8192 rows; another chunk should not change that too.
OUR_LOSS: Options = {"kernels.cross_entropy": "triton"}
LOSS_LEVERS = (
    _lever("chunk 1024", OUR_LOSS | {"loss.chunk_size": 1024}),
    _lever("chunk 2048", OUR_LOSS | {"loss.chunk_size": 2048}),
    _lever("chunk 4096", OUR_LOSS | {"loss.chunk_size": 4096}),
    _lever("torch's linear cross entropy", {"loss.implementation": "torch"}),
)
NO_CLIPPING = _lever("no clipping", {"training.max_norm": 0.0})
TUNING_LEVERS = (
    _lever("coordinate descent", {"compile.coordinate_descent": True}),
    _lever("max autotune", {"compile.max_autotune": True}),
)
OUR_ROPE: Options = {"kernels.rope": "triton"}
FLOAT8: Options = {"float8.enable": True}
FLOAT8_LEVERS = (
    _lever("float8, tensorwise", FLOAT8),
    _lever("float8, rowwise", FLOAT8 | {"float8.recipe_name": "rowwise"}),
    _lever("float8, tensorwise, our rope", FLOAT8 | OUR_ROPE),
)
TUNING_SECONDS = 130.0
"""Assumed for coordinate descent (about 25 kernels, each timed with a dozen settings) or autotuning (15 products, 20
kernels each)."""
WITHIN_DOCUMENTS = _lever("within documents", {"training.document_mask": True})
MEMORY_LEVERS = (
    BASE,
    _lever("pointwise", POINTWISE),
    _lever("selective op", SELECTIVE_OP),
    _lever("selective attention", SELECTIVE_ATTENTION),
    _lever("selective layer", SELECTIVE_LAYER),
    _lever("full", FULL),
    _lever("memory budget 0.5", {"activation_checkpoint.mode": "memory_budget"}),
)
NEVER_RESHARD: Options = {"parallelism.fsdp_reshard_after_forward": "never"}
# A GPU's defaults, set for the CPU too.
WIDE: Options = {"parallelism.fsdp_wide_gradients": True, "parallelism.fsdp_buffers": "direct"}
FLOAT8_WIDE = _lever("float8, tensorwise, wide gradients", FLOAT8 | WIDE)
NARROW: Options = {"parallelism.fsdp_wide_gradients": False}
FSDP_POLICIES = (
    _lever("wide gradients", WIDE),
    _lever("narrow gradients", NARROW),
    _lever("wide gradients, carried residual", WIDE | CARRIED),
    _lever("never reshard, wide gradients", WIDE | NEVER_RESHARD),
    _lever("never reshard, wide gradients, carried residual", WIDE | NEVER_RESHARD | CARRIED),
)
FSDP_BUFFERS = (
    _lever("wide gradients", WIDE),
    _lever("narrow gradients", NARROW),
    _lever("narrow gradients, flat buffers", NARROW | {"parallelism.fsdp_buffers": "flat"}),
)
FA4_LEVERS = (_lever("attention fa4", FA4), _lever("attention fa4, carried residual", FA4 | CARRIED))
ALL_POINTWISE: Options = OUR_ROPE | {"kernels.rms_norm": "triton", "kernels.swiglu": "triton"}
BYTES_LEVERS = (
    _lever("residual added", WIDE | NOT_CARRIED),
    _lever("carried residual", WIDE | CARRIED),
    _lever("carried residual, our rope", WIDE | CARRIED | OUR_ROPE),
    _lever("carried residual, all of ours", WIDE | CARRIED | ALL_POINTWISE),
)
BFLOAT16_REDUCTION = _lever("bfloat16 reduction", {"training.mixed_precision_reduce": "bfloat16"})
FSDP: Options = {"parallelism.single_device": "fsdp"}
WITHOUT_OPTIMIZER: Options = {"compile.components": ["blocks", "norm", "loss"]}
OPTIMIZER_LEVERS = (
    _lever("FSDP2, one-pass AdamW", FSDP),
    _lever("FSDP2, fused AdamW", FSDP | WITHOUT_OPTIMIZER),
    _lever("FSDP2, foreach AdamW", FSDP | WITHOUT_OPTIMIZER | {"optimizer.implementation": "foreach"}),
    _lever("FSDP2, bfloat16 reduction", FSDP | BFLOAT16_REDUCTION.options),
    _lever("FSDP2, always reshard", FSDP | {"parallelism.fsdp_reshard_after_forward": "always"}),
    _lever("AdamW by buckets", WITHOUT_OPTIMIZER),
    _lever("whole model", {"compile.components": ["model", "optimizer"]}),
)


def _with(workload: Workload, options: Options, words: str) -> Workload:
    return replace(workload, name=f"{workload.name}, {words}", options=workload.options | options)


def _table_cells() -> list[Cell]:
    """What `bench_train.py` runs by default."""
    eight, seventy = RANK0["8b"], RANK0["70b"]
    return [
        Cell("single", LLAMA_1B, TWO_BY_TWO),
        Cell("single", LLAMA_3B, (COMPILED_AUTO,)),
        Cell("rank0", eight, (COMPILED_AUTO, COMPILED_KERNELS)),
        Cell("rank0", RANK0["13b"], (COMPILED_AUTO,)),
        *_peers("peers", untied(LLAMA_1B), (PEERS[0], PEERS[1], PEERS[2]), untied(LLAMA_1B)),
        Cell("slices", slice_of(eight, 4), TWO_BY_TWO),
        *(Cell("slices", slice_of(eight, layers), (COMPILED_AUTO,)) for layers in (2, 8)),
        *(Cell("slices", slice_of(seventy, layers), (COMPILED_AUTO,)) for layers in (2, 4)),
        Cell("rank0-70b", seventy, (COMPILED_AUTO,)),
    ]


def _more_cells() -> list[Cell]:
    """What does not fit in the 25 minutes: the rest of the 2x2, larger batches, every switch by itself. The eager
    reference keeps most for its backward pass, so it has its own process, the last. By the planner the 8B and 13B at
    full depth take 92 and 115 GiB with it: more than an H100 has, and an H200 has that."""
    eight, thirteen, slice4 = RANK0["8b"], RANK0["13b"], slice_of(RANK0["8b"], 4)
    # For levers that would turn the default off, so that they change only one thing.
    eight_added, slice_added = _residual_added(eight), _residual_added(slice4)
    batch4 = replace(untied(LLAMA_1B), batch=4, name="Llama 3.2 1B untied, batch 4")
    seventy = slice_of(RANK0["70b"], 4)
    return [
        *_searches("best", ((PEERS[0], NONE), (PEERS[2], NONE), ("", NONE))),
        *_searches("best-recomputed", ((PEERS[0], SELECTIVE_OP), ("", POINTWISE), ("", SELECTIVE_OP))),
        Cell("rest-8b", eight, (COMPILED_REFERENCE, EAGER_KERNELS), label="rest"),
        Cell("rest-8b", _with(eight, SELECTIVE_OP, "selective op"), (COMPILED_AUTO,)),
        Cell("rest-13b", thirteen, (COMPILED_REFERENCE, COMPILED_KERNELS), label="rest"),
        Cell("rest-13b-eager", thirteen, (EAGER_KERNELS,), label="eager"),
        Cell("rest-eager", eight, (EAGER_REFERENCE,), label="eager reference"),
        Cell("rest-eager", thirteen, (EAGER_REFERENCE,), label="eager reference"),
        Cell("rest-3b", LLAMA_3B, (COMPILED_REFERENCE, COMPILED_KERNELS, EAGER_KERNELS), label="rest"),
        Cell("rest-3b", LLAMA_3B, (EAGER_REFERENCE,), label="eager reference"),
        Cell("rest-70b", RANK0["2-70b"], (COMPILED_AUTO,)),
        Cell("rest-70b", RANK0["2-70b-2"], (COMPILED_AUTO,), label="batch 2"),
        Cell("rest-70b-whole", RANK0["70b"], (COMPILED_REFERENCE, COMPILED_KERNELS), label="rest"),
        Cell("rest-2-70b", RANK0["2-70b"], (COMPILED_REFERENCE, COMPILED_KERNELS), label="rest"),
        Cell("rest-70b-slice", seventy, (COMPILED_REFERENCE, COMPILED_KERNELS, EAGER_KERNELS), label="rest"),
        Cell("rest-70b-slice", slice_of(RANK0["70b"], 8), (COMPILED_AUTO,)),
        Cell("rest-70b-slice", seventy, (EAGER_REFERENCE,), label="eager reference"),
        Cell("levers", slice4, (BASE, *ATTENTION_LEVERS, *SCOPE_LEVERS), label="attention and scope"),
        Cell("levers", slice4, (BASE, *LOSS_LEVERS, NO_CLIPPING), label="loss and clipping"),
        *(Cell("levers", slice4, (lever,), label=lever.name.removeprefix("attention ")) for lever in NEW_FLASH_LEVERS),
        Cell("levers-documents", slice4, (BASE, WITHIN_DOCUMENTS), label="documents"),
        Cell("levers-memory", slice_added, MEMORY_LEVERS, label="one kind of recomputation each"),
        Cell("levers-fsdp", eight_added, FSDP_POLICIES, label="FSDP2"),
        Cell("levers-fsdp", eight_added, (BFLOAT16_REDUCTION,), label="bfloat16 reduction"),
        Cell("levers-buffers", eight_added, FSDP_BUFFERS, label="buffers"),
        Cell("levers-bytes", eight, BYTES_LEVERS, label="fewer bytes"),
        Cell("levers-fa4", eight_added, FA4_LEVERS, label="FlashAttention 4"),
        Cell("levers-kernels", slice4, _per_operator(), label="one kernel each"),
        *_single_device_paths("levers-optimizer", LLAMA_1B),
        Cell("levers-graph", SHORT_1B, (COMPILED_AUTO, EAGER_REFERENCE, *_recorded()), label="recorded"),
        Cell("levers-float8", _residual_added(LLAMA_1B), (COMPILED_AUTO, *FLOAT8_LEVERS), label="float8"),
        Cell("levers-float8", slice_added, (BASE, *FLOAT8_LEVERS, FLOAT8_WIDE), label="float8"),
        *_tuning(slice4),
        *_peers("peers-batch-4", batch4, (PEERS[0], PEERS[2])),
        *_peers("peers-3b", untied(LLAMA_3B), (PEERS[0], PEERS[1], PEERS[2], PEERS[3]), untied(LLAMA_3B)),
        *_peers("peers-8b", _on_one_device(slice4), (PEERS[0], PEERS[2]), eager=PEERS[2]),
        *_peers_of_rank0("peers-rank0", eight),
        *_peers("peers-float8", _with(untied(LLAMA_1B), FLOAT8, "float8"), (PEERS[0],)),
        *_peers("peers-fa4", _with(untied(LLAMA_1B), FA4, "FlashAttention 4"), (PEERS[0],)),
        *_parity(),
    ]


def _residual_added(workload: Workload) -> Workload:
    return replace(workload, options=workload.options | NOT_CARRIED)


def _on_one_device(workload: Workload) -> Workload:
    return replace(workload, name=f"{workload.name}, one device", kind="single")


def _single_device_paths(part: str, workload: Workload) -> list[Cell]:
    """How weights are kept, and how AdamW runs; each needs another optimizer."""
    fsdp = replace(workload, options=workload.options | FSDP)
    whole = Variant("whole model", {"compile.enable": True, "compile.components": ["model", "optimizer"]})
    fused = Variant("fused AdamW", COMPILED | WITHOUT_OPTIMIZER)
    foreach = Variant("foreach AdamW", fused.options | {"optimizer.implementation": "foreach"})
    return [
        Cell(part, workload, (COMPILED_AUTO, whole), label="masters, one-pass AdamW", extra_seconds=TUNING_SECONDS),
        Cell(part, workload, (fused,), label="masters, AdamW by buckets"),
        Cell(part, fsdp, (fused,), label="FSDP2 on one device"),
        Cell(part, fsdp, (foreach,), label="FSDP2 on one device, foreach"),
    ]


def _tuning(workload: Workload) -> list[Cell]:
    """Each beside the base, in its own part, because the compiler takes minutes."""
    parts = ("levers-descent", "levers-autotune")
    return [
        Cell(part, workload, (BASE, lever), label=lever.name, extra_seconds=TUNING_SECONDS)
        for part, lever in zip(parts, TUNING_LEVERS, strict=True)
    ]


PEERS = ("torchtitan pure bfloat16", "torchtitan as shipped", "Hugging Face + Liger", "Hugging Face")
AS_SHIPPED = PEERS[1]
PEER_COMPILED: Options = {"compile.enable": True}


def _peers(
    part: str, workload: Workload, peers: tuple[str, ...], masters: Workload | None = None, eager: str = ""
) -> list[Cell]:
    """Peers in pure bfloat16 (except for torchtitan as shipped), and ours before and after them; the difference of
    these two is drift. `masters`: ours with float32 masters, to be compared with torchtitan as shipped. `eager`: a peer
    that also runs uncompiled."""
    pure = replace(workload, options=workload.options | PURE | NONE)
    ours = Cell(part, pure, (COMPILED_AUTO,), label="pure bfloat16")
    cells = [ours, *(Cell(part, pure, (Variant("compiled", PEER_COMPILED),), peer=peer) for peer in peers)]
    if eager:
        cells.append(Cell(part, pure, (Variant("eager"),), peer=eager, label="eager"))
    if masters is not None:
        masters = replace(masters, options=masters.options | NONE)
        cells.append(Cell(part, masters, (COMPILED_AUTO,), label="masters"))
    return [*cells, replace(ours, label="pure bfloat16, again")]


def _peers_of_rank0(part: str, workload: Workload) -> list[Cell]:
    """torchtitan as the same rank of as many, with FSDP2, between two runs of ours: float32 shards cast to bfloat16."""
    ours = Cell(part, workload, (COMPILED_AUTO,), label="beside torchtitan")
    theirs = Cell(part, workload, (Variant("compiled", PEER_COMPILED),), peer=AS_SHIPPED)
    return [ours, theirs, replace(ours, label="beside torchtitan, again")]


SEARCHED_BATCHES = {"none": (2, 4, 8, 16), "recomputed": (4, 8, 16, 32)}


def _searches(part: str, contenders: tuple[tuple[str, Options], ...]) -> list[Cell]:
    """The largest batch that fits, and the fastest one, for each (peer or ours, activation checkpointing)."""
    work = untied(LLAMA_1B)
    found = []
    for peer, checkpointing in contenders:
        words = checkpoint_words(checkpointing)
        own = replace(work, options=work.options | PURE | checkpointing)
        compiled = PEER_COMPILED if peer else COMPILED
        sizes = SEARCHED_BATCHES["none" if checkpointing == NONE else "recomputed"]
        batches = tuple(Variant(f"batch {n}", compiled | {"training.local_batch_size": n}) for n in sizes)
        found.append(Cell(part, own, batches, peer=peer, label=f"largest batch, {words}", searches=True))
    return found


def checkpoint_words(options: Options) -> str:
    """The activation checkpointing of `options`, for readers."""
    mode = str(options["activation_checkpoint.mode"])
    return f"{mode} {options['activation_checkpoint.selective_ac_option']}" if mode == "selective" else mode


PARITY_STEPS = 200
PARITY: Options = {"optimizer.lr": 3e-4, "lr_scheduler.warmup_steps": 20}


def _parity() -> list[Cell]:
    """Plain eager PyTorch runs first in each process, and the rest is compared with it. The model is two blocks of the
    1B, whose loss falls from ln(vocabulary) as it memorises a few batches."""
    two = replace(slice_of(LLAMA_1B, 2), kind="single", seq_len=2048)
    two = replace(two, options=two.options | PARITY)
    plain = replace(EAGER_REFERENCE, name="plain")
    alone = _per_operator()[1:]
    parts = {
        "parity": (*TWO_BY_TWO[:3], EAGER_KERNELS, *ATTENTION_LEVERS, *alone),
        "parity-compile": (*SCOPE_LEVERS, *LOSS_LEVERS, *_recorded(), *MEMORY_LEVERS[1:]),
        "parity-float8": FLOAT8_LEVERS,
        "parity-optimizer": OPTIMIZER_LEVERS,
        "parity-tuning": TUNING_LEVERS,
    }
    found = [
        Cell(part, two, (plain, *variants), label=part, parity_steps=PARITY_STEPS) for part, variants in parts.items()
    ]
    found[-1] = replace(found[-1], extra_seconds=2 * TUNING_SECONDS)
    flash = [
        Cell("parity", two, (plain, lever), label=lever.name, parity_steps=PARITY_STEPS) for lever in NEW_FLASH_LEVERS
    ]
    return [*found, *flash]


TABLE_PARTS = ("limits", "single", "rank0", "peers", "slices", "rank0-70b")
"""What the command runs by default, the most important first; `limits` has no cells."""
PARTS = (*TABLE_PARTS, "launch", *dict.fromkeys(cell.part for cell in _more_cells()))
"""`launch` has no cells either; it starts training itself."""


def cells(parts: tuple[str, ...]) -> list[Cell]:
    """The cells of `parts`."""
    return [cell for cell in (*_table_cells(), *_more_cells()) if cell.part in parts]


def chosen_cells(parts: tuple[str, ...], only: str = "", per_part: int | None = None) -> list[Cell]:
    """For each of `parts` the first `per_part` cells (None: all) whose name contains `only`, in their order."""
    return [cell for part in parts for cell in [one for one in cells((part,)) if only in one.name][:per_part]]
