"""The run directory: one run's config, log, data and checkpoints, and no other run's."""

import os
import secrets
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from titan_fast.checkpoint import read_config, refuse_links, tokenizer_of
from titan_fast.config import Config, to_dict
from titan_fast.errors import CheckpointError, ConfigError, DataError
from titan_fast.manifest import checkpoints, holding
from titan_fast.prepared import is_prepared
from titan_fast.redaction import redacted
from titan_fast.tokenizer import is_same, load_tokenizer

CONFIG_NAME = "config.toml"
LAST_SAVED = "last_saved.txt"
"""Holds the path of the newest checkpoint; without one the run has not saved yet."""
TOKENIZER_NAME = "tokenizer.model"
"""Of a tokenizer that was trained on the run's own text."""

_TEXT_KEYS = ("dataset", "dataset_path", "dataset_config", "dataset_revision", "dataset_split", "text_column")
# Besides all of [model], what may not change within a run, or the data position would mean something else. Whether the
# data at a path is still the same is told by its fingerprint when it is opened.
_FIXED_KEYS = {"training": (*_TEXT_KEYS, "seq_len"), "debug": ("seed",)}
# With checkpoint.data_state "reset" these may.
_DATA_KEYS = {"model": ("tokenizer_path",), **_FIXED_KEYS}
_PATHS = ("dataset_path", "tokenizer_path")
# What a tokenizer that was trained here depends on.
_TOKENIZER_KEYS = {"model": ("flavor", "vocab_size"), "training": _TEXT_KEYS, "debug": ("seed",)}


def open_run_directory(config: Config) -> Path:
    """The folder `job.dump_folder`, created if it does not exist. ConfigError where it is not writable, or holds a run
    of another model or other data, or one that this config would start over; CheckpointError where its checkpoints are
    gone or are links. If the run in it never trained a step, only its tokenizer must fit. Every process may call this,
    before there is a process group."""
    folder = Path(config.job.dump_folder)
    if any(holding(path) for path in checkpoints(folder).values()):
        what = "job.dump_folder is a folder of checkpoints"
        raise ConfigError(what, "name the run directory that it belongs to, or a new one", where=str(folder))
    _check_writable(folder, "job.dump_folder")
    before = _saved_config(folder / CONFIG_NAME)
    kept = folder / before.get("checkpoint", {}).get("folder", config.checkpoint.folder)
    goes_on = config.checkpoint.enable and kept == folder / config.checkpoint.folder
    if checkpoints(kept) and not goes_on:
        raise ConfigError(
            f"job.dump_folder holds a run with checkpoints, and with checkpoint.enable {config.checkpoint.enable} and "
            f"checkpoint.folder {config.checkpoint.folder!r} a new run would overwrite its history",
            "choose another --job.dump_folder, or go back to its [checkpoint] enable and folder",
            where=str(kept),
        )
    if config.checkpoint.enable:
        refuse_links(folder / config.checkpoint.folder)
        _refuse_lost_checkpoints(folder, folder / config.checkpoint.folder)
        _check_writable(folder / config.checkpoint.folder, "checkpoint.folder")
    now, resets = redacted(to_dict(config)), config.checkpoint.data_state == "reset"
    saved = checkpoints(kept)
    origin = saved.get(config.checkpoint.load_step, saved[max(saved)]) if saved else None
    if origin is not None:
        with suppress(CheckpointError):  # a damaged one does not matter here: what is loaded will be verified
            before = read_config(origin)
    if not before:
        return folder
    if saved or (folder / "metrics.jsonl").exists():
        differing = differences(before, now, origin, reset_data=resets)
        hint = "--checkpoint.data_state reset accepts what concerns the data and begins it again"
    elif (folder / TOKENIZER_NAME).exists():
        differing = _differing(before, now, _TOKENIZER_KEYS, None)
        hint = f"nothing was trained yet but {TOKENIZER_NAME}: deleting it begins anew"
    else:
        return folder
    if differing:
        raise ConfigError(
            f"job.dump_folder holds a run of another config: {'; '.join(differing)}",
            f"choose another --job.dump_folder, or go back to these values; {hint}",
            where=str(folder),
        )
    return folder


