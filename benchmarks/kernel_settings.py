"""Other ways to launch our kernels, timed in turn with the current one.

    python -m benchmarks.kernel_settings                 all contests on this GPU, planned for 3 minutes
    python -m benchmarks.kernel_settings --only rope     those whose name contains this
    python -m benchmarks.kernel_settings --inspect 90    no GPU needed: registers and spills of each on sm_90
    python -m benchmarks.kernel_settings --smoke         a rehearsal in Triton's interpreter, which measures nothing

A contest is one direction of one operator at one shape. Every setting's results are checked as the suite checks
providers. A difference counts if it is more than twice its standard error. This program changes nothing: enter the
winner in `titan_kernels` where that kernel's launch is made.
"""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:  # Triton's interpreter must be enabled before kernels are defined
    from titan_kernels.launch import Launch

    from benchmarks.shapes import Case

RESULTS = Path(__file__).parent / "results"
AS_IT_IS = "as it is"
EFFORT = (12, 5)  # passes, calls per pass
Names = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Changes the launches that titan_kernels.`module` makes with `maker` (empty: all of them): `warps` times their
    warps, and those of `constexprs` that they have. `names`: replacements for names in the module, which decide grids
    and blocks."""

    label: str
    module: str
    maker: str = ""
    warps: float = 1.0
    constexprs: Names = field(default_factory=dict)
    names: Callable[[Any], Names] = lambda module: {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, kernels are launched with this setting."""
        module, names = self._replaced
        with mock.patch.multiple(module, **names):
            yield

    @functools.cached_property
    def _replaced(self) -> tuple[Any, Names]:
        """The module and what to replace in it, including every function that makes a launch: they are cached, and
        would return what they made with other names."""
        module = importlib.import_module(f"titan_kernels.{self.module}")
        # The compiler leaves modules under such names in what it has traced.
        makers = [name for name, value in vars(module).items() if name.endswith("_launch") and callable(value)]
        return module, {name: self._changed(module, name) for name in makers} | self.names(module)

    def _changed(self, module: Any, maker: str) -> Callable[..., "Launch"]:
        make = getattr(module, maker).__wrapped__

        @functools.cache
        def changed(*arguments: Any) -> "Launch":
            launch = make(*arguments)
            if self.maker not in ("", maker):
                return launch
            constexprs = {name: value for name, value in self.constexprs.items() if name in launch.constexprs}
            warps = min(max(int(launch.num_warps * self.warps), 1), 32)
            return replace(launch, num_warps=warps, constexprs={**launch.constexprs, **constexprs})

        return changed


@dataclass(frozen=True)
class Contest:
    case: "Case"
    direction: str
    settings: tuple[Setting, ...]

    @property
    def name(self) -> str:
        return f"{self.case.key}-{self.direction}"


def _programs(factor: float) -> Callable[[Any], Names]:
    """Multiplies the number of programs of the norm's backward kernel."""

    def names(module: Any) -> Names:
        usual = module._n_partials
        return {"_n_partials": lambda n_rows, width, device: max(1, int(usual(n_rows, width, device) * factor))}

    return names


def _norm_settings() -> dict[str, tuple[Setting, ...]]:
    forward = functools.partial(Setting, module="rms_norm", maker="_forward_launch")
    backward = functools.partial(Setting, module="rms_norm", maker="_backward_launch")
    total = functools.partial(Setting, module="rms_norm", maker="_sum_launch")
    return {
        "forward": (forward("half the warps", warps=0.5), forward("twice the warps", warps=2)),
        "backward": (
            *(backward(f"{n} stages", constexprs={"STAGES": n}) for n in (2, 3, 4)),
            backward("half the warps", warps=0.5),
            backward("half the programs", names=_programs(0.5)),
            backward("half the programs, 4 stages", constexprs={"STAGES": 4}, names=_programs(0.5)),
            backward("half as many programs again", names=_programs(1.5)),  # 3 on a multiprocessor at 4096 columns
            backward("twice the programs", names=_programs(2)),
            total("sum of 32 x 32, half the warps", warps=0.5, constexprs={"ROWS": 32}),
            total(
                "sum of 128 x 16", constexprs={"ROWS": 128, "COLUMNS": 16}, names=lambda module: {"_SUM_COLUMNS": 16}
            ),
        ),
    }  # fmt: skip


