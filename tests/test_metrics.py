"""What a run reports, read back by other means: json, TensorBoard's own reader, a pseudo-terminal."""

import errno
import json
import math
import os
import pty
import re
import resource
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.summary.writer import event_file_writer, record_writer

from titan_fast import console, run_history
from titan_fast import metrics as metrics_module
from titan_fast.config import Config, model_shape, parse
from titan_fast.console import Console
from titan_fast.metrics import MetricsLogger, aligned, duration, peak_memory, printable, small
from titan_fast.start_times import StartTimes
from titan_fast.training_clock import TrainingClock

KEYS = [
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "mfu",
    "memory_gib",
    "data_wait_fraction",
    "tokens_seen",
    "elapsed_seconds",
]
QUIET = ["--metrics.enable_tensorboard", "False"]


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def logger(run_dir: Path, *argv: str, config: Config | None = None, **changes: Any) -> MetricsLogger:
    config = config or parse(["--training.steps", "40", *argv])
    arguments: dict[str, Any] = {
        "run_dir": run_dir,
        "is_main": True,
        "shape": model_shape(config.model),
        "device": torch.device("cpu"),
        "n_devices": 2,
        "tokens_per_step": 1000,
    }
    return MetricsLogger(config, **(arguments | changes))


def log(metrics: MetricsLogger, step: int, loss: float = 2.0, **changes: Any) -> None:
    values: dict[str, Any] = {"grad_norm": 0.5, "lr": 1e-3, "tokens_seen": 1000 * step, "data_wait_seconds": 0.0}
    metrics.log(step, loss=loss, **(values | changes))


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_logged_step(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = logger(tmp_path, *QUIET, elapsed_before=100.0)
    clock.now += 50  # building the model
    metrics.start([("model", "a Llama")])
    clock.now += 5
    log(metrics, 10, loss=3.25, data_wait_seconds=0.5)
    clock.now += 4
    log(metrics, 20, loss=3.0, data_wait_seconds=0.7)  # in all
    first, second = lines_of(tmp_path)
    assert list(first) == KEYS
    assert first["tokens_per_second"] == 10 * 1000 / 5 / 2
    assert second["tokens_per_second"] == 10 * 1000 / 4 / 2
    assert first["data_wait_fraction"] == 0.1
    assert second["data_wait_fraction"] == pytest.approx(0.2 / 4)
    assert first["elapsed_seconds"] == 155
    assert (first["step"], first["loss"], first["tokens_seen"], first["mfu"]) == (10, 3.25, 10_000, None)
    assert 0.05 < first["memory_gib"] < 64
    output = capsys.readouterr().out
    assert "no MFU: a CPU has no peak listed" in output
    shown = [line for line in output.splitlines() if line.startswith("step")]
    assert (
        shown[0].split()
        == (
            "step 10/40 loss 3.2500 grad norm 0.5000 lr 1.00e-03 tokens/s 1,000 MFU - memory "
            f"{first['memory_gib']:.2f} GiB data wait 10.0% ETA 0:00:15"  # 30 steps of 0.5 s
        ).split()
    )
    assert shown[1].endswith("ETA 0:00:08")  # 20 steps of 0.4 s: the first window has compilation in it
    assert len({line.index("MFU") for line in shown}) == 1


def test_the_start_is_told_part_by_part(clock: Clock) -> None:
    start = StartTimes()
    for part, seconds in (("imports", 3.0), ("checks", 0.04), ("model", 1.25), ("rest", 0.01), ("imports", 1.0)):
        clock.now += seconds
        start.lap(part)
    assert start.describe() == "5.3 s: imports 4.0, model 1.2"
    clock.now += 9  # what comes after the last part is none of it
    assert start.describe().startswith("5.3 s")
    assert StartTimes().describe() == "0.0 s"


def test_the_time_of_a_run_begins_with_its_process(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    start = StartTimes()
    clock.now += 20
    metrics = logger(tmp_path, *QUIET, began=start.began)
    clock.now += 1
    metrics.start([])
    clock.now += 5
    log(metrics, 10)
    (line,) = lines_of(tmp_path)
    assert line["elapsed_seconds"] == 26 and line["tokens_per_second"] == 1000
    metrics.finish()
    assert "0:00:26, of it since step 0: start 0:00:21, steps 0:00:05, pauses" in capsys.readouterr().out


def test_pauses_are_not_training_time(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = logger(tmp_path, *QUIET)
    metrics.start([])
    clock.now += 2
    with metrics.pause():
        clock.now += 30
        with metrics.pause():
            clock.now += 7
    clock.now += 3
    log(metrics, 10)
    clock.now += 5
    log(metrics, 20)
    first, second = lines_of(tmp_path)
    assert first["tokens_per_second"] == second["tokens_per_second"] == 1000
    assert second["elapsed_seconds"] == 47
    metrics.finish()
    assert "steps 0:00:10, pauses (validation, checkpoints, samples, traces) 0:00:37" in capsys.readouterr().out


def test_what_is_left_has_pauses_as_there_were(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = logger(tmp_path, *QUIET)
    metrics.start([])
    with metrics.pause():  # what an earlier process left out, once
        clock.now += 900
    for step in (10, 20):
        clock.now += 20
        log(metrics, step)
        with metrics.pause():
            clock.now += 30
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert shown[0].endswith("ETA 0:01:00")  # 30 steps of 2 s: no pause is known of
    assert shown[1].endswith("ETA 0:01:40")  # 20 steps of 2 s, and of 30 s in 10 steps


def test_a_run_that_goes_on_has_the_time_and_the_bad_steps_that_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Time spent on steps that are repeated counts too; bad ones among them no longer do."""
    bad = tmp_path / run_history.BAD_STEPS
    lines = [json.dumps({"step": step, "what": "not finite", "loss": "nan", "data": {"epoch": 0}}) for step in (3, 12)]
    bad.write_text("".join(f"{line}\n" for line in lines))
    times = [json.dumps({"step": step, "loss": 2.0, "elapsed_seconds": 10.0 * step}) for step in (9, 10, 14)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in times))
    metrics = logger(tmp_path, *QUIET, start_step=10, elapsed_before=99.0)
    assert metrics.elapsed_before == 140.0
    assert bad.read_text() == f"{lines[0]}\n" and [line["step"] for line in lines_of(tmp_path)] == [9, 10]
    said = capsys.readouterr().out
    assert "bad_steps.jsonl: cut off 1 line after step 10" in said and "metrics.jsonl: cut off 1 line after" in said
    assert logger(tmp_path, *QUIET, start_step=10, elapsed_before=200.0).elapsed_before == 200.0
    metrics = logger(tmp_path, *QUIET)
    assert metrics.elapsed_before == 0.0 and not bad.exists()
    assert (tmp_path / "bad_steps-until-3.jsonl").read_text() == f"{lines[0]}\n"


def test_what_comes_after_the_last_line_and_the_last_save_is_time_of_the_run_too(tmp_path: Path, clock: Clock) -> None:
    metrics = logger(tmp_path, *QUIET)
    metrics.start([])
    clock.now += 20
    log(metrics, 10)
    saved = metrics.elapsed_seconds
    with metrics.pause():
        clock.now += 300
    metrics.finish()
    assert logger(tmp_path, *QUIET, start_step=10, elapsed_before=saved).elapsed_before == 320
    again = logger(tmp_path, *QUIET, start_step=10, elapsed_before=saved)
    clock.now += 7  # and is told in a line of its own, where there was a step
    before = lines_of(tmp_path)
    again.finish()
    assert before[-1] == {"step": 10, "elapsed_seconds": 320} and lines_of(tmp_path) == before


def test_a_run_that_is_beyond_its_last_step_has_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger(tmp_path, *QUIET, start_step=50).finish()
    assert re.search(r"^finished +step 50/40", capsys.readouterr().out, re.MULTILINE)


def test_a_pause_that_raises_ends(tmp_path: Path, clock: Clock) -> None:
    timer = TrainingClock(torch.device("cpu"))
    with pytest.raises(RuntimeError), timer.pause():
        clock.now += 3
        raise RuntimeError
    clock.now += 1
    assert timer.window() == 1


def test_the_devices_backlog_is_not_part_of_a_pause(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that still trains for two seconds when the host enters the pause."""
    device_time = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = math.nan

        def record(self) -> None:
            self.at = max(device_time, clock.now)

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: "Event") -> float:
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = TrainingClock(torch.device("cuda"))
    clock.now += 1
    device_time = clock.now + 2
    with timer.pause():
        clock.now += 2 + 5
    clock.now += 1
    assert timer.window() == 1 + 2 + 1
    assert timer.paused_seconds == 7
    clock.now += 3
    assert timer.window() == 3, "a pause counts once"


@pytest.mark.parametrize(("platform", "resident"), [("linux", 3 * 2**19), ("darwin", 3 * 2**29)])
def test_resident_memory_in_whatever_unit_the_system_counts(
    platform: str, resident: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_module, "STATUS", tmp_path / "none")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=resident))
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory(torch.device("cpu")) == 1.5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_resident_memory_is_not_that_of_the_process_which_started_this_one() -> None:
    """As of a notebook, which holds much when it launches a run."""
    ask = "import torch; from titan_fast.metrics import peak_memory; print(peak_memory(torch.device('cpu')))"
    launch = f"import subprocess, sys; held = b'1' * 2**30; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    said = subprocess.run([sys.executable, "-c", launch], check=True, capture_output=True, text=True).stdout
    assert 0.05 < float(said) < 0.9


def test_a_devices_memory_is_the_most_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [3 * 2**29]
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.append(2**29))
    assert [peak_memory(torch.device("cuda")) for _ in range(2)] == [1.5, 0.5]


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def pretend(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**29)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    return pretend


