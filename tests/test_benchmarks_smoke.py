"""The kernel suite from end to end without a GPU, and that it catches wrong kernels and decides as it says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import titan_kernels
import torch
from titan_kernels import reference
from titan_kernels.choice import Table
from torch import Tensor

from benchmarks import plot
from benchmarks.measurement import measure_case
from benchmarks.shapes import OPERATORS, Case, cases

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_suite_then_plot(tmp_path: Path) -> None:
    results, picture, measured = tmp_path / "kernels.json", tmp_path / "bandwidth.png", tmp_path / "measured"
    options = ("--benchmark-only", "--smoke", f"--benchmark-json={results}", "-q", "-p", "no:cacheprovider")
    suite = run("-m", "pytest", "benchmarks", *options)
    assert suite.returncode == 0, suite.stdout[-3000:]
    infos = [benchmark["extra_info"] for benchmark in json.loads(results.read_text())["benchmarks"]]
    assert {info["op"] for info in infos} >= set(OPERATORS)
    assert {"eager", "compiled", "ours", "ours_compiled", "torch"} <= {info["provider"] for info in infos}
    assert all(info["median_us"] > 0 for info in infos)

    drawn = run("-m", "benchmarks.plot", str(results), "--picture", str(picture), "--measured", str(measured))
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = Table.from_json((measured / "cpu.json").read_text())
    assert {cell.op for cell in table.cells} == {"rms_norm", "rope", "swiglu", "cross_entropy", "reemit"}
    refused = run("-m", "benchmarks.plot", str(results))
    assert "must not decide anything" in refused.stderr


def test_without_a_gpu_and_without_smoke_it_skips() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run("-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-k", "swiglu and llama3_8b and alone")
    assert "measures a GPU, and torch sees none here" in result.stdout
    assert " passed" not in result.stdout


def swiglu_case() -> Case:
    return next(case for case in cases(smoke=True) if case.op == "swiglu" and case.context == "alone")


def wrong_result(gate: Tensor, up: Tensor) -> Tensor:
    """One row of it."""
    product = reference.swiglu(gate, up)
    return torch.cat((product[:1] * 1.1, product[1:]))


def wrong_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up * 1.05 - up.detach() * 0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the wrong kernels are stood in for on the CPU")
@pytest.mark.parametrize(
    ("operator", "wrong"), [(wrong_result, True), (wrong_gradient, True), (reference.swiglu, False)]
)
def test_a_wrong_provider_is_not_timed(operator: Any, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titan_kernels, "swiglu", operator)
    found = measure_case(swiglu_case(), {"ours", "eager"}, CPU, "aot_eager", passes=1, calls=1)
    assert found["ours"].wrong == wrong
    assert bool(found["ours"].samples) != wrong
    assert found["eager"].samples.keys() == {"forward", "backward"}


def info(provider: str, context: str, direction: str, median: float, op: str = "rms_norm") -> dict[str, Any]:
    return {
        "op": op,
        "model": "llama3_8b",
        "tensor_parallel": 1,
        "tokens": 8192,
        "context": context,
        "direction": direction,
        "provider": provider,
        "switch": ["rms_norm", {"rows": 8192, "width": 4096}],
        "median_us": median,
        "p10_us": median - 1,
        "p90_us": median + 3,
    }


def write(path: Path, infos: list[dict[str, Any]], device: str = "Example GPU") -> Path:
    machine = {"device": device, "architecture": "sm_99", "versions": {}, "commit": "0", "smoke": False}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": [{"extra_info": i} for i in infos]}))
    return path


def test_parts_merge_into_one_decision(tmp_path: Path) -> None:
    """Forward and backward of both norms, from two files, against the compiled reference in a block."""
    first = write(tmp_path / "a.json", [info("compiled", "block", d, 100.0) for d in ("forward", "backward")])
    ours = [info("ours_compiled", "block", "forward", 90.0), info("ours_compiled", "block", "backward", 50.0)]
    more = [info("ours_compiled", "block", "forward", 10.0, "add_rms_norm"), info("ours", "block", "forward", 1.0)]
    rest = [info("compiled", "block", "forward", 20.0, "add_rms_norm"), info("compiled", "alone", "forward", 1.0)]
    second = write(tmp_path / "b.json", ours + more + rest)
    (cell,) = plot.decision_table(plot.load([first, second])).cells
    assert (cell.op, cell.compiled, cell.shape) == ("rms_norm", True, {"rows": 8192, "width": 4096})
    assert cell.triton_us == 150.0
    assert cell.reference_us == 220.0
    assert cell.spread_us == 6.0
    assert cell.triton_wins


def test_results_of_two_devices_do_not_merge(tmp_path: Path) -> None:
    infos = [info("ours", "alone", "forward", 1.0)]
    files = [write(tmp_path / "a.json", infos), write(tmp_path / "b.json", infos, "Another GPU")]
    with pytest.raises(ValueError, match="of Another GPU, the files before it of Example GPU"):
        plot.load(files)
