"""NCCL between ranks that share one GPU: whole runs through the real entry point.

NCCL refuses two ranks on one device unless it takes them for two hosts. So each has its own NCCL_HOSTID, and they
communicate through sockets on the loopback interface, like hosts without InfiniBand. Times mean nothing here, because
the device runs one process at a time.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
from worlds import free_port

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
BATCH = 4  # of all ranks together
LIMIT_SECONDS = 100.0
COMMON: dict[str, Any] = {"model__dim": 256, "model__ffn_dim": 512}  # heads as wide as real ones
COMMON |= {"training__global_batch_size": BATCH, "training__mixed_precision_param": "float32"}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP2, direct": (2, {"parallelism__fsdp_buffers": "direct"}),
    "FSDP2, flat": (2, {"parallelism__fsdp_buffers": "flat"}),
    "FSDP2 of 4": (4, {}),
    "HSDP": (4, {"parallelism__data_parallel_replicate_degree": 2}),
    "tensor parallel": (2, {"parallelism__tensor_parallel_degree": 2}),
    "FSDP2 and tensor parallel": (4, {"parallelism__tensor_parallel_degree": 2}),
    "compiled": (2, {"compile__enable": True}),
    "two passes": (2, {"training__local_batch_size": 1}),
}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    ((status, output),) = together(1, data, folder, [], training__local_batch_size=BATCH)
    assert status == 0, output
    return runs.losses(folder)


def together(
    ranks: int, data: Path, folder: Path, faults: list[dict[str, Any]], **changes: Any
) -> list[tuple[int, str]]:
    """(exit status, output) of each rank, which NCCL takes for a host. After LIMIT_SECONDS all are ended and the test
    fails."""
    tensor = changes.get("parallelism__tensor_parallel_degree", 1)
    changes = COMMON | {"training__local_batch_size": BATCH * tensor // ranks} | changes
    command = [sys.executable, str(runs.FAULTS), *runs.arguments(data, folder, **changes)]
    port, processes = str(free_port()), []
    logs = [folder.with_name(f"{folder.name}-{port}-rank{rank}.log") for rank in range(ranks)]
    for rank, log in enumerate(logs):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        nccl = {"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket"}
        environment = runs.environment(FAULTS=json.dumps(faults), **place, **nccl)
        with log.open("w") as output:
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
    deadline, late = time.monotonic() + LIMIT_SECONDS, []
    for rank, process in enumerate(processes):
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(rank)
            process.kill()
            process.wait()
    ended = [(process.returncode, log.read_text()) for process, log in zip(processes, logs, strict=True)]
    assert not late, f"ranks {late} had not ended after {LIMIT_SECONDS} s: {[output[-3000:] for _, output in ended]}"
    return ended


@pytest.mark.parametrize("way", WAYS)
def test_ranks_train_as_one_process(way: str, data: Path, alone: dict[int, float], tmp_path: Path) -> None:
    ranks, changes = WAYS[way]
    ended = together(ranks, data, tmp_path, [], **changes)
    assert all(status == 0 for status, _ in ended), ended
    assert runs.losses(tmp_path) == pytest.approx(alone, rel=2e-4)


def test_gradients_made_in_float32_train_as_rounded_ones(data: Path, tmp_path: Path) -> None:
    more = {"training__mixed_precision_param": "bfloat16", "compile__enable": True}
    for wide in (False, True):
        ended = together(2, data, tmp_path / str(wide), [], **more, parallelism__fsdp_wide_gradients=wide)
        assert all(status == 0 for status, _ in ended), ended
    losses = runs.losses(tmp_path / "True")
    assert losses == pytest.approx(runs.losses(tmp_path / "False"), abs=0.02)


def test_offloaded_ranks_train_as_one_offloaded_process(data: Path, tmp_path: Path) -> None:
    """Not like one on the device, whose random numbers differ."""
    for ranks in (1, 2):
        ended = together(ranks, data, tmp_path / str(ranks), [], training__enable_cpu_offload=True)
        assert all(status == 0 for status, _ in ended), ended
    assert runs.losses(tmp_path / "1") == pytest.approx(runs.losses(tmp_path / "2"), rel=2e-4)


def test_a_killed_rank_ends_all_and_nothing_is_lost(data: Path, tmp_path: Path) -> None:
    more = {"debug__deterministic": True, "checkpoint__interval": 3} | runs.MEASURED
    for status, output in together(2, data, tmp_path / "whole", [], **more):
        assert status == 0, output
    fault = {"what": "kill", "rank": 1, "step": 6}
    (survivor, output), _ = together(2, data, tmp_path / "parts", [fault], **more, comm__timeout_seconds=20)
    assert survivor != 0, output
    assert "Traceback" not in output, output
    for status, output in together(2, data, tmp_path / "parts", [], **more):
        assert status == 0, output
    assert runs.losses(tmp_path / "whole") == runs.losses(tmp_path / "parts")
    runs.assert_same_tensors(runs.checkpoint(tmp_path / "whole", 10), runs.checkpoint(tmp_path / "parts", 10))


def test_a_hanging_rank_is_named(data: Path, tmp_path: Path) -> None:
    fault = {"what": "sleep", "rank": 1, "step": 6, "seconds": 1000.0}
    ended = together(2, data, tmp_path, [fault], comm__timeout_seconds=12)
    assert all(status != 0 for status, _ in ended), ended
    hang = re.search(r"titan_fast: rank 1 hangs: .*\[rank 1, step (\d+), phase '(.*?)'\]", ended[0][1])
    assert hang is not None and int(hang[1]) in (5, 6), ended
    assert "in stuck" in ended[0][1], "its stack, as another rank read it"


def test_a_signal_to_one_rank_stops_all_after_one_save(data: Path, tmp_path: Path) -> None:
    fault = {"what": "signal", "name": "SIGTERM", "rank": 1, "step": 3}
    more = {"training__steps": 20, "checkpoint__interval": 100}
    ended = together(2, data, tmp_path, [fault], **more)
    assert all(status == 0 for status, _ in ended), ended
    (saved,) = (tmp_path / "checkpoint").glob("step-*")
    assert 3 <= int(saved.name.removeprefix("step-")) <= 6
