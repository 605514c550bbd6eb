"""The run directory: one run's config, log, data and checkpoints, and no other run's."""

import os
import tomllib
from pathlib import Path

import tomli_w

from titan_fast.config import Config, to_dict
from titan_fast.errors import ConfigError

CONFIG_NAME = "config.toml"

# What may not change within a run: with another of these, the weights or the data position mean something else.
_FIXED_TABLES = ("model",)
_FIXED_KEYS = {
    "training": ("dataset", "dataset_path", "dataset_config", "dataset_split", "text_column", "seq_len"),
    "debug": ("seed",),
}


def open_run_directory(config: Config) -> Path:
    """The folder `job.dump_folder`, made if need be and found writable; ConfigError where it is not, or where it holds
    a run of another model or other data. Every process may call it, before there is a process group."""
    folder = Path(config.job.dump_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"job.dump_folder cannot be written: {error.strerror}", "choose another folder", where=str(folder)
        ) from error
    differing = _differences(folder / CONFIG_NAME, to_dict(config))
    if differing:
        raise ConfigError(
            f"job.dump_folder holds a run of another config: {'; '.join(differing)}",
            "choose another --job.dump_folder, or go back to these values",
            where=str(folder),
        )
    return folder


def write_config(config: Config, folder: Path) -> None:
    """Writes the resolved config beside everything else."""
    temporary = folder / f".{CONFIG_NAME}.tmp"
    temporary.write_text(tomli_w.dumps(to_dict(config)))
    temporary.replace(folder / CONFIG_NAME)


def _differences(path: Path, now: dict[str, dict]) -> list[str]:
    if not path.exists():
        return []
    try:
        before = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the run's saved config is damaged: {error}", "choose another folder", str(path)) from error
    fixed = {table: tuple(before.get(table, {}) | now[table]) for table in _FIXED_TABLES} | _FIXED_KEYS
    return [
        f"{table}.{key} was {before.get(table, {}).get(key)!r} and is {now[table].get(key)!r}"
        for table, keys in fixed.items()
        for key in keys
        if before.get(table, {}).get(key) != now[table].get(key)
    ]
