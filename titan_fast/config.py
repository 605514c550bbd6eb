"""Settings: frozen dataclasses, read from a TOML file and the command line. `--help` is made from the docstrings here.

Tables and keys are torchtitan 0.2's where it has them, except `comm.timeout_seconds`, the values of
`compile.components`, and `[float8]`, which is `[quantize.linear.float8]` there and needs a converter to be named.
`parse` checks names, types and every rule that needs no device; `mesh_degrees` checks what depends on the number of
processes, as soon as that is known.
"""

import dataclasses
import difflib
import os
import re
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from titan_fast import command_line
from titan_fast.errors import ConfigError, did_you_mean
from titan_fast.flavors import FLAVORS, ModelShape, RopeScaling

KernelChoice = Literal["auto", "triton", "reference"]
CompileComponent = Literal["blocks", "norm", "loss", "optimizer", "model"]


@dataclass(frozen=True)
class Job:
    dump_folder: str = "outputs/debug"
    """The run directory: log, metrics, checkpoints, tokenizer. Started on the same one again, a run continues."""
    description: str = ""
    """Free text: the title of loss_curve.png."""
    print_config: bool = False
    """Print the resolved config and stop."""
    dry_run: bool = False
    """Go through the shapes of one step as one rank of world_size GPUs, on any machine, print what a rank holds and
    stop."""
    world_size: int | None = None
    """With dry_run: how many processes there would be. None: 1."""


@dataclass(frozen=True)
class Model:
    flavor: str = "debug"
    """Which Llama: debug, llama2_7b, llama2_13b, llama2_70b, llama3_8b, llama3_70b, llama3.1_8b, llama3.1_70b,
    llama3.1_405b, llama3_1b or llama3_3b (the last two are the 3.2 shapes)."""
    tokenizer_path: str | None = None
    """A sentencepiece model, a tiktoken rank file, an HF tokenizer.json, or a folder with the first of tokenizer.model,
    tokenizer.json and original/tokenizer.model. None: the one that made the token shards, or else a sentencepiece BPE,
    trained on the corpus and kept in the run directory."""
    dim: int | None = None
    """Overrides the flavor's width. None: the flavor's."""
    n_layers: int | None = None
    """Overrides the flavor's number of blocks."""
    n_heads: int | None = None
    """Overrides the flavor's number of query heads."""
    n_kv_heads: int | None = None
    """Overrides the flavor's number of key/value heads."""
    ffn_dim: int | None = None
    """Overrides the flavor's feed-forward width."""
    vocab_size: int | None = None
    """Overrides the flavor's vocabulary size."""
    max_seq_len: int | None = None
    """Overrides the flavor's longest sequence."""
    rope_theta: float | None = None
    """Overrides the flavor's base of the rotary embedding's frequencies."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Overrides how the flavor stretches the rotary wavelengths (Llama 3.1). Four numbers: factor, low_freq_factor,
    high_freq_factor and original_max_position_embeddings."""
    norm_eps: float | None = None
    """Overrides the flavor's epsilon, which norms add to the mean square."""
    tied: bool | None = None
    """Overrides whether the flavor's head is its embedding."""


@dataclass(frozen=True)
class Training:
    dataset: str = "stdlib"
    """stdlib (the text of this machine's Python standard library), c4 (streamed from the hub), or a hub data set's
    name. Not used when dataset_path is given."""
    dataset_path: str | None = None
    """A local file or folder (.txt .md .py .jsonl .json .parquet .csv, also .gz or .zst), or a folder written by
    `python -m titan_fast.data prepare`."""
    dataset_config: str | None = None
    """The hub data set's configuration name, as "en" for c4 (which is c4's default here)."""
    dataset_revision: str | None = None
    """The hub data set's branch, tag or commit. None: the newest commit when the run begins. A run that goes on reads
    the commit with which it began."""
    dataset_split: str = "train"
    """The hub data set's split."""
    text_column: str = "text"
    """The field of a row that holds the document. For token shards it was chosen when they were prepared."""
    skip_samples: str | None = None
    """Samples that are not trained on, as FIRST:LAST,FIRST:LAST, ... from the lines about bad steps and spikes of the
    loss: a step that would have one of them begins after LAST. Not for streams."""
    seq_len: int = 256
    """Tokens per sequence."""
    document_mask: bool = False
    """Tokens attend to their own document alone, as Llama 3 was trained, instead of to all that is packed into the
    sequence before them. On CUDA this takes flash attention in bfloat16, and more memory for many short
    documents; on CPUs each block keeps a mask of seq_len^2 numbers. MFU, `titan_fast.estimate` and
    job.dry_run count as without it."""
    local_batch_size: int = 4
    """Sequences per device and forward pass."""
    global_batch_size: int = -1
    """Sequences per optimizer step over all devices. Where that takes several passes per device, gradients are
    accumulated. -1: local_batch_size x data-parallel degree."""
    steps: int = 200
    """Optimizer steps of the whole run."""
    max_norm: float = 1.0
    """Gradients are clipped to this global L2 norm; 0 turns clipping off."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of parameters and activations in the computation. The optimizer works in float32, unless
    parallelism.single_device is bfloat16. auto: bfloat16 on CUDA, float32 on CPU."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over devices."""
    enable_cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory."""
    gc_freq: int = 50
    """Steps between collections of Python's garbage, which happen at the same step on every rank. If each rank
    collected when it happened to need it, all would wait every time."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do after a step whose loss or gradient is not finite. It is never applied; skip: go on with the next."""
    max_skipped_steps: int = 10
    """With skip: more such steps than this in a row stop the run."""
    dry_step: Literal["auto", "always", "never"] = "auto"
    """Try a step on random tokens, without applying it, before any data is read, to find out whether memory is large
    enough. auto: on CUDA."""
    cuda_graph: bool = False
    """Record forward and backward of a pass once and then launch them as one: for steps so short that the GPU waits for
    Python. Only on one device without FSDP2."""


