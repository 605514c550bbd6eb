"""Cross entropy, its gradient in place and its vocabulary-parallel form, compared with the reference in float64."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import titan_kernels
from titan_kernels import (
    cross_entropy,
    cross_entropy_grad_,
    cross_entropy_stats,
    cross_entropy_with_grad_,
    reference,
)

from tests.kernels.operators import every_size
from tests.kernels.tolerance import Result, assert_accurate, assert_accurate_logits_gradient, evaluate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IGNORED = -100
SIZES = [
    (1, 1, FP32, 0.0),
    (64, 7, BF16, 1e-2),
    (3, 127, FP16, 0.0),
    (1, 128, BF16, 0.0),
    (64, 129, FP32, 1e-2),
    (3, 1000, FP16, 1e-4),
    (3, 4096, BF16, 0.0),
    (3, 9001, FP32, 1e-4),  # more than one step of the loop
    (3, 20000, BF16, 1e-4),
    (2, 70000, BF16, 1e-4),  # the block of large vocabularies
]


def some_labels(rows: int, vocab: int, device: torch.device) -> Tensor:
    """Random labels, including the first and the last column; every fifth row is ignored."""
    labels = torch.randint(vocab, (rows,), device=device)
    labels[:1] = vocab - 1
    labels[1:2] = 0
    labels[2::5] = IGNORED
    return labels


def loss_terms(logits: Tensor) -> Tensor:
    """logsumexp and the label's logit, which cancel if the model is sure."""
    return logits.double().abs().amax(-1)


def check(logits: Tensor, labels: Tensor, dloss: Tensor, z_loss: float) -> None:
    (ours,), (gradient,) = evaluate(lambda x: cross_entropy(x, labels, IGNORED, z_loss), (logits,), (dloss,))
    yardstick, truth = (
        evaluate(lambda x: reference.cross_entropy(x, labels, IGNORED, z_loss), (x,), (d,))
        for x, d in ((logits, dloss), (logits.double(), dloss.double()))
    )
    assert_accurate("loss", ours, yardstick[0][0], truth[0][0], Result(loss_terms(logits)))
    assert_accurate_logits_gradient(gradient, yardstick[1][0], truth[1][0], labels, dloss)


@pytest.mark.parametrize(("rows", "vocab", "dtype", "z_loss"), SIZES)
def test_cross_entropy(rows: int, vocab: int, dtype: torch.dtype, z_loss: float, device: torch.device) -> None:
    logits = 3 * torch.randn(rows, vocab, dtype=dtype, device=device)
    check(logits, some_labels(rows, vocab, device), torch.randn(rows, device=device), z_loss)


