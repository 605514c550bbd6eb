"""A training run from top to bottom: set up, build, parallelize, resume, loop."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_fast import config as settings
from titan_fast import distributed, parallel
from titan_fast.checkpoint import Progress, gather_data_state, own_data_state
from titan_fast.checkpointer import Checkpointer
from titan_fast.config import Config, MeshDegrees, grad_accum_steps, mesh_degrees, model_shape
from titan_fast.data import build_loader, build_tokenizer, build_validation_loader
from titan_fast.distributed import World
from titan_fast.errors import NumericsError
from titan_fast.generate import Sampling, generate_text
from titan_fast.metrics import MetricsLogger
from titan_fast.ops import Ops, build_ops
from titan_fast.optim import build_optimizer, clip_grad_norm_, learning_rate, step_unless
from titan_fast.parallel import graphs_compiled
from titan_fast.profiling import Profiler, check_profiling
from titan_fast.run_directory import open_run_directory, write_config
from titan_fast.startup import startup_lines
from titan_fast.step import build_model, forward_backward, one_over_valid_tokens, summed_loss, workload


def train(config: Config) -> None:
    """Runs `config` to its last step. What can be refused is refused before there is a process group."""
    degrees = mesh_degrees(config.parallelism, distributed.world_size())
    grad_accum_steps(config.training, degrees.data)
    device = distributed.local_device()
    check_profiling(config.profiling, device)
    shape = model_shape(config.model)
    parallel.check(config, shape, degrees, device)
    ops = build_ops(config.kernels, device, workload(config, shape, degrees))
    run_dir = open_run_directory(config)
    with distributed.start(config.comm, device) as world:
        if world.is_main:
            write_config(config, run_dir)
        set_determinism(config.debug)
        Run(config, degrees, world, run_dir, ops).train()


def set_determinism(debug: settings.Debug) -> None:
    """Seeds torch, and with `debug.deterministic` allows deterministic algorithms only."""
    torch.manual_seed(debug.seed)
    if debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


class Run:
    """One run: what it is built of, and the loop over its steps."""

    def __init__(self, config: Config, degrees: MeshDegrees, world: World, run_dir: Path, ops: Ops) -> None:
        self.config, self.degrees, self.world, self.run_dir, self.ops = config, degrees, world, run_dir, ops
        self.shape = model_shape(config.model)
        self.tokenizer = build_tokenizer(config, run_dir, self.shape.vocab_size, world.is_main, world.barrier)
        self.loader = self._data(build_loader)
        self.validation_loader = self._data(build_validation_loader) if config.validation.enable else None
        self.model = build_model(config, self.shape, ops, degrees, world.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.checkpointer = Checkpointer(config, run_dir, world, self.tokenizer.path)
        self.progress = self._resume()
        self.first_step = self.progress.step + 1
        self.metrics = MetricsLogger(
            config,
            run_dir=run_dir,
            is_main=world.is_main,
            shape=self.shape,
            device=world.device,
            n_devices=world.size,
            tokens_per_step=self.sequences_per_step() * config.training.seq_len,
            start_step=self.progress.step,
            tokens_seen=self.progress.tokens_seen,
            elapsed_before=self.progress.elapsed_seconds,
        )
        # The first step whose gradient was not finite, 0 for none; from it on, no step changes anything.
        self.first_bad_step = torch.zeros((), device=world.device)
        self.unchecked: dict[int, dict[str, Any]] = {}  # step -> data position, until the host has looked at the step

    def sequences_per_step(self) -> int:
        training = self.config.training
        return training.local_batch_size * self.degrees.data * grad_accum_steps(training, self.degrees.data)

    def _data(self, build: Callable[..., Any]) -> Any:
        return build(
            self.config,
            self.tokenizer,
            vocab_size=self.shape.vocab_size,
            dp_rank=self.world.rank // self.degrees.tensor,
            dp_degree=self.degrees.data,
            device=self.world.device,
            run_dir=self.run_dir,
            is_main=self.world.is_main,
            barrier=self.world.barrier,
        )

    def _resume(self) -> Progress:
        found = self.checkpointer.load(self.model, self.optimizer) if self.config.checkpoint.enable else None
        if found is None:
            return Progress()
        self.loader.load_state_dict(
            own_data_state(found.data, self.world.rank // self.degrees.tensor, self.degrees.data)
        )
        return found

    def train(self) -> None:
        """From the step after the last saved one to the last of all."""
        self.metrics.start(
            startup_lines(
                self.config,
                self.shape,
                self.degrees,
                self.world.device,
                self.tokenizer,
                self.loader.describe(),
                self.ops,
                self.progress,
            )
        )
        self._say_notes()
        if self.first_step > self.config.training.steps:
            self.metrics.say(f"step {self.progress.step} was the last one already: raise training.steps to go on")
        gc.disable()
        try:
            with Profiler(
                self.config.profiling,
                self.run_dir,
                self.world.rank,
                start_step=self.progress.step,
                pause=self.metrics.pause,
            ) as profiler:
                for step in range(self.first_step, self.config.training.steps + 1):
                    self._one_step(step)
                    profiler.step()
            self.sample(self.progress.step)
        finally:
            gc.enable()
            self.loader.close()
            self.metrics.finish()

    def _one_step(self, step: int) -> None:
        """A step, and what is due after it."""
        config, started = self.config, time.perf_counter()
        last = step == config.training.steps

        def due(every: int) -> bool:
            return last or (every > 0 and step % every == 0)

        loss, norm, rate = self.step(step)
        if step == self.first_step:
            self._after_first_step(started)
        # Looking at the outcome waits for a GPU, so there it is done where the host waits anyway.
        looks = due(config.metrics.log_freq) or due(config.checkpoint.interval) or step == self.first_step
        if looks or self.world.device.type == "cpu":
            self._check_finite()
        if due(config.metrics.log_freq) or step == self.first_step:
            self.metrics.log(
                step,
                loss=summed_loss(loss, self.degrees).item(),
                grad_norm=norm.item(),
                lr=rate,
                tokens_seen=self.progress.tokens_seen,
                data_wait_seconds=self.loader.wait_seconds,
            )
        if self.validation_loader is not None and due(config.validation.freq):
            self.validate(step)
        if not last and due(config.metrics.sample_freq):
            self.sample(step)
        if config.checkpoint.enable and due(config.checkpoint.interval):
            self.save()
        if step % config.training.gc_freq == 0:
            gc.collect(1)

    def step(self, step: int) -> tuple[Tensor, Tensor, float]:
        """One optimizer step: this rank's part of the loss, the gradient's norm (both on the device), and the
        learning rate."""
        batches = next(self.loader)
        self.unchecked[step] = self.loader.position()
        total = forward_backward(self.model, batches, one_over_valid_tokens(batches, self.degrees))
        norm = clip_grad_norm_(self.model.parameters(), self.config.training.max_norm, total)
        bad = ~torch.isfinite(norm) & (self.first_bad_step == 0)
        self.first_bad_step = torch.where(bad, float(step), self.first_bad_step)
        rate = learning_rate(step, self.config.lr_scheduler, self.config.optimizer.lr, self.config.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        step_unless(self.optimizer, (self.first_bad_step != 0).float())
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step = step
        self.progress.tokens_seen += self.sequences_per_step() * self.config.training.seq_len
        return total, norm, rate

    def _check_finite(self) -> None:
        """Stops the run where a gradient was not finite; the weights are still those of the step before it."""
        step = int(self.first_bad_step.item())
        if step:
            raise NumericsError(
                f"the loss or the gradient of step {step} is not finite, and was not applied",
                f"the newest checkpoint in {self.checkpointer.folder} is sound; look at the data there, lower "
                "optimizer.lr or clip harder",
                where=f"step {step}, data {self.unchecked[step]}",
            )
        self.unchecked.clear()

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """The mean loss over `validation.steps` batches of held-out text, the same ones every time."""
        assert self.validation_loader is not None
        with self.metrics.pause():
            self.validation_loader.reset()
            total = torch.zeros((), device=self.world.device)
            for _ in range(self.config.validation.steps):
                batches = next(self.validation_loader)
                scale = one_over_valid_tokens(batches, self.degrees)
                for batch in batches:
                    total += self.model(batch.tokens, batch.labels, scale)
            loss = summed_loss(total, self.degrees).item() / self.config.validation.steps
        self.metrics.validation(step, loss)

    def sample(self, step: int) -> None:
        """A text from the model as it is now. Every rank takes part: each holds only its shards."""
        prompt, length = self.config.metrics.sample_prompt, self.config.metrics.sample_tokens
        if not prompt:
            return
        if self.degrees.tensor > 1:  # which cuts sequences, and a sequence of one token cannot be cut
            self.metrics.say("no sample: text is generated without tensor parallelism, by titan_fast.generate")
            return
        with self.metrics.pause(), torch.compiler.set_stance("force_eager"):
            text = generate_text(
                self.model, self.tokenizer, prompt, length, Sampling(seed=self.config.debug.seed), self.world.device
            )
        self.metrics.sample(step, text)

    def save(self) -> None:
        """A checkpoint of this moment."""
        with self.metrics.pause():
            self.progress.data = gather_data_state(self.loader.state_dict(), self.world)
            self.progress.elapsed_seconds = self.metrics.elapsed_seconds
            self.checkpointer.save(self.model, self.optimizer, self.progress)
        self._say_notes()

    def _say_notes(self) -> None:
        for note in self.checkpointer.notes():
            self.metrics.say(note)

    def _after_first_step(self, started: float) -> None:
        distributed.set_timeout(self.config.comm.timeout_seconds)
        if self.config.compile.enable:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            self.metrics.say(f"compiled {graphs_compiled()} graphs; the first step took {seconds:.1f} s with that")
