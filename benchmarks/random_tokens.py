"""Uniformly random tokens for the training loader, which keeps its thread and pinned copies but tokenizes nothing."""

from typing import Any

import numpy as np

from titan_fast.loader import Step

END_OF_DOCUMENT = 0


class RandomTokens:
    """A `titan_fast.loader.Source`. cycle: after so many steps they repeat; None: new tokens in every step. document:
    documents of so many tokens on average, each of which ends with `END_OF_DOCUMENT`."""

    def __init__(
        self, batch: int, seq_len: int, vocab_size: int, cycle: int | None = None, document: int | None = None
    ) -> None:
        self.identity: dict[str, Any] = {"kind": "random"}
        self.size, self.vocab_size, self.cycle = (batch, seq_len + 1), vocab_size, cycle
        self.document = document
        self.generator = np.random.default_rng(0)
        self.steps = 0

    def describe(self) -> str:
        return "random tokens"

    def next_step(self, stopping: Any) -> Step:
        if self.cycle is not None:
            self.generator = np.random.default_rng(self.steps % self.cycle)
        self.steps += 1
        text = self.generator.integers(self.vocab_size, size=self.size, dtype=np.int64)
        if self.document is not None:
            text[text == END_OF_DOCUMENT] = END_OF_DOCUMENT + 1
            text[self.generator.random(self.size) < 1 / self.document] = END_OF_DOCUMENT
        return Step([(text[:, :-1], text[:, 1:])], {}, None)

    def state(self) -> None:
        return None

    def load_state(self, state: Any) -> None:
        return None

    def state_to_json(self, state: Any) -> dict[str, Any]:
        return {}
