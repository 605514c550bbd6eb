"""Offsets beyond 2^31 elements, read and written, forward and backward.

On the CPU only a few pages of such tensors are touched: inputs have rows 2^30 elements apart, or one row used for all,
and only the last rows of results are computed. A 32-bit offset would read or write outside the allocation and kill the
process, so each check runs in its own. A GPU computes whole tensors of more than 2^31 elements.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from children import CHILDREN
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import titan_kernels
from titan_kernels import reference
from titan_kernels.rms_norm import run_backward_emit

ROWS, WIDTH, STRIDE = 3, 96, 2**30
EPS = 1e-5
ENOUGH = 2**31 * 17 // 16  # elements of a packed projection, for q alone to have more than 2^31
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def unwritten_elements_are_nan() -> None:
    """Not here, because filling such tensors would touch all of their pages."""


def far_apart(values: Tensor) -> Tensor:
    """The rows of values [ROWS, WIDTH] with the last one beyond 2^31 elements."""
    memory = torch.empty((ROWS - 1) * STRIDE + WIDTH, dtype=values.dtype, device=values.device)
    return memory.as_strided((ROWS, WIDTH), (STRIDE, 1)).copy_(values)


def in_a_process(check: Callable[..., None], *arguments: Any) -> None:
    process = CHILDREN.Process(target=alone, args=(check, *arguments))
    process.start()
    process.join(120)
    assert process.exitcode == 0, f"exit code {process.exitcode}"


def alone(check: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)  # OpenMP would wait for its threads, which a fork does not have
    check(*arguments)


def check_strides(operator: str, device: torch.device) -> None:
    torch.manual_seed(0)
    x, other, dy = (torch.randn(ROWS, WIDTH, device=device) for _ in range(3))
    weight = torch.randn(WIDTH, device=device)
    angle = torch.randn(ROWS, 6, device=device)
    labels, scale = torch.tensor([0, 5, WIDTH - 1], device=device), torch.ones((), device=device)
    far_x, far_dy = far_apart(x).requires_grad_(), far_apart(dy)
    near_x = x.clone().requires_grad_()
    if operator == "rms_norm":
        outputs = [f(y, weight, EPS) for f, y in ((titan_kernels.rms_norm, far_x), (reference.rms_norm, near_x))]
    elif operator == "add_rms_norm":
        far_other = far_apart(other)
        outputs = [
            f(y, r, weight, EPS)[0]
            for f, y, r in ((titan_kernels.add_rms_norm, far_x, far_other), (reference.add_rms_norm, near_x, other))
        ]
    elif operator == "two gradients":  # of the norm: the second far apart
        scale = torch.rsqrt(x.square().mean(-1) + EPS)
        near, far = (run_backward_emit(other, d, None, x, weight, scale) for d in (dy, far_dy))
        torch.testing.assert_close(far, near, rtol=0, atol=0)
        return
    elif operator == "swiglu":
        outputs = [f(y, other) for f, y in ((titan_kernels.swiglu, far_x), (reference.swiglu, near_x))]
    elif operator.startswith("rope"):
        outputs = [
            f(y[None], torch.cos(angle), torch.sin(angle), 4, 2)[0]
            for f, y in ((titan_kernels.rope, far_x), (reference.rope, near_x))
        ]
        # the gradient of q [1, 4, ROWS, 12] with its tokens or its heads far apart
        far_dy = far_apart(dy)[:, :48].view(1, ROWS, 4, 12).transpose(1, 2)
        dy = far_dy.contiguous()
        if operator == "rope, heads":
            memory = torch.empty(3 * STRIDE + 12 * ROWS, device=device)
            far_dy = memory.as_strided((1, 4, ROWS, 12), (0, STRIDE, 12, 1)).copy_(dy)
    else:
        losses = [titan_kernels.cross_entropy_with_grad_(far_x.detach(), labels, scale)]
        losses.append(reference.cross_entropy_with_grad_(near_x.detach(), labels, scale))
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(far_x.detach().contiguous(), near_x.detach())
        return
    torch.testing.assert_close(outputs[0], outputs[1])
    (found,) = torch.autograd.grad(outputs[0], far_x, far_dy)
    (expected,) = torch.autograd.grad(outputs[1], near_x, dy)
    torch.testing.assert_close(found.contiguous(), expected)


@pytest.mark.large
@pytest.mark.parametrize(
    "operator", ["rms_norm", "add_rms_norm", "two gradients", "swiglu", "rope", "rope, heads", "cross_entropy"]
)
def test_strides_beyond_32_bits(operator: str, device: torch.device) -> None:
    if device.type == "cuda":  # a CUDA context does not survive a fork, and a GPU reports bad addresses itself
        check_strides(operator, device)
    else:
        in_a_process(check_strides, operator, device)


LAST = 2  # rows at the end of a result that are computed, and looked at


def run_the_last_programs_only() -> None:
    """The interpreter runs only the end of long grids, and of long loops (the sum of dw, not checked here). Its loop
    over programs uses its module's `range`."""

    def ends(*bounds: int) -> range:
        whole = range(*bounds)
        return whole[-2 * LAST :] if len(whole) > 200 else whole

    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    interpreter.range = ends


