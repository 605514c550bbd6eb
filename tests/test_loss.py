"""The chunked loss, compared with torch's cross entropy on all logits in float64."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import gradient
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from titan_fast.compilation import compiled_cross_entropy
from titan_fast.loss import IGNORE_INDEX, LinearCrossEntropy, root_gradient
from titan_fast.ops import REFERENCE, Ops


class Operators(TorchDispatchMode):
    """Records the operators that run, and the dtype and shape of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: set[tuple[torch.dtype, torch.Size]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        self.results |= {(t.dtype, t.shape) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


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


def test_no_token_at_all_has_gradients_of_zero() -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # which fills what is not written with NaN
    try:
        loss = LinearCrossEntropy(REFERENCE, 4)(x, weight, torch.empty(0, dtype=torch.int64), torch.tensor(1.0))
    finally:
        torch.use_deterministic_algorithms(False)
    loss.backward()
    assert loss.item() == 0 and gradient(x).shape == x.shape and torch.equal(gradient(weight), torch.zeros(300, 8))


def test_float64_is_summed_in_float64() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(64, 32, dtype=torch.float64), torch.randint(50, (64,))
    weight = torch.randn(50, 32, dtype=torch.float64, requires_grad=True)
    LinearCrossEntropy(REFERENCE, 8)(x, weight, labels, torch.tensor(1.0)).backward()
    truth = expected(x, weight.detach(), labels, 1.0, 0.0)[2]
    torch.testing.assert_close(gradient(weight), truth, rtol=1e-12, atol=1e-12)


def test_large_logits_stay_finite() -> None:
    x, weight = torch.full((2, 4), 100.0, requires_grad=True), torch.eye(4) * 100
    loss = LinearCrossEntropy(REFERENCE)(x, weight, torch.tensor([0, 3]), torch.tensor(1.0))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gradient(x)).all()


@pytest.mark.parametrize("group", [None, "of one rank"])
@pytest.mark.parametrize("ops", [REFERENCE, compiled_cross_entropy(REFERENCE, lambda function: function)])
def test_no_z_loss_is_not_zero_times_a_square_that_overflows(
    ops: Ops, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: None)
    loss = LinearCrossEntropy(ops, vocab_group=group)
    logits, labels = torch.tensor([[1e30, -1e30, 2e30], [0.0, 3e30, 0.0]]), torch.tensor([0, 1])
    assert loss.differentiate_(logits, labels, torch.tensor(1.0), True) == torch.tensor(1e30)
    assert torch.equal(logits, torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradient(under: Any) -> None:
    """Even for a weight that is trained otherwise: a chunk has one matrix product, for its logits."""
    x, weight = torch.randn(6, 8), torch.nn.Parameter(torch.randn(9, 8))
    labels = torch.tensor([0, 1, IGNORE_INDEX, 3, 4, 5])
    with under(), FlopCounterMode(display=False) as counted:
        loss = LinearCrossEntropy(REFERENCE, 2)(x, weight, labels, torch.tensor(1 / 5))
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


@pytest.mark.parametrize("chunk_size", [0, 32, 16])
def test_as_root_it_multiplies_with_nothing(chunk_size: int) -> None:
    """With `root_gradient` gradients equal those with torch's own 1 bit for bit, and need no pass over them."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(50, 32).bfloat16()
    labels = torch.randint(50, (64,))

    def differentiate(root: bool) -> tuple[list[torch.Tensor], list[str]]:
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = LinearCrossEntropy(REFERENCE, chunk_size)(inputs[0], inputs[1], labels, torch.tensor(0.3))
        one = root_gradient(loss) if root else torch.ones_like(loss)
        with Operators() as seen:
            loss.backward(one)
        return [gradient(tensor) for tensor in inputs], seen.names

    (ours, spared), (theirs, multiplied) = differentiate(root=True), differentiate(root=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any("mul" in name for name in multiplied) and not any("mul" in name for name in spared)


def test_chunks_are_rounded_at_most_twice() -> None:
    """The weight's gradient of two chunks is a bfloat16 sum, rounded twice; those of more are summed in float32 and
    rounded once, as for a single one."""
    torch.manual_seed(0)
    x, weight = torch.randn(256, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    labels = torch.randint(500, (256,))
    truth = expected(x, weight, labels, 1.0, 0.0)[2]

    def error(chunk_size: int) -> tuple[float, bool]:
        head = weight.clone().requires_grad_()
        with Operators() as seen:
            loss = LinearCrossEntropy(REFERENCE, chunk_size)(x, head, labels, torch.tensor(1.0))
        loss.backward()
        wide = (torch.float32, weight.shape) in seen.results
        return ((gradient(head).double() - truth).norm() / truth.norm()).item(), wide

    (one, _), (two, two_wide), (four, four_wide), (many, _) = error(256), error(128), error(64), error(8)
    assert not two_wide and four_wide
    assert one < two
    assert four == pytest.approx(one, rel=1e-2) and many == pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize("chunk_size", [0, 32, 16])
def test_a_port_takes_the_gradient_unrounded(chunk_size: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(50, 32).bfloat16().requires_grad_()
    labels, port = torch.randint(50, (64,)), torch.zeros(()).expand(50, 32).requires_grad_()

    def found(factor: float, way: torch.Tensor | None) -> torch.Tensor:
        loss = LinearCrossEntropy(REFERENCE, chunk_size, port=way)(x, weight, labels, torch.tensor(0.3))
        (factor * loss).backward() if factor != 1 else loss.backward(root_gradient(loss))
        return gradient(weight if way is None else way)

    one = found(1.0, port)
    assert weight.grad is None and one.dtype == torch.float32
    port.grad = None
    torch.testing.assert_close(found(2.0, port), 2 * one)
    narrow = found(1.0, None)
    assert 1e-4 < ((narrow.float() - one).norm() / one.norm()).item() < 1e-2
