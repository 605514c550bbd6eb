"""One cell of the end-to-end benchmark, in a process of its own: build, switch, warm up, time in turn, profile."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch._functorch.config as functorch_config

from benchmarks import fake_world, step_timing
from benchmarks.step_profile import breakdown
from benchmarks.step_timing import Length, Timed
from benchmarks.workloads import SMOKE_WORLD, Cell, Variant, config_of, shape_of
from titan_fast import activation_checkpoint, compilation, parallel
from titan_fast.config import Comm, Config, Kernels, mesh_degrees
from titan_fast.cuda_graph import CudaRecorder, RecordedPasses
from titan_fast.distributed import World, start
from titan_fast.loader import Loader, Step
from titan_fast.loss import LinearCrossEntropy, torch_linear_cross_entropy
from titan_fast.masters import OnePassAdamW
from titan_fast.model import Attention, Block, FeedForward, Llama, Norm
from titan_fast.ops import Ops, build_ops
from titan_fast.optim import build_optimizer, clip_gradients, learning_rate, step_unless
from titan_fast.step import build_model, forward_backward, one_over_valid_tokens, workload

RECOMPILE_LIMIT = 64  # every variant is a graph more of the same code


class RandomTokens:
    """A `titan_fast.loader.Source` of uniformly random tokens: the real loader, its thread and its pinned copies."""

    documents = None
    tokens_per_epoch = None

    def __init__(self, batch: int, seq_len: int, vocab_size: int) -> None:
        self.identity: dict[str, Any] = {"kind": "random"}
        self.size, self.vocab_size = (batch, seq_len + 1), vocab_size
        self.generator = np.random.default_rng(0)

    def describe(self) -> str:
        return "random tokens"

    def next_step(self, stopping: Any) -> Step:
        text = self.generator.integers(self.vocab_size, size=self.size, dtype=np.int64)
        return Step([(text[:, :-1].copy(), text[:, 1:].copy())], {}, None)

    def state(self) -> None:
        return None

    def load_state(self, state: Any) -> None:
        return None

    def state_to_json(self, state: Any) -> dict[str, Any]:
        return {}


class Bench:
    """A model that is built once and switched between variants, with the step that the training loop does."""

    def __init__(self, cell: Cell, world: World, smoke: bool) -> None:
        self.cell, self.world, self.smoke = cell, world, smoke
        self.shape = shape_of(cell.workload, smoke)
        self.config = config_of(cell.workload, cell.variants[0].options, smoke)
        self.degrees = mesh_degrees(self.config.parallelism, world.size)
        parallel.check(self.config, self.shape, self.degrees, world.device)
        # Built plain: what variants switch is put on by `switch_to`, as `parallelize` would.
        plain = dataclasses.replace(
            self.config,
            compile=dataclasses.replace(self.config.compile, enable=False),
            activation_checkpoint=dataclasses.replace(self.config.activation_checkpoint, mode="none"),
        )
        self.model = build_model(plain, self.shape, self._ops(plain), self.degrees, world.device)
        compiled = compilation.optimizer_compiler(self.config.compile)
        self.optimizer = build_optimizer(self.model, self.config.optimizer, compiled)
        self.update = getattr(self.optimizer, "_update", None)
        self.recorded: RecordedPasses | None = None
        if world.size > 1:
            fake_world.use_copies(self.model)
            units = [self.model.blocks[0], self.model.blocks[-1]]
            fake_world.assert_gathers_real_weights(self.model, units)
        training = self.config.training
        source = RandomTokens(training.local_batch_size, training.seq_len, self.shape.vocab_size)
        self.loader = Loader(source, world.device)
        self.steps_done = 0
        self.good = torch.zeros((), device=world.device)
        self.loss = torch.zeros((), device=world.device)

    def _ops(self, config: Config) -> Ops:
        return build_ops(config.kernels, self.world.device, workload(config, self.shape, self.degrees))

    def what_runs(self, options: dict[str, Any]) -> object:
        """Equal for variants that come to the same code: where `auto` is the reference, it is not run twice."""
        config = config_of(self.cell.workload, options, self.smoke)
        choices = tuple((operator, choice) for operator, choice, _ in self._ops(config).reasons)
        return choices, config.kernels.carry_residual, dataclasses.replace(config, kernels=Kernels())

    def switch_to(self, config: Config) -> Ops:
        """Makes the model run as `config` says; its weights, moments and data go on."""
        parallel.check(config, self.shape, self.degrees, self.world.device)
        model, ops = self.model, self._ops(config)
        _unswitch(model)
        _give_operators(model, ops)
        model.head.loss = torch_linear_cross_entropy
        if config.loss.implementation == "chunked":
            model.head.loss = LinearCrossEntropy(ops, config.loss.chunk_size, config.loss.z_loss)
        activation_checkpoint.apply(model, config.activation_checkpoint)
        if config.compile.enable:
            compilation.compile_model(model, config.compile)
        if isinstance(self.optimizer, OnePassAdamW):
            # Without masters the class has nothing but its compiled update to offer; it stays.
            whole = config.compile.enable and "optimizer" in config.compile.components
            self.optimizer._update = self.update if whole or not _has_masters(model) else None
        self.recorded = RecordedPasses(model, CudaRecorder(self.world.device)) if config.training.cuda_graph else None
        self.config = config
        return ops

    def step(self) -> None:
        """One whole step: data, forward, loss over the full vocabulary, backward, clipping, AdamW. As titan_fast.loop
        does it, without what only looks at it."""
        batches = next(self.loader)
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
        if isinstance(module, (Norm, Attention, FeedForward, Block)):
            module.ops = ops
        if isinstance(module, Block):
            module.carry_residual = ops.carry_residual


@contextmanager
def world_of(cell: Cell, device: torch.device, smoke: bool) -> Iterator[World]:
    """The one process there is, or rank 0 of many."""
    if cell.workload.world == 1:
        with start(Comm(), device) as world:
            yield world
    else:
        with fake_world.fake_world(SMOKE_WORLD if smoke else cell.workload.world, device) as world:
            yield world


Rows = list[dict[str, Any]]
Save = Callable[[Rows], None]


@dataclasses.dataclass(frozen=True)
class How:
    """How a cell is run."""

    smoke: bool = False
    length: Length | None = None
    """None: by the duration of a step."""
    profiles: bool = True
    launched: float = 0.0
    """time.time() when the process was started."""
    save: Save = lambda rows: None
    """Called with all rows whenever there is more in them."""


def run_cell(cell: Cell, device: torch.device, how: How) -> Rows:
    """A row for each variant; one that fails has its error instead of figures, and where memory ran out the variants
    after it have no row: what is left behind may not be sound. launched: time.time() when the process was started."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    with world_of(cell, device, how.smoke) as world:
        if cell.parity_steps:
            return _compare_losses(cell, world, how)
        bench = Bench(cell, world, how.smoke)
        try:
            return _time_variants(bench, cell, how)
        finally:
            bench.close()


