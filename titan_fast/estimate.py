"""Will it fit, how fast will it go: a step on any number of GPUs, counted and timed before anything is launched.

    python -m titan_fast.estimate --config configs/llama3_70b.toml --gpu a100-80gb --gpus 64

All options but the planner's own are the trainer's (`--activation_checkpoint.mode full`). Memory is counted from the
trainer's own model and step on fake tensors (counted_step.py); time is a model (step_time.py) with a table of rates
(gpus.py). How far off both are is in benchmarks/results/estimate_errors.json.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_fast.command_line import Parser
from titan_fast.config import Config, MeshDegrees, grad_accum_steps, mesh_degrees, model_shape, parse
from titan_fast.errors import ConfigError, command
from titan_fast.flavors import ModelShape
from titan_fast.flops import FORMULAS, flops_per_token, mfu
from titan_fast.gpus import GPUS, Gpu, calibrated, known_gpu
from titan_fast.manifest import obstacle
from titan_fast.step_record import Segment
from titan_fast.step_time import Network, StepTime

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
"""The numbers of GPUs of `--scaling`."""

_GIB = 2**30

# What torch does not count. NCCL: up to 32 channels, each with 4 MiB (NCCL_BUFFSIZE) to send and 4 MiB to receive, make
# 256 MiB per communicator, plus its own tables.
NCCL_BYTES_PER_COMMUNICATOR = 0.3 * _GIB
# Fragmentation in the caching allocator, as a fraction of what is made and freed in a step: an estimate for expandable
# segments. Parameters and optimizer state are allocated once and lose nothing.
ALLOCATOR_SLACK = 0.04
# torch's default workspace for cuBLAS (CUBLAS_WORKSPACE_CONFIG), which it does count.
CUBLAS_BYTES = {"sm_80": 8.125 * 2**20}
CUBLAS_BYTES_NEWER = 32 * 2**20


@dataclass(frozen=True)
class Plan:
    """The question: a config on GPUs."""

    config: Config
    gpu: Gpu
    gpus: int
    network: Network
    whole: bool = False
    """Count every block instead of extrapolating."""

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.config.model)

    @property
    def degrees(self) -> MeshDegrees:
        return mesh_degrees(self.config.parallelism, self.gpus, "--gpus")

    @property
    def passes(self) -> int:
        return grad_accum_steps(self.config.training, self.degrees.data)

    @property
    def attention(self) -> str:
        """The backend that `[kernels] attention` means on this GPU."""
        setting = self.config.kernels.attention
        if setting != "auto":
            return setting
        return "flash" if self.config.training.document_mask else self.gpu.default_attention


@dataclass(frozen=True)
class Estimate:
    """The answer. Memory in bytes, on rank 0's GPU."""

    plan: Plan
    segments: list[Segment]
    how: str
    time: StepTime

    @property
    def fullest(self) -> Segment:
        return max(self.segments, key=lambda segment: segment.peak.total)

    @property
    def memory_parts(self) -> dict[str, float]:
        """torch.cuda.max_memory_allocated, by part."""
        cublas = CUBLAS_BYTES.get(self.plan.gpu.architecture, CUBLAS_BYTES_NEWER)
        return self.fullest.peak.parts | {"cuBLAS workspace": cublas}

    @property
    def peak_memory(self) -> float:
        return sum(self.memory_parts.values())

    @property
    def beside_torch(self) -> dict[str, float]:
        """The device's memory that torch does not count, by part."""
        degrees, parts = self.plan.degrees, self.fullest.peak.parts
        communicators = sum(d > 1 for d in (degrees.replicate, degrees.shard, degrees.tensor)) + (self.plan.gpus > 1)
        passing = self.peak_memory - parts["parameters"] - parts["optimizer state"]
        return {
            "CUDA context": self.plan.gpu.context.value,
            "NCCL": communicators * NCCL_BYTES_PER_COMMUNICATOR,
            "allocator slack": ALLOCATOR_SLACK * passing,
        }

    @property
    def device_memory(self) -> float:
        return self.peak_memory + sum(self.beside_torch.values())

    @property
    def fits(self) -> bool:
        return self.device_memory <= self.plan.gpu.memory.value

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        training = self.plan.config.training
        tokens = training.local_batch_size * training.seq_len * self.plan.passes / self.plan.degrees.tensor
        return tokens / self.time.seconds

    def mfu(self) -> dict[str, float]:
        """By formula."""
        plan, seq_len = self.plan, self.plan.config.training.seq_len
        return {
            formula: mfu(self.tokens_per_second, flops_per_token(plan.shape, seq_len, formula), plan.gpu.peak)
            for formula in FORMULAS
        }

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        degrees, parts = self.plan.degrees, self.memory_parts | self.beside_torch
        return {
            "model": self.plan.config.model.flavor,
            "gpu": self.plan.gpu.name,
            "gpus": self.plan.gpus,
            "mesh": dataclasses.asdict(degrees),
            "fits": self.fits,
            "peak_memory_gib": self.peak_memory / _GIB,
            "device_memory_gib": self.device_memory / _GIB,
            "usable_memory_gib": self.plan.gpu.memory.value / _GIB,
            "memory_parts_gib": {name: value / _GIB for name, value in parts.items()},
            "peak_at": {"phase": self.fullest.phase, "unit": self.fullest.unit},
            "step_seconds": self.time.seconds,
            "step_parts_seconds": self.time.parts,
            "communication_hidden": self.time.hidden,
            "tokens_per_second": self.tokens_per_second,
            "mfu_titan": self.mfu()["titan"],
            "mfu_by_formula": self.mfu(),
            "counted": self.how,
        }


