"""What the kernels read and write, element by element: nothing beside their tensors, nothing that another program
writes, and no more bytes than the formulas say. On a GPU compute-sanitizer looks for the first."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import titan_kernels
from titan_kernels import traffic
from torch.utils._pytree import tree_leaves

from tests.kernels.accesses import Accesses, recorded
from tests.kernels.operators import with_gaps

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")

EPS = 1e-5
BF16 = torch.bfloat16
WIDE = 20000  # columns that no norm holds in registers
STREAMS = {"X", "RESIDUAL", "DY", "DY2", "S", "DRESIDUAL", "QKV", "DQ", "DK", "DV", "GATE", "UP", "DH", "LOGITS"}
"""Large tensors that are read. Others, as weights and tables, are read by many programs from cache."""
BARRIERS = {
    "rms_norm_backward": {"PARTIALS"},  # of rows that do not fit in registers: the sums over a row are between
    "cross_entropy_with_grad": {"LOGITS"},
    "cross_entropy_grad": {"LOGITS"},  # not needed: each thread writes what it has read
}
"""What a program reads and writes, or writes twice, by the beginning of the launch's name."""


def forward_and_backward(function: Callable[..., Any], *inputs: Tensor, gradients: Any = torch.ones_like) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = tree_leaves(function(*leaves))
    torch.autograd.grad(outputs, leaves, [gradients(output) for output in outputs])


def norms(x: Tensor) -> None:
    weight = x.new_ones(x.shape[-1])
    matrices = x.new_ones(3, x.shape[-1]), x.new_ones(5, x.shape[-1])
    forward_and_backward(lambda x, w: titan_kernels.rms_norm(x, w, EPS), x, weight)
    forward_and_backward(lambda x, r, w: titan_kernels.add_rms_norm(x, r, w, EPS), x, with_gaps(x), weight)
    for given in (matrices[:1], matrices):
        forward_and_backward(
            lambda x, r, w, *m: titan_kernels.norm_linear(x, r, w, EPS, m), x, with_gaps(x), weight, *given
        )
        forward_and_backward(lambda x, w, *m: titan_kernels.norm_linear(x, None, w, EPS, m)[:-1], x, weight, *given)


def swiglus(gate: Tensor) -> None:
    for up in (gate, with_gaps(gate)):
        forward_and_backward(titan_kernels.swiglu, gate, up.cos())
        forward_and_backward(titan_kernels.swiglu_linear, gate, up.sin(), gate.new_ones(3, gate.shape[-1]))


