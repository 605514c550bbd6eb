"""How long a step takes: a simulation of the operators of titan_fast.step_record, one after another.

There are four clocks: the host that launches, the GPU that computes, FSDP's collectives (over the network), and those
of tensor parallelism (within the node). A matrix product takes its FLOPs at the GPU's rate for its shape, attention its
FLOPs at its backend's rate, everything else its bytes at the GPU's bandwidth, a collective alpha + bytes / beta. As
with FSDP2, the computation waits for a gather where it needs the weights; the part that it did not hide is listed as
exposed."""

import math
from collections import deque
from dataclasses import dataclass, field, replace

from titan_fast.gpus import Gpu
from titan_fast.step_record import Group, Operation, Segment


@dataclass(frozen=True)
class Fitted:
    """The three constants that were fitted to the eight published runs on 64 A100 (benchmarks/estimate_errors.py).
    These runs do not determine them well: without one run, interference is between 0.25 and 0.5, and the others change
    with it."""

    gemm: float = 0.80
    """The fraction of the best measured matrix product rate that long runs with many shapes sustain."""
    bandwidth: float = 0.75
    """The fraction of a large copy's bandwidth that eager operators reach."""
    interference: float = 0.40
    """By how much the computation slows down while a collective runs beside it."""


FITTED = Fitted()

# Seconds of host time. An eager operator goes through Python, autograd and the dispatcher, with some views. A compiled
# kernel is launched from generated code; before the first one of a unit come guards, autograd's node and the hooks of
# its parameters. The compiled update is called for each tensor. Fitted to one host, on which torch.mul takes 12 us,
# twice as long as on others (the 1B at 1 x 1024 on an H100, which waits: 81.0 ms eager, 53.7 compiled). How that is
# divided between units and updates, 3 to 1, is from a CPU. FSDP2's hooks around a unit, also Python, are an estimate.
EAGER_HOST, COMPILED_HOST, UNIT_HOST, UPDATE_HOST, FSDP_HOST = 36.6e-6, 4e-6, 1.07e-3, 110e-6, 150e-6
COMPILED_BANDWIDTH = 0.90
"""Fraction of a large copy's bandwidth that compiled and handwritten kernels reach; torchao's model (roofline_utils.py)
uses 0.92 of the data sheet's. Not fitted."""
KERNEL_GAP = 1.5e-6
"""Seconds between a kernel's end and the next one's start when launches are ahead. An estimate."""

# NCCL's own model of ring latency, Simple protocol (src/graph/tuning.cc): seconds per call and per hop.
RING_BASE, RING_NVLINK_HOP, RING_NETWORK_HOP = 8.4e-6, 3.4e-6, 14.0e-6
NETWORK_EFFICIENCY = 0.94
"""As a fraction of the line rate: 376.7 of 400 GB/s in a 16 GiB all-reduce of 4 nodes (stas00/ml-engineering, network
benchmarks)."""

PARTS = (
    "matrix products",
    "attention",
    "memory-bound",
    "recomputation",
    "FSDP copies",
    "optimizer and clipping",
    "slowed by communication",
    "exposed FSDP communication",
    "exposed tensor-parallel communication",
    "waiting for the host",
)


@dataclass(frozen=True)
class Network:
    """Where ranks are: `gpus_per_node` neighbours share NVLink, and each GPU has `nic` bytes/s of the network."""

    gpus_per_node: int
    nic: float


@dataclass
class StepTime:
    """Seconds of a step."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    collectives: float = 0.0
    """Of FSDP's collectives, hidden or not."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def hidden(self) -> float:
        """The fraction of FSDP's communication that is hidden, 0 to 1."""
        exposed = self.parts["exposed FSDP communication"]
        return 1.0 if self.collectives == 0 else max(0.0, 1.0 - exposed / self.collectives)

    @property
    def communication(self) -> float:
        """The fraction of the step that communication costs, 0 to 1: what is exposed, and by how much the hidden part
        slows the computation."""
        return sum(value for name, value in self.parts.items() if "communication" in name) / self.seconds


def gemm_seconds(operation: Operation, gpu: Gpu, fitted: Fitted) -> float:
    """FLOPs at the rate for the shape, or bytes at the bandwidth where that takes longer."""
    rows, columns, _ = operation.shape
    rate = fitted.gemm * _best_rate(operation.element_size, gpu) * _filled(rows, columns, gpu.sms)
    return max(operation.flops / rate, operation.nbytes / (fitted.bandwidth * gpu.bandwidth.value))