@pytest.mark.slow
@every_size
def test_every_size_in_every_dtype(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    test_cross_entropy(rows, width, dtype, 1e-3, device)


def check_in_place(logits: torch.Tensor, labels: torch.Tensor, z_loss: float) -> torch.Tensor:
    """Checks the gradient that has replaced the logits."""
    scale = torch.tensor(0.37, device=logits.device)
    ours, yardstick, truth = logits.clone(), logits.clone(), logits.double()
    loss = cross_entropy_with_grad_(ours, labels, scale, IGNORED, z_loss)
    yardstick_loss = reference.cross_entropy_with_grad_(yardstick, labels, scale, IGNORED, z_loss)
    true_loss, (true_gradient,) = evaluate(
        lambda x: reference.cross_entropy(x, labels, IGNORED, z_loss), (truth,), (scale.double().expand(len(labels)),)
    )
    assert_accurate("loss", loss, yardstick_loss, true_loss[0], Result(loss_terms(logits)))
    assert_accurate_logits_gradient(ours, yardstick, true_gradient, labels, scale.expand(len(labels)))
    assert not loss[labels == IGNORED].any()
    assert not ours[labels == IGNORED].any()
    return loss


@pytest.mark.parametrize(("rows", "vocab", "dtype", "z_loss"), SIZES)
def test_with_grad_in_place(rows: int, vocab: int, dtype: torch.dtype, z_loss: float, device: torch.device) -> None:
    logits, labels = 3 * torch.randn(rows, vocab, dtype=dtype, device=device), some_labels(rows, vocab, device)
    loss = check_in_place(logits, labels, z_loss)
    assert torch.equal(loss == 0, labels == IGNORED) or vocab == 1


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_of_the_vocabulary_add_up(shards: int, device: torch.device) -> None:
    logits = 3 * torch.randn(8, 300, device=device)
    labels, scale, z_loss = some_labels(8, 300, device), torch.tensor(0.37, device=device), 1e-2
    parts = [part.clone() for part in logits.chunk(shards, 1)]
    offsets = [sum(part.shape[1] for part in parts[:i]) for i in range(shards)]
    found = [cross_entropy_stats(part, labels, offset) for part, offset in zip(parts, offsets, strict=True)]
    for (maximum, sum_exp, target), part, offset in zip(found, parts, offsets, strict=True):
        expected = reference.cross_entropy_stats(part, labels, offset)
        torch.testing.assert_close((maximum, sum_exp, target), expected)
    maximum = torch.stack([maximum for maximum, _, _ in found]).amax(0)
    sum_exp = torch.stack([sum_exp * torch.exp(peak - maximum) for peak, sum_exp, _ in found]).sum(0)
    logsumexp = maximum + torch.log(sum_exp)
    loss = logsumexp - torch.stack([target for _, _, target in found]).sum(0) + z_loss * logsumexp**2
    for part, offset in zip(parts, offsets, strict=True):
        cross_entropy_grad_(part, labels, offset, logsumexp, scale, IGNORED, z_loss)
    whole = logits.double().requires_grad_()
    true_loss = reference.cross_entropy(whole, labels, IGNORED, z_loss)
    (true_gradient,) = torch.autograd.grad(true_loss.sum() * scale, whole)
    torch.testing.assert_close(torch.where(labels != IGNORED, loss, 0.0).double(), true_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.cat(parts, 1).double(), true_gradient, atol=1e-7, rtol=1e-5)


def test_everything_ignored(device: torch.device) -> None:
    logits = torch.full((3, 50), float("nan"), device=device)  # not even read
    loss = cross_entropy_with_grad_(logits, torch.full((3,), IGNORED, device=device), torch.ones((), device=device))
    assert not loss.any()
    assert not logits.any()


def test_other_ignore_index(device: torch.device) -> None:
    logits, labels = torch.randn(4, 9, device=device), torch.tensor([0, 3, 8, 3], device=device)
    assert torch.equal(cross_entropy(logits, labels, ignore_index=3) == 0, labels == 3)
    torch.testing.assert_close(
        cross_entropy(logits, labels, ignore_index=3), reference.cross_entropy(logits, labels, ignore_index=3)
    )


@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_impossible_label_gives_nan(label: int, device: torch.device) -> None:
    logits, labels = torch.randn(2, 50, device=device), torch.tensor([label, 1], device=device)
    loss = cross_entropy(logits, labels)
    assert loss.isnan().tolist() == [True, False]
    guarded = torch.randn(4, 50, device=device)  # rows before and behind, which no such label may reach
    before = guarded.clone()
    loss = cross_entropy_with_grad_(guarded[1:3], labels, torch.ones((), device=device))
    assert loss.isnan().tolist() == [True, False]
    assert torch.equal(guarded[::3], before[::3])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("magnitude", [1e30, 1e10, 2e9, 3e8, 1e4, 1e-6])
def test_huge_and_tiny(magnitude: float, dtype: torch.dtype, device: torch.device) -> None:
    """At 3e8 some rows' maximum times log2(e) is below 2^30, and some above, where the exponents' base changes."""
    logits, labels = magnitude * torch.randn(40, 130, device=device).to(dtype), some_labels(40, 130, device)
    check(logits, labels, torch.randn(40, device=device), 0.0)
    check_in_place(logits, labels, 0.0)
    check_in_place(-logits.abs() - magnitude, labels, 0.0)  # none near zero


def test_a_row_of_the_least_number(device: torch.device) -> None:
    """All columns are equally likely, as with any other number."""
    least = torch.full((2, 10), torch.finfo(torch.float32).min, device=device)
    labels = torch.tensor([0, 9], device=device)
    loss = cross_entropy(least, labels)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(10)))
    torch.testing.assert_close(cross_entropy_with_grad_(least, labels, torch.ones((), device=device)), loss)
    torch.testing.assert_close(least, 0.1 - torch.nn.functional.one_hot(labels, 10))


