"""Checkpoints by torch.distributed.checkpoint: everything that a run needs to go on as if it had not stopped.

A checkpoint is the folder `step-N`:
    *.distcp, .metadata     weights and moments, each rank's shards (any other mesh can load them)
    rng-R.safetensors       rank R's random state
    state.json              step, tokens, data position, versions
    config.toml             the resolved config
    tokenizer/              a copy of the tokenizer's file, so that the folder alone can speak
It is written under a temporary name and renamed when it is whole.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import tomli_w
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from titan_fast.config import Config, to_dict
from titan_fast.distributed import World
from titan_fast.errors import CheckpointError

_NAME = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    """The loader's state: one for all ranks, or with "ranks" one for each."""


def checkpoints(folder: Path) -> dict[int, Path]:
    """The finished checkpoints in `folder` by step, in order. A name that is not exactly `step-N` is not ours."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every weight as "model.NAME", and every moment as "optimizer.NAME.MOMENT"; moments that do not exist yet are
    made, zero, so that a checkpoint can be loaded into them."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        if optimizer is None:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        tensors |= {f"optimizer.{name}.{moment}": value for moment, value in state.items()}
    return tensors


class Checkpointer:
    """Saves and loads the checkpoints of one run."""

    def __init__(self, config: Config, run_dir: Path, world: World, tokenizer_path: Path) -> None:
        self.config, self.settings, self.world = config, config.checkpoint, world
        self.folder, self.tokenizer_path = run_dir / config.checkpoint.folder, tokenizer_path

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Writes `step-N` from all ranks together and deletes what is older than `keep_latest_k`."""
        final = self.folder / f"step-{progress.step}"
        temporary = self.folder / f".tmp-{final.name}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.barrier()
        dcp.save(tensors_of(model, optimizer), checkpoint_id=temporary)
        safetensors.torch.save_file(_rng_state(self.world.device), temporary / f"rng-{self.world.rank}.safetensors")
        if self.world.is_main:
            state = {**asdict(progress), "world_size": self.world.size, "torch": torch.__version__}
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            (temporary / "config.toml").write_text(tomli_w.dumps(to_dict(self.config)))
            copy_tokenizer(self.tokenizer_path, temporary / "tokenizer")
        self.world.barrier()
        if self.world.is_main:
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            self._prune()
        self.world.barrier()
        return final

    def _prune(self) -> None:
        keep = self.settings.keep_latest_k
        for path in list(checkpoints(self.folder).values())[:-keep] if keep else []:
            shutil.rmtree(path)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Puts the newest checkpoint (or `load_step`'s) into the model and optimizer; None when there is none."""
        found = checkpoints(self.folder)
        wanted = self.settings.load_step
        if wanted == -1 and not found:
            return None
        step = max(found) if wanted == -1 else wanted
        if step not in found:
            raise CheckpointError(
                f"there is no checkpoint of step {step}; there are {list(found) or 'none'}",
                "change checkpoint.load_step",
                where=str(self.folder),
            )
        path = found[step]
        load_tensors(tensors_of(model, optimizer), path)
        state = json.loads((path / "state.json").read_text())
        rng = path / f"rng-{self.world.rank}.safetensors"
        if state["world_size"] == self.world.size and rng.exists():
            _set_rng_state(safetensors.torch.load_file(rng), self.world.device)
        return Progress(state["step"], state["tokens_seen"], state["elapsed_seconds"], state["data"])


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copies a tokenizer's file into `folder`, with the config that a Hugging Face tokenizer has beside it."""
    folder.mkdir()
    shutil.copy2(path, folder / path.name)
    beside = path.with_name("tokenizer_config.json")
    if path.suffix == ".json" and beside.exists():
        shutil.copy2(beside, folder / beside.name)


def tokenizer_of(path: Path) -> Path:
    """The tokenizer's file in the checkpoint at `path`."""
    files = [file for file in (path / "tokenizer").glob("*") if file.name != "tokenizer_config.json"]
    if len(files) != 1:
        raise CheckpointError("the checkpoint has no tokenizer", "take one that was saved whole", where=str(path))
    return files[0]


def load_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Fills `tensors` in place from the checkpoint at `path`, resharding where the meshes differ."""
    try:
        dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, RuntimeError, ValueError, OSError) as error:
        sentence = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"the checkpoint cannot be loaded: {sentence}", "move it away to go on from an older one", where=str(path)
        ) from error


def gather_data_state(state: dict[str, Any], world: World) -> dict[str, Any]:
    """The loader's state as it is saved: as it is where it is the same on every rank, else every rank's."""
    if "rank" not in state:
        return state
    ranks: list[Any] = [None] * world.size
    dist.all_gather_object(ranks, state)
    return {"ranks": ranks}


def own_data_state(state: dict[str, Any], world: World) -> dict[str, Any]:
    """The inverse of `gather_data_state` on this rank."""
    if "ranks" not in state:
        return state
    if len(state["ranks"]) != world.size:
        raise CheckpointError(
            f"the checkpoint holds the stream position of {len(state['ranks'])} ranks and this run has {world.size}",
            "use as many processes as before; a stream cannot be divided again without losing or repeating text",
        )
    return state["ranks"][world.rank]


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
