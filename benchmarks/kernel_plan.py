"""The parts of the kernel suite, each with its command and the minutes planned for it on an H100.

    python -m benchmarks.kernel_plan [--results benchmarks/results/kernels-*.json]

A command's `$device` is what `python -m benchmarks.device_state` prints. With results, the time that each part took is
printed beside the plan. A plan is the sum over cases of compilation (SECONDS, caches cold), the check in float32, and
timing: passes x calls of every provider, matrix products at FLOPS and the rest at BYTES per second, eager references at
EAGER_PASSES times the least bytes.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measurement import EFFORT, directions
from benchmarks.providers import Provider, parameter_sizes, providers
from benchmarks.shapes import Case, cases

MINUTES = 8.0  # the most for a part
FLOPS, FLOPS_FLOAT32, BYTES = 600e12, 40e12, 2.9e12
EAGER_PASSES = 8.0
# Assumed for one H100 and 16 host cores; the first run's `case_seconds` replaces them.
SECONDS = {
    "start": 25.0,  # the process, CUDA, the first compilation's workers, the copy's bandwidth
    "block": 12.0,  # a compiled block, forward and backward, as in train_suite
    "piece": 4.0,  # a compiled operator
    "kernel": 1.5,  # an operator of ours or Liger's, the first time at a width
    "quack": 8.0,  # the same for quack's
    "pass": 6e-3,  # the delay behind which calls are queued, and the host's time to queue them
    "host": 2.0,  # all of test_host_overhead's calls of one operator and direction
}


@dataclass(frozen=True)
class Part:
    """`words`: what a test's id must contain, or with "not" must not; also used for pytest's -k."""

    name: str
    words: tuple[str, ...]

    def selects(self, test: str) -> bool:
        return all((word[4:] not in test) if word.startswith("not ") else (word in test) for word in self.words)

    @property
    def command(self) -> str:
        expression = " and ".join(self.words)
        output = f"benchmarks/results/kernels-$device-{self.name}.json"
        return f'pytest benchmarks --benchmark-only -q -k "{expression}" --benchmark-json={output}'


MODELS = {"8b": "llama3_8b", "13b": "llama2_13b", "70b": "llama3_70b"}
PARTS = (
    *(Part(f"block-{name}", (model, "block", "not auto")) for name, model in MODELS.items()),
    *(Part(f"alone-{name}", (model, "alone")) for name, model in MODELS.items()),
    Part("host", ("host_overhead",)),
)
AUTO = Part("auto", ("block", "auto"))
"""To be run once the table is written: whole blocks as `auto` then chooses, beside the reference."""


def cells(case: Case) -> Iterator[tuple[str, Provider]]:
    """(a test's id, its provider), as in test_kernels."""
    for direction in directions(case):
        for provider in providers(case):
            yield f"test_operator[{case.key}-{direction}-{provider.name}]", provider


def planned_seconds(part: Part, smoke: bool = False) -> float:
    from benchmarks.host_calls import HOST_CALLS

    host = len([call for call in HOST_CALLS if part.selects(f"test_host_overhead[{call}]")])
    total, seen = SECONDS["start"] + host * SECONDS["host"], set[tuple[str, str, tuple[int, ...]]]()
    for case in cases(smoke):
        chosen = {provider.name: provider for test, provider in cells(case) if part.selects(test)}
        if "auto" in chosen:
            chosen |= {p.name: p for p in providers(case) if p.name == "compiled"}
        if chosen:
            total += _case_seconds(case, list(chosen.values()), seen)
    return total


def _case_seconds(case: Case, chosen: list[Provider], seen: set[tuple[str, str, tuple[int, ...]]]) -> float:
    """`seen`: the kernels that earlier cases have compiled."""
    passes, calls = EFFORT[case.context]
    total = 0.0
    for provider in chosen:
        kernel = case.op, provider.name, tuple(size for name, size in case.sizes.items() if name != "rows")
        if provider.compiled:
            total += SECONDS["block" if case.op.startswith("block") else "piece"]
        elif provider.name in ("ours", "liger", "quack") and kernel not in seen:
            total += SECONDS["quack" if provider.name == "quack" else "kernel"]
        seen.add(kernel)
        total += passes * len(directions(case)) * SECONDS["pass"]
        total += ((passes + 1) * calls + 2) * _call_seconds(case, provider)  # a warm-up pass, the check, the peak
    return total + _matmul_flops(case) / FLOPS_FLOAT32 + 3 * _call_seconds(case, chosen[0])


def _call_seconds(case: Case, provider: Provider) -> float:
    """Forward and backward."""
    slowdown = 1.0 if provider.compiled or provider.kernels or provider.is_peer else EAGER_PASSES
    if case.traffic is not None:
        return slowdown * case.traffic.total / BYTES
    return _matmul_flops(case) / FLOPS + slowdown * _pointwise_bytes(case) / BYTES


def _matmul_flops(case: Case) -> float:
    """Those of matrix products and attention, forward and backward."""
    if case.context == "alone":
        return 0.0
    model = case.model
    if case.op == "head":
        return 6.0 * case.tokens * model.width * model.vocab
    matrices = sum(size[0] * size[1] for size in parameter_sizes(case) if len(size) == 2)
    attention = 3.5 * 2 * case.tokens * case.seq_len * model.n_heads * model.head_dim  # causal; backward is 2.5 forward
    return 6.0 * case.tokens * matrices + attention


def _pointwise_bytes(case: Case) -> float:
    """An approximation of what everything else in a block, or the loss, must move."""
    model = case.model
    if case.op == "head":
        return 2 * 2.0 * case.tokens * model.vocab
    return 2.0 * case.tokens * (24 * model.width + 8 * model.ffn_width)


def taken_seconds(paths: Sequence[Path]) -> dict[str, float]:
    """By part, what the cases of its file took; the files should be of one device."""
    found = {}
    for path in paths:
        cases_of = {}
        for benchmark in json.loads(path.read_text())["benchmarks"]:
            info = benchmark["extra_info"]
            if "case_seconds" in info:
                cases_of[info["op"], info["model"], info["tensor_parallel"], info["tokens"]] = info["case_seconds"]
        names = [part.name for part in (*PARTS, AUTO) if path.stem.endswith(f"-{part.name}")]
        found[names[0] if names else path.stem] = sum(cases_of.values())
    return found


def plan(taken: dict[str, float]) -> str:
    lines = ["| part | planned, minutes | taken | command |", "| --- | ---: | ---: | --- |"]
    total = 0.0
    for part in (*PARTS, AUTO):
        minutes = planned_seconds(part) / 60
        total += minutes
        measured = f"{taken[part.name] / 60:.1f}" if part.name in taken else ""
        lines.append(f"| {part.name} | {minutes:.1f} | {measured} | `{part.command}` |")
    return "\n".join((*lines, f"| all | {total:.1f} | | |"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_plan", description=__doc__)
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="JSON files of pytest-benchmark")
    sys.stdout.write(plan(taken_seconds(parser.parse_args(arguments).results)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
