"""Turns benchmark results into a picture, tables, and the table that `auto` follows.

    python -m benchmarks.plot benchmarks/results/kernels-*.json

For each device this merges the results of the suite's parts, all of the same versions (a later file replaces equal
cells), draws achieved bandwidth against the device's measured copy bandwidth, prints what each provider reached and
what whole blocks gain from each kernel, and finally writes the device's table into kernels/titan_kernels/measured: as
its architecture's if it is the first device of it, else as its own.
Results that cannot decide anything are listed with the reason. The table has only what is in the files given, so it is
not written if the existing one has more: give all files.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from titan_kernels.choice import Cell, Table, table_name

from benchmarks.result_files import place, read, slug, without_driver, write_text
from titan_fast.errors import ConfigError, DataError, reported

MEASURED = Path(__file__).parents[1] / "kernels" / "titan_kernels" / "measured"
PROVIDER_ORDER = ("eager", "compiled", "ours", "ours_compiled", "torch", "liger", "quack")
HOST_BOUND = "*"  # marks times in which the GPU waited for the host
COPY_MAY_DIFFER = 0.05
"""Fraction of the limits' copy bandwidth by which a file's own may differ without a warning."""


@dataclass(frozen=True)
class Results:
    """All cells of one device: the benchmarks' `extra_info`, by (case, direction, provider)."""

    machine: dict[str, Any]
    cells: dict[tuple[str, str, str], dict[str, Any]]

    def cases(self) -> list[tuple[str, str]]:
        """(case, direction), in the order of measurement."""
        return list(dict.fromkeys((case, direction) for case, direction, _ in self.cells))

    def time(self, case: str, direction: str, provider: str) -> str:
        """Microseconds, marked if they are not only the GPU's; empty if there are none."""
        cell = self.cells.get((case, direction, provider))
        if cell is None:
            return ""
        bound = not cell.get("queued", True) and not self.machine["smoke"]
        return f"{cell['median_us']:.1f}{HOST_BOUND if bound else ''}"


def load(paths: Sequence[Path]) -> Results:
    """Merges result files.

    Raises:
        DataError: a file that is missing, is not the suite's or has no measurements, or files of different devices or
            versions.

    Times that are compared with each other are of one process, so files may be of several commits; all are named.
    """
    machine: dict[str, Any] = {}
    commits: dict[str, None] = {}
    cells: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in paths:
        content = read(path)
        if content is None or not content.get("benchmarks"):
            what = "no such file" if content is None else "no benchmarks in it"
            raise DataError(what, "give files that the kernel suite wrote", str(path))
        try:
            found = content["machine_info"]
            for key in ("device", "architecture", "smoke", "versions"):
                values = [without_driver(m[key]) if key == "versions" else m[key] for m in (found, machine) if m]
                if values[0] != values[-1]:
                    raise DataError(
                        f"it is of {key} {_said(found[key], machine[key])}, the files before it of "
                        f"{_said(machine[key], found[key])}",
                        "measure parts that belong together again",
                        str(path),
                    )
            machine = found | {"versions": found["versions"] | _drivers(machine, found)}
            commits[str(found["commit"])] = None
            for benchmark in content["benchmarks"]:
                info = benchmark["extra_info"]
                cells[case_name(info), info["direction"], info["provider"]] = info
        except KeyError as error:
            raise DataError(f"no {error} in it", "give files that the kernel suite wrote", str(path)) from error
    return Results(machine | {"commit": ", ".join(commits)}, cells)


def by_device(paths: Sequence[Path]) -> list[list[Path]]:
    """The files of each device; `load` reports what is wrong with them."""
    found: dict[Any, list[Path]] = {}
    for path in paths:
        machine = (read(path) or {}).get("machine_info")
        device = machine.get("device") if isinstance(machine, dict) else None
        found.setdefault(device if isinstance(device, str) else None, []).append(path)
    return list(found.values())


