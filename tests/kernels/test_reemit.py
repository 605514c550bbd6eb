"""norm_linear and swiglu_linear: the same results as their parts, and nothing saved that can be written again."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from titan_kernels import add_rms_norm, norm_linear, reemit, reference, rms_norm, swiglu, swiglu_linear
from titan_kernels.rms_norm import run_backward_emit
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.tolerance import Result, compare, evaluate

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def through_products(dtype: torch.dtype, count: int) -> dict[str, Result]:
    """Each result is a matrix product, or computed from one that was rounded to `dtype`: sums of signed terms of about
    size 1."""
    result = Result(torch.tensor(1.0), through=dtype)
    return {f"{kind}{i}": result for kind in ("out", "grad") for i in range(count)}


def matrices_for(width: int, outs: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Matrices whose products with rows of numbers of size 1 have size 1."""
    return [torch.randn(out, width, dtype=dtype, device=device) / width**0.5 for out in outs]


def check_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    matrices: list[Tensor],
    gradients: list[Tensor],
    dresidual: Tensor,
) -> None:
    dtype = x.dtype
    if residual is not None:
        compare(
            lambda x, residual, weight, *matrices: norm_linear(x, residual, weight, EPS, matrices),
            lambda x, residual, weight, *matrices: reference.norm_linear(x, residual, weight, EPS, matrices),
            (x, residual, weight, *matrices),
            (*gradients, dresidual),
            through_products(dtype, 6),
        )
    else:
        compare(
            lambda x, weight, *matrices: norm_linear(x, None, weight, EPS, matrices),
            lambda x, weight, *matrices: reference.norm_linear(x, None, weight, EPS, matrices),
            (x, weight, *matrices),
            (*gradients, dresidual),
            through_products(dtype, 5),
        )


def check_swiglu_linear(gate: Tensor, up: Tensor, matrix: Tensor, dout: Tensor) -> None:
    compare(swiglu_linear, reference.swiglu_linear, (gate, up, matrix), (dout,), through_products(gate.dtype, 3))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("n_matrices", [1, 2, 3])
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_linear(dtype: torch.dtype, n_matrices: int, with_residual: bool, device: torch.device) -> None:
    x, residual, dresidual = (torch.randn(2, 5, 64, dtype=dtype, device=device) for _ in range(3))
    weight = torch.randn(64, dtype=dtype, device=device)
    matrices = matrices_for(64, (24, 40, 16)[:n_matrices], dtype, device)
    gradients = [torch.randn(2, 5, len(matrix), dtype=dtype, device=device) for matrix in matrices]
    check_norm_linear(x, residual if with_residual else None, weight, matrices, gradients, dresidual)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_swiglu_linear(dtype: torch.dtype, device: torch.device) -> None:
    gate, up = (torch.randn(2, 5, 64, dtype=dtype, device=device) for _ in range(2))
    dout = torch.randn(2, 5, 24, dtype=dtype, device=device)
    check_swiglu_linear(gate, up, matrices_for(64, (24,), dtype, device)[0], dout)


WIDTHS = [
    (1, 1, FP32),
    (3, 7, BF16),
    (64, 127, FP16),
    (3, 129, FP32),
    (3, 1000, BF16),
    (2, 4096, BF16),
    (5, 8193, FP32),
]


