"""Compile every kernel launch of the Llama shapes ahead of time, without a GPU, and print what each costs.

    python -m titan_kernels.inspect [--arch 80 90 100] [--shapes llama3_8b ...] [--json]

The column "read twice" is what all programs resident on a device read a second time, and the size of the level-2 cache
which that should come from.

Exits with status 1 if any launch spills, uses double precision, has too few 128-bit loads or stores, does not fit the
device, or reads twice what does not fit its cache; see `titan_kernels.ahead_of_time.Cost.violations`.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch

from titan_kernels.ahead_of_time import CACHE, SHARED_MEMORY, WIDE_SHARE, Cost, compile_launch
from titan_kernels.cross_entropy import launches as cross_entropy_launches
from titan_kernels.launch import Launch
from titan_kernels.llama_shapes import LLAMA
from titan_kernels.rms_norm import launches as rms_norm_launches
from titan_kernels.rope import launches as rope_launches
from titan_kernels.swiglu import launches as swiglu_launches
from titan_kernels.validation import is_interpreted

TENSOR_PARALLEL_DEGREES = (1, 2, 4, 8)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Z_LOSS = 1e-4  # PaLM's

# Launches that may have fewer of their bytes in wide accesses: the least share, and why.
NARROW_LOADS = {
    "cross_entropy_backward": (0.6, "a label and three numbers of the row beside a thread's 32 bytes of logits"),
    "cross_entropy_grad": (0.6, "a label and two numbers of the row beside a thread's 32 bytes of logits"),
    "cross_entropy_with_grad": (0.65, "in float16 a label, its logit and the scale beside 32 bytes of logits"),
}
NARROW_STORES = {
    "rms_norm_sum_partials": (0.0, "reads hundreds of rows of partial sums and writes one"),
    "cross_entropy_forward": (0.0, "writes two numbers a row"),
    "cross_entropy_stats": (0.0, "writes three numbers a row"),
}
UNCACHED = {
    ("cross_entropy_with_grad", "*fp32"): "a row of 128,256 float32 logits for each multiprocessor is 68 MB",
    ("rms_norm_backward", "*fp32"): "four rows of two float32 tensors",
}
"""Launches whose second read is not expected to hit the cache, by the start of their name and the type of their first
pointer, and why."""

Key = tuple[str, str, str, str, int, int]


@dataclass(frozen=True)
class Finding:
    """One launch on one architecture."""

    launch: str
    types: str
    sizes: str
    architecture: int
    cost: Cost
    violations: tuple[str, ...]


def llama_launches(shapes: Iterable[str] = tuple(LLAMA)) -> list[Launch]:
    """Every launch of the named shapes in bfloat16, whole and as a tensor-parallel shard, equal ones once; and of the
    whole ones what else a configuration can ask for: float16, float32, float32 norm weights, a z-loss."""
    found: dict[Key, Launch] = {}
    for name in shapes:
        asked = [_shape_launches(name, degree, BF16) for degree in TENSOR_PARALLEL_DEGREES]
        asked += [_shape_launches(name, 1, dtype) for dtype in (FP16, FP32)]
        asked.append(_shape_launches(name, 1, BF16, norm_weights=FP32, z_loss=Z_LOSS))
        for launch in itertools.chain.from_iterable(asked):
            found.setdefault(_key(launch), launch)
    return list(found.values())


def _shape_launches(
    name: str, degree: int, dtype: torch.dtype, norm_weights: torch.dtype | None = None, z_loss: float = 0.0
) -> list[Launch]:
    shape = LLAMA[name].shard(degree)
    return [
        *rms_norm_launches(shape.width, dtype, norm_weights),
        *rope_launches(shape.n_heads, shape.n_kv_heads, shape.head_dim, dtype),
        *swiglu_launches(dtype),
        *cross_entropy_launches(shape.vocab, dtype, z_loss=z_loss),
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
        violations = cost.violations(
            architecture,
            least_wide_loads=NARROW_LOADS.get(launch.name, (WIDE_SHARE, ""))[0],
            least_wide_stores=NARROW_STORES.get(launch.name, (WIDE_SHARE, ""))[0],
            allow_uncached=_is_uncached(launch),
        )
        types = _types(launch)
        findings.append(Finding(launch.name, types, _sizes(launch), architecture, cost, tuple(violations)))
    return findings


def _is_uncached(launch: Launch) -> bool:
    first = next(iter(launch.signature.values()))
    return any(launch.name.startswith(name) and first == pointer for name, pointer in UNCACHED)


def _types(launch: Launch) -> str:
    """The dtype of the activations, and the weight's if it differs."""
    first, *others = launch.signature.items()
    named = dict(others)
    weight = named.get("WEIGHT", named.get("DWEIGHT", first[1]))
    return first[1].lstrip("*") + (f", weight {weight.lstrip('*')}" if weight != first[1] else "")


