"""Tables and a picture of the end-to-end results.

    python -m benchmarks.train_table [--markdown] [--results FOLDER] [--picture benchmarks/results/train.png]

Everything is read from the JSON that bench_train wrote on real devices; --rehearsal asks for rehearsals instead. If no
device has been measured, the tables say "not measured". Each row has its commit. A ratio of rows of different commits
or versions is marked, and there is none for a row that was not timed to its end.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.launch_time import PART as LAUNCH
from benchmarks.launch_time import STARTS, STEP
from benchmarks.result_files import short, slug
from benchmarks.train_cells import AS_SHIPPED, BASE, PARTS, cells
from benchmarks.train_record import ATTEMPT, ATTENTION, settings_of
from benchmarks.train_rows import Device, Row, load
from benchmarks.workloads import RANK0, SLICE_LAYERS, Cell, shape_of
from titan_fast.errors import reported

NOT_MEASURED = "not measured"
MIXED = "*"  # marks ratios of rows of different commits or versions


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(value: float | None, words: str) -> str:
    return NOT_MEASURED if value is None else format(value, words)


def _figures(row: Row | None) -> list[str]:
    """The columns of _HEAD."""
    if row is None:
        return [NOT_MEASURED] * len(_HEAD)
    commit = short(row.get("commit"))
    if "step_seconds" not in row:
        return (
            [_cell(row["error"]), *[""] * (len(_HEAD) - 2), commit] if "error" in row else [NOT_MEASURED] * len(_HEAD)
        )
    seconds = row["step_seconds"]
    tokens = row["tokens_per_step"]
    return [
        f"{row['tokens_per_second']:,.0f}{_reservations(row)}",
        f"{tokens / seconds['p90']:,.0f} to {tokens / seconds['p10']:,.0f}",
        _number(row.get("mfu", {}).get("titan"), ".1%"),
        _number(row.get("fraction_of_limit"), ".1%"),
        f"{row['peak_bytes'] / 2**30:.1f}",
        _clock(row.get("gpu", {})),
        commit,
    ]


def _clock(state: Row) -> str:
    """The multiprocessors' clock and the power while the row's steps were timed, medians."""
    medians = [f"{state[name][1]:.0f} {unit}" for name, unit in (("sm_mhz", "MHz"), ("watts", "W")) if name in state]
    return ", ".join(medians) or NOT_MEASURED


def _cell(words: str) -> str:
    """The words for a table's cell."""
    return " ".join(words.replace("|", "/").split())


def _reservations(row: Row) -> str:
    """What a reader must know of the row's figures: that they are of fewer steps, or that there was a later attempt."""
    seconds, words = row["step_seconds"], ""
    if "stopped" in row:
        words = f" ({seconds['timed']} steps, then {_cell(row['stopped'])})"
    elif not row.get("complete", True):
        planned = f"of {seconds['planned']} steps" if "planned" in seconds else "steps, not all"
        words = f" ({seconds['timed']} {planned})"
    return words + _attempt(row)


def _attempt(row: Row) -> str:
    if ATTEMPT not in row:
        return ""
    return f" (at {short(row[ATTEMPT]['commit'])} it came to: {_cell(row[ATTEMPT]['came to'])})"


_HEAD = ("tokens/s", "p90 to p10 step", "MFU (titan)", "of the limit", "peak GiB", "clock, power", "commit")


def _row(device: Device | None, cell: Cell, variant: str | None = None) -> Row | None:
    """The row of this variant of the cell; None: its first one."""
    return device.rows.get((cell.name, variant or cell.variants[0].name)) if device else None


def _speed(row: Row | None) -> float | None:
    """tokens/s; None also for a row that was not timed to its end."""
    return row.get("tokens_per_second") if row and row.get("complete", True) else None


def _ratio(value: float | None, words: str, *rows: Row | None) -> str:
    """A number that compares these rows, marked if they differ in commit or versions."""
    found = [row for row in rows if row]
    mixed = value is not None and any(_differ(*pair) for pair in itertools.combinations(found, 2))
    return _number(value, words) + MIXED * mixed


def _differ(one: Row, other: Row) -> bool:
    """Whether their commits differ, or the versions of packages that both name: a peer has its own."""
    mine, theirs = one["versions"], other["versions"]
    versions = any(mine[name] != theirs[name] for name in mine.keys() & theirs.keys())
    return versions or short(one.get("commit")) != short(other.get("commit"))


