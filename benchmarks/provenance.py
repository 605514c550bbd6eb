"""What a result is meaningless without: device, versions and commit."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from titan_fast import versions


def environment(smoke: bool) -> dict[str, Any]:
    """This process's environment; smoke: that of a rehearsal on the CPU."""
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
    """The checkout's commit, with "+" if tracked files differ from it. Results do not count, since each part of a suite
    writes its own. BENCHMARK_COMMIT in the environment names the commit where code was copied without its history."""
    if told := os.environ.get("BENCHMARK_COMMIT"):
        return told
    results = (":(exclude,top)benchmarks/results", ":(exclude,top)kernels/titan_kernels/measured")
    return versions.commit(Path(__file__), (":(top)", *results)) or "unknown"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
