"""Traces of single steps by torch.profiler, and snapshots of CUDA's memory.

<run directory>/profile_traces/step-100/rank-0.json.gz      one training step; open it in https://ui.perfetto.dev
<run directory>/profile_traces/step-100/key_averages.txt    rank 0's operators by the time they took
<run directory>/memory_snapshot/step-100/rank-0.pickle      drop it on https://docs.pytorch.org/memory_viz
<run directory>/memory_snapshot/step-123-out-of-memory/...  the same when memory ran out in step 123
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from titan_fast.config import Profiling
from titan_fast.errors import ConfigError

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3  # profiled and thrown away: the profiler's own start is slow
SNAPSHOT_EVENTS = 100_000  # allocations and frees, the newest


def check_profiling(profiling: Profiling, device: torch.device) -> None:
    """ConfigError where `device` cannot do what `profiling` asks for."""
    if profiling.enable_memory_snapshot and device.type != "cuda":
        raise ConfigError(
            f"profiling.enable_memory_snapshot records CUDA's allocator, and this run is on {device.type}",
            "turn it off, or run on a GPU",
        )


class Profiler:
    """Around the loop, with `step()` after every step, before whatever follows it (validation, samples, checkpoints);
    every `profile_freq`th step is traced.

    A step that is traced is slower than others, and its log line shows that.
    """

    def __init__(
        self,
        profiling: Profiling,
        run_dir: Path,
        rank: int,
        *,
        start_step: int = 0,
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """start_step: where a resumed run goes on. pause: entered while files are written, to keep that out of the
        training time (MetricsLogger.pause)."""
        self.profiling, self.rank, self.pause = profiling, rank, pause
        self.traces = run_dir / profiling.save_traces_folder
        self.snapshots = run_dir / profiling.save_memory_snapshot_folder
        self.start_step = self.steps_done = start_step
        self.at = start_step + 1
        """The step that is running, or that was the last. Set by the caller, for the name of a snapshot."""
        self._in_traced_step = False
        self._profile = self._build() if profiling.enable_profiling else None
        self._history = memory_history(profiling, run_dir, rank, lambda: f"step-{self.at}")

    def _build(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        return profile(
            activities=activities, schedule=self._schedule, on_trace_ready=self._trace_ready, record_shapes=True
        )

    def _schedule(self, index: int) -> ProfilerAction:
        """What the profiler does during this process's step number `index`, counted from 0."""
        steps_left = -(self.start_step + index + 1) % self.profiling.profile_freq
        if steps_left == 0:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.WARMUP if steps_left <= WARM_UP_STEPS else ProfilerAction.NONE

    def _trace_ready(self, trace: profile) -> None:
        if self._in_traced_step:  # otherwise the run ended within a step to be traced, and the trace is empty
            self._write_trace(trace)

    def __enter__(self) -> "Profiler":
        self._history.__enter__()
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()
        self._history.__exit__(kind, error, traceback)

    def step(self) -> None:
        """A step is over."""
        self.steps_done += 1
        due = self.steps_done % self.profiling.profile_freq == 0
        if self._profile is not None:
            self._in_traced_step = due
            with self.pause() if due else nullcontext():
                self._profile.step()  # which calls _trace_ready where a trace is due
                if due:
                    gc.collect()  # a trace's events form cycles, old enough that the loop's collections miss them
            self._in_traced_step = False
        if self.profiling.enable_memory_snapshot and due:
            with self.pause():
                _write_snapshot(self.snapshots / f"step-{self.steps_done}", self.rank)

    def _write_trace(self, trace: profile) -> None:
        folder = self.traces / f"step-{self.steps_done}"
        with _not_ending_the_run(folder):
            folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(folder / f"rank-{self.rank}.json.gz"))
            if self.rank == 0:
                key = "self_cuda_time_total" if ProfilerActivity.CUDA in trace.activities else "self_cpu_time_total"
                table = trace.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=80)
                (folder / "key_averages.txt").write_text(table, encoding="utf-8")


@contextmanager
def memory_history(profiling: Profiling, run_dir: Path, rank: int, where: Callable[[], str]) -> Iterator[None]:
    """Records CUDA's allocations, if `[profiling]` asks for that. When memory runs out inside, they are written under
    the name that `where` returns."""
    if not profiling.enable_memory_snapshot:
        yield
        return
    # Python's frames only: others have seen naming those of C++ take minutes per snapshot, or fail.
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS, stacks="python")
    try:
        yield
    except torch.OutOfMemoryError:
        _write_snapshot(run_dir / profiling.save_memory_snapshot_folder / f"{where()}-out-of-memory", rank)
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _write_snapshot(folder: Path, rank: int) -> None:
    with _not_ending_the_run(folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(folder / f"rank-{rank}.pickle"))


@contextmanager
def _not_ending_the_run(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's own writers raise the latter
        logger.warning(f"WARNING: {folder} cannot be written: {error}; the run goes on without it")
