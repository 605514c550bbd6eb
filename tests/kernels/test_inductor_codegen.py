"""Inductor's code for a Llama block on a Hopper GPU moves no more than when it was recorded.

Catches a fusion that is lost by a change of the model, of an operator or of torch. Needs no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECORD: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "inductor_bytes.json").read_text())
VARIANTS = (
    "reference",
    "reference, carried",
    "reference, budget 0.7",
    "rope, carried",
    "all, carried",
    "emit, carried",
)

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.__version__.split("+")[0] != RECORD["torch"].split("+")[0],
        reason=f"recorded with torch {RECORD['torch']}, whose private functions it replaces",
    ),
]

Blocks = dict[tuple[str, str], dict[str, Any]]


def by_name(content: dict[str, Any]) -> Blocks:
    return {(block["model"], block["variant"]): block for block in content["blocks"]}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    """In a separate process, which pretends to have a GPU and cannot undo that."""
    output = tmp_path_factory.mktemp("inductor") / "bytes.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-m", "benchmarks.inductor_bytes", "--output", str(output), "--variants", *VARIANTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return by_name(json.loads(output.read_text()))


def moved(block: dict[str, Any]) -> float:
    return block["forward"]["megabytes"] + block["backward"]["megabytes"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["llama3_8b", "llama3_70b"])
def test_nothing_grew(generated: Blocks, model: str) -> None:
    recorded = by_name(RECORD)
    for variant in VARIANTS:
        now, before = generated[model, variant], recorded[model, variant]
        for direction in ("forward", "backward"):
            assert now[direction]["kernels"] <= before[direction]["kernels"], (variant, direction)
            assert now[direction]["folded_adds"] <= before[direction]["folded_adds"], (variant, direction)
            assert now[direction]["megabytes"] <= 1.001 * before[direction]["megabytes"], (variant, direction)
            assert now[direction]["matmuls"] == before[direction]["matmuls"], (variant, direction)
        assert now["saved_megabytes"] <= 1.001 * before["saved_megabytes"], variant


@pytest.mark.timeout(600)
def test_what_is_counted_is_what_must_move(generated: Blocks) -> None:
    """By hand, for Llama 3 8B's sizes: gate, up and their product forward; five such tensors backward."""
    one = 8192 * 14336 * 2 / 1e6
    reference = generated["llama3_8b", "reference, carried"]
    assert max(size for _, size in reference["forward"]["parts"]) == pytest.approx(3 * one, rel=1e-3)
    assert max(size for _, size in reference["backward"]["parts"]) == pytest.approx(5 * one, rel=1e-3)
    # The product and both normalised activations, which a re-emitting backward does not keep.
    stream = 8192 * 4096 * 2 / 1e6
    kept = generated["llama3_8b", "rope, carried"]["saved_megabytes"]
    kept -= generated["llama3_8b", "emit, carried"]["saved_megabytes"]
    assert kept == pytest.approx(one + 2 * stream, rel=1e-3)


@pytest.mark.timeout(600)
def test_where_ours_move_less(generated: Blocks) -> None:
    """The claims in README and notes: always fewer kernels, and fewer bytes where Inductor splits the norm's backward;
    carrying the residual helps the reference too."""
    for model in ("llama3_8b", "llama3_70b"):
        plain, carried = generated[model, "reference"], generated[model, "reference, carried"]
        ours = generated[model, "all, carried"]
        assert moved(carried) < moved(plain)
        for direction in ("forward", "backward"):
            assert ours[direction]["kernels"] < carried[direction]["kernels"]
    assert moved(generated["llama3_70b", "all, carried"]) < moved(generated["llama3_70b", "rope, carried"])