def test_mfu_of_a_published_run(tmp_path: Path, clock: Clock, a100: Callable[[str], None]) -> None:
    """Llama 3 8B on 64 A100 at 2904 tokens/s: 53.9% if the embedding does not count."""
    a100("NVIDIA A100-SXM4-80GB")
    config = parse(["--model.flavor", "llama3_8b", "--training.seq_len", "8192", *QUIET])
    metrics = logger(tmp_path, config=config, device=torch.device("cuda"), n_devices=64, tokens_per_step=64 * 8192)
    clock.now += 10 * 8192 / 2904
    log(metrics, 10)
    (record,) = lines_of(tmp_path)
    assert record["tokens_per_second"] == pytest.approx(2904)
    assert record["mfu"] == pytest.approx(0.539, abs=5e-4)
    assert record["memory_gib"] == 1.5


@pytest.mark.parametrize(
    ("name", "option", "sentence"),
    [
        ("NVIDIA Imaginary 1", "", "no MFU: the peak of 'NVIDIA Imaginary 1' is not known"),
        (
            "NVIDIA H200",
            "--training.mixed_precision_param float32",
            "of bfloat16, and this run computes in float32",
        ),
        ("NVIDIA H200", "--float8.enable True", "no MFU: the peaks listed are of bfloat16, and most of this run's"),
    ],
)
def test_no_mfu_has_a_reason(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    a100: Callable[[str], None],
    name: str,
    option: str,
    sentence: str,
) -> None:
    a100(name)
    metrics = logger(tmp_path, *QUIET, *option.split(), device=torch.device("cuda"))
    metrics.start([])
    log(metrics, 1)
    assert sentence in capsys.readouterr().out
    assert lines_of(tmp_path)[0]["mfu"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_numbers_stay_json(tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = logger(tmp_path, *QUIET)
    log(metrics, 1, loss=value, grad_norm=value)
    metrics.validation(1, value)
    log(metrics, 2)
    step, validation, sound = lines_of(tmp_path)
    assert step["loss"] is None
    assert step["non_finite"] == {"loss": str(value), "grad_norm": str(value)}
    assert validation == {"step": 1, "validation_loss": None, "non_finite": {"validation_loss": str(value)}}
    assert list(sound) == KEYS
    assert str(value) in capsys.readouterr().out
    metrics.finish()  # the curve and the summary live with the hole
    assert "first 2.0000 (step 2)" in capsys.readouterr().out


def test_extra_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = logger(tmp_path, *QUIET)
    log(metrics, 1, extra={"z_loss": 0.25})
    assert lines_of(tmp_path)[0]["z_loss"] == 0.25
    assert capsys.readouterr().out.rstrip().endswith("z_loss 0.25")
    with pytest.raises(AssertionError, match="loss"):
        log(metrics, 2, extra={"loss": 0.25})


def test_a_resumed_run_writes_one_history(tmp_path: Path) -> None:
    first = logger(tmp_path, *QUIET)
    for step in (10, 20, 30):
        log(first, step, loss=float(step))
        first.validation(step, step + 0.5)
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 40, "lo')  # killed while it wrote
    kept = path.read_bytes().splitlines(keepends=True)[:4]
    again = logger(tmp_path, *QUIET, start_step=20, tokens_seen=20_000)
    assert path.read_bytes() == b"".join(kept)
    log(again, 30, loss=31.0)
    assert [(line["step"], line.get("loss")) for line in lines_of(tmp_path)] == [
        (10, 10),
        (10, None),
        (20, 20),
        (20, None),
        (30, 31),
    ]


def test_a_torn_line_at_the_resumed_step_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    nested = b"[" * 100_000
    path.write_bytes(b'{"step": 10, "loss": 2.5}\n\xff\xfe garbage\n[1]\n' + nested + b'\n{"step": 20, "loss": 2.')
    assert run_history.keep_until(path, 20) == 4
    assert path.read_bytes() == b'{"step": 10, "loss": 2.5}\n'


def test_a_run_from_step_0_sets_an_earlier_history_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = tmp_path / "metrics.jsonl", '{"step": 0, "validation_loss": 8.0}\n{"step": 10, "loss": 2.5}\n'
    for name in ("metrics-until-10.jsonl", "metrics-until-10-2.jsonl", "metrics-until-10-3.jsonl"):
        path.write_text(before)
        logger(tmp_path, *QUIET)
        assert not path.exists() and (tmp_path / name).read_text() == before
        assert f"begins again at step 0; metrics.jsonl of an earlier start is now {name}" in capsys.readouterr().out
    path.write_text('{"step": 10, "lo')  # nothing to keep
    logger(tmp_path, *QUIET)
    assert not path.exists() and len(list(tmp_path.glob("metrics*"))) == 3


def test_cutting_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run_history.keep_until(path, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.04172, "2.0417"),
        (3.14e-5, "3.1e-05"),
        (1e-3, "0.0010"),
        (0.0, "0.0000"),
        (-4e-4, "-4.0e-04"),
        (math.inf, "inf"),
    ],
)
def test_what_is_small_is_not_shown_as_nothing(value: float, text: str) -> None:
    assert small(value) == text


