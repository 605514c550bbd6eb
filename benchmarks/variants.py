"""Variants of one built model, timed in turn: warmed up, timed a first time at once, then block by block, and profiled.

The same for our model and for those of others. Whatever goes wrong is a row with its sentence. After an error in the
middle of a step nothing more is timed in the process: memory may be short, the device lost, a module half way through
its hooks. What is left then is for a new process (`train_process`).
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from benchmarks import step_timing
from benchmarks.device_state import DeviceWatch, reader_of
from benchmarks.step_profile import breakdown
from benchmarks.step_timing import Length, Timed
from benchmarks.workloads import Variant

Row = dict[str, Any]
Rows = list[Row]
FOUND_BY_STEPS = ("step_seconds", "peak_bytes", "last_loss", "gpu", "complete")
"""Keys of a row that are of timed steps."""
LOST = "ended_its_process"
"""Key of a row after whose error nothing more was done in that process."""
COLLECT_EVERY = 50
"""Steps between collections of Python's garbage, as in titan_fast.loop."""


class Contender(Protocol):
    """A model that is built once and can be switched between variants."""

    @property
    def device(self) -> torch.device: ...

    def what_runs(self, variant: Variant) -> object:
        """Equal for variants that come to the same code, which then runs once."""
        ...

    def switch_to(self, variant: Variant) -> Row:
        """Makes the next step that of `variant`; what its row says of that."""
        ...

    def face(self) -> Any:
        """What `put_on` needs to make the model what it is now, without compiling anew."""
        ...

    def put_on(self, face: Any) -> None: ...

    def step(self) -> None:
        """One whole training step."""
        ...

    def last_loss(self) -> float:
        """Of the last step. Waits for the device."""
        ...


@dataclass(frozen=True)
class How:
    """How a cell is run."""

    smoke: bool = False
    length: Length | None = None
    """None: by the duration of a step."""
    profiles: bool = True
    save: Callable[[Rows, str], None] = lambda rows, at: None
    """Called with all rows whenever there is more in them, and with the variant that is at work."""


@dataclass
class _Running:
    """A variant that warmed up."""

    variant: Variant
    row: Row
    face: Any
    length: Length
    timed: Timed
    spans: list[tuple[float, float]] = field(default_factory=list)

    def left(self) -> Length:
        return replace(self.length, timed=max(0, self.length.timed - len(self.timed.seconds)))


class DeviceLost(Exception):
    """Nothing more can be timed in this process; the row of the variant that was at work says why."""


@contextmanager
def failures_into(row: Row, key: str = "error", ends_process: bool = True) -> Iterator[None]:
    """What is raised inside becomes a sentence in the row; ends_process: and DeviceLost."""
    try:
        yield
    except Exception as error:
        row[key] = sentence(error)
        row["out_of_memory"] = isinstance(error, torch.OutOfMemoryError)
        if ends_process or row["out_of_memory"] or isinstance(error, torch.AcceleratorError):
            row[LOST] = True
            raise DeviceLost from error


def sentence(error: BaseException) -> str:
    """The exception's type and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:500]


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Python does not look for garbage by itself inside, as in a training run; see `COLLECT_EVERY`."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _graphs() -> tuple[int, int]:
    """How many graphs torch.compile has traced in this process, and how often it had to break one."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def time_variants(contender: Contender, variants: Sequence[Variant], how: How, searches: bool = False) -> Rows:
    """A row for each variant that was reached. searches: each is larger than the one before it, and they are timed
    once, one after the other, until one does not fit."""
    with garbage_kept(), DeviceWatch(reader_of(contender.device)) as watch:
        turns = _Turns(contender, how, watch, searches)
        try:
            turns.warm_up(variants)
            turns.take()
            turns.profile()
        except DeviceLost:
            pass
        finally:
            turns.copy_same()
            how.save(turns.rows, "")
        return turns.rows


class _Turns:
    """The variants of one process."""

    def __init__(self, contender: Contender, how: How, watch: DeviceWatch, searches: bool) -> None:
        self.contender, self.how, self.watch, self.searches = contender, how, watch, searches
        self.rows: Rows = []
        self.running: dict[str, _Running] = {}

    def warm_up(self, variants: Sequence[Variant]) -> None:
        """Each variant warms up and is timed for a block right away, and the first of all beside it: what comes later
        and hangs or breaks the device takes nothing away from what came before."""
        known: dict[object, str] = {}
        for variant in variants:
            row: Row = {"variant": variant.name, "options": variant.options}
            self.rows.append(row)
            self.how.save(self.rows, variant.name)
            with failures_into(row, ends_process=False):
                same = self.contender.what_runs(variant)
                if same in known:
                    row["same_as"] = known[same]
                    continue
                started = time.perf_counter()
                row |= self.contender.switch_to(variant)
            if "error" in row:
                continue
            with failures_into(row):
                one = self._start(variant, row, started)
                self._block(one, one.length.block)
            known[same] = variant.name
            self.running[variant.name] = one
            base = next(iter(self.running.values()))
            if base is not one and not self.searches:
                self.contender.put_on(base.face)
                self._block(base, base.length.block)

    def _start(self, variant: Variant, row: Row, started: float) -> _Running:
        """The first step, which compiles, and the warm-up."""
        contender, first = self.contender, not self.running
        graphs, breaks = _graphs()
        contender.step()
        row["first_loss"] = contender.last_loss()
        row["first_step_seconds"] = time.perf_counter() - started
        row["graphs"] = {"compiled": _graphs()[0] - graphs, "breaks": _graphs()[1] - breaks}
        self.how.save(self.rows, variant.name)
        wanted = step_timing.SEARCH if self.searches and self.how.length is None else self.how.length
        length, steps = step_timing.warm_up(contender.step, contender.device, wanted, first)
        return _Running(variant, row, contender.face(), length, Timed(warm_up=steps))

    def _block(self, one: _Running, count: int) -> None:
        with failures_into(one.row, "stopped" if "step_seconds" in one.row else "error"):
            started = time.perf_counter()
            step_timing.run_block(self.contender.step, self.contender.device, count, one.timed)
            one.spans.append((started, time.perf_counter()))
            seconds = one.timed.as_json() | {"planned": one.length.timed}
            one.row |= {"step_seconds": seconds, "peak_bytes": one.timed.peak_bytes}
            one.row["last_loss"] = self.contender.last_loss()
            one.row["complete"] = not one.left().timed
        if found := self.watch.during(one.spans):
            one.row["gpu"] = found
        self.how.save(self.rows, one.variant.name)

    def take(self) -> None:
        """The rest of each variant's blocks, in turn."""
        lengths = {name: one.left() for name, one in self.running.items()}
        for name, count in step_timing.turns(list(self.running), lengths) if self.running else ():
            one = self.running[name]
            self.how.save(self.rows, name)
            self.contender.put_on(one.face)
            self._block(one, count)

    def profile(self) -> None:
        """Where the time of each variant goes. A search has no use for it."""
        for one in self.running.values() if self.how.profiles and not self.searches else ():
            self.how.save(self.rows, one.variant.name)
            self.contender.put_on(one.face)
            with failures_into(one.row, "profile_error"):
                one.row["profile"] = breakdown(self.contender.step, self.contender.device)
            self.how.save(self.rows, one.variant.name)

    def copy_same(self) -> None:
        """What was measured for variants that come to the code of another one."""
        by_name = {row["variant"]: row for row in self.rows}
        for row in self.rows:
            if "same_as" in row:
                other = by_name[row["same_as"]]
                row |= {key: other[key] for key in (*FOUND_BY_STEPS, "error", "stopped") if key in other}
