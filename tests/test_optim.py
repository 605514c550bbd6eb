"""Learning rates, parameter groups, clipping, and that a step with a non-finite gradient is not taken."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import gradient
from shapes import LLAMA3

from titan_fast.config import LrScheduler, Optimizer
from titan_fast.masters import OnePassAdamW
from titan_fast.model import Llama, init_weights
from titan_fast.optim import (
    build_optimizer,
    clip_grad_norm_,
    clip_gradients,
    describe_schedule,
    learning_rate,
    step_unless,
)


def test_schedule_warms_up_holds_and_decays() -> None:
    settings = LrScheduler(warmup_steps=10, decay_ratio=0.2, decay_type="linear", min_lr_factor=0.1)
    rates = [learning_rate(step, settings, 2.0, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0
    assert set(rates[10:80]) == {2.0}
    assert rates[89] == pytest.approx(2.0 * 0.55) and rates[99] == pytest.approx(0.2)
    odd = LrScheduler(warmup_steps=0, decay_ratio=0.29)  # 0.29 * 100 is 28.999999999999996
    assert learning_rate(71, odd, 1.0, 100) == 1.0 > learning_rate(72, odd, 1.0, 100)
    long = LrScheduler(warmup_steps=50, decay_ratio=0.8, decay_type="linear", min_lr_factor=0.0)
    assert learning_rate(60, long, 1.0, 100) == pytest.approx(0.8)  # 50 steps to decay in, not 80


@pytest.mark.parametrize("settings", [LrScheduler(2, 10, decay_ratio=0.0), LrScheduler(20, 10)])
def test_what_does_not_decay_stays_where_it_is_past_the_schedule(settings: LrScheduler) -> None:
    assert [learning_rate(step, settings, 1.0, 30) for step in (10, 11, 30)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_decay_shapes(kind: str, middle: float) -> None:
    settings = LrScheduler(warmup_steps=0, decay_type=kind, min_lr_factor=0.0)  # type: ignore[arg-type]
    assert 0.9 <= learning_rate(1, settings, 1.0, 100) < 1.0
    assert learning_rate(50, settings, 1.0, 100) == pytest.approx(middle)
    assert learning_rate(100, settings, 1.0, 100) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(500, settings, 1.0, 100) == pytest.approx(0.0, abs=1e-12)


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    settings = LrScheduler(warmup_steps=200)
    rates = [learning_rate(step, settings, 1.0, 10) for step in range(1, 11)]
    assert rates == sorted(rates) and rates[-1] == 1.0


def small_model() -> Llama:
    model = Llama(LLAMA3)
    init_weights(model, 0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_norms_and_embedding_can_be_spared_from_decay() -> None:
    model = small_model()
    groups = build_optimizer(model, Optimizer(decay_norms_and_embeddings=False)).param_groups
    spared = {id(p) for p in groups[1]["params"]}
    assert groups[1]["weight_decay"] == 0.0 and groups[0]["weight_decay"] == 0.1
    named = {name for name, p in model.named_parameters() if id(p) in spared}
    assert named == {name for name, _ in model.named_parameters() if "norm" in name or name == "embedding.weight"}


@pytest.mark.parametrize("compiled", [None, lambda function: function], ids=["torch", "one pass"])
def test_adamw_takes_its_numbers_from_the_config(compiled: Callable[[Any], Any] | None) -> None:
    settings = Optimizer(lr=0.1, beta1=0.6, beta2=0.7, eps=1e-3, weight_decay=0.2, decay_norms_and_embeddings=False)
    optimizer = build_optimizer(small_model(), settings, compiled)
    assert isinstance(optimizer, OnePassAdamW) == (compiled is not None)
    numbers = [tuple(group[key] for key in ("lr", "betas", "eps", "weight_decay")) for group in optimizer.param_groups]
    assert numbers == [(0.1, (0.6, 0.7), 1e-3, 0.2), (0.1, (0.6, 0.7), 1e-3, 0.0)]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_clipping_is_torchs(max_norm: float) -> None:
    model, twin = small_model(), small_model()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = gradient(p).clone()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm or math.inf)
    norm = clip_grad_norm_(model.parameters(), max_norm, torch.tensor(1.0))
    torch.testing.assert_close(norm, expected)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_clipping_inside_of_the_update_is_clipping_before_it(max_norm: float) -> None:
    model, twin = small_model(), small_model()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = gradient(p).clone()
    settings = Optimizer(eps=1e-3)  # large: AdamW's first step is else the same for gradients of any size
    optimizer, reference = build_optimizer(model, settings, lambda function: function), build_optimizer(twin, settings)
    norms = [clip_gradients(one, max_norm, torch.tensor(1.0)) for one in (optimizer, reference)]
    torch.testing.assert_close(*norms)
    for one in (optimizer, reference):
        one.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_spoils_the_norm(bad: float) -> None:
    assert torch.isnan(clip_grad_norm_(small_model().parameters(), 1.0, torch.tensor(bad)))


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_a_bad_step_changes_nothing(implementation: str) -> None:
    model = small_model()
    optimizer = build_optimizer(model, Optimizer(implementation=implementation))  # type: ignore[arg-type]
    step_unless(optimizer, torch.tensor(0.0))

    def everything() -> list[torch.Tensor]:
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        return [p.detach().clone() for p in model.parameters()] + moments

    before = everything()
    for parameter in model.parameters():
        gradient(parameter).fill_(math.nan)
    step_unless(optimizer, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    for parameter in model.parameters():
        gradient(parameter).fill_(1.0)
    step_unless(optimizer, torch.tensor(0.0))
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


@pytest.mark.parametrize(
    ("changes", "steps", "words"),
    [
        ({}, 100, "3.00e-04 after 20 warm-up steps, cosine to 3.00e-05 at step 100"),
        ({"warmup_steps": 0, "decay_ratio": 0.0}, 100, "3.00e-04, stable to step 100"),
        ({"decay_ratio": 0.2, "total_steps": 500}, 100, "3.00e-04 after 20 warm-up steps, stable to step 400, cosine"),
        ({"warmup_steps": 2000}, 100, "rises for all 100 steps to 3.00e-04: lr_scheduler.warmup_steps 2,000 leaves"),
    ],
)
def test_a_schedule_in_words(changes: dict[str, Any], steps: int, words: str) -> None:
    assert describe_schedule(LrScheduler(**changes), 3e-4, steps).startswith(words)