def test_a_small_loss_and_gradient_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = logger(tmp_path, *QUIET)
    log(metrics, 40, loss=3e-5, grad_norm=2e-6)
    metrics.validation(40, 4e-5)
    metrics.finish()
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert "loss 3.0e-05 grad norm 2.0e-06 lr" in said and "validation loss 4.0e-05\n" in said
    assert "best 3.0e-05 (step 40)" in said and "best 4.0e-05 (step 40)" in said


def test_less_than_a_token_a_second_is_not_shown_as_none(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = logger(tmp_path, *QUIET, tokens_per_step=32)
    metrics.start([])
    clock.now += 60
    log(metrics, 1)
    metrics.finish()
    said = capsys.readouterr().out
    assert "tokens/s    0.27  MFU" in said and "0.27 per device, mean" in said


@pytest.mark.parametrize("devices", [1, 2])
def test_what_rank_0_measures_is_said_to_be_its_own(
    devices: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rank may hold more, or wait for its data while rank 0 waits for it."""
    metrics = logger(tmp_path, *QUIET, n_devices=devices)
    metrics.start([])
    log(metrics, 40)
    metrics.finish()
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith(("memory ", "data wait ", "peak memory "))]
    assert len(lines) == 4 and [line.endswith(", on rank 0") for line in lines] == [devices > 1] * 4, said


def test_mfu_with_masked_documents_says_what_it_counts(
    tmp_path: Path, a100: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    a100("NVIDIA A100-SXM4-80GB")
    for masks in (False, True):
        logger(tmp_path, *QUIET, f"--training.document_mask={masks}", device=torch.device("cuda")).start([])
        assert ("titan, which counts attention over whole sequences," in capsys.readouterr().out) == masks


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = logger(tmp_path, is_main=False)
    metrics.start([("model", "a Llama")])
    with metrics.pause():
        pass
    log(metrics, 1)
    metrics.validation(1, 2.0)
    metrics.sample(1, "text")
    metrics.say("text")
    metrics.finish()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Files of the same second are read in the order of their names' last part, a counter of this process: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    first = logger(tmp_path, "--optimizer.lr", "0.0123")
    for step in (1, 2, 3, 4):
        log(first, step, loss=float(step))
    first.validation(4, 4.5)
    first.sample(4, "def f():\n    return 1")
    first.finish()
    read = events(tmp_path / "tb")
    assert set(read.Tags()["scalars"]) == {*KEYS, "validation_loss"} - {"step", "mfu"}
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    texts = {tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert "    lr = 0.0123\n" in texts["config/text_summary"]
    assert texts["sample/text_summary"] == "    def f():\n        return 1\n"

    again = logger(tmp_path, start_step=2)
    log(again, 3, loss=30.0)
    again.finish()
    resumed = events(tmp_path / "tb").Scalars("loss")
    assert [(event.step, event.value) for event in resumed] == [(1, 1), (2, 2), (3, 30)]
    capsys.readouterr()
    elsewhere = logger(tmp_path / "run", "--metrics.save_tb_folder", "../my tb")
    log(elsewhere, 1)
    elsewhere.finish()
    assert f"(tensorboard --logdir '{tmp_path}/run/../my tb')" in capsys.readouterr().out.replace("\n", "")
    assert events(tmp_path / "my tb").Scalars("loss")


def test_train_log_has_every_line_with_its_time(tmp_path: Path) -> None:
    for attempt in ("one", "two"):
        metrics = logger(tmp_path, *QUIET)
        metrics.say(f"{attempt}\nand more")
        metrics.close()
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["one", "and more", "two", "and more"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)


def test_aligned() -> None:
    assert aligned([("a", "1"), ("long", "2\n3"), ("", "4")]) == "a     1\nlong  2\n      3\n      4"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (83.9, "0:01:23"), (86399, "23:59:59"), (93784, "1d 02:03:04")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_sample_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\r\n\tb\x00\u202eé") == "a\ufffd[2J\ufffd\n\tb\ufffd\ufffdé"
    assert printable("\u200cन्\u200dष\u3000\xa0") == "\u200cन्\u200dष\u3000\xa0", "what scripts need stays"


DRIVE = """
import sys
from pathlib import Path
import torch
from titan_fast.config import model_shape, parse
from titan_fast.errors import command
from titan_fast.metrics import MetricsLogger
@command
def main():
    config = parse(["--training.steps", "4", "--metrics.enable_tensorboard", "False"])
    metrics = MetricsLogger(config, run_dir=Path(sys.argv[1]), is_main=True, shape=model_shape(config.model),
                            device=torch.device("cpu"), n_devices=1, tokens_per_step=8)
    metrics.start([])
    for step in (2, 4):
        metrics.log(step, loss=1.0, grad_norm=1.0, lr=0.1, tokens_seen=8, data_wait_seconds=0.0)
    metrics.sample(4, "\\u00e9 [bold]")
    if "stop" in sys.argv:
        sys.exit(3)
    metrics.finish()
main()
"""


def on_a_terminal(*arguments: str) -> tuple[int, str]:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVE, *arguments],
        stdout=terminal,
        stderr=subprocess.STDOUT,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(controller)
    return process.wait(timeout=180), output.decode()


@pytest.mark.parametrize("how", ["finish", "stop"])
def test_progress_bar_on_a_terminal_only(tmp_path: Path, how: str) -> None:
    status, terminal = on_a_terminal(str(tmp_path), how)
    assert status == (3 if how == "stop" else 0)
    assert "━" in terminal
    assert "2/4" in terminal
    assert "[bold]" in terminal
    # The cursor is hidden while the bar is shown, and must reappear however the run ended.
    assert terminal.rindex("\x1b[?25h") > terminal.rindex("\x1b[?25l")


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVE, str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"}
    result = subprocess.run(command, capture_output=True, env=environment, timeout=180)
    assert result.returncode == 0, result.stderr
    assert b"\x1b" not in result.stdout
    assert rb"\xe9 [bold]" in result.stdout
    assert "é [bold]" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_a_console_that_nobody_reads_does_not_end_the_run(tmp_path: Path) -> None:
    """As with `2>&1 | tee` if tee is killed."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", DRIVE, str(tmp_path)]
    assert subprocess.run(command, stdout=writer, stderr=writer, timeout=180).returncode == 0
    os.close(writer)
    lines = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert lines.count("WARNING: the console is gone: Broken pipe; the run goes on") == 1
    assert "step 4/4" in lines and "finished" in lines


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "terminal", "terminal that seems to have room"])
def test_lines_that_nobody_reads_are_left_out_and_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_PATIENCE_SECONDS", 0.0)
    if kind == "terminal that seems to have room":  # as happens on a busy machine
        monkeypatch.setattr(console.Console, "_has_room", lambda *_: True)
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    os.set_blocking(reader, False)

    def read() -> str:
        found = b""
        with suppress(BlockingIOError):
            while True:
                found += os.read(reader, 65536)
        return found.decode(errors="replace").replace("\r\n", "\n")

    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        metrics = logger(tmp_path)
        for number in range(20):
            metrics.say("\n".join(f"line {number:02} {part:02} {'é' * 50}" for part in range(60)))
        shown = read()
        metrics.say("one")
        metrics.say("two")
        after = read()
    metrics.close()
    os.close(reader)
    assert re.search(r"\n\(\d+ lines were left out .* train\.log has the steps\)\none\ntwo\n$", after), after
    # There may be several notes: a terminal moves what it holds in the background, and then has room for more.
    notes = re.findall(r"^\((\d+) lines were left out .* steps\)$", shown + after, re.MULTILINE)
    seen = len(re.findall(r"é\n(?!\()", shown + after))
    assert 0 < seen < 20 * 60 and sum(map(int, notes)) == 20 * 60 - seen
    log = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert len(log) == 20 * 60 + 2 and "line 19 59" in log[-3]


