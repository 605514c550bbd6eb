"""A thread that watches the step: it names a rank that hangs, and one that holds the others up.

The loop marks each phase. A rank whose phase takes too long writes its stack to the store and reads what the others
wrote. The rank with the fewest marks, or without a sign of life, is the one that all wait for: every rank makes the
same marks in the same order, so counting them compares ranks without clocks. Time in which the thread itself could not
run, because the process was stopped and continued, does not count."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist

from titan_fast.distributed import World, listed, written
from titan_fast.errors import CommunicationError

TICK_SECONDS = 0.1
STRAGGLER_RATIO = 2.0
STRAGGLER_SECONDS = 5.0
"""Ranks are compared over windows of at least this length."""
_WAITING = (
    "distributed_c10d.py", "_functional_collectives.py", "_fsdp_collectives.py", "_fsdp_param_group.py",
    "titan_fast/direct_fsdp.py",
    "cuda/streams.py",  # waits for the device, and so for the other ranks' devices
)  # fmt: skip
_REPEAT_SECONDS = 60.0
_JUDGING_SECONDS = 30.0
"""More than a judgement takes where the store answers."""
_NO_SIGN = "no sign of life: the process or its host is gone, stopped or cut off, or it blocks Python's lock"
_ENDS = "watchdog/ends"
"""Holds how many seconds a rank that an error ends may wait for its save in the background; 0 when it does no more."""
_SPEAKER = "watchdog/speaker"
"""Holds the rank that will report the hang unless rank 0 does; empty if that rank has gone on since."""


class Limit(NamedTuple):
    """How long a phase may take."""

    seconds: float
    setting: str
    """The key of the config that says so."""


@dataclass
class Report:
    """What a rank tells the others about itself."""

    rank: int
    marks: int
    step: int
    phase: str
    age: float
    """Seconds in this phase, not counting those in which the process was stopped."""
    busy: float
    """Seconds in which the main thread was not waiting for other ranks, in all."""
    alive: int
    """Grows with every report."""
    allowed: float
    """Seconds that this phase may take."""
    setting: str
    """The key of the config that says so."""
    stack: str = ""


class Watchdog:
    """Watches while it is entered; `at` marks."""

    def __init__(
        self,
        world: World,
        limit: Limit,
        say: Callable[[str], None],
        write_down: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """limit: of a phase, unless `at` gives another. say: prints the line about a straggler. write_down: logs how
        the run ended. leave: ends the process, since the main thread cannot be reached."""
        self.world, self.limit, self.say, self.write_down, self.leave = world, limit, say, write_down, leave
        # A connection of its own: the main thread may be waiting on the other one.
        self._store = _connection(world.store) if world.size > 1 else world.store
        self._main = threading.main_thread().ident
        self._own = Report(world.rank, 0, 0, "set-up", 0.0, 0.0, 0, *limit)
        self._since = time.monotonic()
        self._stopped = 0.0  # seconds of this phase in which the process was
        self._closed = threading.Event()
        self._window: dict[int, tuple[float, int]] = {}
        self._window_began = self._last_line = float("-inf")
        self._rounds = 0  # grows as long as the store answers
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="titan_fast watchdog", daemon=True)
        self._guard = threading.Thread(target=self._guard_against_silence, name="titan_fast guard", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        self._thread.start()
        if self.world.size > 1:
            self._guard.start()
        return self

    def at(self, step: int, phase: str, limit: Limit | None = None) -> None:
        """The main thread begins `phase` of `step`, which may take as long as `limit` says."""
        self._since = time.monotonic()
        self._own.step, self._own.phase = step, phase
        self._own.allowed, self._own.setting = limit or self.limit
        self._own.marks += 1

    def ends(self, error: BaseException, limit: Limit) -> None:
        """An error ends the main thread, which may wait for its save as long as `limit` says. The others, who take part
        in the save, wait for it too."""
        if self.world.size > 1:
            with suppress(RuntimeError):  # the store is gone
                self._store.set(_ENDS, str(limit.seconds))
        self._ends, self._since = True, time.monotonic()  # no mark: this rank does not get ahead of the others
        self._own.phase = f"checkpoint, after {type(error).__name__}"
        self._own.allowed, self._own.setting = limit

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join(5.0)
        if self._ends and self.world.size > 1 and not self._thread.is_alive():
            with suppress(RuntimeError):
                self._store.set(_ENDS, "0")  # not deleted: another rank may be about to read it

    def _run(self) -> None:
        beat = max(0.5, min(5.0, self.limit.seconds / 20))
        next_beat = last = met = time.monotonic()  # met: when the store last answered
        marks = self._own.marks
        while not self._closed.wait(TICK_SECONDS):
            self._rounds += 1
            now = time.monotonic()
            waits = _waits_for_others(self._frame())
            if now - last > beat:
                self._stopped += now - last
                met += now - last
            elif not self._ends and not waits:
                self._own.busy += now - last
            last = now
            if self._own.marks != marks:  # after the above, for the main thread may have been the first to go on
                marks, self._stopped = self._own.marks, 0.0
            try:
                if self._age() > self._own.allowed:
                    if self._is_waited_for():
                        self._closed.wait(beat / 2)
                    elif self._judge(self._stack(), beat):
                        return
                    last = time.monotonic()
                if now >= next_beat:
                    next_beat = now + beat
                    self._publish("beat", self._stack() if self.world.size > 1 else "")
                    self._compare(now)
                    last = met = time.monotonic()
            except (RuntimeError, ValueError):  # the store is gone: so is the run
                if time.monotonic() - max(met, self._since) > self.limit.seconds:
                    self._leave_alone(self.limit.seconds)
                    return
                if self._closed.wait(1.0):
                    return
                last = time.monotonic()  # waiting for the store is no stop

    def _guard_against_silence(self) -> None:
        """Ends a process that hangs while the other thread waits for a store on a host that cannot be reached: TCP
        gives such a request up after a quarter of an hour."""
        seconds, rounds = 0, self._rounds
        while not self._closed.wait(1.0):
            # Counted and not measured: a stopped process does not count.
            seconds, rounds = (seconds + 1 if self._rounds == rounds else 0), self._rounds
            if seconds > self.limit.seconds + _JUDGING_SECONDS and self._age() > self._own.allowed:
                self._leave_alone(seconds)
                return

    def _frame(self) -> FrameType | None:
        """Where the main thread is. Not to be kept: a frame that somebody has keeps its variables when its function has
        returned, and so GPU memory."""
        return sys._current_frames().get(self._main or 0)

    def _stack(self) -> str:
        return _written(self._frame())

    def _age(self) -> float:
        return time.monotonic() - self._since - self._stopped

    def _publish(self, kind: str, stack: str) -> None:
        self._own.alive += 1
        self._own.age = self._age()
        if self.world.size > 1:
            self._store.set(f"watchdog/{kind}/{self.world.rank}", json.dumps(asdict(self._own) | {"stack": stack}))

    def _reports(self, kind: str) -> dict[int, Report]:
        ranks = range(self.world.size) if self.world.size > 1 else ()
        said = written(self._store, f"watchdog/{kind}", ranks)
        return {rank: Report(**json.loads(words)) for rank, words in said.items()}

    # A hang

    def _is_waited_for(self) -> bool:
        """Whether a rank that an error ends is waiting for its save, and so for this rank's part of it."""
        if self._ends or self.world.size == 1 or not self._store.check([_ENDS]):
            return False
        return self._age() <= self._own.allowed + float(self._store.get(_ENDS))

    def _judge(self, stack: str, beat: float) -> bool:
        """Collects the others' reports, says who hangs and ends the process. Of the ranks whose time is up only one
        speaks: rank 0, which has the log, or else the first. Only these two read what all others have written, since
        where one rank hangs all do, and there may be thousands. Returns False if the main thread has gone on
        meanwhile, or that of the rank that was to speak."""
        mine = self._own.marks
        self._publish("hang", stack)
        reports, me = {self.world.rank: replace(self._own, stack=stack)}, str(self.world.rank)
        reads = self.world.is_main or self._store.compare_set(_SPEAKER, "", me) == me.encode()
        before = self._reports("beat") if reads else {}
        pause = max(2 * beat, min(0.15 * self._own.allowed, 2 * beat + 1.0))
        time.sleep(pause)
        if self._own.marks != mine or self._closed.is_set():
            if self.world.size > 1:
                self._store.delete_key(f"watchdog/hang/{self.world.rank}")
            if reads and not self.world.is_main:
                self._store.set(_SPEAKER, "")
            return False
        main_speaks = not self.world.is_main and self._store.check(["watchdog/hang/0"])
        if not main_speaks and not reads and not self._store.get(_SPEAKER):
            return False
        if main_speaks or not reads:
            # The speaker goes first, since torchrun ends all when one has left. Rank 0 may have begun after this rank.
            time.sleep(1.0 + (pause if main_speaks else 0.0))
            self.leave(CommunicationError.exit_status)
            return True
        after, hung = self._reports("beat"), self._reports("hang")
        for rank in range(self.world.size):
            if rank in hung:
                reports[rank] = hung[rank]
            elif rank in after and after[rank].alive == before.get(rank, after[rank]).alive:
                reports[rank] = after[rank]
                reports[rank].stack = _NO_SIGN
            elif rank in after:
                reports[rank] = after[rank]
        self._tell(verdict(reports), _stacks(reports))
        self.leave(CommunicationError.exit_status)
        return True

    def _leave_alone(self, seconds: float) -> None:
        """Ends a process that hangs when the store is gone too: without torchrun nobody else would."""
        error = CommunicationError(
            f"rank 0 or torchrun, where the ranks met, has not answered for {seconds:.0f} s, and this rank is where it "
            f"was",
            "look at the log of rank 0, and at the network between its host and this one",
            where=f"rank {self.world.rank}, step {self._own.step}, phase '{self._own.phase}'",
        )
        self._tell(str(error), self._stack())
        self.leave(CommunicationError.exit_status)

    def _tell(self, why: str, stacks: str) -> None:
        words = f"ended by {CommunicationError.__name__}: {why}"
        for write, text in ((_to_console, f"titan_fast: {why}\n{stacks}"), (self.write_down, words)):
            writing = threading.Thread(target=write, args=(text,), daemon=True)
            writing.start()
            writing.join(2.0)  # no longer: a disk that hangs or a pipe that nobody reads may be the cause of all this

    # A straggler

    def _compare(self, now: float) -> None:
        if self.world.rank or self.world.size == 1:
            return
        reports = self._reports("beat")
        if len(reports) < self.world.size or now - self._window_began < STRAGGLER_SECONDS:
            return
        busy = {rank: report.busy - self._window.get(rank, (0.0, 0))[0] for rank, report in reports.items()}
        steps = min(report.step - self._window.get(rank, (0.0, 0))[1] for rank, report in reports.items())
        whole = bool(self._window)
        self._window = {rank: (report.busy, report.step) for rank, report in reports.items()}
        self._window_began = now
        if whole and steps >= 3 and (line := straggler(busy, steps)) and now - self._last_line > _REPEAT_SECONDS:
            self._last_line = now
            self.say(line)


