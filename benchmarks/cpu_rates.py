"""What the benchmarks that run on a CPU share: the machine's name, and rates over rounds."""

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def spread(rates: Sequence[float]) -> dict[str, int]:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else [rates[0]] * 9
    return {"median": round(statistics.median(rates)), "p10": round(deciles[0]), "p90": round(deciles[-1])}
