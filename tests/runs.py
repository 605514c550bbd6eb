"""Tiny training runs through the real entry point, in this process or under torchrun, and what they write to disk."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_fast import run_history
from titan_fast.checkpoint import load_tensors, saved_tensors
from titan_fast.config import parse
from titan_fast.data import DataRank, build_validation_loader
from titan_fast.data_command import prepare_folder
from titan_fast.generate import load_model

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "faults.py"

TINY = {
    "model.dim": 32,
    "model.n_layers": 1,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.ffn_dim": 64,
    "model.vocab_size": 331,  # a prime: no degree divides it
    "training.seq_len": 32,
    "training.local_batch_size": 2,
    "training.steps": 10,
    "checkpoint.interval": 5,
    "metrics.sample_prompt": "",
    "metrics.enable_tensorboard": False,
    "metrics.log_freq": 1,
    "validation.enable": False,
}

MEASURED = {
    "validation__enable": True,
    "validation__freq": 3,
    "validation__steps": 2,
    "metrics__sample_prompt": "<",
    "metrics__sample_freq": 3,
    "metrics__sample_tokens": 4,
}
"""Changes with which a run measures and samples every third step: forward passes without a backward one."""


def write_documents(path: Path, count: int = 1500) -> Path:
    """Writes JSON lines; each document begins with its own number."""
    words, chance = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"], random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            text = f"<{number}> " + " ".join(chance.choice(words) for _ in range(12))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def prepare(folder: Path) -> Path:
    """Makes token shards of those documents, with the tokenizer that all runs use."""
    documents = write_documents(folder / "documents.jsonl")
    config = parse(["--training.dataset_path", str(documents), "--model.vocab_size", "320"])
    prepare_folder(config, folder / "tokens", None)
    return folder / "tokens"


def arguments(data: Path, folder: Path, **changes: Any) -> list[str]:
    """The command line of a tiny run; `changes` are keys with __ for the dot."""
    options = TINY | {"training.dataset_path": data, "job.dump_folder": folder}
    options |= {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def run(data: Path, folder: Path, **changes: Any) -> None:
    """A single-process run, in this process."""
    from titan_fast import loop

    loop.train(parse(arguments(data, folder, **changes)))


def wait_for(condition: Callable[[], Any], limit_seconds: float = 180.0) -> None:
    """Waits until the condition is true."""
    give_up = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not come to that"
        time.sleep(0.02)


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **more}


def standalone(processes: int) -> list[str]:
    """torchrun's arguments for so many processes on this machine only."""
    return ["--standalone", f"--nproc-per-node={processes}"]


def torchrun(processes: int, *words: str, **options: Any) -> "subprocess.Popen[str]":
    """Starts torchrun with `words`, in its own process group."""
    command = [sys.executable, "-m", "torch.distributed.run", *standalone(processes), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=environment(**options.pop("env", {})), **options,
    )  # fmt: skip


def finish(process: Any, limit_seconds: float = 240) -> str:
    """The output of a torchrun (a Popen, or tests/torchrun.py's equivalent); past the limit its whole process group is
    killed and the test fails."""
    import signal

    try:
        output, _ = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {limit_seconds} s:\n{output[-4000:]}") from None
    return output


def logged(folder: Path) -> list[dict[str, Any]]:
    """The records of steps in metrics.jsonl."""
    return run_history.losses(run_history.read(folder / "metrics.jsonl"))


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, as logged."""
    return {record["step"]: record["loss"] for record in logged(folder)}


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoint" / f"step-{step}"


class Disk:
    """Records, in order, what the disk is told while `monkeypatch` is active."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[str, Path, Path | None]] = []
        fsync, rename = os.fsync, os.rename

        def syncing(descriptor: int) -> None:
            self.told.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink(), None))
            fsync(descriptor)

        def renaming(old: Any, new: Any) -> None:
            self.told.append(("rename", Path(old).absolute(), Path(new).absolute()))
            rename(old, new)

        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(os, "rename", renaming)

    def assert_made_durable(self, folder: Path) -> None:
        """Everything in the folder was synced before it got its name, and then the name was."""
        (at,) = (index for index, (what, _, new) in enumerate(self.told) if what == "rename" and new == folder)
        before = self.told[at][1]
        synced = {path for what, path, _ in self.told[:at] if what == "sync"}
        inside = [before, *(before / path.relative_to(folder) for path in folder.rglob("*"))]
        assert len(inside) > 2 and [path for path in inside if path not in synced] == []
        assert ("sync", folder.parent, None) in self.told[at:]


def tensors(path: Path) -> dict[str, Tensor]:
    """All of a checkpoint's tensors, unsharded."""
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in saved_tensors(path).items()}
    load_tensors(found, path)
    return found


def assert_same_tensors(a: Path, b: Path, tolerance: float = 0.0) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], rtol=tolerance, atol=tolerance, msg=f"{name} differs by more than {tolerance}"
        )


def held_out_loss(folder: Path, sequences: int) -> float:
    """The validation loss that the newest checkpoint must have, by torch's own cross entropy in this process;
    `sequences`: in its batch, over all ranks."""
    model, tokenizer, config = load_model(folder, torch.device("cpu"))
    training = dataclasses.replace(config.training, local_batch_size=sequences)
    config = dataclasses.replace(config, training=training)
    loader = build_validation_loader(config, tokenizer, DataRank(folder, torch.device("cpu")))
    assert loader is not None
    batches = [batch for _ in range(config.validation.steps) for batch in next(loader)]
    loader.close()
    with torch.no_grad():
        losses = [F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.labels.flatten()) for batch in batches]
    return torch.stack(losses).mean().item()


def saved_config(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "config.toml").read_text())
