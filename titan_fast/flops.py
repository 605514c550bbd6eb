"""Parameters and FLOPs of a Llama, peaks of known GPUs, and model FLOPs utilisation (MFU).

    python -m titan_fast.flops --model llama3_8b --seq-len 8192 --tokens-per-second 2904 --peak-tflops 312

MFU figures can only be compared if their formula is the same, so here each is named with its formula. No formula counts
what a run recomputes (activation checkpointing, flash attention's backward): that is work, not progress.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from typing import Literal, get_args

from titan_fast.command_line import Parser
from titan_fast.errors import ConfigError, command, did_you_mean
from titan_fast.flavors import FLAVORS, ModelShape

Formula = Literal["palm", "titan", "titan_causal"]
FORMULAS: tuple[Formula, ...] = get_args(Formula)

EXPLANATION: dict[Formula, str] = {
    "palm": "6 x all parameters + 12 x layers x heads x head dimension x sequence (PaLM, appendix B)",
    "titan": "palm without the input embedding, a look-up; a tied one is kept, as the head (unlike in torchtitan)",
    "titan_causal": "titan with half the attention term, as causal attention computes",
}


@dataclass(frozen=True)
class Parameters:
    """The parameters of a Llama, by part."""

    embedding: int
    block_matrices: int
    """Of one block: packed q, k, v; attention output; gate, up, down."""
    block_norms: int
    """Of one block."""
    n_layers: int
    norm: int
    """The last one, before the head."""
    head: int
    """0 if it is the embedding's matrix."""

    @property
    def total(self) -> int:
        return self.embedding + self.n_layers * (self.block_matrices + self.block_norms) + self.norm + self.head

    @property
    def without_lookup(self) -> int:
        """Without an embedding that is only looked up. A tied one is counted, as the head multiplies by it."""
        return self.total - (self.embedding if self.head else 0)


def parameters(shape: ModelShape) -> Parameters:
    """The exact counts of `shape`, by part."""
    return Parameters(
        embedding=shape.vocab_size * shape.dim,
        block_matrices=shape.dim * (shape.qkv_dim + shape.dim + 3 * shape.ffn_dim),
        block_norms=2 * shape.dim,
        n_layers=shape.n_layers,
        norm=shape.dim,
        head=0 if shape.tied else shape.vocab_size * shape.dim,
    )


def parameter_count(shape: ModelShape) -> int:
    """All parameters; a tied matrix is counted once."""
    return parameters(shape).total


def attention_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """QK^T and its product with V, forward and backward, each position attending to all `seq_len` of them."""
    return 12 * shape.n_layers * shape.n_heads * shape.head_dim * seq_len


def flops_per_token(shape: ModelShape, seq_len: int, formula: Formula) -> int:
    """FLOPs of forward and backward per trained token; a multiplication and its addition are two.

    A matrix costs 2 FLOPs per element and token forward and 4 backward. `palm` is Chowdhery et al. 2022 (appendix B),
    `titan` is `torchtitan/models/utils.py`, which leaves out a tied head, and `titan_causal` is what NVIDIA reports
    since NeMo 25.09.
    """
    attention = attention_flops_per_token(shape, seq_len)
    match formula:
        case "palm":
            return 6 * parameters(shape).total + attention
        case "titan":
            return 6 * parameters(shape).without_lookup + attention
        case "titan_causal":
            return 6 * parameters(shape).without_lookup + attention // 2
    raise ConfigError(f"unknown MFU formula {formula!r}", f"known: {', '.join(FORMULAS)}")


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Fraction of the peak that one device's tokens/s amount to; `peak` in FLOP/s."""
    return tokens_per_second * flops_per_token / peak


@dataclass(frozen=True)
class Peak:
    """Dense bf16 tensor-core FLOP/s, accumulated in fp32, at the boost clock. Data sheets that give the rate with
    structured sparsity give twice this."""

    name: str
    pattern: str
    """Matches the start of the name from torch.cuda.get_device_name."""
    flops: float
    source: str


# Patterns are strict on purpose. Names that differ by a word differ in speed (RTX 4090 D, Laptop GPU, A100X), and a
# guessed peak is worse than none. Hopper's are rounded down, as in all published MFU.
PEAKS: tuple[Peak, ...] = (
    Peak("A100", r"(NVIDIA )?A100[- ](SXM4?-|PCIE-)?(40|80)GB( PCIe)?$", 312e12, "NVIDIA A100 data sheet: 312"),
    Peak("H100 PCIe", r"NVIDIA H100 PCIe$", 756e12, "NVIDIA H100 data sheet, PCIe: 1513 with sparsity"),
    Peak("H100 NVL", r"NVIDIA H100 NVL$", 835e12, "NVIDIA H100 data sheet, NVL: 1671 with sparsity"),
    Peak("H100 SXM", r"NVIDIA H100( \d+GB HBM3)?$", 989e12, "NVIDIA H100 data sheet, SXM: 1979 with sparsity"),
    Peak("H200 NVL", r"NVIDIA H200 NVL$", 835e12, "NVIDIA H200 data sheet, NVL: 1671 with sparsity"),
    Peak("H200", r"NVIDIA H200$", 989e12, "NVIDIA H200 data sheet, SXM: 1979 with sparsity"),
    Peak("B200", r"NVIDIA B200$", 2250e12, "NVIDIA Blackwell data sheet, HGX B200: 4500 with sparsity"),
    Peak("RTX 4090", r"NVIDIA GeForce RTX 4090$", 165.2e12, "NVIDIA Ada GPU architecture white paper: 165.2"),
    Peak("L40S", r"NVIDIA L40S$", 362.05e12, "NVIDIA L40S data sheet: 362.05"),
    Peak("MI300X", r"AMD Instinct MI300X( OAM)?$", 1307.4e12, "AMD Instinct MI300X data sheet: 1307.4"),
)


