"""Runs a cell in its own processes: watched, ended if they hang, and started again for what an error left undone."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from benchmarks.result_files import read
from benchmarks.workloads import Cell
from titan_fast.errors import DataError

LIMIT_SECONDS = 460.0
"""For one process."""
SILENCE_SECONDS = 180.0
"""A process that saves nothing for so long hangs: it saves after each first step (which compiles) and each block."""
OUT_OF_TIME = "stopped after"
"""How `watched`'s answer begins for a process that reached the limit."""
_POLL_SECONDS = 0.1
_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG

Row = dict[str, Any]
Answer = dict[str, Any]


def watched(
    command: Sequence[str],
    environment: dict[str, str],
    folder: Path,
    answer: Path,
    heard: Callable[[], None] = lambda: None,
    limit: float = LIMIT_SECONDS,
    silence: float = SILENCE_SECONDS,
) -> str:
    """Runs `command` in `folder` until it ends, `limit` seconds have passed, or `answer`, the file that it writes, has
    not changed for `silence` seconds. heard: called after each change. Everything that it started ends with it, also if
    this process is told to end. Returns what went wrong, or ""."""
    started = changed = time.monotonic()
    seen, problem = 0, ""
    with TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=errors, process_group=0)
        try:
            while process.poll() is None and not problem:
                time.sleep(_POLL_SECONDS)
                now, stamp = time.monotonic(), answer.stat().st_mtime_ns if answer.exists() else 0
                if stamp != seen:
                    seen, changed = stamp, now
                    heard()
                if now - started > limit:
                    problem = f"{OUT_OF_TIME} {limit:.0f} s"
                elif now - changed > silence:
                    problem = f"stopped: it wrote nothing for {silence:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # the compiler's workers too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        heard()
        if problem or process.returncode == 0:
            return problem
        return f"{_ending(process.returncode)}{_last_words(errors)}"


def _ending(status: int) -> str:
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def _last_words(errors: Any) -> str:
    """The last line of its error stream, which for Python is the exception."""
    errors.seek(0)
    text = errors.read()[-20_000:]
    sys.stderr.write("".join(f"    | {line}\n" for line in text.splitlines()[-30:]))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1]}"[:400] if lines else ""


def end_with_parent() -> None:
    """To be called by a process that must not outlive the one that started it, however that ends. Linux only."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGKILL)


def end_on_sigterm() -> None:
    """Makes SIGTERM an exception in this process, so that child processes are ended and results are kept."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@dataclass
class Run:
    """A cell, in as many processes as it needs."""

    cell: Cell
    once: Callable[[list[str], Callable[[Answer], None]], tuple[Answer, str]]
    """Runs these variants in one process, and calls the function with what is known so far; (all that was found, what
    went wrong)."""
    told: Callable[[Answer], None]
    """Called with all that is known, whenever there is more."""
    environment: dict[str, Any]
    """This machine's, as far as it is known before the first process reports it."""
    rows: dict[str, Row] = field(default_factory=dict)

    def finish(self) -> Answer:
        """All rows; each has figures or an error."""
        left = [variant.name for variant in self.cell.variants]
        while left:
            answer, problem = self.once(self._with_base(left), self._merge)
            self._merge(answer)
            done = any(is_finished(self.rows.get(name, {})) for name in left)
            if not (done and problem.startswith(OUT_OF_TIME)):  # else the rest was not slow, but had no time left
                self._blame(answer, left, problem)
            still = [name for name in left if not is_finished(self.rows.get(name, {}))]
            if len(still) == len(left) or self.cell.searches:
                self._give_up(still, problem or "was not reached")
                break
            left = still
        self.told(self.answer())
        return self.answer()

    def answer(self) -> Answer:
        names = [variant.name for variant in self.cell.variants]
        return {"environment": self.environment, "rows": [self.rows[name] for name in names if name in self.rows]}

    def _with_base(self, left: list[str]) -> list[str]:
        """Adds the first variant, with whose losses the others are compared, and which so runs in every process."""
        first = self.cell.variants[0].name
        return [first, *left] if self.cell.parity_steps and first not in left else left

    def _merge(self, answer: Answer) -> None:
        if answer["environment"].get("device") not in (None, "unknown"):
            self.environment = answer["environment"]
        for row in answer["rows"]:
            before = self.rows.get(row["variant"], {})
            if is_finished(before) and not before.items() <= row.items():
                continue  # the same process may add to its row, for example a breakdown
            if timed_steps(row) >= timed_steps(before):
                self.rows[row["variant"]] = row
            elif "error" in row:  # what an earlier process timed is kept
                before["stopped"] = row["error"]
        self.told(self.answer())

    def _blame(self, answer: Answer, left: list[str], problem: str) -> None:
        """If a process failed, blames the variant that was running; before the first one, all of them; after the last
        one, none."""
        if not problem:
            return
        for name in left if "at" not in answer else filter(None, [answer["at"]]):
            row = self.rows.setdefault(name, {"variant": name, "options": {}})
            if is_finished(row):
                continue
            row["stopped" if "step_seconds" in row else "error"] = problem

    def _give_up(self, names: list[str], words: str) -> None:
        for name in names:
            row = self.rows.setdefault(name, {"variant": name, "options": {}})
            if "step_seconds" in row:
                row.setdefault("stopped", words)
            elif not self.cell.searches:  # beyond the largest batch that fits no row is needed
                row.setdefault("error", words)


def is_finished(row: Row) -> bool:
    """Whether another process has nothing to add."""
    return bool(row.get("complete")) or "error" in row or "stopped" in row


def timed_steps(row: Row) -> int:
    return row.get("step_seconds", {}).get("timed", 0)


def leftovers(folder: Path) -> list[tuple[Path, Answer]]:
    """What processes wrote whose parents were killed before they read it."""
    found = []
    for path in sorted(folder.glob(".answer-*.json")):
        parent = int(path.stem.split("-")[1])
        with suppress(ProcessLookupError, PermissionError):
            os.kill(parent, 0)
            continue
        try:
            answer = read(path)
        except DataError:
            answer = None
        if answer is not None:
            found.append((path, answer))
    return found