def _rope_settings() -> tuple[Setting, ...]:
    def tokens_and_warps(tokens: int, warps: int) -> Setting:
        names = {"_tokens": lambda head_dim: tokens}
        return Setting(f"{tokens} tokens, {warps} warps", "rope", warps=warps / 4, names=lambda module: names)

    sizes = ((4, 1), (4, 2), (8, 2), (8, 4), (16, 2), (16, 8), (32, 4), (32, 8))
    return tuple(tokens_and_warps(*size) for size in sizes)


def _swiglu_settings() -> tuple[Setting, ...]:
    def block_and_warps(block: int, warps: int) -> Setting:
        label = f"{block} columns, {warps} warps"
        return Setting(label, "swiglu", warps=warps / 4, names=lambda module: {"_BLOCK": block})

    return tuple(block_and_warps(*size) for size in ((512, 2), (1024, 2), (1024, 8), (2048, 4), (2048, 8), (4096, 8)))


def _loss_settings() -> tuple[Setting, ...]:
    def block_and_warps(block: int, warps: int) -> Setting:
        names = {"_block_read_twice": lambda vocab, dtype: (block, warps)}
        return Setting(f"{block} columns, {warps} warps", "cross_entropy", names=lambda module: names)

    sizes = ((8192, 16), (8192, 32), (16384, 16), (16384, 32), (32768, 16), (32768, 32), (65536, 16), (65536, 32))
    return tuple(block_and_warps(*size) for size in sizes)


def contests(smoke: bool) -> list[Contest]:
    """The operators of the 8B, 13B and 70B, unsharded, with 8192 tokens."""
    from benchmarks.shapes import cases

    norms = _norm_settings()
    settings: dict[tuple[str, str], tuple[Setting, ...]] = {
        ("swiglu", "forward"): _swiglu_settings(),
        ("swiglu", "backward"): _swiglu_settings(),
        ("cross_entropy", "step"): _loss_settings(),
    }
    settings |= {(op, way): norms[way] for op in ("rms_norm", "add_rms_norm") for way in norms}
    settings |= {("rope", way): _rope_settings() for way in ("forward", "backward")}
    wanted = [case for case in cases(smoke) if case.tensor_parallel == 1 and case.tokens in (8, 8192)]
    return [
        Contest(case, direction, found)
        for case in wanted
        for (op, direction), found in settings.items()
        if case.op == op
    ]


def measured(contest: Contest, device: torch.device, passes: int, calls: int) -> dict[str, Names]:
    """{setting: microseconds, and how much slower than "as it is"; or its problem}."""
    from benchmarks.measurement import copies, fault, run_of, truths
    from benchmarks.providers import OURS, build, make_inputs
    from benchmarks.timing import Run, difference, measure

    case = contest.case
    inputs = make_inputs(case, device)
    gradients, reference, truth = truths(case, inputs, device)
    function = build(case, OURS, "eager", device)
    rows: dict[str, Names] = {}
    runs: dict[str, Run] = {}

    def failed(label: str, error: Exception) -> None:
        rows[label] = {"problem": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]}

    def add(label: str, active: Callable[[], AbstractContextManager[None]]) -> None:
        with active():
            if problem := fault(case, function, inputs, gradients, reference, truth):
                raise ValueError(problem)
            run = run_of(case, contest.direction, function, inputs, copies(gradients))

        def call() -> None:
            with active():
                run.call()

        runs[label] = Run(call, run.reset)

    for label, active in ((AS_IT_IS, nullcontext), *((one.label, one.active) for one in contest.settings)):
        try:
            add(label, active)
        except Exception as error:  # too many registers or too much shared memory; the others go on
            failed(label, error)
    working_set = sum(x.numel() * x.element_size() for x in inputs)
    samples = measure(runs, device, working_set, passes, calls, failed)
    for label, taken in samples.items():
        rows[label] = {"median_us": taken.median * 1e6, "queued": taken.queued}
        if label != AS_IT_IS and AS_IT_IS in samples:
            slower = difference(taken, samples[AS_IT_IS])
            rows[label] |= {"slower_by_us": slower.seconds * 1e6, "error_us": slower.error * 1e6}
    return rows


