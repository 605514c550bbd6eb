"""What GPUs achieve, not what their data sheets promise: one table of rates, each with its source.

A new GPU is a new entry of GPUS. Rates that nobody has published are marked "estimate", with the reasoning.
`python -m titan_fast.estimate --calibrate results.json` replaces any of them by measurements on a device.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_fast.errors import ConfigError, did_you_mean
from titan_fast.flops import PEAKS, known_peak


@dataclass(frozen=True)
class Rate:
    """A number in SI units (FLOP/s, bytes/s, bytes) and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class AttentionRate:
    """FLOP/s of causal attention at head dimension 128 and 4096 tokens or more. Only the unmasked half is counted, and
    a backward pass as 2.5 forward passes."""

    forward: float
    backward: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """One GPU model in its usual 8-GPU node."""

    name: str
    architecture: str
    peak_name: str
    """Its entry in flops.PEAKS, with the peak and torch's name for it."""
    sms: int
    memory: Rate
    """Available to torch: total_memory of torch.cuda.get_device_properties."""
    gemm: Rate
    """The best bf16 matrix product measured."""
    float8: Rate | None
    """The best float8 one, without casts; None if the GPU has none."""
    bandwidth: Rate
    """Bytes read plus bytes written per second by a large copy."""
    attention: dict[str, AttentionRate]
    """By backend, as in `[kernels] attention`."""
    nvlink: Rate
    """Bus bandwidth of an 8-GPU all-gather (nccl-tests' busbw)."""
    nic: Rate
    """Line rate of one GPU's share of the node's network, one direction."""
    context: Rate
    """The CUDA context with the kernels that a run loads, which torch does not count."""

    @property
    def peak(self) -> float:
        return next(peak.flops for peak in PEAKS if peak.name == self.peak_name)

    @property
    def default_attention(self) -> str:
        """What `[kernels] attention = "auto"` means on this GPU."""
        return "flash" if int(self.architecture.removeprefix("sm_")) < 90 else "cudnn"


_GIB = 2**30
_MAMF = "stas00/ml-engineering, maximum achievable matmul FLOPS"
_FA3 = "FlashAttention-3 paper (arXiv:2407.08608), causal, head dimension 128, 8k"
_BUSBW = "NVIDIA/nccl issue 1281: all-gather 350, reduce-scatter 360 GB/s"
_H100_ATTENTION = {
    "flash": AttentionRate(333e12, 299e12, f"{_FA3}: forward 333; backward so that both together make 308"),
    "cudnn": AttentionRate(529e12, 463e12, f"{_FA3}: forward 529; backward is an estimate from 518 without a mask"),
    "fa3": AttentionRate(602e12, 481e12, f"{_FA3}: forward 602; backward is an estimate from 559 without a mask"),
    "fa4": AttentionRate(
        660e12, 570e12, "4.0.0b18 alone on an H100, 8k, measured in this project (benchmarks/NOTES.md)"
    ),
}
_CONTEXT = "estimate: 0.4 to 0.6 GiB are commonly seen with torch's modules loaded lazily"

