"""The limits of this device: the rates of copies, and of matrix products and attention at the models' own shapes.

    python -m benchmarks.limits [--smoke] [--out benchmarks/results]

From these rates `least_step` computes the least time of a training step. Each shape is run for a while before it is
measured. What is known after each shape is kept in an `.unfinished` file, from which an interrupted run continues; a
complete file is only replaced by a complete one. It can also be used by `python -m titan_fast.estimate --calibrate`.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.device_state import reader_of
from benchmarks.least_step import BLOCK_MATRICES, AttentionCall, Matrix, attention_call, matrices
from benchmarks.provenance import environment
from benchmarks.result_files import place, read, without_driver, write
from benchmarks.timing import Run, copy_bandwidth, measure
from benchmarks.train_process import end_with_parent
from benchmarks.variants import sentence
from benchmarks.workloads import (
    FLASH_PACKAGES,
    LLAMA_1B,
    LLAMA_3B,
    RANK0,
    SHORT_1B,
    SMOKE_MODEL,
    SMOKE_SEQ_LEN,
    Workload,
    shape_of,
)
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape
from titan_fast.float8 import FORWARD, GRADIENT, product, rounded
from titan_fast.ops import activate_flash

RESULTS = Path(__file__).parent / "results"
WORKLOADS = (LLAMA_1B, replace(LLAMA_1B, batch=4), SHORT_1B, LLAMA_3B, *RANK0.values())
"""The workloads whose shapes are measured: every timed batch except those of searches, which use others' rates."""
IN_FLOAT8 = (LLAMA_1B, RANK0["8b"])
"""Those that are run in float8 too, if only some of their layers."""
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
WARM_SECONDS = 0.5
"""How long a shape is run before it is measured: after idling a GPU runs faster than under load."""


def calls_of(smoke: bool) -> tuple[dict[str, Matrix], dict[str, AttentionCall]]:
    """Every matrix and attention call of timed steps, by key."""
    works = [(w, shape_of(w, False)) for w in WORKLOADS]
    if smoke:
        works = [(replace(w, seq_len=SMOKE_SEQ_LEN, batch=1), _tiny(w)) for w in WORKLOADS]
    gemms = {m.key: m for w, shape in works for m in matrices(shape, w.tokens).values()}
    attention = {a.key: a for w, shape in works for a in [attention_call(shape, w.batch, w.seq_len)]}
    return gemms, attention


def float8_matrices(smoke: bool) -> dict[str, Matrix]:
    """The matrices of blocks that are run in float8, by key."""
    works = [(w, _tiny(w) if smoke else shape_of(w, False)) for w in IN_FLOAT8]
    tokens = {w.name: SMOKE_SEQ_LEN if smoke else w.tokens for w in IN_FLOAT8}
    found = [matrices(shape, tokens[w.name])[name] for w, shape in works for name in BLOCK_MATRICES]
    return {matrix.key: matrix for matrix in found}