def report(name: str, moved: int, copy_us: float, rows: dict[str, Names]) -> list[str]:
    """A contest's lines, the fastest setting first."""
    lines = [f"{name}: {moved / 1e6:.1f} MB, for which a copy takes {copy_us:.1f} us"]
    timed = sorted((row["median_us"], label) for label, row in rows.items() if "median_us" in row)
    for median, label in timed:
        row = rows[label]
        words = f"{row['slower_by_us']:+7.2f} +- {row['error_us']:.2f} us" if "slower_by_us" in row else ""
        wins = "slower_by_us" in row and row["slower_by_us"] < -2 * row["error_us"] and row["queued"]
        unsure = "" if row["queued"] else "  (waited for the host: decides nothing)"
        percent = f"{100 * copy_us / median:5.1f}% of copy"
        lines.append(f"    {label:<36} {median:8.2f} us  {percent}  {words}{'  FASTER' * wins}{unsure}")
    return [*lines, *(f"    {label:<36} {row['problem']}" for label, row in rows.items() if "problem" in row)]


def launches_of(case: "Case") -> list["Launch"]:
    """Every launch of the case's operator, as its module now makes them."""
    op = {"add_rms_norm": "rms_norm"}.get(case.op, case.op)
    model, dtype = case.model, torch.bfloat16
    sizes: dict[str, tuple[int, ...]] = {
        "rms_norm": (model.width,),
        "rope": (model.n_heads, model.n_kv_heads, model.head_dim),
        "swiglu": (),
        "cross_entropy": (model.vocab,),
    }
    return importlib.import_module(f"titan_kernels.{op}").launches(*sizes[op], dtype)


def inspected(contest: Contest, architecture: int) -> list[str]:
    """Lines about the launches that each setting changes."""
    from titan_kernels.ahead_of_time import compile_launch

    usual = launches_of(contest.case)
    changed: dict[str, list[Launch]] = {}
    for setting in contest.settings:
        with setting.active():
            changed[setting.label] = [one for one in launches_of(contest.case) if one not in usual]
    names = {launch.name for launches in changed.values() for launch in launches}
    lines = [contest.name]
    for label, launches in {AS_IT_IS: [one for one in usual if one.name in names], **changed}.items():
        for launch in launches:
            if contest.direction == "step" or (contest.direction == "forward") == ("forward" in launch.name):
                cost = compile_launch(launch, architecture)
                lines.append(
                    f"    {label:<36} {launch.name:<26} {cost.registers:>3} registers, "
                    f"{cost.resident_blocks(architecture):>2} blocks of {cost.threads} threads  "
                    + "; ".join(cost.violations(architecture))
                )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="contests whose name contains this")
    parser.add_argument("--inspect", type=int, metavar="ARCHITECTURE", help="80, 90 or 100: compile, time nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: shows that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder, or a file that ends in .json")
    options = parser.parse_args()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    elif options.inspect is None and not torch.cuda.is_available():
        sys.exit("kernel_settings: needs a GPU, and torch sees none here; --inspect 90 compiles, --smoke rehearses")
    chosen = [contest for contest in contests(options.smoke) if options.only in contest.name]
    if not chosen:
        sys.exit(f"kernel_settings: no contest's name contains {options.only!r}")
    if options.inspect is not None:
        for contest in chosen:
            print(*inspected(contest, options.inspect), sep="\n", flush=True)  # noqa: T201
        return 0
    run(chosen, options.smoke, options.out)
    return 0


def run(chosen: Sequence[Contest], smoke: bool, out: Path) -> None:
    """After each contest, prints it and writes all results so far."""
    from benchmarks import result_files
    from benchmarks.provenance import environment
    from benchmarks.timing import copy_bandwidth

    device = torch.device("cpu" if smoke else "cuda:0")
    about = environment(smoke)
    path = result_files.place(out, "kernel-settings", about["device"])
    before = result_files.read(path) or {"environment": {}, "contests": {}}
    was, now = ({key: one.get(key) for key in ("commit", "versions")} for one in (before["environment"], about))
    found: dict[str, Names] = {name: was | contest for name, contest in before["contests"].items()}
    for contest in chosen:
        traffic = contest.case.traffic
        assert traffic is not None
        moved = traffic.backward if contest.direction == "backward" else traffic.forward
        rows = measured(contest, device, *((1, 1) if smoke else EFFORT))
        copy_us = moved / copy_bandwidth(device, moved) * 1e6
        found[contest.name] = now | {"bytes": moved, "copy_us": copy_us, "settings": rows}
        print(*report(contest.name, moved, copy_us, rows), sep="\n", flush=True)  # noqa: T201
        result_files.write({"environment": about, "contests": found}, path)


if __name__ == "__main__":
    sys.exit(main())