@pytest.mark.timeout(60)
def test_a_terminal_that_was_stopped_does_not_stop_the_run(tmp_path: Path) -> None:
    """By Ctrl-S, and with the progress bar's thread."""
    controller, terminal = pty.openpty()
    termios.tcflow(terminal, termios.TCOOFF)
    command = [sys.executable, "-c", DRIVE, str(tmp_path)]
    status = subprocess.run(command, stdout=terminal, env=os.environ | {"TERM": "xterm"}, timeout=50).returncode
    os.close(terminal)
    os.close(controller)
    assert status == 0
    assert "step 4/4" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_summary_and_loss_curve(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    memory = iter((2.0, 3.5, 1.0, 1.0))  # GiB since the line before
    monkeypatch.setattr("titan_fast.metrics.peak_memory", lambda device: next(memory))
    metrics = logger(tmp_path, *QUIET, "--job.description", r"data in $HOME\data, lr $LR")  # is no mathematics
    metrics.start([])
    for step, loss, seconds in ((10, 8.0, 50), (20, 4.0, 5), (30, 3.0, 4), (40, 3.5, 6)):
        clock.now += seconds
        log(metrics, step, loss=loss, data_wait_seconds=0.13 * step)
        if step == 10:
            assert "ETA 0:02:30" in capsys.readouterr().out  # 30 steps of 5 s
    metrics.validation(25, 3.75)
    metrics.validation(40, 4.25)
    capsys.readouterr()
    metrics.finish()
    summary = capsys.readouterr().out
    for expected in (
        "finished         step 40/40, 40,000 tokens",
        "first 8.0000 (step 10), last 3.5000 (step 40), best 3.0000 (step 30)",
        "last 4.2500 (step 40), best 3.7500 (step 25)",
        "1,000 per device, mean without the first 10 steps",  # 30 steps of 1000 tokens in 15 s on 2 devices
        "8.00% of the time of the steps",  # 5.2 of 65 s
        "peak memory      3.50 GiB",
        str(tmp_path),
        "metrics.jsonl, loss_curve.png",
    ):
        assert expected in summary
    (figure,) = drawn
    train, held_out = figure.axes[0].lines
    assert np.asarray(train.get_xydata()).tolist() == [[10e3, 8], [20e3, 4], [30e3, 3], [40e3, 3.5]]
    assert np.asarray(held_out.get_xydata()).tolist() == [[25e3, 3.75], [40e3, 4.25]]
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert not list(tmp_path.glob("*.new"))


def test_a_run_that_stops_early_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = logger(tmp_path, *QUIET)
    metrics.finish()
    assert "stopped        step  0/40, 0 tokens" in capsys.readouterr().out
    assert not (tmp_path / "loss_curve.png").exists()


def test_a_run_that_fails_between_log_lines_says_where(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = logger(tmp_path, *QUIET)
    metrics.start([])
    clock.now += 2
    log(metrics, 1)
    clock.now += 3
    log(metrics, 10, loss=math.nan)
    with metrics.pause():
        clock.now += 40
    clock.now += 20
    metrics.finish(failed=True, step=19, tokens_seen=19_000)
    said = capsys.readouterr().out
    for expected in (
        "failed         step 19/40, 19,000 tokens",
        "first 2.0000 (step 1), last 2.0000 (step 1), best 2.0000 (step 1)",
        "1,500 per device, mean of those up to step 10 without the first step",
        "start 0:00:00, steps 0:00:25, pauses (validation, checkpoints, samples, traces) 0:00:40",
    ):
        assert expected in said, said


def test_a_window_system_that_is_not_there_is_not_asked_for(tmp_path: Path) -> None:
    """As when a notebook names one for its child processes."""
    program = "from pathlib import Path; from titan_fast import run_history as r; import sys;"
    program += "r.draw_loss_curve([{'step': 1, 'loss': 2.0, 'tokens_seen': 10}], Path(sys.argv[1]), 'a run')"
    environment = os.environ | {"MPLBACKEND": "module://nowhere.backend"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "curve.png")], env=environment, check=True)
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_what_train_log_alone_is_told_has_no_secret(tmp_path: Path) -> None:
    metrics = logger(tmp_path, *QUIET)
    metrics.write_down("ended by OSError: s3://me:hunter2hunter2@bucket")
    metrics.close()
    assert "s3://<redacted>@bucket" in (tmp_path / "train.log").read_text()