def straggler(busy: dict[int, float], steps: int) -> str | None:
    """A line about the rank whose host works STRAGGLER_RATIO times as long as the median of the others, if there is
    one. A slow GPU does not show up here: all ranks wait in the same collective."""
    slow = max(busy, key=lambda rank: busy[rank])
    others = median(seconds for rank, seconds in busy.items() if rank != slow)
    ratio = busy[slow] / max(others, 1e-3)
    if ratio < STRAGGLER_RATIO or busy[slow] - others < 0.02 * steps:
        return None
    return (
        f"straggler: rank {slow} works {busy[slow] / steps:.3f} s a step, the others {others / steps:.3f} s and wait: "
        f"{ratio:.1f} times as long over {steps} steps"
    )


def verdict(reports: dict[int, Report]) -> str:
    """The sentence that names who hangs."""
    silent = [rank for rank, report in reports.items() if report.stack == _NO_SIGN]
    fewest = min(report.marks for report in reports.values())
    behind = silent or [rank for rank, report in reports.items() if report.marks == fewest]
    where = reports[behind[0]]
    place = f"step {where.step}, phase '{where.phase}'"
    waiting = {rank: report for rank, report in reports.items() if rank not in behind}
    if len(behind) == len(reports) and len(reports) > 1:
        error = CommunicationError(
            f"all {len(reports)} ranks hang in the same place, so none can be named",
            "compare the stacks below: a collective that they do not all call alike, or the network",
            where=place,
        )
    elif silent and waiting:
        longest = max(waiting.values(), key=lambda report: report.age)
        error = CommunicationError(
            f"rank {listed(behind)} hangs: no sign of life, and the others have waited {longest.age:.0f} s, of at most "
            f"{longest.allowed:.0f} s, in phase '{longest.phase}'",
            "its process or host is gone, stopped or cut off from the others, or it blocks Python's lock",
            where=f"rank {behind[0]}, {place}",
        )
    else:
        waits = f"; the others wait in phase '{next(iter(waiting.values())).phase}'" if waiting else ""
        error = CommunicationError(
            f"rank {listed(behind)} hangs: {where.age:.0f} s in one phase of at most {where.allowed:.0f} s{waits}",
            f"see its stack below; raise {where.setting} if it is only slow",
            where=f"rank {behind[0]}, {place}",
        )
    return str(error)


