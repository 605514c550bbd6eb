"""Our model in a cell of the end-to-end benchmark: built once, switched between variants, with training's own step."""

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config as functorch_config

from benchmarks import fake_world
from benchmarks.parity import compare_losses
from benchmarks.random_tokens import END_OF_DOCUMENT, RandomTokens
from benchmarks.variants import COLLECT_EVERY, How, Row, Rows, time_variants
from benchmarks.workloads import Cell, Variant, config_of, ranks, shape_of
from titan_fast import activation_checkpoint, compilation, parallel
from titan_fast.config import Comm, Config, Kernels, mesh_degrees
from titan_fast.cuda_graph import CudaRecorder, RecordedPasses
from titan_fast.distributed import World, start
from titan_fast.documents import Separators
from titan_fast.loader import Loader
from titan_fast.loss import LinearCrossEntropy, torch_linear_cross_entropy
from titan_fast.masters import OnePassAdamW, update
from titan_fast.model import Attention, Block, FeedForward, Linear, Llama, Norm
from titan_fast.ops import Ops, build_ops
from titan_fast.optim import build_optimizer, clip_gradients, learning_rate, step_unless
from titan_fast.step import build_model, forward_backward, one_over_valid_tokens, workload

DOCUMENT_TOKENS = 1024
"""Of a document on average, in cells that attend within documents."""
RECOMPILE_LIMIT = 64
"""Every variant adds a graph for the same code."""
PARITY_BATCHES = 16
"""When losses are compared the same batches are repeated, so that there is something to learn and a wrong gradient
shows up. With new random tokens in each step the loss would stay at ln(vocabulary) whatever the gradients are. Four
batches were memorised after 40 of 200 steps on an H100, and the rest compared nothing."""