def _best_rate(element_size: int, gpu: Gpu) -> float:
    """Tensor cores do float32 (as TF32) at half of bfloat16's rate on every GPU of the table."""
    if element_size == 1:
        assert gpu.float8 is not None, "estimate.check refuses float8 on a GPU without it"
        return gpu.float8.value
    return gpu.gemm.value * (1.0 if element_size == 2 else 0.5)


def _filled(rows: int, columns: int, sms: int) -> float:
    """The fraction of multiprocessors that have a tile to work on, with the best of cuBLAS's large tiles. The smallest
    of these is a little slower, but wins where the larger ones leave too many multiprocessors idle."""
    best = 0.0
    for height, width, cost in ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.94)):
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        used = rows * columns / (tiles * height * width)
        best = max(best, cost * used * tiles / (math.ceil(tiles / sms) * sms))
    return best


def compute_seconds(operation: Operation, gpu: Gpu, backend: str, fitted: Fitted) -> float:
    """Time of an operator on the GPU, apart from collectives."""
    if operation.kind == "gemm":
        return gemm_seconds(operation, gpu, fitted)
    if operation.kind == "attention":
        rates = gpu.attention[backend]
        return operation.flops / (rates.backward if operation.backward else rates.forward)
    tuned = operation.compiled or operation.name in ("_fused_adamw_",) or operation.name.startswith("titan_kernels.")
    return operation.nbytes / ((COMPILED_BANDWIDTH if tuned else fitted.bandwidth) * gpu.bandwidth.value)


