"""The byte formulas, compared with the sizes of the reference operators' real inputs and outputs."""

import pytest
import torch
from titan_kernels import reference, traffic
from torch import Tensor

ROWS, WIDTH, VOCAB = 6, 40, 50
BATCH, SEQ_LEN, N_HEADS, N_KV_HEADS, HEAD_DIM = 2, 3, 8, 2, 4


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def test_norms_count_every_operand_once() -> None:
    x, residual, weight = random(ROWS, WIDTH), random(ROWS, WIDTH), random(WIDTH)
    y = reference.rms_norm(x, weight, 1e-5)
    dy, dx, dweight = y, x, weight  # gradients have the sizes of what they belong to
    counted = traffic.rms_norm(ROWS, WIDTH)
    assert counted.forward == nbytes(x, weight, y)
    assert counted.backward == nbytes(dy, x, weight, dx, dweight)
    y, new_residual = reference.add_rms_norm(x, residual, weight, 1e-5)
    counted = traffic.add_rms_norm(ROWS, WIDTH)
    assert counted.forward == nbytes(x, residual, weight, y, new_residual)
    assert counted.backward == nbytes(dy, new_residual, new_residual, weight, dx, dweight)


def test_rope_moves_every_head_both_ways() -> None:
    packed = random(BATCH, SEQ_LEN, (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM)
    cos = sin = torch.ones(SEQ_LEN, HEAD_DIM // 2)
    q, k, v = reference.rope(packed, cos, sin, N_HEADS, N_KV_HEADS)
    counted = traffic.rope(BATCH * SEQ_LEN, SEQ_LEN, N_HEADS, N_KV_HEADS, HEAD_DIM)
    assert counted.forward == counted.backward == nbytes(packed, cos, sin, q, k, v)


def test_swiglu_and_cross_entropy() -> None:
    gate, up = random(ROWS, WIDTH), random(ROWS, WIDTH)
    product = reference.swiglu(gate, up)
    counted = traffic.swiglu(ROWS, WIDTH)
    assert counted.forward == nbytes(gate, up, product)
    assert counted.backward == nbytes(product, gate, up, gate, up)
    logits, labels = random(ROWS, VOCAB), torch.zeros(ROWS, dtype=torch.int64)
    loss = reference.cross_entropy(logits, labels)
    gradient = logits
    assert traffic.cross_entropy(ROWS, VOCAB).total == nbytes(logits, gradient, labels, loss)


@pytest.mark.parametrize(
    ("unit", "plain"),
    [("norm_linear", "rms_norm"), ("add_norm_linear", "add_rms_norm"), ("swiglu_linear", "swiglu")],
)
def test_reemitting_writes_one_activation_more(unit: str, plain: str) -> None:
    shape = {"rows": ROWS, "width": WIDTH}
    more, less = traffic.TRAFFIC[unit](**shape), traffic.TRAFFIC[plain](**shape)
    assert more.forward == less.forward
    assert more.backward - less.backward == nbytes(random(ROWS, WIDTH))


@pytest.mark.parametrize("unit", ["norm_linear", "add_norm_linear"])
def test_a_second_matrix_has_a_gradient_that_is_read(unit: str) -> None:
    shape = {"rows": ROWS, "width": WIDTH}
    more, less = traffic.TRAFFIC[unit](**shape, n_matrices=2), traffic.TRAFFIC[unit](**shape)
    assert more.forward == less.forward
    assert more.backward - less.backward == nbytes(random(ROWS, WIDTH))


def test_element_size_scales_activations() -> None:
    assert traffic.swiglu(ROWS, WIDTH, element_size=4).total == 2 * traffic.swiglu(ROWS, WIDTH).total