@pytest.mark.parametrize(("rows", "width", "dtype"), WIDTHS)
def test_other_widths(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual, dresidual = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(3))
    weight = torch.randn(width, dtype=FP32 if rows == 3 else dtype, device=device)
    matrices = matrices_for(width, (9, 16), dtype, device)
    gradients = [torch.randn(rows, len(matrix), dtype=dtype, device=device) for matrix in matrices]
    check_norm_linear(x, residual, weight, matrices, gradients, dresidual)
    check_swiglu_linear(x, residual, matrices[0], gradients[0])


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("rows", "width", "dtype"), WIDTHS)
def test_two_gradients_of_the_norm(
    rows: int, width: int, dtype: torch.dtype, with_residual: bool, device: torch.device
) -> None:
    """As for their sum, which is exact here; with different strides. In the interpreter the same bits, except in rows
    that do not fit a program, where other elements are added first."""
    dy = torch.randint(-16, 17, (rows, width), device=device).to(dtype) / 16
    dy2 = (torch.randint(-16, 17, (rows, width + 8), device=device).to(dtype) / 128)[:, :width]
    s, dresidual = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(width, dtype=FP32 if rows == 3 else dtype, device=device)
    scale = torch.rsqrt(s.float().square().mean(-1) + EPS)
    others = (dresidual if with_residual else None, s, weight, scale)
    with torch.no_grad():
        found = run_backward_emit(dy, dy2, *others)
        swapped, of_sum = run_backward_emit(dy2, dy, *others), run_backward_emit(dy + dy2, None, *others)
    torch.testing.assert_close(found, swapped, rtol=0, atol=0)
    tolerance = 0.0 if width <= 8192 and device.type == "cpu" else None
    torch.testing.assert_close(found, of_sum, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [96, 8193])
def test_two_gradients_are_not_rounded_to_one(width: int, device: torch.device) -> None:
    """1 + 2^-9 is 1 in bfloat16: the gradient of the weight shows which of them was used."""
    dy, s = (torch.ones(5, width, dtype=BF16, device=device) for _ in range(2))
    weight, scale = torch.ones(width, device=device), torch.ones(5, device=device)
    with torch.no_grad():
        _, dweight, y = run_backward_emit(dy, dy / 512, None, s, weight, scale)
    assert torch.equal(dweight, torch.full_like(dweight, 5 * (1 + 2**-9)))
    assert torch.equal(y, s)


