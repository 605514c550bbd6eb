"""Whatever happens to a process of the end-to-end benchmark, what it has measured is kept, and the rest is repeated."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import launch_time, provenance, train_process, train_suite, variants
from benchmarks.device_state import DeviceWatch, parsed_smi, summary
from benchmarks.launch_time import STARTS
from benchmarks.step_timing import Length
from benchmarks.train_cells import cells
from benchmarks.train_process import Answer, Run, watched
from benchmarks.train_record import record
from benchmarks.variants import How, Row, time_variants
from benchmarks.workloads import LLAMA_1B, Cell, Variant

CPU = torch.device("cpu")
HOW = How(smoke=True, length=Length(1, 4, 2), profiles=False)
A, B, C = (Variant(name) for name in "abc")


class Scripted:
    """A contender whose variants raise or wait at a given step, counted from 1."""

    device = CPU

    def __init__(self, raises: Mapping[str, tuple[int, Exception]]) -> None:
        self.raises, self.at, self.steps, self.order = raises, "", dict.fromkeys("abc", 0), ""

    def what_runs(self, variant: Variant) -> object:
        return variant.name

    def switch_to(self, variant: Variant) -> Row:
        self.at = variant.name
        return {}

    def face(self) -> str:
        return self.at

    def put_on(self, face: str) -> None:
        self.at = face

    def step(self) -> None:
        self.steps[self.at] += 1
        self.order += self.at
        limit, error = self.raises.get(self.at, (0, None))
        if error is not None and self.steps[self.at] >= limit:
            raise error

    def last_loss(self) -> float:
        return 1.0


def rows_by_name(rows: list[Row]) -> dict[str, Row]:
    return {row["variant"]: row for row in rows}


def test_a_variant_is_timed_as_soon_as_it_is_warm_and_the_base_beside_it() -> None:
    scripted = Scripted({})
    rows = time_variants(scripted, [A, B, C], HOW)
    # A step to compile, then blocks of two: a's own, b's and a beside it, c's; then what is left of each.
    assert scripted.order == "aaa" + "bbb" + "aa" + "ccc" + "aa" + "bb" + "cc"
    assert [row["step_seconds"]["timed"] for row in rows] == [6, 4, 4] and all(row["complete"] for row in rows)


@pytest.mark.parametrize("error", [torch.AcceleratorError("illegal access"), torch.OutOfMemoryError("no room")])
def test_after_an_error_within_a_step_nothing_more_is_timed(error: Exception) -> None:
    scripted = Scripted({"b": (1, error)})
    rows = rows_by_name(time_variants(scripted, [A, B, C], HOW))
    assert rows["b"]["error"].startswith(type(error).__name__) and list(rows) == ["a", "b"]
    assert rows["b"]["out_of_memory"] == isinstance(error, torch.OutOfMemoryError)
    assert rows["a"]["step_seconds"]["timed"] == 2 and not rows["a"]["complete"]
    assert scripted.order == "aaa" + "b"


def test_one_that_breaks_late_keeps_what_was_timed() -> None:
    rows = rows_by_name(time_variants(Scripted({"b": (4, RuntimeError("later"))}), [A, B], HOW))
    assert rows["b"]["step_seconds"]["timed"] == 2 and rows["b"]["stopped"] == "RuntimeError: later"
    assert "error" not in rows["b"]


def test_a_search_times_each_batch_once_until_one_does_not_fit() -> None:
    scripted = Scripted({"c": (1, torch.OutOfMemoryError("no room"))})
    rows = time_variants(scripted, [A, B, C], HOW, searches=True)
    assert scripted.order == "aaa" + "bbb" + "c" and rows[2]["out_of_memory"]


def in_turn(cell: Cell, raises: Sequence[Mapping[str, tuple[int, Exception]]]) -> tuple[Answer, list[Answer]]:
    """Runs the cell with one `Scripted` after another."""
    told: list[Answer] = []
    left = list(raises)

    def once(names: list[str], say: Callable[[Answer], None]) -> tuple[Answer, str]:
        rows = time_variants(Scripted(left.pop(0)), train_suite.only(cell, names).variants, HOW)
        return {"environment": {"device": "some GPU"}, "rows": rows, "at": ""}, ""

    return Run(cell, once, told.append, {"device": "unknown"}).finish(), told


def test_what_a_bad_variant_left_undone_runs_in_another_process() -> None:
    lost = {"b": (1, torch.AcceleratorError("illegal access"))}
    answer, told = in_turn(Cell("single", LLAMA_1B, (A, B, C)), [lost, {}])
    rows = rows_by_name(answer["rows"])
    assert rows["a"]["complete"] and rows["c"]["complete"] and "illegal" in rows["b"]["error"]
    assert answer["environment"]["device"] == "some GPU"
    assert rows_by_name(told[0]["rows"])["a"]["step_seconds"]["timed"] == 2  # said at once


def test_figures_of_an_earlier_process_outlive_an_error_of_a_later_one() -> None:
    lost = {"b": (1, RuntimeError("first"))}
    broken = {"a": (1, RuntimeError("then"))}
    answer, _ = in_turn(Cell("single", LLAMA_1B, (A, B, C)), [lost, broken, {}])
    rows = rows_by_name(answer["rows"])
    assert rows["a"]["step_seconds"]["timed"] == 2 and rows["a"]["stopped"] == "RuntimeError: then"
    assert rows["c"]["complete"]


def test_a_process_that_dies_is_the_fault_of_what_was_at_work() -> None:
    half = {"variant": "a", "step_seconds": {"timed": 10}, "complete": False}
    whole = {"variant": "a", "step_seconds": {"timed": 50}, "complete": True}
    c = {"variant": "c", "step_seconds": {"timed": 50}, "complete": True}
    known = {"device": "some GPU", "commit": "1"}
    processes = [
        ({"environment": known, "rows": [half, {"variant": "b"}], "at": "b"}, "stopped after 460 s"),
        ({"environment": known, "rows": [whole, c], "at": ""}, "the process ended with status 1"),
    ]
    run = Run(Cell("single", LLAMA_1B, (A, B, C)), lambda names, say: processes.pop(0), lambda a: None, {"device": "?"})
    answer = run.finish()
    rows = rows_by_name(answer["rows"])
    assert rows["b"]["error"] == "stopped after 460 s" and answer["environment"] == known
    assert rows["a"] == whole and rows["c"] == c


def test_what_the_limit_met_after_others_were_done_is_not_blamed_but_runs_again() -> None:
    done = [{"variant": name, "step_seconds": {"timed": 50}, "complete": True} for name in "abc"]
    known = {"device": "some GPU"}
    processes = [
        ({"environment": known, "rows": [done[0], {"variant": "b"}], "at": "b"}, "stopped after 460 s"),
        ({"environment": known, "rows": [{"variant": "b"}], "at": "b"}, "stopped after 460 s"),
        ({"environment": known, "rows": [done[2]], "at": ""}, ""),
    ]
    asked: list[list[str]] = []
    run = Run(Cell("single", LLAMA_1B, (A, B, C)), lambda names, say: (asked.append(names), processes.pop(0))[1],
              lambda a: None, known)  # fmt: skip
    rows = rows_by_name(run.finish()["rows"])
    assert asked == [["a", "b", "c"], ["b", "c"], ["c"]]
    assert rows["a"]["complete"] and rows["c"]["complete"] and rows["b"]["error"] == "stopped after 460 s"


def test_a_process_that_dies_before_its_first_variant_is_the_row_of_all_and_keeps_the_environment() -> None:
    words = "the process ended with status 1: ImportError: no such thing"
    run = Run(Cell("single", LLAMA_1B, (A, B)), lambda n, s: ({"environment": {}, "rows": []}, words),
              lambda a: None, {"device": "some GPU"})  # fmt: skip
    answer = run.finish()
    assert [row["error"] for row in answer["rows"]] == [words, words] and answer["environment"]["device"] == "some GPU"


def test_what_a_process_adds_to_a_finished_row_is_kept() -> None:
    """Steps are profiled when all have been timed, which has been reported by then."""
    done = {"variant": "a", "step_seconds": {"timed": 50}, "complete": True}
    profiled = done | {"profile": {"seconds": {"idle": 0.0}}}

    def once(names: list[str], say: Callable[[Answer], None]) -> tuple[Answer, str]:
        say({"environment": {}, "rows": [done]})
        say({"environment": {}, "rows": [profiled]})
        return {"environment": {}, "rows": [profiled], "at": ""}, ""

    answer = Run(Cell("single", LLAMA_1B, (A,)), once, lambda answer: None, {}).finish()
    assert answer["rows"] == [profiled]


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    answer, pids = tmp_path / "answer", tmp_path / "pids"
    command = script(
        tmp_path,
        f"""
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(pids)!r}).write_text(str(child.pid))
pathlib.Path({str(answer)!r}).write_text("something")
time.sleep(60)
""",
    )
    heard: list[str] = []
    started = time.monotonic()
    words = watched(command, dict(os.environ), tmp_path, answer, lambda: heard.append("!"), 60, 6)
    assert words == "stopped: it wrote nothing for 6 s" and heard and time.monotonic() - started < 60
    assert ended(int(pids.read_text()))


def ended(pid: int) -> bool:
    """Whether it ends within seconds. Without an init, a process that nobody waits for remains as a zombie."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise ValueError('no such thing')", "the process ended with status 1: ValueError: no such thing"),
        ("import os; os.kill(os.getpid(), 11)", "the process was ended by SIGSEGV"),
        ("", ""),
    ],
)
def test_the_end_of_a_process_is_told(tmp_path: Path, text: str, words: str) -> None:
    assert watched(script(tmp_path, text), dict(os.environ), tmp_path, tmp_path / "answer") == words


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children of dead parents on Linux only")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_parent(tmp_path: Path, number: int) -> None:
    root = Path(__file__).resolve().parents[1]
    pid, child = tmp_path / "pid", tmp_path / "child.py"
    child.write_text(f"""
import os, pathlib, sys, time
sys.path[:0] = {[str(root), str(root / "kernels")]!r}
from benchmarks.train_process import end_with_parent
end_with_parent()
pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
time.sleep(60)
""")
    parent = script(
        tmp_path,
        f"""
import os, pathlib, sys
sys.path[:0] = {[str(root), str(root / "kernels")]!r}
from benchmarks.train_process import end_on_sigterm, watched
end_on_sigterm()
watched([sys.executable, {str(child)!r}], dict(os.environ), pathlib.Path({str(tmp_path)!r}), pathlib.Path("none"))
""",
    )
    process = subprocess.Popen(parent)
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(20)
    assert ended(int(pid.read_text()))


