"""A training run from top to bottom: set up, build, parallelize, resume, loop."""

import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from titan_fast import (
    canary,
    checkpointer,
    compilation,
    direct_fsdp,
    distributed,
    dry_step,
    float8,
    out_of_memory,
    parallel,
    run_history,
    versions,
)
from titan_fast.agreement import Agreed, Agreement
from titan_fast.checkpoint import Progress, gather_data_state, own_data_state
from titan_fast.checkpointer import Checkpointer
from titan_fast.compile_report import CompileReport
from titan_fast.config import Config, MeshDegrees, grad_accum_steps, mesh_degrees, model_shape, tokens_per_step
from titan_fast.cuda_graph import CudaRecorder, RecordedPasses
from titan_fast.data import DataRank, build_loader, build_tokenizer, build_validation_loader
from titan_fast.data import check as check_data
from titan_fast.distributed import World
from titan_fast.errors import CheckpointError
from titan_fast.generate import Sampling, generate_text
from titan_fast.guard import StepGuard
from titan_fast.initial_weights import load_initial_weights
from titan_fast.masters import masters_as_weights
from titan_fast.metrics import MetricsLogger
from titan_fast.ops import Ops, build_ops
from titan_fast.optim import build_optimizer, clip_gradients, learning_rate, step_unless
from titan_fast.profiling import Profiler, check_profiling, memory_history
from titan_fast.run_directory import is_new, open_run_directory, write_config
from titan_fast.run_lock import locked
from titan_fast.signals import StopRequest, resume_command
from titan_fast.start_times import StartTimes
from titan_fast.startup import logged_to_console, set_determinism, startup_lines
from titan_fast.step import build_model, forward_backward, one_over_valid_tokens, validation_loss, workload
from titan_fast.watchdog import Limit, Watchdog


def train(config: Config, start: StartTimes | None = None) -> None:
    """Runs `config` to its last step. Whatever can be refused is refused before there is a process group. start: the
    times so far, of a start that began before this call."""
    start = start or StartTimes()
    degrees = mesh_degrees(config.parallelism, distributed.world_size())
    grad_accum_steps(config.training, degrees.data)
    device = distributed.local_device()
    check_profiling(config.profiling, device)
    shape = model_shape(config.model)
    parallel.check(config, shape, degrees, device)
    compilation.check_machine(config.compile, device)
    float8.check_device(config.float8, device)
    set_determinism(config.debug)
    ops = build_ops(config.kernels, device, workload(config, shape, degrees))
    checkpointer.check(config, device)
    run_dir = open_run_directory(config)
    warnings: list[str] = []
    if distributed.is_main_process():
        dtypes = parallel.precision(config.training, device)
        saved_bytes = parallel.saved_bytes(config, degrees.data * degrees.tensor, dtypes)
        warnings = checkpointer.check_start(config, run_dir, saved_bytes)
        check_data(config)
    start.lap("checks")
    with (
        StopRequest() as stop,
        locked(config, run_dir) if distributed.is_main_process() else nullcontext(lambda: None) as check_locks,
        logged_to_console(distributed.is_main_process()),
        distributed.start(config.comm, device) as world,
        out_of_memory.explained(config, shape, degrees, device),
    ):
        if world.is_main and is_new(config, run_dir):
            write_config(config, run_dir)
        start.lap("process group")
        run = Run(config, degrees, world, run_dir, ops, check_locks, start, stop)
        for warning in warnings:
            run.checkpointer.note(warning)
        run.train()


