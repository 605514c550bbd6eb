"""Seconds on the device, without the host's and without help from the cache.

On CUDA launches are queued behind a delay, so that the GPU never waits for Python, with events around each call. The
level-2 cache is overwritten before each call whose working set it could hold. The order of what is compared rotates, so
that clocks and heat affect all. Elsewhere (a rehearsal without a GPU) the host's clock is used.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# The clock that torch.cuda._sleep counts. It is an upper bound, so the delay may be too long but never too short.
_CYCLES_PER_SECOND = 2.1e9
_FIRST_DELAY = 2e-3  # seconds


@dataclass(frozen=True)
class Run:
    """Something to time. `reset`, which is not timed, restores what `call` overwrites."""

    call: Callable[[], object]
    reset: Callable[[], object] | None = None


@dataclass(frozen=True)
class Samples:
    """Seconds of each call. `queued`: whether the GPU never ran dry, so that these are only its times. `per_pass`:
    calls in a pass, which are adjacent."""

    seconds: tuple[float, ...]
    queued: bool
    per_pass: int = 1

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))]

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def pass_medians(self) -> list[float]:
        starts = range(0, len(self.seconds), self.per_pass)
        return [statistics.median(self.seconds[start : start + self.per_pass]) for start in starts]


@dataclass(frozen=True)
class Difference:
    """How much longer one run took than another in the same passes, and the standard error of that, in seconds."""

    seconds: float
    error: float
    queued: bool


def difference(mine: Samples, theirs: Samples) -> Difference:
    """Pass by pass, in which both ran side by side, so that the effects of clocks and heat cancel out: the median of
    the differences, and its standard error from their median absolute deviation, as for a normal distribution."""
    found = [a - b for a, b in zip(mine.pass_medians(), theirs.pass_medians(), strict=True)]
    middle = statistics.median(found)
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in found)
    return Difference(middle, 1.2533 * deviation / math.sqrt(len(found)), mine.queued and theirs.queued)


def measure(
    runs: dict[str, Run],
    device: torch.device,
    working_set: int,
    passes: int = 5,
    calls: int = 10,
    on_failure: Callable[[str, Exception], object] | None = None,
) -> dict[str, Samples]:
    """passes x calls samples of each run, after one warm-up pass. working_set: bytes that a call touches. on_failure:
    called for a run that raises, which then has no samples while the others go on; None: the exception is raised."""
    timer = _cuda_pass if device.type == "cuda" else _host_pass
    flush = _cache_flush(device, working_set)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    queued = dict.fromkeys(runs, True)
    delays = dict.fromkeys(runs, _FIRST_DELAY)

    def one_pass(name: str, calls: int, keep: bool) -> None:
        if name not in seconds:
            return
        try:
            taken, was_queued, delays[name] = timer(runs[name], calls, flush, delays[name])
        except Exception as error:
            if on_failure is None:
                raise
            del seconds[name]
            on_failure(name, error)
            return
        if keep:
            seconds[name] += taken
            queued[name] &= was_queued

    names = list(runs)
    for name in names:
        one_pass(name, calls, keep=False)
    for turn in range(passes):
        for name in order_of(names, turn):
            one_pass(name, calls, keep=True)
    return {name: Samples(tuple(taken), queued[name], calls) for name, taken in seconds.items()}


def order_of(names: Sequence[str], turn: int) -> list[str]:
    """Who runs in which order: A B C, C B A, B C A, A C B, ... Rotated, so that nobody is always first; every second
    turn backwards, so that nobody always follows the same one."""
    first = turn // 2 % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn % 2 else order


def _host_pass(run: Run, calls: int, flush: Callable[[], object], delay: float) -> tuple[list[float], bool, float]:
    seconds = []
    for _ in range(calls):
        if run.reset is not None:
            run.reset()
        start = time.perf_counter()
        run.call()
        seconds.append(time.perf_counter() - start)
    return seconds, False, delay


def _cuda_pass(run: Run, calls: int, flush: Callable[[], object], delay: float) -> tuple[list[float], bool, float]:
    """Queues calls behind a delay. If the device catches up with the host, the delay was too short, and all is repeated
    with a longer one. Returns the delay that was long enough for the next pass, or if none was, as for a call that
    itself waits for the device, the given one, since it would only keep growing."""
    given = delay
    for _ in range(4):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        free = torch.cuda.Event()
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.cuda._sleep(int(delay * _CYCLES_PER_SECOND))
        free.record()
        for before, after in events:
            if run.reset is not None:
                run.reset()
            flush()
            before.record()
            run.call()
            after.record()
        host_seconds = time.perf_counter() - start
        queued = not free.query()  # the delay was still running when the last call was queued
        torch.cuda.synchronize()
        if queued:
            break
        delay = 2 * host_seconds
    return [before.elapsed_time(after) * 1e-3 for before, after in events], queued, delay if queued else given


def _cache_flush(device: torch.device, working_set: int) -> Callable[[], object]:
    """Copies twice the size of the level-2 cache, unless the working set is more than four times it. A copy, so that
    half of what it leaves in the cache must be written back, as after a kernel; after a fill all of it would."""
    if device.type != "cuda":
        return lambda: None
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if working_set > 4 * cache:
        return lambda: None
    source, target = torch.zeros(2, 2 * cache, dtype=torch.int8, device=device)
    return lambda: target.copy_(source)


def copy_bandwidth(device: torch.device, moved: int | None = None) -> float:
    """Bytes per second, read plus written, of a copy that moves `moved` bytes; None: between two buffers far larger
    than any cache. The time of a small copy includes its start and end, as a kernel's does."""
    size = moved // 2 if moved else 2**30 if device.type == "cuda" else 2**22
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = measure({"copy": Run(lambda: target.copy_(source))}, device, 2 * size)
    return 2 * size / samples["copy"].median


def host_seconds(call: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    """Host time of each of `calls` asynchronous calls: that of Python and the dispatcher, not the kernel's."""
    seconds = []
    for index in range(calls):
        if device.type == "cuda" and index % 20 == 0:
            torch.cuda.synchronize()  # a full launch queue, of about 1000 kernels, would make the host wait
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds
