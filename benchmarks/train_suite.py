"""What `bench_train` does: parts, processes, files, plans. Its manual is the text of `bench_train --help`."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import limits
from benchmarks.conftest import environment
from benchmarks.limits import ASSUMED_H100, Limits, least_step, slug
from benchmarks.step_profile import PROFILED_STEPS
from benchmarks.step_timing import FULL, LATER_WARM_UP, SLOW, SLOW_STEP_SECONDS, Length
from benchmarks.train_cell import How, Rows, run_cell
from benchmarks.workloads import (
    COMPILED_AUTO,
    COMPILED_REFERENCE,
    PARTS,
    TABLE_PARTS,
    Cell,
    cells,
    config_of,
    rehearsed,
    shape_of,
)
from titan_fast.flops import FORMULAS, flops_per_token, mfu, peak_flops

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
CACHE = ROOT / "outputs" / "bench_train_cache"
"""Compiled code, shared by all processes."""
PROCESS_LIMIT_SECONDS = 460
SMOKE_LENGTH = Length(1, 2, 1)

# For a plan only: how near to the least step a kind of run is taken to come, and what a process and a variant cost.
_EFFICIENCY = {"compiled": 0.8, "eager": 0.5}
_START_SECONDS, _COMPILE_SECONDS, _LIMITS_SECONDS = 15.0, 12.0, 75.0


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """`bench_train` with these arguments; the exit status."""
    options = _arguments(description).parse_args(argv)
    parts = PARTS if options.parts == "all" else tuple(options.parts.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"bench_train: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if options.child is not None:
        return _child(options)
    if options.plan:
        sys.stdout.write("\n".join(plan(parts, _known_limits(options.out))) + "\n")
        return 0
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("bench_train: measures a GPU, and torch sees none here; --smoke rehearses on the CPU")
    if "limits" in parts:
        _run_limits(options)
    _run_parts(options, parts)
    return 0


def _arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default=",".join(TABLE_PARTS), help=f"comma-separated, of {', '.join(PARTS)}; or all"
    )
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--plan", action="store_true", help="print what would run and how long it should take")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--cells", type=int, help="the first so many cells of each part")
    parser.add_argument("--no-profile", action="store_true", help="leave out the breakdown of a step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where compiled code is kept")
    for name in ("--child", "--variants", "--answer", "--launched"):  # what a process is told by the one that starts it
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser


def chosen_cells(parts: tuple[str, ...], only: str = "", per_part: int | None = None) -> list[Cell]:
    """What these options select, in the order of `parts`."""
    found = []
    for part in parts:
        own = [cell for cell in cells((part,)) if only in cell.name]
        found += own[:per_part]
    return found


# Running


def _run_limits(options: argparse.Namespace) -> None:
    out = ["--out", str(options.out / "limits-cpu.json")] if options.smoke else []
    if options.smoke:
        limits.main(["--smoke", *out])
        return
    command = [sys.executable, "-m", "benchmarks.limits"]
    done = subprocess.run(command, cwd=ROOT, env=_environment_of_children(options.cache), check=False)
    if done.returncode:
        sys.stdout.write(f"limits failed with status {done.returncode}; the rest goes on without fractions\n")


def _run_parts(options: argparse.Namespace, parts: tuple[str, ...]) -> None:
    selected = chosen_cells(parts, options.only, options.cells)
    for number, cell in enumerate(selected, 1):
        started = time.time()
        answer = run_in_process(cell, options) if options.smoke else run_in_child(cell, options)
        path = record(cell, answer, options.out, _known_limits(options.out, answer["environment"]["device"]))
        _say(f"[{number}/{len(selected)}] {cell.part}: {cell.name}, {time.time() - started:.0f} s, {path.name}", answer)


def run_in_process(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """A rehearsal."""
    how = How(smoke=True, length=SMOKE_LENGTH, profiles=not options.no_profile, launched=time.time())
    return {"environment": environment(True), "rows": _rows_of(rehearsed(cell), torch.device("cpu"), how), "gpu": []}


def run_in_child(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """The cell in a process of its own; once more with the variants that are left where memory ran out."""
    answer: dict[str, Any] = {"environment": {"device": "unknown"}, "rows": [], "gpu": []}
    left = [variant.name for variant in cell.variants]
    while left:
        found = _one_child(cell, left, options)
        answer = found | {"rows": answer["rows"] + found["rows"]}
        had = {row["variant"] for row in found["rows"]}
        if not had & set(left):
            break
        left = [name for name in left if name not in had]
    return answer


def _one_child(cell: Cell, variants: list[str], options: argparse.Namespace) -> dict[str, Any]:
    answer = options.out / f".answer-{os.getpid()}.json"
    answer.parent.mkdir(parents=True, exist_ok=True)
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.bench_train", "--child", str(cells(PARTS).index(cell))]
    command += ["--variants", "|".join(variants), "--answer", str(answer), "--launched", str(time.time())]
    command += [flag for flag in ("--no-profile", "--smoke") if getattr(options, flag[2:].replace("-", "_"))]
    problem = ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment_of_children(options.cache), timeout=PROCESS_LIMIT_SECONDS, check=False
        )
        if done.returncode:
            problem = f"the process ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {PROCESS_LIMIT_SECONDS} s"
    found: dict[str, Any] = {"environment": {"device": "unknown"}, "rows": [], "gpu": []}
    if answer.exists():
        found = json.loads(answer.read_text())
        answer.unlink()
    if problem:
        had = {row["variant"]: row for row in found["rows"]}
        for name in variants:
            row = had.get(name)
            if row is None:
                found["rows"].append({"variant": name, "options": {}, "error": problem})
            elif "step_seconds" not in row and "parity" not in row:
                row.setdefault("error", problem)
    return found


def _environment_of_children(cache: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path.rstrip(os.pathsep),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }


def _child(options: argparse.Namespace) -> int:
    cell = cells(PARTS)[int(options.child)]
    wanted = options.variants.split("|")
    cell = replace(cell, variants=tuple(variant for variant in cell.variants if variant.name in wanted))
    answer: dict[str, Any] = {"environment": environment(options.smoke), "rows": [], "gpu": [gpu_state()]}

    def save(rows: Rows) -> None:
        written = Path(options.answer + ".new")
        written.write_text(json.dumps(answer | {"rows": rows}))
        written.replace(options.answer)

    how = How(profiles=not options.no_profile, launched=float(options.launched), save=save)
    device = torch.device("cuda", 0)
    if options.smoke:
        cell, device = rehearsed(cell), torch.device("cpu")
        how = replace(how, smoke=True, length=SMOKE_LENGTH)
    answer["rows"] = _rows_of(cell, device, how)
    answer["gpu"].append(gpu_state())
    save(answer["rows"])
    return 0


def _rows_of(cell: Cell, device: torch.device, how: How) -> Rows:
    if cell.peer:
        from benchmarks.peers import run_peer

        return run_peer(cell, device, how)
    try:
        return run_cell(cell, device, how)
    except torch.OutOfMemoryError as error:  # the model itself does not fit
        words = f"OutOfMemoryError: {str(error).splitlines()[0]}"[:500]
        return [{"variant": v.name, "options": v.options, "error": words} for v in cell.variants]


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature as nvidia-smi has them at this moment; empty where it cannot be asked."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}
    return dict(zip(fields, (word.strip() for word in answer.split(",")), strict=False))


# Recording


def record(cell: Cell, answer: dict[str, Any], out: Path, known: Limits | None) -> Path:
    """Adds the rows to the part's file, in place of earlier ones of the same cell and variant."""
    device = answer["environment"]["device"]
    path = out / f"train-{slug(device)}-{cell.part}.json"
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    smoke = bool(answer["environment"].get("smoke"))
    rows = [described(cell, row, answer, known, smoke) for row in answer["rows"]]
    new = {(row["cell"], row["variant"]) for row in rows}
    kept = [row for row in before["rows"] if (row["cell"], row["variant"]) not in new]
    limits.write({"environment": answer["environment"], "part": cell.part, "rows": kept + rows}, path)
    return path


