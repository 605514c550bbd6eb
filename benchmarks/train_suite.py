"""Implements `bench_train`: parts, processes, files. Its manual is `bench_train --help`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import launch_time, limits
from benchmarks.device_state import device_name
from benchmarks.provenance import commit, environment
from benchmarks.result_files import read, slug
from benchmarks.step_timing import Length
from benchmarks.train_cell import run_cell
from benchmarks.train_cells import PARTS, TABLE_PARTS, cells, chosen_cells
from benchmarks.train_plan import plan
from benchmarks.train_process import (
    LIMIT_SECONDS,
    SILENCE_SECONDS,
    Answer,
    Run,
    end_on_sigterm,
    end_with_parent,
    leftovers,
    watched,
)
from benchmarks.train_record import known_limits, record
from benchmarks.variants import LOST, How, Rows, sentence
from benchmarks.workloads import Cell, rehearsed
from titan_fast.ops import source_digest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
CACHE = ROOT / "outputs" / "bench_train_cache"
"""For compiled code, shared by all processes."""
SMOKE_LENGTH = Length(1, 2, 1)
LIMITS_LIMIT_SECONDS = 300.0


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """`bench_train` with these arguments; the exit status."""
    options = _arguments(description).parse_args(argv)
    parts = PARTS if options.parts == "all" else tuple(options.parts.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"bench_train: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if options.cells is not None and options.cells < 1:
        sys.exit(f"bench_train: --cells is {options.cells}; give 1 or more, or leave it out")
    if options.only and not chosen_cells(parts, options.only):
        names = "; ".join(dict.fromkeys(cell.name for cell in cells(parts)))
        sys.exit(
            f"bench_train: no cell of {', '.join(parts)} has {options.only!r} in its name; there are: {names or '-'}"
        )
    if options.commit:
        os.environ["BENCHMARK_COMMIT"] = options.commit
    options.out, options.cache = options.out.resolve(), options.cache.resolve()
    if options.smoke:
        torch.set_num_threads(1)  # enough for models of this size; more would wait for each other
    if options.child is not None:
        return _child(options)
    if options.plan:
        device = options.device or _planned_for(options.out)
        known = known_limits(options.out, device) if device else None
        sys.stdout.write("\n".join(plan(parts, known, device, options.only, options.cells)) + "\n")
        return 0
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("bench_train: needs a GPU, and torch sees none here; --smoke rehearses on the CPU")
    if options.out.suffix == ".json":
        sys.exit(f"bench_train: --out is {str(options.out)!r}, and there is a file for each part; give a folder")
    options.out.mkdir(parents=True, exist_ok=True)
    end_on_sigterm()
    Suite(options).run(parts)
    return 0


def _arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default=",".join(TABLE_PARTS), help=f"comma-separated, of {', '.join(PARTS)}; or all"
    )
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--plan", action="store_true", help="print what would run and how long it should take")
    parser.add_argument("--device", default="", help="plan with this GPU's limits; default: this machine's")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--cells", type=int, help="only the first so many cells of each part")
    parser.add_argument("--no-profile", action="store_true", help="leave out the breakdown of a step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where compiled code is kept")
    parser.add_argument("--commit", help="the results' commit, if the code is without its .git")
    # For child processes: the cell's part and name, its variants, and where to write the answer.
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    for name in ("--variants", "--answer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser


def _planned_for(out: Path) -> str:
    """This machine's GPU, or if it has none the only one whose limits were measured; else empty."""
    here = device_name()
    measured = [str((read(path) or {}).get("device", "")) for path in out.glob("limits-*.json")]
    return here if here != "unknown" else measured[0] if len(measured) == 1 else ""


def cell_named(part: str, name: str) -> Cell | None:
    return next((cell for cell in cells((part,)) if cell.name == name), None)


