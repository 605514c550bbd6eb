"""Which measurement decides what `auto` chooses.

| switch | in eager mode | compiled |
|---|---|---|
| rms_norm | both norms alone, ours against eager | the block with our norms against the block without |
| rms_norm, tensor parallel | the same | both norms alone, each side compiled |
| rope, swiglu | alone, ours against eager | the block with ours against the block without |
| cross_entropy | alone, ours against eager | alone, ours against what `[compile]` makes of the reference |
| reemit | the block with the units against the faster block without | likewise |

A compiled operator is judged in the whole block, because its main cost is what it prevents the compiler from fusing:
gate's and up's gradients are summed in the norm's backward if the norm is Inductor's own, and before it if it is ours.
With tensor parallelism a norm is between two collectives, across which nothing is fused, so it is judged alone. So is
the loss, which is between matrix products and works in place. Carrying the residual changes what is fused with a norm,
so the switches that replace norms have a verdict with and without it. Re-emitting is slower than its separate parts
wherever what it saves is memory, so it must beat both the reference and those parts.
"""

from dataclasses import dataclass

from benchmarks.shapes import DTYPE, Case

EAGER_PARTS = "eager+rms_norm+swiglu"
"""The separate operators that the re-emitting units replace."""


@dataclass(frozen=True)
class Contest:
    """A cell of `titan_kernels.choice` that a provider's times in one case decide, or help to decide."""

    op: str
    compiled: bool
    variant: str
    """One of titan_kernels.choice.VARIANTS, or empty."""
    shape: dict[str, int]
    dtype: str
    against: tuple[str, ...]
    """Providers of the same case: the reference, then others that must be beaten if they are measured."""
    parts: int
    """How many measurements (operators x directions) are summed for the verdict."""


def switch_sizes(switch: str, case: Case) -> dict[str, int]:
    """The sizes of a call, as titan_kernels.choice names them."""
    model, tokens = case.model, case.tokens
    rows = tokens // case.tensor_parallel  # norms see a part of each sequence
    if switch == "rms_norm":
        return {"rows": rows, "width": model.width}
    if switch == "rope":
        heads = {"n_heads": model.n_heads, "n_kv_heads": model.n_kv_heads, "head_dim": model.head_dim}
        return {"rows": tokens, **heads}
    if switch == "swiglu":
        return {"rows": tokens, "width": model.ffn_width}
    if switch == "reemit":
        return {"rows": rows, "width": model.width, "ffn_width": model.ffn_width}
    return {"rows": case.rows, "vocab": model.vocab}


def contests(case: Case, provider: str) -> tuple[Contest, ...]:
    """What the times of `provider` in `case` decide; most decide nothing."""
    if case.op.startswith("block"):
        return _in_block(case, provider)
    if case.context != "alone":
        return ()
    switch = {"add_rms_norm": "rms_norm", "cross_entropy_sharded": "cross_entropy"}.get(case.op, case.op)
    directions = 1 if switch == "cross_entropy" else 2
    parts = 2 * directions if switch == "rms_norm" else directions

    variant = {"cross_entropy": "vocabulary whole", "cross_entropy_sharded": "vocabulary sharded"}.get(case.op, "")

    def contest(compiled: bool, rival: str) -> Contest:
        where = "sequence sharded" if compiled and switch == "rms_norm" else variant
        return Contest(switch, compiled, where, switch_sizes(switch, case), DTYPE, (rival,), parts)

    if provider == "ours_compiled":
        return (contest(True, "compiled"),)
    if provider != "ours":
        return ()
    eager = contest(False, "eager")
    return (eager, contest(True, "compiled")) if switch == "cross_entropy" else (eager,)


def _in_block(case: Case, provider: str) -> tuple[Contest, ...]:
    mode, _, switch = provider.partition("+")
    compiled = mode == "compiled"
    if switch == "reemit":
        rivals = (mode, "compiled+rms_norm", "compiled+swiglu") if compiled else (mode, EAGER_PARTS)
    elif compiled and switch in ("rms_norm", "rope", "swiglu"):
        rivals = (mode,)
    else:
        return ()
    variant = ""
    if compiled and switch in ("rms_norm", "reemit"):
        variant = "residual carried" if case.op == "block_carried" else "residual not carried"
    return (Contest(switch, compiled, variant, switch_sizes(switch, case), DTYPE, rivals, parts=2),)


def rivals(case: Case, provider: str) -> tuple[str, ...]:
    """The providers whose times are subtracted from this one's, pass by pass: the rivals in its contests, and for
    variants of a block also the eager or the compiled reference."""
    found = [rival for contest in contests(case, provider) for rival in contest.against]
    if case.op.startswith("block") and provider not in ("eager", "compiled"):
        found.append("eager" if provider == "ours" or provider.startswith("eager") else "compiled")
    return tuple(dict.fromkeys(found))
