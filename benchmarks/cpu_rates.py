"""Shared by the benchmarks that run on a CPU: the processor's name, rates over rounds, and output of results."""

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def spread(values: Sequence[float], digits: int = 0) -> dict[str, float]:
    """Median, 10th and 90th percentile, to so many decimal digits."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    found = {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}
    return {name: round(value, digits or None) for name, value in found.items()}


def write(result: dict[str, Any], path: Path | None) -> None:
    """Prints the result as JSON, and writes it to `path` if there is one."""
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if path is not None:
        path.write_text(text)
