"""The training steps of others, on the same device, model, batch, dtype and data, timed by the same clock.

torchtitan 0.2.2 is driven through its own Trainer: its model, parallelisation, compile, loss, clipping, AdamW and
learning rate; only its reader of text is replaced by random tokens, so that neither side waits for a tokenizer. Hugging
Face's LlamaForCausalLM gets Liger's kernels, torch.compile and torch's fused AdamW.

    pip install torchtitan==0.2.2 torchdata liger-kernel==0.8.5

Nothing of them is imported before it is asked for; one that is absent or fails is a row with its error.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import step_timing
from benchmarks.step_profile import breakdown
from benchmarks.step_timing import Timed
from benchmarks.train_cell import How, RandomTokens, Rows, failures_into
from benchmarks.workloads import Cell, config_of, shape_of
from titan_fast.config import Config
from titan_fast.flavors import ModelShape
from titan_fast.hf import hf_config
from titan_fast.loader import Batch, Loader


@dataclasses.dataclass
class PeerStep:
    """A training step of somebody else's."""

    step: Callable[[], None]
    loss: Callable[[], float]
    """Of the last step. Waits for the device."""
    versions: dict[str, str]


Peer = Callable[[Config, ModelShape, Loader, torch.device], PeerStep]


def hugging_face(config: Config, shape: ModelShape, loader: Loader, device: torch.device, liger: bool) -> PeerStep:
    """transformers' Llama in bfloat16, compiled block by block; with Liger's kernels in place of its own where wanted,
    the fused linear cross entropy included."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    versions = {"transformers": transformers.__version__}
    if liger:
        if device.type != "cuda":
            raise RuntimeError("Liger's kernels are Triton's and need a GPU")
        kernels: Any = importlib.import_module("liger_kernel.transformers")
        kernels.apply_liger_kernel_to_llama()
        versions["liger-kernel"] = importlib.import_module("importlib.metadata").version("liger-kernel")
    words: dict[str, Any] = {"attn_implementation": "sdpa", "use_cache": False, "dtype": torch.bfloat16}
    settings = LlamaConfig(**hf_config(shape), **words)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(settings)
        model.to(torch.bfloat16)
    model.train()
    if config.compile.enable:
        for layer in model.model.layers:
            layer.compile(backend=config.compile.backend)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay, fused=True,
    )  # fmt: skip
    last: list[Tensor] = []

    def step() -> None:
        (batch,) = next(loader)
        loss = _hugging_face_loss(model, batch, liger)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last[:] = [loss.detach()]

    return PeerStep(step, lambda: last[0].item(), versions)


def _hugging_face_loss(model: Any, batch: Batch, liger: bool) -> Tensor:
    if liger:  # its forward moves labels by one itself, and never makes the logits
        return model(input_ids=batch.tokens, labels=batch.tokens).loss
    logits = model(input_ids=batch.tokens).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


def torchtitan(config: Config, shape: ModelShape, loader: Loader, device: torch.device, as_shipped: bool) -> PeerStep:
    """torchtitan's Trainer on one device. as_shipped: float32 weights under autocast, as it runs there by itself;
    otherwise its pure bfloat16."""
    if device.type == "cpu":
        _let_torchtitan_run_on_cpu()
    version = importlib.import_module("importlib.metadata").version("torchtitan")
    train_spec: Any = importlib.import_module("torchtitan.protocols.train_spec")
    llama3: Any = importlib.import_module("torchtitan.models.llama3")
    trainer_class: Any = importlib.import_module("torchtitan.train").Trainer
    manager: Any = importlib.import_module("torchtitan.config").ConfigManager()
    name = f"bench{len(llama3.llama3_args)}"  # a second trainer in this process needs a name of its own
    llama3.llama3_args[name] = _torchtitan_args(llama3, shape)
    spec = dataclasses.replace(llama3.get_train_spec(), build_tokenizer_fn=None, build_dataloader_fn=None)
    train_spec.register_train_spec(name, spec)
    trainer = trainer_class(manager.parse_args(_torchtitan_arguments(config, name, as_shipped)))
    batches = _as_torchtitan_wants(loader)
    losses: list[Tensor] = []
    trainer.step = 1  # it logs step 1, and every log_freq; logging waits for the device
    whole = trainer.forward_backward_step

    def noted(**arguments: Any) -> Tensor:
        losses[:] = [whole(**arguments).detach()]
        return losses[0]

    trainer.forward_backward_step = noted

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)

    return PeerStep(step, lambda: losses[0].item(), {"torchtitan": version})


def _torchtitan_args(llama3: Any, shape: ModelShape) -> Any:
    """Its shape: the feed-forward width is int(8 / 3 dim x multiplier), rounded up to `multiple_of`."""
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
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return words + (["--compile.enable"] if config.compile.enable else [])


def _as_torchtitan_wants(loader: Loader) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Its step moves batches from the host to the device itself; ours are read ahead there, so these are as well."""
    for (batch,) in loader:
        yield {"input": batch.tokens}, batch.labels


def _let_torchtitan_run_on_cpu() -> None:
    """It asks its device for what only accelerators have; for a rehearsal the CPU answers something."""
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
def _alone(peer: str) -> Iterator[None]:
    """What torchrun would set up for one process; torchtitan reads it and makes its own process group."""
    if not peer.startswith("torchtitan"):
        with nullcontext():
            yield
        return
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names | {"MASTER_PORT": str(29_500 + os.getpid() % 20_000)})
    here = Path.cwd()
    try:
        with TemporaryDirectory() as folder:  # it writes beside where it is started
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
    """One row: the peer's figures, or why there are none."""
    row: dict[str, Any] = {"variant": cell.variants[0].name, "options": {}}
    options = {"compile.enable": True} if cell.variants[0].name == "compiled" else {}
    config, shape = config_of(cell.workload, options, how.smoke), shape_of(cell.workload, how.smoke)
    training = config.training
    loader = Loader(RandomTokens(training.local_batch_size, training.seq_len, shape.vocab_size), device)
    arguments = sys.argv
    try:
        sys.argv = arguments[:1]
        with failures_into(row), _alone(cell.peer):
            peer = PEERS[cell.peer](config, shape, loader, device)
            row["versions"] = peer.versions
            peer.step()
            row["first_loss"] = peer.loss()
            found, steps = step_timing.warm_up(peer.step, device, how.length, is_first=True)
            timed = Timed(warm_up=steps)
            for _, count in step_timing.turns([cell.peer], {cell.peer: found}):
                step_timing.run_block(peer.step, device, count, timed)
            row["step_seconds"], row["peak_bytes"] = timed.as_json(), timed.peak_bytes
            row["last_loss"] = peer.loss()
            if how.profiles:
                row["profile"] = breakdown(peer.step, device)
    finally:
        sys.argv = arguments
        loader.close()
    return [row]
