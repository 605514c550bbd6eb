"""The run's history: metrics.jsonl, one JSON object a line, and the loss curve that is drawn from it.

A logged step has the keys of metrics.MetricsLogger.log, a measurement on held-out text `step` and `validation_loss`,
the end of a process `step` and `elapsed_seconds`. A number that is not finite is null, and `non_finite` says what it
was: {"loss": null, "non_finite": {"loss": "nan"}}.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from titan_fast.manifest import sync
from titan_fast.pictures import new_figure

Record = dict[str, Any]

BAD_STEPS = "bad_steps.jsonl"
"""A file of the same kind, in which guard.py notes steps that were not applied, and spikes."""
NOT_FINITE = "not finite"
"""Its word for the former."""


def encode(record: Record) -> str:
    """One line of strict JSON, which has no NaN and no infinity."""
    strange = {
        key: str(value) for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)
    }
    if strange:
        record = {key: None if key in strange else value for key, value in record.items()} | {"non_finite": strange}
    return json.dumps(record, allow_nan=False) + "\n"


def read(path: Path) -> Iterator[Record]:
    """The records of the file, none where there is no file. Lines that a kill or a full disk left incomplete are
    skipped."""
    if path.exists():
        with path.open("rb") as lines:
            yield from (record for line in lines if (record := _record(line)) is not None)


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def go_on_from(path: Path, step: int, went_back: bool = False) -> str:
    """Makes the file the history of a run that continues from `step`. Returns a line for the log, or "". went_back:
    whether the run leaves steps that were saved, whose lines are then kept beside it."""
    if step == 0:
        aside = set_aside(path)
        return f"the run begins again at step 0; {path.name} of an earlier start is now {aside.name}" if aside else ""
    last = max((record["step"] for record in read(path)), default=0) if went_back else 0  # reading takes time
    copy = shutil.copyfile(path, _aside(path, last)) if last > step else None
    cut = keep_until(path, step)
    lines = "1 line" if cut == 1 else f"{cut} lines"
    kept = f"; {copy.name} has all" if copy else ""
    return f"{path.name}: cut off {lines} after step {step}, where this run starts{kept}" if cut else ""


def set_aside(path: Path) -> Path | None:
    """Renames the history of an earlier start to `metrics-until-STEP.jsonl`, so that a run from step 0 begins a new
    one. Returns the new path; None where there was no history."""
    last = max((record["step"] for record in read(path)), default=None)
    if last is None:
        path.unlink(missing_ok=True)
        return None
    return path.rename(_aside(path, last))


def _aside(path: Path, last: int) -> Path:
    """A name that is free, for a history that ends with step `last`."""
    stem = f"{path.stem}-until-{last}"
    names = (path.with_stem(f"{stem}{more}") for more in chain([""], (f"-{number}" for number in count(2))))
    return next(name for name in names if not name.exists())


def keep_until(path: Path, step: int) -> int:
    """Removes incomplete lines and what comes after `step`, so that a run that continues from there writes one history.
    Returns the number of lines removed. The file is replaced as a whole or not at all."""
    if not path.exists():
        return 0
    before = path.read_bytes()
    lines = before.splitlines()
    kept = [line for line in lines if (record := _record(line)) is not None and record["step"] <= step]
    after = b"".join(line + b"\n" for line in kept)
    if after != before:
        replacement = path.with_name(path.name + ".new")
        with replacement.open("wb") as file:
            file.write(after)
            file.flush()
            sync(file.fileno())
        replacement.replace(path)
    return len(lines) - len(kept)


def losses(records: Iterable[Record]) -> list[Record]:
    """The logged steps whose loss is a number."""
    return [record for record in records if record.get("loss") is not None]


def validations(records: Iterable[Record]) -> list[Record]:
    """The measurements on held-out text that gave a number."""
    return [record for record in records if record.get("validation_loss") is not None]


def not_applied(run_dir: Path) -> int:
    """How many steps the run has left out."""
    return sum(record.get("what") == NOT_FINITE for record in read(run_dir / BAD_STEPS))


def draw_loss_curve(records: list[Record], path: Path, title: str) -> None:
    """Draws loss, and validation loss where it was measured, against tokens into a PNG at `path`."""
    figure = new_figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    from matplotlib.ticker import EngFormatter

    axes = figure.add_subplot()
    train, held_out = losses(records), validations(records)
    axes.plot(
        [record["tokens_seen"] for record in train],
        [record["loss"] for record in train],
        color="#3b6ea8",
        linewidth=1.4,
        marker="." if len(train) < 60 else None,
        label=f"training, last {train[-1]['loss']:.3f}" if train else None,
    )
    if held_out:
        axes.plot(
            _tokens_at([record["step"] for record in held_out], records),
            [record["validation_loss"] for record in held_out],
            color="#c4561b",
            linestyle="none",
            marker="o",
            markersize=5,
            label=f"held-out text, last {held_out[-1]['validation_loss']:.3f}",
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.set_title(title, parse_math=False)  # a user's words, in which a dollar is a dollar
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    replacement = path.with_name(path.name + ".new")
    try:
        figure.savefig(replacement, format="png")
        replacement.replace(path)
    finally:
        replacement.unlink(missing_ok=True)


def _tokens_at(steps: list[int], records: list[Record]) -> list[float]:
    """Tokens seen at each of `steps`, interpolated between logged steps."""
    import numpy as np

    # From every logged step, including those whose loss was not a number.
    seen = {0: 0} | {record["step"]: record["tokens_seen"] for record in records if "tokens_seen" in record}
    logged = sorted(seen)
    return np.interp(steps, logged, [seen[step] for step in logged]).tolist()
