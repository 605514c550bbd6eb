"""What only happens after hours: a stall that ends by itself, a file server that is unavailable, a requeued job."""

import errno
import io
import json
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torch.distributed as dist
from worlds import CountedStore

from titan_fast import checkpointer, log_file, loop, manifest, run_history, watchdog
from titan_fast.agreement import Agreement
from titan_fast.config import parse
from titan_fast.data_command import prepare_folder
from titan_fast.distributed import World
from titan_fast.errors import CheckpointError, ConfigError, DataError, NumericsError
from titan_fast.run_lock import NAME as LOCK
from titan_fast.run_lock import RunLock
from titan_fast.watchdog import Limit, Watchdog

CPU = torch.device("cpu")


# The watchdog


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """One store for two ranks of this process."""
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "_connection", lambda _: store)
    yield store


def watch(store: dist.Store, rank: int, left: list[int], seconds: float) -> Watchdog:
    return Watchdog(World(rank, 2, CPU, store), Limit(seconds, "comm.timeout_seconds"), print, print, left.append)


def test_a_stall_that_ends_is_forgotten_and_the_next_one_is_not_missed(
    stores: dist.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    one, other = watch(stores, 0, left, 2.0), watch(stores, 1, left, 2.0)
    reports, steps = [[f"watchdog/hang/{rank}"] for rank in range(2)], iter(range(2, 1000))
    one.at(1, "data")
    other.at(1, "data")
    with one, other:
        runs.wait_for(lambda: all(map(stores.check, reports)))
        while any(map(stores.check, reports)):  # ranks go on before they judge; these would name the wrong one
            step = next(steps)
            one.at(step, "data")
            other.at(step, "data")
            time.sleep(0.1)
        assert not left
        one.at(step + 1, "optimizer", Limit(60.0, "comm.init_timeout_seconds"))
        runs.wait_for(lambda: left)
    assert set(left) == {6}
    said = capsys.readouterr().err
    assert "rank 1 hangs" in said and f"step {step}, phase 'data'" in said and "at most 2 s" in said, said


def test_a_phase_has_all_of_its_limit(stores: dist.Store) -> None:
    left: list[tuple[int, float]] = []

    def leave(status: int) -> None:
        left.append((status, time.monotonic()))

    with Watchdog(World(0, 1, CPU, stores), Limit(1.0, "comm.timeout_seconds"), print, print, leave) as one:
        began = time.monotonic()
        one.at(1, "data")
        runs.wait_for(lambda: left)
    status, ended = left[0]
    assert status == 6 and ended - began >= 1.0


def test_a_run_that_ends_while_it_is_judged_is_let_go(stores: dist.Store) -> None:
    left: list[int] = []
    with Watchdog(World(0, 1, CPU, stores), Limit(1.0, "comm.timeout_seconds"), print, print, left.append) as one:
        one.at(1, "checkpoint")
        time.sleep(1.5)  # its time was up after 1.0 s, and it is looked at again 1.0 s later
    time.sleep(1.0)
    assert not left


def test_a_hang_ends_where_nobody_reads_what_is_said_of_it(stores: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read, left, written = threading.Event(), [], []

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            read.wait(60)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Full())
    with Watchdog(World(0, 1, CPU, stores), Limit(1.0, "x"), print, written.append, left.append) as one:
        one.at(1, "data")
        runs.wait_for(lambda: left, 15.0)
    read.set()
    assert left == [6] and "rank 0 hangs" in written[0]


def test_two_threads_write_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, second = threading.Event(), threading.Event()

    class SlowFile(io.FileIO):
        def write(self, content: Any) -> int:
            written = super().write(content)
            if not inside.is_set():
                inside.set()
                second.wait(1.0)
            return written

    monkeypatch.setattr(log_file, "FileIO", SlowFile)
    log = log_file.LogFile(tmp_path / "train.log")
    other = threading.Thread(target=log.write, args=("one\n",))
    other.start()
    assert inside.wait(60)
    log.write("two\n")
    second.set()
    other.join()
    log.close()
    assert (tmp_path / "train.log").read_text() == "one\ntwo\n"


class Clock:
    """Replaces the time module for the watchdog."""

    def __init__(self) -> None:
        self.gone = 0.0
        self.sleep: Callable[[float], None] = time.sleep

    def monotonic(self) -> float:
        return time.monotonic() + self.gone


def test_the_time_of_a_stopped_process_is_not_its_phases(
    stores: dist.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour passes between two ticks of the thread, in one phase; then that phase hangs."""
    clock, left = Clock(), []
    monkeypatch.setattr(watchdog, "time", clock)
    with Watchdog(World(0, 1, CPU, stores), Limit(1.0, "comm.timeout_seconds"), print, print, left.append) as one:
        one.at(1, "data")
        runs.wait_for(lambda: one._own.alive)
        clock.gone = 3600.0
        runs.wait_for(lambda: left)
    age = re.search(r"rank 0 hangs: (\d+) s in one phase", capsys.readouterr().err)
    assert left == [6] and age is not None and int(age[1]) < 3600


def test_a_stop_in_an_earlier_phase_gives_a_later_one_no_time(
    stores: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread continues before the watchdog has noticed."""
    clock, left = Clock(), []
    monkeypatch.setattr(watchdog, "time", clock)
    with Watchdog(World(0, 1, CPU, stores), Limit(0.5, "comm.timeout_seconds"), print, print, left.append) as one:
        one.at(1, "data")
        runs.wait_for(lambda: one._own.alive)
        clock.gone = 3600.0
        one.at(1, "optimizer")
        runs.wait_for(lambda: left, 60.0)
    assert left == [6]


class Held:
    """Stands for a tensor that only a function's variable keeps."""


def test_what_a_function_has_returned_from_is_not_kept(stores: dist.Store) -> None:
    """The thread looks where the main thread is, in a function that then returns while the thread sleeps."""
    sleeps, wakes = threading.Semaphore(0), threading.Semaphore(0)
    one = Watchdog(World(0, 1, CPU, stores), Limit(60.0, "comm.timeout_seconds"), print, print)

    def sleep(seconds: float | None = None) -> bool:
        sleeps.release()
        wakes.acquire()
        return is_over

    def function() -> weakref.ref[Held]:
        held = Held()
        wakes.release()
        sleeps.acquire()
        return weakref.ref(held)

    is_over = False
    one._closed.wait = sleep  # type: ignore[method-assign]
    with one:
        sleeps.acquire()
        kept = function()() is not None
        is_over = True
        wakes.release()
    assert not kept


def test_one_rank_is_looked_at_twice_too(stores: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, left, looks = Clock(), [], []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        one.at(2, "data", Limit(60.0, "comm.timeout_seconds"))

    clock.sleep = sleep
    monkeypatch.setattr(watchdog, "time", clock)
    with Watchdog(World(0, 1, CPU, stores), Limit(0.3, "comm.timeout_seconds"), print, print, left.append) as one:
        one.at(1, "data")
        runs.wait_for(lambda: looks)
        seen = one._own.alive
        runs.wait_for(lambda: one._own.alive > seen)
    assert not left and len(looks) == 1


class SlowStore(dist.HashStore):
    """Takes a hundred seconds of a watchdog's clock to answer."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def set(self, *words: Any) -> None:  # type: ignore[override]
        super().set(*words)
        self.clock.gone += 100.0


def test_waiting_for_a_slow_store_is_time_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, left = Clock(), []
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog, "_connection", lambda store: store)
    with watch(SlowStore(clock), 1, left, 10_000.0) as one:
        one.at(1, "data")
        runs.wait_for(lambda: one._own.alive > 3)
        assert one._age() > 200.0 and not left


def test_a_thousand_ranks_do_not_ask_the_store_a_thousand_times_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They hang at the same time, and have half a minute before a collective ends the run."""
    store, size, busy = CountedStore(), 1024, 1000
    left: list[int] = []
    monkeypatch.setattr(watchdog, "_connection", lambda _: store)
    ranks = [Watchdog(World(r, size, CPU, store), Limit(5.0, "x"), print, print, left.append) for r in range(size)]

    def others(seconds: float) -> None:
        for each in ranks[busy:]:
            each._publish("beat", "its stack")
        for each in ranks[:busy]:
            each._publish("hang", "")

    monkeypatch.setattr(watchdog.time, "sleep", others)
    for each in ranks:
        each.at(1, "data")
        each._publish("beat", "")
    for each in ranks[:busy]:
        each.at(1, "forward and backward")
    asked: list[int] = []
    for rank in (3, 2, 0):
        store.asked = 0
        assert ranks[rank]._judge("", 0.0)
        asked.append(store.asked)
    assert left == [6] * 3 and max(asked) < 100 and asked[1] < 5, asked
    said = capsys.readouterr().err
    assert said.count("hang") == 1 and "rank 1000, 1001, " in said and "1015 and 8 more hangs" in said
    assert "[rank 1000, step 1, phase 'data']" in said and "its stack" in said


def test_another_speaks_where_the_first_goes_on(
    stores: dist.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    first, other = (
        Watchdog(World(rank, 3, CPU, stores), Limit(2.0, "x"), print, print, left.append) for rank in (1, 2)
    )
    judged: list[bool] = []

    def meanwhile(seconds: float) -> None:
        if not judged:
            judged.append(True)
            assert not other._judge("", 0.0), "the first is to speak"
        else:
            first.at(2, "data")
            monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
            stores.set(watchdog._SPEAKER, "")

    first.at(1, "data")
    other.at(1, "data")
    monkeypatch.setattr(watchdog.time, "sleep", meanwhile)
    assert not first._judge("", 0.0) and not left
    assert other._judge("", 0.0) and left == [6]
    assert "hangs" in capsys.readouterr().err


class GoneStore(dist.HashStore):
    """The store of a rank 0 or a torchrun that has ended."""

    def set(self, *words: Any) -> None:  # type: ignore[override]
        raise dist.DistNetworkError("Broken pipe")


def test_who_hangs_and_can_ask_nobody_ends_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "_connection", lambda store: store)
    left: list[int] = []
    with watch(GoneStore(), 1, left, 2.0) as one:
        one.at(4, "checkpoint", Limit(3600.0, "checkpoint.save_timeout_seconds"))
        time.sleep(1.5)
        assert not left
        time.sleep(2.5)
    assert left == [6]
    said = capsys.readouterr().err
    assert "not answered for 2 s" in said and "[rank 1, step 4, phase 'checkpoint']" in said, said
    assert "time.sleep" in said, "its stack"


def test_who_goes_on_though_it_can_ask_nobody_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_connection", lambda store: store)
    left: list[int] = []
    with watch(GoneStore(), 1, left, 2.0) as one:
        for step in range(20):
            one.at(step, "data")
            time.sleep(0.2)
    assert not left


class UnreachableStore(dist.HashStore):
    """A store whose host is cut off: a request neither succeeds nor fails until `back` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()

    def set(self, *words: Any) -> None:  # type: ignore[override]
        self.back.wait()


@pytest.mark.parametrize("hangs", [True, False])
def test_who_hangs_and_is_not_answered_ends_too(
    hangs: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, left = UnreachableStore(), []
    monkeypatch.setattr(watchdog, "_connection", lambda _: store)
    monkeypatch.setattr(watchdog, "_JUDGING_SECONDS", 1.0)
    with watch(store, 1, left, 1.0) as one:
        one.at(4, "forward and backward", Limit(1.0 if hangs else 3600.0, "x"))
        if hangs:
            runs.wait_for(lambda: left)
        else:
            time.sleep(4.5)
        store.back.set()
    said = capsys.readouterr().err
    assert left == [6] * hangs and ("not answered for 3 s" in said) == hangs, said
    assert ("[rank 1, step 4, phase 'forward and backward']" in said) == hangs, said


def test_the_setting_to_raise_is_the_phases_own() -> None:
    report = watchdog.Report(0, 1, 5, "checkpoint", 9.0, 1.0, 3, 7.0, "checkpoint.save_timeout_seconds", "s")
    said = watchdog.verdict({0: report})
    assert "9 s in one phase of at most 7 s" in said and "raise checkpoint.save_timeout_seconds" in said


# Saves


def test_a_save_in_the_background_is_waited_for_where_a_run_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    true_publish, true_forward, steps = manifest.publish, loop.forward_backward, [0]

    def slowly(*args: Any, **options: Any) -> None:
        time.sleep(1.5)
        true_publish(*args, **options)

    def forward(model: Any, batches: Any, scale: Any) -> Any:
        steps[0] += 1
        loss = true_forward(model, batches, scale)
        if steps[0] == 7:
            for parameter in model.parameters():
                parameter.grad *= float("nan")
        return loss

    monkeypatch.setattr(checkpointer.manifest, "publish", slowly)
    monkeypatch.setattr(loop, "forward_backward", forward)
    with pytest.raises(NumericsError, match="step 7 is not finite"):
        runs.run(data, folder, checkpoint__async_mode="async")
    names = [path.name for path in (folder / "checkpoint").iterdir()]
    assert names == ["step-5"] and not (folder / LOCK).exists()
    assert "saved" in capsys.readouterr().out
    assert not [thread for thread in threading.enumerate() if "checkpoint" in thread.name]


def test_a_save_that_fails_while_another_error_ends_the_run_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()

    def full(*args: Any, **options: Any) -> None:
        assert ended.wait(60)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def step(self: loop.Run, number: int) -> Any:
        if number == 6:
            ended.set()
            raise DataError("shard 17 is cut off", "restore it")
        return true_step(self, number)

    true_step = loop.Run.step
    monkeypatch.setattr(checkpointer.manifest, "publish", full)
    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(DataError, match="shard 17"):
        runs.run(data, tmp_path / "run", checkpoint__async_mode="async")
    assert "the checkpoint could not be written: rank 0: disk full" in capsys.readouterr().out


def test_each_of_two_saves_has_the_limit_to_itself(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last one waits for the one before it."""
    phases, true_at, true_settle = [], Watchdog.at, checkpointer.Checkpointer.settle

    def at(self: Watchdog, step: int, phase: str, limit: Limit | None = None) -> None:
        phases.append((step, phase))
        true_at(self, step, phase, limit)

    def settle(self: checkpointer.Checkpointer, *args: Any) -> None:
        true_settle(self, *args)
        phases.append((self.saved_step, "settled"))

    monkeypatch.setattr(Watchdog, "at", at)
    monkeypatch.setattr(checkpointer.Checkpointer, "settle", settle)
    runs.run(data, tmp_path / "run", checkpoint__async_mode="async", training__steps=6)
    last = phases[phases.index((6, "checkpoint")) :]
    assert last == [(6, "checkpoint"), (5, "settled"), (6, "checkpoint"), (6, "settled"), (6, "end")]


def test_a_disk_that_hangs_when_all_is_done_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    over, left = threading.Event(), []

    def leave(status: int) -> None:
        left.append(status)
        over.set()

    def train(self: loop.Run) -> None:
        self.watchdog.leave = leave
        true_train(self)

    true_train = loop.Run.train
    monkeypatch.setattr(loop.Run, "train", train)
    monkeypatch.setattr(run_history, "draw_loss_curve", lambda *words: over.wait(60))
    runs.run(data, tmp_path / "run", training__steps=2, comm__timeout_seconds=3, comm__init_timeout_seconds=3)
    assert left == [6] and "phase 'end'" in capsys.readouterr().err


def test_a_save_that_hangs_while_an_error_ends_the_run_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    over, left = threading.Event(), []

    def hang(*args: Any, **options: Any) -> None:
        assert over.wait(60)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def leave(status: int) -> None:
        left.append(status)
        over.set()

    def step(self: loop.Run, number: int) -> Any:
        self.watchdog.leave = leave
        if number == 6:
            raise DataError("shard 17 is cut off", "restore it")
        return true_step(self, number)

    true_step = loop.Run.step
    monkeypatch.setattr(checkpointer.manifest, "publish", hang)
    monkeypatch.setattr(loop.Run, "step", step)
    limits = {"comm__timeout_seconds": 3, "checkpoint__save_timeout_seconds": 1}
    with pytest.raises(DataError, match="shard 17"):
        runs.run(data, tmp_path / "run", checkpoint__async_mode="async", **limits)
    assert left == [6] and "phase 'checkpoint, after DataError'" in capsys.readouterr().err


def test_the_others_wait_for_the_save_of_a_rank_that_an_error_ends(
    stores: dist.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    one, other = watch(stores, 0, left, 1.0), watch(stores, 1, left, 1.0)
    with one:
        with other:
            one.at(6, "gradient norm")
            other.at(6, "data")
            other.ends(DataError("shard 17 is cut off", "restore it"), Limit(60.0, "checkpoint.save_timeout_seconds"))
            time.sleep(4.0)
            assert not left, "the save is being written"
        runs.wait_for(lambda: left)
    assert left == [6] and "rank 1 hangs: no sign of life" in capsys.readouterr().err


def test_a_failed_save_says_what_to_do_about_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(self: RunLock) -> None:
        raise CheckpointError("the run directory is now held by process 7 on elsewhere", "one run at a time")

    monkeypatch.setattr(RunLock, "check", taken)
    with pytest.raises(CheckpointError) as caught:
        runs.run(data, tmp_path / "run")
    assert "held by process 7 on elsewhere" in caught.value.what and "bytes free" not in caught.value.what
    assert caught.value.fix == "one run at a time; there is no checkpoint yet"


def test_patience_counts_the_steps_before_the_save(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpointer, "seconds_to_stop", lambda: 60.0)
    runs.run(data, tmp_path / "one", training__steps=1)
    assert "WARNING" not in capsys.readouterr().out
    monkeypatch.setattr(Agreement, "steps_to_stop", staticmethod(lambda device: 10**6))
    runs.run(data, tmp_path / "many", training__steps=1)
    assert re.search(r"WARNING: up to 1000000 steps of \d", capsys.readouterr().out)


# A job that is queued again by the same command


def test_a_job_goes_on_though_the_step_it_went_back_to_has_been_deleted(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.run(data, folder, checkpoint__keep_latest_k=0)
    more = {"checkpoint__load_step": 5, "checkpoint__keep_latest_k": 1, "checkpoint__interval": 2}
    runs.run(data, folder, training__steps=8, **more)
    assert 5 not in manifest.checkpoints(folder / "checkpoint")
    runs.run(data, folder, training__steps=10, **more)
    assert max(runs.losses(folder)) == 10


def test_a_run_goes_back_twice_to_different_steps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within a second, as far as their names say."""
    monkeypatch.setattr(manifest.time, "time", lambda: 1000.5)
    folder, more = tmp_path / "run", {"checkpoint__keep_latest_k": 0, "checkpoint__interval": 2, "training__steps": 8}
    runs.run(data, folder, **more)
    runs.run(data, folder, checkpoint__load_step=6, **more)
    capsys.readouterr()
    runs.run(data, folder, checkpoint__load_step=4, **more)
    assert "the run goes back to step 4" in capsys.readouterr().out
    names = [path.name for path in manifest.superseded(folder / "checkpoint")]
    assert names == ["superseded-1000-step-6", "superseded-1000-step-8", "superseded-1001-step-8"]


def test_going_back_is_done_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    runs.run(data, folder, checkpoint__keep_latest_k=0)
    runs.run(data, folder, checkpoint__load_step=5, training__steps=7, checkpoint__keep_latest_k=0)
    assert max(runs.losses(folder)) == 7
    abandoned = run_history.read(folder / "metrics-until-10.jsonl")
    assert [record["step"] for record in run_history.losses(abandoned)] == list(range(1, 11))
    assert "metrics-until-10.jsonl has all" in capsys.readouterr().out
    again = dict.fromkeys(runs.losses(folder))
    capsys.readouterr()
    runs.run(data, folder, checkpoint__load_step=5, training__steps=9, checkpoint__keep_latest_k=0)
    said = capsys.readouterr().out
    assert "went back to checkpoint.load_step 5 at an earlier start, has come to step 7 since" in said
    assert "after step 7," in said and again.keys() < runs.losses(folder).keys()
    (folder / "checkpoint" / "went_back.json").unlink()
    runs.run(data, folder, checkpoint__load_step=5, training__steps=6, checkpoint__keep_latest_k=0)
    assert max(runs.losses(folder)) == 6


def test_a_start_that_is_refused_changes_nothing(data: Path, tmp_path: Path) -> None:
    """Neither one that went back to a step nor one with other settings: the run's own command resumes."""
    folder, other = tmp_path / "run", tmp_path / "other"
    runs.run(data, folder)
    other.mkdir()
    documents = runs.write_documents(other / "documents.jsonl", 900)
    tokenizer = ["--model.tokenizer_path", str(data), "--model.vocab_size", "331"]
    prepare_folder(parse(["--training.dataset_path", str(documents), *tokenizer]), other / "tokens", None)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name == "config.toml")
    steps = sorted(path.name for path in (folder / "checkpoint").iterdir())
    with pytest.raises(CheckpointError, match="data"):  # refused when all is loaded, for only then the data is seen
        runs.run(other / "tokens", folder, checkpoint__load_step=5, training__steps=12)
    with pytest.raises(ConfigError, match="seq_len was 32 and is 16"):
        runs.run(data, folder, checkpoint__load_step=5, training__seq_len=16)
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == steps
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name == "config.toml") == before
    runs.run(data, folder, training__steps=12)
    assert sorted(runs.losses(folder)) == list(range(1, 13))


def test_going_back_after_a_start_that_failed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun starts it a second time, and the request is still to be carried out."""

    def no_tokenizer(*arguments: Any) -> Any:
        raise OSError("no tokenizer")

    folder = tmp_path / "run"
    runs.run(data, folder)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no tokenizer"):
        patch.setattr(loop, "build_tokenizer", no_tokenizer)
        runs.run(data, folder, checkpoint__load_step=5, training__steps=7)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    runs.run(data, folder, checkpoint__load_step=5, training__steps=7)
    assert "the run goes back to step 5" in capsys.readouterr().out


def test_a_first_start_that_failed_binds_to_no_more_than_its_tokenizer(tmp_path: Path) -> None:
    documents, folder = runs.write_documents(tmp_path / "documents.jsonl", 60), tmp_path / "run"
    with pytest.raises(DataError, match="sequences of 2048"):
        runs.run(documents, folder, training__seq_len=2048, training__local_batch_size=100)
    other = runs.write_documents(tmp_path / "other.jsonl", 60)
    with pytest.raises(ConfigError, match=r"dataset_path was .*; nothing was trained yet but tokenizer\.model"):
        runs.run(other, folder)
    runs.run(documents, folder, model__n_layers=2)
    assert max(runs.losses(folder)) == 10
    with pytest.raises(ConfigError, match="n_layers was 2 and is 1"):
        runs.run(documents, folder)


def test_a_run_that_saves_nothing_does_not_promise_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", step)
    runs.run(data, tmp_path / "run", checkpoint__enable=False)
    assert "stopped by SIGTERM; nothing was saved, for checkpoint.enable is False" in capsys.readouterr().out


# The lock


def test_a_lock_that_cannot_be_read_is_nobodys_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLock(tmp_path) as lock:
        (tmp_path / LOCK).unlink()
        lock.check()
        assert json.loads((tmp_path / LOCK).read_text())["token"] == lock._me["token"], "it is written again"

        def stale(self: Path, *args: Any, **options: Any) -> str:
            raise OSError(errno.ESTALE, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", stale)
            lock.check()
        (tmp_path / LOCK).write_text(json.dumps(lock._me | {"token": "another", "host": "elsewhere"}))
        with pytest.raises(CheckpointError, match=r"held by process .* on elsewhere"):
            lock.check()