def _drivers(*machines: dict[str, Any]) -> dict[str, str]:
    """All of the files' drivers."""
    found = [words for m in machines for words in m.get("versions", {}).get("driver", "").split(", ") if words]
    return {"driver": ", ".join(dict.fromkeys(found))} if found else {}


def case_name(info: dict[str, Any]) -> str:
    if info["context"] == "host":
        return f"host, {info['op']}{', ' + info['variant'] if info['variant'] else ''}"
    return f"{info['op']}, {info['model']} TP{info['tensor_parallel']}, {info['tokens']} tokens, {info['context']}"


def _said(value: Any, other: Any) -> str:
    """A value of `environment`; for versions, those that differ."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {version}" for name, version in value.items() if version != other.get(name))


@dataclass
class _Verdict:
    """The sum of the measurements that decide one cell, against one rival."""

    triton_us: float = 0.0
    slower_us: float = 0.0
    variance: float = 0.0
    parts: int = 0
    queued: bool = True


WANDERS = 0.01
"""Fraction of a time up to which a difference decides nothing, however small its standard error. On an H100 single
operators of ours made a compiled block slower by 0.1, 0.9 and 1.7%, each by up to 3.5 standard errors, but all together
made it faster by 0.6%: the passes' errors do not include how the clock changes between variants."""


def decision_table(results: Results) -> tuple[Table, list[str]]:
    """(the cells by which `auto` decides, a sentence for each that decides nothing).

    A cell is the sum over directions, and for a switch that two operators share (rms_norm, add_rms_norm) over both. If
    there are several rivals, the fastest counts.
    """
    verdicts: dict[str, dict[str, _Verdict]] = {}
    found: dict[str, dict[str, Any]] = {}
    for info in results.cells.values():
        for contest in info.get("decides", ()):
            key = _label(contest)
            found[key] = contest
            for rival in contest["against"]:
                if rival in info["against"]:
                    _add(verdicts.setdefault(key, {}).setdefault(rival, _Verdict()), info, info["against"][rival])
    cells, undecided = [], []
    for key, contest in found.items():
        by_rival = verdicts.get(key, {})
        problem = _problem(contest, by_rival, bool(results.machine["smoke"]))
        if problem:
            undecided.append(f"{_label(contest)}: {problem}")
            continue
        fastest = max(by_rival.values(), key=lambda verdict: verdict.slower_us)
        plain_us = fastest.triton_us - fastest.slower_us
        noise_us = max(2 * math.sqrt(fastest.variance), WANDERS * plain_us)
        triton, reference, noise = (round(x, 2) for x in (fastest.triton_us, plain_us, noise_us))
        names = contest["op"], contest["compiled"], contest["shape"]
        cells.append(Cell(*names, triton, reference, noise, contest["dtype"], contest["variant"]))
    machine = results.machine
    table = Table(machine["architecture"], machine["device"], machine["versions"], machine["commit"], tuple(cells))
    return table, undecided


def _add(verdict: _Verdict, info: dict[str, Any], against: dict[str, Any]) -> None:
    verdict.triton_us += info["median_us"]
    verdict.slower_us += against["slower_by_us"]
    verdict.variance += against["error_us"] ** 2
    verdict.parts += 1
    verdict.queued &= against["queued"]


def _problem(contest: dict[str, Any], by_rival: dict[str, _Verdict], smoke: bool) -> str:
    """Why these measurements decide nothing; empty if they do."""
    if contest["against"][0] not in by_rival:
        return f"{contest['against'][0]} was not measured beside it"
    if any(verdict.parts != contest["parts"] for verdict in by_rival.values()):
        return "not all of its operators and directions were measured"
    if not smoke and not all(verdict.queued for verdict in by_rival.values()):
        return "the GPU waited for the host"
    return ""


def _table_at(path: Path) -> Table | None:
    try:
        return Table.from_json(path.read_text()) if path.exists() else None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"not a table: {error}", "remove it to start anew", str(path)) from error


def lost(before: Table | None, after: Table, undecided: Sequence[str]) -> list[str]:
    """The cells of `before` that are not among the measurements for `after`."""
    if before is None:
        return []
    said = {_label(asdict(cell)) for cell in after.cells} | {sentence.partition(": ")[0] for sentence in undecided}
    return [label for cell in before.cells if (label := _label(asdict(cell))) not in said]