def measure_limits(
    device: torch.device, smoke: bool, known: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The contents of a limits file without its environment. known: what an earlier process has measured; save: called
    with all that is known after each shape. The contents are complete before float8 and the packages' attention are
    tried, whatever these do to the process."""
    passes, calls = (1, 2) if smoke else (3, 6)
    gemms, attention = calls_of(smoke)
    found: dict[str, Any] = {"complete": False, "rates": {}, "attention": "", "gemm_by_shape": {}, "clocks": {}}
    found |= {"attention_by_call": {}, "float8_by_shape": {}} | known
    if "bandwidth" not in found["rates"]:
        found["rates"]["bandwidth"] = copy_bandwidth(device)
    for key, call in attention.items():
        if key not in found["attention_by_call"]:
            found["attention_by_call"][key] = _attention_rates(call, device, passes, calls)
            found["clocks"][key] = clock(device)
            save(found)
    for key, matrix in gemms.items():
        if key not in found["gemm_by_shape"]:
            found["gemm_by_shape"][key] = _gemm_rates(matrix, device, passes, calls)
            found["clocks"][key] = clock(device)
            save(found)
    found["attention"], best = _best_attention(found["attention_by_call"])
    fastest = max(rate for rates in found["gemm_by_shape"].values() for rate in rates.values())
    found["rates"] |= {"gemm": fastest, **best}
    found["complete"] = True
    save(found)
    for key, matrix in float8_matrices(smoke).items():
        if key not in found["float8_by_shape"]:
            found["float8_by_shape"][key] = _float8_rates(matrix, device, passes, calls)
            save(found)
    for version in FLASH_PACKAGES:
        for key, call in attention.items():
            rates = found["attention_by_call"][key]
            try:
                rates[version] = _package_rates(version, call, device, passes, calls)
            except torch.AcceleratorError as error:  # this process can measure nothing more
                rates[version] = {"error": sentence(error)}
                return found
            except Exception as error:  # its own compiler has its own exceptions
                rates[version] = {"error": sentence(error)}
            save(found)
    return found


@functools.cache
def _reader(device: torch.device) -> Callable[[], dict[str, float]]:
    source = reader_of(device)
    return source[0] if source is not None else dict


def clock(device: torch.device) -> float | None:
    """The multiprocessors' current clock in MHz; None if it is unknown."""
    return _reader(device)().get("sm_mhz")


def _warm(runs: dict[str, Run], device: torch.device) -> None:
    """Runs the load that is to be measured until clocks and power have settled."""
    until = time.perf_counter() + (WARM_SECONDS if device.type == "cuda" else 0.0)
    while time.perf_counter() < until:
        for run in runs.values():
            run.call()
        torch.cuda.synchronize(device)


def _tiny(workload: Workload) -> ModelShape:
    options = SMOKE_MODEL | {"model.n_layers": 2}
    return shape_of(Workload("tiny", "single", workload.flavor, SMOKE_SEQ_LEN, 1, options), True)


def _gemm_rates(matrix: Matrix, device: torch.device, passes: int, calls: int) -> dict[str, float]:
    generator = torch.Generator(device).manual_seed(5)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).bfloat16()

    x, weight, dy = random(matrix.tokens, matrix.inner), random(matrix.columns, matrix.inner), None
    dy = random(matrix.tokens, matrix.columns)
    runs = {
        "forward": Run(lambda: F.linear(x, weight)),
        "grad_input": Run(lambda: dy @ weight),
        "grad_weight": Run(lambda: dy.t() @ x),
    }
    working_set = 2 * (x.numel() + weight.numel() + dy.numel())
    _warm(runs, device)
    found = measure(runs, device, working_set, passes, calls)
    return {name: matrix.flops / samples.median for name, samples in found.items()}


