"""The launch files start a torchrun command that torchrun understands, with a config that exists."""

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from torch.distributed.run import get_args_parser

from titan_fast.config import parse

ROOT = Path(__file__).parents[1]
SLURM, JOBSET = ROOT / "configs" / "launch" / "slurm.sh", ROOT / "configs" / "launch" / "jobset.yaml"
SIGNAL = re.compile(r"^#SBATCH --signal=(\w+)@(\d+)", re.MULTILINE)
"""Its name and how many seconds before the time limit."""


def understood(words: list[str]) -> Any:
    """The command line as torchrun parses it, without what an older torchrun lacks, as the files say."""
    known = {name for action in get_args_parser()._actions for name in action.option_strings}
    if "--shutdown-timeout" not in known:
        words = [word for word in words if not word.startswith("--shutdown-timeout")]
    return get_args_parser().parse_args(words)


def batch_system(folder: Path, torchrun: str) -> dict[str, str]:
    """The environment of a job on two hosts, with replacements for SLURM's commands and torchrun."""
    srun = """while [[ $1 == --* ]]; do shift; done; exec "$@" """
    programs = {"srun": srun, "scontrol": "printf 'host-3\\nhost-4\\n'", "torchrun": torchrun}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "host-[3-4]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "4"}
    return os.environ | job | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_slurm(tmp_path: Path) -> None:
    environment = batch_system(tmp_path, "printf '%s\\n' \"$@\"")
    words = ["--config", str(ROOT / "configs" / "debug.toml"), "--job.description", "two words"]
    done = subprocess.run([SLURM, *words], env=environment, capture_output=True, text=True, check=True, timeout=30)
    options = understood(done.stdout.splitlines())
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "4", "host-3:23456")
    assert options.module and options.training_script == "titan_fast.train" and options.rdzv_id == "123456"
    assert parse(options.training_script_args).job.description == "two words"


def test_slurm_signals_the_processes_of_the_step_while_the_script_waits(tmp_path: Path) -> None:
    """As the script's --signal says; without "B:" they get it, not the shell. The job ends with torchrun's status."""
    name, seconds = SIGNAL.findall(SLURM.read_text())[0]
    stand_in = f"""printf '%s\\n' "$@" > "$FOLDER/words"
        trap 'sleep 0.5; touch "$FOLDER/saved"; exit 1' {name}
        echo $$ > "$FOLDER/new"; mv "$FOLDER/new" "$FOLDER/pid"
        sleep 30 & wait"""
    environment = batch_system(tmp_path, stand_in) | {"FOLDER": str(tmp_path)}
    job = subprocess.Popen([SLURM], env=environment, start_new_session=True)
    try:
        runs.wait_for((tmp_path / "pid").exists)
        options = understood((tmp_path / "words").read_text().splitlines())
        assert f"SIG{name}" in options.signals_to_handle.split(",")
        assert float(getattr(options, "shutdown_timeout", 240)) < int(seconds)
        os.kill(int((tmp_path / "pid").read_text()), signal.Signals[f"SIG{name}"])
        assert job.wait(20) == 1 and (tmp_path / "saved").exists()
    finally:
        with suppress(ProcessLookupError):  # nobody is left where the signal came before the stand-in's `sleep`
            os.killpg(job.pid, signal.SIGKILL)


def test_slurm_reports_a_failure(tmp_path: Path) -> None:
    assert subprocess.run([SLURM], env=batch_system(tmp_path, "exit 7"), timeout=30).returncode == 7


def test_jobset() -> None:
    manifest = yaml.safe_load(JOBSET.read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    options = understood(container["command"][1:])
    assert int(options.nnodes) == spec["parallelism"] == spec["completions"]
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = manifest["metadata"]["name"]
    assert options.rdzv_endpoint == f"{name}-{job['name']}-0-0.{name}:{container['ports'][0]['containerPort']}"
    assert float(getattr(options, "shutdown_timeout", 240)) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    at = options.training_script_args.index("--config") + 1
    words = [str(ROOT / word) if i == at else word for i, word in enumerate(options.training_script_args)]
    assert parse(words).model.flavor == "llama3_8b"


@pytest.mark.parametrize("path", [SLURM, JOBSET])
def test_every_line_is_short_enough_to_read(path: Path) -> None:
    assert all(len(line) <= 120 for line in path.read_text().splitlines())