def other_copies(paths: Sequence[Path]) -> list[str]:
    """A line for each file whose copy line differs from that of the limits beside it."""
    lines = []
    for path in paths:
        content = read(path) or {}
        limits = read(place(path.parent, "limits", content["machine_info"]["device"]))
        infos = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        copies = [info["copy_gb_per_s"] for info in infos if "copy_gb_per_s" in info]
        if limits is None or not copies:
            continue
        usual = limits["rates"]["bandwidth"] / 1e9
        furthest = max(copies, key=lambda copy: abs(copy - usual))
        if abs(furthest - usual) > COPY_MAY_DIFFER * usual:
            words = f"its copy line is {furthest:,.0f} GB/s, the limits' {usual:,.0f}; measure it again"
            lines.append(f"warning: {path.name}: {words}")
    return lines


def _label(contest: dict[str, Any]) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in contest["shape"].items())
    where = "compiled" if contest["compiled"] else "eager"
    return " ".join(filter(None, (contest["op"], where, contest["variant"], contest["dtype"], sizes)))


def markdown(results: Results) -> str:
    """Every provider's microseconds, and our bandwidth if bytes are known; then whole blocks; then the host's time."""
    header = ["case", "direction", *PROVIDER_ORDER, "ours, % of a large copy, of one of as many bytes"]
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    title = f"{machine['device']}, {versions}, commit {machine['commit']}; microseconds, median"
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for case, direction in results.cases():
        if case.startswith("host"):
            continue
        times = [results.time(case, direction, provider) for provider in PROVIDER_ORDER]
        ours = results.cells.get((case, direction, "ours"), {})
        keys = ("percent_of_copy", "percent_of_equal_copy")
        percent = ", ".join(f"{ours[key]:.0f}" for key in keys if key in ours)
        lines.append("| " + " | ".join([case, direction, *times, percent]) + " |")
    if any(time.endswith(HOST_BOUND) for line in lines for time in line.split(" | ")):
        lines.append(f"\n{HOST_BOUND} the GPU waited for the host in some calls: an upper bound, which decides nothing")
    return "\n".join((title, "", *lines, *_blocks(results), *_host(results)))


def _blocks(results: Results) -> list[str]:
    """How much more each variant of a block takes than the block that it is compared with."""
    lines = []
    for (case, direction, provider), info in results.cells.items():
        if not info["op"].startswith("block"):
            continue
        for rival, against in info["against"].items():
            base = results.cells.get((case, direction, rival), {})
            memory = f"{(info['peak_bytes'] - base['peak_bytes']) / 1e6:+.0f}" if base else ""
            change = f"{against['slower_by_us']:+.1f} +- {2 * against['error_us']:.1f}"
            mark = "" if against["queued"] or results.machine["smoke"] else HOST_BOUND
            lines.append(f"| {case} | {direction} | {provider} | {rival} | {change}{mark} | {memory} |")
    if not lines:
        return []
    header = "| block | direction | variant | against | us more (two standard errors) | peak MB more |"
    return ["", "Whole blocks:", "", header, "|" + "---|" * 6, *lines]


def _host(results: Results) -> list[str]:
    calls = {key: info for key, info in results.cells.items() if info["context"] == "host"}
    lines = []
    for (case, direction, provider), info in calls.items():
        lines.append(f"| {case.removeprefix('host, ')} | {direction} | {provider} | {info['median_us']:.1f} |")
    if not lines:
        return []
    return ["", "Host time of one eager call:", "", "| call | direction | provider | us |", "|---|---|---|---|", *lines]


def decisions(table: Table, undecided: Sequence[str]) -> str:
    """What `auto` will choose, a line per cell; then what is undecided."""
    lines = []
    for cell in table.cells:
        verdict = "triton" if cell.triton_wins else "reference"
        label = _label(asdict(cell))
        times = f"{cell.triton_us:.1f} us against {cell.reference_us:.1f} +- {cell.noise_us:.1f}"
        lines.append(f"{label:100} {times:40} {cell.speedup:.2f}x  {verdict}")
    lines += [f"not decided: {reason}" for reason in undecided]
    return "\n".join(lines)