@dataclass(frozen=True)
class Loss:
    chunk_size: int = 8192
    """Tokens per chunk of the head and cross entropy; the logits of one chunk exist at a time. 0: all tokens at once.
    More than two chunks are slower, since the head's gradient is then summed in float32. Unless it is made in float32
    anyway (parallelism.fsdp_wide_gradients), they save memory only where a pass has more tokens than about twice the
    model's width."""
    z_loss: float = 0.0
    """Weight of logsumexp^2, which keeps the logits near zero (PaLM). It is part of the loss that training logs, not of
    validation's."""
    implementation: Literal["chunked", "torch"] = "chunked"
    """chunked: our own, which overwrites the logits with their gradient. torch:
    torch.nn.functional.linear_cross_entropy, where this torch has it. It chooses its own chunks and computes their
    logits twice; the loss is summed in float32. Not with z_loss or tensor parallelism."""


@dataclass(frozen=True)
class Optimizer:
    name: Literal["AdamW"] = "AdamW"
    """The only one so far."""
    lr: float = 6e-3
    """Peak learning rate. The default is for the debug flavor; larger models need a lower one (see configs/)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay_norms_and_embeddings: bool = True
    """Whether weight decay also applies to norm weights and the embedding, which may be the head too (model.tied)."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """Which of torch's AdamW implementations to use where compile.components does not include the optimizer. With
    masters beside bfloat16 weights it is always fused."""


@dataclass(frozen=True)
class LrScheduler:
    warmup_steps: int = 20
    """Steps of linear rise from 0 to the peak. A schedule that is shorter rises to the peak in its own steps."""
    total_steps: int | None = None
    """The schedule's length. None: training.steps."""
    decay_ratio: float | None = None
    """The fraction of the schedule, at its end, in which the rate decays; before that it is stable (WSD). None: all of
    it after warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "cosine"
    """The shape of the decay."""
    min_lr_factor: float = 0.1
    """The last learning rate as a fraction of the peak."""


@dataclass(frozen=True)
class Parallelism:
    data_parallel_replicate_degree: int = 1
    """Replicas of the sharded model (HSDP when above 1)."""
    data_parallel_shard_degree: int = -1
    """Devices that one copy of the parameters is sharded over (FSDP2). -1: what the other degrees leave."""
    tensor_parallel_degree: int = 1
    """Devices that share each matrix (tensor and sequence parallel)."""
    enable_async_tensor_parallel: bool = False
    """Let the compiler overlap tensor-parallel communication with matrix products. Needs CUDA and compile."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether gathered parameters are freed after their forward pass. default: those of the embedding and of all blocks
    but the last, or none where data_parallel_shard_degree is 1. always: also those of the final norm and the head."""
    fsdp_buffers: Literal["auto", "direct", "flat"] = "auto"
    """How FSDP2 moves weights and gradients. flat: its own way, copying weights out of one buffer and
    gradients into another. direct: each tensor from and to its own memory, which saves those copies. auto: direct on
    GPUs, unless this torch has an FSDP2 that we do not know."""
    fsdp_wide_gradients: bool | None = None
    """Let matrix products write the gradients of their weights in float32, the dtype in which FSDP2 reduces them,
    instead of in bfloat16 to be widened afterwards. That saves a pass over all gradients, and a rounding. It needs
    several shards, bfloat16 weights and direct buffers, works with neither tensor parallelism nor a memory budget, and
    covers all matrices but a tied head.
    It takes 2 more bytes per element: of a block's weights in its backward pass, and of the head's while the loss is
    computed, which a loss.chunk_size of 2048 more than makes up for. None: wherever possible, except with float8, where
    it was not timed, and in eager mode with activation checkpointing, which would run one product of each block for
    nothing."""
    single_device: Literal["auto", "fsdp", "masters", "bfloat16"] = "auto"
    """How a single device that computes in bfloat16 keeps its weights. fsdp: in float32, cast by FSDP2 in every step.
    masters: in bfloat16, beside float32 masters that the optimizer updates and rounds into them; the same arithmetic
    with fewer copies. bfloat16: weights and moments in bfloat16 alone, which loses small updates, and gradients of
    several passes summed in it. auto: masters, or fsdp where weights are offloaded or `optimizer.implementation` is not
    fused."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    mode: Literal["none", "full", "selective", "pointwise", "memory_budget"] = "none"
    """What the backward pass computes again. none: nothing; full: each block; selective: see selective_ac_option;
    pointwise: norms, rotary embedding and SiLU x mul, no matrix product; memory_budget: the compiler's choice."""
    selective_ac_option: str = "op"
    """With selective: an integer N (every Nth block is recomputed in full), "op" (attention outputs and every second
    matrix product are kept), or "attention" (attention's inputs and outputs are kept: less memory than op, and unlike
    with full, attention does not run twice)."""
    memory_budget: float = 0.5
    """With memory_budget: 0 keeps only the blocks' inputs, 1 is what the compiler keeps by itself. Not where
    compile.components has model."""