def test_minus_infinity_masks_a_column(device: torch.device) -> None:
    logits = torch.randn(4, 130, device=device)
    logits[:, 5::7] = -float("inf")
    labels, scale = torch.tensor([0, 1, 2, IGNORED], device=device), torch.ones((), device=device)
    wide = logits.double().requires_grad_()
    true_loss = reference.cross_entropy(wide, labels)
    (true_gradient,) = torch.autograd.grad(true_loss.sum(), wide)
    loss = cross_entropy_with_grad_(logits, labels, scale)
    torch.testing.assert_close(loss.double(), true_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits.double(), true_gradient, atol=1e-7, rtol=1e-5)


def test_a_label_of_minus_infinity_costs_everything(device: torch.device) -> None:
    """Its loss is infinite, and the gradient what it would be of any label."""
    row, labels = torch.tensor([[0.0, 1.0, -float("inf")]], device=device), torch.tensor([2], device=device)
    for module in (titan_kernels, reference):
        logits = row.clone()
        loss = module.cross_entropy_with_grad_(logits, labels, torch.ones((), device=device))
        assert loss.item() == float("inf")
        torch.testing.assert_close(logits, row.softmax(-1) - torch.eye(3, device=device)[labels])


@pytest.mark.parametrize("layout", ["columns", "transposed"])
def test_strided_logits_labels_and_gradients(layout: str, device: torch.device) -> None:
    wide = torch.randn(6, 200, dtype=BF16, device=device)
    logits = wide[:, :100] if layout == "columns" else wide[:, :6].t()[:6]
    labels = some_labels(12, logits.shape[1], device)[::2]
    check(logits, labels, torch.randn(12, device=device)[::2], 1e-2)
    check(logits, labels, torch.randn((), device=device).expand(6), 1e-2)


def test_in_place_on_columns_of_a_wider_tensor(device: torch.device) -> None:
    wide = torch.randn(6, 200, device=device)
    labels, scale, rest = some_labels(6, 100, device), torch.ones((), device=device), wide[:, 100:].clone()
    expected = wide[:, :100].clone()
    cross_entropy_with_grad_(expected, labels, scale)
    cross_entropy_with_grad_(wide[:, :100], labels, scale)
    assert torch.equal(wide[:, :100], expected)
    assert torch.equal(wide[:, 100:], rest)