def _sizes(launch: Launch) -> str:
    """The constexprs that distinguish launches of one name: integers that are not switches, and a z-loss."""
    values = {k: value for k, value in launch.constexprs.items() if type(value) is int and k != "IGNORE_INDEX"}
    values |= {key: value for key, value in launch.constexprs.items() if key == "Z_LOSS" and value}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _inspect_part(shapes: tuple[str, ...], architecture: int, part: int, parts: int) -> list[Finding]:
    return inspect(llama_launches(shapes)[part::parts], architecture)


def inspect_llama(shapes: Sequence[str], architectures: Sequence[int], processes: int = 2) -> list[Finding]:
    """All launches of `shapes` for all architectures, compiled by `processes` processes in parallel."""
    tasks = [(tuple(shapes), arch, part, processes) for arch in architectures for part in range(processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        results = pool.map(_inspect_part, *zip(*tasks, strict=True))
        return [finding for findings in results for finding in findings]


def table(findings: Sequence[Finding]) -> str:
    """One line per launch."""
    header: tuple[str, ...] = (
        "kernel",
        "types",
        "sizes",
        "sm",
        "threads",
        "regs",
        "stack",
        "shared",
        "128-bit loads",
        "128-bit stores",
        "read twice",
        "verdict",
    )
    rows: list[tuple[str, ...]] = [header]
    for finding in sorted(findings, key=lambda f: (f.launch, f.architecture, f.types, f.sizes)):
        cost, arch = finding.cost, finding.architecture
        numbers = (arch, cost.threads, cost.registers, cost.stack_bytes, cost.shared_bytes)
        wide = (f"{cost.wide_load_share:.0%}", f"{cost.wide_store_share:.0%}")
        twice = f"{cost.cached_bytes(arch) / 1e6:.0f} of {CACHE[arch] / 1e6:.0f} MB" if cost.bytes_read_twice else ""
        verdict = "; ".join(finding.violations) or "ok"
        rows.append((finding.launch, finding.types, finding.sizes, *map(str, numbers), *wide, twice, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m titan_kernels.inspect", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_MEMORY), choices=list(SHARED_MEMORY))
    parser.add_argument("--shapes", nargs="+", default=list(LLAMA), choices=list(LLAMA))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes is {options.processes}, not positive; change it")
    if is_interpreted(swiglu_launches(BF16)[0].kernel):
        parser.error("TRITON_INTERPRET is set, and what is interpreted is not compiled; unset it")
    return report(inspect_llama(options.shapes, options.arch, options.processes), options.json)


def report(findings: Sequence[Finding], as_json: bool) -> int:
    """Prints the findings, and violations on standard error; returns the process's exit status."""
    failed = [finding for finding in findings if finding.violations]
    text = json.dumps([asdict(finding) for finding in findings], indent=1) if as_json else table(findings)
    sys.stdout.write(text + "\n")
    for finding in failed:
        where = f"{finding.launch} ({finding.types}; {finding.sizes}) on sm_{finding.architecture}"
        sys.stderr.write(f"violation: {where}: {'; '.join(finding.violations)}\n")
    sys.stderr.write(f"{len(findings)} launches compiled, {len(failed)} with violations\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
