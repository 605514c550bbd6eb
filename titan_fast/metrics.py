"""What a run reports: console, train.log, metrics.jsonl, TensorBoard, and at the end a summary and the loss curve.

Only rank 0 reports; on other ranks every method does nothing. Only `log` may wait for the device.
"""

import atexit
import resource
import shlex
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import tomli_w
import torch

from titan_fast import flops, run_history
from titan_fast.config import Config, to_dict
from titan_fast.console import Console
from titan_fast.errors import NO_ROOM, leave_console
from titan_fast.flavors import ModelShape
from titan_fast.log_file import LogFile
from titan_fast.redaction import redact, redacted
from titan_fast.run_history import Record
from titan_fast.training_clock import TrainingClock

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard.writer import SummaryWriter

MFU_FORMULA: flops.Formula = "titan"
LOSS_CURVE = "loss_curve.png"
GIB = 1024**3
STATUS = Path("/proc/self/status")


def aligned(lines: list[tuple[str, str]]) -> str:
    """Labels in one column, values in the next; further lines of a value are aligned with its first."""
    width = max((len(label) for label, _ in lines), default=0)
    newline = "\n" + " " * (width + 2)
    return "\n".join(f"{label:<{width}}  {value}".rstrip().replace("\n", newline) for label, value in lines)


def small(number: float) -> str:
    """Four places, but in another form where these would hide how small it is: 2.0417, 3.1e-05."""
    return f"{number:.4f}" if number == 0 or not abs(number) < 1e-3 else f"{number:.1e}"


def speed(tokens_per_second: float) -> str:
    """Whole tokens, but a slow run's in two places: "11,366", "0.27"."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.2f}"


def duration(seconds: float) -> str:
    """83.4 -> "0:01:23", a day and more as "1d 02:03:04"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def printable(text: str) -> str:
    """Sampled text without control characters, which could do anything to the reader's terminal. Spaces of every
    script stay, as do the joiners that some need."""

    def stays(char: str) -> bool:
        return char.isprintable() or char in "\n\t\u200c\u200d" or unicodedata.category(char) == "Zs"

    return "".join(char if stays(char) else "\N{REPLACEMENT CHARACTER}" for char in text)


def peak_memory(device: torch.device) -> float:
    """GiB: on CUDA the most that torch's allocator held since the last call, on CPU the most that was ever resident."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIB
    with suppress(OSError):  # where there is no /proc
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    # On Linux this counts what the process that started this one held, too.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # macOS counts bytes, Linux KiB


@dataclass
class _Totals:
    """Totals of this process over the windows between log lines. The first window includes compilation and warm-up."""

    steps: int = 0
    seconds: float = 0.0
    first_steps: int = 0
    first_seconds: float = 0.0
    pause_seconds: float = 0.0
    """Validation, checkpoints and samples, after the first window."""
    data_wait_seconds: float = 0.0
    peak_memory: float = 0.0

    def add(self, steps: int, seconds: float) -> None:
        if not self.steps:
            self.first_steps, self.first_seconds, self.pause_seconds = steps, seconds, 0.0
        self.steps += steps
        self.seconds += seconds

    def seconds_per_step(self) -> float:
        """Excludes the first window if there are others."""
        steps, seconds = self.steps - self.first_steps, self.seconds - self.first_seconds
        return seconds / steps if steps else self.seconds / max(self.steps, 1)

    def seconds_left(self, steps: int) -> float:
        """Expected time for so many more steps, with pauses as often as so far."""
        return steps * (self.seconds_per_step() + self.pause_seconds / max(self.steps - self.first_steps, 1))


_other_threads: list[Callable[[threading.ExceptHookArgs], Any]] = []


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Suppresses the traceback of TensorBoard's thread where the disk has refused. The thread keeps the error, and the
    next event raises it, to be reported in a sentence."""
    if not (isinstance(ended.exc_value, OSError) and getattr(ended.thread, "exception", None) is ended.exc_value):
        _other_threads[-1](ended)


