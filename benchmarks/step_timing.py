"""Times whole training steps of several contenders in turn."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.timing import Samples, order_of

SLOW_STEP_SECONDS = 2.0


@dataclass(frozen=True)
class Length:
    """How many steps a contender runs."""

    warm_up: int
    timed: int
    block: int
    """Timed steps in a row before the next contender's turn."""


FULL, SLOW = Length(20, 50, 10), Length(5, 15, 5)
SEARCH = Length(3, 6, 6)
"""For a batch in a search."""


@dataclass
class Timed:
    """The measurements of one contender."""

    seconds: list[float] = field(default_factory=list)
    """Of each timed step, from the end of the previous one to its own, on the device's time line."""
    wall_seconds: float = 0.0
    """Of all blocks by the host's clock, synchronised at both ends of each."""
    wall_steps: int = 0
    """The number of steps in those blocks, including the one that runs before a block."""
    peak_bytes: int = 0
    warm_up: int = 0

    @property
    def samples(self) -> Samples:
        return Samples(tuple(self.seconds), queued=True)

    def as_json(self) -> dict[str, float]:
        samples = self.samples
        return {
            "median": samples.median,
            "p10": samples.quantile(0.1),
            "p90": samples.quantile(0.9),
            "mean_by_wall_clock": self.wall_seconds / self.wall_steps,
            "timed": len(self.seconds),
            "warm_up": self.warm_up,
        }


Contender = Callable[[], None]
"""One training step. To be called `warm_up` times before it is timed."""


LATER_WARM_UP = 5
"""Warm-up steps of all but the first contender of a process: clocks and allocator are warm by then, its code is not."""


def warm_up(step: Contender, device: torch.device, length: Length | None, is_first: bool) -> tuple[Length, int]:
    """Warms up `step`, which has run once; (how long to time it, how many steps were run). The length is `length`, or
    if None by the duration of a step."""
    done = 1
    synchronize(device)
    started = time.perf_counter()
    for _ in range((SLOW.warm_up if length is None else length.warm_up) - 1):
        started = time.perf_counter()
        step()
        synchronize(device)
        done += 1
    if length is not None:
        return length, done
    if time.perf_counter() - started > SLOW_STEP_SECONDS:
        return SLOW, done
    while done < (FULL.warm_up if is_first else LATER_WARM_UP):
        step()
        done += 1
    synchronize(device)
    return FULL, done


def run_block(step: Contender, device: torch.device, count: int, into: Timed) -> None:
    """`count` timed steps. If steps are short, one more runs before them, because the first after a pause waits for the
    host as no step of a run does."""
    synchronize(device)
    before = 1 if count >= FULL.block else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _cuda_block(step, before, count, into)
        into.peak_bytes = max(into.peak_bytes, torch.cuda.max_memory_allocated(device))
        return
    for i in range(before + count):
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        into.seconds += [seconds] if i >= before else []
        into.wall_seconds += seconds
        into.wall_steps += 1


def _cuda_block(step: Contender, before: int, count: int, into: Timed) -> None:
    """The host does not wait between the step before the timed ones and the first of them, which would then start on an
    empty queue."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    started = time.perf_counter()
    for _ in range(before):
        step()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    into.wall_seconds += time.perf_counter() - started
    into.wall_steps += before + count
    into.seconds += [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)]


def turns(names: Sequence[str], lengths: dict[str, Length]) -> list[tuple[str, int]]:
    """(contender, steps) in the order in which to run, by `order_of`, until each has its steps."""
    left = {name: lengths[name].timed for name in names}
    order: list[tuple[str, int]] = []
    turn = 0
    while any(left.values()):
        for name in order_of(names, turn):
            count = min(lengths[name].block, left[name])
            if count:
                order.append((name, count))
                left[name] -= count
        turn += 1
    return order


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