def described(
    cell: Cell, row: dict[str, Any], answer: dict[str, Any], known: Limits | None, smoke: bool
) -> dict[str, Any]:
    """The row with all that its figures mean nothing without, and what follows from them."""
    cell = rehearsed(cell) if smoke else cell
    work = cell.workload
    variant = next(variant for variant in cell.variants if variant.name == row["variant"])
    peer = cell.peer
    config, shape = config_of(work, {} if peer else variant.options, smoke), shape_of(work, smoke)
    mode = config.activation_checkpoint
    full = {
        "cell": cell.name, "part": cell.part, "workload": work.name, "kind": work.kind, "peer": peer,
        "label": cell.label, "flavor": work.flavor, "layers": shape.n_layers, "seq_len": work.seq_len,
        "batch": work.batch, "tokens_per_step": work.tokens, "world": work.world,
        "communication": "none" if work.world == 1 else "left out: collectives copy this rank's own shard",
        "activation_checkpoint": mode.mode + (f" {mode.selective_ac_option}" if mode.mode == "selective" else ""),
        "commit": answer["environment"].get("commit"), "gpu": answer["gpu"],
    } | row  # fmt: skip
    if "step_seconds" in row:
        seconds = row["step_seconds"]["median"]
        full["tokens_per_second"] = work.tokens / seconds
        peak = peak_flops(answer["environment"]["device"])
        if peak is not None:
            per_token = {name: flops_per_token(shape, work.seq_len, name) for name in FORMULAS}
            full["mfu"] = {name: mfu(work.tokens / seconds, flops, peak) for name, flops in per_token.items()}
        if known is not None:
            full["least_step"] = least_step(known, config, shape, work.world)
            full["fraction_of_limit"] = full["least_step"]["total"] / seconds
    return full


