"""What `-m gpu` selects on a machine with a GPU, tested in a process that believes it has one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]


def with_a_gpu(folder: str, *selections: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The names of the tests that pytest collects for each selection by mark, each followed by a line with its exit
    status, if torch.cuda.is_available() is true."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    code = (
        "import sys, torch, pytest\n"
        "torch.cuda.is_available = lambda: True\n"
        "options = ['--collect-only', '-q', '-p', 'no:cacheprovider', sys.argv[1]]\n"
        "for marks in sys.argv[2:]: print('status', int(pytest.main([*options, '-m', marks])))"
    )
    command = [sys.executable, "-c", code, folder, *selections]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def selected() -> dict[str, set[str]]:
    selections = ("gpu", "gpu and not large")
    output = with_a_gpu("tests/kernels", *selections).stdout
    assert output.count("status 0") == len(selections), output
    listings = output.split("status 0")
    return {
        marks: {line for line in listing.splitlines() if "::" in line}
        for marks, listing in zip(selections, listings, strict=False)
    }


def test_gpu_tests_are_the_same_tests_on_cuda(selected: dict[str, set[str]]) -> None:
    found = selected["gpu"]
    for name in (
        "test_rms_norm.py::test_add_rms_norm[64-4096-",
        "test_rms_norm.py::test_deterministic",
        "test_rope.py::test_rope[",
        "test_swiglu.py::test_swiglu[",
        "test_cross_entropy.py::test_with_grad_in_place[",
        "test_cross_entropy.py::test_deterministic",
        "test_reemit.py::test_norm_linear[",
        "test_reemit.py::test_swiglu_linear[",
        "test_operators.py::test_opcheck[",
        "test_operators.py::test_compiled_by_inductor",
        "test_offsets.py::test_strides_beyond_32_bits[",
        "test_offsets.py::TestWholeTensors::test_norms[",
        "test_real_sizes.py::test_deterministic[",
    ):
        assert any(name in test for test in found), name
    assert not any("test_choice.py" in test or "test_inspect.py" in test for test in found)


def test_what_the_sanitizer_runs_is_small(selected: dict[str, set[str]]) -> None:
    found = selected["gpu and not large"]
    assert any("test_rms_norm.py::test_rms_norm[" in test for test in found)
    assert {test.partition("::")[2] for test in found if "test_real_sizes.py" in test or "test_offsets.py" in test} == {
        "test_a_new_row_count_compiles_nothing",
        "test_what_the_units_save",
    }


def test_a_gpu_is_not_tested_with_the_interpreter() -> None:
    result = with_a_gpu("tests/kernels/test_swiglu.py", "gpu", TRITON_INTERPRET="1")
    assert f"status {int(pytest.ExitCode.USAGE_ERROR)}" in result.stdout
    assert "TRITON_INTERPRET is set" in result.stdout + result.stderr