def _to_console(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()


def _written(frame: FrameType | None) -> str:
    """A stack as text. Its frames are let go before the files are read."""
    places = []
    while frame is not None:
        places.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    lines = [traceback.FrameSummary(*place, lookup_line=False) for place in reversed(places)]
    return "".join(traceback.format_list(lines)) if lines else "no Python stack"


def _stacks(reports: dict[int, Report]) -> str:
    fewest = min(reports.values(), key=lambda report: (report.stack != _NO_SIGN, report.marks))
    shown = [fewest, *[report for report in reports.values() if report is not fewest][:1]]
    return "".join(
        f"rank {report.rank}, step {report.step}, phase '{report.phase}':\n{report.stack}\n" for report in shown
    )


def _connection(store: dist.Store) -> dist.Store:
    clone = getattr(store, "clone", None)  # a TCPStore, or a store on top of one, has it; torch's stubs do not say so
    assert clone is not None, f"ranks met at a {type(store).__name__}, which has no second connection"
    return clone()


def _waits_for_others(frame: FrameType | None) -> bool:
    """Whether one of the innermost Python functions waits for other ranks."""
    depth = 0
    while frame is not None and depth < 3:
        if frame.f_code.co_filename.endswith(_WAITING):
            return True
        frame, depth = frame.f_back, depth + 1
    return False
