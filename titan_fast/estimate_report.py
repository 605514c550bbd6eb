"""An estimate as text and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_fast.advice import COSTS_NOTHING, Option, ScalingPoint
from titan_fast.config import Config
from titan_fast.errors import ConfigError
from titan_fast.estimate import Estimate
from titan_fast.memory_count import PARTS
from titan_fast.pictures import new_figure
from titan_fast.step_record import Segment

_GIB = 2**30


def table(found: Estimate) -> list[str]:
    """The answer as text."""
    plan, degrees = found.plan, found.plan.degrees
    room = plan.gpu.memory.value
    training = plan.config.training
    verdict = "fits" if found.fits else "DOES NOT FIT"
    lines = [
        f"{plan.config.model.flavor} on {plan.gpus} x {plan.gpu.name}: {degrees.replicate} replicate x {degrees.shard} "
        f"shard x {degrees.tensor} tensor, local batch {training.local_batch_size} x {training.seq_len}, "
        f"{plan.passes} pass{'es' if plan.passes > 1 else ''}, {_how_run(plan.config)}",
        f"{verdict}: {found.device_memory / _GIB:.1f} of {room / _GIB:.1f} GiB per GPU; "
        f"torch counts {found.peak_memory / _GIB:.1f}, at {found.fullest.unit}, {found.fullest.phase}",
    ]
    lines += _rows({k: v / _GIB for k, v in (found.memory_parts | found.beside_torch).items()}, "GiB", 2)
    mfus = ", ".join(f"{value:.1%} {name}" for name, value in found.mfu().items())
    if found.plan.config.float8.enable:
        mfus += ", of bfloat16's peak"
    lines += [
        "",
        f"{found.tokens_per_second:,.0f} tokens/s per GPU, step {found.time.seconds:.3f} s; MFU {mfus}",
        *_rows({k: v * 1e3 for k, v in found.time.parts.items()}, "ms", 1),
        f"FSDP's collectives take {found.time.collectives * 1e3:.1f} ms, {found.time.hidden:.0%} of it hidden",
        "",
        *limits(found),
        f"counted: {found.how}",
    ]
    if plan.config.compile.enable:
        lines.append("compiled blocks: saved activations are the partitioner's own; Inductor's fusion is estimated")
        if "model" in plan.config.compile.components:
            lines.append("compile.components model: counted as blocks, norm and loss, each compiled by itself")
    if plan.config.parallelism.enable_async_tensor_parallel:
        lines.append("parallelism.enable_async_tensor_parallel: timed as without it; how much it hides is unknown")
    return lines


def _how_run(config: Config) -> str:
    checkpoint = config.activation_checkpoint
    option = f" {checkpoint.selective_ac_option}" if checkpoint.mode == "selective" else ""
    return f"{'compiled' if config.compile.enable else 'eager'}, recompute {checkpoint.mode}{option}"


def _rows(values: dict[str, float], unit: str, digits: int) -> list[str]:
    total = sum(values.values())
    shown = sorted(((v, k) for k, v in values.items() if v >= 0.0005 * total), reverse=True)
    return [f"  {name:<40}{value:>12,.{digits}f} {unit}{value / total:>7.1%}" for value, name in shown]


def limits(found: Estimate) -> list[str]:
    """What limits the run, and what to change."""
    parts, lines, config = found.time.parts, [], found.plan.config
    seconds = found.time.seconds
    if not found.fits:
        over = (found.device_memory - found.plan.gpu.memory.value) / _GIB
        largest = max((v, k) for k, v in found.memory_parts.items())[1]
        lines.append(f"limit: memory, {over:.1f} GiB too much, most of it {largest}; {_memory_hint(found, largest)}")
    compiles = "" if config.compile.enable else "enable compile, or "
    overlaps = "" if config.parallelism.enable_async_tensor_parallel else ", or async tensor parallel"
    hints = {
        "exposed FSDP communication": "use a larger local batch, HSDP, or reshard never",
        "exposed tensor-parallel communication": f"lower tensor_parallel_degree{overlaps}",
        "waiting for the host": f"{compiles}a larger local batch",
        "recomputation": "recompute less (pointwise, selective) where memory allows",
        "memory-bound": f"{compiles}kernels",
        "FSDP copies": "more tokens per pass: a larger local batch",
    }
    for name in sorted(hints, key=lambda key: -parts[key]):
        if parts[name] > 0.04 * seconds:
            lines.append(f"limit: {name} is {parts[name] / seconds:.0%} of the step; {hints[name]}")
    return lines or ["limit: matrix products and attention; nothing else is large"]


def _memory_hint(found: Estimate, largest: str) -> str:
    if largest == "logits and loss":
        return "lower loss.chunk_size"
    if largest in ("parameters", "optimizer state", "unsharded parameters", "collective buffers"):
        return "shard over more GPUs, or tensor parallelism"
    return "recompute more (selective, full), a smaller local batch, or tensor parallelism; --search lists what fits"


def options_table(options: Sequence[Option], refusals: Sequence[str], config: Config) -> list[str]:
    """The result of a search."""
    if not options and refusals:
        return [f"every combination is refused or does not fit; the first refusal: {refusals[0]}"]
    if not options:
        return ["nothing fits, whatever the local batch, recomputation, resharding and tensor parallelism up to a node"]
    lines = [
        f"{len(options)} combinations fit, best first (batches doubled while that gains 1%, and the config's own):",
        f"{'tokens/s':>9} {'MFU titan':>9} {'GiB':>6}  settings",
    ]
    for option in options:
        settings = " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in option.changes.items())
        lines.append(
            f"{option.tokens_per_second:>9,.0f} {option.mfu_titan:>9.1%} {option.device_memory_gib:>6.1f}  {settings}"
        )
    return lines + _of_which_peak(config)


def _of_which_peak(config: Config) -> list[str]:
    return ["MFU is of bfloat16's peak"] if config.float8.enable else []


def scaling_table(points: Sequence[ScalingPoint], config: Config) -> list[str]:
    """The result of scaling."""
    lines = [
        f"{'GPUs':>7} {'kind':>5} {'mesh':>12} {'tokens/s':>9} {'MFU titan':>9} {'GiB':>6} {'hidden':>7} {'costs':>6}"
    ]
    for p in points:
        fits = "" if p.fits else "  does not fit"
        lines.append(
            f"{p.gpus:>7,} {p.kind:>5} {f'{p.replicate} x {p.shard}':>12} {p.tokens_per_second:>9,.0f} "
            f"{p.mfu_titan:>9.1%} {p.device_memory_gib:>6.1f} {p.hidden:>7.0%} {p.communication:>6.1%}{fits}"
        )
    for kind in ("FSDP", "HSDP"):
        dear = [p.gpus for p in points if p.kind == kind and p.communication > COSTS_NOTHING]
        where = f"from {min(dear):,} GPUs on" if dear else "nowhere here"
        lines.append(f"{kind}: communication costs more than {COSTS_NOTHING:.0%} of the step {where}")
    return lines + _of_which_peak(config)


def plots(found: Estimate, folder: Path) -> list[Path]:
    """Writes memory.png (timeline by part) and step.png (time by part); returns their paths."""
    segments = [s for s in found.segments if s.phase != "end"]
    places = range(len(segments))
    figure = new_figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    shown = [part for part in PARTS if max(s.peak.parts[part] for s in segments) > 0.002 * found.peak_memory]
    axes.stackplot(places, [[s.peak.parts[part] / _GIB for s in segments] for part in shown], labels=shown, step="mid")
    room = found.plan.gpu.memory.value - sum(found.beside_torch.values())
    axes.axhline(room / _GIB, color="black", linestyle="--", label="room")
    _mark_phases(axes, segments)
    axes.set_ylabel("GiB at each unit's fullest moment")
    axes.set_title(_title(found))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    return [_save(figure, folder / "memory.png"), _step_plot(found, folder)]


def _save(figure: Any, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        fix = "make room, or give --plot another folder"
        raise ConfigError(f"no picture can be written: {error.strerror}", fix, str(path)) from error
    return path


def _title(found: Estimate) -> str:
    plan = found.plan
    return f"{plan.config.model.flavor}, {plan.gpus} x {plan.gpu.name}, {_how_run(plan.config)}"


def _mark_phases(axes: Any, segments: list[Segment]) -> None:
    """A tick at the first unit of forward and backward passes, and a line where a phase begins."""
    starts = [i for i, s in enumerate(segments) if i == 0 or s.phase != segments[i - 1].phase]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="grey", linewidth=0.6)
    passing = [i for i in starts if segments[i].phase in ("forward", "backward")]
    axes.set_xticks(passing, [segments[i].phase for i in passing], ha="left")
    axes.set_xlim(0, len(segments) - 1)
    axes.set_xlabel("the step, unit after unit; clipping and the optimizer last")


def _step_plot(found: Estimate, folder: Path) -> Path:
    figure = new_figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    parts = [(name, value) for name, value in found.time.parts.items() if value > 0.0005 * found.time.seconds][::-1]
    bars = axes.barh([name for name, _ in parts], [value * 1e3 for _, value in parts])
    axes.bar_label(bars, [f"{value / found.time.seconds:.1%}" for _, value in parts], padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("ms per step")
    axes.set_title(f"{_title(found)}\n{found.tokens_per_second:,.0f} tokens/s per GPU, {found.time.seconds:.3f} s")
    return _save(figure, folder / "step.png")


def scaling_plot(points: Sequence[ScalingPoint], folder: Path) -> Path:
    """Writes scaling.png; returns its path."""
    figure = new_figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in ("FSDP", "HSDP"):
        mine = [p for p in points if p.kind == kind]
        left.plot([p.gpus for p in mine], [p.tokens_per_second for p in mine], marker="o", label=kind)
        right.plot([p.gpus for p in mine], [100 * p.communication for p in mine], marker="o", label=kind)
    right.axhline(100 * COSTS_NOTHING, color="grey", linestyle=":")
    for axes, label in ((left, "tokens/s per GPU"), (right, "% of the step that communication costs")):
        axes.set_xscale("log", base=2)
        axes.set_xticks([p.gpus for p in points if p.kind == "FSDP"], [f"{p.gpus}" for p in points if p.kind == "FSDP"])
        axes.set_xlabel("GPUs")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    return _save(figure, folder / "scaling.png")
