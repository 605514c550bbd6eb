"""Other projects' training steps, on the same device, model, batch, dtype and data, timed by the same clock.

torchtitan 0.2.2 runs in its own Trainer, with its model, parallelisation, compile, loss, clipping, AdamW and learning
rate; only its reader of text is replaced by random tokens, so that neither side waits for a tokenizer. Hugging Face's
LlamaForCausalLM gets torch.compile, Liger's loss and torch's fused AdamW, or all of Liger's kernels uncompiled.

    pip install torchtitan==0.2.2 torchdata liger-kernel==0.8.5

None is imported before it is needed; one that is missing or fails gives a row with its error.
"""

import dataclasses
import gc
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import fake_world
from benchmarks.random_tokens import RandomTokens
from benchmarks.train_cell import RECOMPILE_LIMIT
from benchmarks.variants import COLLECT_EVERY, How, Row, Rows, time_variants
from benchmarks.workloads import FLASH_PACKAGES, Cell, Variant, config_of, ranks, shape_of
from titan_fast.config import Config
from titan_fast.flavors import ModelShape
from titan_fast.hf import hf_config
from titan_fast.loader import Batch, Loader
from titan_fast.ops import activate_flash


@dataclasses.dataclass(frozen=True)
class Made:
    """Another project's training step."""

    train_on: Callable[[Loader], None]
    """Makes the following steps use this loader, whose batches may have another size."""
    step: Callable[[], None]
    loss: Callable[[], float]
    """The last step's loss. Waits for the device."""
    versions: dict[str, str]


class PeerStep:
    """A peer as a contender for `time_variants`; its variants differ only in their batch."""

    def __init__(self, made: Made, device: torch.device, new_loader: Callable[[Variant], Loader]) -> None:
        self.made, self.device, self.new_loader = made, device, new_loader
        self.loader: Loader | None = None

    def what_runs(self, variant: Variant) -> object:
        return variant.name

    def switch_to(self, variant: Variant) -> Row:
        """Switches to another batch. Code that was compiled for the last one is dropped, or the compiler would make
        code for any size, which is slower."""
        if self.loader is not None:
            self.loader.close()
            torch._dynamo.reset()
        self.loader = self.new_loader(variant)
        self.made.train_on(self.loader)
        return {"versions": self.made.versions}

    def face(self) -> None:
        return None

    def put_on(self, face: None) -> None:
        pass

    def step(self) -> None:
        self.made.step()

    def last_loss(self) -> float:
        return self.made.loss()

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


Peer = Callable[[Config, ModelShape, torch.device], Made]