def _known_limits(out: Path, device: str | None = None) -> Limits | None:
    """Of `device`; without one, of the only device that was measured."""
    paths = sorted(out.glob("limits-*.json")) if device is None else [out / f"limits-{slug(device)}.json"]
    if len(paths) != 1 or not paths[0].exists():
        return None
    return limits.limits_from(json.loads(paths[0].read_text()))


def _say(head: str, answer: dict[str, Any]) -> None:
    lines = [head]
    for row in answer["rows"]:
        figures = row.get("error", "")
        if "step_seconds" in row:
            figures = f"{row['step_seconds']['median'] * 1e3:.1f} ms"
        elif "parity" in row:
            figures = f"losses within {row['parity']['largest']:.1e}"
        lines.append(f"    {row['variant']:<36} {figures}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


# Planning


def estimated_seconds(cell: Cell, known: Limits) -> float:
    """How long the cell should take, compile caches cold."""
    total = _START_SECONDS
    for variant in cell.variants:
        if variant is COMPILED_REFERENCE and COMPILED_AUTO in cell.variants:
            continue  # auto is the reference as long as no measurement says otherwise, and nothing runs twice
        config, shape = config_of(cell.workload, variant.options, False), shape_of(cell.workload, False)
        compiled = config.compile.enable or variant.name == "compiled"
        step = least_step(known, config, shape, cell.workload.world)["total"]
        step /= _EFFICIENCY["compiled" if compiled else "eager"]
        length = SLOW if step > SLOW_STEP_SECONDS else FULL
        first = variant is cell.variants[0]
        warm_up = length.warm_up + PROFILED_STEPS if first else min(length.warm_up, LATER_WARM_UP)
        steps = cell.parity_steps or warm_up + length.timed + (length.timed // length.block if length is FULL else 0)
        total += steps * step + (_COMPILE_SECONDS if compiled else 1.0)
    return total


def plan(parts: tuple[str, ...], known: Limits | None) -> list[str]:
    """What would run, with estimates from the measured limits, or from those assumed for an H100."""
    used = known or ASSUMED_H100
    lines = [f"estimates from {'measured limits' if known else 'rates assumed for an H100 SXM'}, caches cold"]
    whole = 0.0
    for part in parts:
        own = chosen_cells((part,))
        estimates = [estimated_seconds(cell, used) for cell in own]
        seconds = _LIMITS_SECONDS if part == "limits" else sum(estimates)
        whole += seconds
        lines.append(f"{part:<12} {len(own):>3} processes  {seconds / 60:5.1f} min")
        lines += [f"    {cell.name:<64} {s:4.0f} s" for cell, s in zip(own, estimates, strict=True)]
    return [*lines, f"{'all':<12} {'':>13}  {whole / 60:5.1f} min"]
