"""Steps that must not count: a loss or gradient that is not finite is never applied; a loss spike is written down."""

import json
import math
import shlex
from collections import deque
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_fast.config import Training, is_hub
from titan_fast.errors import NumericsError
from titan_fast.log_file import LogFile
from titan_fast.metrics import small
from titan_fast.run_history import BAD_STEPS, NOT_FINITE

WINDOW, LEAST, DEVIATIONS = 128, 32, 6.0
"""A spike is a loss over DEVIATIONS standard deviations above the mean of the last WINDOW losses that were not spikes;
there must be at least LEAST of those. After LEAST spikes in a row, their level is taken to be the normal one."""


class _Step(NamedTuple):
    step: int
    position: dict[str, Any]
    loss: Tensor
    norm: Tensor


class StepGuard:
    """Decides on the device, from the loss and the norm, which all ranks share. The host looks at the outcome when it
    waits anyway."""

    def __init__(
        self, training: Training, device: torch.device, run_dir: Path, is_main: bool, skipped: int = 0
    ) -> None:
        """skipped: how many steps before this start were not applied."""
        self.limit = 0 if training.on_nonfinite == "stop" else training.max_skipped_steps
        self._file = LogFile(run_dir / BAD_STEPS)
        self.run_dir, self.is_main, self._is_stream = run_dir, is_main, is_hub(training)
        self.skipped = skipped
        """How many steps of the run were not applied, as far as the host has looked."""
        self.last_was_bad = False
        """Whether the last step that the host has looked at was not applied."""
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._stopped_at = torch.zeros((), dtype=torch.int64, device=device)  # 0: not stopped
        self._unseen: list[_Step] = []
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._spikes: list[float] = []  # in a row

    def judge(self, step: int, position: dict[str, Any], loss: Tensor, norm: Tensor) -> Tensor:
        """0-dim float32 on the device, nonzero where the step must not be applied: its loss or norm is not finite, or
        an earlier step has already ended the run. `loss` is the global batch's, `norm` the gradient's, both 0-dim and
        the same on every rank."""
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        stops = (self._in_a_row > self.limit) & (self._stopped_at == 0)
        self._stopped_at = torch.where(stops, step, self._stopped_at)
        self._unseen.append(_Step(step, position, loss, norm))
        return (bad | (self._stopped_at != 0)).float()

    def look(self) -> list[str]:
        """Lines for the log about the steps since the last look; NumericsError where the run must stop. Waits for the
        device."""
        steps, self._unseen = self._unseen, []
        if not steps:
            return []
        losses = torch.stack([item.loss for item in steps]).tolist()
        norms = torch.stack([item.norm for item in steps]).tolist()
        stopped_at = int(self._stopped_at)
        lines = []
        for item, loss, norm in zip(steps, losses, norms, strict=True):
            self.last_was_bad = not (math.isfinite(norm) and math.isfinite(loss))
            if self.last_was_bad:
                self.skipped += 1
                self._record(item, NOT_FINITE, loss, norm)
                if item.step == stopped_at:
                    raise self._stop(item, loss, norm)
                lines.append(
                    f"step {item.step}: loss {loss}, grad norm {norm}: not applied, {self.skipped} so far; "
                    f"{self._where(item)}"
                )
            elif (usual := self._spike(loss)) is not None:
                self._record(item, "loss spike", loss, norm, usual_loss=usual)
                said = f"loss {small(loss)} after {small(usual)} on average"
                lines.append(f"step {item.step}: {said}; {self._where(item)}")
                self._spikes.append(loss)
                if len(self._spikes) == LEAST:
                    self._losses.clear()
                    self._losses.extend(self._spikes)
                    self._spikes.clear()
            else:
                self._losses.append(loss)
                self._spikes.clear()
        return lines

    def close(self) -> None:
        """Writes what a full disk has held up."""
        self._file.close()

    def _spike(self, loss: float) -> float | None:
        """The usual loss, if this one is a spike above it."""
        if len(self._losses) < LEAST:
            return None
        mean = fmean(self._losses)
        return mean if loss > mean + DEVIATIONS * max(pstdev(self._losses), 1e-4 * abs(mean)) else None

    def _stop(self, item: _Step, loss: float, norm: float) -> NumericsError:
        in_a_row = f", the last of {self.limit + 1} in a row" if self.limit else ""
        return NumericsError(
            f"the loss ({loss}) or the gradient (norm {norm}) of step {item.step} is not finite{in_a_row}, and was not "
            "applied",
            "no checkpoint contains it; look at the data there, lower optimizer.lr or clip harder"
            + ("" if self._is_stream else ", or skip these samples by training.skip_samples"),
            where=f"step {item.step}, {self._where(item)}",
        )

    def _where(self, item: _Step) -> str:
        words = "data: " + ", ".join(f"{key} {value}" for key, value in item.position.items())
        if self._is_stream or "last_sample" not in item.position:  # a stream's documents are not kept
            return words
        samples = f"{item.position['first_sample']}:{item.position['last_sample']}"
        folder = shlex.quote(str(self.run_dir))
        return f"{words} (python -m titan_fast.data show --job.dump_folder {folder} --samples {samples})"

    def _record(self, item: _Step, what: str, loss: float, norm: float, **more: float) -> None:
        if not self.is_main:
            return
        numbers = {"loss": loss, "grad_norm": norm, **more}
        strict = {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}
        self._file.write(json.dumps({"step": item.step, "what": what, **strict, "data": item.position}) + "\n")