def test_what_a_killed_benchmark_left_is_recorded_by_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Except for what other code left, whose cells may differ."""
    name = cells(("rank0",))[0].name
    seconds = {"median": 1.0, "p10": 1.0, "p90": 1.0, "timed": 10}
    row = {"variant": "compiled, auto", "step_seconds": seconds, "peak_bytes": 1}
    environment = {"device": "some GPU", "smoke": False, "commit": provenance.commit()}
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    def leave(pid: int, at: str, **changes: Any) -> None:
        answer = {"part": "rank0", "cell": name, "environment": environment, "rows": [row], "at": ""} | changes
        (tmp_path / f".answer-{pid}-{at}.json").write_text(json.dumps(answer))

    for pid in (dead.pid, os.getpid()):
        leave(pid, "8b")
    leave(dead.pid, "number", cell=2)
    leave(dead.pid, "commit", environment=environment | {"commit": "older"})
    leave(dead.pid, "variant", rows=[row | {"variant": "no longer there"}])
    options = train_suite._arguments("").parse_args(["--out", str(tmp_path)])
    train_suite.Suite(options).run(())
    (found,) = json.loads((tmp_path / "train-some-gpu-rank0.json").read_text())["rows"]
    assert found["tokens_per_second"] == 8192.0
    aside = {f".answer-{dead.pid}-{at}.json.aside" for at in ("number", "commit", "variant")}
    assert {path.name for path in tmp_path.glob(".answer-*")} == {f".answer-{os.getpid()}-8b.json"} | aside
    assert capsys.readouterr().out.count("left by a process that ran other code, and set aside") == 3


def test_a_row_that_says_nothing_yet_replaces_nothing(tmp_path: Path) -> None:
    cell = cells(("rank0",))[0]
    seconds = {"median": 1.0, "p10": 1.0, "p90": 1.0, "timed": 10}
    environment = {"device": "some GPU", "smoke": False}
    suite = train_suite.Suite(train_suite._arguments("").parse_args(["--out", str(tmp_path)]))
    for row in ({"step_seconds": seconds, "peak_bytes": 1}, {}):
        suite.record(cell, {"environment": environment, "rows": [{"variant": "compiled, auto"} | row]})
    (found,) = json.loads((tmp_path / "train-some-gpu-rank0.json").read_text())["rows"]
    assert found["step_seconds"] == seconds


def test_a_row_that_was_cut_off_gives_way_to_no_less(tmp_path: Path) -> None:
    """A row with 40 of 50 steps is not replaced by 10 steps or an error, which are noted, but by 45."""
    cell, variant = cells(("rank0",))[0], {"variant": "compiled, auto"}

    def found_after(commit: str, row: dict[str, Any]) -> dict[str, Any]:
        environment = {"device": "some GPU", "smoke": False, "commit": commit}
        record(cell, {"environment": environment, "rows": [variant | row]}, tmp_path, None)
        (found,) = json.loads((tmp_path / "train-some-gpu-rank0.json").read_text())["rows"]
        return found

    def steps(timed: int) -> dict[str, Any]:
        return {"step_seconds": {"median": 1.0, "p10": 1.0, "p90": 1.0, "timed": timed}, "peak_bytes": 1}

    found_after("1", steps(40))
    for commit, row, words in (("2", steps(10), "10 steps"), ("3", {"error": "lost"}, "lost")):
        found = found_after(commit, row)
        assert found["step_seconds"]["timed"] == 40 and found["commit"] == "1"
        assert found["later attempt"] == {"commit": commit, "came to": words}
    found = found_after("4", steps(45))
    assert found["step_seconds"]["timed"] == 45 and "later attempt" not in found


def test_rows_without_limits_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_suite, "device_name", lambda: "Some GPU")
    suite = train_suite.Suite(train_suite._arguments("").parse_args(["--out", str(tmp_path), "--only", "8B"]))
    monkeypatch.setattr(suite, "finish", lambda cell: {"rows": []})
    suite.run(("rank0",))
    assert f"no limits of Some GPU in {tmp_path}: rows get no fraction of them" in capsys.readouterr().out
    content = {"device": "Some GPU", "rates": {"bandwidth": 1.0}, "gemm_by_shape": {}, "attention_by_call": {}}
    (tmp_path / "limits-some-gpu.json").write_text(json.dumps(content))
    suite.run(("rank0",))
    assert "no limits" not in capsys.readouterr().out


def test_processes_that_run_elsewhere_find_what_this_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["site", ".", "", "/elsewhere"]))
    monkeypatch.chdir(tmp_path)
    path = train_suite.environment_of_children(tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert path[2:] == [str(tmp_path / "site"), str(tmp_path), "/elsewhere"]


def test_the_limits_go_where_the_rest_goes_and_may_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(train_suite, "watched", lambda *a, **k: calls.append((a, k)) or "")
    train_suite.Suite(train_suite._arguments("").parse_args(["--out", str(tmp_path)])).run(("limits",))
    ((positional, named),) = calls
    assert positional[0][-2:] == ["--out", str(tmp_path)] and named["limit"] <= 300


def test_a_tuned_cell_may_be_silent_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silences: list[float] = []
    monkeypatch.setattr(train_suite, "watched", lambda *a: silences.append(a[-1]) or "")
    suite = train_suite.Suite(train_suite._arguments("").parse_args(["--out", str(tmp_path)]))
    for part in ("levers-autotune", "rank0"):
        suite._in_a_child(cells((part,))[0], ["base"], lambda answer: None)
    assert silences[0] - silences[1] > 60


def test_an_error_before_the_first_step_is_the_row_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the shards are not random\nat all")

    monkeypatch.setattr(train_suite, "run_cell", refuse)
    rows = train_suite.rows_of(cells(("rank0",))[0], CPU, HOW)
    assert [row["error"] for row in rows] == ["AssertionError: the shards are not random"] * 2


def test_an_error_after_the_last_step_takes_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cell: Cell, device: torch.device, how: How) -> None:
        how.save([{"variant": "a", "complete": True}], "")
        raise RuntimeError("the process group is gone")

    monkeypatch.setattr(train_suite, "run_cell", run)
    assert train_suite.rows_of(cells(("rank0",))[0], CPU, HOW) == [{"variant": "a", "complete": True}]


def test_the_commit_is_told_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    assert provenance.commit() == "unknown"
    monkeypatch.setenv("BENCHMARK_COMMIT", "0123abc")
    assert provenance.commit() == "0123abc"


# Clocks


def test_clocks_are_those_of_the_timed_steps() -> None:
    taken: list[float] = []

    def read() -> dict[str, float]:
        taken.append(1000.0 + len(taken))
        return {"sm_mhz": taken[-1], "reasons": 4.0}

    def five_more() -> None:
        wanted = len(taken) + 5
        runs.wait_for(lambda: len(taken) >= wanted)

    with DeviceWatch((read, 0.005)) as watch:
        five_more()
        started = time.perf_counter()
        five_more()
        spans = [(started, time.perf_counter())]
        five_more()
    found = watch.during(spans)
    assert 2 <= found["readings"] < len(taken) - 5 and found["slowed_by"] == ["power limit"]
    assert 1000 < found["sm_mhz"][0] <= found["sm_mhz"][1] <= found["sm_mhz"][2] < taken[-1] - 1
    assert DeviceWatch(None).during(spans) == {}


def test_clocks_are_numbers() -> None:
    readings = [parsed_smi("1980, 2619, 512.3, 61, 700.00, 1980"), parsed_smi("345, 2619, [N/A], 40, 700.00, 1980")]
    found = summary(readings)
    assert found["sm_mhz"] == [345.0, 1162.5, 1980.0] and found["watts"] == [512.3] * 3


# From the command to a step


def test_the_time_to_a_step_is_when_its_line_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen, true_lines = tmp_path / "run", tmp_path / "seen", launch_time.lines_of

    def lines_of(metrics: Path) -> list[dict[str, Any]]:
        if lines := true_lines(metrics):
            seen.touch()
        return lines

    monkeypatch.setattr(launch_time, "lines_of", lines_of)
    words = [*script(tmp_path, """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--job.dump_folder") + 1])
