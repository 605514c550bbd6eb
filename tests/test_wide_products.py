"""Matrix products whose float32 sums are kept, compared with float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from titan_fast.wide_products import add_product_, product

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def operands(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A transposed left, a right, and their product in float64."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 96, generator=generator).to(device, dtype).t()
    right = torch.randn(256, 64, generator=generator).to(device, dtype)
    return left, right, left.double() @ right.double()


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_sums_are_kept(device: str, dtype: torch.dtype) -> None:
    left, right, exact = operands(device, dtype)
    wide = product(left, right, torch.float32)
    assert wide.dtype == torch.float32 and error(wide, exact) < 1e-6
    assert error(product(left, right, dtype), exact) > 1e-4
    total = torch.ones(96, 64, device=device)
    for _ in range(3):
        add_product_(total, left, right)
    assert error(total, 3 * exact + 1) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_in_their_own_dtype_they_are_those_of_torch(device: str) -> None:
    left, right, _ = operands(device, torch.bfloat16)
    total = torch.ones(96, 64, device=device, dtype=torch.bfloat16)
    expected = torch.addmm(total, left, right)
    add_product_(total, left, right)
    assert torch.equal(total, expected) and torch.equal(product(left, right, torch.bfloat16), left @ right)


@pytest.mark.parametrize("device", DEVICES)
def test_as_operators_they_are_sound(device: str) -> None:
    left, right, _ = operands(device, torch.bfloat16)
    torch.library.opcheck(product, (left, right, torch.float32))
    total = torch.ones(96, 64, device=device)
    torch.library.opcheck(add_product_, (total, left, right))
    with FlopCounterMode(display=False) as counted:
        product(left, right, torch.float32)
        add_product_(total, left, right)
    assert counted.get_total_flops() == 2 * 2 * 96 * 256 * 64