def models_table(device: Device | None) -> str:
    """Every workload with each of its variants: what the command runs by default, and the rest."""
    lines = []
    parts = [part for part in PARTS if not part.startswith(("peers", "levers", "parity", "best"))]
    for cell in sorted(cells(tuple(parts)), key=lambda cell: _order(cell)):
        for variant in cell.variants:
            what = "rank 0 of 64, no communication" if cell.workload.world > 1 else "one GPU"
            mode = settings_of(cell, variant.name, False).activation_checkpoint
            words = mode.mode + (f" {mode.selective_ac_option}" if mode.mode == "selective" else "")
            batch = f"{cell.workload.batch} x {cell.workload.seq_len}"
            figures = _figures(_row(device, cell, variant.name))
            lines.append([cell.workload.name, what, batch, words, variant.name, *figures])
    return _table(("model", "as", "batch", "recomputation", "variant", *_HEAD), lines)


def _order(cell: Cell) -> tuple[int, int]:
    """Sorts a workload's cells together, in the order in which the workloads first occur."""
    everything = cells(PARTS)
    names = [f"{one.workload.name} {one.workload.batch}" for one in everything]
    return names.index(f"{cell.workload.name} {cell.workload.batch}"), everything.index(cell)


def peers_table(device: Device | None) -> str:
    """Each comparison with ours, as a ratio of tokens/s; drift is the change between our first and last run. torchtitan
    as shipped keeps float32 weights, so on one device it is only compared with ours with masters; with FSDP2 both keep
    such weights anyway."""
    lines = []
    for part in [part for part in PARTS if part.startswith("peers")]:
        own = cells((part,))
        ends = [_row(device, own[0]), _row(device, own[-1])]
        masters = [_row(device, cell) for cell in own if cell.label == "masters"]
        for cell in own[:-1]:
            row = _row(device, cell)
            fair = masters if cell.peer == AS_SHIPPED and cell.workload.kind == "single" else ends
            ours = [one for one in fair if _speed(one)]
            speeds, theirs = [speed for one in ours if (speed := _speed(one))], _speed(row)
            value = statistics.mean(speeds) / theirs if speeds and theirs else None
            ratio = _ratio(value, ".2f", row, *ours) if cell.peer else ""
            who = ", ".join(word for word in (cell.peer or "titan_fast", cell.label) if word)
            lines.append([cell.workload.name, who, *_figures(row), ratio])
        before, after = map(_speed, ends)
        drift = _ratio(after / before - 1 if before and after else None, "+.1%", *ends)
        lines.append([own[0].workload.name, "drift of ours", drift, *[""] * len(_HEAD)])
    return _table(("model", "who", *_HEAD, "ours / theirs"), lines)


def best_table(device: Device | None) -> str:
    """The largest batch that fits, and the fastest, for each peer and kind of recomputation; and our fastest of all
    compared with that of each peer."""
    lines = []
    best: dict[str, Row] = {}
    for cell in [cell for cell in cells(PARTS) if cell.searches]:
        rows = [row for variant in cell.variants if (row := _row(device, cell, variant.name))]
        fit = [row for row in rows if "step_seconds" in row]
        fastest = max(filter(_speed, fit), key=lambda row: row["tokens_per_second"], default=None)
        if fastest is not None:
            known = best.setdefault(cell.peer, fastest)
            best[cell.peer] = max(known, fastest, key=lambda row: row["tokens_per_second"])
        then = next((row for row in rows if "error" in row), None)
        limit = NOT_MEASURED
        if then is not None:
            limit = (
                f"{then['batch']} does not" if then.get("out_of_memory") else f"{then['batch']}: {_cell(then['error'])}"
            )
        largest = str(max(row["batch"] for row in fit)) if fit else "none" if then else NOT_MEASURED
        words = cell.label.removeprefix("largest batch, ")
        fastest_batch = str(fastest["batch"]) if fastest else NOT_MEASURED
        who = cell.peer or "titan_fast, pure bfloat16"
        lines.append([cell.workload.name, who, words, largest, limit, fastest_batch, *_figures(fastest)])
    ours = best.get("")
    for peer in dict.fromkeys(cell.peer for cell in cells(PARTS) if cell.searches and cell.peer):
        theirs = best.get(peer)
        value = ours["tokens_per_second"] / theirs["tokens_per_second"] if ours and theirs else None
        ratio = _ratio(value, ".2f", ours, theirs)
        lines.append(["", f"ours / {peer}, each at its best", "", "", "", "", ratio, *[""] * (len(_HEAD) - 1)])
    head = ("model", "who", "recomputation", "largest batch that fits", "the next one", "fastest batch", *_HEAD)
    return _table(head, lines)


