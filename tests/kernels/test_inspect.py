"""Ahead-of-time compilation of launches: sound ones pass, unsound ones are reported. Needs no GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from titan_kernels.ahead_of_time import REGISTER_FILE, SHARED_MEMORY, Cost
from titan_kernels.ahead_of_time import _widths as widths

ROOT = Path(__file__).parents[2]
SOUND = Cost(
    registers=64,
    stack_bytes=0,
    shared_bytes=1024,
    threads=256,
    wide_load_share=1.0,
    wide_store_share=0.9,
    double_precision=False,
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process where Triton compiles; with its interpreter there is nothing to inspect."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_launches_of_llama3_8b_on_hopper_are_sound() -> None:
    result = run("-m", "titan_kernels.inspect", "--arch", "90", "--shapes", "llama3_8b", "--json")
    assert result.returncode == 0, result.stderr
    findings = json.loads(result.stdout)
    names = {finding["launch"] for finding in findings}
    assert {finding["types"] for finding in findings} >= {"bf16", "fp16", "fp32", "bf16, weight fp32"}
    assert {"Z_LOSS" in finding["sizes"] for finding in findings} == {True, False}
    rows = [(finding["launch"], finding["types"], finding["sizes"]) for finding in findings]
    assert len(set(rows)) == len(rows), "two launches look alike"
    # Rows of the whole vocabulary, which 132 programs at a time read twice.
    assert {
        f["cost"]["bytes_read_twice"] for f in findings if "VOCAB=128256" in f["sizes"] and "with_grad" in f["launch"]
    } == {256512, 513024}
    for operator in ("rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy"):
        assert f"{operator}_forward" in names
    for finding in findings:
        assert 16 <= finding["cost"]["registers"] <= 255
        assert finding["cost"]["stack_bytes"] == 0
        assert finding["cost"]["threads"] % 32 == 0
        assert not finding["violations"]


def test_vocabularies_that_are_no_multiple_of_16_do_not_spill() -> None:
    """Such as Llama 2's plus a padding token: rows are loaded in narrow pieces, whose addresses need registers."""
    code = """
import torch
from titan_kernels.ahead_of_time import compile_launch
from titan_kernels.cross_entropy import launches
for vocab in (1001, 32001, 50257, 128257):
    for dtype in (torch.bfloat16, torch.float32):
        print(*(compile_launch(launch, 90).stack_bytes for launch in launches(vocab, dtype)))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0"] * 40


def test_rope_backward_divides_in_32_bits() -> None:
    """A division in 64 bits is a function call. Only 2^31 tokens or more need it."""
    code = """
import re
import torch
import triton
from dataclasses import replace
from triton.backends.compiler import GPUTarget
from titan_kernels.ahead_of_time import _source
from titan_kernels.rope import launches
for dtype in (torch.bfloat16, torch.float32):
    backward = launches(32, 8, 128, dtype)[1]
    for n_tokens in ("i32", "i64"):
        launch = replace(backward, signature={**backward.signature, "n_tokens": n_tokens})
        compiled = triton.compile(_source(launch), target=GPUTarget("cuda", 90, 32), options=launch.options)
        print(launch.name, n_tokens, bool(re.search(r"(div|rem)[.][su]64", compiled.asm["ptx"])))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["rope_backward i32 False", "rope_backward i64 True"] * 2


def test_refuses_before_it_compiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from titan_kernels import inspect

    for words, sentence in ((["--processes", "0"], "--processes is 0, not positive"), ([], "TRITON_INTERPRET is set")):
        monkeypatch.setattr(inspect, "is_interpreted", lambda kernel: True)
        with pytest.raises(SystemExit) as stopped:
            inspect.main(words)
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes on two idle cores
def test_every_launch_of_every_shape_is_sound() -> None:
    result = run("-m", "titan_kernels.inspect")
    assert result.returncode == 0, result.stderr
    assert "verdict" in result.stdout


def test_unsound_launches_are_reported() -> None:
    result = run(str(Path(__file__).parent / "unsound_launches.py"))
    assert result.returncode == 1, result.stderr
    violations = {finding["launch"]: " ".join(finding["violations"]) for finding in json.loads(result.stdout)}
    assert "to the stack" in violations["spilling"]
    assert violations["double"] == "arithmetic in double precision"
    assert "only 0% of the loaded bytes in 128-bit loads" in violations["scattered"]
    assert "only 0% of the stored bytes in 128-bit stores" in violations["scattered"]
    assert "violation: double (fp32; BLOCK=1024) on sm_90: arithmetic in double precision" in result.stderr


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("registers", REGISTER_FILE // 256 + 1, "exceed the file of 65536"),
        ("shared_bytes", SHARED_MEMORY[80] + 1, "bytes of shared memory exceed"),
        ("stack_bytes", 8, "spills 8 bytes per thread"),
        ("wide_load_share", 0.69, "only 69% of the loaded bytes in 128-bit loads"),
        ("wide_store_share", 0.69, "only 69% of the stored bytes in 128-bit stores"),
        ("bytes_read_twice", 100_000, "reads 43 MB twice at a time, more than the cache's 42 MB"),
    ],
)
def test_each_limit_is_checked(field: str, value: int, words: str) -> None:
    assert SOUND.violations(80) == []
    broken = Cost(**{**vars(SOUND), field: value})
    (violation,) = broken.violations(80)
    assert words in violation


def test_how_many_blocks_a_multiprocessor_holds() -> None:
    assert SOUND.resident_blocks(90) == 4  # 64 registers x 256 threads
    assert replace(SOUND, registers=33).resident_blocks(90) == 6  # 40 registers are handed out
    assert replace(SOUND, registers=16).resident_blocks(90) == 8  # 2048 threads
    assert replace(SOUND, registers=16, threads=32).resident_blocks(90) == 32
    assert replace(SOUND, shared_bytes=100 * 1024).resident_blocks(90) == 2
    assert replace(SOUND, max_resident=1).resident_blocks(90) == 1
    assert replace(SOUND, bytes_read_twice=1000).cached_bytes(90) == 132 * 4 * 1000


def test_loads_of_one_address_are_counted_once() -> None:
    text = """
        @%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
        @%p1 ld.global.b32 { %r2 }, [ %rd1 + 0 ];
        @%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd2 + 0 ];
        @%p1 st.global.b32 [ %rd3 + 0 ], { %r1 };
        @%p1 st.global.v2.b32 [ %rd3 + 0 ], { %r1, %r2 };
    """
    assert widths(text, "ld") == [32, 128]
    assert widths(text, "st") == [32, 64]


def test_interpreted_kernels_are_refused() -> None:
    code = "from titan_kernels.inspect import inspect, llama_launches; inspect(llama_launches(['llama3_8b'])[:1], 90)"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "unset TRITON_INTERPRET" in result.stderr