def test_neither_a_sample_nor_the_curve_has_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(run_history, "draw_loss_curve", lambda records, path, title: titles.append(title))
    metrics = logger(tmp_path, "--job.description", "from s3://me:hunter2@bucket")
    metrics.sample(1, "password=hunter2")
    log(metrics, 1)
    metrics.finish()
    (sample,) = events(tmp_path / "tb").Tensors("sample/text_summary")
    assert b"password=<redacted>" in sample.tensor_proto.string_val[0]
    assert titles == ["from s3://<redacted>@bucket"]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def test_a_long_history_is_gone_through_once_and_not_for_every_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a million steps has a hundred thousand lines and a thousand validations."""
    looked: list[int] = []
    interpolate = np.interp

    def counted(steps: Any, logged: list[int], tokens: list[int]) -> Any:
        looked.append(len(logged))
        return interpolate(steps, logged, tokens)

    monkeypatch.setattr(np, "interp", counted)
    records = [{"step": step, "loss": 2.0, "tokens_seen": 10 * step} for step in range(1, 101)]
    records += [{"step": step, "validation_loss": 2.0} for step in range(10, 101, 10)]
    run_history.draw_loss_curve(records, tmp_path / "curve.png", "a run")
    assert looked == [101]


def test_a_curve_that_cannot_be_drawn_does_not_hide_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(run_history, "draw_loss_curve", refuse)
    metrics = logger(tmp_path, *QUIET)
    metrics.start([])
    log(metrics, 40)
    metrics.finish()
    said = capsys.readouterr().out
    assert "loss_curve.png cannot be written: ValueError: no such font" in said and "finished " in said


def test_a_disk_that_fails_takes_the_summarys_losses_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error that ended the run is not replaced by one during its end."""
    metrics = logger(tmp_path, *QUIET)
    log(metrics, 40)

    def refuse(path: Path) -> list:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(run_history, "read", refuse)
    metrics.finish(failed=True)
    said = capsys.readouterr().out
    assert "metrics.jsonl cannot be read: Input/output error; the summary lacks its losses" in said.replace("\n", " ")
    assert "failed " in said


