"""What the benchmarks that run on a CPU share: the machine's name, rates over rounds, and where results go."""

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


def spread(rates: Sequence[float]) -> dict[str, int]:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else [rates[0]] * 9
    return {"median": round(statistics.median(rates)), "p10": round(deciles[0]), "p90": round(deciles[-1])}


def write(result: dict[str, Any], path: Path | None) -> None:
    """Prints the result as JSON, and writes it to `path` if there is one."""
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if path is not None:
        path.write_text(text)