@dataclass(frozen=True)
class Compile:
    enable: bool = False
    """Compile what `components` names with torch.compile(fullgraph=True)."""
    components: tuple[CompileComponent, ...] = ("blocks", "norm", "loss", "optimizer")
    """blocks: each decoder block. norm: the final norm. loss: cross entropy on a chunk of logits, unless a kernel
    computes it. optimizer: clipping and AdamW, in one pass over each tensor. model: instead of blocks, norm and loss,
    the whole model with its loss as one graph; not with FSDP2."""
    backend: str = "inductor"
    """torch.compile's backend."""
    coordinate_descent: bool = False
    """Let Inductor tune the block sizes of its kernels one by one."""
    max_autotune: bool = False
    """Let Inductor time several kernels for each matrix product and take the fastest. The first step takes minutes."""
    cache_folder: str | None = None
    """Where to keep compiled code for the next run, which may be on another machine of the same kind. None: torch's
    default, a temporary folder."""
    canary: bool = True
    """Before the run, compare the gradients of one compiled block with those of plain eager PyTorch, and stop where
    they differ."""

    def takes(self, *components: CompileComponent) -> bool:
        """Whether one of them is compiled. To ask for decoder blocks name both "blocks" and "model"."""
        return self.enable and not set(components).isdisjoint(self.components)


@dataclass(frozen=True)
class Float8:
    enable: bool = False
    """Compute the blocks' matrix products, forward and backward, in float8. Ada, Hopper and newer; meant for
    compile.enable. The head stays as it is, and so do weights, optimizer and checkpoints."""
    recipe_name: Literal["tensorwise", "rowwise"] = "tensorwise"
    """How operands are scaled to float8's range. tensorwise: by one number, which is fastest. rowwise: by a number for
    each row, which loses less where single tokens or channels are large."""


@dataclass(frozen=True)
class Kernels:
    rms_norm: KernelChoice = "auto"
    """RMSNorm and add + RMSNorm."""
    rope: KernelChoice = "auto"
    """Rotary embedding on the packed projection."""
    swiglu: KernelChoice = "auto"
    """SiLU(gate) x up."""
    cross_entropy: KernelChoice = "auto"
    """Cross entropy and its gradient on a chunk of logits."""
    reemit: KernelChoice = "auto"
    """Norm + projection and SwiGLU + projection as units that save less for the backward pass and compute it again.
    They make pointwise recomputation needless: with both, the down projection would run twice, so auto is the reference
    there."""
    attention: Literal["auto", "cudnn", "flash", "fa3", "fa4", "efficient", "math"] = "auto"
    """Backend of scaled_dot_product_attention. auto: cuDNN first on Hopper and newer, flash first elsewhere and with
    debug.deterministic. fa3, fa4: FlashAttention 3 or 4 through torch, where its package is installed."""
    carry_residual: bool | None = None
    """Pass (branch, residual) from block to block, so that a block's last add fuses with the next one's first norm.
    Where blocks are recomputed this costs memory, since two tensors are kept for each instead of one; and the compiler
    makes one more graph, for the first block. None: on GPUs where blocks are compiled and nothing is recomputed, except
    with float8 or tensor parallelism, with which it was not timed."""


@dataclass(frozen=True)
class Checkpoint:
    enable: bool = True
    """Save checkpoints, and continue from the newest one at start."""
    folder: str = "checkpoint"
    """The folder of the checkpoints in the run directory; every rank must see what the others write there."""
    interval: int = 500
    """Steps between saves; the last step is always saved. 0: not by steps."""
    interval_minutes: float = 0.0
    """Minutes between saves by rank 0's clock, besides `interval`. 0: not by time."""
    keep_latest_k: int = 3
    """How many whole checkpoints to keep; older ones are deleted. The disk needs room for one more, since that happens
    after the next one is written. 0 keeps all."""
    keep_every: int = 0
    """Besides those, checkpoints of steps that are multiples of this are never deleted. 0: none."""
    initial_load_path: str | None = None
    """Weights to begin with, while the run has no checkpoint of its own: a folder of Hugging Face Llama safetensors,
    one of Meta's files, a checkpoint folder, or a run directory. The optimizer begins anew at step 0."""
    initial_load_changes: bool = False
    """Accept that rope_theta, rope_scaling or norm_eps differ from those of the initial weights, as when training for a
    longer context."""
    load_step: int = -1
    """Continue from this step's checkpoint; later ones are renamed, not deleted. Started again with the same command,
    the run continues from what it has saved since. -1: from the newest whole one."""
    save_timeout_seconds: float = 1800.0
    """How long a save may take before it counts as hanging."""
    strict: bool = False
    """Stop where the newest checkpoint is damaged, instead of continuing from the one before it."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """async: copy to host memory and write in the background. async_with_pinned_mem: the same through pinned memory,
    which needs CUDA and which torch 2.11 pins anew for each save."""
    on_save_error: Literal["abort", "continue"] = "abort"
    """What a failed save does to the run. The last one and one on a signal always end it with an error."""
    max_failed_saves: int = 3
    """With continue: more failed saves than this in a row end the run."""
    data_state: Literal["exact", "reset"] = "exact"
    """What to do where the data cannot be continued from the saved position (other data, tokenizer, seed or sequence
    length, or a stream on another number of ranks). exact: refuse; reset: begin the data again."""


@dataclass(frozen=True)
class Validation:
    enable: bool = True
    """Measure the loss on documents that are not trained on."""
    dataset_path: str | None = None
    """Local data to measure on. None: every hundredth document (by its number) of local training data is set aside."""
    freq: int = 100
    """Steps between measurements; the last step is always measured. A measurement that a stop has prevented is made up
    for at the next start."""
    steps: int = 8
    """Global batches per measurement: as many sequences as so many steps train on."""


@dataclass(frozen=True)
class Metrics:
    log_freq: int = 10
    """Steps between log lines. A step that is logged waits for the device, others do not."""
    enable_tensorboard: bool = True
    """Write TensorBoard events."""
    save_tb_folder: str = "tb"
    """Their folder in the run directory."""
    sample_freq: int = 0
    """Steps between texts sampled from the model into TensorBoard and the log. 0: only after the last step."""
    sample_prompt: str = "def "
    """What sampled text begins with. Empty: no sampling."""
    sample_tokens: int = 96
    """Tokens per sample."""


@dataclass(frozen=True)
class Profiling:
    enable_profiling: bool = False
    """Write a torch.profiler trace every profile_freq steps."""
    profile_freq: int = 100
    """Steps between traces."""
    save_traces_folder: str = "profile_traces"
    """Their folder in the run directory."""
    enable_memory_snapshot: bool = False
    """Record CUDA allocations and write them every profile_freq steps and when memory runs out."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Their folder in the run directory."""