def test_tensorboards_thread_leaves_its_error_to_the_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    metrics = logger(tmp_path)
    monkeypatch.setattr(record_writer.RecordWriter, "write", refuse)
    until = time.monotonic() + 30
    step = 0
    while metrics._writes_tensorboard and time.monotonic() < until:
        log(metrics, step := step + 1)
    metrics.finish()
    said = capsys.readouterr().out.replace("\n", " ")
    assert "WARNING: TensorBoard's events cannot be written: Read-only file system" in said
    assert not told
    thread = threading.Thread(target=refuse)
    thread.start()
    thread.join()
    assert [ended.thread for ended in told] == [thread], "of another it is told"


def test_a_curve_that_a_full_disk_refuses_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def refuse(figure: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    curve = tmp_path / "loss_curve.png"
    curve.write_bytes(b"the last one")
    monkeypatch.setattr(Figure, "savefig", refuse)
    with pytest.raises(OSError, match="No space"):
        run_history.draw_loss_curve([{"step": 1, "loss": 2.0, "tokens_seen": 10}], curve, "a run")
    assert list(tmp_path.iterdir()) == [curve] and curve.read_bytes() == b"the last one"


def test_a_console_that_is_no_file_takes_everything() -> None:
    class Tee:
        encoding, said = "utf-8", ""

        def write(self, text: str) -> None:
            self.said += text

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    tee: Any = Tee()
    Console(tee).write("one\n" * 5000)
    assert tee.said == "one\n" * 5000
