"""On a GPU: the error rule at the sizes of Llama models, and what can only be tested there."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from titan_kernels import (
    add_rms_norm,
    cross_entropy_with_grad_,
    norm_linear,
    reference,
    rms_norm,
    rope,
    swiglu,
    swiglu_linear,
)
from titan_kernels.llama_shapes import LLAMA
from titan_kernels.rms_norm import launches

from tests.kernels.tolerance import Result, assert_accurate, assert_accurate_logits_gradient, compare, evaluate

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
TOKENS = 2048
EPS = 1e-5
DEVICE = "cuda"
large = pytest.mark.large
each_model = pytest.mark.parametrize("model", ["llama3_8b", "llama2_13b", "llama3_70b", "llama3_405b"])
each_row_count = pytest.mark.parametrize("rows", [8192, 1000, 5])


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=BF16, device=DEVICE)


def coarse(*shape: int) -> Tensor:
    """Numbers whose pairwise sums are exact in bfloat16, so that only the kernel's own arithmetic is judged."""
    return (torch.randint(-64, 65, shape, device=DEVICE) / 32).to(BF16)


def dx_terms(s: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """The terms that cancel in the gradient of a norm of s: r * w * dy."""
    r = torch.rsqrt(s.double().square().mean(-1, keepdim=True) + EPS)
    return (r * weight.double() * dy.double()).abs()


@large
@each_model
@each_row_count
def test_rms_norm(model: str, rows: int) -> None:
    """With a float32 weight, whose gradient is then a float32 sum that no rounding hides."""
    width = LLAMA[model].width
    x, dy, weight = randn(rows, width), randn(rows, width), torch.randn(width, device=DEVICE)
    compare(rms_norm, reference.rms_norm, (x, weight, EPS), (dy,), {"grad0": Result(dx_terms(x, weight, dy))})


@large
@each_model
@each_row_count
@pytest.mark.parametrize("weight_dtype", [BF16, FP32])
def test_add_rms_norm(model: str, rows: int, weight_dtype: torch.dtype) -> None:
    width = LLAMA[model].width
    x, residual, dy, dresidual = coarse(rows, width), coarse(rows, width), randn(rows, width), randn(rows, width)
    weight = torch.randn(width, dtype=weight_dtype, device=DEVICE)
    size = Result(torch.maximum(dx_terms(x + residual, weight, dy), dresidual.double().abs()))
    compare(
        add_rms_norm,
        reference.add_rms_norm,
        (x, residual, weight, EPS),
        (dy, dresidual),
        {"grad0": size, "grad1": size},
    )


@large
@each_model
def test_swiglu(model: str) -> None:
    gate, up, dh = (randn(TOKENS, LLAMA[model].ffn_width) for _ in range(3))
    compare(swiglu, reference.swiglu, (gate, up), (dh,), {"grad0": Result(dh.double().abs() * up.double().abs())})


@large
@each_model
def test_rope(model: str) -> None:
    shape = LLAMA[model]
    qkv = randn(1, TOKENS, (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim)
    angle = torch.rand(TOKENS, shape.head_dim // 2, device=DEVICE) * 2048
    cos, sin = torch.cos(angle), torch.sin(angle)
    compare(
        lambda qkv: rope(qkv, cos, sin, shape.n_heads, shape.n_kv_heads),
        lambda qkv: reference.rope(qkv, cos, sin, shape.n_heads, shape.n_kv_heads),
        (qkv,),
        [randn(1, heads, TOKENS, shape.head_dim) for heads in (shape.n_heads, *[shape.n_kv_heads] * 2)],
    )


@large
@pytest.mark.parametrize("model", ["llama2_7b", "llama3_8b"])
def test_cross_entropy(model: str) -> None:
    rows, vocab = 512, LLAMA[model].vocab
    logits, labels = 3 * randn(rows, vocab), torch.randint(vocab, (rows,), device=DEVICE)
    labels[::7] = -100
    scale = torch.tensor(1 / rows, device=DEVICE)
    ours, yardstick = logits.clone(), logits.clone()
    losses = [
        cross_entropy_with_grad_(ours, labels, scale),
        reference.cross_entropy_with_grad_(yardstick, labels, scale),
    ]
    true_loss, (true_gradient,) = evaluate(
        lambda x: reference.cross_entropy(x, labels), (logits.double(),), (scale.double().expand(rows),)
    )
    assert_accurate("loss", losses[0], losses[1], true_loss[0], Result(logits.double().abs().amax(-1)))
    assert_accurate_logits_gradient(ours, yardstick, true_gradient, labels, scale.expand(rows))


@large
@each_model
def test_units_equal_their_parts(model: str) -> None:
    """What the backward kernels write again equals, bit for bit, what the forward kernels wrote."""
    shape, wide = LLAMA[model], 512
    x, residual, dresidual = (randn(TOKENS, shape.width) for _ in range(3))
    weight, matrix, dout = randn(shape.width), randn(wide, shape.width) / 64, randn(TOKENS, wide)

    def parts(x: Tensor, residual: Tensor, weight: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        y, new_residual = add_rms_norm(x, residual, weight, EPS)
        return F.linear(y, matrix), new_residual

    inputs = (x, residual, weight, matrix)
    ours = evaluate(lambda x, r, w, m: norm_linear(x, r, w, EPS, (m,)), inputs, (dout, dresidual))
    theirs = evaluate(parts, inputs, (dout, dresidual))
    for mine, other in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert torch.equal(mine, other)
    gate, up, matrix = randn(TOKENS, shape.ffn_width), randn(TOKENS, shape.ffn_width), randn(wide, shape.ffn_width) / 64
    ours = evaluate(swiglu_linear, (gate, up, matrix), (dout,))
    theirs = evaluate(lambda g, u, m: F.linear(swiglu(g, u), m), (gate, up, matrix), (dout,))
    for mine, other in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert torch.equal(mine, other)


@large
@each_model
def test_gradients_of_two_matrices_are_added_by_the_kernel(model: str) -> None:
    """Of gate and up, cut to 512 columns each."""
    width, wide = LLAMA[model].width, 512
    x, residual, dresidual = coarse(TOKENS, width), coarse(TOKENS, width), randn(TOKENS, width)
    weight, gate, up = randn(width), randn(wide, width) / 64, randn(wide, width) / 64
    douts = [randn(TOKENS, wide) for _ in range(2)]
    y = reference.rms_norm(x + residual, weight, EPS)
    dy = douts[0].double() @ gate.double() + douts[1].double() @ up.double()
    size = Result(torch.maximum(dx_terms(x + residual, weight, dy), dresidual.double().abs()))
    compare(
        lambda x, r, w, a, b: norm_linear(x, r, w, EPS, (a, b)),
        lambda x, r, w, a, b: reference.norm_linear(x, r, w, EPS, (a, b)),
        (x, residual, weight, gate, up),
        (*douts, dresidual),
        {
            "grad0": size,
            "grad1": size,
            "out0": Result(y.double().abs().sum(-1, keepdim=True) / 64),
            "out1": Result(y.double().abs().sum(-1, keepdim=True) / 64),
        },
    )


@large
@each_model
def test_deterministic(model: str) -> None:
    """The same bits ten times, on a device busy enough for programs to finish in a different order each time."""
    width = LLAMA[model].width
    tensors, weight = [randn(TOKENS, width) for _ in range(4)], randn(width)
    first = evaluate(add_rms_norm, (*tensors[:2], weight, EPS), tensors[2:])
    for _ in range(9):
        again = evaluate(add_rms_norm, (*tensors[:2], weight, EPS), tensors[2:])
        for one, other in zip(first[0] + first[1], again[0] + again[1], strict=True):
            assert torch.equal(one, other)


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


def test_what_the_units_save() -> None:
    """Memory held between forward and backward: exactly one activation less than our own operators one by one."""
    x, gate, up = (randn(TOKENS, 4096).requires_grad_() for _ in range(3))
    weight, matrix = randn(4096).requires_grad_(), randn(4096, 4096).requires_grad_()

    def kept(run: Callable[[], object]) -> int:
        run()  # cuBLAS keeps its workspace from the first product on
        before = torch.cuda.memory_allocated()
        outputs = run()
        held = torch.cuda.memory_allocated() - before
        assert outputs is not None
        return held

    activation = x.numel() * x.element_size()
    whole = kept(lambda: norm_linear(x, None, weight, EPS, (matrix,)))
    assert kept(lambda: F.linear(rms_norm(x, weight, EPS), matrix)) - whole == activation
    whole = kept(lambda: swiglu_linear(gate, up, matrix))
    assert kept(lambda: F.linear(swiglu(gate, up), matrix)) - whole == activation
