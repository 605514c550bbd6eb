"""RoPE on the packed projection, compared with the reference in float64. B batch, S sequence, H and K heads, E their
width."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from titan_kernels import reference, rope

from tests.kernels.tolerance import compare, evaluate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# batch, sequence, heads, key/value heads, head dimension: multi-head, grouped, multi-query; widths that fill no block
SIZES = [
    (2, 7, 4, 2, 16, FP32),
    (1, 64, 8, 1, 64, BF16),
    (1, 3, 2, 2, 128, FP16),
    (3, 1, 3, 1, 6, BF16),
    (2, 17, 8, 2, 96, FP32),
    (1, 5, 1, 1, 2, FP16),
    (1, 4, 4, 4, 254, BF16),
]


def tables(seq_len: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = 500_000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(seq_len, device=device)[:, None] * frequency
    return torch.cos(angle), torch.sin(angle)


def check(qkv: Tensor, n_heads: int, n_kv_heads: int, gradients: tuple[Tensor, ...]) -> None:
    """The tables are not inputs here, so neither implementation computes their gradient. A pair's two products may
    cancel in one of its halves, but not in both, and the rule is per head."""
    head_dim = qkv.shape[-1] // (n_heads + 2 * n_kv_heads)
    cos, sin = tables(qkv.shape[1], head_dim, qkv.device)
    compare(
        lambda qkv: rope(qkv, cos, sin, n_heads, n_kv_heads),
        lambda qkv: reference.rope(qkv, cos, sin, n_heads, n_kv_heads),
        (qkv,),
        gradients,
    )


@pytest.mark.parametrize(("batch", "seq_len", "n_heads", "n_kv_heads", "head_dim", "dtype"), SIZES)
def test_rope(
    batch: int, seq_len: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    width = (n_heads + 2 * n_kv_heads) * head_dim
    qkv = torch.randn(batch, seq_len, width, dtype=dtype, device=device)
    gradients = tuple(
        torch.randn(batch, heads, seq_len, head_dim, dtype=dtype, device=device)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    )
    check(qkv, n_heads, n_kv_heads, gradients)


def test_outputs_lie_as_attention_reads_them(device: torch.device) -> None:
    qkv = torch.randn(2, 5, 8 * 16, device=device)
    cos, sin = tables(5, 16, device)
    for apply in (rope, reference.rope):
        for tensor, heads in zip(apply(qkv, cos, sin, 4, 2), (4, 2, 2), strict=True):
            assert tensor.shape == (2, heads, 5, 16)
            assert tensor.transpose(1, 2).is_contiguous()
            # What attention keeps for its backward pass must not keep the whole projection.
            assert tensor.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()


def test_backward_inverts_forward(device: torch.device) -> None:
    """A rotation's transpose is its inverse: the gradient given the outputs is the input."""
    qkv = torch.randn(2, 5, 8 * 16, device=device)
    cos, sin = tables(5, 16, device)
    outputs = rope(qkv, cos, sin, 4, 2)
    _, (dqkv,) = evaluate(lambda x: rope(x, cos, sin, 4, 2), (qkv,), outputs)
    torch.testing.assert_close(dqkv, qkv)


@pytest.mark.parametrize("layout", ["heads_first", "tokens_first", "odd_stride", "expanded"])
def test_gradients_of_any_strides(layout: str, device: torch.device) -> None:
    def gradient(heads: int) -> Tensor:
        if layout == "heads_first":
            return torch.randn(2, heads, 5, 16, dtype=BF16, device=device)
        if layout == "tokens_first":
            return torch.randn(2, 5, heads, 16, dtype=BF16, device=device).transpose(1, 2)
        if layout == "odd_stride":
            return torch.randn(2, heads, 5, 32, dtype=BF16, device=device)[..., ::2]
        return torch.randn((), dtype=BF16, device=device).expand(2, heads, 5, 16)

    check(torch.randn(2, 5, 8 * 16, dtype=BF16, device=device), 4, 2, (gradient(4), gradient(2), gradient(2)))


def test_gradients_of_different_strides(device: torch.device) -> None:
    def gradient(heads: int, more: int) -> Tensor:
        return torch.randn(2 + more, heads + more, 5 + more, 16 + more, dtype=BF16, device=device)[:2, :heads, :5, :16]

    qkv = torch.randn(2, 5, 8 * 16, dtype=BF16, device=device)
    check(qkv, 4, 2, (gradient(4, 0), gradient(2, 1), gradient(2, 2)))
    transposed = torch.randn(2, 5, 2, 16, dtype=BF16, device=device).transpose(1, 2)
    check(qkv, 4, 2, (gradient(4, 2), transposed, gradient(2, 0)))