def hugging_face(config: Config, shape: ModelShape, device: torch.device, liger: bool) -> Made:
    """transformers' Llama in bfloat16, compiled block by block or not. liger: with Liger's fused linear cross entropy,
    and if not compiled with all of its kernels. Attention has the same backend as ours, this device's fastest."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    versions = {"transformers": transformers.__version__}
    if liger:
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("Liger's kernels are Triton's and need a GPU or TRITON_INTERPRET=1")
        kernels: Any = importlib.import_module("liger_kernel.transformers")
        # Compiled layers are faster without. Its rotary embedding breaks their graph. torch 2.11 believes that its norm
        # and SwiGLU write to their inputs, and fails; torch 2.13 makes 22 kernels per layer with them, not 12.
        layers = not config.compile.enable
        kernels.apply_liger_kernel_to_llama(rope=layers, rms_norm=layers, swiglu=layers)
        versions["liger-kernel"] = importlib.import_module("importlib.metadata").version("liger-kernel")
    words: dict[str, Any] = {"attn_implementation": "sdpa", "use_cache": False, "dtype": torch.bfloat16}
    settings = LlamaConfig(**hf_config(shape), **words)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(settings)
        model.to(torch.bfloat16)
    model.train()
    if config.compile.enable:
        for module in (*model.model.layers, model.model.norm):
            module.compile(backend=config.compile.backend)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay, fused=True,
    )  # fmt: skip
    backends = chosen_attention(config, shape, device)
    source: list[Loader] = []
    last: list[Tensor] = []
    done = itertools.count(1)

    def step() -> None:
        (batch,) = next(source[0])
        with sdpa_kernel(backends, set_priority=True):
            loss = _hugging_face_loss(model, batch, liger)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last[:] = [loss.detach()]
        if next(done) % COLLECT_EVERY == 0:
            gc.collect(1)

    def train_on(loader: Loader) -> None:
        source[:] = [loader]

    return Made(train_on, step, lambda: last[0].item(), versions)


def chosen_attention(config: Config, shape: ModelShape, device: torch.device) -> list[SDPBackend]:
    """A peer's attention backends. Where our own row has a FlashAttention package, the peer has it too, and no other
    to fall back to, although none of them offers it by itself."""
    version = config.kernels.attention
    if version not in FLASH_PACKAGES:
        return attention_backends(device)
    activate_flash(version, shape.n_heads // shape.n_kv_heads, shape.head_dim, torch.bfloat16, device)
    return [SDPBackend.FLASH_ATTENTION]


def attention_backends(device: torch.device) -> list[SDPBackend]:
    """In order of preference, as in titan_fast.ops and torchtitan: from Hopper on cuDNN is first."""
    if device.type != "cuda":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if torch.cuda.get_device_capability(device) >= (9, 0):
        order.reverse()
    return [*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _hugging_face_loss(model: Any, batch: Batch, liger: bool) -> Tensor:
    if liger:  # its forward shifts labels by one itself, and never makes the logits
        return model(input_ids=batch.tokens, labels=batch.tokens).loss
    logits = model(input_ids=batch.tokens).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


def torchtitan(config: Config, shape: ModelShape, device: torch.device, as_shipped: bool) -> Made:
    """torchtitan's Trainer on one device. as_shipped: float32 weights, its default, cast by autocast, or as rank 0 of
    many by FSDP2; otherwise pure bfloat16."""
    if device.type == "cpu":
        _let_torchtitan_run_on_cpu()
    version = importlib.import_module("importlib.metadata").version("torchtitan")
    train_spec: Any = importlib.import_module("torchtitan.protocols.train_spec")
    llama3: Any = importlib.import_module("torchtitan.models.llama3")
    trainer_class: Any = importlib.import_module("torchtitan.train").Trainer
    manager: Any = importlib.import_module("torchtitan.config").ConfigManager()
    name = f"bench{len(llama3.llama3_args)}"  # a second trainer in this process needs another name
    llama3.llama3_args[name] = _torchtitan_args(llama3, shape)
    spec = dataclasses.replace(llama3.get_train_spec(), build_tokenizer_fn=None, build_dataloader_fn=None)
    train_spec.register_train_spec(name, spec)
    trainer = trainer_class(manager.parse_args(_torchtitan_arguments(config, name, as_shipped)))
    (model,) = trainer.model_parts
    if config.kernels.attention in FLASH_PACKAGES:
        _use_attention(model, chosen_attention(config, shape, device))
    many = trainer.parallel_dims.world_size > 1
    if many:
        fake_world.use_copies(model)
        fake_world.assert_gathers_real_weights(model)
    batches: list[Iterator[tuple[dict[str, Tensor], Tensor]]] = []
    losses: list[Tensor] = []
    trainer.step = 1  # it logs step 1 and every log_freq steps, and logging waits for the device
    whole = trainer.forward_backward_step

    def noted(**arguments: Any) -> Tensor:
        first = not losses
        losses[:] = [whole(**arguments).detach()]
        if first and many:
            fake_world.assert_reduces_real_gradients(model)
        return losses[0]

    trainer.forward_backward_step = noted

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches[0])

    def train_on(loader: Loader) -> None:
        batches[:] = [_as_torchtitan_wants(loader)]

    return Made(train_on, step, lambda: losses[0].item(), {"torchtitan": version})


def _use_attention(model: nn.Module, backends: list[SDPBackend]) -> None:
    """torchtitan keeps a list of backends in each block's attention."""
    lists = [module for module in model.modules() if hasattr(module, "sdpa_backends")]
    assert lists, "torchtitan's attention has no list of backends"
    for module in lists:
        module.sdpa_backends = backends  # type: ignore[assignment]


def _torchtitan_args(llama3: Any, shape: ModelShape) -> Any:
    """torchtitan's shape. Its feed-forward width is int(8 / 3 dim x multiplier), rounded up to `multiple_of`."""
    if shape.tied:
        raise ValueError("torchtitan 0.2.2 has no tied head")
    multiplier = (shape.ffn_dim - 0.5) / int(8 * shape.dim / 3)
    return llama3.TransformerModelArgs(
        dim=shape.dim, n_layers=shape.n_layers, n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads,
        vocab_size=shape.vocab_size, multiple_of=shape.ffn_dim, ffn_dim_multiplier=multiplier,
        norm_eps=shape.norm_eps, rope_theta=shape.rope_theta,
    )  # fmt: skip


