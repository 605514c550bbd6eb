"""A rank that does not come, or is lost: the others end in time, with its number and the exit status of their kind."""

import subprocess
import sys

import pytest
from runs import environment
from worlds import free_port

SIZE, LIMIT_SECONDS = 3, 5
PROGRAM = f"""
import os, sys, signal, time
import torch, torch.distributed as dist
from titan_fast import distributed
from titan_fast.config import Comm
from titan_fast.distributed import start
from titan_fast.errors import reported
distributed.SPARE_SECONDS = 0
fault, rank = sys.argv[1], int(os.environ["RANK"])
if fault == "missing" and rank == 1:
    sys.exit(3)
with reported(), start(Comm(init_timeout_seconds={LIMIT_SECONDS}), torch.device("cpu")) as world:
    dist.all_reduce(torch.ones(1))
    if fault in ("busy", "killed while one is busy") and rank == 0:
        time.sleep({LIMIT_SECONDS + 3})
    if fault == "killed while one is busy" and rank == 1:
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()
    if fault == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "failed" and rank == 1:
        raise OSError("the disk is full")
    if fault not in ("none", "busy"):
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1))
    print("left in peace")
"""


def world(fault: str) -> list[tuple[int, str]]:
    """(exit status, output) of each rank of a small world, started without torchrun as a batch system does it."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, fault], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=str(port)),
        )
        for rank in range(SIZE)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


SENTENCES = {
    "missing": f"rank 1 of {SIZE} did not start within {LIMIT_SECONDS} s",
    "killed": f"rank 1 of {SIZE} is gone without a word",
    "killed while one is busy": f"one of rank 0, 1 of {SIZE} is gone without a word",
    "failed": f"rank 1 of {SIZE} failed: OSError: the disk is full",
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_the_others_name_who_is_not_there(fault: str) -> None:
    found = world(fault)
    for rank in (0, 2) if "busy" not in fault else (2,):
        status, output = found[rank]
        assert status == 6, output
        lines = [line for line in output.splitlines() if line.startswith("titan_fast: ")]
        assert len(lines) == 1 and SENTENCES[fault] in lines[0], output


@pytest.mark.parametrize("fault", ["none", "busy"])
def test_nobody_is_missed_where_nobody_is_missing(fault: str) -> None:
    """Nor where one prepares data for longer than set-up may take."""
    assert [(status, output.strip()[-13:]) for status, output in world(fault)] == [(0, "left in peace")] * SIZE
