"""The same training with one and two mesh dimensions: FSDP2 over 4 processes, and FSDP2 x 2 with tensor parallel 2.

    python -m benchmarks.loss_curves [--steps 3000] [--dataset-path FOLDER] [--out benchmarks/results/loss_curves]

Each run is a torchrun of titan_fast.train on CPU processes, in float32, from the same initial weights and with the same
sequences in the same order. Writes OUT.json and OUT.png. Differences are those of the training loss at equal steps, in
the second half.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.provenance import commit

LAYOUTS = {"1D: FSDP2 x 4": (4, 1), "2D: FSDP2 x 2, TP x 2": (2, 2)}
PROCESSES, GLOBAL_BATCH = 4, 8
MODEL = {
    "model.dim": 128, "model.n_layers": 2, "model.n_heads": 4, "model.n_kv_heads": 2, "model.ffn_dim": 352,
    "training.seq_len": 64, "training.global_batch_size": GLOBAL_BATCH, "lr_scheduler.warmup_steps": 100,
    "metrics.log_freq": 10, "metrics.sample_prompt": "", "metrics.enable_tensorboard": False,
    "checkpoint.enable": False, "validation.enable": False,
}  # fmt: skip


def run(folder: Path, shard: int, tensor: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains in `folder`; returns a dict of metrics per logged step."""
    options = MODEL | options | {
        "job.dump_folder": folder, "parallelism.data_parallel_shard_degree": shard,
        "parallelism.tensor_parallel_degree": tensor, "training.local_batch_size": GLOBAL_BATCH // shard,
    }  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, "-m", "titan_fast.train", *words], check=True, env=environment)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(records: list[dict[str, Any]]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def compare(curves: dict[str, dict[int, float]]) -> dict[str, Any]:
    """The difference of the two curves over the second half of their steps."""
    first, second = curves.values()
    if first.keys() != second.keys():
        raise ValueError("the runs logged different steps")
    late = [step for step in first if step > max(first) / 2]
    differences = [abs(first[step] - second[step]) for step in late]
    return {
        "steps": max(first),
        "compared_steps": len(late),
        "largest_difference": max(differences),
        "mean_difference": statistics.fmean(differences),
        "mean_loss": {name: statistics.fmean(curve[step] for step in late) for name, curve in curves.items()},
        "last_loss": {name: curve[max(curve)] for name, curve in curves.items()},
    }


def draw(curves: dict[str, dict[int, float]], summary: dict[str, Any], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        top.plot(list(curve), list(curve.values()), style, label=name, linewidth=1.2)
    top.set_ylabel("training loss")
    top.legend()
    top.set_title(
        f"second half: largest difference {summary['largest_difference']:.2g}, mean {summary['mean_difference']:.2g}"
    )
    first, second = curves.values()
    bottom.semilogy(list(first), [abs(first[step] - second[step]) for step in first], color="grey", linewidth=0.8)
    bottom.set_ylabel("|difference|")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--dataset-path", help="local text; without it, the Python standard library's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loss_curves"))
    arguments = parser.parse_args()
    options: dict[str, Any] = {"training.steps": arguments.steps}
    if arguments.dataset_path:
        options["training.dataset_path"] = arguments.dataset_path
    curves, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (shard, tensor)) in enumerate(LAYOUTS.items()):
            started = time.perf_counter()
            curves[name] = losses(run(Path(folder) / str(i), shard, tensor, options))
            seconds[name] = round(time.perf_counter() - started, 1)
            options["model.tokenizer_path"] = Path(folder) / "0" / "tokenizer.model"
    summary = compare(curves)
    record = {
        "summary": summary,
        "seconds": seconds,
        "dataset": arguments.dataset_path or "stdlib",
        "options": MODEL,
        "commit": commit(),
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()},
        "curves": curves,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(curves, summary, arguments.out.with_suffix(".png"))
    print(json.dumps(summary, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