def levers_table(device: Device | None) -> str:
    """The effect of each change by itself, compared with the base of its own process, or if that has none (the change
    needs another optimizer, or affects the whole process) with that of the same model."""
    lines = []
    found = cells(tuple(part for part in PARTS if part.startswith("levers")))
    for cell in found:
        base = _base_of(cell, found, device)
        for variant in cell.variants:
            row = _row(device, cell, variant.name)
            was, now = _speed(base), _speed(row)
            delta = _ratio(now / was - 1 if was and now else None, "+.1%", base, row)
            lines.append([cell.workload.name, f"{cell.label}: {variant.name}", delta, *_figures(row)])
    return _table(("model", "change", "tokens/s", *_HEAD), lines)


def _base_of(cell: Cell, found: Sequence[Cell], device: Device | None) -> Row | None:
    if len(cell.variants) > 1:
        return _row(device, cell)
    same = [one for one in found if one.workload.name == cell.workload.name and len(one.variants) > 1]
    alike = [one for one in same if one.variants[0].name == BASE.name] or same
    return _row(device, alike[0]) if alike else None


def parity_table(device: Device | None) -> str:
    """How far losses are from those of plain eager PyTorch. If they did not fall, nothing was compared."""
    lines = []
    for cell in [cell for cell in cells(PARTS) if cell.parity_steps]:
        for variant in cell.variants:
            row = _row(device, cell, variant.name) or {}
            parity = row.get("parity", {})
            course = NOT_MEASURED
            if parity:
                course = f"{parity['first']:.2f} to {parity['last']:.2f}" + (
                    "" if parity["learnt"] else ", no training"
                )
            figures = [_number(parity.get(key), ".1e") for key in ("largest", "last tenth")]
            said = [_cell(row["error"]), ""] if "error" in row else figures
            commit = short(row.get("commit")) if row else ""
            lines.append([f"{cell.label}: {variant.name}", course + _attempt(row), *said, commit])
    head = ("variant", "loss", "largest difference of a step's loss, nats", "of the mean of the last tenth", "commit")
    return _table(head, lines)


def launch_table(device: Device | None) -> str:
    """The time from the command to a step of a real run, and the speed of the one that trains on."""
    lines = []
    for start in STARTS:
        row = (device.rows.get((LAUNCH, start)) if device else None) or {}
        figures = [_number(row.get(f"seconds_to_step_{step}"), ".1f") for step in (1, STEP)]
        figures.append(_number(row.get("tokens_per_second"), ",.0f") if start == STARTS[1] else "")
        said = [_cell(row["error"]), "", ""] if "error" in row else figures
        commit = short(row.get("commit")) if row else ""
        lines.append([start + _attempt(row), *said, row.get("start", ""), commit])
    program = "python -m titan_fast.train, Llama 3.2 1B"
    return _table(
        (program, "seconds to step 1", f"to step {STEP}", "tokens/s later", "its start, by part", "commit"), lines
    )


@dataclass(frozen=True)
class Slope:
    """Seconds of a step as base + per_layer x layers, fitted by least squares to the slices that ran."""

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
    """The step at full depth as predicted from the slices, and as measured."""
    lines = []
    for name in ("8b", "70b"):
        full = RANK0[name]
        variant = "compiled, auto"
        points: dict[int, float] = {}
        rows: list[Row] = []
        for row in device.found(flavor=full.flavor, kind="slice", variant=variant) if device else ():
            if row["layers"] in SLICE_LAYERS and row["layers"] not in points and _speed(row):
                points[row["layers"]] = row["step_seconds"]["median"]
                rows.append(row)
        line, depth = slope(points), shape_of(full, False).n_layers
        whole = device.rows.get((full.name, variant)) if device else None
        measured = whole["step_seconds"]["median"] if whole and _speed(whole) else None
        predicted = line.at(depth) if line else None
        lines.append([
            full.name,
            ", ".join(map(str, points)) or NOT_MEASURED,
            _number(line.per_layer * 1e3 if line else None, ".2f"),
            _number(predicted * 1e3 if predicted else None, ".1f"),
            _number(measured * 1e3 if measured else None, ".1f"),
            _ratio(predicted / measured - 1 if predicted and measured else None, "+.1%", whole, *rows),
        ])  # fmt: skip
    head = ("model", "slices (layers)", "ms per layer", "predicted step (ms)", "measured step (ms)", "difference")
    return _table(head, lines)