def _float8_rates(matrix: Matrix, device: torch.device, passes: int, calls: int) -> dict[str, dict[str, Any]]:
    """Of each recipe's products, with the operands rounded before; or why there are none."""
    generator = torch.Generator(device).manual_seed(7)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x, weight = random(matrix.tokens, matrix.inner), random(matrix.columns, matrix.inner)
    dy = random(matrix.tokens, matrix.columns)
    rates: dict[str, dict[str, Any]] = {}
    for recipe, gradient in GRADIENT.items():
        operands = {
            "forward": (rounded(x, FORWARD, recipe), rounded(weight, FORWARD, recipe)),
            "grad_input": (rounded(dy, gradient, recipe), rounded(weight.t(), FORWARD, recipe)),
            "grad_weight": (rounded(dy.t(), gradient, recipe), rounded(x.t(), FORWARD, recipe)),
        }
        runs = {
            name: Run(functools.partial(product, *pair, torch.bfloat16, name == "forward"))
            for name, pair in operands.items()
        }
        try:
            _warm(runs, device)
            found = measure(runs, device, 3 * x.numel() // 2, passes, calls)
            rates[recipe] = {name: matrix.flops / samples.median for name, samples in found.items()}
        except torch.AcceleratorError:  # this process can measure nothing more
            raise
        except RuntimeError as error:
            rates[recipe] = {"error": sentence(error)}
    return rates


def _attention_rates(call: AttentionCall, device: torch.device, passes: int, calls: int) -> dict[str, dict[str, Any]]:
    backends = BACKENDS if device.type == "cuda" else {"flash": BACKENDS["flash"]}
    return {name: _one_backend(call, backend, device, passes, calls) for name, backend in backends.items()}


def _package_rates(version: str, call: AttentionCall, device: torch.device, passes: int, calls: int) -> dict[str, Any]:
    """The rates of FlashAttention 3 or 4, or why it is not available."""
    try:
        activate_flash(version, call.n_heads // call.n_kv_heads, call.head_dim, torch.bfloat16, device)
    except ConfigError as error:
        return {"error": error.what}
    return _one_backend(call, SDPBackend.FLASH_ATTENTION, device, passes, calls)


def _one_backend(
    call: AttentionCall, backend: SDPBackend, device: torch.device, passes: int, calls: int
) -> dict[str, Any]:
    """FLOP/s forward and backward; an error if it does not support these inputs, or is not built in."""
    try:
        return _backend_rates(call, backend, device, passes, calls)
    except torch.AcceleratorError:  # this process can measure nothing more
        raise
    except RuntimeError as error:
        return {"error": sentence(error)}


def _backend_rates(
    call: AttentionCall, backend: SDPBackend, device: torch.device, passes: int, calls: int
) -> dict[str, float]:
    generator = torch.Generator(device).manual_seed(6)

    def random(heads: int) -> Tensor:
        size = (call.batch, heads, call.seq_len, call.head_dim)
        return torch.randn(size, generator=generator, device=device).bfloat16().requires_grad_()

    q, k, v = random(call.n_heads), random(call.n_kv_heads), random(call.n_kv_heads)
    grouped = call.n_heads != call.n_kv_heads

    def forward() -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    out = forward()
    gradient = torch.randn_like(out)
    runs: dict[str, Run] = {
        "forward": Run(forward),
        "backward": Run(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)),
    }
    _warm(runs, device)
    samples = measure(runs, device, 2 * 4 * q.numel(), passes, calls)
    return {
        "forward": call.flops / samples["forward"].median,
        "backward": 2.5 * call.flops / samples["backward"].median,
    }


def _best_attention(by_call: dict[str, dict[str, dict[str, Any]]]) -> tuple[str, dict[str, float]]:
    """(backend, its rates) of the fastest call by a backend that needs no package, under the calibration's names."""
    best: tuple[float, str, dict[str, float]] = (math.inf, "", {})
    for backends in by_call.values():
        for name, rates in backends.items():
            if "error" in rates or name in FLASH_PACKAGES:
                continue
            seconds = 1 / rates["forward"] + 2.5 / rates["backward"]
            if seconds < best[0]:
                best = seconds, name, {f"attention_{way}": rates[way] for way in ("forward", "backward")}
    return best[1], best[2]


def summary(content: dict[str, Any]) -> str:
    """Lines for the terminal."""
    rates = content["rates"]
    lines = [f"{content['device']}: copy {rates['bandwidth'] / 1e12:.2f} TB/s, best product {rates['gemm'] / 1e12:.0f}"]
    for key, products in content["gemm_by_shape"].items():
        lines.append(f"  {key:>22}  " + "  ".join(f"{n} {r / 1e12:7.1f}" for n, r in products.items()) + " TFLOP/s")
    for key, recipes in content.get("float8_by_shape", {}).items():
        for recipe, found in recipes.items():
            said = found.get("error") or "  ".join(f"{n} {r / 1e12:7.1f}" for n, r in found.items()) + " TFLOP/s"
            lines.append(f"  {key:>22}  {recipe} float8: {said}")
    for key, backends in content["attention_by_call"].items():
        for name, found in backends.items():
            said = found.get("error") or "  ".join(f"{n} {r / 1e12:7.1f}" for n, r in found.items()) + " TFLOP/s"
            lines.append(f"  {key:>22}  {name}: {said}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: shows that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder, or a file that ends in .json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # of bench_train
    options = parser.parse_args(argv)
    if options.child:
        end_with_parent()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("limits: needs a GPU, and torch sees none here; --smoke rehearses on the CPU")
    device = torch.device("cpu" if options.smoke else "cuda:0")
    machine = environment(options.smoke)
    head = {"device": machine["device"], "environment": machine}
    path = place(options.out, "limits", machine["device"])
    beside = path.with_suffix(".unfinished")

    def save(found: dict[str, Any]) -> None:
        write(head | found, path if found["complete"] else beside)

    found = measure_limits(device, options.smoke, unfinished(beside, machine), save)
    save(found)
    beside.unlink(missing_ok=True)
    content = head | found
    sys.stdout.write(f"{summary(content)}\nwrote {path}\n")
    return 0


def unfinished(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted process has measured on this device with these versions, or {}."""
    content = read(path) or {}
    there = content.pop("environment", {})
    same = there.get("device") == machine["device"]
    same = same and without_driver(there.get("versions", {})) == without_driver(machine["versions"])
    return {k: v for k, v in content.items() if k != "device"} if same else {}


if __name__ == "__main__":
    sys.exit(main())
