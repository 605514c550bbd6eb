"""Kills, signals, full disks, NaNs, hangs, slow ranks, two runs at once: their effects on real runs."""

import errno
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs
import torch
from children import CHILDREN, run_silently
from torchrun import start

from titan_fast import (
    checkpoint_command,
    checkpointer,
    dry_step,
    estimate,
    guard,
    hf,
    loop,
    manifest,
    out_of_memory,
    run_history,
    run_lock,
    signals,
    watchdog,
)
from titan_fast.checkpoint import tensors_of
from titan_fast.config import mesh_degrees, model_shape, parse, sequences_per_step
from titan_fast.errors import CheckpointError, ConfigError, NumericsError
from titan_fast.out_of_memory import OutOfMemory
from titan_fast.run_lock import NAME as LOCK
from titan_fast.run_lock import SILENT_SECONDS, RunLock, locked
from titan_fast.signals import resume_command, seconds_to_stop

pytestmark = pytest.mark.timeout(600)


def start_interpreters(
    processes: int, data: Path, folder: Path, faults: list[dict[str, Any]], flags: tuple[str, ...] = (), **changes: Any
) -> "subprocess.Popen[str]":
    """Like `start`, with the user's command."""
    return runs.torchrun(
        processes, *flags, str(runs.FAULTS), *runs.arguments(data, folder, **changes),
        env={"FAULTS": json.dumps(faults)},
    )  # fmt: skip


