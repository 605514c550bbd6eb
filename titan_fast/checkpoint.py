"""What a checkpoint holds, and how it is read. Saving and choosing are in checkpointer.py.

A checkpoint is the folder `step-N`:
    *.distcp, .metadata     weights and moments, each rank's shards (any other mesh can load them)
    rng-R.safetensors       rank R's random state
    state.json              step, tokens, data position, versions
    config.toml             the resolved config
    tokenizer/              the tokenizer's file as the run read it, so that the folder alone can generate text
    MANIFEST.json           size and sha256 of every file; what does not match it is not loaded (manifest.py)
"""

import io
import json
import math
import os
import pickle
import tomllib
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_fast.config import saved_checkpoint_folder
from titan_fast.distributed import World
from titan_fast.errors import CheckpointError
from titan_fast.manifest import checkpoints, links, step_of
from titan_fast.masters import adamw_state, master_of
from titan_fast.safe_unpickle import SafeReader, load_metadata
from titan_fast.tokenizer import CONFIG_BESIDE


class Writer(dcp.FileSystemWriter):
    """Raises the disk's own error where a write fails; torch's only says what it still had to write."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.fs = _Files()

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


class _Files(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        with _File(io.FileIO(path, mode)) if mode == "wb" else super().create_stream(path, mode) as stream:
            yield stream


class _File(io.BufferedWriter):
    """torch flushes a file once more when it has been closed, and Python 3.13 shows the error that this is."""

    def flush(self) -> None:
        if not self.closed:
            super().flush()


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    """The loader's state: one for all ranks, or with "ranks" one for each data-parallel rank."""
    validation: str | None = None
    """The fingerprint of the text that was last measured on."""


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every weight (its float32 master, where it has one) as "model.NAME", and every moment and step count as
    "optimizer.NAME.MOMENT". Moments that do not exist yet are created, zero, for a checkpoint to be loaded into."""
    tensors: dict[str, Tensor] = {}
    owned = {parameter for group in optimizer.param_groups for parameter in group["params"]} if optimizer else set()
    for name, parameter in model.named_parameters():
        assert optimizer is None or parameter in owned, f"{name} is not what the optimizer updates: is it gathered?"
        tensors[f"model.{name}"] = master_of(parameter)
        if optimizer is not None:
            state = adamw_state(optimizer, parameter)
            tensors |= {f"optimizer.{name}.{moment}": value for moment, value in state.items()}
    return tensors


def load_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Fills `tensors` in place from the checkpoint at `path`, resharding where the meshes differ. CheckpointError where
    names, shapes or dtypes differ, or the folder holds something that our checkpoints never do."""
    check_tensors(tensors, path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant, in a single process
            dcp.load(tensors, storage_reader=SafeReader(path), no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, RuntimeError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be loaded: {cause(error)}", "move it away to go on from an older one", str(path)
        ) from error


def saved_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of every tensor in the checkpoint, by name."""
    try:
        entries = load_metadata((path / ".metadata").read_bytes()).state_dict_metadata
    except (OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"the checkpoint's .metadata is not to be trusted: {error}",
            "move the folder away, and ask where it comes from",
            str(path),
        ) from error
    return cast(dict[str, TensorStorageMetadata], entries)  # load_metadata refuses others


def check_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """CheckpointError unless the checkpoint has exactly these names (of the kinds asked for: "model", "optimizer"),
    shapes and dtypes. DCP alone would silently leave extra names unread and cast dtypes."""
    saved = saved_tensors(path)
    kinds = {name.partition(".")[0] for name in tensors}
    # Imported models are saved without optimizer state.
    stateless = "optimizer" in kinds and not any(name.startswith("optimizer.") for name in saved)
    missing = [name for name in tensors if name not in saved and not (stateless and name.startswith("optimizer."))]
    differing = [f"{name} is missing" for name in missing]
    differing += [
        f"{name} is in the checkpoint and not in the run"
        for name in saved
        if name.partition(".")[0] in kinds and name not in tensors
    ]
    for name, tensor in tensors.items():
        if (entry := saved.get(name)) is None:
            continue
        if entry.size != tensor.shape:
            differing.append(f"{name} is {list(entry.size)} there and {list(tensor.shape)} here")
        elif entry.properties.dtype != tensor.dtype:
            differing.append(f"{name} is {entry.properties.dtype} there and {tensor.dtype} here")
    if differing:
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise CheckpointError(
            f"the checkpoint is of another model: {'; '.join(differing[:4])}{more}",
            "use the config it was saved with",
            str(path),
        )
    if stateless:
        raise CheckpointError(
            "the checkpoint has no optimizer state, so no run can go on from it",
            "move it out of the run's folder of checkpoints, and begin with its weights by "
            "--checkpoint.initial_load_path",
            str(path),
        )


def cause(error: BaseException) -> str:
    """One line of what went wrong, and on which rank where DCP wraps it."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items())
        return f"rank {rank}: {cause(inner)}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_state(path: Path) -> dict[str, Any]:
    """The checkpoint's state.json."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        wrong = [key for key in ("step", "tokens_seen", "elapsed_seconds", "world_size") if not _is_count(state[key])]
        if not isinstance(state["data"], dict) or not _is_count(state["data"].get("next_sample", 0)):
            wrong.append("data")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"its state.json cannot be read: {cause(error)}", "use another", str(path)) from error
    if wrong:
        raise CheckpointError(f"its state.json has {wrong[0]} {state[wrong[0]]!r}", "use another", str(path))
    if (named := step_of(path)) not in (None, state["step"]):
        raise CheckpointError(
            f"it is of step {state['step']} by its state.json, and of step {named} by its name",
            "give the folder its name back",
            str(path),
        )
    return state


def _is_count(value: Any) -> bool:
    """Whether it is a finite number that is not negative."""
    return type(value) in (int, float) and 0 <= value < math.inf


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of the checkpoint's config.toml."""
    try:
        tables = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its config.toml cannot be read: {cause(error)}", "use another", str(path)) from error
    if odd := [key for key, table in tables.items() if not isinstance(table, dict)]:
        raise CheckpointError(f"{odd[0]} in its config.toml is no table", "use another", str(path))
    return tables


def refuse_links(folder: Path) -> None:
    """CheckpointError where the newest checkpoint in `folder` is a symbolic link: a run would ignore it, save others
    and delete them. Older links are ignored, like other names."""
    found, own = links(folder), checkpoints(folder)
    if found and max(found) > max(own, default=-1):
        names = ", ".join(path.name for path in list(found.values())[-3:])
        raise CheckpointError(
            f"a checkpoint that is a symbolic link is not read: {names}",
            "move the folder itself back in its place; or move all checkpoints, and name where they are with "
            "checkpoint.folder",
            str(folder),
        )


def checkpoints_of(path: Path) -> dict[int, Path]:
    """The `step-N` folders, by step in order, in `path` itself or else in what the config of the run directory `path`
    names as its checkpoint.folder. CheckpointError where the newest is a symbolic link."""
    refuse_links(path)
    if found := checkpoints(path):
        return found
    folder = saved_checkpoint_folder(path)
    refuse_links(folder)
    return checkpoints(folder)


def tokenizer_of(path: Path) -> Path:
    """The tokenizer's file in the checkpoint at `path`."""
    files = [file for file in (path / "tokenizer").glob("*") if file.name != CONFIG_BESIDE]
    if len(files) != 1:
        raise CheckpointError("the checkpoint has no tokenizer", "use one that was saved whole", where=str(path))
    return files[0]


def gather_data_state(state: dict[str, Any], world: World) -> dict[str, Any]:
    """The loader's state in the form that is saved: unchanged if it is the same on every rank, otherwise those of all
    data-parallel ranks, in order."""
    if "rank" not in state or world.size == 1:
        return state
    ranks: list[Any] = [None] * world.size
    dist.all_gather_object(ranks, state)
    by_rank = {item["rank"]: item for item in ranks}
    return {"ranks": [by_rank[rank] for rank in sorted(by_rank)]}


def own_data_state(state: dict[str, Any], dp_rank: int, dp_degree: int) -> dict[str, Any]:
    """The inverse of `gather_data_state` on one data-parallel rank. CheckpointError for another number of ranks."""
    ranks = state.get("ranks", [state] if "rank" in state else None)
    if ranks is None:
        return state
    if len(ranks) != dp_degree:
        raise CheckpointError(
            f"the checkpoint holds the stream position of {len(ranks)} data-parallel ranks, this run has {dp_degree}",
            "use as many as before, or begin the stream again with --checkpoint.data_state reset: it cannot be divided "
            "anew without losing or repeating text",
        )
    return ranks[dp_rank]


if __name__ == "__main__":
    from titan_fast.checkpoint_command import main

    main()
