"""What this device can do at best: copies, matrix products and attention at the models' own shapes, and from these the
least time that a training step could take.

    python -m benchmarks.limits [--smoke] [--out benchmarks/results/limits-DEVICE.json]

The least step is a sum: every matrix product of the step at the rate that this device reaches on it alone, attention
likewise by its fastest backend, and the bytes that everything else must move at the rate of a large copy. Nothing
overlaps, nothing waits, nothing is communicated. The file also serves `python -m titan_fast.estimate --calibrate`.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from titan_kernels.traffic import TRAFFIC
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.conftest import environment
from benchmarks.timing import Run, copy_bandwidth, measure
from benchmarks.workloads import LLAMA_1B, LLAMA_3B, RANK0, SMOKE_MODEL, SMOKE_SEQ_LEN, Workload, shape_of
from titan_fast.config import Config
from titan_fast.flavors import ModelShape
from titan_fast.flops import parameters

WORKLOADS = (LLAMA_1B, LLAMA_3B, *RANK0.values())
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PRODUCTS = ("forward", "grad_input", "grad_weight")
OPTIMIZER_BYTES = 30
"""A parameter: bfloat16 gradient read twice (norm, update), master and two moments read and written, bfloat16 weight
written; FSDP2's float32 gradients make it 32, and its copies more, but that is how and not what."""


@dataclass(frozen=True)
class Matrix:
    """`tokens` rows times a weight [columns, inner]."""

    tokens: int
    columns: int
    inner: int

    @property
    def flops(self) -> int:
        """Of each of the three products."""
        return 2 * self.tokens * self.columns * self.inner

    @property
    def key(self) -> str:
        return f"{self.tokens}x{self.columns}x{self.inner}"