@pytest.mark.parametrize("layout", ["columns", "transposed", "batch_first"])
def test_strided_inputs(layout: str, device: torch.device) -> None:
    if layout == "columns":
        qkv = torch.randn(2, 5, 160, device=device)[..., :128]
    elif layout == "transposed":
        qkv = torch.randn(2, 128, 5, device=device).transpose(1, 2)
    else:
        qkv = torch.randn(5, 2, 128, device=device).transpose(0, 1)
    gradients = tuple(torch.randn(2, heads, 5, 16, device=device) for heads in (4, 2, 2))
    check(qkv, 4, 2, gradients)


def test_strided_tables(device: torch.device) -> None:
    qkv = torch.randn(1, 5, 8 * 16, device=device)
    cos, sin = tables(5, 16, device)
    strided_cos, strided_sin = (torch.stack((table, table), -1)[..., 0] for table in (cos, sin))
    gradients = [torch.randn(1, heads, 5, 16, device=device) for heads in (4, 2, 2)]
    found, (dqkv,) = evaluate(lambda x: rope(x, strided_cos, strided_sin, 4, 2), (qkv,), gradients)
    expected, (dqkv_expected,) = evaluate(lambda x: rope(x, cos, sin, 4, 2), (qkv,), gradients)
    for ours, theirs in zip((*found, dqkv), (*expected, dqkv_expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("magnitude", [1e15, 1e-6])
def test_huge_and_tiny(magnitude: float, device: torch.device) -> None:
    gradients = tuple(torch.randn(1, heads, 5, 16, dtype=BF16, device=device) for heads in (4, 2, 2))
    check(torch.randn(1, 5, 8 * 16, dtype=BF16, device=device) * magnitude, 4, 2, gradients)


@pytest.mark.parametrize(("batch", "seq_len"), [(0, 5), (2, 0)])
def test_zero_tokens(batch: int, seq_len: int, device: torch.device) -> None:
    qkv = torch.randn(batch, seq_len, 8 * 16, device=device)
    cos, sin = tables(seq_len, 16, device)
    gradients = [torch.randn(batch, heads, seq_len, 16, device=device) for heads in (4, 2, 2)]
    outputs, (dqkv,) = evaluate(lambda x: rope(x, cos, sin, 4, 2), (qkv,), gradients)
    assert [tensor.shape for tensor in outputs] == [gradient.shape for gradient in gradients]
    assert dqkv.shape == qkv.shape


def test_gradient_of_one_output_alone(device: torch.device) -> None:
    qkv = torch.randn(1, 5, 8 * 16, device=device, requires_grad=True)
    cos, sin = tables(5, 16, device)
    dk = torch.randn(1, 2, 5, 16, device=device)
    (found,) = torch.autograd.grad(rope(qkv, cos, sin, 4, 2)[1], qkv, dk)
    (expected,) = torch.autograd.grad(reference.rope(qkv, cos, sin, 4, 2)[1], qkv, dk)
    torch.testing.assert_close(found, expected)


def table(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("qkv", "cos", "sin", "n_heads", "n_kv_heads", "message"),
    [
        (torch.ones(1, 3, 65), table(3, 4), table(3, 4), 4, 2, r"\[1, 3, 65\] is not 4 \+ 2 \* 2 heads wide"),
        (torch.ones(1, 3, 24), table(3, 1), table(3, 1), 4, 2, "8 heads of dimension 3: not even"),
        (torch.ones(1, 3, 0), table(3, 0), table(3, 0), 4, 2, "8 heads of dimension 0: not even"),
        (torch.ones(1, 3, 64), table(3, 4), table(3, 4), 4, 3, "n_heads 4 is not a multiple of n_kv_heads 3"),
        (torch.ones(1, 3, 64), table(3, 4), table(3, 4), 4, 0, "n_kv_heads 0"),
        (torch.ones(3, 64), table(3, 4), table(3, 4), 4, 2, r"qkv has shape \[3, 64\]"),
        (torch.ones(1, 3, 64), table(4, 4), table(4, 4), 4, 2, r"cos has shape \[4, 4\].*needs \[3, 4\]"),
        (torch.ones(1, 3, 64), table(3, 4), table(3, 8), 4, 2, r"sin has shape \[3, 8\].*needs \[3, 4\]"),
        (torch.ones(1, 3, 64), table(3, 4, dtype=BF16), table(3, 4), 4, 2, "cos of shape .* is torch.bfloat16"),
        (torch.ones(1, 3, 64).double(), table(3, 4), table(3, 4), 4, 2, "not torch.float64"),
    ],
)
def test_bad_input(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, message: str, device: torch.device
) -> None:
    with pytest.raises(ValueError, match=message):
        rope(qkv.to(device), cos.to(device), sin.to(device), n_heads, n_kv_heads)