def _compare_losses(cell: Cell, world: World, how: How) -> Rows:
    """Losses of each variant from the same weights on the same data; the first variant's are what they are compared
    with: the largest relative difference of a step, and of the mean over the last tenth."""
    rows: Rows = []
    steps = how.length.timed if how.length is not None else cell.parity_steps
    expected = torch.empty(0)
    for variant in cell.variants:
        row: dict[str, Any] = {"variant": variant.name, "options": variant.options}
        rows.append(row)
        with failures_into(row):
            bench = Bench(dataclasses.replace(cell, variants=(variant,)), world, how.smoke)
            try:
                bench.switch_to(bench.config)
                losses = []
                for _ in range(steps):
                    bench.step()
                    losses.append(bench.loss)
            finally:
                bench.close()
            found = torch.stack(losses).double().cpu()
            expected = found if len(rows) == 1 else expected
            row["losses"] = [round(loss, 5) for loss in found.tolist()]
            if len(found) == len(expected):
                tail = max(1, steps // 10)
                row["parity"] = {
                    "steps": steps,
                    "largest": ((found - expected).abs() / expected).max().item(),
                    "last tenth": abs(found[-tail:].mean() / expected[-tail:].mean() - 1).item(),
                }
        how.save(rows)
    return rows


@dataclasses.dataclass
class _Running:
    """A variant that warmed up."""

    variant: Variant
    config: Config
    row: dict[str, Any]
    face: dict[str, Any]
    length: Length
    timed: Timed


def _time_variants(bench: Bench, cell: Cell, how: How) -> Rows:
    device = bench.world.device
    rows: Rows = []
    running: dict[str, _Running] = {}
    known: dict[object, str] = {}
    for variant in cell.variants:
        if rows and rows[-1].get("out_of_memory"):
            break
        row: dict[str, Any] = {"variant": variant.name, "options": variant.options}
        rows.append(row)
        with failures_into(row):
            same = bench.what_runs(variant.options)
            if same in known:
                row["same_as"] = known[same]
            else:
                running[variant.name] = _start(bench, variant, row, how, is_first=len(rows) == 1)
                known[same] = variant.name
        how.save(rows)
    for name, count in step_timing.turns(list(running), {name: r.length for name, r in running.items()}):
        one = running[name]
        if "error" in one.row:
            continue
        _put_on(bench, one)
        with failures_into(one.row):
            step_timing.run_block(bench.step, device, count, one.timed)
            one.row |= {"step_seconds": one.timed.as_json(), "peak_bytes": one.timed.peak_bytes}
            one.row["last_loss"] = bench.loss.item()
        how.save(rows)
    for row in rows:
        if "same_as" in row:
            other = running[row["same_as"]].row
            row |= {key: other[key] for key in ("step_seconds", "peak_bytes", "error") if key in other}
    how.save(rows)
    first = next(iter(running.values()), None)
    if how.profiles and first is not None and "error" not in first.row:
        _put_on(bench, first)
        with failures_into(first.row):
            first.row["profile"] = breakdown(bench.step, device)
        how.save(rows)
    return rows


def _start(bench: Bench, variant: Variant, row: dict[str, Any], how: How, is_first: bool) -> _Running:
    """Switches to `variant`, compiles and warms up."""
    device = bench.world.device
    config = config_of(bench.cell.workload, variant.options, bench.smoke)
    started = time.perf_counter()
    ops = bench.switch_to(config)
    row["choices"] = {operator: f"{choice}: {reason}" for operator, choice, reason in ops.reasons}
    bench.step()
    row["first_loss"] = bench.loss.item()
    row["first_step_seconds"] = time.perf_counter() - started

    def at_ten() -> None:
        row["seconds_to_step_10"] = time.time() - how.launched

    length, steps = step_timing.warm_up(bench.step, device, how.length, is_first, at_ten if is_first else None)
    return _Running(variant, config, row, _face(bench), length, Timed(warm_up=steps))


def _face(bench: Bench) -> dict[str, Any]:
    """Everything that `switch_to` set, to be put on again without compiling anew."""
    model = bench.model
    return {
        "compiled": [(m, m._compiled_call_impl) for m in (model, model.norm, *model.blocks)],
        "forwards": [(block, block.__dict__.get("forward")) for block in model.blocks],
        "ops": model.norm.ops,
        "loss": model.head.loss,
        "update": getattr(bench.optimizer, "_update", None),
        "budget": functorch_config.activation_memory_budget,
        "recorded": bench.recorded,
    }


def _put_on(bench: Bench, one: _Running) -> None:
    model, face = bench.model, one.face
    _unswitch(model)
    _give_operators(model, face["ops"])
    model.head.loss = face["loss"]
    for module, compiled in face["compiled"]:
        module._compiled_call_impl = compiled
    for block, forward in face["forwards"]:
        if forward is not None:
            block.forward = forward
    if isinstance(bench.optimizer, OnePassAdamW):
        bench.optimizer._update = face["update"]
    functorch_config.activation_memory_budget = face["budget"]
    bench.recorded = face["recorded"]
    bench.config = one.config


@contextmanager
def failures_into(row: dict[str, Any]) -> Iterator[None]:
    """A variant that cannot run here is a row that says so; the others go on."""
    try:
        yield
    except Exception as error:
        sentence = str(error).strip().splitlines() or [""]
        row["error"] = f"{type(error).__name__}: {sentence[0]}"[:500]
        row["out_of_memory"] = isinstance(error, torch.OutOfMemoryError)
