"""Traces are opened and searched for the step that they should contain; CUDA's snapshot calls are recorded."""

import gc
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerAction

from titan_fast.config import Profiling
from titan_fast.errors import ConfigError
from titan_fast.profiling import Profiler, check_profiling, memory_history

CPU = torch.device("cpu")


def run(profiler: Profiler, first: int, last: int) -> None:
    x = torch.randn(8, 8)
    with profiler:
        for step in range(first, last + 1):
            with torch.profiler.record_function(f"training step {step}."):
                x = x @ x.tanh()
            profiler.step()


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def trace_events(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


@pytest.mark.parametrize(("first", "last", "freq", "traced"), [(1, 14, 6, [6, 12]), (5, 9, 4, [8]), (2, 5, 2, [2, 4])])
def test_every_nth_step_is_traced(tmp_path: Path, first: int, last: int, freq: int, traced: list[int]) -> None:
    """Also if a run is resumed, and ends before or within a step that would be traced."""
    settings = Profiling(enable_profiling=True, profile_freq=freq)
    run(Profiler(settings, tmp_path, 0, start_step=first - 1), first, last)
    folder = tmp_path / "profile_traces"
    assert written(folder) == sorted(
        f"step-{s}/{name}" for s in traced for name in ("key_averages.txt", "rank-0.json.gz")
    )
    for step in traced:
        names = trace_events(folder / f"step-{step}" / "rank-0.json.gz")
        assert [name for name in names if name.startswith("training step")] == [f"training step {step}."]
        assert "aten::mm" in names
        assert "aten::mm" in (folder / f"step-{step}" / "key_averages.txt").read_text()


def test_a_trace_in_a_run_is_of_the_step_alone(data: Path, tmp_path: Path) -> None:
    """And not of the validation, the sample and the checkpoint that follow it, by default at the same steps."""
    profiles = {"profiling__enable_profiling": True, "profiling__profile_freq": 3, "checkpoint__interval": 3}
    runs.run(data, tmp_path / "run", **(runs.MEASURED | profiles | {"training__steps": 4}))
    names = trace_events(tmp_path / "run" / "profile_traces" / "step-3" / "rank-0.json.gz")
    assert names.count("_LinearCrossEntropy") == names.count("aten::embedding") == 1
    assert "Optimizer.step#AdamW.step" in names and "aten::multinomial" not in names


def test_the_three_steps_before_a_traced_one_warm_the_profiler_up(tmp_path: Path) -> None:
    profiler = Profiler(Profiling(enable_profiling=True, profile_freq=6), tmp_path, 0, start_step=1)
    actions = [profiler._schedule(index) for index in range(7)]  # of steps 2 to 8
    none, warms, records = ProfilerAction.NONE, ProfilerAction.WARMUP, ProfilerAction.RECORD_AND_SAVE
    assert actions == [none, warms, warms, warms, records, none, none]


def test_every_step(tmp_path: Path) -> None:
    run(Profiler(Profiling(enable_profiling=True, profile_freq=1), tmp_path, 0), 1, 3)
    for step in (1, 2, 3):
        names = trace_events(tmp_path / "profile_traces" / f"step-{step}" / "rank-0.json.gz")
        assert f"training step {step}." in names
    assert not (tmp_path / "profile_traces" / "step-4").exists()


def test_no_trace_but_the_last_stays_in_memory(tmp_path: Path) -> None:
    """In a run, which collects no garbage by itself, and none that is old."""
    profiler, events = Profiler(Profiling(enable_profiling=True, profile_freq=6), tmp_path, 0), []
    gc.collect()
    gc.disable()
    try:
        with profiler:
            for _ in range(24):
                torch.randn(8, 8).tanh()
                profiler.step()
                gc.collect(1)
                events.append(sum(type(x) is FunctionEvent for x in gc.get_objects()))
    finally:
        gc.enable()
    assert 0 < events[5] == events[23]


def test_other_ranks_write_their_trace_alone(tmp_path: Path) -> None:
    settings = Profiling(enable_profiling=True, profile_freq=4, save_traces_folder="elsewhere")
    run(Profiler(settings, tmp_path, 3), 1, 4)
    assert written(tmp_path) == ["elsewhere/step-4/rank-3.json.gz"]


def test_writing_is_a_pause(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []
    trace = tmp_path / "profile_traces" / "step-4" / "rank-0.json.gz"

    @contextmanager
    def pause() -> Iterator[None]:
        before = trace.exists()
        yield
        seen.append((before, trace.exists()))

    run(Profiler(Profiling(enable_profiling=True, profile_freq=4), tmp_path, 0, pause=pause), 1, 7)
    assert seen == [(False, True)]


def test_off_is_off(tmp_path: Path) -> None:
    run(Profiler(Profiling(profile_freq=1), tmp_path, 0), 1, 3)
    assert written(tmp_path) == []


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls to CUDA's allocator, which this machine need not have."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    return calls


def test_memory_snapshots(tmp_path: Path, snapshots: list[Any]) -> None:
    run(Profiler(Profiling(enable_memory_snapshot=True, profile_freq=2), tmp_path, 1, start_step=10), 11, 15)
    folder = tmp_path / "memory_snapshot"
    assert snapshots[0]["max_entries"] > 0 and snapshots[0]["stacks"] == "python"
    assert snapshots[1:3] == [str(folder / f"step-{step}" / "rank-1.pickle") for step in (12, 14)]
    assert snapshots[3:] == [{"enabled": None}]
    assert (folder / "step-12").is_dir()


@pytest.mark.parametrize(("error", "dumps"), [(torch.OutOfMemoryError, 1), (ValueError, 0)])
def test_memory_snapshot_when_memory_runs_out(
    tmp_path: Path, snapshots: list[Any], error: type[Exception], dumps: int
) -> None:
    profiler = Profiler(Profiling(enable_memory_snapshot=True, profile_freq=50), tmp_path, 0)
    with pytest.raises(error), profiler:
        profiler.step()
        profiler.at = 2
        raise error
    expected = str(tmp_path / "memory_snapshot" / "step-2-out-of-memory" / "rank-0.pickle")
    assert snapshots[1:-1] == [expected] * dumps
    assert snapshots[-1] == {"enabled": None}


def test_memory_snapshot_of_the_dry_step(tmp_path: Path, snapshots: list[Any]) -> None:
    """In which memory runs out by default if there is not enough."""
    wanted = Profiling(enable_memory_snapshot=True)
    with pytest.raises(torch.OutOfMemoryError), memory_history(wanted, tmp_path, 0, lambda: "dry-step"):
        raise torch.OutOfMemoryError
    assert snapshots[1:-1] == [str(tmp_path / "memory_snapshot" / "dry-step-out-of-memory" / "rank-0.pickle")]
    assert snapshots[-1] == {"enabled": None}


def test_snapshots_without_cuda_are_refused() -> None:
    with pytest.raises(ConfigError, match="enable_memory_snapshot records CUDA's allocator, and this run is on cpu"):
        check_profiling(Profiling(enable_memory_snapshot=True), CPU)
    check_profiling(Profiling(enable_memory_snapshot=True), torch.device("cuda"))
    check_profiling(Profiling(enable_profiling=True), CPU)


@pytest.mark.gpu
def test_memory_snapshot_on_a_gpu(tmp_path: Path) -> None:
    profiler = Profiler(Profiling(enable_memory_snapshot=True, enable_profiling=True, profile_freq=1), tmp_path, 0)
    with profiler:
        torch.ones(1 << 20, device="cuda").sum().item()
        profiler.step()
    assert (tmp_path / "memory_snapshot" / "step-1" / "rank-0.pickle").stat().st_size > 0
    assert (tmp_path / "profile_traces" / "step-1" / "key_averages.txt").exists()


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile_traces").touch()  # a file where the folder should be
    run(Profiler(Profiling(enable_profiling=True, profile_freq=2), tmp_path, 0), 1, 4)
    assert [record.message.partition(" cannot")[0] for record in caplog.records] == [
        f"WARNING: {tmp_path}/profile_traces/step-{step}" for step in (2, 4)
    ]