def whole_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints; every one must verify."""
    found = manifest.checkpoints(folder / "checkpoint")
    assert {step: manifest.problem(path) for step, path in found.items()} == dict.fromkeys(found)
    return list(found)


def newest_step(folder: Path) -> int:
    """Of the published checkpoints, unverified. A log may be ahead of them: it has steps that a kill undid."""
    return max(manifest.checkpoints(folder / "checkpoint"), default=0)


# Kills


def killed_at_random(data: Path, tmp_path: Path, times: int, seed: int) -> list[str]:
    """Two ranks that save after every step are killed `times` times, one or both, at a random moment of training; each
    start must resume from the newest published step. Then they finish, three steps later."""
    chance, folder, log = random.Random(seed), tmp_path / "killed", []
    more: dict[str, Any] = {"training__steps": 200 * times, "checkpoint__interval": 1, "checkpoint__keep_latest_k": 2}
    more |= {"lr_scheduler__total_steps": 200 * times}
    for _ in range(times):
        before = max(whole_steps(folder), default=0)
        process = start(2, data, folder, [], **more)
        runs.wait_for(lambda before=before: newest_step(folder) > before)
        time.sleep(chance.uniform(0, 0.6))
        workers = children(process.pid)
        chosen = workers if chance.random() < 0.5 else [chance.choice(workers)]
        for worker in chosen:
            os.kill(worker, signal.SIGKILL)
        output = runs.finish(process)
        if before:
            assert f"after step {before:,}," in output, output
        torn = [path.name for path in (folder / "checkpoint").glob(".*")]
        log.append(f"{len(chosen)} killed, {max(whole_steps(folder), default=0)} published, left {torn}")
    last = newest_step(folder) + 3
    more["training__steps"] = last
    process = start(2, data, folder, [], **more)
    output = runs.finish(process)
    assert process.returncode == 0, output
    assert not list((folder / "checkpoint").glob(".*")), "what the kills left is cleaned"
    whole: dict[str, Any] = more | {"checkpoint__interval": 10**6}
    process = start(2, data, tmp_path / "whole", [], **whole)
    output = runs.finish(process, 60 + 2 * last)
    assert process.returncode == 0, output
    assert runs.losses(folder) == runs.losses(tmp_path / "whole")
    runs.assert_same_tensors(runs.checkpoint(folder, last), runs.checkpoint(tmp_path / "whole", last))
    return log


def children(process: int) -> list[int]:
    """The ranks that torchrun started."""
    found = [child.pid for child in psutil.Process(process).children()]
    assert len(found) == 2, found
    return found


def test_two_ranks_killed_at_random(data: Path, tmp_path: Path) -> None:
    killed_at_random(data, tmp_path, 1, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_ranks_killed_often_at_random(data: Path, tmp_path: Path) -> None:
    """TITAN_FAST_KILLS says how often."""
    for line in killed_at_random(data, tmp_path, int(os.environ.get("TITAN_FAST_KILLS", "50")), seed=1):
        print(line)  # noqa: T201


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_one_rank_killed_at_random(kills: int, data: Path, tmp_path: Path) -> None:
    """A child that saves after every step, killed at any moment after its first step."""
    chance, folder, killed, torn = random.Random(kills), tmp_path / "run", 0, 0
    more: dict[str, Any] = {"training__steps": 200 * kills, "checkpoint__interval": 1, "checkpoint__keep_latest_k": 2}
    more |= {"lr_scheduler__total_steps": 200 * kills}
    for _ in range(kills):
        before = max(whole_steps(folder), default=0)
        child = started(None, 0, data, folder, more)
        runs.wait_for(lambda before=before: newest_step(folder) > before)
        time.sleep(chance.uniform(0.0, 2.0))
        child.kill()
        killed += exit_status(child) == -signal.SIGKILL
        torn += bool(list((folder / "checkpoint").glob(".*")))
        assert max(whole_steps(folder), default=0) >= before, "no published step is lost"
    reached = max(whole_steps(folder), default=0)
    print(f"{killed} kills, {torn} left something half done, step {reached} published")  # noqa: T201
    assert killed >= kills / 2
    more["training__steps"] = reached + 2
    runs.run(data, folder, **more)
    runs.run(data, tmp_path / "whole", **more | {"checkpoint__interval": 10**6})
    assert runs.losses(folder) == runs.losses(tmp_path / "whole")
    runs.assert_same_tensors(runs.checkpoint(folder, reached + 2), runs.checkpoint(tmp_path / "whole", reached + 2))


def started(place: str | None, call: int, data: Path, folder: Path, more: dict[str, Any]) -> BaseProcess:
    """A child that runs in silence, and dies in the given call of `place` if there is one."""
    process = CHILDREN.Process(target=run_silently, args=(place, call, data, folder, more))
    process.start()
    return process


SLOW = pytest.mark.slow
KILL_AT = [  # the stages of the second save and the first prune, in order
    pytest.param("titan_fast.checkpointer:manifest.writing", marks=SLOW),
    "titan_fast.checkpointer:dcp.save",
    pytest.param("titan_fast.manifest:digests", marks=SLOW),
    pytest.param("titan_fast.checkpointer:copy_tokenizer", marks=SLOW),
    pytest.param("titan_fast.manifest:write_file", marks=SLOW),
    "titan_fast.manifest:sync_folder",
    "titan_fast.manifest:delete",
    pytest.param("shutil:rmtree", marks=SLOW),
]


@pytest.mark.parametrize("place", KILL_AT)
def test_killed_inside_a_save_or_a_prune(place: str, data: Path, tmp_path: Path) -> None:
    """A child is killed at each stage of the commit protocol, again and again until it gets through."""
    folder = tmp_path / "run"
    more: dict[str, Any] = {"training__steps": 4, "checkpoint__interval": 1, "checkpoint__keep_latest_k": 1}
    reached, statuses = 0, []
    for call in (2, 3, 5):
        statuses.append(exit_status(started(place, call, data, folder, more)))
        steps = whole_steps(folder)
        assert not steps or max(steps) >= reached, "no published step is lost"
        reached = max(steps, default=0)
    assert statuses[0] == -signal.SIGKILL, "the place was reached"
    runs.run(data, folder, **more)
    runs.run(data, tmp_path / "whole", **more)
    runs.assert_same_tensors(runs.checkpoint(folder, 4), runs.checkpoint(tmp_path / "whole", 4))
    # A run killed between the last save and its prune has nothing left to save, and so does not prune.
    assert whole_steps(folder) in ([4], [3, 4]) and not list((folder / "checkpoint").glob(".*"))


def listening(process: int) -> set[str]:
    """The addresses that a process listens on."""
    connections = psutil.Process(process).net_connections(kind="inet")
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


def test_one_process_listens_on_loopback_alone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_step, found = loop.Run.step, set()

    def step(self: loop.Run, number: int) -> Any:
        found.update(listening(os.getpid()))
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", step)
    before = listening(os.getpid())
    runs.run(data, tmp_path / "run", training__steps=1)
    assert found - before <= {"127.0.0.1", "::1"}


def exit_status(child: BaseProcess) -> int:
    """Its exit status, negative for a signal."""
    child.join(60)
    if child.exitcode is None:
        child.kill()
        raise AssertionError("the child hangs")
    return child.exitcode


# Signals


def test_a_signal_to_one_rank_stops_all_after_one_save(data: Path, tmp_path: Path) -> None:
    """SIGTERM three times to rank 1 only: both save the same step, exit 0 and say how to resume, which works."""
    faults = [{"what": "signal", "name": "SIGTERM", "rank": 1, "step": 3, "times": 3}]
    process = start_interpreters(2, data, tmp_path / "run", faults)
    output = runs.finish(process)
    assert process.returncode == 0, output
    assert whole_steps(tmp_path / "run") == [3]
    assert output.count("checkpoint/step-3 in") == 1
    resume = re.search(r"stopped by .*; to go on: (.*)", output)
    assert resume is not None, output
    assert "--nproc-per-node=2" in resume[1] and str(runs.FAULTS) in resume[1]
    again = subprocess.run(
        ["sh", "-c", resume[1]], capture_output=True, text=True, timeout=180, env=runs.environment(FAULTS="[]")
    )
    assert again.returncode == 0 and "after step 3," in again.stdout, again.stdout + again.stderr
    assert whole_steps(tmp_path / "run") == [3, 5, 10]


def test_sigusr1_to_torchrun_saves_and_leaves_no_process(data: Path, tmp_path: Path) -> None:
    """With the documented flag, and with the validation loader's thread; the group includes all workers."""
    flags = ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",)
    more = {"training__steps": 5000, "checkpoint__interval": 10**6, "validation__enable": True, "validation__freq": 3}
    process = start_interpreters(2, data, tmp_path / "run", [], flags, **more)
    runs.wait_for(lambda: max(runs.losses(tmp_path / "run"), default=0) >= 4)
    workers = children(process.pid)
    assert {address for worker in workers for address in listening(worker)} <= {"127.0.0.1", "::1"}
    process.send_signal(signal.SIGUSR1)
    output = runs.finish(process, 60)
    steps = whole_steps(tmp_path / "run")
    assert len(steps) == 1 and steps[0] >= 4 and "stopped by SIGUSR1" in output, output
    assert not [worker for worker in workers if Path(f"/proc/{worker}/cmdline").exists()]


