"""Tables and a picture of the end-to-end results.

    python -m benchmarks.train_table [--markdown] [--results FOLDER] [--picture benchmarks/results/train.png]

Everything is read from the JSON that bench_train wrote on real devices; rehearsals are left out unless --rehearsal asks
for them. Where no device has been, the tables say "not measured".
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.limits import Limits, least_step, limits_from, slug
from benchmarks.workloads import RANK0, SLICE_LAYERS, cells, config_of, shape_of

NOT_MEASURED = "not measured"
Row = dict[str, Any]


@dataclass
class Device:
    """All rows of one device, by (cell, variant)."""

    name: str
    environment: dict[str, Any]
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def found(self, **wanted: object) -> list[Row]:
        """Rows whose fields are these."""
        return [row for row in self.rows.values() if all(row.get(key) == value for key, value in wanted.items())]


def load(folder: Path, rehearsal: bool) -> list[Device]:
    """Every device's rows, the parts merged; of rehearsals or of real devices."""
    devices: dict[str, Device] = {}
    for path in sorted(folder.glob("train-*.json")):
        content = json.loads(path.read_text())
        environment = content["environment"]
        if bool(environment.get("smoke")) != rehearsal or "rows" not in content:
            continue
        device = devices.setdefault(environment["device"], Device(environment["device"], environment))
        device.rows |= {(row["cell"], row["variant"]): row for row in content["rows"]}
    for device in devices.values():
        path = folder / f"limits-{slug(device.name)}.json"
        if path.exists():
            _add_fractions(device, limits_from(json.loads(path.read_text())))
    return list(devices.values())


def _add_fractions(device: Device, limits: Limits) -> None:
    """For rows that were measured before the limits were."""
    if device.environment.get("smoke"):
        return
    by_name = {(cell.name, cell.part): cell for cell in cells(tuple({row["part"] for row in device.rows.values()}))}
    for row in device.rows.values():
        cell = by_name.get((row["cell"], row["part"]))
        if cell is None or "step_seconds" not in row or "fraction_of_limit" in row:
            continue
        options = next((variant.options for variant in cell.variants if variant.name == row["variant"]), {})
        parts = least_step(
            limits, config_of(cell.workload, options, False), shape_of(cell.workload, False), row["world"]
        )
        row["least_step"], row["fraction_of_limit"] = parts, parts["total"] / row["step_seconds"]["median"]


# Tables


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(value: float | None, words: str) -> str:
    return NOT_MEASURED if value is None else format(value, words)


def _figures(row: Row | None) -> list[str]:
    """tokens/s, its spread, MFU, fraction of the limit, memory."""
    if row is None:
        return [NOT_MEASURED] * 5
    if "error" in row:
        return [row["error"].replace("|", "/"), "", "", "", ""]
    if "step_seconds" not in row:
        return [NOT_MEASURED] * 5
    seconds = row["step_seconds"]
    tokens = row["tokens_per_step"]
    return [
        f"{row['tokens_per_second']:,.0f}",
        f"{tokens / seconds['p90']:,.0f} to {tokens / seconds['p10']:,.0f}",
        _number(row.get("mfu", {}).get("titan"), ".1%"),
        _number(row.get("fraction_of_limit"), ".1%"),
        f"{row['peak_bytes'] / 2**30:.1f}",
    ]


_HEAD = ("tokens/s", "p90 to p10 step", "MFU (titan)", "of the limit", "peak GiB")


def models_table(device: Device | None) -> str:
    """Every workload of the table with each of its variants."""
    lines = []
    wanted = [cell for cell in cells(("single", "rank0", "rank0-70b", "slices")) if not cell.peer]
    for cell in wanted:
        for variant in cell.variants:
            row = device.rows.get((cell.name, variant.name)) if device else None
            what = "rank 0 of 64, no communication" if cell.workload.world > 1 else "one GPU"
            lines.append([cell.workload.name, what, variant.name, *_figures(row)])
    return _table(("model", "as", "variant", *_HEAD), lines)