def _torchtitan_arguments(config: Config, name: str, as_shipped: bool) -> list[str]:
    checkpointing = config.activation_checkpoint
    options = {
        "model.name": name,
        "model.flavor": name,
        "training.seq_len": config.training.seq_len,
        "training.local_batch_size": config.training.local_batch_size,
        "training.steps": 1_000_000,
        "training.max_norm": config.training.max_norm,
        "training.dtype": "float32" if as_shipped else "bfloat16",
        "optimizer.lr": config.optimizer.lr,
        "metrics.log_freq": 1_000_000,
        "activation_checkpoint.mode": checkpointing.mode,
        "activation_checkpoint.selective_ac_option": checkpointing.selective_ac_option,
        "compile.backend": config.compile.backend,
    }
    if config.float8.enable:  # torchao's, which scales tensorwise if no recipe is named
        options |= {"model.converters": "quantize.linear.float8", "quantize.linear.float8.filter_fqns": "output"}
        if config.float8.recipe_name == "rowwise":
            options["quantize.linear.float8.recipe_name"] = "rowwise"
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return words + (["--compile.enable"] if config.compile.enable else [])


def _as_torchtitan_wants(loader: Loader) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """torchtitan's step counts labels on the host and moves the batch to the device, so it gets host tensors."""
    for (batch,) in loader:
        yield {"input": batch.tokens}, batch.labels


def home_of_batches(peer: str, device: torch.device) -> torch.device:
    """The device on which a peer's step expects its batches."""
    return torch.device("cpu") if peer.startswith("torchtitan") else device


def _let_torchtitan_run_on_cpu() -> None:
    """Gives torch.cpu, for rehearsals, the functions that torchtitan calls and only accelerators have."""
    cpu: Any = torch.cpu
    properties = type("Properties", (), {"total_memory": 2**30})
    answers: dict[str, Callable[..., Any]] = {
        "set_device": lambda *_: None,
        "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: properties,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda *_: None,
        "current_device": lambda *_: 0,
    }
    for name, answer in answers.items():
        if not hasattr(cpu, name) or name == "set_device":
            setattr(cpu, name, answer)
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[assignment]


PEERS: dict[str, Peer] = {
    "torchtitan pure bfloat16": lambda *a: torchtitan(*a, as_shipped=False),
    "torchtitan as shipped": lambda *a: torchtitan(*a, as_shipped=True),
    "Hugging Face + Liger": lambda *a: hugging_face(*a, liger=True),
    "Hugging Face": lambda *a: hugging_face(*a, liger=False),
}


@contextmanager
def _surroundings(peer: str, world: int, device: torch.device) -> Iterator[None]:
    """What torchrun would set up for one process; torchtitan reads it and makes its own process group. As rank 0 of
    many it gets our fake one."""
    if not peer.startswith("torchtitan"):
        if world > 1:
            raise ValueError(f"{peer} is a loop for one device, and {world} were asked for")
        yield
        return
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names | {"MASTER_PORT": str(29_500 + os.getpid() % 20_000)})
    here = Path.cwd()
    try:
        with (
            TemporaryDirectory() as folder,  # torchtitan writes into the current folder
            fake_world.fake_world(world, device) if world > 1 else nullcontext(),
        ):
            os.chdir(folder)
            yield
    finally:
        os.chdir(here)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_peer(cell: Cell, device: torch.device, how: How) -> Rows:
    """A row for each variant of a peer's cell, from `time_variants`."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    first = cell.variants[0]
    config, shape = config_of(cell.workload, first.options, how.smoke), shape_of(cell.workload, how.smoke)
    home = home_of_batches(cell.peer, device)
    world = ranks(cell.workload, how.smoke)

    def new_loader(variant: Variant) -> Loader:
        training = config_of(cell.workload, variant.options, how.smoke).training
        return Loader(RandomTokens(training.local_batch_size, training.seq_len, shape.vocab_size), home)

    arguments = sys.argv
    try:
        sys.argv = arguments[:1]
        with _surroundings(cell.peer, world, device):
            made = PEERS[cell.peer](config, shape, device)
            peer = PeerStep(made, device, new_loader)
            try:
                return time_variants(peer, cell.variants, how, cell.searches)
            finally:
                peer.close()
    finally:
        sys.argv = arguments
