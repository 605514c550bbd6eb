"""From made-up results to the table that `auto` follows."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot, provenance

MACHINE = {"device": "Example GPU", "architecture": "sm_99", "versions": {"torch": "2"}, "commit": "0", "smoke": False}
SHAPE = {"rows": 8192, "width": 4096}
RESULTS = Path(plot.__file__).parent / "results"
README = RESULTS.parents[1] / "README.md"
PROVIDERS = ("compiled", "liger", "quack", "ours")


def info(
    provider: str, direction: str, median: float, against: dict[str, float], *, op: str = "block", **changes: Any
) -> dict[str, Any]:
    """One measurement; `against`: rival -> microseconds more than it, each with a standard error of 3."""
    switch = provider.partition("+")[2]
    contest = {
        "op": changes.pop("switch", switch),
        "compiled": True,
        "variant": "residual carried",
        "shape": SHAPE,
        "dtype": "bfloat16",
        "against": list(against),
        "parts": changes.pop("parts", 2),
    }
    queued = changes.pop("queued", True)
    return {
        "op": op,
        "model": "llama3_8b",
        "tensor_parallel": 1,
        "tokens": 8192,
        "context": "block",
        "direction": direction,
        "provider": provider,
        "median_us": median,
        "peak_bytes": 0,
        "queued": queued,
        "against": {r: {"slower_by_us": d, "error_us": 3.0, "queued": queued} for r, d in against.items()},
        "decides": [contest] if contest["op"] else [],
        **changes,
    }


def write(path: Path, infos: list[dict[str, Any]], **machine: Any) -> Path:
    content = {"machine_info": {**MACHINE, **machine}, "benchmarks": [{"extra_info": i} for i in infos]}
    path.write_text(json.dumps(content))
    return path


def norms(forward: float, backward: float, **changes: Any) -> list[dict[str, Any]]:
    """A block with our norms, by how much longer it takes."""
    each = {"forward": forward, "backward": backward}
    return [info("compiled+rms_norm", way, 1000.0, {"compiled": more}, **changes) for way, more in each.items()]


def test_parts_merge_into_one_decision(tmp_path: Path) -> None:
    """Forward and backward, from two files: 30 us more and 55 less, each known to 3."""
    files = [write(tmp_path / f"{i}.json", [part]) for i, part in enumerate(norms(30.0, -55.0))]
    table, undecided = plot.decision_table(plot.load(files))
    (cell,) = table.cells
    assert not undecided
    assert (cell.op, cell.compiled, cell.variant, cell.dtype) == ("rms_norm", True, "residual carried", "bfloat16")
    assert (cell.shape, cell.triton_us, cell.reference_us) == (SHAPE, 2000.0, 2025.0)
    assert cell.noise_us == pytest.approx(20.25)  # a hundredth: the standard errors say 2 * 18**0.5
    assert cell.triton_wins
    slower = write(tmp_path / "slower.json", norms(30.0, -49.0))  # 19 us of 2019
    assert not plot.decision_table(plot.load([slower]))[0].cells[0].triton_wins
    rough = norms(30.0, -55.0)
    for one in rough:
        one["against"]["compiled"]["error_us"] = 10.0
    (cell,) = plot.decision_table(plot.load([write(tmp_path / "rough.json", rough)]))[0].cells
    assert cell.noise_us == pytest.approx(2 * 200**0.5, abs=0.01)
    assert not cell.triton_wins


def test_two_operators_of_one_switch_are_summed(tmp_path: Path) -> None:
    both = [
        info("ours", way, 10.0, {"eager": -1.0}, op=op, context="alone", switch="rms_norm", parts=4)
        for op in ("rms_norm", "add_rms_norm")
        for way in ("forward", "backward")
    ]
    (cell,) = plot.decision_table(plot.load([write(tmp_path / "a.json", both)]))[0].cells
    assert (cell.triton_us, cell.reference_us) == (40.0, 44.0)


def test_the_fastest_rival_counts(tmp_path: Path) -> None:
    """Faster than the reference by 200, slower by 2 than the kernels that it replaces."""
    against = {"compiled": -100.0, "compiled+rms_norm": 1.0}
    infos = [info("compiled+reemit", way, 1000.0, against) for way in ("forward", "backward")]
    (cell,) = plot.decision_table(plot.load([write(tmp_path / "a.json", infos)]))[0].cells
    assert (cell.triton_us, cell.reference_us) == (2000.0, 1998.0)
    assert not cell.triton_wins


@pytest.mark.parametrize(
    ("infos", "reason"),
    [
        (norms(-500.0, -500.0, queued=False), "the GPU waited for the host"),
        (norms(-500.0, -500.0)[:1], "not all of its operators and directions"),
        (
            [i | {"against": {}} for i in norms(-500.0, -500.0)],
            "compiled was not measured beside it",
        ),
    ],
)
def test_what_cannot_decide_says_why(infos: list[dict[str, Any]], reason: str, tmp_path: Path) -> None:
    results = plot.load([write(tmp_path / "a.json", infos)])
    table, undecided = plot.decision_table(results)
    assert not table.cells
    assert reason in undecided[0]
    assert "rms_norm compiled residual carried bfloat16 rows=8192" in plot.decisions(table, undecided)


def test_every_commit_is_named(tmp_path: Path) -> None:
    """What is compared was timed together, so files of several commits may be merged."""
    files = [write(tmp_path / f"{n}.json", norms(1.0, 1.0), commit=str(n)) for n in (0, 1, 0)]
    assert plot.load(files).machine["commit"] == "0, 1"


def test_times_that_are_the_hosts_are_marked(tmp_path: Path) -> None:
    liger = info("liger", "step", 5.0, {}, op="cross_entropy", queued=False)
    text = plot.markdown(plot.load([write(tmp_path / "a.json", [liger, *norms(1.0, 1.0)])]))
    assert "| 5.0* |" in text
    assert "* the GPU waited for the host" in text
    assert "| compiled+rms_norm | compiled | +1.0 +- 6.0 |" in text
    assert "* the GPU" not in plot.markdown(plot.load([write(tmp_path / "b.json", norms(1.0, 1.0))]))


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"device": "Another GPU"}, "is of device Another GPU, the files before it of Example GPU"),
        ({"versions": {"torch": "3"}}, "is of versions torch 3, the files before it of torch 2"),
    ],
)
def test_what_does_not_belong_together_does_not_merge(machine: dict[str, Any], message: str, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.json", norms(1.0, 1.0)), write(tmp_path / "b.json", norms(1.0, 1.0), **machine)]
    with pytest.raises(ValueError, match=message):
        plot.load(files)


def plotted(tmp_path: Path, *files: Path) -> int:
    return plot.main([*map(str, files), "--pictures", str(tmp_path), "--measured", str(tmp_path / "measured")])


def test_the_table_is_written_last_and_never_loses_a_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results without a bandwidth give a table but no picture. The table is unchanged by results of only a part, or if
    the picture cannot be drawn. A cell that is now undecided is not lost."""
    ops = ("rms_norm", "rope")
    files = [write(tmp_path / f"{op}.json", norms(30.0, -55.0, switch=op, op=f"block {op}")) for op in ops]
    assert plotted(tmp_path, *files) == 0
    assert "nothing to draw: none of the results has a bandwidth" in capsys.readouterr().out
    table, picture = tmp_path / "measured" / "sm_99.json", tmp_path / "bandwidth-example-gpu.png"
    before = table.read_text()
    timed = [one | {"gb_per_s": 1.0, "copy_gb_per_s": 2.0} for one in norms(1.0, 1.0, switch="", op="alone")]
    alone = write(tmp_path / "alone.json", timed)
    with pytest.raises(SystemExit):
        plotted(tmp_path, files[0], alone)
    assert "nothing written: these files do not measure 1 of its cells, 'rope compiled" in capsys.readouterr().err
    assert not picture.exists()
    without_a_copy_line = [{key: one[key] for key in one if key != "copy_gb_per_s"} for one in timed]
    undecided = write(tmp_path / "b.json", norms(1.0, 1.0, switch="rope", op="block rope", queued=False))
    with pytest.raises(KeyError):
        plotted(tmp_path, files[0], undecided, write(tmp_path / "c.json", without_a_copy_line))
    assert table.read_text() == before
    assert plotted(tmp_path, files[0], undecided, alone) == 0
    assert table.read_text() != before and picture.exists()
    table.write_text(before[: len(before) // 2])
    with pytest.raises(SystemExit):
        plotted(tmp_path, *files)
    assert "not a table: " in capsys.readouterr().err


def test_the_committed_results_make_the_committed_tables(tmp_path: Path) -> None:
    results = Path(plot.__file__).parent / "results"
    assert plotted(tmp_path, *sorted(results.glob("kernels-*.json"))) == 0
    made, committed = (
        {path.name: path.read_text() for path in folder.glob("*.json")}
        for folder in (tmp_path / "measured", plot.MEASURED)
    )
    assert made == committed and "sm_90.json" in made


def test_another_device_of_an_architecture_has_a_table_of_its_own(tmp_path: Path) -> None:
    first = write(tmp_path / "b.json", norms(30.0, -55.0))
    second = write(tmp_path / "a.json", norms(30.0, 55.0), device="Another GPU", versions={"torch": "3"})
    assert plotted(tmp_path, first) == 0
    table = (tmp_path / "measured" / "sm_99.json").read_text()
    assert plotted(tmp_path, second, first) == plotted(tmp_path, second) == 0
    assert (tmp_path / "measured" / "sm_99.json").read_text() == table
    own = json.loads((tmp_path / "measured" / "sm_99-another-gpu.json").read_text())
    assert own["device"] == "Another GPU" and own["cells"][0]["triton_us"] == json.loads(table)["cells"][0]["triton_us"]
    assert own["cells"][0]["reference_us"] != json.loads(table)["cells"][0]["reference_us"]


def test_a_driver_decides_nothing(tmp_path: Path) -> None:
    drivers = ("580.126", "580.159", "580.126")
    versions = [{"torch": "2", "driver": driver} for driver in drivers]
    files = [write(tmp_path / f"{n}.json", norms(1.0, 1.0), versions=v) for n, v in enumerate(versions)]
    assert plot.load(files).machine["versions"] == {"torch": "2", "driver": "580.126, 580.159"}


def test_a_copy_line_that_is_not_the_limits_is_told(tmp_path: Path) -> None:
    (tmp_path / "limits-example-gpu.json").write_text(json.dumps({"rates": {"bandwidth": 3e12}}))
    infos = [[info("ours", "step", 1.0, {}, copy_gb_per_s=copy)] for copy in (2900.0, 2585.0)]
    files = [write(tmp_path / f"{i}.json", one) for i, one in enumerate(infos)]
    (line,) = plot.other_copies(files)
    assert line == "warning: 1.json: its copy line is 2,585 GB/s, the limits' 3,000; measure it again"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("{}", "no benchmarks in it"),
        ("/", "not JSON: [Errno 21] Is a directory"),
        (json.dumps({"machine_info": MACHINE, "benchmarks": [{"extra_info": {}}]}), "no 'context' in it"),
    ],
)
def test_a_file_of_something_else_is_refused_in_a_sentence(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    if content == "/":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        plotted(tmp_path, path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"titan_fast: {words}") and str(path) in line


def test_readmes_kernels_are_in_the_committed_files() -> None:
    """Each median to a microsecond and each share of the copy to a percent, of one of the runs."""
    measured: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for path in RESULTS.glob("kernels-nvidia-h100-80gb-hbm3-*.json"):
        for benchmark in json.loads(path.read_text())["benchmarks"]:
            found = benchmark["extra_info"]
            if (found.get("context"), found.get("tokens"), found.get("tensor_parallel")) == ("alone", 8192, 1):
                key = found["op"], found["model"], found["provider"], found["direction"]
                measured.setdefault(key, []).append((found["median_us"], found["percent_of_copy"]))
    lines = README.read_text().split("| | 8B: compiled | Liger | quack | ours |")[1].split("\n\n")[0].splitlines()[2:]
    operators = ("rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy")
    compared = 0
    for operator, line in zip(operators, lines, strict=True):
        columns = [(model, who) for model in ("llama3_8b", "llama3_70b") for who in PROVIDERS]
        for (model, provider), cell in zip(columns, line.split("|")[2:-1], strict=True):
            times, _, shares = cell.strip().rstrip(")").partition(" (")
            ways = ("step",) if operator == "cross_entropy" else ("forward", "backward")
            for number, way in enumerate(ways if times else ()):
                told = float(times.split(",")[number]), float(shares.split(",")[number]) if shares else None
                runs = measured[operator, model, provider, way]
                assert any(
                    abs(median - told[0]) <= 1 and (told[1] is None or abs(share - told[1]) <= 1)
                    for median, share in runs
                ), (operator, model, provider, way, told, runs)
                compared += 1
    assert compared == 60


def test_writing_results_does_not_change_the_commit_that_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    result, code = tmp_path / "benchmarks" / "results" / "a.json", tmp_path / "benchmarks" / "provenance.py"
    result.parent.mkdir(parents=True)
    result.write_text("old")
    code.write_text("old")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setattr(provenance, "__file__", str(code))
    clean = provenance.commit()
    result.write_text("new")
    assert provenance.commit() == clean
    code.write_text("new")
    assert provenance.commit() == f"{clean}+"