def peers_table(device: Device | None) -> str:
    """Each comparison with ours, as a ratio of tokens/s; drift is what ours moved between its first and last run."""
    lines = []
    parts = list(dict.fromkeys(cell.part for cell in cells(_peer_parts())))
    for part in parts:
        own = cells((part,))
        ours = [device.rows.get((own[0].name, own[0].variants[0].name)), _last(device, own)] if device else [None, None]
        speeds = [row["tokens_per_second"] for row in ours if row and "tokens_per_second" in row]
        mean = statistics.mean(speeds) if speeds else None
        for cell in own[:-1]:
            row = device.rows.get((cell.name, cell.variants[0].name)) if device else None
            theirs = row.get("tokens_per_second") if row else None
            ratio = mean / theirs if mean and theirs and cell.peer else None
            said = _number(ratio, ".2f") if cell.peer else ""
            lines.append([cell.workload.name, cell.peer or f"titan_fast, {cell.label}", *_figures(row), said])
        drift = speeds[1] / speeds[0] - 1 if len(speeds) == 2 else None
        lines.append([own[0].workload.name, "drift of ours", _number(drift, "+.1%"), "", "", "", "", ""])
    return _table(("model", "who", *_HEAD, "ours / theirs"), lines)


def _peer_parts() -> tuple[str, ...]:
    return ("peers", "peers-batch-4", "peers-3b", "peers-8b")


def _last(device: Device, own: Sequence[Any]) -> Row | None:
    return device.rows.get((own[-1].name, own[-1].variants[0].name))


def levers_table(device: Device | None) -> str:
    """What each change by itself is worth, against the first variant of its process."""
    parts = ("levers", "levers-memory", "levers-optimizer", "levers-graph", "levers-autotune")
    lines = []
    for cell in cells(parts):
        base = device.rows.get((cell.name, cell.variants[0].name)) if device else None
        for variant in cell.variants:
            row = device.rows.get((cell.name, variant.name)) if device else None
            delta = None
            if base and row and "tokens_per_second" in base and "tokens_per_second" in row:
                delta = row["tokens_per_second"] / base["tokens_per_second"] - 1
            lines.append([cell.workload.name, f"{cell.label}: {variant.name}", _number(delta, "+.1%"), *_figures(row)])
    return _table(("model", "change", "tokens/s", *_HEAD), lines)


def parity_table(device: Device | None) -> str:
    """How far losses come to lie from those of plain eager PyTorch."""
    (cell,) = cells(("parity",))
    lines = []
    for variant in cell.variants:
        row = device.rows.get((cell.name, variant.name)) if device else None
        parity = row.get("parity") if row else None
        error = row.get("error", "") if row else ""
        figures = [_number(parity[key] if parity else None, ".1e") for key in ("largest", "last tenth")]
        lines.append([variant.name, *([error, ""] if error else figures)])
    return _table(("variant", "largest relative difference of a step's loss", "of the mean of the last tenth"), lines)


@dataclass(frozen=True)
class Slope:
    """Seconds of a step as base + per_layer x layers, by least squares over the slices that ran."""

    base: float
    per_layer: float

    def at(self, layers: int) -> float:
        return self.base + self.per_layer * layers


def slope(points: dict[int, float]) -> Slope | None:
    """{layers: seconds} -> the line through them; None for fewer than two points."""
    if len(points) < 2:
        return None
    fit = statistics.linear_regression(list(points), list(points.values()))
    return Slope(fit.intercept, fit.slope)