def whole_and_last(shape: tuple[int, int], contiguous: bool) -> tuple[Tensor, Tensor]:
    """[rows, width] with only the last rows in memory, or one used for all; and these rows by themselves."""
    row = torch.randn(1, shape[1], dtype=BF16)
    last = row.expand(2 * LAST, -1).contiguous()
    if not contiguous:
        return row.expand(shape), last
    whole = torch.empty(shape, dtype=BF16)  # takes memory only where it is touched
    whole[-2 * LAST :] = row
    return whole, last


def check_results(operator: str) -> None:
    """The end of results of more than 2^31 elements equals the results for the same rows by themselves."""
    torch.manual_seed(0)
    run_the_last_programs_only()
    if operator == "swiglu":
        for contiguous in (False, True):  # row by row, and as one long row
            compare_last(titan_kernels.swiglu, 1024, 2, 1, contiguous)
        compare_last(titan_kernels.swiglu, 256, 2, 1, True, 2**23 - LAST)  # whole blocks would be 2^31 elements
    elif operator == "rope":
        cos, sin = torch.ones(LAST, 32), torch.zeros(LAST, 32)  # every position has the same angle
        compare_last(lambda x: rope_of(x, cos, sin), 64 * 64, 1, 1)
    elif operator == "cross_entropy":
        check_cross_entropy()
    else:
        # Each program of the backward pass shall have its four rows, however many there are.
        module: Any = sys.modules["titan_kernels.rms_norm"]
        module._multiprocessors = lambda device: 2**31
        width = {"rms_norm": 8192, "add_rms_norm": 16384}[operator]  # rows that fit a program, rows that do not
        weight = torch.randn(width, dtype=BF16)
        if operator == "rms_norm":
            compare_last(lambda x: titan_kernels.rms_norm(x, weight, EPS), width, 1, 1)
        else:
            compare_last(lambda x, r: titan_kernels.add_rms_norm(x, r, weight, EPS), width, 2, 2)


