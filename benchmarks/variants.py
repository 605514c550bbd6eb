"""Times variants of one built model in turn: each is warmed up and timed at once, then timed block by block, and
profiled.

This is the same for our model and for others. Errors become sentences in rows. After an error in the middle of a step
nothing more is timed in the process, since memory may be short, the device lost, or a module in the middle of its
hooks. A new process does the rest (`train_process`).
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
"""The keys of a row that come from timed steps."""
LOST = "ended_its_process"
"""The key of a row whose error ended its process."""
COLLECT_EVERY = 50
"""Steps between garbage collections, as in titan_fast.loop."""


class Contender(Protocol):
    """A model that is built once and can be switched between variants."""

    @property
    def device(self) -> torch.device: ...

    def what_runs(self, variant: Variant) -> object:
        """Equal for variants with the same code, which then runs only once."""
        ...

    def switch_to(self, variant: Variant) -> Row:
        """Makes the following steps those of `variant`; returns what to add to its row."""
        ...

    def face(self) -> Any:
        """What `put_on` needs to restore the model's current state without recompiling."""
        ...

    def put_on(self, face: Any) -> None: ...

    def step(self) -> None:
        """One whole training step."""
        ...

    def last_loss(self) -> float:
        """The last step's loss. Waits for the device."""
        ...


@dataclass(frozen=True)
class How:
    """How a cell is run."""

    smoke: bool = False
    length: Length | None = None
    """None: by the duration of a step."""
    profiles: bool = True
    save: Callable[[Rows, str], None] = lambda rows, at: None
    """Called with all rows whenever there is more in them, and with the name of the variant that is running."""


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
    """Nothing more can be timed in this process; the row of the variant that was running says why."""


@contextmanager
def failures_into(row: Row, key: str = "error", ends_process: bool = True) -> Iterator[None]:
    """Exceptions inside become a sentence in the row. ends_process: DeviceLost is then raised; it always is if memory
    ran out or the device failed."""
    try:
        yield
    except Exception as error:
        row[key] = sentence(error)
        row["out_of_memory"] = isinstance(error, torch.OutOfMemoryError)
        if ends_process or row["out_of_memory"] or isinstance(error, torch.AcceleratorError):
            row[LOST] = True
            raise DeviceLost from error


def sentence(error: BaseException) -> str:
    """The exception's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:500]


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Inside, Python collects no garbage by itself, as in a training run; see `COLLECT_EVERY`."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _graphs() -> tuple[int, int]:
    """How many graphs torch.compile has traced in this process, and the number of graph breaks."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def time_variants(contender: Contender, variants: Sequence[Variant], how: How, searches: bool = False) -> Rows:
    """A row for each variant that was reached. searches: each is larger than the one before, and they are timed once,
    one after the other, until one does not fit."""
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
        """Each variant is warmed up and timed for a block at once, and the first variant beside it, so that nothing is
        lost if a later one hangs or breaks the device."""
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
        """Runs the first step, which compiles, and the warm-up."""
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
        """Times the rest of each variant's blocks, in turn."""
        lengths = {name: one.left() for name, one in self.running.items()}
        for name, count in step_timing.turns(list(self.running), lengths) if self.running else ():
            one = self.running[name]
            self.how.save(self.rows, name)
            self.contender.put_on(one.face)
            self._block(one, count)

    def profile(self) -> None:
        """Adds where each variant's time goes, except in a search."""
        for one in self.running.values() if self.how.profiles and not self.searches else ():
            self.how.save(self.rows, one.variant.name)
            self.contender.put_on(one.face)
            with failures_into(one.row, "profile_error"):
                one.row["profile"] = breakdown(self.contender.step, self.contender.device)
            self.how.save(self.rows, one.variant.name)

    def copy_same(self) -> None:
        """Copies measurements to the variants with the same code."""
        by_name = {row["variant"]: row for row in self.rows}
        for row in self.rows:
            if "same_as" in row:
                other = by_name[row["same_as"]]
                row |= {key: other[key] for key in (*FOUND_BY_STEPS, "error", "stopped") if key in other}