class Additions(TorchDispatchMode):
    """Counts sums of two tensors."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function is torch.ops.aten.add.Tensor
        return function(*arguments, **(options or {}))


def test_the_kernel_adds_the_last_of_several_products(device: torch.device) -> None:
    x, weight = torch.randn(6, 64, device=device, requires_grad=True), torch.randn(64, device=device)
    for n_matrices, additions in ((1, 0), (2, 0), (3, 1)):
        matrices = [m.requires_grad_() for m in matrices_for(64, (8, 9, 10)[:n_matrices], FP32, device)]
        outputs = norm_linear(x, None, weight, EPS, tuple(matrices))[:-1]
        with Additions() as counter:
            torch.autograd.grad(outputs, (x, *matrices), [torch.ones_like(output) for output in outputs])
        assert counter.count == additions


@pytest.mark.parametrize("layout", ["columns", "transposed", "three_dims", "one_row"])
def test_strided_inputs(layout: str, device: torch.device) -> None:
    def tensor(width: int = 100) -> Tensor:
        if layout == "columns":
            return torch.randn(6, 2 * width, device=device)[:, :width]
        if layout == "transposed":
            return torch.randn(width, 6, device=device).t()
        if layout == "three_dims":
            return torch.randn(3, 2, width, device=device).transpose(0, 1)
        return torch.randn(width, device=device).expand(6, width)

    matrices = matrices_for(100, (16, 24), FP32, device)
    strided = [torch.randn(100, out, device=device).t() / 10 for out in (16, 24)]
    gradients = [tensor(16), tensor(24)]
    for chosen in (matrices, strided):
        check_norm_linear(tensor(), tensor(), torch.randn(200, device=device)[::2], chosen, gradients, tensor())
        check_norm_linear(tensor(), None, torch.randn(100, device=device), chosen, gradients, tensor())
        check_swiglu_linear(tensor(), tensor(), chosen[0], gradients[0])


def test_expanded_gradients(device: torch.device) -> None:
    x, residual = (torch.randn(6, 100, device=device) for _ in range(2))
    matrices = matrices_for(100, (16, 24), FP32, device)
    same = [torch.randn((), device=device).expand(6, width) for width in (16, 24, 100)]
    check_norm_linear(x, residual, torch.randn(100, device=device), matrices, same[:2], same[2])
    check_swiglu_linear(x, residual, matrices[0], same[0])


@pytest.mark.parametrize("magnitude", [1.0, 1e15, 1e-6, 1e-25])
def test_equal_bits_as_the_parts(magnitude: float, device: torch.device) -> None:
    """With one matrix all results equal those of the separate operators, because kernels write the same again."""
    x, residual, dresidual = (torch.randn(2, 5, 64, device=device).mul(magnitude).to(BF16) for _ in range(3))
    weight, matrix = torch.randn(64, dtype=BF16, device=device), torch.randn(24, 64, dtype=BF16, device=device)
    dout = torch.randn(2, 5, 24, dtype=BF16, device=device)

    def parts(x: Tensor, residual: Tensor, weight: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        y, new_residual = add_rms_norm(x, residual, weight, EPS)
        return F.linear(y, matrix), new_residual

    inputs = (x, residual, weight, matrix)
    ours = evaluate(lambda x, r, w, m: norm_linear(x, r, w, EPS, (m,)), inputs, (dout, dresidual))
    theirs = evaluate(parts, inputs, (dout, dresidual))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    ours = evaluate(swiglu_linear, (x, residual, matrix), (dout,))
    theirs = evaluate(lambda g, u, m: F.linear(swiglu(g, u), m), (x, residual, matrix), (dout,))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def saved_bytes(function: object, *inputs: Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, without inputs."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(*inputs)  # type: ignore[operator]
    assert outputs is not None
    for x in inputs:
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_what_is_saved(device: torch.device) -> None:
    rows, width = 6, 64
    x, residual, up = (torch.randn(rows, width, device=device, requires_grad=True) for _ in range(3))
    weight = torch.randn(width, device=device, requires_grad=True)
    a, b = (torch.randn(8, width, device=device, requires_grad=True) for _ in range(2))
    tensor, scale = rows * width * 4, rows * 4
    assert saved_bytes(lambda *t: norm_linear(t[0], None, t[1], EPS, t[2:]), x, weight, a, b) == scale
    # The sum is new, and the residual stream keeps it anyway.
    assert (
        saved_bytes(lambda *t: norm_linear(t[0], t[1], t[2], EPS, t[3:]), x, residual, weight, a, b) == tensor + scale
    )
    assert saved_bytes(lambda x, w, a: F.linear(rms_norm(x, w, EPS), a), x, weight, a) == tensor + scale
    assert saved_bytes(swiglu_linear, x, up, a) == 0
    assert saved_bytes(lambda g, u, a: F.linear(swiglu(g, u), a), x, up, a) == tensor


@pytest.mark.parametrize("unit", ["norm_linear", "swiglu_linear"])
def test_products_gradients_are_freed_before_weight_gradients(
    unit: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the backward kernel has read is not alive beside what it wrote while weight gradients are computed."""
    read: list[StorageWeakRef] = []
    freed: list[bool] = []
    name = "run_norm_backward_emit" if unit == "norm_linear" else "run_swiglu_backward_emit"
    run, weight_gradient = getattr(reemit, name), reemit._weight_gradient

    def run_and_remember(dy: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        products = (dy, *others[:1]) if unit == "norm_linear" else (dy,)
        read.extend(StorageWeakRef(product.untyped_storage()) for product in products if product is not None)
        return run(dy, *others)

    def look(dout: Tensor, y: Tensor) -> Tensor:
        gc.collect()  # of Triton's interpreter, which leaves cycles
        freed.append(all(storage.expired() for storage in read))
        return weight_gradient(dout, y)

    monkeypatch.setattr(reemit, name, run_and_remember)
    monkeypatch.setattr(reemit, "_weight_gradient", look)
    x, up = (torch.randn(6, 64, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(64, device=device, requires_grad=True)
    a, b = (torch.randn(8, 64, device=device, requires_grad=True) for _ in range(2))
    outputs = norm_linear(x, up, weight, EPS, (a, b)) if unit == "norm_linear" else (swiglu_linear(x, up, a),)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert len(read) == len(freed) == (2 if unit == "norm_linear" else 1)
    assert all(freed)


def test_frozen_matrices(device: torch.device) -> None:
    x, up = (torch.randn(6, 64, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(64, device=device, requires_grad=True)
    a, b = torch.randn(8, 64, device=device), torch.randn(9, 64, device=device)
    for frozen in ((True, True), (True, False)):
        matrices = tuple(m.requires_grad_(not f) for m, f in zip((a.clone(), b.clone()), frozen, strict=True))
        wanted = [x, weight, *(m for m in matrices if m.requires_grad)]
        found, expected = (
            torch.autograd.grad([t.square().sum() for t in f(x, None, weight, EPS, matrices)], wanted)
            for f in (norm_linear, reference.norm_linear)
        )
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    found, expected = (
        torch.autograd.grad(f(x, up, a).square().sum(), (x, up)) for f in (swiglu_linear, reference.swiglu_linear)
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_one_output_alone(device: torch.device) -> None:
    x, residual = (torch.randn(6, 64, device=device, requires_grad=True) for _ in range(2))
    weight, a = torch.ones(64, device=device, requires_grad=True), torch.randn(8, 64, device=device, requires_grad=True)
    for i in (0, 1, 2):
        found, expected = (
            torch.autograd.grad(
                f(x, residual, weight, EPS, (a, 2 * a.detach()))[i].square().sum(),
                (x, residual, weight, a),
                allow_unused=True,
            )
            for f in (norm_linear, reference.norm_linear)
        )
        for mine, other in zip(found, expected, strict=True):
            assert (mine is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_zero_rows(shape: tuple[int, ...], device: torch.device) -> None:
    x, weight, matrix = (
        torch.randn(shape, device=device),
        torch.ones(64, device=device),
        torch.ones(8, 64, device=device),
    )
    out = torch.zeros(*shape[:-1], 8, device=device)
    outputs, gradients = evaluate(lambda x, r, w, m: norm_linear(x, r, w, EPS, (m,)), (x, x, weight, matrix), (out, x))
    assert [tuple(tensor.shape) for tensor in outputs] == [tuple(out.shape), shape]
    assert not gradients[3].any()
    outputs, gradients = evaluate(swiglu_linear, (x, x, matrix), (out,))
    assert outputs[0].shape == out.shape
    assert not gradients[2].any()


def test_bad_input(device: torch.device) -> None:
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match="at least one"):
        norm_linear(x, None, weight, EPS, ())
    with pytest.raises(ValueError, match=r"matrix of shape \[3, 7\] does not multiply rows of \[2, 8\]"):
        norm_linear(x, None, weight, EPS, (torch.ones(3, 7, device=device),))
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, x is torch\.float32"):
        norm_linear(x, None, weight, EPS, (torch.ones(3, 8, dtype=BF16, device=device),))
    with pytest.raises(ValueError, match=r"norm_linear: tensors of shape \[2, 8\] on .* and \[3, 8\] on meta"):
        norm_linear(x, None, weight, EPS, (torch.ones(4, 8, device=device), torch.ones(3, 8, device="meta")))
    with pytest.raises(ValueError, match=r"swiglu_linear: tensors of shape \[2, 8\] on .* and \[3, 8\] on meta"):
        swiglu_linear(x, x, torch.ones(3, 8, device="meta"))
    with pytest.raises(ValueError, match=r"norm_linear: weight has shape \[7\]"):
        norm_linear(x, None, weight[:7], EPS, (torch.ones(3, 8, device=device),))
    with pytest.raises(ValueError, match=r"swiglu_linear: gate has shape \[2, 8\], up has \[2, 7\]"):
        swiglu_linear(x, x[:, :7], torch.ones(3, 8, device=device))
    with pytest.raises(ValueError, match=r"matrix of shape \[8\] does not multiply"):
        swiglu_linear(x, x, weight)


def test_autocast_is_refused(device: torch.device) -> None:
    """With it products would have another dtype than in the backward pass, which it does not affect."""
    x, weight = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    matrix = torch.randn(3, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        with pytest.raises(ValueError, match="norm_linear: autocast is on"):
            norm_linear(x, None, weight, EPS, (matrix,))
        with pytest.raises(ValueError, match="swiglu_linear: autocast is on"):
            swiglu_linear(x, x, matrix)