def check(plan: Plan) -> None:
    """ConfigError for all that the trainer would refuse, in its words, and for what only a plan can get wrong."""
    import torch

    from titan_fast import parallel

    degrees, network = plan.degrees, plan.network
    assert plan.passes >= 1
    parallel.check(plan.config, plan.shape, degrees, torch.device("cuda"))
    if plan.gpus > network.gpus_per_node and plan.gpus % network.gpus_per_node:
        raise ConfigError(
            f"{plan.gpus} GPUs are not whole nodes of {network.gpus_per_node}",
            "change --gpus or --gpus-per-node",
            where="--gpus",
        )
    _check_groups(plan)
    if plan.config.training.enable_cpu_offload:
        raise ConfigError(
            "training.enable_cpu_offload moves state to the host, which the planner does not count", "plan without it"
        )
    if plan.config.training.mixed_precision_param == "float32":
        raise ConfigError(
            "training.mixed_precision_param is 'float32', and the planner only knows rates of bfloat16 and float8",
            "plan for bfloat16; on a GPU float32 takes many times as long",
        )
    if plan.config.float8.enable and plan.gpu.float8 is None:
        raise ConfigError(
            f"float8.enable is True, and {plan.gpu.name} has no float8 products",
            f"turn it off, or plan for one of {', '.join(gpu.name for gpu in GPUS.values() if gpu.float8)}",
            where="--gpu",
        )
    if plan.attention not in plan.gpu.attention:
        raise ConfigError(
            f"no rate of attention {plan.attention!r} is known for {plan.gpu.name}",
            f"known: {', '.join(plan.gpu.attention)}; add it to titan_fast/gpus.py",
            where="kernels.attention",
        )


def _check_groups(plan: Plan) -> None:
    """ConfigError if a ring would have unequal parts in its nodes, which step_time cannot time."""
    degrees, node = plan.degrees, plan.network.gpus_per_node
    groups = {
        "each tensor-parallel group": ("tensor_parallel_degree", degrees.tensor),
        "each copy of the weights": ("data_parallel_replicate_degree", degrees.shard * degrees.tensor),
    }
    for who, (key, size) in groups.items():
        if plan.gpus > node and node % size and size % node:
            raise ConfigError(
                f"{who} lies on {size} GPUs, which are neither whole nodes of {node} nor equal parts of one",
                f"change parallelism.{key} or --gpus-per-node",
            )


def estimate(plan: Plan, check_depth: bool = True) -> Estimate:
    """Counts and times a step. ConfigError for what cannot run. check_depth: see deep_step."""
    check(plan)
    import torch

    from titan_fast.counted_step import count_step, fake_world
    from titan_fast.deep_step import deep_step, period
    from titan_fast.ops import build_ops
    from titan_fast.step import workload
    from titan_fast.step_time import step_time

    config, shape, degrees = plan.config, plan.shape, plan.degrees
    kernels = dataclasses.replace(config.kernels, attention="flash")  # the CPU's, which saves the same as the GPU's
    ops = build_ops(kernels, torch.device("cpu"), workload(config, shape, degrees), plan.gpu.architecture)

    def count(n_layers: int) -> list[Segment]:
        return count_step(config, dataclasses.replace(shape, n_layers=n_layers), ops, degrees, min(2, plan.passes))

    with fake_world(plan.gpus):
        step = deep_step(count, shape.n_layers, period(config.activation_checkpoint), plan.whole, check_depth)
    time = step_time(
        step.segments,
        plan.gpu,
        plan.attention,
        plan.network,
        plan.passes,
        tensor_degree=degrees.tensor,
        recorded=config.training.cuda_graph,
    )
    return Estimate(plan, step.segments, step.how, time)


