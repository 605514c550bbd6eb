"""Several processes on this machine that run functions together and return each one's results."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from children import CHILDREN

from titan_fast.config import Comm
from titan_fast.distributed import World, start

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """A module-level function (world, *arguments) -> anything that can be pickled."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The result of a task on a rank where it raised."""

    report: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_world(size: int, tasks: Sequence[Task], folder: Path, limit_seconds: float = 500) -> dict[str, list[Any]]:
    """Starts `size` processes that run the tasks one after another; {task name: each rank's result}.

    A task that raises leaves `Failed` and ends its world, since the other ranks may wait for it; later tasks are
    then missing from the answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [CHILDREN.Process(target=_rank, args=(r, size, port, list(tasks), folder)) for r in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(limit_seconds)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()
    found: dict[str, list[Any]] = {}
    for task in tasks:
        files = [folder / f"{task.name}-{rank}.pt" for rank in range(size)]
        if any(file.exists() for file in files):
            found[task.name] = [
                torch.load(file, weights_only=False) if file.exists() else Failed("no answer") for file in files
            ]
    return found


def _rank(rank: int, size: int, port: int, tasks: list[Task], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with start(Comm(init_timeout_seconds=200), CPU) as world:
        for task in tasks:
            try:
                result = task.function(world, *task.arguments)
            except Exception:
                result = Failed(traceback.format_exc())
            torch.save(result, folder / f"{task.name}-{rank}.pt")
            if isinstance(result, Failed):
                print(f"rank {rank}, {task.name}: {result.report}", file=sys.stderr, flush=True)  # noqa: T201
                os._exit(1)
        with suppress(RuntimeError):  # another rank has failed, and its result says so
            world.barrier()  # rank 0 has the store, which the others may still need


def results(found: dict[str, list[Any]], name: str) -> list[Any]:
    """Each rank's result of the task `name`; AssertionError with the report where it failed."""
    assert name in found, f"{name} did not run, an earlier task of its world failed"
    for rank, result in enumerate(found[name]):
        assert not isinstance(result, Failed), f"rank {rank}: {result.report}"
    return found[name]


__all__ = ["CPU", "Failed", "Task", "World", "results", "run_world"]


class CountedStore(dist.HashStore):
    """Counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        return super().check(keys)

    def get(self, key: str) -> bytes:
        self.asked += 1
        return super().get(key)
