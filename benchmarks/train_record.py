"""Rows of the end-to-end benchmark as they are kept: with all that their figures mean nothing without."""

import math
from pathlib import Path
from typing import Any

from benchmarks.least_step import Limits, attention_call, least_step, limits_from
from benchmarks.result_files import read, slug, write
from benchmarks.train_cells import AS_SHIPPED, checkpoint_words
from benchmarks.workloads import MASTERS, Cell, config_of, rehearsed, shape_of
from titan_fast.config import Config
from titan_fast.flavors import ModelShape
from titan_fast.flops import FORMULAS, flops_per_token, mfu, peak_flops

Answer = dict[str, Any]
"""What a process found: its environment, and the rows of its cell."""
OUTCOMES = ("step_seconds", "parity", "error")
"""Keys one of which a row has as soon as it says anything."""
FULL_OUTCOMES = ("complete", "parity", "seconds_to_step_10")
"""Keys one of which a row has that needs no other attempt."""
ATTENTION = "limit_attention"
"""Key of the backend by whose rates a row's limit was made; cuDNN's where there is none."""
ATTEMPT = "later attempt"
"""Key of what came of running a whole row again where that came to less: its commit and its words."""


def record(cell: Cell, answer: Answer, out: Path, known: Limits | None) -> None:
    """Adds the rows that say something to the part's file."""
    rows = [described(cell, row, answer["environment"], known) for row in answer["rows"] if has_outcome(row)]
    join(rows, answer["environment"], cell.part, out)


def join(rows: list[dict[str, Any]], environment: dict[str, Any], part: str, out: Path) -> None:
    """Adds rows, each with its commit and versions, to the part's file, in place of earlier ones of the same cell and
    variant. An earlier one gives way to no less than it is itself: a whole one to a whole one, one that was cut off to
    as many steps. It notes what was less as a later attempt."""
    path = out / f"train-{slug(environment['device'])}-{part}.json"
    before = read(path) or {"environment": environment, "rows": []}
    found = {(row["cell"], row["variant"]): with_versions(row, before["environment"]) for row in before["rows"]}
    for row in rows:
        key = row["cell"], row["variant"]
        if key in found and steps_of(row) < steps_of(found[key]):
            words = row.get("error") or row.get("stopped") or f"{row['step_seconds']['timed']} steps"
            found[key] |= {ATTEMPT: {"commit": row["commit"], "came to": words}}
        else:
            found.pop(key, None)
            found[key] = with_versions(row, environment)
    if rows:
        write({"environment": environment, "part": part, "rows": list(found.values())}, path)


def with_versions(row: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """The row with the versions that it was measured with: its own, a peer's say, and those of its file's environment
    for the rest."""
    return row | {"versions": environment.get("versions", {}) | row.get("versions", {})}


def is_whole(row: dict[str, Any]) -> bool:
    return "error" not in row and any(row.get(key) for key in FULL_OUTCOMES)


def steps_of(row: dict[str, Any]) -> float:
    """How much was measured: the timed steps, more than any of them for a whole row, none with an error."""
    if is_whole(row):
        return math.inf
    return 0 if "error" in row else row.get("step_seconds", {}).get("timed", 0)


def has_outcome(row: dict[str, Any]) -> bool:
    return any(key in row for key in OUTCOMES)


def described(cell: Cell, row: dict[str, Any], environment: dict[str, Any], known: Limits | None) -> dict[str, Any]:
    """The row with its model, batch and commit, and what follows from its figures."""
    smoke = bool(environment.get("smoke"))
    cell = rehearsed(cell) if smoke else cell
    work = cell.workload
    config, shape = settings_of(cell, row["variant"], smoke), shape_of(work, smoke)
    batch, mode = config.training.local_batch_size, config.activation_checkpoint
    options = {
        "activation_checkpoint.mode": mode.mode,
        "activation_checkpoint.selective_ac_option": mode.selective_ac_option,
    }
    full = {
        "cell": cell.name, "part": cell.part, "workload": work.name, "kind": work.kind, "peer": cell.peer,
        "label": cell.label, "flavor": work.flavor, "layers": shape.n_layers, "seq_len": work.seq_len,
        "batch": batch, "tokens_per_step": batch * work.seq_len, "world": work.world,
        "communication": "none" if work.world == 1 else "left out: collectives copy this rank's own shard",
        "activation_checkpoint": checkpoint_words(options), "commit": environment.get("commit"),
    } | row  # fmt: skip
    if "step_seconds" in row:
        per_second = full["tokens_per_step"] / row["step_seconds"]["median"]
        full["tokens_per_second"] = per_second
        peak = peak_flops(environment["device"])
        if peak is not None and not config.float8.enable:
            per_token = {name: flops_per_token(shape, work.seq_len, name) for name in FORMULAS}
            full["mfu"] = {name: mfu(per_second, flops, peak) for name, flops in per_token.items()}
        if known is not None:
            full |= fraction_of_limit(known, config, shape, work.world, row["step_seconds"]["median"])
    return full


def options_of(cell: Cell, variant: str) -> dict[str, Any] | None:
    """Of the variant of this name; None where the cell has none such, as rows of older code may."""
    return next((one.options for one in cell.variants if one.name == variant), None)


def settings_of(cell: Cell, variant: str, smoke: bool) -> Config:
    """What the variant of this name runs with. torchtitan as it is shipped keeps float32 weights, which for the least
    step is what masters are."""
    options = options_of(cell, variant)
    assert options is not None, variant
    return config_of(cell.workload, options | (MASTERS if cell.peer == AS_SHIPPED else {}), smoke)


def fraction_of_limit(known: Limits, config: Config, shape: ModelShape, world: int, seconds: float) -> dict[str, Any]:
    """The least step of a row's settings, how much of `seconds` that is, and by whose attention; nothing for float8,
    whose products were not measured alone."""
    if config.float8.enable:
        return {}
    least = least_step(known, config, shape, world)
    return {
        "least_step": least,
        "fraction_of_limit": least["total"] / seconds,
        ATTENTION: limit_attention(known, config, shape),
    }


def limit_attention(known: Limits, config: Config, shape: ModelShape) -> str:
    """The backend that is the fastest of these limits."""
    training = config.training
    return known.attention_seconds(attention_call(shape, training.local_batch_size, training.seq_len))[2]


def known_limits(out: Path, device: str | None = None) -> Limits | None:
    """Of `device`; without one, of the only device that was measured. None unless they were measured to the end."""
    paths = sorted(out.glob("limits-*.json")) if device is None else [out / f"limits-{slug(device)}.json"]
    content = read(paths[0]) if len(paths) == 1 else None
    if content is None or not content.get("complete", True):
        return None
    return limits_from(content)