PLACES = ["step", "validate", "save", "forward_backward"]


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_at_any_time_makes_one_checkpoint(
    place: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a step, in validation, inside a save, in the first forward (where compilation is)."""
    owner: Any = loop if place == "forward_backward" else loop.Run
    true_function, calls = getattr(owner, place), []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(place)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_function(*args, **kwargs)

    monkeypatch.setattr(owner, place, function)
    before = signal.getsignal(signal.SIGTERM)
    runs.run(data, tmp_path / "run", validation__enable=True, validation__freq=4, checkpoint__interval=4)
    steps = whole_steps(tmp_path / "run")
    expected = {"step": [1], "forward_backward": [1], "validate": [4, 5], "save": [4, 5]}[place]
    assert steps == expected, "the save that was due, and one for the signal"
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before, "the handlers are put back"


def test_a_signal_in_the_last_step_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, number)

    true_validate, saved = loop.Run.validate, []

    def validate(self: loop.Run, number: int) -> None:
        saved.append(whole_steps(tmp_path / "run"))
        true_validate(self, number)

    monkeypatch.setattr(loop.Run, "step", step)
    monkeypatch.setattr(loop.Run, "validate", validate)
    more = {"training__steps": 2, "validation__enable": True, "validation__freq": 100, "metrics__sample_prompt": "a"}
    runs.run(data, tmp_path / "run", **more)
    said = capsys.readouterr().out
    assert saved == [[2]], "the save comes first: who sent the signal may not wait"
    assert "step 2/2  validation loss" in said and "step 2/2  sample" in said and "finished" in said
    assert "stopped" not in said and whole_steps(tmp_path / "run") == [2]


def test_later_signals_do_not_disturb_a_run_that_ends(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it draws its curve, says how to resume, and leaves the other ranks."""

    def interrupted(owner: Any, name: str) -> None:
        true_function = getattr(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(name)
            return true_function(*args, **kwargs)

        monkeypatch.setattr(owner, name, function)

    reached, felt = [], []
    interrupted(loop.Run, "step")
    interrupted(loop.MetricsLogger, "finish")
    interrupted(loop, "resume_command")
    interrupted(torch.distributed, "destroy_process_group")
    before = signal.signal(signal.SIGTERM, lambda number, frame: felt.append(number))
    try:
        runs.run(data, tmp_path / "run")
        assert not felt and len(reached) == 4
        os.kill(os.getpid(), signal.SIGTERM)
        assert felt == [signal.SIGTERM], "the handlers are put back"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopped by SIGTERM; to go on" in capsys.readouterr().out and not (tmp_path / "run" / LOCK).exists()


def test_no_rank_leaves_before_rank_0_has_said_all(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one host's end ends all, as with srun's --kill-on-bad-exit, the last messages would be lost."""
    log, words = tmp_path / "run" / "train.log", []
    monkeypatch.setattr(loop.World, "barrier", lambda _: words.append(log.read_text() if log.exists() else ""))
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", step)
    runs.run(data, tmp_path / "run")
    assert "to go on: " in words[-1] and (tmp_path / "run" / "loss_curve.png").exists()


def test_a_signal_after_a_run_does_not_change_its_exit_status() -> None:
    program = """
import atexit, os, signal
from titan_fast.signals import StopRequest
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))  # as the interpreter is on its way out
with StopRequest() as stop:
    stop.listen()
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=180, env=runs.environment())
    assert done.returncode == 0


def test_the_resume_command_does_not_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["python", "-m", "titan_fast.train", "--checkpoint.load_step", "5", "--a=b c", "--checkpoint.load-step=7"]
    monkeypatch.setattr(Path, "read_bytes", lambda path: "\0".join(words).encode() + b"\0")
    assert resume_command() == "python -m titan_fast.train '--a=b c'"
    words[3:] = ["--job.description", ""]
    assert resume_command() == "python -m titan_fast.train --job.description ''"


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("torchrun x.py", 30.0),
        ("torchrun --shutdown-timeout 90 x.py", 90.0),
        ("torchrun --shutdown_timeout=7 x.py", 7.0),
    ],
)
def test_a_save_that_outlasts_torchruns_patience_is_told(
    words: str, seconds: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert seconds_to_stop() is None
    monkeypatch.setattr(signals, "_command_line", lambda process: words.split())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert seconds_to_stop() == seconds
    monkeypatch.setattr(checkpointer, "seconds_to_stop", lambda: 0.0 if seconds == 7 else 1000.0)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    runs.run(data, tmp_path / "run", training__steps=2, checkpoint__interval=1)
    warned = capsys.readouterr().out.count("and torchrun kills 0 s after it")
    assert warned == (1 if seconds == 7 else 0), "once, and only where it does not fit"


# Numbers


def nan_in(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = float("nan")) -> list[dict[str, Any]]:
    """Multiplies the losses of these steps; returns weights and moments before and after each."""
    true_step, true_forward, seen = loop.Run.step, loop.forward_backward, []
    current = [0]

    def copied(run: loop.Run) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in tensors_of(run.model, run.optimizer).items()}

    def step(self: loop.Run, number: int) -> Any:
        current[0] = number
        before = copied(self)
        outcome = true_step(self, number)
        seen.append({"step": number, "before": before, "after": copied(self)})
        return outcome

    def forward(model: Any, batches: Any, scale: Any) -> Any:
        loss = true_forward(model, batches, scale)
        if current[0] in steps:
            for parameter in model.parameters():
                parameter.grad *= value
            return loss * value
        return loss

    monkeypatch.setattr(loop.Run, "step", step)
    monkeypatch.setattr(loop, "forward_backward", forward)
    return seen


def test_a_stop_in_a_step_that_is_not_finite_saves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nan_in(monkeypatch, {4})
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", step)
    runs.run(data, tmp_path / "run", training__on_nonfinite="skip")
    assert whole_steps(tmp_path / "run") == [4] and "stopped by SIGTERM" in capsys.readouterr().out


