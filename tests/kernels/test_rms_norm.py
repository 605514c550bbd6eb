"""RMSNorm and add + RMSNorm, compared with the reference in float64. N rows, D width."""

import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from titan_kernels import add_rms_norm, reference, rms_norm
from titan_kernels.rms_norm import run_backward

from tests.kernels.operators import every_size
from tests.kernels.tolerance import Result, compare, evaluate

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Pairs of rows and widths that each meet several dtypes; the last three do not fit a program's registers.
SIZES = [
    (1, 1, FP32),
    (64, 1, BF16),
    (3, 7, FP16),
    (64, 7, FP32),
    (1, 127, BF16),
    (64, 127, FP16),
    (3, 128, FP32),
    (64, 128, BF16),
    (3, 129, BF16),
    (1, 129, FP16),
    (64, 1000, FP32),
    (3, 1000, BF16),
    (1, 4096, BF16),
    (3, 4096, FP16),
    (64, 4096, FP32),
    (5, 8193, FP32),
    (3, 20000, BF16),
    pytest.param(1, 65536, FP16, marks=pytest.mark.slow),
]


def terms(s: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """The terms that cancel in ds: r * w * dy."""
    r = torch.rsqrt(s.double().square().mean(-1, keepdim=True) + EPS)
    return (r * weight.double() * dy.double()).abs()


def dweight_terms(s: Tensor, dy: Tensor) -> Tensor:
    """The size of a sum over rows of dy * s * r with random signs."""
    r = torch.rsqrt(s.double().square().mean(-1, keepdim=True) + EPS)
    return (dy.double() * s.double() * r).flatten(0, -2).square().sum(0).sqrt()


def check_norm(x: Tensor, weight: Tensor, dy: Tensor) -> None:
    compare(
        rms_norm,
        reference.rms_norm,
        (x, weight, EPS),
        (dy,),
        {"grad0": Result(terms(x, weight, dy)), "grad1": Result(dweight_terms(x, dy))},
    )


def check_add(x: Tensor, residual: Tensor, weight: Tensor, dy: Tensor, dresidual: Tensor) -> None:
    largest = torch.maximum(terms(x + residual, weight, dy), dresidual.double().abs())
    compare(
        add_rms_norm,
        reference.add_rms_norm,
        (x, residual, weight, EPS),
        (dy, dresidual),
        {
            "grad0": Result(largest),
            "grad1": Result(largest),
            "grad2": Result(dweight_terms(x + residual, dy), through=x.dtype),
        },
    )


@pytest.mark.parametrize(("rows", "width", "dtype"), SIZES)
def test_rms_norm(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, dy = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    check_norm(x, torch.randn(width, dtype=dtype, device=device), dy)


@pytest.mark.parametrize(("rows", "width", "dtype"), SIZES)
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    tensors = [torch.randn(rows, width, dtype=dtype, device=device) for _ in range(4)]
    # A float32 weight with a narrower input, as in mixed precision without FSDP.
    weight = torch.randn(width, dtype=FP32 if rows == 3 else dtype, device=device)
    check_add(tensors[0], tensors[1], weight, tensors[2], tensors[3])


@pytest.mark.slow
@every_size
def test_every_size_in_every_dtype(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    test_rms_norm(rows, width, dtype, device)
    test_add_rms_norm(rows, width, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_few_columns_cancel(seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    for width in (1, 7):
        test_rms_norm(64, width, FP32, device)
        test_add_rms_norm(64, width, FP32, device)


@pytest.mark.parametrize(
    ("rows", "width", "multiprocessors", "partials"),
    [
        (333, 24, 10, 80),  # as many programs as fit, each with several rows; a last round of the sum that is not full
        (333, 24, 40, 84),  # as many as have four rows
        (137, 8200, 33, 33),  # rows that do not fit a program
    ],
)
def test_as_many_partial_sums_as_a_gpu_makes(
    rows: int, width: int, multiprocessors: int, partials: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that sums them reads 64 at a time, more than the interpreter's two multiprocessors ever make."""
    module = sys.modules["titan_kernels.rms_norm"]
    monkeypatch.setattr(module, "_multiprocessors", lambda device: multiprocessors)
    assert module._n_partials(rows, width, device) == partials
    x, residual, dy, dresidual = (torch.randn(rows, width, device=device) for _ in range(4))
    check_add(x, residual, torch.randn(width, device=device), dy, dresidual)


def test_new_residual_is_the_rounded_sum(device: torch.device) -> None:
    x, residual = (torch.randn(4, 96, dtype=FP16, device=device) for _ in range(2))
    y, new_residual = add_rms_norm(x, residual, torch.ones(96, dtype=FP16, device=device), EPS)
    assert torch.equal(new_residual, x + residual)
    assert torch.equal(y, rms_norm(x + residual, torch.ones(96, dtype=FP16, device=device), EPS))


@pytest.mark.parametrize("magnitude", [1e15, 1e-6, 1e-25])
def test_huge_and_tiny(magnitude: float, device: torch.device) -> None:
    x, residual, dy, dresidual = (torch.randn(3, 130, dtype=BF16, device=device) for _ in range(4))
    weight = torch.randn(130, dtype=BF16, device=device)
    check_norm(x * magnitude, weight, dy)
    check_add(x * magnitude, residual * magnitude, weight, dy, dresidual)
    check_norm(x, weight, dy * magnitude)


def test_epsilon_in_rows_that_are_read_twice(device: torch.device) -> None:
    x, weight = 1e-6 * torch.randn(1, 16385, device=device), torch.ones(16385, device=device)
    torch.testing.assert_close(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


def test_squares_beyond_float16(device: torch.device) -> None:
    x, dy = (torch.randn(3, 130, device=device) for _ in range(2))
    check_norm((x * 1e4).half(), torch.ones(130, dtype=FP16, device=device), dy.half())


@pytest.mark.parametrize("layout", ["columns", "rows", "transposed", "three_dims"])
def test_strided_inputs_and_gradients(layout: str, device: torch.device) -> None:
    def tensor() -> Tensor:
        if layout == "columns":  # half of each row: adjacent columns, rows further apart
            return torch.randn(6, 200, dtype=BF16, device=device)[:, :100]
        if layout == "rows":
            return torch.randn(12, 100, dtype=BF16, device=device)[::2]
        if layout == "transposed":
            return torch.randn(100, 6, dtype=BF16, device=device).t()
        return torch.randn(3, 2, 100, dtype=BF16, device=device).transpose(0, 1)

    weight = torch.randn(200, dtype=BF16, device=device)[::2]
    check_norm(tensor(), weight, tensor())
    check_add(tensor(), tensor(), weight, tensor(), tensor())


@pytest.mark.parametrize("order", [(0, 8, 16, 24), (24, 16, 8, 0)])
def test_rows_of_different_strides(order: tuple[int, ...], device: torch.device) -> None:
    x, residual, dy, dresidual = (torch.randn(6, 96 + more, dtype=BF16, device=device)[:, :96] for more in order)
    check_add(x, residual, torch.randn(96, dtype=BF16, device=device), dy, dresidual)


def test_expanded_gradients(device: torch.device) -> None:
    x, residual = (torch.randn(6, 100, device=device) for _ in range(2))
    weight = torch.randn(100, device=device)
    for dy in (torch.randn((), device=device).expand(6, 100), torch.randn(100, device=device).expand(6, 100)):
        check_norm(x, weight, dy)
        check_add(x, residual, weight, dy, dy)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_zero_rows(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device)
    weight = torch.randn(64, device=device)
    (y,), (dx, dweight) = evaluate(rms_norm, (x, weight, EPS), (x,))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(64, device=device))
    outputs, gradients = evaluate(add_rms_norm, (x, x, weight, EPS), (x, x))
    assert [tuple(tensor.shape) for tensor in (*outputs, *gradients)] == [shape] * 4 + [(64,)]


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_gradients_of_some_inputs(wanted: tuple[bool, ...], device: torch.device) -> None:
    values = [torch.randn(5, 40, device=device), torch.randn(5, 40, device=device), torch.randn(40, device=device)]
    dy, dresidual = (torch.randn(5, 40, device=device) for _ in range(2))
    _, everything = evaluate(add_rms_norm, (*values, EPS), (dy, dresidual))
    leaves = [value.clone().requires_grad_(want) for value, want in zip(values, wanted, strict=True)]
    torch.autograd.backward(add_rms_norm(leaves[0], leaves[1], leaves[2], EPS), (dy, dresidual))
    for tensor, want, gradient in zip(leaves, wanted, everything, strict=True):
        if want:
            torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=0)
        else:
            assert tensor.grad is None


def test_gradient_of_one_output_alone(device: torch.device) -> None:
    x, residual, g = (torch.randn(5, 40, device=device, requires_grad=True) for _ in range(3))
    weight = torch.randn(40, device=device, requires_grad=True)
    y, new_residual = add_rms_norm(x, residual, weight, EPS)
    _, (dx, _, dweight) = evaluate(add_rms_norm, (x, residual, weight, EPS), (g, torch.zeros_like(g)))
    found = torch.autograd.grad(y, (x, residual, weight), g, retain_graph=True)
    assert torch.equal(found[0], dx)
    assert torch.equal(found[1], dx)
    assert torch.equal(found[2], dweight)
    found = torch.autograd.grad(new_residual, (x, residual, weight), g, allow_unused=True)
    assert torch.equal(found[0], g)
    assert torch.equal(found[1], g)
    assert found[2] is None


@pytest.mark.parametrize("width", [96, 8193])
def test_what_lies_behind_the_last_row_is_not_used(width: int, device: torch.device) -> None:
    """Five rows are no whole number of what a program has at once."""
    dy, s = (torch.randn(6, width, device=device) for _ in range(2))
    weight, scale = torch.randn(width, device=device), torch.rand(6, device=device) + 0.5
    with torch.no_grad():
        expected = run_backward(dy[:5].clone(), None, s[:5].clone(), weight, scale[:5].clone())
        for behind in (dy, s, scale):
            behind[5:] = torch.nan
        found = run_backward(dy[:5], None, s[:5], weight, scale[:5])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert found[1].isfinite().all()


def test_deterministic(device: torch.device) -> None:
    tensors = [torch.randn(37, 300, device=device) for _ in range(4)]
    weight = torch.randn(300, device=device)
    runs = [evaluate(add_rms_norm, (*tensors[:2], weight, EPS), tensors[2:]) for _ in range(2)]
    for first, second in zip(runs[0][0] + runs[0][1], runs[1][0] + runs[1][1], strict=True):
        assert torch.equal(first, second)


def test_inputs_are_not_touched(device: torch.device) -> None:
    tensors = [torch.randn(5, 40, device=device) for _ in range(4)]
    weight = torch.randn(40, device=device)
    before = [tensor.clone() for tensor in (*tensors, weight)]
    evaluate(add_rms_norm, (*tensors[:2], weight, EPS), tensors[2:])
    for tensor, copy in zip((*tensors, weight), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(
    ("x", "residual", "weight", "message"),
    [
        (torch.ones(2, 8), None, torch.ones(7), r"weight has shape \[7\], x of shape \[2, 8\] needs \[8\]"),
        (torch.ones(2, 8), None, torch.ones(1, 8), r"weight has shape \[1, 8\]"),
        (torch.ones(2, 8), torch.ones(1, 8), torch.ones(8), r"residual has shape \[1, 8\], x has \[2, 8\]"),
        (
            torch.ones(2, 8).bfloat16(),
            None,
            torch.ones(8).half(),
            r"bfloat16 of shape \[2, 8\].*float16 of shape \[8\]",
        ),
        (torch.ones(2, 8), None, torch.ones(8).half(), "dtypes differ"),
        (torch.ones(2, 8), torch.ones(2, 8).half(), torch.ones(8), "dtypes differ"),
        (torch.ones(2, 8).double(), None, torch.ones(8).double(), "not torch.float64"),
        (torch.ones(2, 8).long(), None, torch.ones(8), "not torch.int64"),
        (torch.ones(2, 0), None, torch.ones(0), r"rows of 1 to 65536 numbers, got shape \[2, 0\]"),
        (torch.ones(1, 65537), None, torch.ones(65537), r"got shape \[1, 65537\]"),
        (torch.ones(()), None, torch.ones(()), r"got shape \[\]"),
        (torch.ones(2, 8), None, torch.ones(8, device="meta"), r"\[2, 8\] on .* and \[8\] on meta"),
    ],
)
def test_bad_input(x: Tensor, residual: Tensor | None, weight: Tensor, message: str, device: torch.device) -> None:
    x = x.to(device)
    weight = weight if weight.is_meta else weight.to(device)
    with pytest.raises(ValueError, match=message):
        if residual is None:
            rms_norm(x, weight, EPS)
        else:
            add_rms_norm(x, residual.to(device), weight, EPS)
