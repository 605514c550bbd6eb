"""The chunked loss against torch's cross entropy on whole float64 logits."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import gradient
from torch.utils.flop_counter import FlopCounterMode

from titan_fast.loss import IGNORE_INDEX, LinearCrossEntropy
from titan_fast.ops import REFERENCE


def expected(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, gradient by x, gradient by weight) in float64 by autograd."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = x @ weight.T
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = loss + z_loss * (torch.logsumexp(logits, -1)[labels != IGNORE_INDEX] ** 2).sum()
    loss = loss * scale
    loss.backward()
    return loss.detach(), gradient(x), gradient(weight)


@pytest.mark.parametrize("chunk_size", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients(chunk_size: int, z_loss: float, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).to(dtype).requires_grad_(), torch.randn(50, 32).to(dtype).requires_grad_()
    labels = torch.randint(50, (64,))
    labels[::5] = IGNORE_INDEX
    loss = LinearCrossEntropy(REFERENCE, chunk_size, z_loss)(x.view(4, 16, 32), weight, labels, torch.tensor(0.3))
    (2 * loss).backward()
    truth = expected(x.detach(), weight.detach(), labels, 0.3, z_loss)
    for ours, theirs in zip((2 * loss, gradient(x), gradient(weight)), (2 * part for part in truth), strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < bound


def test_a_batch_without_labels_costs_nothing() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = LinearCrossEntropy(REFERENCE, 4)(x, weight, torch.full((6,), IGNORE_INDEX), torch.tensor(1.0))
    loss.backward()
    assert loss.item() == 0 and not gradient(x).any() and not gradient(weight).any()


def test_large_logits_stay_finite() -> None:
    x, weight = torch.full((2, 4), 100.0, requires_grad=True), torch.eye(4) * 100
    loss = LinearCrossEntropy(REFERENCE)(x, weight, torch.tensor([0, 3]), torch.tensor(1.0))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gradient(x)).all()


@pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradient(under: Any) -> None:
    """Of a weight that is trained otherwise: a chunk takes one matrix product, for its logits."""
    x, weight = torch.randn(6, 8), torch.nn.Parameter(torch.randn(9, 8))
    labels = torch.arange(6)
    with under(), FlopCounterMode(display=False) as counted:
        loss = LinearCrossEntropy(REFERENCE, 2)(x, weight, labels, torch.tensor(1 / 6))
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.T, labels).detach())
    assert not loss.requires_grad
    assert counted.get_total_flops() == 2 * 6 * 8 * 9


def test_what_is_evaluated_is_the_cross_entropy_alone() -> None:
    x, weight, labels = torch.randn(6, 8), torch.nn.Parameter(torch.randn(9, 8)), torch.arange(6)
    loss = LinearCrossEntropy(REFERENCE, 2, z_loss=0.5)
    trained = loss(x, weight, labels, torch.tensor(1.0))
    with torch.no_grad():
        evaluated = loss(x, weight, labels, torch.tensor(1.0))
        logits = x @ weight.T
    torch.testing.assert_close(evaluated, F.cross_entropy(logits, labels, reduction="sum"))
    torch.testing.assert_close(trained.detach() - evaluated, 0.5 * logits.logsumexp(-1).square().sum())


@pytest.mark.parametrize("trains", [True, False])
def test_logits_of_one_chunk_at_a_time(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.UntypedStorage]] = []
    linear = F.linear

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert all(reference() is None for reference in made)
        logits = linear(x, weight)
        made.append(weakref.ref(logits.untyped_storage()))
        return logits

    monkeypatch.setattr(F, "linear", watched)
    x, weight = torch.randn(6, 8, requires_grad=trains), torch.randn(9, 8, requires_grad=trains)
    LinearCrossEntropy(REFERENCE, 2)(x, weight, torch.arange(6), torch.tensor(1.0))
    assert len(made) == 3
