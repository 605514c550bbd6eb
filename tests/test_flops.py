"""Counts against published models and Hugging Face, FLOPs against torch's own counter, MFU against published rows."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from titan_fast import flops
from titan_fast.errors import ConfigError
from titan_fast.flavors import FLAVORS, ModelShape
from titan_fast.flops import (
    FORMULAS,
    Formula,
    flops_per_token,
    known_peak,
    mfu,
    parameter_count,
    parameters,
    peak_flops,
)

PUBLISHED_PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.1_405b": 405_853_388_800,
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
}

# torchtitan's docs/performance.md of 2024, 64 A100-80GB: model, sequence, tokens/s per GPU, MFU in percent.
PUBLISHED_MFU = [
    ("llama3_8b", 8192, 2904, 56.8),
    ("llama3_8b", 8192, 2973, 58.2),
    ("llama3_70b", 8192, 331, 51.7),
    ("llama2_13b", 4096, 2162, 61.1),
    ("llama2_13b", 4096, 1914, 54.1),
    ("llama2_13b", 4096, 1904, 53.8),
    ("llama2_70b", 4096, 355, 50.8),
    ("llama2_70b", 4096, 353, 50.5),
]

SMALL = ModelShape(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=160, vocab_size=96, max_seq_len=64)


def hugging_face(shape: ModelShape) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=shape.dim,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            intermediate_size=shape.ffn_dim,
            vocab_size=shape.vocab_size,
            tie_word_embeddings=shape.tied,
            attn_implementation="eager",  # counted as the two full matrix products that the formula assumes
        )
    )


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_published_parameter_counts(name: str) -> None:
    assert parameter_count(FLAVORS[name]) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_hugging_faces(tied: bool) -> None:
    shape = dataclasses.replace(SMALL, tied=tied)
    model, count = hugging_face(shape), parameters(shape)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert count.total == sum(sizes.values())
    assert count.embedding == sizes["model.embed_tokens.weight"]
    assert count.head == sizes.get("lm_head.weight", 0)
    assert count.norm == sizes["model.norm.weight"]
    block = {name: size for name, size in sizes.items() if ".layers.1." in name}
    assert count.block_norms == sum(size for name, size in block.items() if "norm" in name)
    assert count.block_matrices == sum(size for name, size in block.items() if "proj" in name)


@pytest.mark.parametrize("tied", [False, True])
def test_matrix_flops_are_those_that_torch_counts(tied: bool) -> None:
    """`titan` is what forward and backward multiply, except that 6N also counts the norm weights."""
    shape, batch, seq_len = dataclasses.replace(SMALL, tied=tied), 2, 48
    model, count = hugging_face(shape), parameters(shape)
    tokens = torch.randint(shape.vocab_size, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    norms = count.n_layers * count.block_norms + count.norm
    per_token = flops_per_token(shape, seq_len, "titan") - 6 * norms
    assert counter.get_total_flops() == per_token * batch * seq_len


def test_formulas_differ_by_what_they_say() -> None:
    palm, titan, causal = (flops_per_token(SMALL, 64, formula) for formula in FORMULAS)
    assert palm - titan == 6 * SMALL.vocab_size * SMALL.dim
    assert titan - causal == 6 * SMALL.n_layers * SMALL.dim * 64
    tied = dataclasses.replace(SMALL, tied=True)
    assert flops_per_token(tied, 64, "palm") == flops_per_token(tied, 64, "titan") == titan


@pytest.mark.parametrize(("name", "seq_len", "tokens_per_second", "percent"), PUBLISHED_MFU)
def test_published_mfu(name: str, seq_len: int, tokens_per_second: float, percent: float) -> None:
    share = mfu(tokens_per_second, flops_per_token(FLAVORS[name], seq_len, "palm"), 312e12)
    assert 100 * share == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize(
    ("formula", "gflop"), [("titan", 57.86), ("titan_causal", 51.47)]
)  # of Llama 3 8B at 8192, as NVIDIA's benchmark pages have them (the first as 4.74e14 FLOPs per sequence)
def test_flops_that_others_published(formula: Formula, gflop: float) -> None:
    assert flops_per_token(FLAVORS["llama3_8b"], 8192, formula) / 1e9 == pytest.approx(gflop, rel=1.1e-3)


def test_unknown_formula() -> None:
    with pytest.raises(ConfigError, match="unknown MFU formula 'hfu'; known: palm, titan, titan_causal"):
        flops_per_token(SMALL, 64, "hfu")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        (" NVIDIA H200 ", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362.05),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_of_known_devices(device: str, tflops: float) -> None:
    assert peak_flops(device) == tflops * 1e12
    peak = known_peak(device)
    assert peak is not None
    assert peak.source


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A100X",
        "NVIDIA L40",
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "NVIDIA H20",
        "NVIDIA H800",
        "Tesla V100-SXM2-16GB",
        "cpu",
        "",
    ],
)
def test_no_peak_is_guessed(device: str) -> None:
    assert peak_flops(device) is None
    assert repr(device) in flops.unknown_peak_sentence(device)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "titan_fast.flops", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_command() -> None:
    words = "--model llama3_8b --seq-len 8192 --tokens-per-second 2904 --peak-tflops 312 --formula palm"
    result = run(*words.split())
    assert result.returncode == 0
    for expected in ("8,030,261,248", "61,066,469,376 by palm", "57,914,449,920 by titan", "56.8% by palm"):
        assert expected in result.stdout
    assert result.stdout.count("MFU ") == 1


def test_command_with_a_device_prints_every_formula() -> None:
    result = run("--model", "llama3_8b", "--tokens-per-second", "10682", "--device", "NVIDIA H100 80GB HBM3")
    # What NVIDIA published for these tokens/s (62.47%), and its halved count.
    assert "62.6% by titan:" in result.stdout
    assert "55.6% by titan_causal" in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model llama3_8", "unknown model 'llama3_8'; did you mean llama3_8b?"),
        ("--model debug --device potato --tokens-per-second 1", "unknown device 'potato'; give --peak-tflops"),
        ("--model debug --tokens-per-second 1", "MFU needs the device's peak; give --peak-tflops or --device"),
        ("--model debug --tokens-per-second nan --peak-tflops 1", "--tokens-per-second is nan, not a positive number"),
        (
            "--model llama3_8b --tokens-per-second 1e9 --peak-tflops 312",
            "--tokens-per-second 1e+09 is 1.65e+05 times what a device of 312 TFLOP/s can do by titan_causal",
        ),
        (
            "--model llama3_8b --tokens-per-second 7000 --peak-tflops 312",
            "--tokens-per-second 7000 is 1.155 times what a device of 312 TFLOP/s can do by titan_causal",
        ),
        ("--model debug --seq-len 0", "--seq-len is 0, not a positive number"),
        ("--model debug --seq-len 4096", "--seq-len 4096 is beyond the 2048 tokens that debug is made for"),
        ("--model debug --seq-len many", "argument --seq-len: invalid int value: 'many'"),
        ("--model debug --peak-tflops 1 --device x", "both --peak-tflops and --device are given"),
        ("--seq-len 5", "the following arguments are required: --model"),
    ],
)
def test_command_refuses_in_one_line(words: str, sentence: str) -> None:
    result = run(*words.split())
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"titan_fast: {sentence}")
    assert result.stderr.count("\n") == 1


def test_counting_needs_no_torch() -> None:
    code = "import sys, titan_fast.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