GPUS: dict[str, Gpu] = {
    "a100-80gb": Gpu(
        name="a100-80gb",
        architecture="sm_80",
        peak_name="A100",
        sms=108,
        memory=Rate(79.15 * _GIB, "torch's out-of-memory messages: 79.15 GiB total capacity"),
        gemm=Rate(271.2e12, f"{_MAMF}: 271.2 at 1024x10240x5120"),
        float8=None,
        bandwidth=Rate(1.75e12, "86% of the data sheet's 2.04 TB/s, as BabelStream's copy finds"),
        attention={
            "flash": AttentionRate(
                190e12,
                179e12,
                "FlashAttention repository, A100, causal, 8k: 182 both together; the parts are estimates",
            ),
            "cudnn": AttentionRate(156e12, 147e12, "huggingface/transformers issue 48163: 0.82 of flash"),
        },
        nvlink=Rate(230e9, "nccl-tests on DGX A100: 230 to 235 GB/s of NVLink 3's 300"),
        nic=Rate(25e9, "DGX A100: one 200 Gb/s HDR InfiniBand adapter per GPU"),
        context=Rate(0.45 * _GIB, _CONTEXT),
    ),
    "h100-sxm": Gpu(
        name="h100-sxm",
        architecture="sm_90",
        peak_name="H100 SXM",
        sms=132,
        memory=Rate(79.1 * _GIB, "torch's out-of-memory messages: 79.10 GiB total capacity"),
        gemm=Rate(794.5e12, f"{_MAMF}: 794.5 at 2048x2048x13312"),
        float8=Rate(1402.6e12, f"{_MAMF}: 1402.6"),
        bandwidth=Rate(3.0e12, "Dao-AILab/quack README: 3.0 of 3.35 TB/s"),
        attention=_H100_ATTENTION,
        nvlink=Rate(350e9, _BUSBW),
        nic=Rate(50e9, "DGX H100: one 400 Gb/s NDR InfiniBand adapter per GPU"),
        context=Rate(0.55 * _GIB, _CONTEXT),
    ),
    "h100-500w": Gpu(
        name="h100-500w",
        architecture="sm_90",
        peak_name="H100 SXM",
        sms=132,
        memory=Rate(94.5 * _GIB, "96 GB of HBM2e, of which the H100 SXM's part is usable"),
        gemm=Rate(
            635e12, "estimate: torchtitan's notes say the peak is between H100 NVL's 835 and SXM's; 0.8 of 794.5"
        ),
        float8=Rate(1122e12, "estimate: 0.8 of H100 SXM, as its gemm"),
        bandwidth=Rate(2.15e12, "torchtitan's notes: HBM2e of 2.4 TB/s; 0.9 of it, as on H100 SXM"),
        attention={
            name: AttentionRate(0.8 * rate.forward, 0.8 * rate.backward, "estimate: 0.8 of H100 SXM, as its gemm")
            for name, rate in _H100_ATTENTION.items()
        },
        nvlink=Rate(350e9, _BUSBW),
        nic=Rate(50e9, "torchtitan's notes: 400 Gb/s RoCE per GPU"),
        context=Rate(0.55 * _GIB, _CONTEXT),
    ),
    "h200": Gpu(
        name="h200",
        architecture="sm_90",
        peak_name="H200",
        sms=132,
        memory=Rate(139.8 * _GIB, "torch's out-of-memory messages: 139.81 GiB total capacity"),
        gemm=Rate(794.5e12, f"{_MAMF}: the same as H100 SXM"),
        float8=Rate(1402.6e12, "estimate: the same as H100 SXM, as its gemm"),
        bandwidth=Rate(4.3e12, "estimate: 0.9 of the data sheet's 4.8 TB/s, as on H100 SXM"),
        attention=_H100_ATTENTION,  # the same multiprocessors at the same power
        nvlink=Rate(350e9, _BUSBW),
        nic=Rate(50e9, "DGX H200: one 400 Gb/s NDR InfiniBand adapter per GPU"),
        context=Rate(0.55 * _GIB, _CONTEXT),
    ),
    "b200": Gpu(
        name="b200",
        architecture="sm_100",
        peak_name="B200",
        sms=148,
        memory=Rate(178.3 * _GIB, "newmind.ai's report on HGX B200: 178.36 GiB each"),
        gemm=Rate(1745e12, f"{_MAMF}: 1745 at 1792x16128x3072"),
        float8=Rate(3490e12, "estimate: the part of the data sheet's 4500 that gemm is of its 2250"),
        bandwidth=Rate(6.0e12, "newmind.ai's report on HGX B200: over 6,000 GB/s device to device"),
        attention={
            "cudnn": AttentionRate(
                1240e12, 950e12, "FlashAttention-4: 1613 forward, 1.3x cuDNN 9.13; backward is an estimate"
            ),
            "fa4": AttentionRate(1600e12, 1150e12, "FlashAttention-4: 1613 at best; backward is an estimate"),
            "flash": AttentionRate(400e12, 360e12, "estimate: FlashAttention-2 as on H100, at B200's 148 SMs"),
        },
        nvlink=Rate(690e9, "estimate: the part of NVLink 5's 900 GB/s that H100 has of NVLink 4's 450"),
        nic=Rate(50e9, "DGX B200: one 400 Gb/s adapter per GPU"),
        context=Rate(0.6 * _GIB, _CONTEXT),
    ),
}