def _is_due(step: int, steps: int, every: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


class Run:
    """One run: what it is built of, and the loop over its steps."""

    def __init__(
        self,
        config: Config,
        degrees: MeshDegrees,
        world: World,
        run_dir: Path,
        ops: Ops,
        check_locks: Callable[[], None],
        start: StartTimes,
        stop: StopRequest,
    ) -> None:
        self.config, self.degrees, self.world, self.run_dir, self.ops = config, degrees, world, run_dir, ops
        self.start, self.stop = start, stop
        self.shape = model_shape(config.model)
        device = world.device
        compilation.keep_code(config.compile, degrees.tensor)
        self.compile_report = CompileReport()
        canary.check(config, self.shape, ops, degrees, device)
        start.lap("compiled gradients")
        self.model = build_model(config, self.shape, ops, degrees, device)
        distributed.limit_collectives(world, config.comm)
        direct_fsdp.check(self.model, device)
        self.optimizer = build_optimizer(self.model, config.optimizer, compilation.optimizer_compiler(config.compile))
        start.lap("model")
        if dry_step.is_wanted(config, device):
            with memory_history(config.profiling, run_dir, world.rank, lambda: "dry-step"):
                dry_step.take(self.model, self.optimizer, config, degrees, device)
        start.lap("dry step")
        self.dp_rank = world.rank // degrees.tensor
        rank = DataRank(run_dir, device, self.dp_rank, degrees.data, world.is_main, world.barrier)
        self.tokenizer = build_tokenizer(config, rank)
        start.lap("tokenizer")
        self.loader = build_loader(config, self.tokenizer, rank)
        self.validation_loader = build_validation_loader(config, self.tokenizer, rank)
        start.lap("data")
        self.checkpointer = Checkpointer(config, run_dir, world, self.tokenizer, check_locks)
        self.progress = self._resume()
        self.checkpointer.begin()
        start.lap("checkpoint")
        if world.is_main:
            write_config(config, run_dir)
        self.first_step = self.progress.step + 1
        self.metrics = MetricsLogger(
            config,
            run_dir=run_dir,
            is_main=world.is_main,
            shape=self.shape,
            device=device,
            n_devices=world.size,
            tokens_per_step=tokens_per_step(config.training, self.degrees.data),
            start_step=self.progress.step,
            tokens_seen=self.progress.tokens_seen,
            elapsed_before=self.progress.elapsed_seconds,
            went_back=self.checkpointer.goes_back,
            began=start.began,
        )
        self.recorded = RecordedPasses(self.model, CudaRecorder(device)) if config.training.cuda_graph else None
        skipped = run_history.not_applied(run_dir) if world.is_main else 0
        self.guard = StepGuard(config.training, device, run_dir, world.is_main, skipped)
        self.agreement = Agreement(device)
        limit = Limit(config.comm.timeout_seconds, "comm.timeout_seconds")
        self.watchdog = Watchdog(world, limit, self.metrics.say, self.metrics.write_down)
        self.patience = Limit(config.comm.init_timeout_seconds, "comm.init_timeout_seconds")
        self.save_is_owed = False  # a save was due after a step that was not applied, and is made up for

    def _resume(self) -> Progress:
        found = self.checkpointer.load(self.model, self.optimizer) if self.config.checkpoint.enable else None
        if found is None:
            self._load_initial_weights()
            return Progress()
        try:
            self.loader.load_state_dict(own_data_state(found.data, self.dp_rank, self.degrees.data))
        except CheckpointError as error:
            if self.config.checkpoint.data_state == "exact":
                raise
            self.checkpointer.note(f"the data begins again, by checkpoint.data_state: {error.what}")
        measures = self.validation_loader.fingerprint if self.validation_loader is not None else None
        if measures is not None and found.validation not in (None, measures):
            self.checkpointer.note(
                "WARNING: the text of validation is another than before; its losses are not to be compared with those "
                f"up to step {found.step}"
            )
        return found

    def _load_initial_weights(self) -> None:
        checkpoint = self.config.checkpoint
        if checkpoint.initial_load_path is not None:
            path = Path(checkpoint.initial_load_path)
            with masters_as_weights(self.model):
                said = load_initial_weights(
                    self.model, path, self.shape, checkpoint.initial_load_changes, self.tokenizer
                )
            self.checkpointer.note(said)

    def train(self) -> None:
        """From the step after the last saved one to the last of all."""
        config, device = self.config, self.world.device
        data = self.loader.describe()
        code = versions.describe(versions.code_version()) if self.world.is_main else ""
        lines = startup_lines(
            config, self.shape, self.degrees, device, self.tokenizer, data, self.ops, self.progress, code
        )
        self.start.lap("rest")
        self.metrics.start([*lines, ("start", self.start.describe())])
        self._say_notes()
        if config.compile.takes("optimizer") or (config.compile.enable and not dry_step.is_wanted(config, device)):
            self.metrics.say("the first step compiles what is left to compile")
        if self.first_step > self.config.training.steps:
            self.metrics.say(f"step {self.progress.step} was the last one already: raise training.steps to go on")
        gc.disable()
        self.stop.listen()
        with self.watchdog:
            stopped = self._train_watched()
            if stopped:
                saved = f"to go on: {resume_command()}"
                if not config.checkpoint.enable:
                    saved = "nothing was saved, for checkpoint.enable is False"
                self.metrics.say(f"stopped by {self.stop.received or 'a signal to another rank'}; {saved}")
            self.world.barrier()  # a launcher may end all hosts when the first is done, while rank 0 is still busy

    def _train_watched(self) -> bool:
        """All steps, and the end of everything that the run has open. True where a signal has stopped it."""
        stopped, failed = False, True
        try:
            with (
                self._closed_at_the_end(),
                Profiler(
                    self.config.profiling,
                    self.run_dir,
                    self.world.rank,
                    start_step=self.progress.step,
                    pause=self.metrics.pause,
                ) as profiler,
            ):
                if self._owes_validation():
                    self.validate(self.progress.step)
                for step in range(self.first_step, self.config.training.steps + 1):
                    stopped = self._one_step(step, profiler)
                    if stopped:
                        break
                else:
                    self.sample(self.progress.step)
            failed = False
            self.watchdog.at(self.progress.step, "end", self.patience)
        finally:
            gc.enable()
            self._say_notes()
            self.compile_report.close()
            self.guard.close()
            self.metrics.finish(failed, self.progress.step, self.progress.tokens_seen)
        return stopped

    @contextmanager
    def _closed_at_the_end(self) -> Iterator[None]:
        """Ends the threads that read and save, while the run still has its watchdog, its lock and its process group."""
        try:
            yield
        except BaseException as error:
            self.metrics.write_down(f"ended by {type(error).__name__}: {error}")
            self.watchdog.ends(error, self._save_limit())
            raise
        finally:
            self.loader.close()
            self.checkpointer.close()

    def _one_step(self, step: int, profiler: Profiler) -> bool:
        """A step, and what is due after it, which `profiler` does not see. True where the ranks have agreed to stop
        before the last step, and have saved."""
        config, started, compiled = self.config, time.perf_counter(), self.compile_report.seconds
        profiler.at = step
        last = step == config.training.steps
        due = functools.partial(_is_due, step, config.training.steps)
        loss, norm, rate, agreed = self.step(step)
        stops = agreed.stop and not last
        self.checkpointer.step_seconds = time.perf_counter() - started
        if step == self.first_step:
            self._after_first_step(started, compiled)
        profiler.step()
        for line in self.compile_report.again(step, self.first_step):
            self.metrics.say(line)
        must_save = last or stops
        saves = config.checkpoint.enable and (
            must_save or agreed.save or self.save_is_owed or due(config.checkpoint.interval)
        )
        logs = due(config.metrics.log_freq) or step == self.first_step or stops
        # To look at the outcome the host must wait for the GPU, so it looks only when it waits anyway.
        if saves or logs or self.world.device.type == "cpu":
            for line in self.guard.look():
                self.metrics.say(line)
        if logs:
            self.metrics.log(
                step,
                loss=loss.item(),
                grad_norm=norm.item(),
                lr=rate,
                tokens_seen=self.progress.tokens_seen,
                data_wait_seconds=self.loader.wait_seconds,
                data=self.loader.position(),
                extra=self._extra_metrics(),
            )
        validates = self.validation_loader is not None and due(config.validation.freq) and not stops
        hurries = last and agreed.stop  # then the save comes first: whoever sent the signal may not wait
        if validates and not hurries:
            self.validate(step)
        if not last and due(config.metrics.sample_freq) and not stops:
            self.sample(step)
        if agreed.save_failed:
            self._watch_save(step)
            self.checkpointer.settle()
        self.save_is_owed = saves and self.guard.last_was_bad and not must_save
        if saves and not self.save_is_owed:
            self.save(must_save)
        if validates and hurries:
            self.validate(step)
        self._say_notes()
        if step % config.training.gc_freq == 0:
            gc.collect(1)
        return stops

    def step(self, step: int) -> tuple[Tensor, Tensor, float, Agreed]:
        """One optimizer step: the global batch's loss and the gradient's norm (both on the device), the learning rate,
        and what the ranks have agreed on."""
        at, checkpoints = self.watchdog.at, self.checkpointer
        limit = self.patience if step == self.first_step else None
        at(step, "data", limit)
        batches = next(self.loader)
        at(step, "forward and backward", limit)
        scale = one_over_valid_tokens(batches, self.degrees)
        total = self.recorded(batches, scale) if self.recorded else forward_backward(self.model, batches, scale)
        at(step, "gradient norm", limit)
        shared = self.agreement.ask(total, self.stop.received is not None, checkpoints.is_time, checkpoints.has_failed)
        norm = clip_gradients(self.optimizer, self.config.training.max_norm, total, shared)
        agreed = self.agreement.answer(shared)
        at(step, "optimizer", limit)
        loss = shared[0] / self.degrees.tensor
        skips = self.guard.judge(step, self.loader.position(), loss, norm)
        rate = learning_rate(step, self.config.lr_scheduler, self.config.optimizer.lr, self.config.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        step_unless(self.optimizer, skips)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step = step
        self.progress.tokens_seen += tokens_per_step(self.config.training, self.degrees.data)
        return loss, norm, rate, agreed

    def _extra_metrics(self) -> dict[str, float]:
        """Numbers that only some log lines have."""
        stall = self.checkpointer.take_stall_seconds()
        extra = {"checkpoint_stall_seconds": stall, "skipped_steps": self.guard.skipped}
        return {name: value for name, value in extra.items() if value}

    def _owes_validation(self) -> bool:
        """Whether validation was due after the step that the run continues from, but the process before this one was
        stopped or killed before it. The same on every rank."""
        step, settings = self.progress.step, self.config.validation
        if step == 0 or self.validation_loader is None or not _is_due(step, self.config.training.steps, settings.freq):
            return False
        owes = torch.tensor(int(self.world.is_main and not self.metrics.has_validation(step)), device=self.world.device)
        dist.broadcast(owes, 0)
        return bool(owes)

    def validate(self, step: int) -> None:
        """The mean loss over `validation.steps` batches of held-out text, the same ones every time."""
        assert self.validation_loader is not None
        self.watchdog.at(step, "validation", self.patience)
        with self.metrics.pause():
            self.validation_loader.reset()
            loss = validation_loss(self.model, self.validation_loader, self.config.validation.steps, self.degrees)
        self.metrics.validation(step, loss)
        self.compile_report.expect()

    def sample(self, step: int) -> None:
        """A text from the model as it is now. Every rank takes part: each holds only its shards."""
        prompt, length = self.config.metrics.sample_prompt, self.config.metrics.sample_tokens
        if not prompt:
            return
        if self.degrees.tensor > 1:  # it shards sequences, and a sequence of one token cannot be sharded
            self.metrics.say("no sample: text is generated without tensor parallelism, by titan_fast.generate")
            return
        self.watchdog.at(step, "sample", self.patience)
        with self.metrics.pause(), torch.compiler.set_stance("force_eager"):
            text = generate_text(
                self.model, self.tokenizer, prompt, length, Sampling(seed=self.config.debug.seed), self.world.device
            )
        parallel.free_gathered_weights(self.model)
        self.metrics.sample(step, text)

    def save(self, must_succeed: bool) -> None:
        """A checkpoint of this moment."""
        if self.checkpointer.saved_step == self.progress.step:
            return
        self._watch_save(self.progress.step)
        with self.metrics.pause():
            self.progress.data = gather_data_state(self.loader.state_dict(), self.world)
            if self.validation_loader is not None:
                self.progress.validation = self.validation_loader.fingerprint
            self.progress.elapsed_seconds = self.metrics.elapsed_seconds
            begins = functools.partial(self._watch_save, self.progress.step)  # each save has the limit to itself
            self.checkpointer.save(self.model, self.optimizer, self.progress, must_succeed, begins)

    def _watch_save(self, step: int) -> None:
        self.watchdog.at(step, "checkpoint", self._save_limit())

    def _save_limit(self) -> Limit:
        return Limit(self.config.checkpoint.save_timeout_seconds, "checkpoint.save_timeout_seconds")

    def _say_notes(self) -> None:
        for note in self.checkpointer.notes():
            self.metrics.say(note)

    def _after_first_step(self, started: float, compiled: float) -> None:
        if self.config.compile.enable:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            self.metrics.say(self.compile_report.summary(compiled, seconds))
