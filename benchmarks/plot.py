"""From benchmark results to a picture, tables, and the table that `auto` follows.

    python -m benchmarks.plot benchmarks/results/kernels-*.json [--picture benchmarks/results/bandwidth.png]

Merges the results of parts of the suite (a later file replaces equal cells), draws achieved bandwidth against the
device's measured copy bandwidth, prints what each provider reached, and writes the table of this architecture into
kernels/titan_kernels/measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from titan_kernels.choice import Cell, Table

MEASURED = Path(__file__).parents[1] / "kernels" / "titan_kernels" / "measured"
PROVIDER_ORDER = ("eager", "compiled", "ours", "ours_compiled", "torch", "liger", "quack")


@dataclass(frozen=True)
class Results:
    """All cells of one device: `extra_info` of the benchmarks, by (case, direction, provider)."""

    machine: dict[str, Any]
    cells: dict[tuple[str, str, str], dict[str, Any]]

    def cases(self) -> list[tuple[str, str]]:
        """(case, direction), as they were measured."""
        return list(dict.fromkeys((case, direction) for case, direction, _ in self.cells))

    def median_us(self, case: str, direction: str, provider: str) -> float | None:
        cell = self.cells.get((case, direction, provider))
        return cell["median_us"] if cell else None


def load(paths: Sequence[Path]) -> Results:
    """Merges result files.

    Raises:
        ValueError: no file, files of different devices, or a file without measurements.
    """
    machine: dict[str, Any] = {}
    cells: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in paths:
        content = json.loads(path.read_text())
        if not content.get("benchmarks"):
            raise ValueError(f"{path} holds no benchmarks")
        found = content["machine_info"]
        if machine and found["device"] != machine["device"]:
            raise ValueError(f"{path} is of {found['device']}, the files before it of {machine['device']}")
        machine = found
        for benchmark in content["benchmarks"]:
            info = benchmark["extra_info"]
            cells[case_name(info), info["direction"], info["provider"]] = info
    if not cells:
        raise ValueError("no result files were given")
    return Results(machine, cells)


def case_name(info: dict[str, Any]) -> str:
    if info["context"] == "host":
        return "host"
    return f"{info['op']}, {info['model']} TP{info['tensor_parallel']}, {info['tokens']} tokens, {info['context']}"


def decision_table(results: Results) -> Table:
    """The cells by which `auto` decides: forward and backward together, ours against the reference.

    A switch that two operators share (rms_norm, add_rms_norm) is decided by the sum of both.
    """
    sums: dict[tuple[str, bool, tuple[tuple[str, int], ...]], list[float]] = {}
    for (case, direction, provider), info in results.cells.items():
        pair = _contest(info)
        if pair is None or provider != pair[0]:
            continue
        reference = results.cells.get((case, direction, pair[1]))
        if reference is None:
            continue
        op, sizes = info["switch"]
        spread = max(x["p90_us"] - x["p10_us"] for x in (info, reference)) / 2
        total = sums.setdefault((op, _is_compiled(info), tuple(sizes.items())), [0.0, 0.0, 0.0])
        for index, microseconds in enumerate((info["median_us"], reference["median_us"], spread)):
            total[index] += microseconds
    cells = [
        Cell(op, compiled, dict(sizes), *(round(x, 2) for x in total)) for (op, compiled, sizes), total in sums.items()
    ]
    machine = results.machine
    return Table(machine["architecture"], machine["device"], machine["versions"], machine["commit"], tuple(cells))


def _contest(info: dict[str, Any]) -> tuple[str, str] | None:
    """(ours, reference) of this cell's case. In a block the compiled reference is the one to beat; alone, and for the
    loss, which no block contains, ours runs eagerly."""
    if info.get("switch") is None:
        return None
    if info["op"] == "cross_entropy":
        return ("ours", "compiled") if info["context"] == "block" else ("ours", "eager")
    if info["context"] == "block":
        return (
            ("ours", "eager")
            if info["op"] == "reemit" and info["provider"] == "ours"
            else ("ours_compiled", "compiled")
        )
    return "ours", "eager"


def _is_compiled(info: dict[str, Any]) -> bool:
    return info["context"] == "block" and (info["op"] != "reemit" or info["provider"] != "ours")


def markdown(results: Results) -> str:
    """Microseconds of every provider, and the bandwidth of the fastest of ours where bytes are known."""
    header = ["case", "direction", *PROVIDER_ORDER, "ours, % of copy"]
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    title = f"{machine['device']}, {versions}, commit {machine['commit']}; microseconds, median"
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for case, direction in results.cases():
        if case == "host":
            continue
        times = [results.median_us(case, direction, provider) for provider in PROVIDER_ORDER]
        ours = results.cells.get((case, direction, "ours"), {})
        percent = f"{ours['percent_of_copy']:.0f}" if "percent_of_copy" in ours else ""
        lines.append("| " + " | ".join([case, direction, *(f"{t:.1f}" if t else "" for t in times), percent]) + " |")
    host = [
        f"| {info['op']} | {info['median_us']:.1f} |" for info in results.cells.values() if info["context"] == "host"
    ]
    if host:
        lines += ["", "Host time of one eager call:", "", "| call | us |", "|---|---|", *host]
    return "\n".join((title, "", *lines))


def decisions(table: Table) -> str:
    """What `auto` will do, one line a cell."""
    lines = []
    for cell in table.cells:
        sizes = " ".join(f"{name}={size}" for name, size in cell.shape.items())
        verdict = "triton" if cell.triton_wins else "reference"
        where = "compiled" if cell.compiled else "eager"
        times = f"{cell.triton_us:.1f} us against {cell.reference_us:.1f} +- {cell.spread_us:.1f}"
        lines.append(f"{cell.op:14} {where:9} {sizes:60} {times:40} {cell.speedup:.2f}x  {verdict}")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Achieved bandwidth of every provider, one panel for each operator and direction, with the copy line."""
    alone = {key: info for key, info in results.cells.items() if "gb_per_s" in info}
    panels = list(dict.fromkeys((info["op"], info["direction"]) for info in alone.values()))
    if not panels:
        raise ValueError("none of the results has a bandwidth: nothing to draw")
    figure = Figure(figsize=(14, 3.2 * len(panels)), layout="constrained")
    for axes, (op, direction) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        chosen = [info for info in alone.values() if (info["op"], info["direction"]) == (op, direction)]
        shapes = list(dict.fromkeys(_shape_label(info) for info in chosen))
        names = [name for name in PROVIDER_ORDER if any(info["provider"] == name for info in chosen)]
        for position, name in enumerate(names):
            bars = {_shape_label(info): info["gb_per_s"] for info in chosen if info["provider"] == name}
            places = [shapes.index(shape) + (position - len(names) / 2 + 0.5) * 0.8 / len(names) for shape in bars]
            axes.bar(places, list(bars.values()), 0.8 / len(names), label=name)
        axes.axhline(max(info["copy_gb_per_s"] for info in chosen), color="black", linestyle="--", label="copy")
        axes.set_xticks(range(len(shapes)), shapes, fontsize=8)
        axes.set_ylabel("GB/s")
        axes.set_title(f"{op}, {direction}")
        axes.legend(fontsize=7, ncols=len(names) + 1)
    machine = results.machine
    figure.suptitle(f"{machine['device']}, torch {machine['versions']['torch']}, commit {machine['commit']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _shape_label(info: dict[str, Any]) -> str:
    return f"{info['model']}\nTP{info['tensor_parallel']}, {info['tokens']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of pytest-benchmark")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent / "results" / "bandwidth.png")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="the folder of the tables that auto follows")
    options = parser.parse_args(arguments)
    results = load(options.results)
    if results.machine["smoke"] and options.measured.resolve() == MEASURED.resolve():
        raise ValueError(
            "these results are a rehearsal on the CPU and must not decide anything; give another --measured"
        )
    table = decision_table(results)
    options.measured.mkdir(parents=True, exist_ok=True)
    written = options.measured / f"{table.architecture}.json"
    written.write_text(table.to_json())
    draw(results, options.picture)
    sys.stdout.write(f"{markdown(results)}\n\n{decisions(table)}\n\nwrote {written} and {options.picture}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