@pytest.mark.parametrize("implementation", ["fused", "for-loop"])
def test_steps_that_are_not_finite_are_skipped(
    implementation: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = nan_in(monkeypatch, {5, 6, 8})
    more = {"training__on_nonfinite": "skip", "training__max_skipped_steps": 2, "checkpoint__keep_latest_k": 0}
    runs.run(data, tmp_path / "run", optimizer__implementation=implementation, **more)
    for record in seen:
        changed = [name for name, tensor in record["before"].items() if not torch.equal(tensor, record["after"][name])]
        assert bool(changed) == (record["step"] not in {5, 6, 8}), record["step"]
    assert whole_steps(tmp_path / "run") == [7, 10], "the save of step 5 waited for a step that counted"
    records = [json.loads(line) for line in (tmp_path / "run" / run_history.BAD_STEPS).read_text().splitlines()]
    assert [(record["step"], record["what"]) for record in records] == [(s, "not finite") for s in (5, 6, 8)]
    assert records[0]["data"]["first_sample"] == 8 and "--samples 8:9)" in capsys.readouterr().out


def test_steps_that_were_not_applied_are_counted_over_the_whole_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for those after the step that a start goes on from."""
    more = {"training__on_nonfinite": "skip", "checkpoint__interval": 3, "lr_scheduler__total_steps": 9}
    for bad, steps in ({2, 5}, 6), ({7}, 9):
        with monkeypatch.context() as patch:
            nan_in(patch, bad, float("nan"))
            runs.run(data, tmp_path / "run", training__steps=steps, **more)
    assert "step 7: loss nan, grad norm nan: not applied, 3 so far" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        nan_in(patch, {9}, float("nan"))
        runs.run(data, tmp_path / "run", training__steps=9, **more, checkpoint__load_step=6)
    assert "step 9: loss nan, grad norm nan: not applied, 3 so far" in capsys.readouterr().out
    records = run_history.read(tmp_path / "run" / "metrics.jsonl")
    skipped = {record["step"]: record.get("skipped_steps", 0) for record in records if "lr" in record}
    assert skipped == {1: 0, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3}


@pytest.mark.parametrize(("policy", "limit", "bad", "stops_at"), [("stop", 10, {4}, 4), ("skip", 2, {4, 5, 6, 7}, 6)])
def test_too_many_bad_steps_stop_the_run(
    policy: str, limit: int, bad: set[int], stops_at: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = nan_in(monkeypatch, bad, float("inf"))
    with pytest.raises(NumericsError, match=rf"step {stops_at} is not finite") as caught:
        runs.run(
            data, tmp_path / "a run", training__on_nonfinite=policy, training__max_skipped_steps=limit,
            checkpoint__interval=3,
        )  # fmt: skip
    assert caught.value.exit_status == 5
    (command,) = re.findall(r"\((python -m titan_fast\.data show .*)\)\]", str(caught.value))
    shown = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, env=runs.environment()
    )
    assert shown.returncode == 0, shown.stderr
    first = 2 * stops_at - 2
    assert shown.stdout.startswith(f"samples {first} to {first + 1}, epoch 0\nsample {first}:\n  "), shown.stdout
    assert whole_steps(tmp_path / "a run") == [3] and seen[-1]["step"] == stops_at


def test_a_nan_on_one_rank_is_skipped_by_all(data: Path, tmp_path: Path) -> None:
    faults = [{"what": "nan", "rank": 1, "step": 4}]
    process = start(2, data, tmp_path / "run", faults, training__on_nonfinite="skip")
    output = runs.finish(process)
    assert process.returncode == 0 and "step 4: loss nan, grad norm nan: not applied" in output, output
    assert whole_steps(tmp_path / "run") == [5, 10]
    assert (tmp_path / "run" / run_history.BAD_STEPS).read_text().count("\n") == 1, "rank 0 alone writes it down"


def test_a_loss_spike_is_written_down(tmp_path: Path) -> None:
    watch = guard.StepGuard(parse([]).training, torch.device("cpu"), tmp_path, True)
    chance, lines = random.Random(0), []
    for step in range(1, 101):
        loss = 300.0 if step == 60 else 3.0 + chance.uniform(-0.05, 0.05)
        watch.judge(step, {"first_sample": 8 * step}, torch.tensor(loss), torch.tensor(1.0))
        lines += watch.look()
    assert len(lines) == 1 and lines[0].startswith("step 60: loss 300.0000 after 3.0"), lines
    record = json.loads((tmp_path / run_history.BAD_STEPS).read_text())
    assert record["what"] == "loss spike" and record["data"] == {"first_sample": 480}
    assert math.isclose(record["usual_loss"], 3.0, abs_tol=0.05)


def test_a_spike_of_a_loss_that_is_almost_nothing_is_told_in_numbers(tmp_path: Path) -> None:
    watch = guard.StepGuard(parse([]).training, torch.device("cpu"), tmp_path, True)
    for step in range(guard.LEAST + 1):
        watch.judge(step + 1, {}, torch.tensor(5e-4 if step == guard.LEAST else 2e-5), torch.tensor(1.0))
    (line,) = watch.look()
    assert "loss 5.0e-04 after 2.0e-05 on average" in line


def test_losses_that_stay_higher_are_spikes_no_longer(tmp_path: Path) -> None:
    watch = guard.StepGuard(parse([]).training, torch.device("cpu"), tmp_path, True)
    chance, lines = random.Random(0), []
    for step in range(1, 401):
        usual = 2.6 if step > 200 else 2.0
        loss = 3.0 if step == 300 else usual + chance.uniform(-0.01, 0.01)
        watch.judge(step, {}, torch.tensor(loss), torch.tensor(1.0))
        lines += watch.look()
    spikes = [*range(201, 201 + guard.LEAST), 300]  # the last one by the deviation of the new level alone
    assert [line.split(":")[0] for line in lines] == [f"step {step}" for step in spikes]


def test_spikes_that_are_not_in_a_row_stay_spikes(tmp_path: Path) -> None:
    watch = guard.StepGuard(parse([]).training, torch.device("cpu"), tmp_path, True)
    for step in range(4 * guard.LEAST):
        loss = 300.0 if step > guard.LEAST and step % 2 else 3.0
        watch.judge(step + 1, {}, torch.tensor(loss), torch.tensor(1.0))
    assert len(watch.look()) == 3 * guard.LEAST // 2


def test_nothing_is_applied_after_the_step_that_stops_the_run(tmp_path: Path) -> None:
    """The host only looks after further steps have been judged."""
    watch = guard.StepGuard(parse(["--training.on_nonfinite", "stop"]).training, torch.device("cpu"), tmp_path, True)
    norms = torch.tensor([1.0, math.nan, math.nan, 1.0])
    assert [watch.judge(step, {}, norm, norm).item() for step, norm in enumerate(norms, 1)] == [0.0, 1.0, 1.0, 1.0]
    with pytest.raises(NumericsError, match="of step 2 is not finite"):
        watch.look()


@pytest.mark.parametrize(("before", "loss", "is_spike"), [(32, 3.65, True), (32, 3.55, False), (31, 300.0, False)])
def test_a_spike_is_six_deviations_above_32_losses(before: int, loss: float, is_spike: bool, tmp_path: Path) -> None:
    watch = guard.StepGuard(parse([]).training, torch.device("cpu"), tmp_path, True)
    for step in range(before):  # their deviation is 0.1
        watch.judge(step + 1, {}, torch.tensor(2.9 if step % 2 else 3.1), torch.tensor(1.0))
    watch.judge(before + 1, {}, torch.tensor(loss), torch.tensor(1.0))
    assert len(watch.look()) == is_spike


@pytest.mark.parametrize(("loss", "is_spike"), [(3.0017, False), (3.0019, True)])
def test_losses_that_are_all_alike_are_taken_to_deviate_by_a_ten_thousandth(
    loss: float, is_spike: bool, tmp_path: Path
) -> None:
    watch = guard.StepGuard(parse([]).training, torch.device("cpu"), tmp_path, True)
    for step in range(guard.LEAST):
        watch.judge(step + 1, {}, torch.tensor(3.0), torch.tensor(1.0))
    watch.judge(guard.LEAST + 1, {}, torch.tensor(loss), torch.tensor(1.0))
    assert len(watch.look()) == is_spike


def test_a_loss_that_is_not_finite_is_not_applied_whatever_the_norm(tmp_path: Path) -> None:
    watch = guard.StepGuard(
        parse(["--training.on_nonfinite", "skip"]).training, torch.device("cpu"), tmp_path, is_main=True
    )
    for step in range(guard.LEAST + 1):
        loss = torch.tensor(math.inf if step == guard.LEAST else 3.0)
        assert watch.judge(step + 1, {}, loss, torch.tensor(1.0)).item() == (step == guard.LEAST)
    assert [line.split(", grad")[0] for line in watch.look()] == [f"step {guard.LEAST + 1}: loss inf"]


def test_documents_of_a_stream_cannot_be_shown_or_left_out(tmp_path: Path) -> None:
    training = parse(["--training.dataset", "c4", "--training.on_nonfinite", "stop"]).training
    watch = guard.StepGuard(training, torch.device("cpu"), tmp_path, True)
    watch.judge(1, {"first_sample": 0, "last_sample": 8}, torch.tensor(math.nan), torch.tensor(math.nan))
    with pytest.raises(NumericsError, match="data: first_sample 0, last_sample 8") as caught:
        watch.look()
    assert "skip_samples" not in str(caught.value) and "data show" not in str(caught.value)


# Disks


def test_a_bad_step_that_a_full_disk_refused_is_written_at_the_end(tmp_path: Path) -> None:
    (tmp_path / run_history.BAD_STEPS).symlink_to("/dev/full")
    training = parse(["--training.on_nonfinite", "skip"]).training
    watch = guard.StepGuard(training, torch.device("cpu"), tmp_path, True)
    watch.judge(7, {}, torch.tensor(math.nan), torch.tensor(math.nan))
    assert len(watch.look()) == 1
    (tmp_path / run_history.BAD_STEPS).unlink()
    watch.close()
    record = json.loads((tmp_path / run_history.BAD_STEPS).read_text())
    assert record == {"step": 7, "what": "not finite", "loss": "nan", "grad_norm": "nan", "data": {}}, "strict JSON"


def test_a_disk_that_takes_no_more_of_one_rank_ends_all(data: Path, tmp_path: Path) -> None:
    """A file size limit on rank 1 gives EFBIG where its shard is written."""
    faults = [{"what": "file_limit", "rank": 1, "step": 8, "bytes": 20_000}]
    process = start(2, data, tmp_path / "run", faults)
    began = time.monotonic()
    output = runs.finish(process)
    assert process.returncode != 0
    sentences = re.findall(r"titan_fast: the checkpoint could not be written: rank 1: .*", output)
    assert sentences, output  # of both ranks, unless torchrun has ended the slower one
    for sentence in sentences:
        assert "File too large" in sentence and "raise the limit of file sizes (ulimit -f)" in sentence
        assert str(tmp_path / "run" / "checkpoint") in sentence and "newest whole checkpoint is of step 5" in sentence
    assert whole_steps(tmp_path / "run") == [5]
    assert time.monotonic() - began < 200


def test_a_disk_that_is_full_for_a_while_costs_no_line(data: Path, tmp_path: Path) -> None:
    faults = [{"what": "file_limit", "step": 4, "until": 8, "bytes": 100}]
    tensorboard = {"metrics__enable_tensorboard": True, "checkpoint__interval": 100}
    process = start_interpreters(1, data, tmp_path / "run", faults, **tensorboard)  # its pipe has no limit
    output = runs.finish(process)
    assert process.returncode == 0, output
    log = tmp_path / "run" / "train.log"
    assert output.count(f"{log} cannot be written: File too large; the run goes on") == 1
    assert output.count(f"{log} is written again") == 1 and "TensorBoard's events cannot be written" in output
    assert list(runs.losses(tmp_path / "run")) == list(range(1, 11))
    lines = [line[20:] for line in log.read_text().splitlines() if line[20:].startswith("step ")]
    assert [int(line[5:7]) for line in lines] == list(range(1, 11))
    assert all(line in output for line in lines)  # a thread may have said something in front of one
    assert whole_steps(tmp_path / "run") == [10]


def test_a_removed_folder_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        if number == 7:
            shutil.rmtree(self.run_dir)
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(CheckpointError, match="the run directory is gone"):
        runs.run(data, tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    refused = {tmp_path / "one": "job.dump_folder", tmp_path / "two" / "checkpoint": "checkpoint.folder"}
    for folder in refused:
        folder.mkdir(parents=True)
        folder.chmod(0o555)
    program = """
import sys
from titan_fast.config import parse
from titan_fast.errors import reported
from titan_fast.run_directory import open_run_directory
for folder in sys.argv[1:]:
    try:
        with reported():
            open_run_directory(parse(["--job.dump_folder", folder]))
    except SystemExit as end:
        assert end.code == 2
"""
    command = [sys.executable, "-c", program, str(tmp_path / "one"), str(tmp_path / "two")]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]  # a root that modes bind
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=runs.environment())
    assert done.returncode == 0, done.stderr
    for folder, key in refused.items():
        assert f"{key} cannot be written: Permission denied [{folder}]" in done.stderr


# Two runs


def test_two_runs_on_one_folder(data: Path, tmp_path: Path) -> None:
    tmp = tmp_path / "run"
    tmp.mkdir()
    with RunLock(tmp) as first:
        with pytest.raises(ConfigError, match=rf"another run is using job.dump_folder: process {os.getpid()}"):
            runs.run(data, tmp)
        first.check()
    assert not (tmp / LOCK).exists()
    runs.run(data, tmp, training__steps=1)


def test_two_runs_on_one_folder_of_checkpoints(data: Path, tmp_path: Path) -> None:
    """Runs in separate directories, which would resume from each other's checkpoints, and delete them."""
    shared = tmp_path / "shared"
    config = parse(runs.arguments(data, tmp_path / "first", checkpoint__folder=str(shared)))
    for folder in (tmp_path / "first", shared):
        folder.mkdir()
    with locked(config, tmp_path / "first") as check:
        with pytest.raises(ConfigError, match=r"another run is using checkpoint.folder: process") as caught:
            runs.run(data, tmp_path / "second", checkpoint__folder=str(shared))
        assert caught.value.where == str(shared / LOCK)
        check()
        (shared / LOCK).write_text(json.dumps({"token": "another", "pid": 1, "host": "far"}))
        with pytest.raises(CheckpointError, match=r"checkpoint.folder is now held by process 1 on far"):
            check()
    (shared / LOCK).unlink()
    runs.run(data, tmp_path / "second", checkpoint__folder=str(shared), training__steps=1)
    assert not (shared / LOCK).exists()


@pytest.mark.parametrize("name", ["checkpoint", "saves"])
def test_two_runs_on_the_checkpoints_in_one_of_their_directories(data: Path, tmp_path: Path, name: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    own = parse(runs.arguments(data, first, checkpoint__folder=name))
    foreign = parse(runs.arguments(data, second, checkpoint__folder=f"../first/{name}"))
    other = parse(runs.arguments(data, second, checkpoint__folder="../first/others"))
    runs.run(data, first, checkpoint__folder=name, training__steps=1)
    for folder in (second, first / "others"):
        folder.mkdir()
    refused = pytest.raises(ConfigError, match=r"another run is using the run directory of checkpoint.folder: process")
    with locked(own, first) as check:
        with refused as caught, locked(foreign, second):
            pass
        assert caught.value.where == str(first / LOCK)
        with locked(other, second):  # a folder of its own, wherever that is
            check()
    with locked(foreign, second) as check:
        with pytest.raises(ConfigError, match=r"another run is using job.dump_folder: process"), locked(own, first):
            pass
        check()
    assert not list(tmp_path.rglob(LOCK))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_prune_is_refused_while_a_run_goes_on(
    elsewhere: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    folder = tmp_path / "saves" if elsewhere else run / "checkpoint"
    more = {
        "checkpoint__folder": folder if elsewhere else folder.name, "checkpoint__interval": 1, "training__steps": 2,
    }  # fmt: skip
    runs.run(data, run, **more)
    (folder / ".writing-step-3").mkdir()

    def prune(path: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["titan_fast.checkpoint", "prune", str(path), "--keep", "1"])
        with pytest.raises(SystemExit) as ended:
            checkpoint_command.main()
        return int(ended.value.code or 0)

    with locked(parse(runs.arguments(data, run, **more)), run) as check:
        for path in (folder, run):
            assert prune(path) == 2
            said = capsys.readouterr().err
            if elsewhere and path == run:  # from a run directory prune deletes nothing outside of it
                assert f"has its checkpoints elsewhere, in {folder}" in said
            else:
                assert f"another run is using these checkpoints: process {os.getpid()}" in said
        check()
    assert {path.name for path in folder.glob("*step*")} == {"step-1", "step-2", ".writing-step-3"}
    monkeypatch.setattr(sys, "argv", ["titan_fast.checkpoint", "prune", str(folder), "--keep", "1"])
    checkpoint_command.main()
    assert {path.name for path in folder.glob("*step*")} == {"step-2"}
    assert not (run / LOCK).exists() and not (folder / LOCK).exists()
    (folder / ".writing-step-3").mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunLock, "_write", full)
    checkpoint_command.main()
    assert {path.name for path in folder.glob("*step*")} == {"step-2"}


def test_nothing_is_written_into_a_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.run(data, tmp_path / "run", training__steps=1)
    step = tmp_path / "run" / "checkpoint" / "step-1"
    for options in (
        {"run_dir": step},
        {"run_dir": step / "more"},
        {"run_dir": tmp_path / "other", "checkpoint__folder": str(step)},
        {"run_dir": step.parent},
    ):
        with pytest.raises(ConfigError, match=r"in a checkpoint, to which nothing|is a folder of checkpoints"):
            runs.run(data, options.pop("run_dir"), **options, training__steps=2)  # type: ignore[arg-type]
    for module, words in (
        (checkpoint_command, f"export {step} --out {step}/w.safetensors"),
        (hf, f"export {step} --out {step}/hf"),
        (estimate, f"--plot {step} --gpu h100-sxm --gpus 1 --model.flavor debug --training.seq_len 64"),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *words.split()])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code in (2, 4)
    assert manifest.problem(step) is None
    runs.run(data, tmp_path / "run", training__steps=2)


def test_a_dead_runs_lock_is_no_obstacle(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; from pathlib import Path; from titan_fast.run_lock import RunLock\n"
         f"RunLock(Path({str(tmp_path)!r})).__enter__(); print('held', flush=True); time.sleep(100)"],
        stdout=subprocess.PIPE, text=True, env=runs.environment(),
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {child.pid}"), RunLock(tmp_path):
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    with RunLock(tmp_path) as lock:
        lock.check()


def test_a_lock_of_another_machine_is_judged_by_its_pulse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = {"host": "far", "pid": 1, "started": "1", "machine": "x", "namespace": "y", "token": "t", "since": "s"}
    (tmp_path / LOCK).write_text(json.dumps(elsewhere))
    slept: list[float] = []

    def sleep(seconds: float) -> None:  # it lives: its pulse goes on
        slept.append(seconds)
        os.utime(tmp_path / LOCK, (time.time() + 1, time.time() + 1))

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(ConfigError, match="process 1 on far"), RunLock(tmp_path):
        pass
    assert slept == [1.0], "a pulse that is seen is enough"
    past = time.time() - SILENT_SECONDS - 5
    os.utime(tmp_path / LOCK, (past, past))
    with RunLock(tmp_path) as lock:
        lock.check()
        (tmp_path / LOCK).write_text(json.dumps(elsewhere))
        with pytest.raises(CheckpointError, match="now held by process 1 on far"):
            lock.check()
    assert json.loads((tmp_path / LOCK).read_text()) == elsewhere, "which is not ours to take away"


@pytest.mark.parametrize(("error", "is_held"), [(PermissionError, True), (ProcessLookupError, False)])
def test_a_holder_that_the_system_hides_is_judged_by_its_pulse(
    error: type[OSError], is_held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc shows a user nothing of the others' processes."""

    def kill(process: int, number: int) -> None:
        raise error

    (tmp_path / "self").mkdir()
    monkeypatch.setattr(run_lock, "_PROC", tmp_path)
    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / LOCK).write_text(json.dumps(run_lock._identity() | {"started": "1", "token": "other's"}))
    assert RunLock(tmp_path)._doubt(json.loads((tmp_path / LOCK).read_text())) is (True if is_held else None)
    past = time.time() - SILENT_SECONDS - 5
    os.utime(tmp_path / LOCK, (past, past))
    assert RunLock(tmp_path)._doubt(json.loads((tmp_path / LOCK).read_text())) is None


def test_a_lock_that_cannot_be_deleted_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that succeeded nor one that has its own error to report."""

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    with monkeypatch.context() as patch, RunLock(tmp_path):
        patch.setattr(Path, "unlink", refuse)
    assert (tmp_path / "run.lock").exists()


def test_a_process_with_a_dead_holders_id_is_not_the_holder(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps(run_lock._identity() | {"started": "0"}))
    with RunLock(tmp_path) as lock:
        lock.check()


@pytest.mark.parametrize(
    "content",
    [
        *(
            json.dumps(run_lock._identity() | {"pid": pid, "token": "t"})
            for pid in ("x", None, [], 1.5, math.inf, -1, 2**31, int("9" * 400))
        ),
        "[" * 100_000,
        "[]",
        "{",
    ],
    ids=lambda content: content[:1] + content[content.find("pid") :][:10],
)
def test_a_lock_that_no_run_has_written_holds_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with RunLock(tmp_path) as lock:
        (tmp_path / LOCK).write_text(content)
        lock.check()


def test_a_holder_that_ends_while_it_is_judged_is_gone(tmp_path: Path) -> None:
    assert RunLock(tmp_path)._doubt({"machine": "x", "namespace": "y"}) is None
    assert not list(tmp_path.iterdir())


# Hangs and stragglers


def test_a_slow_rank_is_told_and_a_hanging_one_is_named(data: Path, tmp_path: Path) -> None:
    """Rank 1 sleeps 0.25 s in each step, which is only reported, and forever in step 60, which ends the run."""
    faults = [{"what": "slow", "rank": 1, "step": 2, "seconds": 0.25}]
    faults += [{"what": "sleep", "rank": 1, "step": 60, "seconds": 1000.0}]
    process = start(2, data, tmp_path / "run", faults, training__steps=100, comm__timeout_seconds=12)
    runs.wait_for(lambda: max(runs.losses(tmp_path / "run"), default=0) >= 59)
    began = time.monotonic()
    output = runs.finish(process, 60)
    assert time.monotonic() - began < 12 + 30, "the verdict within the limit; torchrun needs a moment to end"
    assert process.returncode != 0 and "exitcode  : 6" in output, output
    ratio = re.search(r"straggler: rank 1 works .*: (\d+\.\d) times as long", output)
    assert ratio is not None and float(ratio[1]) >= watchdog.STRAGGLER_RATIO, output
    hang = re.search(r"titan_fast: rank 1 hangs: .*\[rank 1, step (\d+), phase '(.*?)'\]", output)
    assert hang is not None and int(hang[1]) in (59, 60), output
    assert "in stuck" in output, "the stack of the stuck rank"
    log = (tmp_path / "run" / "train.log").read_text()
    assert "ended by CommunicationError: rank 1 hangs: " in log.splitlines()[-1], log


def test_the_verdict_names_who_is_behind() -> None:
    def report(rank: int, marks: int, phase: str, stack: str = "s") -> watchdog.Report:
        return watchdog.Report(rank, marks, 5, phase, 9.0, 1.0, 3, 12.0, "comm.timeout_seconds", stack)

    ahead = report(0, 12, "gradient norm")
    assert "rank 1 hangs" in watchdog.verdict({0: ahead, 1: report(1, 10, "data")})
    assert "phase 'data'" in watchdog.verdict({0: ahead, 1: report(1, 10, "data")})
    silent = report(2, 12, "gradient norm", watchdog._NO_SIGN)
    silent.age = 1.0
    said = watchdog.verdict({0: ahead, 1: report(1, 12, "gradient norm"), 2: silent})
    assert "rank 2 hangs: no sign of life" in said and "waited 9 s, of at most 12 s" in said and "cut off" in said
    assert "all 2 ranks hang" in watchdog.verdict({0: ahead, 1: report(1, 12, "gradient norm")})


def test_who_works_twice_as_long_as_the_median_of_the_others_is_told() -> None:
    said = watchdog.straggler({0: 1.0, 1: 9.0, 2: 1.1, 3: 1.2}, 10)
    assert said is not None and "rank 1 works 0.900 s a step, the others 0.110 s" in said and "8.2 times" in said
    assert watchdog.straggler({0: 1.0, 1: 2.1}, 10) is not None
    assert watchdog.straggler({0: 1.0, 1: 1.9}, 10) is None
    assert watchdog.straggler({0: 0.1, 1: 0.3}, 9) is not None
    assert watchdog.straggler({0: 0.1, 1: 0.3}, 11) is None, "less than 0.02 s a step"


# Memory and compilers


def test_out_of_memory_of_the_host_is_told_too(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "forward_backward", lambda *args: torch.empty(2**60))
    with pytest.raises(OutOfMemory, match=r"out of memory: .*can't allocate memory") as caught:
        runs.run(data, tmp_path / "run")
    assert "--activation_checkpoint.mode selective" in str(caught.value) and "offload" not in str(caught.value)


def test_out_of_memory_says_what_to_change(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(loop, "forward_backward", no_memory)
    with pytest.raises(OutOfMemory, match=r"out of memory: .*20.00 GiB.*weights, gradients and moments take") as caught:
        runs.run(data, tmp_path / "run", training__local_batch_size=128, loss__chunk_size=0)
    text = str(caught.value)
    order = [
        "1. --loss.chunk_size 2048: the logits of 4,096 tokens",
        "--training.local_batch_size 64",
        "--activation_checkpoint.mode selective",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), 16),
        (("--training.mixed_precision_param", "bfloat16"), 16),
        (("--training.mixed_precision_param", "bfloat16", "--training.global_batch_size", "8"), 18),
        (("--training.mixed_precision_param", "bfloat16", "--parallelism.single_device", "bfloat16"), 8),
    ],
)
def test_bytes_of_a_parameter_are_what_training_holds(options: tuple[str, ...], expected: int) -> None:
    config = parse(["--training.local_batch_size", "4", *options])
    degrees = mesh_degrees(config.parallelism, 1)
    assert out_of_memory.state_bytes(config, degrees, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("options", "names_it"),
    [
        ("", True),  # the head's gradient is float32 anyway
        ("--parallelism.fsdp_wide_gradients False", False),  # two of its widths in tokens: a float32 sum eats it up
        ("--loss.implementation torch", False),  # which has chunks of its own
    ],
)
def test_smaller_chunks_are_advised_where_they_save_memory(options: str, names_it: bool) -> None:
    words = "--model.flavor llama3_8b --training.seq_len 8192 --training.local_batch_size 1 --compile.enable True"
    config = parse([*words.split(), *options.split()])
    degrees = mesh_degrees(config.parallelism, 64)
    lines = out_of_memory.advice(config, model_shape(config.model), degrees, torch.device("cuda"))
    assert any(line.startswith("--loss.chunk_size 2048") for line in lines) == names_it


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 12])
@pytest.mark.parametrize(
    "options",
    [
        "--training.global_batch_size -1",
        "--parallelism.data_parallel_replicate_degree 2 --parallelism.data_parallel_shard_degree 4",
        "--activation_checkpoint.mode memory_budget --activation_checkpoint.memory_budget 0",
        "--activation_checkpoint.mode memory_budget",
        "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option 1",
    ],
)
def test_what_out_of_memory_advises_is_accepted(batch: int, options: str) -> None:
    """Line by line, in the world that got the advice; the batch stays, and no line repeats what is set."""
    words = ["--training.local_batch_size", str(batch), *options.split()]
    config, world = parse(words), 8
    degrees = mesh_degrees(config.parallelism, world)
    lines = out_of_memory.advice(config, model_shape(config.model), degrees, torch.device("cpu"))
    advised = [line.split(":")[0].split(" (now")[0].split() for line in lines if line.startswith("--")]
    for line in advised:
        new = parse([*words, *line])
        assert new != config, line
        then = mesh_degrees(new.parallelism, world)
        assert sequences_per_step(new.training, then.data) == sequences_per_step(config.training, degrees.data), line
    modes = [line for line in advised if line[0].startswith("--activation_checkpoint")]
    assert len(modes) == ("memory_budget 0" not in options and "option 1" not in options)


def test_a_dry_step_finds_it_before_data_is_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(loop, "build_tokenizer", lambda *args: pytest.fail("data was touched"))
    monkeypatch.setattr(dry_step, "forward_backward", no_memory)
    with pytest.raises(OutOfMemory):
        runs.run(data, tmp_path / "run", training__dry_step="always")


def test_a_dry_step_changes_nothing(data: Path, tmp_path: Path) -> None:
    runs.run(data, tmp_path / "with", training__dry_step="always")
    runs.run(data, tmp_path / "without", training__dry_step="never")
    assert runs.losses(tmp_path / "with") == runs.losses(tmp_path / "without")
    runs.assert_same_tensors(runs.checkpoint(tmp_path / "with", 10), runs.checkpoint(tmp_path / "without", 10))