def ropes(head: Tensor) -> None:
    """Of two sequences with as many tokens as `head` has rows, in 4 + 2 * 2 heads as wide."""
    qkv = head.repeat(2, 1, 8)
    qkv = qkv if head.is_contiguous() else with_gaps(qkv)
    angle = torch.ones(len(head), head.shape[1] // 2)

    def scattered(output: Tensor) -> Tensor:
        return with_gaps(output.detach().transpose(1, 3)).transpose(1, 3)

    for gradients in (torch.ones_like, with_gaps, scattered):
        forward_and_backward(lambda x: titan_kernels.rope(x, angle, angle, 4, 2), qkv, gradients=gradients)


def cross_entropies(logits: Tensor) -> None:
    vocab = logits.shape[1]
    labels = torch.tensor([0, vocab - 1, -100, vocab, 2**40, -1]).repeat(len(logits))[: len(logits)]
    numbers, one = torch.ones(len(logits)), torch.ones(())
    forward_and_backward(lambda x: titan_kernels.cross_entropy(x, labels, z_loss=1e-2), logits)
    titan_kernels.cross_entropy_with_grad_(with_gaps(logits), labels, one)
    for offset in (0, 7, 2**31):
        titan_kernels.cross_entropy_stats(logits, labels, offset)
        titan_kernels.cross_entropy_grad_(with_gaps(logits), labels, offset, numbers, one)


SMALL = [*product((1, 3, 9), (1, 7, 129, 1000))]  # rows and columns
CASES: dict[Callable[[Tensor], None], Sequence[tuple[int, int]]] = {
    norms: [*SMALL, (9, 8193)],
    swiglus: SMALL,
    ropes: [*product((1, 3, 9), (2, 14, 96, 128))],
    cross_entropies: [*SMALL, (3, WIDE)],
}


@pytest.mark.parametrize(
    ("calls", "rows", "width"),
    [
        pytest.param(calls, *size, id=f"{calls.__name__}-{size[0]}-{size[1]}")
        for calls, sizes in CASES.items()
        for size in sizes
    ],
)
def test_kernels_keep_to_their_tensors_and_out_of_each_other(
    calls: Callable[[Tensor], None], rows: int, width: int
) -> None:
    with recorded() as launches:
        calls(torch.randn(rows, width, dtype=BF16))
        calls(with_gaps(torch.randn(rows, width)))
    assert launches
    for run in launches:
        expected = next((names for name, names in BARRIERS.items() if run.launch.name.startswith(name)), set[str]())
        assert run.again <= expected, run.launch.name
        written = [name for name, times in run.writes.items() if times.any()]
        unwritten = [name for name in written if not run.writes[name].all()]
        assert not unwritten, run.launch.name


# ---- bytes


def moved(launches: list[Accesses], uncounted: set[str]) -> int:
    """Between memory and kernels if a kernel's tensors stay in cache while it runs."""
    return sum(run.bytes_moved(name) for run in launches for name in run.tensors if name not in uncounted)


def compare(counted: traffic.Traffic, function: Callable[..., Any], *inputs: Tensor) -> list[Accesses]:
    """The launches of function(*inputs) and its gradients, which move the bytes `counted` and the scratch."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    scratch = {"SCALE", "PARTIALS"}
    with recorded() as forward:
        outputs = tree_leaves(function(*leaves))
    with recorded() as backward:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    assert moved(forward, scratch) == counted.forward
    assert moved(backward, scratch) == counted.backward
    return [*forward, *backward]


def read_again(run: Accesses) -> int:
    """Bytes of large tensors that a launch reads more than once."""
    return sum(
        run.bytes_read(name) - int(np.count_nonzero(run.reads[name])) * run.tensors[name].element_size()
        for name in STREAMS & run.tensors.keys()
    )


ROWS = 5


@pytest.mark.parametrize(("width", "dtype"), [(96, BF16), (8192, BF16), (WIDE, BF16), (WIDE, torch.float32)])
def test_norms_move_the_bytes_of_the_formula(width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(n, width, dtype=dtype) for n in (ROWS, ROWS, 1))
    weight, shape = weight[0], (ROWS, width, dtype.itemsize)
    matrices = [torch.randn(n, width, dtype=dtype) for n in (3, 5)]
    runs = [
        *compare(traffic.rms_norm(*shape), lambda x, w: titan_kernels.rms_norm(x, w, EPS), x, weight),
        *compare(
            traffic.add_rms_norm(*shape),
            lambda x, r, w: titan_kernels.add_rms_norm(x, r, w, EPS),
            *(x, residual, weight),
        ),
    ]
    for n in (1, 2):
        runs += compare(
            traffic.norm_linear(*shape, n_matrices=n),
            lambda x, w, *m: titan_kernels.norm_linear(x, None, w, EPS, m)[:-1],
            *(x, weight, *matrices[:n]),
        )
        runs += compare(
            traffic.add_norm_linear(*shape, n_matrices=n),
            lambda x, r, w, *m: titan_kernels.norm_linear(x, r, w, EPS, m),
            *(x, residual, weight, *matrices[:n]),
        )
    for run in runs:
        rows_at_once = run.launch.constexprs.get("ROWS", 1)
        assert read_again(run) == run.launch.bytes_read_twice // rows_at_once * ROWS, run.launch.name
        assert (run.launch.bytes_read_twice > 0) == (width == WIDE and run.launch.name != "rms_norm_sum_partials")


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_rope_and_swiglu_move_the_bytes_of_the_formula(dtype: torch.dtype) -> None:
    gate, up, matrix = (torch.randn(n, 3000, dtype=dtype) for n in (ROWS, ROWS, 4))
    cos, sin, qkv = torch.ones(ROWS, 12), torch.ones(ROWS, 12), torch.randn(2, ROWS, 8 * 24, dtype=dtype)
    size = dtype.itemsize
    runs = [
        *compare(traffic.swiglu(ROWS, 3000, size), titan_kernels.swiglu, gate, up),
        *compare(traffic.swiglu_linear(ROWS, 3000, size), titan_kernels.swiglu_linear, gate, up, matrix),
        *compare(traffic.rope(2 * ROWS, ROWS, 4, 2, 24, size), lambda x: titan_kernels.rope(x, cos, sin, 4, 2), qkv),
    ]
    assert not any(read_again(run) for run in runs)


@pytest.mark.parametrize(("vocab", "dtype"), [*product((96, 4000, 70000), (BF16, torch.float32))])
def test_cross_entropy_moves_the_bytes_of_the_formula(vocab: int, dtype: torch.dtype) -> None:
    logits, labels = torch.randn(ROWS, vocab, dtype=dtype), torch.arange(ROWS) * 10
    one, target = torch.ones(()), ROWS * dtype.itemsize  # the label's logit, which is read by itself
    with recorded() as whole:
        titan_kernels.cross_entropy_with_grad_(logits, labels, one)
    with recorded() as sharded:
        maximum, _, _ = titan_kernels.cross_entropy_stats(logits, labels)
        titan_kernels.cross_entropy_grad_(logits, labels, 0, maximum, one)
    assert moved(whole, {"SCALE"}) == traffic.cross_entropy(ROWS, vocab, dtype.itemsize).forward
    assert moved(sharded, {"SCALE"}) == traffic.cross_entropy_sharded(ROWS, vocab, dtype.itemsize).forward
    (with_grad,), (stats, grad) = whole, sharded
    assert read_again(with_grad) == with_grad.launch.bytes_read_twice * ROWS + target
    assert with_grad.launch.bytes_read_twice == vocab * dtype.itemsize
    assert (read_again(stats), read_again(grad)) == (target, 0)