def test_autograd_notices_that_logits_were_overwritten(device: torch.device) -> None:
    x, w = torch.randn(3, 4, device=device, requires_grad=True), torch.ones(3, 4, device=device, requires_grad=True)
    logits = (x * 2).detach()
    y = logits * w  # saves logits
    cross_entropy_with_grad_(logits, torch.zeros(3, dtype=torch.int64, device=device), torch.ones((), device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_label_beside_a_shard_is_not_in_it(device: torch.device) -> None:
    """Whatever lies beside the shard in memory: here it is a part of wider rows."""
    wide = torch.randn(4, 20, device=device)
    labels = torch.tensor([7, 8, 15, 16], device=device)
    _, _, target = cross_entropy_stats(wide[:, 8:16], labels, 8)
    assert torch.equal(target, torch.tensor([0.0, wide[1, 8], wide[2, 15], 0.0], device=device))


def test_zero_rows(device: torch.device) -> None:
    logits, labels = torch.randn(0, 50, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    (loss,), (gradient,) = evaluate(lambda x: cross_entropy(x, labels), (logits,), (torch.zeros(0, device=device),))
    assert loss.shape == (0,)
    assert gradient.shape == (0, 50)
    assert cross_entropy_with_grad_(logits, labels, torch.ones((), device=device)).shape == (0,)
    assert [tensor.shape for tensor in cross_entropy_stats(logits, labels)] == [(0,)] * 3


def test_deterministic(device: torch.device) -> None:
    logits, labels = torch.randn(8, 3000, device=device), some_labels(8, 3000, device)
    runs = [logits.clone(), logits.clone()]
    losses = [cross_entropy_with_grad_(run, labels, torch.ones((), device=device)) for run in runs]
    assert torch.equal(*losses)
    assert torch.equal(*runs)


def longs(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.ones(2, 3, 4), longs(2), r"logits have shape \[2, 3, 4\]"),
        (torch.ones(2, 0), longs(2), r"logits have shape \[2, 0\]"),
        (torch.ones(2, 4), longs(3), r"labels have shape \[3\], logits \[2, 4\]"),
        (torch.ones(2, 4), longs(2).int(), "torch.int32, not torch.int64"),
        (torch.ones(2, 4).double(), longs(2), "not torch.float64"),
    ],
)
def test_bad_input(logits: Tensor, labels: Tensor, message: str, device: torch.device) -> None:
    logits, labels, scale = logits.to(device), labels.to(device), torch.ones((), device=device)
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=message):
        cross_entropy_stats(logits, labels)
    with pytest.raises(ValueError, match=message):
        cross_entropy_with_grad_(logits, labels, scale)


@pytest.mark.parametrize(
    ("logits", "logsumexp", "scale", "message"),
    [
        (torch.ones(4, 2).t(), torch.ones(2), torch.ones(()), "not adjacent columns"),
        (torch.ones(4).expand(2, 4), torch.ones(2), torch.ones(()), r"strides \(0, 1\): rows that overlap"),
        (torch.ones(7).as_strided((2, 4), (3, 1)), torch.ones(2), torch.ones(()), "rows that overlap"),
        (torch.ones(2, 4), torch.ones(2), torch.ones(1), r"scale of shape \[1\]"),
        (torch.ones(2, 4), torch.ones(2), torch.ones(()).double(), "torch.float64; needs one number in float32"),
        (torch.ones(2, 4), torch.ones(3), torch.ones(()), r"logsumexp of shape \[3\]"),
        (torch.ones(2, 4, requires_grad=True), torch.ones(2), torch.ones(()), "would be overwritten"),
    ],
)
def test_bad_input_in_place(
    logits: Tensor, logsumexp: Tensor, scale: Tensor, message: str, device: torch.device
) -> None:
    memory = logits.detach().new_ones(8).to(device)
    logits = memory.as_strided(logits.shape, logits.stride()).requires_grad_(logits.requires_grad)
    labels = torch.zeros(2, dtype=torch.int64, device=logits.device)
    with pytest.raises(ValueError, match=message):
        cross_entropy_grad_(logits, labels, 0, logsumexp.to(device), scale.to(device))
    if "logsumexp" not in message:
        with pytest.raises(ValueError, match=message):
            cross_entropy_with_grad_(logits, labels, scale.to(device))


def test_one_row_overlaps_with_none(device: torch.device) -> None:
    """A chunk of one token, whatever its stride."""
    logits, labels = torch.randn(1, 4, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    expected = logits.clone()
    loss = cross_entropy_with_grad_(logits.as_strided((1, 4), (0, 1)), labels, torch.ones((), device=device))
    torch.testing.assert_close(
        loss, reference.cross_entropy_with_grad_(expected, labels, torch.ones((), device=device))
    )
    torch.testing.assert_close(logits, expected)