@dataclass(frozen=True)
class Comm:
    init_timeout_seconds: int = 300
    """How long it may take the ranks to find each other, and how long the first step with its compilation, a validation
    or a sample may take."""
    timeout_seconds: float = 100.0
    """How long any phase of a later step may take, including the wait for data. After that the run is ended, naming the
    rank that hangs, its phase and its stack."""


@dataclass(frozen=True)
class Debug:
    seed: int = 0
    """Seed of the initial weights, the data order and sampling. Initial weights do not depend on the layout, but on the
    kind of device that they are drawn on: with enable_cpu_offload the CPU, else the GPU and how many multiprocessors it
    has."""
    deterministic: bool = False
    """Use only deterministic algorithms. Only with them do two runs on the same kind of GPU, connected in the same way,
    agree bit for bit. Slower: attention is never cuDNN's, NCCL does without NVLS, and the compiler chooses no reduction
    or matrix product by timing. NCCL_ALGO, where it is set, is left as it is."""


@dataclass(frozen=True)
class Config:
    """titan_fast: pretraining of Llama 2 and Llama 3.

    Every option is also a key of the TOML file that --config FILE names (see configs/); the command line wins. A path
    may begin with ~.
    """

    job: Job = field(default_factory=Job)
    """The run."""
    model: Model = field(default_factory=Model)
    """The model and its tokenizer."""
    training: Training = field(default_factory=Training)
    """Data, batch and length of the run."""
    loss: Loss = field(default_factory=Loss)
    """The loss."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """AdamW."""
    lr_scheduler: LrScheduler = field(default_factory=LrScheduler)
    """Warm-up, stable, decay."""
    parallelism: Parallelism = field(default_factory=Parallelism)
    """The mesh of devices."""
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    """Memory against recomputation."""
    compile: Compile = field(default_factory=Compile)
    """torch.compile."""
    float8: Float8 = field(default_factory=Float8)
    """Matrix products in float8."""
    kernels: Kernels = field(default_factory=Kernels)
    """Triton kernels, one switch per operator."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """What is saved and when."""
    validation: Validation = field(default_factory=Validation)
    """Loss on held-out text."""
    metrics: Metrics = field(default_factory=Metrics)
    """Log, TensorBoard, samples."""
    profiling: Profiling = field(default_factory=Profiling)
    """Traces and memory snapshots."""
    comm: Comm = field(default_factory=Comm)
    """Time-outs."""
    debug: Debug = field(default_factory=Debug)
    """Seed and determinism."""


_Flagless = tyro.conf.FlagConversionOff[Config]
"""Takes `--table.key True`, as TOML does, and not `--table.key` alone."""

SHAPE_KEYS = tuple(field.name for field in dataclasses.fields(ModelShape))
"""The keys of [model] that override the flavor's."""


def model_shape(model: Model) -> ModelShape:
    """The flavor's shape with the overrides of `[model]`; ConfigError where the result is not a valid Llama."""
    if model.flavor not in FLAVORS:
        hint = f"{did_you_mean(model.flavor, FLAVORS)}known: {', '.join(FLAVORS)}"
        raise ConfigError(f"unknown model.flavor {model.flavor!r}", hint)
    overrides = {name: getattr(model, name) for name in SHAPE_KEYS if getattr(model, name) is not None}
    if model.rope_scaling is not None:
        overrides["rope_scaling"] = RopeScaling(*model.rope_scaling)
    shape = dataclasses.replace(FLAVORS[model.flavor], **overrides)
    if problems := shape.problems():
        raise ConfigError("; ".join(problems), "change the [model] table", where=f"model.flavor {model.flavor}")
    return shape


def model_of(shape: ModelShape) -> Model:
    """The inverse of `model_shape`: the [model] table with the fewest overrides that gives this shape."""

    def overrides(flavor: str) -> dict[str, Any]:
        return {name: value for name, value in vars(shape).items() if getattr(FLAVORS[flavor], name) != value}

    # An override can change rope_scaling, but not remove it.
    flavors = [name for name, known in FLAVORS.items() if shape.rope_scaling or not known.rope_scaling]
    flavor = min(flavors, key=lambda name: len(overrides(name)))
    changes = overrides(flavor)
    if "rope_scaling" in changes:
        changes["rope_scaling"] = dataclasses.astuple(changes["rope_scaling"])
    return Model(flavor, **changes)


def parse(argv: list[str]) -> Config:
    """The config that `argv` (without the program's name) asks for; ConfigError says what is wrong with it.

    `--help` prints the manual and exits with status 0.
    """
    options = _split_command_line(argv)
    if "help" in options:
        command_line.read(_Flagless, ["--help"], "titan_fast.train")
    config = from_options(_read_toml(options.pop("config", None)) | options)
    validate(config)
    return config


