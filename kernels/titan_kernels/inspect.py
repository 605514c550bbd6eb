"""Compile every kernel launch of the Llama shapes ahead of time, without a GPU, and say what each costs.

    python -m titan_kernels.inspect [--arch 80 90 100] [--shapes llama3_8b ...] [--json]

Exits with status 1 if any launch spills, uses double precision, has no 128-bit loads or stores, or does not fit the
part; see `titan_kernels.ahead_of_time.Cost.violations`.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch

from titan_kernels.ahead_of_time import SHARED_MEMORY, Cost, compile_launch
from titan_kernels.launch import Launch
from titan_kernels.llama_shapes import LLAMA

TENSOR_PARALLEL_DEGREES = (1, 8)
DTYPE = torch.bfloat16  # what these models train in

# Launches that store little, so that the width of their stores is of no matter, and why.
NARROW_STORES = {
    "rms_norm_sum_partials": "reads hundreds of rows of partial sums and writes one",
    "cross_entropy_forward": "writes two numbers a row",
    "cross_entropy_stats": "writes three numbers a row",
}

Key = tuple[str, str, str, str, int, int]


@dataclass(frozen=True)
class Finding:
    """One launch on one architecture."""

    launch: str
    sizes: str
    architecture: int
    cost: Cost
    violations: tuple[str, ...]


def llama_launches(shapes: Iterable[str] = tuple(LLAMA)) -> list[Launch]:
    """Every launch of the named shapes, whole and as one of eight tensor-parallel shards, equal ones once."""
    found: dict[Key, Launch] = {}
    for name in shapes:
        for degree in TENSOR_PARALLEL_DEGREES:
            for launch in _shape_launches(name, degree):
                found.setdefault(_key(launch), launch)
    return list(found.values())


def _shape_launches(name: str, degree: int) -> list[Launch]:
    # The modules' names are shadowed in the package by the operators of the same name.
    from titan_kernels.cross_entropy import launches as cross_entropy_launches
    from titan_kernels.rms_norm import launches as rms_norm_launches
    from titan_kernels.rope import launches as rope_launches
    from titan_kernels.swiglu import launches as swiglu_launches

    shape = LLAMA[name].shard(degree)
    return [
        *rms_norm_launches(shape.width, DTYPE),
        *rope_launches(shape.n_heads, shape.n_kv_heads, shape.head_dim, DTYPE),
        *swiglu_launches(DTYPE),
        *cross_entropy_launches(shape.vocab, DTYPE),
    ]


def _key(launch: Launch) -> Key:
    return (
        launch.name,
        str(sorted(launch.signature.items())),
        str(sorted(launch.constexprs.items())),
        str(launch.aligned),
        launch.num_warps,
        launch.num_stages,
    )


def inspect(launches: Sequence[Launch], architecture: int) -> list[Finding]:
    """The cost of each launch, compiled in this process."""
    findings = []
    for launch in launches:
        cost = compile_launch(launch, architecture)
        violations = cost.violations(architecture, allow_narrow_stores=launch.name in NARROW_STORES)
        findings.append(Finding(launch.name, _sizes(launch), architecture, cost, tuple(violations)))
    return findings


def _sizes(launch: Launch) -> str:
    """The constexprs that tell launches of one name apart: the integers that are no switches."""
    values = {key: value for key, value in launch.constexprs.items() if type(value) is int}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _inspect_part(shapes: tuple[str, ...], architecture: int, part: int, parts: int) -> list[Finding]:
    return inspect(llama_launches(shapes)[part::parts], architecture)


def inspect_llama(shapes: Sequence[str], architectures: Sequence[int], processes: int = 2) -> list[Finding]:
    """All launches of `shapes` for all architectures, compiled by `processes` processes side by side."""
    tasks = [(tuple(shapes), arch, part, processes) for arch in architectures for part in range(processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        results = pool.map(_inspect_part, *zip(*tasks, strict=True))
        return [finding for findings in results for finding in findings]


def table(findings: Sequence[Finding]) -> str:
    """One line a launch."""
    header: tuple[str, ...] = (
        "kernel",
        "sizes",
        "sm",
        "threads",
        "regs",
        "stack",
        "shared",
        "128-bit loads",
        "128-bit stores",
        "verdict",
    )
    rows: list[tuple[str, ...]] = [header]
    for finding in sorted(findings, key=lambda f: (f.launch, f.architecture, f.sizes)):
        cost = finding.cost
        numbers = (finding.architecture, cost.threads, cost.registers, cost.stack_bytes, cost.shared_bytes)
        wide = (f"{cost.wide_load_share:.0%}", f"{cost.wide_store_share:.0%}")
        rows.append((finding.launch, finding.sizes, *map(str, numbers), *wide, "; ".join(finding.violations) or "ok"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m titan_kernels.inspect", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_MEMORY), choices=list(SHARED_MEMORY))
    parser.add_argument("--shapes", nargs="+", default=list(LLAMA), choices=list(LLAMA))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    return report(inspect_llama(options.shapes, options.arch, options.processes), options.json)


def report(findings: Sequence[Finding], as_json: bool) -> int:
    """Prints the findings, violations by name on standard error; the process's exit status."""
    failed = [finding for finding in findings if finding.violations]
    text = json.dumps([asdict(finding) for finding in findings], indent=1) if as_json else table(findings)
    sys.stdout.write(text + "\n")
    for finding in failed:
        where = f"{finding.launch} ({finding.sizes}) on sm_{finding.architecture}"
        sys.stderr.write(f"violation: {where}: {'; '.join(finding.violations)}\n")
    sys.stderr.write(f"{len(findings)} launches compiled, {len(failed)} with violations\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
