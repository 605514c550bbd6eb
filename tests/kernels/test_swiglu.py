"""SwiGLU, compared with the reference in float64."""

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from titan_kernels import reference, swiglu
from titan_kernels.swiglu import run_backward_emit

from tests.kernels.operators import every_size
from tests.kernels.tolerance import Result, compare, evaluate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [
    (1, 1, FP32),
    (64, 7, BF16),
    (3, 127, FP16),
    (1, 128, BF16),
    (64, 129, FP32),
    (3, 1000, BF16),
    (1, 1000, FP16),
    (3, 4096, FP32),
    (64, 1, FP16),
    (2, 65536, BF16),
]


def check(gate: Tensor, up: Tensor, dh: Tensor) -> None:
    # silu's derivative is a sum of terms that cancel near -1.28.
    terms = {"grad0": Result(dh.double().abs() * up.double().abs())}
    compare(swiglu, reference.swiglu, (gate, up), (dh,), terms)


@pytest.mark.parametrize(("rows", "width", "dtype"), SIZES)
def test_swiglu(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate, up, dh = (2 * torch.randn(rows, width, dtype=dtype, device=device) for _ in range(3))
    check(gate, up, dh)


@pytest.mark.slow
@every_size
def test_every_size_in_every_dtype(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    test_swiglu(rows, width, dtype, device)


@pytest.mark.parametrize("magnitude", [1e15, 1e-6, 1e-25])
def test_huge_and_tiny(magnitude: float, device: torch.device) -> None:
    gate, up, dh = (torch.randn(3, 130, dtype=BF16, device=device) for _ in range(3))
    check(gate * magnitude, up, dh)
    check(gate, up * magnitude, dh)
    check(gate, up, dh * magnitude)


def test_saturated_gates(device: torch.device) -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 1e4]], device=device)
    check(gate, torch.ones_like(gate), torch.ones_like(gate))


@pytest.mark.parametrize("layout", ["halves", "transposed", "rows", "three_dims"])
def test_strided_inputs_and_gradients(layout: str, device: torch.device) -> None:
    def tensor() -> Tensor:
        if layout == "halves":
            return torch.randn(6, 200, dtype=BF16, device=device).chunk(2, -1)[1]
        if layout == "transposed":
            return torch.randn(100, 6, dtype=BF16, device=device).t()
        if layout == "rows":
            return torch.randn(12, 100, dtype=BF16, device=device)[::2]
        return torch.randn(3, 2, 100, dtype=BF16, device=device).transpose(0, 1)

    check(tensor(), tensor(), tensor())
    check(tensor(), tensor().contiguous(), tensor())


@pytest.mark.parametrize("order", list(itertools.permutations((0, 8, 24))))
def test_rows_of_different_strides(order: tuple[int, ...], device: torch.device) -> None:
    gate, up, dh = (torch.randn(6, 96 + more, dtype=BF16, device=device)[:, :96] for more in order)
    check(gate, up, dh)


def test_expanded_gradients(device: torch.device) -> None:
    gate, up = (torch.randn(6, 100, device=device) for _ in range(2))
    check(gate, up, torch.randn((), device=device).expand(6, 100))
    check(gate, up, torch.randn(100, device=device).expand(6, 100))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0), ()])
def test_odd_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    gate, up, dh = (torch.randn(shape, device=device) for _ in range(3))
    outputs, gradients = evaluate(swiglu, (gate, up), (dh,))
    assert [tuple(tensor.shape) for tensor in (*outputs, *gradients)] == [shape] * 3
    torch.testing.assert_close(outputs[0], reference.swiglu(gate, up))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradients_of_some_inputs(wanted: tuple[bool, bool], device: torch.device) -> None:
    values = [torch.randn(5, 40, device=device) for _ in range(2)]
    dh = torch.randn(5, 40, device=device)
    _, everything = evaluate(swiglu, values, (dh,))
    gate, up = (value.clone().requires_grad_(want) for value, want in zip(values, wanted, strict=True))
    swiglu(gate, up).backward(dh)
    found, missing = (gate, up) if wanted[0] else (up, gate)
    torch.testing.assert_close(found.grad, everything[0 if wanted[0] else 1], rtol=0, atol=0)
    assert missing.grad is None


def test_backward_writes_the_product_again(device: torch.device) -> None:
    gate, up, dh = (torch.randn(5, 130, dtype=BF16, device=device) for _ in range(3))
    _, gradients = evaluate(swiglu, (gate, up), (dh,))
    with torch.no_grad():
        dgate, dup, h = run_backward_emit(dh, gate, up)
    assert torch.equal(h, swiglu(gate, up))
    assert torch.equal(dgate, gradients[0])
    assert torch.equal(dup, gradients[1])


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(2, 8), torch.ones(2, 7), r"gate has shape \[2, 8\], up has \[2, 7\]"),
        (torch.ones(2, 8), torch.ones(2, 8).half(), "dtypes differ"),
        (torch.ones(2, 8).double(), torch.ones(2, 8).double(), "not torch.float64"),
        (torch.ones(2, 8), torch.ones(2, 8, device="meta"), "on meta"),
    ],
)
def test_bad_input(gate: Tensor, up: Tensor, message: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate.to(device), up if up.is_meta else up.to(device))