def on_gpu(config: Config) -> Config:
    """`config` with mixed_precision_param `auto` resolved as on a GPU."""
    if config.training.mixed_precision_param != "auto":
        return config
    return dataclasses.replace(config, training=dataclasses.replace(config.training, mixed_precision_param="bfloat16"))


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(prog="titan_fast.estimate", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the whole run")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs that share NVLink (8)")
    parser.add_argument(
        "--nic-gbps", type=float, help="network of one GPU, Gbit/s in one direction; default: the table's"
    )
    parser.add_argument("--calibrate", type=Path, help="rates measured on a device, instead of the table's")
    parser.add_argument(
        "--search",
        action="store_true",
        help="list what fits, best first; counts up to 48 series of batches on all CPUs, each of which takes about "
        "half a CPU minute for the 8B",
    )
    parser.add_argument("--scaling", action="store_true", help="tokens/s on 256 to 16,384 GPUs, FSDP and HSDP")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=Path, help="write pictures into this folder")
    parser.add_argument("--all-blocks", action="store_true", help="count every block, not only the first ones")
    return parser.parse_known_args(argv)


def plan_of(argv: list[str]) -> tuple[Plan, argparse.Namespace]:
    """The plan that a command line asks for, checked. Makes the folder for pictures."""
    own, rest = _arguments(argv)
    gpu = known_gpu(own.gpu)
    if own.calibrate is not None:
        gpu = calibrated(gpu, own.calibrate)
    for name in ("gpus", "gpus_per_node", "nic_gbps"):
        value = getattr(own, name)
        if value is not None and not 0 < value <= 2**20:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, not positive and at most 2^20", "change it")
    if own.scaling and SIZES[0] % own.gpus_per_node:
        what = f"--scaling is for {SIZES[0]} GPUs and more, which are not whole nodes of {own.gpus_per_node}"
        raise ConfigError(what, "change --gpus-per-node")
    if any(word.partition("=")[0].replace("-", "_") == "__job.world_size" for word in rest):
        raise ConfigError("job.world_size is for titan_fast.train", "--gpus says it here")
    config = on_gpu(parse(rest))
    if config.job.print_config or config.job.dry_run:
        raise ConfigError("job.print_config and job.dry_run are for titan_fast.train", "leave them out")
    nic = gpu.nic.value if own.nic_gbps is None else own.nic_gbps * 1e9 / 8
    network = Network(own.gpus_per_node, nic)
    plan = Plan(config, gpu, own.gpus, network, own.all_blocks)
    check(plan)
    if own.scaling:
        from titan_fast.advice import check_scaling

        check_scaling(plan)
    if own.plot is not None:
        _make_folder(own.plot)
    return plan, own


def _make_folder(folder: Path) -> None:
    try:
        why = obstacle(folder)
        if not why:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
    if why:
        raise ConfigError(f"no folder for --plot: {why}", "give another name", str(folder))


@command
def main() -> None:
    plan, own = plan_of(sys.argv[1:])
    from titan_fast import estimate_report as report

    def show(lines: list[str]) -> None:
        """Flushes, because what follows may take long, or fail."""
        if not own.json:
            print("\n".join(lines), flush=True)  # noqa: T201

    found = estimate(plan)
    answer = found.to_dict()
    show(report.table(found))
    if own.plot is not None:
        show([f"written         {path}" for path in report.plots(found, own.plot)])
    if own.search:
        from titan_fast.advice import search
        from titan_fast.tokenizer import available_processors

        options, refusals = search(plan, available_processors(), lambda text: print(text, file=sys.stderr))  # noqa: T201
        answer["search"] = [option.to_dict() for option in options]
        answer["search_refusals"] = refusals
        show(["", *report.options_table(options, refusals, plan.config)])
    if own.scaling:
        from titan_fast.advice import scaling

        curve = scaling(plan)
        answer["scaling"] = [dataclasses.asdict(point) for point in curve]
        show(["", *report.scaling_table(curve, plan.config)])
        if own.plot is not None:
            show([f"written         {report.scaling_plot(curve, own.plot)}"])
    if own.json:
        print(json.dumps(answer, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