def known_peak(device_name: str) -> Peak | None:
    """The entry of PEAKS for a name from torch.cuda.get_device_name. None if it is unknown, and for a MIG slice
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), whose peak is a fraction of its GPU's."""
    return next((peak for peak in PEAKS if re.match(peak.pattern, device_name.strip())), None)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device, or None if unknown."""
    peak = known_peak(device_name)
    return peak.flops if peak else None


def unknown_peak_sentence(device_name: str) -> str:
    """Why there is no MFU."""
    return f"no MFU: the peak of {device_name!r} is not known (known: {', '.join(peak.name for peak in PEAKS)})"


def _shape(name: str) -> ModelShape:
    if name not in FLAVORS:
        raise ConfigError(f"unknown model {name!r}", f"{did_you_mean(name, FLAVORS)}known: {', '.join(FLAVORS)}")
    return FLAVORS[name]


def _peak(arguments: argparse.Namespace) -> tuple[float, str] | None:
    """(FLOP/s, where from) of the command line's --peak-tflops or --device."""
    if arguments.peak_tflops is not None:
        return arguments.peak_tflops * 1e12, "given"
    if arguments.device is None:
        return None
    peak = known_peak(arguments.device)
    if peak is None:
        known = ", ".join(entry.name for entry in PEAKS)
        raise ConfigError(
            f"unknown device {arguments.device!r}",
            f"give --peak-tflops, or torch's full name for one of {known}",
        )
    return peak.flops, peak.source


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="titan_fast.flops",
        description="Exact parameters, FLOPs per token and MFU of a Llama.",
        epilog="Formulas: " + "; ".join(f"{name}: {text}" for name, text in EXPLANATION.items()) + ".",
    )
    parser.add_argument("--model", required=True, help=f"one of {', '.join(FLAVORS)}")
    parser.add_argument("--seq-len", type=int, help="tokens per sequence; default: the model's longest")
    parser.add_argument("--tokens-per-second", type=float, help="of one device; prints MFU")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of one device, in TFLOP/s")
    parser.add_argument("--device", help='instead of --peak-tflops: its name, like "NVIDIA H100 80GB HBM3"')
    parser.add_argument("--formula", choices=FORMULAS, help="for the MFU to print; default: all")
    arguments = parser.parse_args(argv)
    if arguments.peak_tflops is not None and arguments.device is not None:
        raise ConfigError("both --peak-tflops and --device are given", "give one of them")
    for name in ("seq_len", "tokens_per_second", "peak_tflops"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, not a positive number", "change it")
    return arguments


def report(arguments: argparse.Namespace) -> list[str]:
    """The lines that the command prints."""
    shape = _shape(arguments.model)
    seq_len = arguments.seq_len or shape.max_seq_len
    if seq_len > shape.max_seq_len:
        raise ConfigError(
            f"--seq-len {seq_len} is beyond the {shape.max_seq_len} tokens that {arguments.model} is made for",
            "lower it",
        )
    count, peak = parameters(shape), _peak(arguments)
    if arguments.tokens_per_second is not None and peak is None:
        raise ConfigError("MFU needs the device's peak", "give --peak-tflops or --device")
    head = f"head {count.head:,}" if count.head else "the head is the embedding"
    lines = [
        f"{arguments.model}, seq_len {seq_len}",
        f"parameters      {count.total:,}",
        f"                embedding {count.embedding:,}; {count.n_layers} blocks of {count.block_matrices:,} in "
        f"matrices and {count.block_norms:,} in norms; last norm {count.norm:,}; {head}",
    ]
    for formula in FORMULAS:
        per_token = flops_per_token(shape, seq_len, formula)
        lines.append(f"FLOPs per token {per_token:,} by {formula}: {EXPLANATION[formula]}")
    if arguments.tokens_per_second is not None and peak is not None:
        least = mfu(arguments.tokens_per_second, flops_per_token(shape, seq_len, "titan_causal"), peak[0])
        if least > 1:
            raise ConfigError(
                f"--tokens-per-second {arguments.tokens_per_second:g} is {least:.4g} times what a device of "
                f"{peak[0] / 1e12:g} TFLOP/s can do by titan_causal, the least of the formulas",
                "give the tokens/s of one device, and its peak in TFLOP/s",
            )
        for formula in [arguments.formula] if arguments.formula else FORMULAS:
            share = mfu(arguments.tokens_per_second, flops_per_token(shape, seq_len, formula), peak[0])
            lines.append(
                f"MFU             {share:.1%} by {formula}: {arguments.tokens_per_second:g} tokens/s per device of "
                f"{peak[0] / 1e12:g} TFLOP/s ({peak[1]})"
            )
    return lines


@command
def main() -> None:
    for line in report(_parse(sys.argv[1:])):
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