class MetricsLogger:
    """Built once per process, before the first step."""

    def __init__(
        self,
        config: Config,
        *,
        run_dir: Path,
        is_main: bool,
        shape: ModelShape,
        device: torch.device,
        n_devices: int,
        tokens_per_step: int,
        start_step: int = 0,
        tokens_seen: int = 0,
        elapsed_before: float = 0.0,
        went_back: bool = False,
        began: float | None = None,
    ) -> None:
        """tokens_per_step: of all devices together. start_step, tokens_seen, elapsed_before: where a resumed run
        continues; later steps are removed from metrics.jsonl, and a run from step 0 sets the whole file aside.
        went_back: whether the later steps were saved, and left on purpose. began: when the process started, by
        time.perf_counter (None: now)."""
        self.config, self.run_dir, self.is_main, self.device = config, run_dir, is_main, device
        self.n_devices, self.tokens_per_step = n_devices, tokens_per_step
        self.start_step = self.last_step = start_step
        self.tokens_seen, self.elapsed_before = tokens_seen, elapsed_before
        self.began = time.perf_counter() if began is None else began
        self.started = self.began
        """When the start-up ended."""
        self.step_seconds = 0.0
        """From there to the end, without pauses."""
        self.ended_after = start_step
        """The last step, whether or not it was logged."""
        self.of_rank_0 = ", on rank 0" if n_devices > 1 else ""
        self.clock = TrainingClock(device if is_main else torch.device("cpu"))
        self.totals = _Totals()
        self.flops_per_token = flops.flops_per_token(shape, config.training.seq_len, MFU_FORMULA)
        self.peak, self.mfu_note = self._peak()
        self.metrics_path = run_dir / "metrics.jsonl"
        self._writer: SummaryWriter | None = None
        self._writes_tensorboard = config.metrics.enable_tensorboard
        self._progress: Progress | None = None
        self._console = Console(sys.stdout)
        self._log_file, self._metrics_file = LogFile(run_dir / "train.log"), LogFile(self.metrics_path)
        if is_main:
            self._open(went_back)

    def _open(self, went_back: bool) -> None:
        atexit.register(self.close)
        if self.start_step > 0:  # time that was spent on steps after it counts too
            said = (record.get("elapsed_seconds") or 0.0 for record in run_history.read(self.metrics_path))
            self.elapsed_before = max(chain([self.elapsed_before], said))
        for path in (self.metrics_path, self.run_dir / run_history.BAD_STEPS):
            if said_of_it := run_history.go_on_from(path, self.start_step, went_back):
                self.say(said_of_it)

    def _peak(self) -> tuple[float | None, str]:
        """The device's peak, or None where MFU means nothing, and a sentence about it."""
        if self.device.type != "cuda":
            return None, "no MFU: a CPU has no peak listed"
        name = torch.cuda.get_device_name(self.device)
        if self.config.training.mixed_precision_param == "float32":
            return None, "no MFU: the peaks listed are of bfloat16, and this run computes in float32"
        if self.config.float8.enable:
            return None, "no MFU: the peaks listed are of bfloat16, and most of this run's products are float8"
        peak = flops.known_peak(name)
        if peak is None:
            return None, flops.unknown_peak_sentence(name)
        masked = ", which counts attention over whole sequences" if self.config.training.document_mask else ""
        per_token = f"{self.flops_per_token:,} FLOPs per token"
        note = f"by formula {MFU_FORMULA}{masked}, {per_token}, {peak.flops / 1e12:g} TFLOP/s"
        return peak.flops, f"{note} ({peak.source})"

    @property
    def elapsed_seconds(self) -> float:
        """Wall time of the whole run: of every process that took part in it from its beginning on, with all pauses; of
        one that was killed up to its last line or save."""
        return self.elapsed_before + time.perf_counter() - self.began

    def say(self, text: str) -> None:
        """Writes one or several lines to the console, and with the time to train.log."""
        if not self.is_main:
            return
        text = redact(text)
        try:
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                self._console.write(f"{text}\n")
        except OSError as error:
            if error.errno not in NO_ROOM:
                self._leave_console(error)
        self._to_log_file(text)

    def write_down(self, text: str) -> None:
        """Writes to train.log alone what something else tells the console."""
        if self.is_main:
            self._to_log_file(redact(text))

    def _to_log_file(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log_file.write("".join(f"{stamp} {line}\n" for line in text.split("\n")))

    def _leave_console(self, error: OSError) -> None:
        """A reader that is gone or a terminal that was closed does not end a run."""
        leave_console()
        self._to_log_file(f"WARNING: the console is gone: {error.strerror}; the run goes on, and tells this file alone")

    def start(self, lines: list[tuple[str, str]]) -> None:
        """Prints the start-up block: `lines` (label, value), then what the numbers in log lines mean. The first window
        begins here."""
        if not self.is_main:
            return
        memory = (
            "most that torch's CUDA allocator reserved since the last line"
            if self.device.type == "cuda"
            else "most that was ever resident in this process"
        )
        meanings = [("tokens/s", "per device"), ("MFU", self.mfu_note), ("memory", memory + self.of_rank_0)]
        meanings.append(("data wait", f"part of the time of the steps{self.of_rank_0}"))
        self.say(aligned([*lines, *meanings]))
        self._start_progress()
        self.clock.restart()
        self.started = self.clock.began

    def _start_progress(self) -> None:
        if not self._console.isatty():
            return
        from rich import console, progress

        self._progress = progress.Progress(
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console.Console(file=cast(TextIO, self._console)),
            refresh_per_second=1,  # its thread takes Python's lock from the loop
            redirect_stderr=False,
            transient=True,
        )
        self._progress.add_task("train", total=self.config.training.steps, completed=self.start_step)
        self._progress.start()

    def log(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens_seen: int,
        data_wait_seconds: float,
        data: dict[str, int] | None = None,
        extra: dict[str, float] | None = None,
    ) -> None:
        """Reports the steps since the last call: `loss`, `grad_norm` and `lr` are of `step`, `tokens_seen` is the whole
        run's, `data_wait_seconds` what this process has waited for data in all (`Loader.wait_seconds`). data: which
        samples `step` had (`Loader.position`), for metrics.jsonl alone."""
        if not self.is_main:
            return
        seconds, steps = self.clock.window(), step - self.last_step
        self.totals.add(steps, seconds)
        waited = data_wait_seconds - self.totals.data_wait_seconds
        self.totals.data_wait_seconds = data_wait_seconds
        self.last_step, self.tokens_seen = step, tokens_seen
        tokens_per_second = self.tokens_per_step * steps / seconds / self.n_devices
        memory = peak_memory(self.device)
        self.totals.peak_memory = max(self.totals.peak_memory, memory)
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "mfu": flops.mfu(tokens_per_second, self.flops_per_token, self.peak) if self.peak else None,
            "memory_gib": memory,
            "data_wait_fraction": waited / seconds,
            "tokens_seen": tokens_seen,
            "elapsed_seconds": self.elapsed_seconds,
        }
        clash = record.keys() & (extra or {}).keys()
        assert not clash, f"extra metrics {sorted(clash)} would hide ours"
        self.say(self._line(record, extra or {}))
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)
        self._write(record | (extra or {}), {"data": data} if data else {})

    def _line(self, record: Record, extra: dict[str, float]) -> str:
        steps = self.config.training.steps
        mfu = "    -" if record["mfu"] is None else f"{record['mfu']:5.1%}"
        left = duration(self.totals.seconds_left(steps - record["step"]))
        parts = [
            self._step(record["step"]),
            f"loss {small(record['loss']):>7}",
            f"grad norm {small(record['grad_norm']):>8}",
            f"lr {record['lr']:.2e}",
            f"tokens/s {speed(record['tokens_per_second']):>7}",
            f"MFU {mfu}",
            f"memory {record['memory_gib']:5.2f} GiB",
            f"data wait {record['data_wait_fraction']:5.1%}",
            f"ETA {left}",
            *(f"{name} {value:.4g}" for name, value in extra.items()),
        ]
        return "  ".join(parts)

    def _step(self, step: int) -> str:
        steps = self.config.training.steps
        return f"step {step:>{len(str(steps))}}/{steps}"

    def _write(self, record: Record, more: Record | None = None) -> None:
        """To metrics.jsonl and TensorBoard; `more`, which is not a number, to the former alone."""
        self._metrics_file.write(run_history.encode(record | (more or {})))

        def add(writer: "SummaryWriter") -> None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, record["step"])

        self._to_tensorboard(add)

    def _to_tensorboard(self, add: Callable[["SummaryWriter"], None]) -> None:
        """A disk that refuses ends TensorBoard's events, not the process."""
        if not self._writes_tensorboard:
            return
        try:
            add(self._tensorboard())
        except OSError as error:
            self._writes_tensorboard = False
            self._close_tensorboard()
            self.say(
                f"WARNING: TensorBoard's events cannot be written: {error.strerror}; they end here, metrics.jsonl goes "
                "on"
            )

    def _tensorboard(self) -> "SummaryWriter":
        """The writer, created when first needed: its import takes 0.2 s, from a cold disk 1.6 s. The first log line
        does not wait for that, and it counts as a pause."""
        if self._writer is None:
            if threading.excepthook is not _thread_ended:
                _other_threads.append(threading.excepthook)
                threading.excepthook = _thread_ended
            with self.clock.pause():
                from torch.utils.tensorboard.writer import SummaryWriter

                # purge_step hides what an interrupted run wrote beyond the step that this one starts from.
                folder = self.run_dir / self.config.metrics.save_tb_folder
                self._writer = SummaryWriter(str(folder), purge_step=self.start_step + 1, flush_secs=30)
                self._writer.add_text("config", _code(tomli_w.dumps(redacted(to_dict(self.config)))), self.start_step)
        return self._writer

    @contextmanager
    def pause(self) -> Iterator[None]:
        """For validation, checkpoints, samples and traces: not training time, but included in the summary."""
        began = time.perf_counter()
        with self.clock.pause():
            yield
        self.totals.pause_seconds += time.perf_counter() - began

    def has_validation(self, step: int) -> bool:
        """Whether metrics.jsonl has the loss on held-out text after `step`. For the main process."""
        return any(r["step"] == step and "validation_loss" in r for r in run_history.read(self.metrics_path))

    def validation(self, step: int, loss: float) -> None:
        """The loss on held-out text after `step`."""
        if self.is_main:
            self.say(f"{self._step(step)}  validation loss {small(loss):>7}")
            self._write({"step": step, "validation_loss": loss})

    def sample(self, step: int, text: str) -> None:
        """Text that the model wrote after `step`."""
        if not self.is_main:
            return
        text = redact(printable(text))
        self.say(aligned([(f"{self._step(step)}  sample", text)]))
        self._to_tensorboard(lambda writer: writer.add_text("sample", _code(text), step))

    def finish(self, failed: bool = False, step: int | None = None, tokens_seen: int | None = None) -> None:
        """Draws loss_curve.png, prints the summary and closes everything. failed: whether an error has ended the
        run. step, tokens_seen: how far it has come, by default as of the last log line."""
        if not self.is_main:
            return
        self.step_seconds = time.perf_counter() - self.started - self.clock.paused_seconds
        self.ended_after = self.last_step if step is None else step
        self.tokens_seen = self.tokens_seen if tokens_seen is None else tokens_seen
        self._stop_progress()
        try:
            records = list(run_history.read(self.metrics_path))
        except OSError as error:  # which must not hide the error that has ended the run
            records = []
            self.say(f"WARNING: {self.metrics_path} cannot be read: {error.strerror}; the summary lacks its losses")
        if run_history.losses(records):
            title = redact(self.config.job.description) or self.config.model.flavor
            try:
                run_history.draw_loss_curve(records, self.run_dir / LOSS_CURVE, title)
            except Exception as error:  # a picture must not make a run fail
                why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                self.say(f"WARNING: {LOSS_CURVE} cannot be written: {why}")
        self.say(aligned(self._summary(records, failed)))
        if self.ended_after > self.start_step:  # a later start knows of what came after the last line and the last save
            self._metrics_file.write(
                run_history.encode({"step": self.ended_after, "elapsed_seconds": self.elapsed_seconds})
            )
        self.close()

    def _summary(self, records: list[Record], failed: bool) -> list[tuple[str, str]]:
        train, held_out = run_history.losses(records), run_history.validations(records)
        complete = self.ended_after >= self.config.training.steps
        label = "failed" if failed else "finished" if complete else "stopped"
        lines = [(label, f"{self._step(self.ended_after)}, {self.tokens_seen:,} tokens")]
        if train:
            best = min(train, key=lambda record: record["loss"])
            lines.append(
                (
                    "loss",
                    f"first {small(train[0]['loss'])} (step {train[0]['step']}), "
                    f"last {small(train[-1]['loss'])} (step {train[-1]['step']}), "
                    f"best {small(best['loss'])} (step {best['step']})",
                )
            )
        if held_out:
            best = min(held_out, key=lambda record: record["validation_loss"])
            lines.append(
                (
                    "validation loss",
                    f"last {small(held_out[-1]['validation_loss'])} (step {held_out[-1]['step']}), "
                    f"best {small(best['validation_loss'])} (step {best['step']})",
                )
            )
        if self.totals.steps:
            lines.extend(self._speed())
        lines.append(("run directory", str(self.run_dir.absolute())))
        files = ["train.log", "metrics.jsonl"] + [LOSS_CURVE] * bool(train)
        if self._writer is not None:
            command = f"tensorboard --logdir {shlex.quote(self._writer.log_dir)}"
            files.append(f"{self.config.metrics.save_tb_folder}/ ({command})")
        lines.append(("", ", ".join(files)))
        return lines

    def _speed(self) -> list[tuple[str, str]]:
        totals = self.totals
        tokens_per_second = self.tokens_per_step / totals.seconds_per_step() / self.n_devices
        first = "the first step" if totals.first_steps == 1 else f"the first {totals.first_steps} steps"
        warm_up = f" without {first}" if totals.steps > totals.first_steps else ""
        unlogged = f" of those up to step {self.last_step}" if self.ended_after > self.last_step else ""
        said = f"{speed(tokens_per_second)} per device, mean{unlogged}{warm_up}"
        if self.peak:
            said += f"; MFU {flops.mfu(tokens_per_second, self.flops_per_token, self.peak):.1%} by {MFU_FORMULA}"
        elapsed = f"{duration(self.elapsed_seconds)}, of it since step {self.start_step}: "
        elapsed += f"start {duration(self.started - self.began)}, steps {duration(self.step_seconds)}, "
        elapsed += f"pauses (validation, checkpoints, samples, traces) {duration(self.clock.paused_seconds)}"
        return [
            ("tokens/s", said),
            ("data wait", f"{totals.data_wait_seconds / totals.seconds:.2%} of the time of the steps{self.of_rank_0}"),
            ("peak memory", f"{totals.peak_memory:.2f} GiB{self.of_rank_0}"),
            ("time", elapsed),
        ]

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _close_tensorboard(self) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Restores the terminal and closes the files. Also called at the process's end, whatever the reason."""
        self._stop_progress()
        self._close_tensorboard()
        self._log_file.close()
        self._metrics_file.close()
        atexit.unregister(self.close)


def _code(text: str) -> str:
    """`text` as a Markdown code block, so that TensorBoard shows it unchanged."""
    return "".join(f"    {line}\n" for line in text.split("\n"))