def from_options(options: dict[str, list[str]]) -> Config:
    """A Config from {"table.key": [words]}, in which a path may begin with ~; names and types are checked, values are
    not."""
    _check_names(options)
    argv: list[str] = []
    flags = {name for name, key in known_keys().items() if key.type in (bool, bool | None)}
    for name, values in options.items():  # a single value may begin with a dash
        words = [word.capitalize() if name in flags and word in ("true", "false") else word for word in values]
        if name.endswith(("_path", "folder")):
            words = [_expanded(word) for word in words]
        argv += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    try:
        return command_line.read(_Flagless, argv, "titan_fast.train")
    except ConfigError as error:
        raise ConfigError(f"a value has the wrong type: {error.what}", "see --help for the type of each key") from error


def _expanded(path: str) -> str:
    """With a leading ~ replaced by the home folder, which no shell does after a `=` or in a file."""
    is_at_home = path == "~" or path.startswith("~/")
    return os.path.expanduser(path) if is_at_home else path  # noqa: PTH111 (Path's raises where there is no home)


def _split_command_line(argv: list[str]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    name = None
    for word in argv:
        if word == "-h":
            word = "--help"
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name == "config" and name in options:
                raise ConfigError("--config is given twice", "give one TOML file; other options change its keys")
            options[name] = [value] if has_value else []
        elif name is None:
            raise ConfigError(f"unexpected argument {word!r}", "options look like --training.seq_len 512")
        else:
            options[name].append(word)
    return options


def _read_toml(words: list[str] | None) -> dict[str, list[str]]:
    if words is None:
        return {}
    if len(words) != 1:
        raise ConfigError(f"--config takes one path, not {len(words)}", "give one TOML file")
    path = Path(_expanded(words[0]))
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file: {error.strerror}", "check the path", str(path)) from error
    except (ValueError, RecursionError) as error:  # a ValueError also for bytes that are not UTF-8 and absurd numbers
        raise ConfigError(f"the config file is not valid TOML: {error}", "fix it", str(path)) from error
    options, known, problems = {}, known_keys(), Problems()
    for table, keys in tables.items():
        if isinstance(keys, list) and keys and isinstance(keys[0], dict):
            raise ConfigError(f"[[{table}]] is a list of tables", f"write [{table}], once", str(path))
        if not isinstance(keys, dict):
            raise ConfigError(f"key {table!r} stands outside a table", "put it under a [table]", str(path))
        for name, value in ((f"{table}.{key}", value) for key, value in keys.items()):
            options[name] = _as_words(value)
            kind = str(known[name].type) if name in known else "tuple"  # of an unknown one only that is to be said
            if isinstance(value, list) and "tuple" not in kind:
                problems.add(f"{name} is the list {value}, and takes one value", "leave out the brackets")
            elif isinstance(value, dict) and name in known:
                takes, written = ("a list", "[VALUE, ...]") if "tuple" in kind else ("one value", "VALUE")
                problems.add(f"{name} is a table, and takes {takes}", f"write it as NAME = {written}")
            elif isinstance(value, str) and not any(texts in kind for texts in ("str", "Literal", "tuple")):
                problems.add(f"{name} is the text {value!r}, and takes none", "write the value without quotes")
    problems.refuse()
    return options


def _as_words(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def known_keys() -> dict[str, dataclasses.Field]:
    """Every `table.key` there is."""
    return {
        f"{table.name}.{key.name}": key
        for table in dataclasses.fields(Config)
        for key in dataclasses.fields(table.default_factory)  # type: ignore[arg-type]
    }


_TORCHTITANS = {
    "job.config_file": "did you mean --config?",
    "model.name": "leave it out, model.flavor names the model",
    "model.hf_assets_path": "did you mean model.tokenizer_path?",
    "quantize.linear": "did you mean float8.enable?",
    **{
        f"parallelism.{kind}_parallel_degree": f"leave it out, there is no {kind} parallelism here"
        for kind in ("pipeline", "context", "expert")
    },
}
"""What to do about keys that torchtitan has under another name, or that have no counterpart here."""


def _close_key(name: str) -> str | None:
    """The key that is most likely meant: one with this name or a similar one, in this table or a similar one."""
    table, _, leaf = name.rpartition(".")
    tables: dict[str, list[str]] = {}
    for key in known_keys():
        tables.setdefault(key.rpartition(".")[2], []).append(key.rpartition(".")[0])
    near = difflib.get_close_matches(leaf, tables, n=1, cutoff=0.7)
    if not near:
        return None
    having = tables[near[0]]
    closest = difflib.get_close_matches(table, having, n=1) or having[: not table or len(having) == 1]
    return f"{closest[0]}.{near[0]}" if closest else None


def _check_names(options: dict[str, list[str]]) -> None:
    known, problems = known_keys(), Problems()
    for name, values in options.items():
        if name not in known:
            close = _close_key(name)
            hint = f"did you mean {close}?" if close else "see --help for all keys"
            problems.add(f"unknown key {name!r}", _TORCHTITANS.get(name, hint))
        elif not values:
            problems.add(f"key {name!r} has no value", f"write --{name} VALUE")
        elif len(values) > 1 and "tuple" not in str(known[name].type):
            listed = ", ".join(map(repr, values[:3])) + (f" and {len(values) - 3} more" if len(values) > 3 else "")
            remedy = "quote what has spaces, or name a folder"
            problems.add(f"{name} takes one value, not {len(values)}: {listed}", remedy)
    problems.refuse()


class Problems:
    """What is wrong with a config, gathered so that one answer names it all."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def add(self, what: str, remedy: str) -> None:
        self._found.append((what, remedy))

    def refuse(self) -> None:
        """ConfigError naming every problem, where there is one."""
        if len(self._found) == 1:
            raise ConfigError(*self._found[0])
        if self._found:
            listed = "; ".join(f"({i}) {what}: {remedy}" for i, (what, remedy) in enumerate(self._found, 1))
            raise ConfigError(f"{len(self._found)} settings are wrong: {listed}", "fix each")


def sample_range(words: str, name: str) -> tuple[int, int]:
    """The two numbers of FIRST:LAST, which `name` was given; ConfigError where it is no such thing."""
    found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", words)
    if found is None or int(found[1]) > int(found[2]):
        raise ConfigError(f"{name} is {words!r}, not FIRST:LAST", "write two numbers, as in 96:127")
    return int(found[1]), int(found[2])


def skipped_samples(training: Training) -> list[tuple[int, int]]:
    """First and last of what training.skip_samples names; ConfigError where it is no list of FIRST:LAST."""
    given = training.skip_samples.split(",") if training.skip_samples is not None else []
    return [sample_range(words, "training.skip_samples") for words in given]


def validate(config: Config) -> None:
    """Every rule that needs neither a device nor the number of processes; ConfigError names the numbers."""
    shape, problems = model_shape(config.model), Problems()
    _check_ranges(config, problems)
    if config.training.seq_len > shape.max_seq_len:
        problems.add(
            f"training.seq_len {config.training.seq_len} is beyond the {shape.max_seq_len} tokens that "
            f"{config.model.flavor} is made for",
            "lower it or use a flavor with a longer context",
        )
    if config.job.world_size is not None and not config.job.dry_run:
        problems.add(
            f"job.world_size is {config.job.world_size}, and without job.dry_run it is torchrun that decides that",
            "start that many processes with torchrun, or add --job.dry_run True",
        )
    if config.metrics.sample_tokens > shape.max_seq_len:
        problems.add(
            f"metrics.sample_tokens {config.metrics.sample_tokens} is beyond the {shape.max_seq_len} tokens that "
            f"{config.model.flavor} is made for",
            "lower it",
        )
    if config.checkpoint.load_step != -1 and not config.checkpoint.enable:
        problems.add(
            f"checkpoint.load_step is {config.checkpoint.load_step}, and checkpoint.enable False loads none",
            "enable checkpoints, or begin with its weights by checkpoint.initial_load_path",
        )
    if config.profiling.enable_profiling and config.profiling.profile_freq > config.training.steps:
        problems.add(
            f"profiling.profile_freq {config.profiling.profile_freq} is beyond the {config.training.steps} steps of "
            "the run, none of which would be traced",
            "lower it",
        )
    for name in ("dataset_config", "dataset_revision"):
        value = getattr(config.training, name)
        if value is not None and not is_hub(config.training):
            problems.add(
                f"training.{name} is {value!r}, and the data does not come from the hub",
                "leave it out, or name the hub's data set with training.dataset and no dataset_path",
            )
    if config.training.skip_samples and is_hub(config.training):
        problems.add("training.skip_samples is given, and a stream's samples have no numbers", "leave it out")
    try:
        skipped_samples(config.training)
    except ConfigError as error:
        problems.add(error.what, error.fix)
    _check_folders(config, problems)
    option = config.activation_checkpoint.selective_ac_option
    if option not in ("op", "attention") and not (option.isdecimal() and int(option) > 0):
        problems.add(
            f"activation_checkpoint.selective_ac_option {option!r} is neither a positive integer nor 'op' nor "
            "'attention'",
            "write an integer N for every Nth block, or op, or attention",
        )
    problems.refuse()


def _value(config: Config, name: str) -> Any:
    """What the config has at `table.key`."""
    table, _, key = name.partition(".")
    return getattr(getattr(config, table), key)


@dataclass(frozen=True)
class _Needs:
    """Settings that have an effect only where another setting has the right value."""

    settings: tuple[str, ...]
    """Each a `table.key`, or a `table` for all of its others."""
    switches: tuple[str, ...]
    """One of these must have one of the values."""
    values: tuple[Any, ...] | None = None
    """None: whatever counts as true."""

    def lacks(self, config: Config) -> str:
        """Why the settings have no effect; empty where they have one."""
        found = {name: _value(config, name) for name in self.switches}
        if any(value in self.values if self.values is not None else value for value in found.values()):
            return ""
        return " and ".join(f"{name} is {value!r}" for name, value in found.items())


_NEEDS = (
    *(_Needs((table,), (f"{table}.enable",)) for table in ("compile", "float8", "validation")),
    _Needs(("checkpoint.folder", "checkpoint.interval", "checkpoint.interval_minutes", "checkpoint.keep_latest_k",
            "checkpoint.keep_every", "checkpoint.async_mode", "checkpoint.on_save_error", "checkpoint.strict",
            "checkpoint.data_state", "checkpoint.save_timeout_seconds"),
           ("checkpoint.enable",)),
    _Needs(("checkpoint.keep_every",), ("checkpoint.keep_latest_k",)),
    _Needs(("checkpoint.initial_load_changes",), ("checkpoint.initial_load_path",)),
    _Needs(("checkpoint.max_failed_saves",), ("checkpoint.on_save_error",), ("continue",)),
    _Needs(("activation_checkpoint.selective_ac_option",), ("activation_checkpoint.mode",), ("selective",)),
    _Needs(("activation_checkpoint.memory_budget",), ("activation_checkpoint.mode",), ("memory_budget",)),
    _Needs(("training.max_skipped_steps",), ("training.on_nonfinite",), ("skip",)),
    _Needs(("training.dataset",), ("training.dataset_path",), (None,)),
    _Needs(("loss.chunk_size",), ("loss.implementation",), ("chunked",)),
    _Needs(("metrics.save_tb_folder",), ("metrics.enable_tensorboard",)),
    _Needs(("metrics.sample_freq", "metrics.sample_tokens"), ("metrics.sample_prompt",)),
    _Needs(("profiling.save_traces_folder",), ("profiling.enable_profiling",)),
    _Needs(("profiling.save_memory_snapshot_folder",), ("profiling.enable_memory_snapshot",)),
    _Needs(("profiling.profile_freq",), ("profiling.enable_profiling", "profiling.enable_memory_snapshot")),
)  # fmt: skip
_OF_THE_HUB = _Needs(("training.dataset_split",), ())
_OF_FSDP = _Needs(
    (*(f"parallelism.{key.name}" for key in dataclasses.fields(Parallelism) if key.name.startswith("fsdp_")),
     "training.mixed_precision_reduce"), (),
)  # fmt: skip
_OF_SHARDS = _Needs(("parallelism.fsdp_buffers",), ())


def without_effect(config: Config, shards: int) -> list[str]:
    """A line for every setting that differs from its default and has no effect: its value, and why. shards: over how
    many devices FSDP2 cuts a copy of the weights; 0 without FSDP2."""
    found, defaults = [], Config()
    against = {needs: needs.lacks(config) for needs in _NEEDS}
    against[_OF_THE_HUB] = "" if is_hub(config.training) else "the data does not come from the hub"
    against[_OF_FSDP] = "" if shards else "a single device without FSDP2"
    against[_OF_SHARDS] = "the shard degree is 1, so that no weight is gathered" if shards == 1 else ""
    for needs, lacks in against.items():
        for name in known_keys() if lacks else ():
            concerns = name in needs.settings or name.partition(".")[0] in needs.settings
            if concerns and name not in needs.switches and _value(config, name) != _value(defaults, name):
                found.append(f"{name} {_value(config, name)!r}: {lacks}")
    return found


RUN_FILES = frozenset(
    {
        "config.toml", "train.log", "metrics.jsonl", "bad_steps.jsonl", "loss_curve.png", "tokenizer.model", "data",
        "run.lock", ".run.lock.guard", ".config.toml.tmp", "last_saved.txt", ".last_saved.txt.tmp",
    }
)  # fmt: skip
"""Names in a run directory that are taken, whatever the config."""


def _check_folders(config: Config, problems: Problems) -> None:
    """The folders that a run writes may lie in its directory or elsewhere, but not in each other: a step's trace has
    the same name as its checkpoint."""
    run_dir = Path(os.path.normpath(Path(config.job.dump_folder).absolute()))
    taken: dict[Path, str] = {}
    for name in (
        "checkpoint.folder",
        "metrics.save_tb_folder",
        "profiling.save_traces_folder",
        "profiling.save_memory_snapshot_folder",
    ):
        value = _value(config, name)
        folder = Path(os.path.normpath(run_dir / value))
        inside = folder.relative_to(run_dir).parts if folder.is_relative_to(run_dir) else ()
        holds_the_run = not value or run_dir.is_relative_to(folder)
        if holds_the_run:
            problems.add(f"{name} is {value!r}, which is the run directory or holds it", "name a folder of its own")
        elif inside and inside[0] in RUN_FILES:
            problems.add(f"{name} is {value!r}, and the run has a {inside[0]} of its own", "choose another name")
        elif meets := [path for path in taken if folder.is_relative_to(path) or path.is_relative_to(folder)]:
            problems.add(f"{name} {value!r} and {taken[meets[0]]} are in each other's way", "choose another name")
        if not holds_the_run:
            taken[folder] = name


# key -> (least, most, how to say it)
_RANGES: dict[str, tuple[float, float, str]] = {
    "job.world_size": (1, 2**20, "between 1 and 2^20"),
    "training.seq_len": (1, float("inf"), "at least 1"),
    "training.local_batch_size": (1, 2**20, "between 1 and 2^20"),
    "training.steps": (1, float("inf"), "at least 1"),
    "training.max_norm": (0, float("inf"), "0 or more"),
    "training.gc_freq": (1, float("inf"), "at least 1"),
    "loss.chunk_size": (0, float("inf"), "0 or more"),
    "loss.z_loss": (0, float("inf"), "0 or more"),
    "optimizer.lr": (0, float("inf"), "0 or more"),
    "optimizer.beta1": (0, 0.9999999, "in [0, 1)"),
    "optimizer.beta2": (0, 0.9999999, "in [0, 1)"),
    "optimizer.eps": (1e-30, float("inf"), "at least 1e-30"),  # the update of a token not yet seen is 0 / (0 + eps)
    "optimizer.weight_decay": (0, float("inf"), "0 or more"),
    "lr_scheduler.warmup_steps": (0, float("inf"), "0 or more"),
    "lr_scheduler.total_steps": (1, float("inf"), "at least 1"),
    "lr_scheduler.decay_ratio": (0, 1, "in [0, 1]"),
    "lr_scheduler.min_lr_factor": (0, 1, "in [0, 1]"),
    "parallelism.data_parallel_replicate_degree": (1, float("inf"), "at least 1"),
    "parallelism.tensor_parallel_degree": (1, float("inf"), "at least 1"),
    "activation_checkpoint.memory_budget": (0, 1, "in [0, 1]"),
    "training.max_skipped_steps": (1, float("inf"), "at least 1"),
    "checkpoint.interval": (0, float("inf"), "0 or more"),
    "checkpoint.interval_minutes": (0, float("inf"), "0 or more"),
    "checkpoint.max_failed_saves": (1, float("inf"), "at least 1"),
    "checkpoint.keep_latest_k": (0, float("inf"), "0 or more"),
    "checkpoint.keep_every": (0, float("inf"), "0 or more"),
    "checkpoint.load_step": (-1, float("inf"), "-1 or a step"),
    "validation.freq": (1, float("inf"), "at least 1"),
    "validation.steps": (1, float("inf"), "at least 1"),
    "metrics.log_freq": (1, float("inf"), "at least 1"),
    "metrics.sample_freq": (0, float("inf"), "0 or more"),
    "metrics.sample_tokens": (1, float("inf"), "at least 1"),
    "profiling.profile_freq": (1, float("inf"), "at least 1"),
    "comm.init_timeout_seconds": (1, 10**9, "between 1 and 1e9"),
    "comm.timeout_seconds": (1, 10**9, "between 1 and 1e9"),
    "checkpoint.save_timeout_seconds": (1, 10**9, "between 1 and 1e9"),
    "debug.seed": (0, 2**63 - 1, "between 0 and 2^63 - 1"),
}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_ranges(config: Config, problems: Problems) -> None:
    for name, (least, most, words) in _RANGES.items():
        value = _value(config, name)
        if value is not None and not abs(value) < (2**63 if isinstance(value, int) else 1e300):
            most = "2^63" if isinstance(value, int) else "1e300"
            problems.add(f"{name} is {value}, not a finite number below {most}", "change it")
        elif value is not None and not least <= value <= most:
            problems.add(f"{name} is {value}, not {words}", "change it")
    for name in known_keys():
        text = _value(config, name)
        if isinstance(text, str) and ("\0" in text or not _is_utf8(text)):
            coding = sys.getfilesystemencoding()
            remedy = (
                "change it" if coding == "utf-8" else f"words are read as {coding} here: set PYTHONUTF8=1, or change it"
            )
            problems.add(f"{name} is {text!r}, which is not UTF-8 text without NUL", remedy)
    for name, path in (
        ("job.dump_folder", config.job.dump_folder),
        ("training.dataset_path", config.training.dataset_path),
        ("validation.dataset_path", config.validation.dataset_path),
        ("training.dataset", config.training.dataset),
        ("model.tokenizer_path", config.model.tokenizer_path),
        ("compile.cache_folder", config.compile.cache_folder),
        ("checkpoint.initial_load_path", config.checkpoint.initial_load_path),
    ):
        if path == "":
            problems.add(f"{name} is empty", "give a path, or leave it out")
    for name in ("training.global_batch_size", "parallelism.data_parallel_shard_degree"):
        value = _value(config, name)
        if value != -1 and not 1 <= value <= 2**40:
            problems.add(f"{name} is {value}, neither -1 nor between 1 and 2^40", "change it")


@dataclass(frozen=True)
class MeshDegrees:
    """How a world is divided; `replicate * shard * tensor` is the number of processes."""

    replicate: int
    shard: int
    tensor: int

    @property
    def data(self) -> int:
        """Ranks that read different data."""
        return self.replicate * self.shard


def mesh_degrees(parallelism: Parallelism, world_size: int, set_by: str = "the number of processes") -> MeshDegrees:
    """The mesh of `world_size` processes, with -1 resolved; ConfigError when they cannot fill it. set_by: where the
    user says how many."""
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    tensor = parallelism.tensor_parallel_degree
    if shard == -1:
        shard = max(1, world_size // (replicate * tensor))
    if replicate * shard * tensor != world_size:
        raise ConfigError(
            f"data_parallel_replicate_degree {replicate} x data_parallel_shard_degree {shard} x "
            f"tensor_parallel_degree {tensor} = {replicate * shard * tensor}, and the world size is {world_size}",
            f"change the degrees in [parallelism] or {set_by}",
        )
    return MeshDegrees(replicate, shard, tensor)


def is_hub(training: Training) -> bool:
    """Whether the training data is streamed from the hub."""
    return training.dataset_path is None and training.dataset != "stdlib"


def grad_accum_steps(training: Training, data_degree: int) -> int:
    """Forward passes per device and optimizer step; ConfigError when the global batch does not divide."""
    per_pass = training.local_batch_size * data_degree
    if training.global_batch_size == -1:
        return 1
    if training.global_batch_size % per_pass:
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} is not divisible by local_batch_size "
            f"{training.local_batch_size} x data-parallel degree {data_degree} = {per_pass}",
            "change one of them",
        )
    return training.global_batch_size // per_pass


def sequences_per_step(training: Training, data_degree: int) -> int:
    """Of an optimizer step, over all devices."""
    return training.local_batch_size * data_degree * grad_accum_steps(training, data_degree)


def tokens_per_step(training: Training, data_degree: int) -> int:
    """Of an optimizer step, over all devices."""
    return sequences_per_step(training, data_degree) * training.seq_len


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved config as tables, as TOML would give them back: no key that is None, and lists for tuples."""
    tables = dataclasses.asdict(config)
    return {
        name: {
            key: list(value) if isinstance(value, tuple) else value for key, value in keys.items() if value is not None
        }
        for name, keys in tables.items()
    }


def saved_checkpoint_folder(run_dir: Path) -> Path:
    """Where the run in `run_dir` keeps its checkpoints: the usual place where its config.toml does not say."""
    try:
        folder = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))["checkpoint"]["folder"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        folder = Checkpoint().folder
    return run_dir / str(folder)


def from_dict(tables: dict[str, dict[str, Any]]) -> Config:
    """The inverse of `to_dict`."""
    return from_options(
        {f"{table}.{key}": _as_words(value) for table, keys in tables.items() for key, value in keys.items()}
    )