def note_saved(folder: Path, checkpoint: Path) -> None:
    """Notes in the run directory that there is a checkpoint, if the disk lets it."""
    with suppress(OSError):
        temporary = folder / f".{LAST_SAVED}.tmp"
        temporary.write_text(f"{checkpoint.absolute()}\n", encoding="utf-8")
        temporary.replace(folder / LAST_SAVED)


def _refuse_lost_checkpoints(folder: Path, kept: Path) -> None:
    """CheckpointError where the run in `folder` has saved a checkpoint and there is none in `kept`: it would begin
    again at step 0."""
    noted = folder / LAST_SAVED
    if not noted.exists() or checkpoints(kept) or any(kept.glob(".replaced-*")):  # that one will be put back
        return
    raise CheckpointError(
        f"the run in {folder} has saved {noted.read_text(encoding='utf-8').strip()}, and there is no checkpoint",
        "restore it, name where it is with --checkpoint.folder, or choose another --job.dump_folder; with "
        f"{LAST_SAVED} deleted the run begins again",
        str(kept),
    )


def is_new(config: Config, folder: Path) -> bool:
    """Whether there is no checkpoint that the run in `folder` could go on from."""
    return not checkpoints(folder / config.checkpoint.folder)


def _check_writable(folder: Path, key: str) -> None:
    if checkpoint := holding(folder):
        raise ConfigError(
            f"{key} would be in a checkpoint, to which nothing may be added",
            "name another folder; checkpoint.initial_load_path begins with a checkpoint's weights",
            where=str(checkpoint),
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{secrets.token_hex(8)}"
        try:
            probe.write_bytes(bytes(4096))  # a full disk takes a name and no content
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{key} cannot be written: {error.strerror}", "choose another folder", where=str(folder)
        ) from error


def write_config(config: Config, folder: Path) -> None:
    """Writes the resolved config beside everything else."""
    temporary = folder / f".{CONFIG_NAME}.tmp"
    temporary.write_text(tomli_w.dumps(redacted(to_dict(config))), encoding="utf-8")
    temporary.replace(folder / CONFIG_NAME)


def _saved_config(path: Path) -> dict[str, dict[str, Any]]:
    """Its tables; {} where there is no run yet."""
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the run's saved config is damaged: {error}", "choose another folder", str(path)) from error


def differences(
    before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], checkpoint: Path | None, reset_data: bool
) -> list[str]:
    """ "table.key was X and is Y" for every change between two configs, as tables, that a run may not make; with
    `reset_data`, changes of the data are allowed. checkpoint: what the run will continue from, if there is one; then
    the same data may have moved."""
    fixed = {"model": tuple(before.get("model", {}) | now["model"]), **_FIXED_KEYS}
    free = _DATA_KEYS if reset_data else {}
    keys = {table: tuple(key for key in names if key not in free.get(table, ())) for table, names in fixed.items()}
    return _differing(before, now, keys, checkpoint)


def _differing(
    before: dict[str, dict[str, Any]],
    now: dict[str, dict[str, Any]],
    keys: dict[str, tuple[str, ...]],
    checkpoint: Path | None,
) -> list[str]:
    found = []
    for table, key in [(table, key) for table, names in keys.items() for key in names]:
        was, value = before.get(table, {}).get(key), now[table].get(key)
        if was != value and not (key in _PATHS and _is_only_moved(key, was, value, checkpoint)):
            found.append(f"{table}.{key} was {was!r} and is {value!r}")
    return found


def _is_only_moved(key: str, before: Any, now: Any, checkpoint: Path | None) -> bool:
    """Whether path `now` leads to what `before` led to. Token shards in another place are assumed to be the same, since
    the loader will compare their content with the checkpoint's. Text would have to be tokenized first."""
    if not (isinstance(now, str) and now):
        return False
    if isinstance(before, str) and before and os.path.realpath(before) == os.path.realpath(now):
        return True
    if checkpoint is None:
        return False
    if key == "dataset_path":  # before it may have been a data set of training.dataset
        return is_prepared(Path(now))
    if not (isinstance(before, str) and before):
        return False
    try:
        return is_same(load_tokenizer(Path(now)), load_tokenizer(tokenizer_of(checkpoint)))
    except (DataError, CheckpointError):
        return False