def draw(results: Results, path: Path) -> str:
    """Every provider's achieved bandwidth, with the copy line, in a panel for each operator and direction. Returns what
    it did, in words."""
    alone = {key: info for key, info in results.cells.items() if "gb_per_s" in info}
    panels = list(dict.fromkeys((info["op"], info["direction"]) for info in alone.values()))
    if not panels:
        return "nothing to draw: none of the results has a bandwidth"
    figure = Figure(figsize=(14, 3.2 * len(panels)), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, (op, direction) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        chosen = [info for info in alone.values() if (info["op"], info["direction"]) == (op, direction)]
        shapes = list(dict.fromkeys(_shape_label(info) for info in chosen))
        names = [name for name in PROVIDER_ORDER if any(info["provider"] == name for info in chosen)]
        for position, name in enumerate(names):
            bars = {_shape_label(info): info["gb_per_s"] for info in chosen if info["provider"] == name}
            places = [shapes.index(shape) + (position - len(names) / 2 + 0.5) * 0.8 / len(names) for shape in bars]
            colour = f"C{PROVIDER_ORDER.index(name)}"
            handles[name] = axes.bar(places, list(bars.values()), 0.8 / len(names), color=colour)
        copy = max(info["copy_gb_per_s"] for info in chosen)
        handles["copy"] = axes.axhline(copy, color="black", linestyle="--")
        axes.set_xticks(range(len(shapes)), shapes, fontsize=8)
        axes.set_ylabel("GB/s")
        axes.set_title(f"{op}, {direction}")
    machine = results.machine
    commits = ", ".join(commit[:7] for commit in machine["commit"].split(", "))
    figure.suptitle(f"{machine['device']}, torch {machine['versions']['torch']}, commit {commits}")
    order = [name for name in (*PROVIDER_ORDER, "copy") if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=len(order))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"wrote {path}"


def _shape_label(info: dict[str, Any]) -> str:
    return f"{info['model']}\nTP{info['tensor_parallel']}, {info['tokens']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of pytest-benchmark")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent / "results", help="the folder for them")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="the folder of the tables that auto follows")
    options = parser.parse_args(arguments)
    with reported():
        for paths in by_device(options.results):
            _one_device(paths, options.pictures, options.measured)
    return 0


def _one_device(paths: Sequence[Path], pictures: Path, measured: Path) -> None:
    results = load(paths)
    if results.machine["smoke"] and measured.resolve() == MEASURED.resolve():
        what = "these results are of a rehearsal on the CPU, and must not decide anything"
        raise ConfigError(what, "give another folder", "--measured")
    table, undecided = decision_table(results)
    warnings = "".join(f"{line}\n" for line in other_copies(paths))
    sys.stdout.write(f"{markdown(results)}\n\n{decisions(table, undecided)}\n\n{warnings}")
    place_of_table, before = _place_of(table, measured)
    if missing := lost(before, table, undecided):
        what = f"nothing written: these files do not measure {len(missing)} of its cells, {missing[0]!r} first"
        raise DataError(what, "give all result files, or remove the table to start anew", str(place_of_table))
    sys.stdout.write(f"{draw(results, pictures / f'bandwidth-{slug(table.device)}.png')}\n")
    write_text(table.to_json(), place_of_table)
    sys.stdout.write(f"wrote {place_of_table}\n")


def _place_of(table: Table, folder: Path) -> tuple[Path, Table | None]:
    """(where a device's table belongs, what is there): the architecture's, unless that is another device's."""
    path = folder / table_name(table.architecture)
    before = _table_at(path)
    if before is not None and before.device != table.device:
        path = folder / table_name(table.architecture, table.device)
        before = _table_at(path)
    return path, before


if __name__ == "__main__":
    sys.exit(main())
