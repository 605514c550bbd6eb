"""On a GPU: the error rule at the sizes of Llama 3 8B and 70B, and tensors of more than 2^31 elements."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from titan_kernels import add_rms_norm, cross_entropy_with_grad_, norm_linear, reference, rms_norm, rope, swiglu
from titan_kernels.llama_shapes import LLAMA
from titan_kernels.rms_norm import launches

from tests.kernels.tolerance import Result, assert_accurate, compare, evaluate

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
TOKENS = 2048
EPS = 1e-5
each_model = pytest.mark.parametrize("model", ["llama3_8b", "llama2_13b", "llama3_70b", "llama3_405b"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=BF16, device="cuda")


@each_model
@pytest.mark.parametrize("rows", [TOKENS, 1000])
def test_add_rms_norm(model: str, rows: int) -> None:
    width = LLAMA[model].width
    x, residual, dy, dresidual = (randn(rows, width) for _ in range(4))
    size = Result(torch.tensor(4.0, device="cuda"))
    compare(
        add_rms_norm,
        reference.add_rms_norm,
        (x, residual, randn(width), EPS),
        (dy, dresidual),
        {"grad0": size, "grad1": size, "grad2": Result(rows=rows, through=BF16)},
    )


@each_model
def test_swiglu(model: str) -> None:
    gate, up, dh = (randn(TOKENS, LLAMA[model].ffn_width) for _ in range(3))
    compare(swiglu, reference.swiglu, (gate, up), (dh,), {"grad0": Result(dh.double().abs() * up.double().abs())})


@each_model
def test_rope(model: str) -> None:
    shape = LLAMA[model]
    qkv = randn(1, TOKENS, (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim)
    angle = torch.rand(TOKENS, shape.head_dim // 2, device="cuda") * 2048
    cos, sin = torch.cos(angle), torch.sin(angle)
    gradients = [randn(1, heads, TOKENS, shape.head_dim) for heads in (shape.n_heads, *[shape.n_kv_heads] * 2)]
    size = Result(torch.tensor(4.0, device="cuda"))
    compare(
        lambda qkv: rope(qkv, cos, sin, shape.n_heads, shape.n_kv_heads),
        lambda qkv: reference.rope(qkv, cos, sin, shape.n_heads, shape.n_kv_heads),
        (qkv,),
        gradients,
        {"out0": size, "out1": size, "grad0": size},
    )


@pytest.mark.parametrize("model", ["llama2_7b", "llama3_8b"])
def test_cross_entropy(model: str) -> None:
    rows, vocab = 512, LLAMA[model].vocab
    logits, labels = 3 * randn(rows, vocab), torch.randint(vocab, (rows,), device="cuda")
    labels[::7] = -100
    scale = torch.tensor(1 / rows, device="cuda")
    ours, yardstick = logits.clone(), logits.clone()
    losses = [
        cross_entropy_with_grad_(ours, labels, scale),
        reference.cross_entropy_with_grad_(yardstick, labels, scale),
    ]
    true_loss, (true_gradient,) = evaluate(
        lambda x: reference.cross_entropy(x, labels), (logits.double(),), (scale.double().expand(rows),)
    )
    assert_accurate("loss", losses[0], losses[1], true_loss[0], Result(logits.double().abs().amax(-1)))
    assert_accurate("gradient", ours, yardstick, true_gradient, Result(scale.reshape(1, 1)))


def test_more_than_two_billion_elements() -> None:
    """Every row equal: what the first rows give, the last ones beyond 2^31 elements must give too."""
    width = 16384
    rows = 2**31 // width + 8
    row, weight = randn(width), randn(width)
    x = row.repeat(rows, 1)
    y = rms_norm(x, weight, EPS)
    assert torch.equal(y[-8:], y[:8])
    assert torch.equal(y[:8], rms_norm(x[:8], weight, EPS))
    h = swiglu(x, y)
    assert torch.equal(h[-8:], swiglu(x[-8:], y[-8:]))


def test_a_new_row_count_compiles_nothing() -> None:
    width, weight = 1024, randn(1024).requires_grad_()

    def run(rows: int) -> None:
        x = randn(rows, width).requires_grad_()
        y, new_residual = add_rms_norm(x, x, weight, EPS)
        torch.autograd.backward((y, new_residual), (y.detach(), y.detach()))

    run(64)
    kernels = {launch.kernel for launch in launches(width, BF16)}
    before = [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]
    for rows in (1, 3, 17, 4096):
        run(rows)
    assert before == [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]


def test_what_norm_linear_saves() -> None:
    """Peak memory between forward and backward: one normalised activation less than the operators one by one."""
    x, weight = randn(TOKENS, 4096).requires_grad_(), randn(4096).requires_grad_()
    matrix = randn(4096, 4096).requires_grad_()
    kept = []
    for function in (norm_linear, reference.norm_linear):
        before = torch.cuda.memory_allocated()
        outputs = function(x, None, weight, EPS, (matrix,))
        kept.append(torch.cuda.memory_allocated() - before)
        del outputs
    assert kept[1] - kept[0] >= x.numel() * x.element_size()