@dataclass(frozen=True)
class AttentionCall:
    """Causal, one block's."""

    batch: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Forward, the unmasked half alone. A backward pass is 2.5 times that."""
        return 2 * self.batch * self.n_heads * self.seq_len * self.seq_len * self.head_dim

    @property
    def key(self) -> str:
        return f"{self.batch}x{self.n_heads}/{self.n_kv_heads}x{self.seq_len}x{self.head_dim}"


BLOCK_MATRICES = ("qkv", "out", "gate", "up", "down")


def matrices(shape: ModelShape, tokens: int) -> dict[str, Matrix]:
    """By name: a block's and the head's."""
    dim, ffn = shape.dim, shape.ffn_dim
    return {
        "qkv": Matrix(tokens, shape.qkv_dim, dim),
        "out": Matrix(tokens, dim, dim),
        "gate": Matrix(tokens, ffn, dim),
        "up": Matrix(tokens, ffn, dim),
        "down": Matrix(tokens, dim, ffn),
        "head": Matrix(tokens, shape.vocab_size, dim),
    }


def attention_call(shape: ModelShape, batch: int, seq_len: int) -> AttentionCall:
    return AttentionCall(batch, shape.n_heads, shape.n_kv_heads, seq_len, shape.head_dim)


@dataclass(frozen=True)
class Limits:
    """Measured (or, for a plan, assumed) rates of a device."""

    bandwidth: float
    """Bytes/s, read and written together."""
    gemm: dict[str, dict[str, float]]
    """FLOP/s by matrix (`Matrix.key`) and product."""
    attention: dict[str, dict[str, dict[str, float]]]
    """FLOP/s by call (`AttentionCall.key`), backend and direction; a direction that failed is missing."""
    assumed_gemm: float = 0.0
    assumed_attention: tuple[float, float] = (0.0, 0.0)

    def product_seconds(self, matrix: Matrix, product: str) -> float:
        rates = self.gemm.get(matrix.key)
        return matrix.flops / (rates[product] if rates else self._median_gemm(product))

    def _median_gemm(self, product: str) -> float:
        """Of all shapes, for one that was not measured."""
        return self.assumed_gemm or statistics.median(rates[product] for rates in self.gemm.values())

    def attention_seconds(self, call: AttentionCall) -> tuple[float, float]:
        """(forward, backward) by the backend that is fastest in both together."""
        if not self.attention:
            forward, backward = self.assumed_attention
            return call.flops / forward, 2.5 * call.flops / backward
        found = self.attention.get(call.key)
        if found is None:  # another batch: the rates of the same heads
            like = [key for key in self.attention if key.partition("x")[2] == call.key.partition("x")[2]]
            found = self.attention[like[0] if like else next(iter(self.attention))]
        whole = [rates for rates in found.values() if {"forward", "backward"} <= rates.keys()]
        times = [(call.flops / rates["forward"], 2.5 * call.flops / rates["backward"]) for rates in whole]
        return min(times, key=sum)


# The figures of DESIGN's model of an H100 SXM, for a plan before anything is measured.
ASSUMED_H100 = Limits(2.9e12, {}, {}, assumed_gemm=700e12, assumed_attention=(600e12, 500e12))


def limits_from(content: dict[str, Any]) -> Limits:
    """From the JSON that `main` writes."""
    return Limits(content["rates"]["bandwidth"], content["gemm_by_shape"], content["attention_by_call"])


def least_step(limits: Limits, config: Config, shape: ModelShape, world: int) -> dict[str, float]:
    """Seconds of each part of the least step of one device, and their "total"; "recomputed" is what the configured
    activation checkpointing adds, and "total" contains it."""
    training = config.training
    tokens = training.local_batch_size * training.seq_len
    found = matrices(shape, tokens)
    call = attention_call(shape, training.local_batch_size, training.seq_len)
    forward, backward = limits.attention_seconds(call)
    gemm = sum(limits.product_seconds(found["head"], product) for product in PRODUCTS)
    gemm += shape.n_layers * sum(limits.product_seconds(found[n], p) for n in BLOCK_MATRICES for p in PRODUCTS)
    parts: dict[str, float] = {
        "matrix products": gemm,
        "attention": shape.n_layers * (forward + backward),
        "memory-bound": (shape.n_layers * block_bytes(shape, tokens, training.seq_len) + end_bytes(shape, tokens))
        / limits.bandwidth,
        "optimizer": OPTIMIZER_BYTES * parameters(shape).total / world / limits.bandwidth,
        "recomputed": _recomputed(limits, config, shape, found, forward),
    }
    return parts | {"total": sum(parts.values())}


def block_bytes(shape: ModelShape, tokens: int, seq_len: int) -> int:
    """What the operators of a block between its matrix products must move, forward and backward."""
    heads = {"n_heads": shape.n_heads, "n_kv_heads": shape.n_kv_heads, "head_dim": shape.head_dim}
    norms = 2 * TRAFFIC["add_rms_norm"](rows=tokens, width=shape.dim).total
    rope = TRAFFIC["rope"](rows=tokens, seq_len=seq_len, **heads).total
    return norms + rope + TRAFFIC["swiglu"](rows=tokens, width=shape.ffn_dim).total


def end_bytes(shape: ModelShape, tokens: int) -> int:
    """Embedding, last norm and cross entropy, forward and backward, in bfloat16."""
    rows = 2 * tokens * shape.dim
    embedding = 2 * rows + rows + 2 * shape.vocab_size * shape.dim
    norm = TRAFFIC["rms_norm"](rows=tokens, width=shape.dim).total
    return embedding + norm + TRAFFIC["cross_entropy"](rows=tokens, vocab=shape.vocab_size).total


def _recomputed(limits: Limits, config: Config, shape: ModelShape, found: dict[str, Matrix], forward: float) -> float:
    """What the mode makes a device compute again at least; with memory_budget that is not known, and counts as none."""
    settings, layers = config.activation_checkpoint, float(shape.n_layers)
    training = config.training
    tokens = training.local_batch_size * training.seq_len
    # Norms and products written again, before they are read as in any backward pass.
    again = {
        "norms": 2 * TRAFFIC["rms_norm"](rows=tokens, width=shape.dim).forward,
        "swiglu": TRAFFIC["swiglu"](rows=tokens, width=shape.ffn_dim).forward,
    }
    pointwise = sum(again.values()) / limits.bandwidth

    def products(*names: str) -> float:
        return sum(limits.product_seconds(found[name], "forward") for name in names)

    if settings.mode == "pointwise":
        return layers * pointwise
    if settings.mode == "selective" and settings.selective_ac_option == "op":
        return layers * (pointwise + products("out", "up"))  # the second and the fourth of a block
    if settings.mode == "full" or settings.mode == "selective":
        blocks = layers if settings.mode == "full" else layers // int(settings.selective_ac_option)
        return blocks * (pointwise + forward + products("qkv", "out", "gate", "up"))  # what down makes, nothing reads
    return 0.0


def measure_limits(device: torch.device, smoke: bool, passes: int, calls: int) -> dict[str, Any]:
    """Everything that a limits file holds but its environment."""
    gemms = {m.key: m for w in WORKLOADS for m in matrices(shape_of(w, False), w.tokens).values()}
    attention = {a.key: a for w in WORKLOADS for a in [attention_call(shape_of(w, False), w.batch, w.seq_len)]}
    if smoke:
        tiny = [_tiny(w) for w in WORKLOADS]
        gemms = {m.key: m for w, shape in tiny for m in matrices(shape, w.batch * SMOKE_SEQ_LEN).values()}
        attention = {a.key: a for w, shape in tiny for a in [attention_call(shape, w.batch, SMOKE_SEQ_LEN)]}
    by_shape = {key: _gemm_rates(matrix, device, passes, calls) for key, matrix in gemms.items()}
    by_call = {key: _attention_rates(call, device, passes, calls) for key, call in attention.items()}
    bandwidth = copy_bandwidth(device)
    return {
        "rates": {
            "bandwidth": bandwidth,
            "gemm": max(rate for rates in by_shape.values() for rate in rates.values()),
            **_best_attention(by_call)[1],
        },
        "attention": _best_attention(by_call)[0],
        "gemm_by_shape": by_shape,
        "attention_by_call": by_call,
    }


def _tiny(workload: Workload) -> tuple[Workload, ModelShape]:
    return workload, shape_of(
        Workload("tiny", "single", workload.flavor, SMOKE_SEQ_LEN, 1, SMOKE_MODEL | {"model.n_layers": 2}), True
    )


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
    found = measure(runs, device, working_set, passes, calls)
    return {name: matrix.flops / samples.median for name, samples in found.items()}


def _attention_rates(call: AttentionCall, device: torch.device, passes: int, calls: int) -> dict[str, dict[str, Any]]:
    backends = BACKENDS if device.type == "cuda" else {"flash": BACKENDS["flash"]}
    found: dict[str, dict[str, Any]] = {}
    for name, backend in backends.items():
        try:
            found[name] = _one_backend(call, backend, device, passes, calls)
        except RuntimeError as error:  # this backend does not take these inputs, or is not built in
            found[name] = {"error": str(error).splitlines()[0][:200]}
    return found


def _one_backend(
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
    samples = measure(runs, device, 2 * 4 * q.numel(), passes, calls)
    return {
        "forward": call.flops / samples["forward"].median,
        "backward": 2.5 * call.flops / samples["backward"].median,
    }


def _best_attention(by_call: dict[str, dict[str, dict[str, Any]]]) -> tuple[str, dict[str, float]]:
    """(backend, its rates) that is fastest on the call that computes most, in the calibration's words."""
    best: tuple[float, str, dict[str, float]] = (math.inf, "", {})
    for backends in by_call.values():
        for name, rates in backends.items():
            if "error" in rates:
                continue
            seconds = 1 / rates["forward"] + 2.5 / rates["backward"]
            if seconds < best[0]:
                best = seconds, name, {f"attention_{way}": rates[way] for way in ("forward", "backward")}
    return best[1], best[2]


