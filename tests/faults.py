"""`python tests/faults.py ARGUMENTS`: titan_fast.train with faults, which the environment variable FAULTS describes.

A list of JSON objects: {"what": ..., "rank": 1, "step": 5, "attempt": 0, ...}; "attempt" is torchrun's restart count,
null for any. What: kill, signal (name), sleep (seconds), slow (seconds, from that step on), nan, raise_out_of_memory,
kill_in (a function "module:name", and the number of the "call"), file_limit (bytes; ends before step "until"), remove
(path), ledger (path: each step's tokens are appended to it, by rank), dump (path: the whole state that the run resumed
from, before its first step), blind (this rank sees no manifest, as on a stale network file system).
"""

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.distributed.tensor import DTensor

from titan_fast import checkpointer, loop
from titan_fast.checkpoint import tensors_of
from titan_fast.train import main


def happen(fault: dict[str, Any], step: int) -> None:
    """Before the step."""
    what = fault["what"]
    if what == "slow" and step >= fault["step"]:
        time.sleep(fault["seconds"])
    if what == "file_limit" and step == fault.get("until"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if step != fault.get("step"):
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "signal":
        for _ in range(fault.get("times", 1)):
            os.kill(os.getpid(), getattr(signal, fault["name"]))
    elif what == "sleep":
        stuck(fault["seconds"])
    elif what == "file_limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    elif what == "remove":
        shutil.rmtree(fault["path"])
    elif what == "raise_out_of_memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def dump(run: loop.Run, path: str) -> None:
    whole = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in tensors_of(run.model, run.optimizer).items()
    }
    if run.world.is_main:
        safetensors.torch.save_file(whole, path)


def stuck(seconds: float) -> None:
    time.sleep(seconds)


def install(fault: dict[str, Any]) -> None:
    if fault.get("rank") not in (None, int(os.environ.get("RANK", "0"))):
        return
    if fault.get("attempt", 0) not in (None, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))):
        return
    if fault["what"] == "kill_in":
        module, _, name = fault["function"].partition(":")
        kill_in(importlib.import_module(module), name, fault["call"])
        return
    if fault["what"] == "blind":
        checkpointer._fingerprint = lambda path: "no manifest"
        return
    if fault["what"] in ("nan", "ledger"):
        true_forward = loop.forward_backward

        def forward_backward(model: Any, batches: Any, scale: Any) -> Any:
            step = current[0]
            if fault["what"] == "ledger":
                with Path(f"{fault['path']}-{os.environ.get('RANK', '0')}").open("a") as file:
                    tokens = [batch.tokens.tolist() for batch in batches]
                    file.write(json.dumps({"step": step, "tokens": tokens}) + "\n")
            loss = true_forward(model, batches, scale)
            first, count = fault.get("step", 0), fault.get("count", 1)
            return loss * float("nan") if fault["what"] == "nan" and first <= step < first + count else loss

        loop.forward_backward = forward_backward
        return
    true_step = loop.Run.step

    def step(self: Any, number: int) -> Any:
        if fault["what"] == "dump" and number == self.first_step:
            dump(self, fault["path"])
        happen(fault, number)
        return true_step(self, number)

    loop.Run.step = step  # type: ignore[method-assign]


def kill_in(module: Any, name: str, call: int) -> None:
    """SIGKILL as the `call`-th call of a function begins, counted from 1."""
    true_function: Callable[..., Any] = getattr(module, name)
    calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return true_function(*args, **kwargs)

    setattr(module, name, function)


current = [0]
_true_step = loop.Run.step


def _counted(self: Any, number: int) -> Any:
    current[0] = number
    return _true_step(self, number)


loop.Run.step = _counted  # type: ignore[method-assign]

if __name__ == "__main__":
    for one in json.loads(os.environ.get("FAULTS", "[]")):
        install(one)
    sys.argv[0] = "titan_fast.train"
    main()