class Suite:
    """Cells one after the other. Every row is in its part's file as soon as it has an outcome."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.environment: dict[str, Any] = {"device": "CPU", "smoke": True} if options.smoke else {"device": "unknown"}

    def run(self, parts: tuple[str, ...]) -> None:
        for path, answer in leftovers(self.options.out):
            cell = cell_of(answer)
            if cell is None:
                aside = path.replace(path.with_name(f"{path.name}.aside"))
                sys.stdout.write(f"{aside}: left by a process that ran other code, and set aside\n")
                continue
            self.record(cell, answer)
            path.unlink()
        if "limits" in parts:
            self._limits()
        selected = chosen_cells(parts, self.options.only, self.options.cells)
        device = "CPU" if self.options.smoke else device_name()
        if selected and known_limits(self.options.out, device) is None:
            what = f"no limits of {device} in {self.options.out}: rows get no fraction of them"
            sys.stdout.write(f"{what} until `--parts limits` has run\n")
        for number, cell in enumerate(selected, 1):
            started = time.time()
            answer = self.finish(cell)
            head = f"[{number}/{len(selected)}] {cell.part}: {cell.name}, {time.time() - started:.0f} s"
            say(head, answer)
        if "launch" in parts:
            self._launch()

    def finish(self, cell: Cell) -> Answer:
        """All rows of `cell`, recorded."""
        once = self._in_this_process if self.options.smoke else self._in_a_child
        run = Run(cell, lambda names, told: once(cell, names, told), lambda a: self.record(cell, a), self.environment)
        answer = run.finish()
        self.environment = answer["environment"]
        return answer

    def record(self, cell: Cell, answer: Answer) -> None:
        if answer["environment"].get("device", "unknown") == "unknown":
            answer["environment"] |= environment_from_outside()
        record(cell, answer, self.options.out, known_limits(self.options.out, answer["environment"]["device"]))

    def _in_this_process(self, cell: Cell, names: list[str], told: Callable[[Answer], None]) -> tuple[Answer, str]:
        """A rehearsal."""
        how = How(smoke=True, length=SMOKE_LENGTH, profiles=not self.options.no_profile)
        rows = rows_of(rehearsed(only(cell, names)), torch.device("cpu"), how)
        return {"environment": environment(True), "rows": rows}, ""

    def _in_a_child(self, cell: Cell, names: list[str], told: Callable[[Answer], None]) -> tuple[Answer, str]:
        path = self.options.out / f".answer-{os.getpid()}-{slug(f'{cell.part} {cell.name}')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.bench_train", "--answer", str(path)]
        command += ["--child", cell.part, cell.name, "--variants", "|".join(names)]
        command += [flag for flag in ("--no-profile", "--smoke") if getattr(self.options, flag[2:].replace("-", "_"))]
        found: Answer = {"environment": {}, "rows": []}

        def heard() -> None:
            nonlocal found
            if path.exists():
                found = json.loads(path.read_text())
                told(found)

        limit, silence = LIMIT_SECONDS + cell.extra_seconds, SILENCE_SECONDS + cell.extra_seconds
        surroundings = environment_of_children(self.options.cache)
        problem = watched(command, surroundings, ROOT, path, heard, limit, silence)
        path.unlink(missing_ok=True)
        return found, problem

    def _limits(self) -> None:
        options = self.options
        if options.smoke:
            limits.main(["--smoke", "--out", str(options.out)])
            return
        command = [sys.executable, "-m", "benchmarks.limits", "--child", "--out", str(options.out)]
        surroundings = environment_of_children(options.cache)
        problem = watched(
            command, surroundings, ROOT, options.out, limit=LIMITS_LIMIT_SECONDS, silence=LIMITS_LIMIT_SECONDS
        )
        if problem:
            sys.stdout.write(f"limits: {problem}; the rest continues without fractions\n")

    def _launch(self) -> None:
        if self.environment["device"] == "unknown":
            self.environment |= environment_from_outside()
        surroundings = environment_of_children(self.options.cache)
        say("launch", launch_time.measure(self.options.out, surroundings, self.environment, self.options.smoke))


def only(cell: Cell, names: list[str]) -> Cell:
    """The cell with only these of its variants."""
    return replace(cell, variants=tuple(variant for variant in cell.variants if variant.name in names))


def cell_of(answer: Answer) -> Cell | None:
    """The answer's cell; None if this code has no such cell or variants, or is not the code that ran them."""
    cell = cell_named(answer.get("part", ""), answer.get("cell", ""))
    if cell is None or answer["environment"].get("commit") != commit():
        return None
    names = {variant.name for variant in cell.variants}
    return cell if all(row["variant"] in names for row in answer["rows"]) else None


