"""Run by test_inspect.py in a process without Triton's interpreter: launches that break the rules, and their report."""

import sys

import triton
import triton.language as tl
from titan_kernels import inspect
from titan_kernels.launch import Launch


@triton.jit
def spilling(X, Y, BLOCK: tl.constexpr):
    """256 values per thread, all needed after the reduction, do not fit 255 registers."""
    columns = tl.arange(0, BLOCK)
    x = tl.load(X + columns)
    tl.store(Y + columns, x - tl.max(x, 0))


@triton.jit
def double(X, Y, factor, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(Y + columns, (tl.load(X + columns) * factor).to(tl.float32))


@triton.jit
def scattered(X, Y, stride, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(Y + columns * stride, tl.load(X + columns * stride))


POINTERS = {"X": "*fp32", "Y": "*fp32"}
LAUNCHES = [
    Launch("spilling", spilling, POINTERS, {"BLOCK": 32768}, 4, aligned=("X", "Y")),
    Launch("double", double, {**POINTERS, "factor": "fp64"}, {"BLOCK": 1024}, 4, aligned=("X", "Y")),
    Launch("scattered", scattered, {**POINTERS, "stride": "i32"}, {"BLOCK": 1024}, 4, aligned=("X", "Y")),
]

if __name__ == "__main__":
    sys.exit(inspect.report(inspect.inspect(LAUNCHES, 90), as_json=True))