def known_gpu(name: str) -> Gpu:
    """The entry of GPUS; ConfigError lists them all."""
    if name not in GPUS:
        words = name.lower()
        close = [known for known in GPUS if known.startswith(words)]
        if not close and not any(part in words for part in ("nvl", "pcie")):  # slower variants
            close = [known for known in GPUS if words.startswith(known) or known == _by_device(name)]
            close = close or [words]
        hint = did_you_mean(close[0], GPUS) if close else ""
        raise ConfigError(
            f"unknown GPU {name!r}",
            f"{hint}known: {', '.join(GPUS)}; a new one is a new entry of GPUS in titan_fast/gpus.py",
            where="--gpu",
        )
    return GPUS[name]


def _by_device(device: str) -> str:
    """The name in GPUS of the GPU that torch calls `device`, or ""."""
    peak = known_peak(device)
    return next((gpu.name for gpu in GPUS.values() if peak is not None and gpu.peak_name == peak.name), "")


# What a calibration file may hold: {"device": name as torch gives it, "rates": {key: number}}.
_CALIBRATED = ("gemm", "bandwidth", "nvlink", "nic")
_ATTENTION = ("attention_forward", "attention_backward")
_SHAPE = (
    'it needs {"device": "NVIDIA ...", "rates": {"gemm": FLOP/s, "bandwidth": bytes/s, '
    '"attention_forward": FLOP/s, "attention_backward": FLOP/s, "nvlink": bytes/s, "nic": bytes/s}}, any of the rates'
)


def calibrated(gpu: Gpu, path: Path) -> Gpu:
    """`gpu` with the rates measured on a device, from a file as the end-to-end benchmark writes it.

    ConfigError if the file cannot be read, is of another device, or has an unknown or impossible rate.
    """
    where = str(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        device, rates = found["device"], dict(found["rates"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"cannot read the calibration: {type(error).__name__}: {error}", _SHAPE, where) from error
    pattern = next(peak.pattern for peak in PEAKS if peak.name == gpu.peak_name)
    if not re.match(pattern, str(device).strip()):
        raise ConfigError(f"the calibration is of {device!r}, and --gpu is {gpu.name}", "use the GPU's own", where)
    times_attention, backend = not rates.keys().isdisjoint(_ATTENTION), found.get("attention", gpu.default_attention)
    if times_attention and (not isinstance(backend, str) or backend not in gpu.attention):
        raise ConfigError(f"attention is {backend!r}", f"it is one of {', '.join(gpu.attention)}", where)
    for name, value in rates.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in (*_CALIBRATED, *_ATTENTION) or not is_number:
            raise ConfigError(f"rate {name!r} is {value!r}", _SHAPE, where)
        least, most = _believed(gpu, name, backend)
        if not least <= value <= most:
            what = f"rate {name!r} is {value!r}, and on {gpu.name} it is between {least:.3g} and {most:.3g}"
            raise ConfigError(what, f"mind the units: {_SHAPE}", where)
    source = f"measured on {device} ({path.name})"
    changes: dict[str, Any] = {name: Rate(rates[name], source) for name in _CALIBRATED if name in rates}
    if times_attention:
        old = gpu.attention[backend]
        forward, backward = rates.get("attention_forward", old.forward), rates.get("attention_backward", old.backward)
        changes["attention"] = gpu.attention | {backend: AttentionRate(forward, backward, source)}
    return dataclasses.replace(gpu, **changes)


def _believed(gpu: Gpu, name: str, backend: str) -> tuple[float, float]:
    """The least and the most that a measured rate can be. The least catches wrong units: 1% of the table's, or for the
    network 0.1%, since a whole node may share an old one. The most is the peak, or else twice the table's."""
    if name in _ATTENTION:
        return 0.01 * getattr(gpu.attention[backend], name.removeprefix("attention_")), gpu.peak
    table = getattr(gpu, name).value
    return (0.001 if name == "nic" else 0.01) * table, gpu.peak if name == "gemm" else 2 * table