def environment_of_children(cache: Path) -> dict[str, str]:
    """This process's environment, with this checkout on the path, and a place for compiled code that only code with the
    same operators uses."""
    inherited = [Path(entry).absolute() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "kernels", *inherited])),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCH_COMPILE_CACHE_KEY_TAG": source_digest(),  # see compilation.name_code
    }


def environment_from_outside() -> dict[str, Any]:
    """The environment of a machine where no process got far enough to report it, without touching the GPU."""
    return environment(True) | {"device": device_name(), "architecture": "unknown", "smoke": False}


def _child(options: argparse.Namespace) -> int:
    """One process of a cell. Its answer has everything as soon as it is known: the machine, then each row."""
    end_with_parent()
    part, name = options.child
    found = cell_named(part, name)
    assert found is not None, (part, name)
    cell = only(found, options.variants.split("|"))
    answer: Answer = {"environment": environment(options.smoke), "part": part, "cell": name, "rows": []}

    def save(**more: Any) -> None:
        answer.update(more)
        written = Path(options.answer + ".new")
        written.write_text(json.dumps(answer))
        written.replace(options.answer)

    def heard(rows: Rows, at: str) -> None:
        save(rows=rows, at=at)
        if not at and any(row.get(LOST) for row in rows):
            os._exit(0)  # cleaning up on a lost device may take forever

    save()
    how = How(profiles=not options.no_profile, save=heard)
    device = torch.device("cuda", 0)
    if options.smoke:
        cell, device = rehearsed(cell), torch.device("cpu")
        how = replace(how, smoke=True, length=SMOKE_LENGTH)
    rows = rows_of(cell, device, how)
    save(rows=rows if rows else answer["rows"])
    return 0


def rows_of(cell: Cell, device: torch.device, how: How) -> Rows:
    """A row for each variant that was reached; if nothing could be built, each has the reason."""
    saved: list[Rows] = []

    def save(rows: Rows, at: str) -> None:
        saved[:] = [rows]
        how.save(rows, at)

    try:
        if not cell.peer:
            return run_cell(cell, device, replace(how, save=save))
        from benchmarks.peers import run_peer

        return run_peer(cell, device, replace(how, save=save))
    except Exception as error:
        if saved:  # it happened during clean-up
            sys.stderr.write(f"after the last step: {sentence(error)}\n")
            return saved[0]
        return [
            {"variant": v.name, "options": v.options, "error": sentence(error),
             "out_of_memory": isinstance(error, torch.OutOfMemoryError)}
            for v in cell.variants
        ]  # fmt: skip


def say(head: str, answer: Answer) -> None:
    """Prints a line for each row."""
    lines = [head]
    for row in answer["rows"]:
        figures = row.get("error", "")
        if "step_seconds" in row:
            figures = f"{row['step_seconds']['median'] * 1e3:.1f} ms {row.get('stopped', '')}"
        elif "parity" in row:
            figures = f"losses within {row['parity']['largest']:.1e} nats"
        elif "seconds_to_step_10" in row:
            figures = f"{row['seconds_to_step_10']:.1f} s to step 10"
        lines.append(f"    {row['variant']:<36} {figures}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