def slug(device_name: str) -> str:
    """A device's name as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())


def write(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def summary(content: dict[str, Any]) -> str:
    """Lines for the terminal."""
    rates = content["rates"]
    lines = [f"{content['device']}: copy {rates['bandwidth'] / 1e12:.2f} TB/s, best product {rates['gemm'] / 1e12:.0f}"]
    for key, products in content["gemm_by_shape"].items():
        lines.append(f"  {key:>22}  " + "  ".join(f"{n} {r / 1e12:7.1f}" for n, r in products.items()) + " TFLOP/s")
    for key, backends in content["attention_by_call"].items():
        for name, found in backends.items():
            said = found.get("error") or "  ".join(f"{n} {r / 1e12:7.1f}" for n, r in found.items()) + " TFLOP/s"
            lines.append(f"  {key:>22}  {name}: {said}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: shows that it runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("limits: measures a GPU, and torch sees none here; --smoke rehearses on the CPU")
    device = torch.device("cpu" if options.smoke else "cuda")
    passes, calls = (1, 2) if options.smoke else (3, 6)
    machine = environment(options.smoke)
    content = {"device": machine["device"], "environment": machine} | measure_limits(
        device, options.smoke, passes, calls
    )
    path = options.out or Path(__file__).parent / "results" / f"limits-{slug(machine['device'])}.json"
    write(content, path)
    sys.stdout.write(f"{summary(content)}\nwrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
