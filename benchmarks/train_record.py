"""Rows of the end-to-end benchmark in the form that is kept, with everything needed to understand their figures."""

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
"""A row with an outcome has one of these keys."""
FULL_OUTCOMES = ("complete", "parity", "seconds_to_step_10")
"""A row that needs no other attempt has one of these keys."""
ATTENTION = "limit_attention"
"""The key of the backend whose rates are in a row's limit; without it, cuDNN's."""
ATTEMPT = "later attempt"
"""The key for a later attempt at the row that measured less: its commit, and what it came to."""


def record(cell: Cell, answer: Answer, out: Path, known: Limits | None) -> None:
    """Adds the rows that have an outcome to the part's file."""
    rows = [described(cell, row, answer["environment"], known) for row in answer["rows"] if has_outcome(row)]
    join(rows, answer["environment"], cell.part, out)


def join(rows: list[dict[str, Any]], environment: dict[str, Any], part: str, out: Path) -> None:
    """Adds rows, each with its commit and versions, to the part's file, replacing earlier ones of the same cell and
    variant. A row is only replaced by one that is at least as complete: a whole one by a whole one, an interrupted one
    by one with as many steps. Otherwise it notes the later attempt."""
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
    """The row with the versions that it was measured with: its own, such as a peer's, and the others from its file's
    environment."""
    return row | {"versions": environment.get("versions", {}) | row.get("versions", {})}


def is_whole(row: dict[str, Any]) -> bool:
    return "error" not in row and any(row.get(key) for key in FULL_OUTCOMES)


def steps_of(row: dict[str, Any]) -> float:
    """How much was measured: the timed steps; infinite for a whole row, 0 with an error."""
    if is_whole(row):
        return math.inf
    return 0 if "error" in row else row.get("step_seconds", {}).get("timed", 0)


def has_outcome(row: dict[str, Any]) -> bool:
    return any(key in row for key in OUTCOMES)


def described(cell: Cell, row: dict[str, Any], environment: dict[str, Any], known: Limits | None) -> dict[str, Any]:
    """The row with its model, batch and commit, and what follows from its measurements."""
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
        if peak is not None and not _is_other_work(config):
            per_token = {name: flops_per_token(shape, work.seq_len, name) for name in FORMULAS}
            full["mfu"] = {name: mfu(per_second, flops, peak) for name, flops in per_token.items()}
        if known is not None:
            full |= fraction_of_limit(known, config, shape, work.world, row["step_seconds"]["median"])
    return full


def options_of(cell: Cell, variant: str) -> dict[str, Any] | None:
    """The options of the variant of this name; None if the cell has none, as for rows of older code."""
    return next((one.options for one in cell.variants if one.name == variant), None)


def settings_of(cell: Cell, variant: str, smoke: bool) -> Config:
    """The config of the variant of this name. torchtitan as shipped keeps float32 weights, which for the least step
    are the same as masters."""
    options = options_of(cell, variant)
    assert options is not None, variant
    return config_of(cell.workload, options | (MASTERS if cell.peer == AS_SHIPPED else {}), smoke)


def _is_other_work(config: Config) -> bool:
    """Whether a row has no MFU: the peak is bfloat16's, and within documents there is less attention than it counts."""
    return config.float8.enable or config.training.document_mask


def fraction_of_limit(known: Limits, config: Config, shape: ModelShape, world: int, seconds: float) -> dict[str, Any]:
    """The least step with a row's settings, its fraction of `seconds`, and the attention backend. Nothing within
    documents, where there is less attention than it counts, and where the row's products were not measured alone."""
    if config.training.document_mask or not known.knows(config, shape):
        return {}
    least = least_step(known, config, shape, world)
    return {
        "least_step": least,
        "fraction_of_limit": least["total"] / seconds,
        ATTENTION: limit_attention(known, config, shape),
    }


def limit_attention(known: Limits, config: Config, shape: ModelShape) -> str:
    """The fastest backend of these limits."""
    training = config.training
    return known.attention_seconds(attention_call(shape, training.local_batch_size, training.seq_len))[2]


def known_limits(out: Path, device: str | None = None) -> Limits | None:
    """The limits of `device` (None: of the only device that was measured). None if they are missing or incomplete."""
    paths = sorted(out.glob("limits-*.json")) if device is None else [out / f"limits-{slug(device)}.json"]
    content = read(paths[0]) if len(paths) == 1 else None
    if content is None or not content.get("complete", True):
        return None
    return limits_from(content)
