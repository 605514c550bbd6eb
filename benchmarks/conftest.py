"""What the kernel suite shares: the rehearsal without a GPU, one measurement per case, results as compact JSON."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke",
        action="store_true",
        help="tiny shapes on the CPU through Triton's interpreter: shows that the suite runs, measures nothing",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--smoke"):
        # Read when Triton's kernels are defined, which no benchmark module has done yet.
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--smoke") or torch.cuda.is_available():
        return
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="measures a GPU, and torch sees none here; --smoke rehearses on the CPU")
    for item in items:
        if here in item.path.parents:
            item.add_marker(skip)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(environment(bool(config.getoption("--smoke"))))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Quantiles are in extra_info; single samples would be most of the file."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def environment(smoke: bool) -> dict[str, Any]:
    """Device, versions and commit: what a result means nothing without."""
    import triton

    cuda = torch.cuda.is_available() and not smoke
    capability = torch.cuda.get_device_capability() if cuda else None
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "architecture": f"sm_{capability[0]}{capability[1]}" if capability else "cpu",
        "smoke": smoke,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda or "none",
            "driver": _driver() if cuda else "none",
        },
    }


def commit() -> str:
    """The checkout's commit, with "+" where tracked files differ from it. Results are no part of what they name: the
    parts of one suite belong together although each writes its own. BENCHMARK_COMMIT in the environment says it where
    the code was copied without its history."""
    if told := os.environ.get("BENCHMARK_COMMIT"):
        return told
    results = (":(exclude,top)benchmarks/results", ":(exclude,top)kernels/titan_kernels/measured")
    try:
        name = _git("describe", "--always", "--abbrev=12", "--exclude=*")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *results)
    except OSError:  # no git here
        return "unknown"
    return f"{name}{'+' if changed else ''}" if name else "unknown"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