folder.mkdir()
with (folder / "metrics.jsonl").open("w", buffering=1) as file:
    time.sleep(0.5)
    file.write(json.dumps({"step": 1}) + "\\n")
    while not folder.with_name("seen").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    for step, speed in ((10, 9), (20, 9), (30, 1), (40, 3), (50, 2)):
        file.write(json.dumps({"step": step, "tokens_per_second": speed}) + "\\n")
    file.write(json.dumps({"step": 50, "elapsed_seconds": 60.0}) + "\\n")
(folder / "train.log").write_text("2026-01-01 00:00:00 model  a Llama\\n2026-01-01 00:00:00 start  7.2 s: data 7.0\\n")
time.sleep(0.5)
"""), "--job.dump_folder", str(run)]  # fmt: skip
    found = launch_time.one_start(words, tmp_path, dict(os.environ))
    assert 0.4 < found["seconds_to_step_1"] < found["seconds_to_step_10"] - 0.3 and "error" not in found
    assert found["start"] == "7.2 s: data 7.0" and found["tokens_per_second"] == 2


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    words = [*script(tmp_path, "raise SystemExit('titan_fast: no such flavor')"), "--job.dump_folder", str(tmp_path)]
    found = launch_time.one_start(words, tmp_path, dict(os.environ))
    assert found == {"error": "the process ended with status 1: titan_fast: no such flavor"}


def test_a_start_that_was_timed_stays_until_it_is_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repetition that ends after the first start, or fails, removes no row."""
    surroundings = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache" / "inductor")}
    monkeypatch.setattr(launch_time, "prepare_text", lambda *_: tmp_path)
    done = {"seconds_to_step_1": 9.0, "seconds_to_step_10": 12.0}

    def rows_after(commit: str, *starts: dict[str, Any]) -> list[Row]:
        left = list(starts)
        monkeypatch.setattr(launch_time, "one_start", lambda *_: left.pop(0))
        machine = {"device": "some GPU", "versions": {"torch": commit}, "commit": commit}
        with suppress(IndexError):  # of a process that ends before its last start
            launch_time.measure(tmp_path, surroundings, machine, smoke=False)
        return json.loads((tmp_path / "train-some-gpu-launch.json").read_text())["rows"]

    assert [row["commit"] for row in rows_after("1", done, done)] == ["1", "1"]
    assert {row["variant"]: row["commit"] for row in rows_after("2", done)} == {STARTS[0]: "2", STARTS[1]: "1"}
    kept, failed = rows_after("3", {"error": "no text"})
    assert kept["versions"] == {"torch": "1"} and kept["commit"] == "1"
    assert failed["later attempt"] == {"commit": "3", "came to": "no text"} and failed["seconds_to_step_10"] == 12.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--only hugging --parts peers", "no cell of peers has 'hugging' in its name; there are: Llama 3.2 1B untied"),
        ("--cells 0", "--cells is 0; give 1 or more"),
        ("--smoke --out here.json", "--out is '.*here.json', and there is a file for each part; give a folder"),
    ],
)
def test_what_selects_nothing_is_refused(options: str, words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        train_suite.main("", options.split())


def test_the_plan_is_of_what_is_selected(capsys: pytest.CaptureFixture[str]) -> None:
    train_suite.main("", ["--plan", "--parts", "single,peers", "--only", "untied", "--cells", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "processes" in line] == ["0", "2"]
    assert len([line for line in lines if line.startswith("    ")]) == 2


def test_a_plan_is_by_the_limits_of_the_device_that_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    committed = (train_suite.RESULTS / "limits-nvidia-h100-80gb-hbm3.json").read_text()
    (tmp_path / "limits-nvidia-h100-80gb-hbm3.json").write_text(committed)

    def said(*more: str) -> str:
        train_suite.main("", ["--plan", "--parts", "limits", "--out", str(tmp_path), *more])
        return capsys.readouterr().out.splitlines()[0]

    for here in ("unknown", h100):
        monkeypatch.setattr(train_suite, "device_name", lambda here=here: here)
        assert said() == f"estimates from the limits measured on {h100}, caches cold"
    monkeypatch.setattr(train_suite, "device_name", lambda: "NVIDIA H200")
    of_none = "no limits of {} are known: estimates from rates assumed for an H100 SXM, caches cold"
    assert said() == of_none.format("NVIDIA H200")
    assert said("--device", h100) == f"estimates from the limits measured on {h100}, caches cold"
    monkeypatch.setattr(train_suite, "device_name", lambda: "unknown")
    (tmp_path / "limits-nvidia-h200.json").write_text(committed.replace(h100, "NVIDIA H200"))
    assert said() == of_none.format("this machine")
    assert said("--device", "NVIDIA H200") == "estimates from the limits measured on NVIDIA H200, caches cold"


def test_a_launch_is_a_config_that_parses(tmp_path: Path) -> None:
    from titan_fast.config import parse

    config = parse(launch_time.command(tmp_path, tmp_path, smoke=False)[3:])
    assert config.model.flavor == "llama3_1b" and config.compile.components == ("blocks", "norm", "loss", "optimizer")
    assert config.training.steps == 10 and not config.checkpoint.enable and config.metrics.sample_prompt == ""


def test_garbage_is_kept_while_steps_are_timed() -> None:
    import gc

    class Looks(Scripted):
        def step(self) -> None:
            super().step()
            assert not gc.isenabled()

    rows = time_variants(Looks({}), [A], dataclasses.replace(HOW, length=Length(1, 2, 2)))
    assert rows[0]["complete"] and gc.isenabled() and variants.COLLECT_EVERY == 50
    assert train_process.is_finished(rows[0])