def slices_table(device: Device | None) -> str:
    """The full depth predicted from the slices, beside the full depth measured."""
    lines = []
    for name in ("8b", "70b"):
        full = RANK0[name]
        variant = "compiled, auto"
        points: dict[int, float] = {}
        for row in device.found(flavor=full.flavor, kind="slice", variant=variant) if device else ():
            if row["layers"] in SLICE_LAYERS and "step_seconds" in row:
                points.setdefault(row["layers"], row["step_seconds"]["median"])
        line, depth = slope(points), shape_of(full, False).n_layers
        whole = device.rows.get((full.name, variant)) if device else None
        measured = whole["step_seconds"]["median"] if whole and "step_seconds" in whole else None
        predicted = line.at(depth) if line else None
        lines.append([
            full.name,
            ", ".join(map(str, points)) or NOT_MEASURED,
            _number(line.per_layer * 1e3 if line else None, ".2f"),
            _number(predicted * 1e3 if predicted else None, ".1f"),
            _number(measured * 1e3 if measured else None, ".1f"),
            _number(predicted / measured - 1 if predicted and measured else None, "+.1%"),
        ])  # fmt: skip
    head = ("model", "slices (layers)", "ms per layer", "predicted step (ms)", "measured step (ms)", "difference")
    return _table(head, lines)


def breakdown_table(device: Device | None) -> str:
    """Where the time of a step goes, and the least that each kind could take."""
    lines = []
    for row in device.rows.values() if device else ():
        seconds = row.get("profile", {}).get("seconds", {})
        if seconds:
            said = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in sorted(seconds.items(), key=lambda item: -item[1]))
            least = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in row.get("least_step", {}).items())
            lines.append([f"{row['cell']}, {row['variant']}", said, least or NOT_MEASURED])
    return _table(("step", "measured, ms", "least, ms"), lines or [[NOT_MEASURED, "", ""]])


def markdown(device: Device | None) -> str:
    """All tables of a device; with None, what there will be."""
    head = "No device has been measured." if device is None else _provenance(device)
    sections = {
        "Models": models_table(device),
        "Peers, on the same device": peers_table(device),
        "Slices against full depth": slices_table(device),
        "One change at a time": levers_table(device),
        "Losses over 200 steps": parity_table(device),
        "Where a step's time goes": breakdown_table(device),
    }
    return "\n\n".join([head, *(f"#### {title}\n\n{table}" for title, table in sections.items())])


def _provenance(device: Device) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in device.environment.get("versions", {}).items())
    states = [state for row in device.rows.values() for state in row.get("gpu", []) if state]
    clocks = sorted({state["clocks.sm"] for state in states})
    power = sorted({state["power.limit"] for state in states})
    commits = ", ".join(sorted({str(row.get("commit")) for row in device.rows.values()}))
    return (
        f"{device.name}; {versions}; commit {commits}; power limit {', '.join(power) or 'unknown'}; SM clock "
        f"{' to '.join([clocks[0], clocks[-1]]) if clocks else 'unknown'}. Random tokens, whole steps, medians."
    )


def draw(device: Device, path: Path) -> None:
    """tokens/s of each workload's fastest variant and of the peers, in parts of the least step's tokens/s."""
    rows = [row for row in device.rows.values() if "fraction_of_limit" in row and not row["part"].startswith("levers")]
    rows.sort(key=lambda row: (row["workload"], row["peer"], row["variant"]))
    figure = Figure(figsize=(9, 1 + 0.3 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['workload']}: {row['peer'] or 'titan_fast'} {row['label']} {row['variant']}" for row in rows]
    axes.barh(names, [100 * row["fraction_of_limit"] for row in rows], color=[_color(row) for row in rows])
    axes.set_xlabel(f"% of the least step time of {device.name}, as its own copies, products and attention bound it")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _color(row: Row) -> str:
    if row["peer"]:
        return "tab:gray"
    return "tab:blue" if row["variant"].startswith("compiled") else "tab:orange"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--markdown", action="store_true", help="print the tables (also what happens without options)")
    parser.add_argument("--picture", type=Path, help="draw each device into PICTURE, its name added before the suffix")
    parser.add_argument("--rehearsal", action="store_true", help="of results of --smoke, whose figures mean nothing")
    options = parser.parse_args(argv)
    devices = load(options.results, options.rehearsal)
    sys.stdout.write("\n\n".join(markdown(device) for device in devices or [None]) + "\n")
    for device in devices if options.picture else ():
        draw(device, options.picture.with_stem(f"{options.picture.stem}-{slug(device.name)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