def collective_seconds(operation: Operation, gpu: Gpu, network: Network) -> float:
    """Time of a ring over the group: within nodes over NVLink, between them over every member's share of the network.
    It has equally many members in each of its nodes; estimate.check refuses other layouts."""
    group = operation.group
    per_node = max(1, min(group.size, network.gpus_per_node // max(1, group.stride)))
    nodes = group.size // per_node
    ring = operation.nbytes * (group.size - 1) / group.size / gpu.nvlink.value if per_node > 1 else 0.0
    between = operation.nbytes * (nodes - 1) / nodes / (NETWORK_EFFICIENCY * network.nic * per_node)
    hops = (group.size - nodes) * RING_NVLINK_HOP + (nodes if nodes > 1 else 0) * RING_NETWORK_HOP
    if "allreduce" not in operation.name:
        return RING_BASE + hops + max(ring, between)
    # An all-reduce goes around twice, and NCCL uses a tree where the ring is long.
    tree = (per_node - 1) * RING_NVLINK_HOP + math.log2(nodes) * RING_NETWORK_HOP
    return RING_BASE + 2.0 * (min(hops, tree) + max(ring, between))


class _Clocks:
    """The state of the simulation: seconds since it began."""

    def __init__(
        self, gpu: Gpu, backend: str, network: Network, fitted: Fitted, tensor_degree: int, recorded: bool
    ) -> None:
        self.gpu, self.backend, self.network, self.fitted = gpu, backend, network, fitted
        self.recorded = recorded
        self.tensor_group = Group(tensor_degree, 1)
        self.host = self.compute = self.fsdp = self.tensor = 0.0
        self.gathers: deque[float] = deque()  # when each weight that is on its way will be there
        self.reduced = 0.0  # when the last gradient is reduced
        self.result = StepTime()

    def begin(self, segment: Segment) -> None:
        """The host arrives at a unit."""
        if segment.phase in ("forward", "backward") and any(one.compiled for one in segment.operations):
            self.host += self._of_host(segment, UNIT_HOST)

    def _of_host(self, segment: Segment, seconds: float) -> float:
        """`seconds` of the host's time, or none in the passes that a CUDA graph replays."""
        return 0.0 if self.recorded and segment.phase in ("forward", "backward") else seconds

    def run(self, segment: Segment, operation: Operation) -> None:
        is_update = operation.compiled and segment.phase == "optimizer"
        seconds = UPDATE_HOST * operation.kernels if is_update else _host_seconds(operation)
        self.host += self._of_host(segment, seconds)
        if operation.kind in ("gather", "reduce", "replicas"):
            self._beside(operation)
        elif operation.kind in ("tensor", "blocking"):
            self._tensor(operation)
        elif operation.kind == "wait":
            self._wait(self.tensor, "exposed tensor-parallel communication")
        else:
            if operation.kind == "copy_out" and self.gathers:
                self._wait(self.gathers.popleft(), "exposed FSDP communication")
            self._compute(segment, operation)

    def _beside(self, operation: Operation) -> None:
        """A collective that starts when everything before it is done, and runs beside the computation. Only for a
        reduction the computation waits until the one before is done, as FSDP2 does."""
        if operation.kind == "reduce":
            self._wait(self.reduced, "exposed FSDP communication")
        seconds = collective_seconds(operation, self.gpu, self.network)
        self.fsdp = max(self.fsdp, self.compute, self.host) + seconds
        self.result.collectives += seconds
        if operation.kind == "gather":
            self.gathers.append(self.fsdp)
        elif operation.kind == "reduce":
            self.reduced = self.fsdp

    def _tensor(self, operation: Operation) -> None:
        start = max(self.tensor, self.compute, self.host)
        self.tensor = start + collective_seconds(operation, self.gpu, self.network)
        if operation.kind == "blocking":
            between = "tensor-parallel" if operation.group == self.tensor_group else "FSDP"
            self._wait(self.tensor, f"exposed {between} communication")

    def _wait(self, until: float, part: str) -> None:
        if until > self.compute:
            self.result.parts[part] += until - self.compute
            self.compute = until

    def _compute(self, segment: Segment, operation: Operation) -> None:
        self._wait(self.host, "waiting for the host")
        seconds = compute_seconds(operation, self.gpu, self.backend, self.fitted) + KERNEL_GAP * operation.kernels
        beside = min(max(0.0, self.fsdp - self.compute), seconds)
        slowed = beside * self.fitted.interference
        self.compute += seconds + slowed
        self.result.parts[_part_of(segment, operation)] += seconds
        self.result.parts["slowed by communication"] += slowed

    def end_of_backward(self) -> None:
        """FSDP2 waits for the last reduction. Gathers whose weights nobody used are forgotten."""
        self._wait(self.fsdp, "exposed FSDP communication")
        self.gathers.clear()


def _host_seconds(operation: Operation) -> float:
    if operation.kind in ("gather", "reduce", "replicas", "copy_out"):
        return FSDP_HOST
    return (COMPILED_HOST if operation.compiled else EAGER_HOST) * min(operation.kernels, 1000.0)


def _part_of(segment: Segment, operation: Operation) -> str:
    if segment.phase in ("clip", "optimizer"):
        return "optimizer and clipping"
    if operation.recomputed:
        return "recomputation"
    if operation.kind == "gemm":
        return "matrix products"
    if operation.kind == "attention":
        return "attention"
    is_copy = operation.name.startswith("fsdp.") or operation.name == "_foreach_copy_"
    return "FSDP copies" if is_copy else "memory-bound"


def step_time(
    segments: list[Segment],
    gpu: Gpu,
    backend: str,
    network: Network,
    passes: int = 1,
    fitted: Fitted = FITTED,
    tensor_degree: int = 1,
    recorded: bool = False,
) -> StepTime:
    """The time of a step of `passes`. Where two passes were counted, the second also stands for all between them,
    without the exchange between replicas, which FSDP2 does only in the last pass. recorded: forward and backward are a
    CUDA graph."""
    clocks = _Clocks(gpu, backend, network, fitted, tensor_degree, recorded)
    last_batch = max(segment.batch for segment in segments)
    in_passes = [segment for segment in segments if segment.phase in ("forward", "backward")]
    last_pass = [segment for segment in in_passes if segment.batch == last_batch]
    between = [
        replace(segment, operations=[one for one in segment.operations if one.kind != "replicas"])
        for segment in last_pass
    ]
    for _ in range(2):  # the second counts: as in a real run, the host has run ahead during the step before
        clocks.result = StepTime()
        _run_all(clocks, [segment for segment in in_passes if segment.batch < last_batch])
        for _ in range(passes - 1 - last_batch):
            _run_all(clocks, between)
        _run_all(clocks, last_pass)
        clocks.end_of_backward()
        _run_all(clocks, [segment for segment in segments if segment.phase not in ("forward", "backward")])
    return clocks.result


def _run_all(clocks: _Clocks, segments: list[Segment]) -> None:
    for segment in segments:
        clocks.begin(segment)
        for operation in segment.operations:
            clocks.run(segment, operation)