class Bench:
    """A model that is built once and switched between variants, with the step that the training loop does."""

    def __init__(self, cell: Cell, world: World, smoke: bool) -> None:
        self.cell, self.world, self.smoke = cell, world, smoke
        self.shape = shape_of(cell.workload, smoke)
        self.config = config_of(cell.workload, cell.variants[0].options, smoke)
        self.degrees = mesh_degrees(self.config.parallelism, world.size)
        parallel.check(self.config, self.shape, self.degrees, world.device)
        # Built plain; `switch_to` adds what variants switch, as `parallelize` would.
        plain = dataclasses.replace(
            self.config,
            compile=dataclasses.replace(self.config.compile, enable=False),
            activation_checkpoint=dataclasses.replace(self.config.activation_checkpoint, mode="none"),
        )
        self.model = build_model(plain, self.shape, self._ops(plain), self.degrees, world.device)
        configs = [config_of(cell.workload, variant.options, smoke) for variant in cell.variants]
        found = [compilation.optimizer_compiler(config.compile) for config in configs]
        compiled = next((compiler for compiler in found if compiler is not None), None)
        self.optimizer = build_optimizer(self.model, self.config.optimizer, compiled)
        self.update = getattr(self.optimizer, "_update", None)
        self.recorded: RecordedPasses | None = None
        self.loader = self._loader()
        self.steps_done = 0
        self.good = torch.zeros((), device=world.device)
        self.loss = torch.zeros((), device=world.device)

    def _ops(self, config: Config) -> Ops:
        return build_ops(config.kernels, self.world.device, workload(config, self.shape, self.degrees))

    @property
    def device(self) -> torch.device:
        return self.world.device

    def _loader(self) -> Loader:
        training, cycle = self.config.training, PARITY_BATCHES if self.cell.parity_steps else None
        options = [config_of(self.cell.workload, variant.options, self.smoke) for variant in self.cell.variants]
        masks = any(config.training.document_mask for config in options)
        size = training.local_batch_size, training.seq_len, self.shape.vocab_size
        source = RandomTokens(*size, cycle, DOCUMENT_TOKENS if masks else None)
        return Loader(source, self.world.device, Separators(None, END_OF_DOCUMENT) if masks else None)

    def what_runs(self, variant: Variant) -> object:
        """Equal for `auto` and the reference where they are the same, so that it is not run twice."""
        config = config_of(self.cell.workload, variant.options, self.smoke)
        choices = tuple((operator, choice) for operator, choice, _ in self._ops(config).reasons)
        return choices, dataclasses.replace(config, kernels=Kernels())

    def switch_to(self, variant: Variant) -> Row:
        """From here on the model has the variant's settings; returns the choices of operators for the row."""
        ops = self.configure(config_of(self.cell.workload, variant.options, self.smoke))
        return {"choices": {operator: f"{choice}: {reason}" for operator, choice, reason in ops.reasons}}

    def configure(self, config: Config) -> Ops:
        """Makes the model run as `config` says, while weights, moments and data continue."""
        parallel.check(config, self.shape, self.degrees, self.world.device)
        model, ops = self.model, self._ops(config)
        _unswitch(model)
        _give_operators(model, ops)
        model.head.loss = torch_linear_cross_entropy
        if config.loss.implementation == "chunked":
            model.head.loss = LinearCrossEntropy(ops, config.loss.chunk_size, config.loss.z_loss)
        activation_checkpoint.apply(model, config.activation_checkpoint, config.compile)
        if config.compile.enable:
            compilation.compile_model(model, config.compile)
        if isinstance(self.optimizer, OnePassAdamW):
            own = compilation.optimizer_compiler(config.compile)
            # Without masters the class always needs a compiled update.
            otherwise = None if _has_masters(model) else self.update
            self.optimizer._update = own(update) if own is not None else otherwise
        self.recorded = RecordedPasses(model, CudaRecorder(self.world.device)) if config.training.cuda_graph else None
        batch, self.config = self.config.training.local_batch_size, config
        self._set_fsdp_policy()
        if self.world.size > 1:
            fake_world.assert_gathers_real_weights(self.model)
        if config.training.local_batch_size != batch:
            self.loader.close()
            self.loader = self._loader()
        return ops

    def face(self) -> dict[str, Any]:
        """Everything that `configure` sets except for the batch, which only a search changes."""
        model = self.model
        return {
            "config": self.config,
            "compiled": [(m, m._compiled_call_impl) for m in (model, model.norm, *model.blocks)],
            "forwards": [(block, block.__dict__.get("forward")) for block in model.blocks],
            "ops": model.norm.ops,
            "loss": model.head.loss,
            "update": getattr(self.optimizer, "_update", None),
            "budget": functorch_config.activation_memory_budget,
            "recorded": self.recorded,
        }

    def put_on(self, face: dict[str, Any]) -> None:
        """Restores the settings of `face`, whose code is already compiled."""
        _unswitch(self.model)
        _give_operators(self.model, face["ops"])
        self.model.head.loss = face["loss"]
        for module, compiled in face["compiled"]:
            module._compiled_call_impl = compiled
        for block, forward in face["forwards"]:
            if forward is not None:
                block.forward = forward
        if isinstance(self.optimizer, OnePassAdamW):
            self.optimizer._update = face["update"]
        functorch_config.activation_memory_budget = face["budget"]
        self.recorded, self.config = face["recorded"], face["config"]
        self._set_fsdp_policy()

    def _set_fsdp_policy(self) -> None:
        """Safe between steps, when no collective is running. Copies replace the collectives of both kinds."""
        parallel.set_fsdp_policy(self.model, self.config, self.degrees, self.device)
        if self.world.size > 1:
            fake_world.use_copies(self.model)

    def step(self) -> None:
        """One whole step, as in titan_fast.loop: data, forward, loss over the full vocabulary, backward, clipping,
        AdamW; but no logging or monitoring."""
        batches = next(self.loader)
        if not self.config.training.document_mask:
            batches = [batch._replace(bounds=None) for batch in batches]
        scale = one_over_valid_tokens(batches, self.degrees)
        self.loss = self.recorded(batches, scale) if self.recorded else forward_backward(self.model, batches, scale)
        if self.steps_done == 0 and self.world.size > 1:
            fake_world.assert_reduces_real_gradients(self.model)
        clip_gradients(self.optimizer, self.config.training.max_norm, self.loss)
        self.steps_done += 1
        rate = learning_rate(self.steps_done, self.config.lr_scheduler, self.config.optimizer.lr, 10_000)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        step_unless(self.optimizer, self.good)
        self.optimizer.zero_grad(set_to_none=True)
        if self.steps_done % COLLECT_EVERY == 0:
            gc.collect(1)

    def last_loss(self) -> float:
        """Waits for the device."""
        return self.loss.item()

    def close(self) -> None:
        self.loader.close()


def _has_masters(model: Llama) -> bool:
    return any(hasattr(parameter, "master") for parameter in model.parameters())


def _unswitch(model: Llama) -> None:
    for module in (model, model.norm, *model.blocks):
        module._compiled_call_impl = None
    for block in model.blocks:
        block.__dict__.pop("forward", None)
    functorch_config.activation_memory_budget = 1.0


def _give_operators(model: Llama, ops: Ops) -> None:
    for module in model.modules():
        if isinstance(module, (Norm, Linear, Attention, FeedForward, Block)):
            module.ops = ops
        if isinstance(module, Block):
            module.carry_residual = ops.carry_residual


@contextmanager
def world_of(cell: Cell, device: torch.device, smoke: bool) -> Iterator[World]:
    """A single process, or rank 0 of many."""
    if cell.workload.world == 1:
        with start(Comm(), device) as world:
            yield world
    else:
        with fake_world.fake_world(ranks(cell.workload, smoke), device) as world:
            yield world


def run_cell(cell: Cell, device: torch.device, how: How) -> Rows:
    """A row for each variant that was reached; see `time_variants`, and for parity `compare_losses`. Without parity,
    raises if the model cannot be built."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    with world_of(cell, device, how.smoke) as world:
        if cell.parity_steps:
            return compare_losses(cell, lambda one: Bench(one, world, how.smoke), how)
        bench = Bench(cell, world, how.smoke)
        try:
            return time_variants(bench, cell.variants, how, cell.searches)
        finally:
            bench.close()