def rope_of(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q of x as one sequence a batch of LAST tokens, [rows, ...]."""
    q, _, _ = titan_kernels.rope(x.unflatten(0, (-1, LAST)), cos, sin, 62, 1)
    return q.transpose(1, 2).flatten(0, 1).flatten(1)


def compare_last(
    function: Callable[..., Any], width: int, n_inputs: int, n_outputs: int, contiguous: bool = False, rows: int = 0
) -> None:
    rows = rows or LAST * (ENOUGH // width // LAST) + 4 * LAST
    shape = (rows, width)
    inputs, gradients = ([whole_and_last(shape, contiguous) for _ in range(n)] for n in (n_inputs, n_outputs))
    found, expected = (
        differentiate(function, [pair[i] for pair in inputs], [pair[i] for pair in gradients]) for i in (0, 1)
    )
    for mine, other in zip(found, expected, strict=True):
        if mine.dim() == 2:  # not dW, to which every row belongs
            assert torch.equal(mine[-LAST:], other[-LAST:])


def differentiate(function: Callable[..., Any], inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients of the inputs. A gradient may be wider than its output: its first columns are taken."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    fitting = [gradient[:, : output.shape[1]] for gradient, output in zip(gradients, outputs, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, fitting)]


def check_cross_entropy() -> None:
    vocab = 32000
    rows, row = 2**31 // vocab + 2 * LAST, torch.randn(vocab, dtype=BF16)
    logits, small = torch.empty(rows, vocab, dtype=BF16), row.expand(2 * LAST, -1).contiguous()
    logits[-2 * LAST :] = row
    labels, one = torch.arange(rows) % 7, torch.ones(())
    pairs = [(logits, labels), (small, labels[-2 * LAST :])]
    outputs = [titan_kernels.cross_entropy(x.requires_grad_(), y) for x, y in pairs]
    leaves = [x for x, _ in pairs]
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(loss) for loss in outputs])
    torch.testing.assert_close(outputs[0][-LAST:], outputs[1][-LAST:], rtol=0, atol=0)
    assert torch.equal(gradients[0][-1], gradients[1][-1])
    with torch.no_grad():
        losses = [titan_kernels.cross_entropy_with_grad_(x, y, one) for x, y in pairs]
    assert torch.equal(losses[0][-LAST:], losses[1][-LAST:])
    assert torch.equal(logits[-LAST:], small[-LAST:])


@pytest.mark.parametrize("operator", ["rms_norm", "add_rms_norm", "swiglu", "rope", "cross_entropy"])
def test_results_beyond_32_bits(operator: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU, which computes whole results below")
    in_a_process(check_results, operator)


# On a GPU: whole tensors of a few rows more than 2^31 elements, whose last rows differ from the others, compared with
# these rows by themselves. At most seven of 4.3 GB exist at a time.


@pytest.fixture
def free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def long(width: int, last: int = 8) -> tuple[Tensor, Tensor]:
    """More than 2^31 elements in rows of `width`, and the last of them by themselves."""
    row, end = (torch.randn(n, width, dtype=BF16, device="cuda") for n in (1, last))
    whole = row.repeat(last * (ENOUGH // width // last) + last, 1)
    whole[-last:] = end
    return whole, end


def compare_on_gpu(function: Callable[..., Any], width: int, n_inputs: int, n_outputs: int) -> None:
    inputs, gradients = ([long(width) for _ in range(n)] for n in (n_inputs, n_outputs))
    expected = differentiate(function, [last for _, last in inputs], [last for _, last in gradients])
    found = differentiate(function, [whole for whole, _ in inputs], [whole for whole, _ in gradients])
    for mine, other in zip(found, expected, strict=True):
        if mine.dim() == 2:
            assert torch.equal(mine[-len(other) :], other)


on_gpu = [pytest.mark.gpu, pytest.mark.large, pytest.mark.usefixtures("free_memory")]


class TestWholeTensors:
    pytestmark = on_gpu

    @pytest.mark.parametrize("width", [8192, 16384])  # rows that fit a program of the backward kernel, that do not
    def test_norms(self, width: int) -> None:
        weight = torch.randn(width, dtype=BF16, device="cuda")
        compare_on_gpu(lambda x: titan_kernels.rms_norm(x, weight, EPS), width, 1, 1)
        compare_on_gpu(lambda x, r: titan_kernels.add_rms_norm(x, r, weight, EPS), width, 2, 2)

    def test_swiglu(self) -> None:
        compare_on_gpu(titan_kernels.swiglu, 16384, 2, 1)
        # Columns of wider rows: row by row instead of as one long row.
        compare_on_gpu(lambda gate, up: titan_kernels.swiglu(gate[:, :-8], up[:, :-8]), 16384, 2, 1)

    def test_rope(self) -> None:
        angle = torch.randn(8, 32, device="cuda")
        cos, sin = torch.cos(angle), torch.sin(angle)

        def all_of(x: Tensor) -> tuple[Tensor, ...]:
            heads = titan_kernels.rope(x.unflatten(0, (-1, 8)), cos, sin, 62, 1)
            return tuple(head.transpose(1, 2).flatten(0, 1).flatten(1) for head in heads)

        compare_on_gpu(all_of, 64 * 64, 1, 3)

    def test_cross_entropy(self) -> None:
        logits, last = long(128256)
        labels = torch.arange(len(logits), device="cuda") % 1000
        one = torch.ones((), device="cuda")
        pairs = [(logits, labels), (last, labels[-8:])]
        outputs = [titan_kernels.cross_entropy(x.requires_grad_(), y) for x, y in pairs]
        gradients = torch.autograd.grad(outputs, [logits, last], [torch.ones_like(loss) for loss in outputs])
        assert torch.equal(outputs[0][-8:], outputs[1])
        assert torch.equal(gradients[0][-8:], gradients[1])
        with torch.no_grad():
            losses = [titan_kernels.cross_entropy_with_grad_(x, y, one) for x, y in pairs]
        assert torch.equal(losses[0][-8:], losses[1])
        assert torch.equal(logits[-8:], last)