def breakdown_table(device: Device | None) -> str:
    """Where a step's time goes, and the least that each kind could take."""
    lines = []
    for row in device.rows.values() if device else ():
        seconds = row.get("profile", {}).get("seconds", {})
        if seconds:
            said = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in sorted(seconds.items(), key=lambda item: -item[1]))
            least = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in row.get("least_step", {}).items())
            name = f"{row['cell']}, {row['variant']}"
            lines.append([name, said, least or NOT_MEASURED, short(row.get("commit"))])
    return _table(("step", "measured, ms", "least, ms", "commit"), lines or [[NOT_MEASURED, "", "", ""]])


def markdown(device: Device | None) -> str:
    """All tables of a device; with None, empty ones."""
    head = "No device has been measured." if device is None else _provenance(device)
    sections = {
        "Models": models_table(device),
        "Peers, on the same device": peers_table(device),
        "Each at its best": best_table(device),
        "From the command to a step": launch_table(device),
        "Slices against full depth": slices_table(device),
        "One change at a time": levers_table(device),
        "Losses over 200 steps": parity_table(device),
        "Where a step's time goes": breakdown_table(device),
    }
    text = "\n\n".join([head, *(f"#### {title}\n\n{table}" for title, table in sections.items())])
    return f"{text}\n\n{MIXED} of rows of different commits or versions" if f"{MIXED} |" in text else text


def _provenance(device: Device) -> str:
    found: dict[str, dict[str, None]] = {}
    for row in device.rows.values():
        for name, version in row["versions"].items():
            if version != "none":
                found.setdefault(name, {})[version] = None
    versions = ", ".join(f"{name} {' and '.join(several)}" for name, several in found.items())
    attention = {row.get(ATTENTION, "cudnn") for row in device.rows.values() if "fraction_of_limit" in row}
    limit = f" The limit is by attention of {' and '.join(sorted(attention))}." if attention else ""
    states = [row["gpu"] for row in device.rows.values() if row.get("gpu")]
    commits = ", ".join(sorted({short(row.get("commit")) for row in device.rows.values()}))
    slowed = sorted({word for state in states for word in state.get("slowed_by", ())})
    return (
        f"{device.name}; {versions}; commit {commits}; power limit {_range(states, 'watts_limit', 'W')}; while steps "
        f"were timed: SM clock {_range(states, 'sm_mhz', 'MHz')}, power {_range(states, 'watts', 'W')}, temperature "
        f"{_range(states, 'celsius', 'C')}{', slowed by ' + ' and '.join(slowed) if slowed else ''}. Random tokens, "
        f"whole steps, medians.{limit}"
    )


def _range(states: list[Row], name: str, unit: str) -> str:
    """The range of the rows' medians."""
    medians = [state[name][1] for state in states if name in state]
    if not medians:
        return "unknown"
    low, high = min(medians), max(medians)
    return f"{low:.0f} {unit}" if low == high else f"{low:.0f} to {high:.0f} {unit}"


def draw(device: Device, path: Path) -> None:
    """The speed of each row except levers, as a fraction of that of the least step."""
    rows = [row for row in device.rows.values() if "fraction_of_limit" in row and not row["part"].startswith("levers")]
    rows.sort(key=lambda row: (row["workload"], row["peer"], row["variant"]))
    figure = Figure(figsize=(11, 1.5 + 0.3 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        [_bar_name(row) for row in rows],
        [100 * row["fraction_of_limit"] for row in rows],
        color=[_COLORS[_kind(row)] for row in rows],
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_title(f"{device.name}: speed as a part of its limit")
    axes.set_xlabel("% of the limit: the rates of its own copies, matrix products and attention")
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    handles = [Patch(color=color, label=kind) for kind, color in _COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


_COLORS = {"titan_fast, compiled": "tab:blue", "titan_fast, eager": "tab:orange", "others": "tab:gray"}


def _kind(row: Row) -> str:
    """The bar's key in _COLORS."""
    if row["peer"]:
        return "others"
    return "titan_fast, eager" if row["variant"].startswith("eager") else "titan_fast, compiled"


def _bar_name(row: Row) -> str:
    parts = [row["peer"] or "titan_fast", row["label"].removeprefix("largest batch, "), row["variant"]]
    return f"{row['workload']}: {', '.join(part for part in parts if part)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--markdown", action="store_true", help="print the tables, as without options")
    parser.add_argument("--picture", type=Path, help="draw each device into PICTURE, its name added before the suffix")
    parser.add_argument("--rehearsal", action="store_true", help="use results of --smoke, whose figures mean nothing")
    options = parser.parse_args(argv)
    with reported():
        devices = load(options.results, options.rehearsal)
        sys.stdout.write("\n\n".join(markdown(device) for device in devices or [None]) + "\n")
        for device in devices if options.picture else ():
            draw(device, options.picture.with_stem(f"{options.picture.stem}-{slug(device.name)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
