"""Requests that are summed over ranks: answered at once on the CPU, a step later on CUDA, and each only once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from titan_fast import agreement
from titan_fast.agreement import Agreed, Agreement

NOTHING = Agreed(False, False, False)


class Event:
    """A replacement for a CUDA event, which checks that it is waited for before the copy is read."""

    def record(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Agreement:
    """CUDA's behaviour, with the CPU's memory and events."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(agreement, "_pinned", lambda: torch.empty(4))
    asks = Agreement(torch.device("cpu"))
    asks._on_device = True
    read = agreement._agreed

    def checked(host: Tensor) -> Agreed:
        (event,) = [event for copy, event in asks._copies if copy is host]
        assert isinstance(event, Event) and event.waited
        return read(host)

    monkeypatch.setattr(agreement, "_agreed", checked)
    return asks


def steps(asks: Agreement, wishes: list[tuple[bool, bool, bool]], others: dict[int, list[float]]) -> list[Agreed]:
    """The answers of consecutive steps; `others`: what another rank adds to the sum of a step."""
    answers = []
    for step, wish in enumerate(wishes):
        summed = asks.ask(torch.tensor(2.0), *wish)
        answers.append(asks.answer(summed + torch.tensor([1.0, *others.get(step, [0.0] * 3)])))
    return answers


def test_a_cpu_answers_at_once() -> None:
    asks = Agreement(torch.device("cpu"))
    answers = steps(asks, [(False, True, False), (False, False, False), (True, False, False)], {1: [0.0, 0.0, 1.0]})
    assert answers == [Agreed(False, True, False), Agreed(False, False, True), Agreed(True, False, False)]
    assert Agreement.steps_to_stop(torch.device("cpu")) == 2  # where the signal comes after a step has asked


def test_a_gpu_answers_a_step_later(late: Agreement) -> None:
    answers = steps(late, [(False, False, False), (True, False, False), (True, False, False)], {})
    assert answers == [NOTHING, NOTHING, Agreed(True, False, False)]
    # The signal came in the first of these steps, after it had asked.
    assert Agreement.steps_to_stop(torch.device("cuda")) == len(answers)


def test_a_wish_is_granted_once(late: Agreement) -> None:
    """A clock asks until something has been saved, which a later step does."""
    last_save, saves, time = 0, [], 0
    for step in range(20):
        time += 40
        summed = late.ask(torch.tensor(2.0), False, time - last_save >= 120, False)
        if late.answer(summed).save:
            saves.append(step)
            last_save = time
    assert saves == [3, 7, 11, 15, 19]


def test_another_ranks_wish_is_no_answer_to_an_own_one(late: Agreement) -> None:
    wishes: list[Any] = [(False, False, False), (False, True, False), (False, True, False), (False, False, False)]
    answers = steps(late, wishes, {0: [0.0, 0.0, 1.0]})
    assert answers == [NOTHING, Agreed(False, False, True), Agreed(False, True, False), NOTHING]
