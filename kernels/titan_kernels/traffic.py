"""The least bytes that each operator must move through device memory, for tests, benchmarks and tables.

Every operand is read once and every result written once, weights and tables too. What an implementation chooses is not
counted: saved statistics, partial sums of weight gradients, a second read of a row that is still in cache. An
implementation that moves more shows a lower bandwidth. Letters are those of `titan_kernels.reference`.
"""

from collections.abc import Callable
from dataclasses import dataclass

_TABLE_BYTES = 4  # cos, sin and per-row losses are float32
_LABEL_BYTES = 8  # labels are int64


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call. `backward` is for the gradients of all floating-point inputs."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def rms_norm(rows: int, width: int, element_size: int = 2) -> Traffic:
    """Forward: x, weight -> y. Backward: dy, x, weight -> dx, dweight. x is [rows, width]."""
    x, weight = rows * width * element_size, width * element_size
    return Traffic(forward=2 * x + weight, backward=3 * x + 2 * weight)


def add_rms_norm(rows: int, width: int, element_size: int = 2) -> Traffic:
    """Forward: x, residual, weight -> y, new_residual. Backward: dy, dnew_residual, new_residual, weight -> dx, dweight
    (the gradients of x and of residual are one tensor)."""
    x, weight = rows * width * element_size, width * element_size
    return Traffic(forward=4 * x + weight, backward=4 * x + 2 * weight)


def rope(rows: int, seq_len: int, n_heads: int, n_kv_heads: int, head_dim: int, element_size: int = 2) -> Traffic:
    """Forward: the packed projection, cos, sin -> q, k, v, each in its own memory, so that attention does not keep the
    projection alive (an implementation where v remains a view of it moves 2 * v less). Backward: dq, dk, dv, cos, sin
    -> the packed gradient. rows = B * S."""
    packed = rows * (n_heads + 2 * n_kv_heads) * head_dim * element_size
    tables = 2 * seq_len * (head_dim // 2) * _TABLE_BYTES
    return Traffic(forward=2 * packed + tables, backward=2 * packed + tables)


def swiglu(rows: int, width: int, element_size: int = 2) -> Traffic:
    """Forward: gate, up -> product. Backward: dproduct, gate, up -> dgate, dup. All [rows, width]."""
    x = rows * width * element_size
    return Traffic(forward=3 * x, backward=5 * x)


def cross_entropy(rows: int, vocab: int, element_size: int = 2) -> Traffic:
    """Loss and gradient of one chunk of logits [rows, vocab]. The gradient overwrites the logits when the loss is
    computed, so all bytes count as forward."""
    logits = rows * vocab * element_size
    return Traffic(forward=2 * logits + rows * (_LABEL_BYTES + _TABLE_BYTES), backward=0)


def cross_entropy_sharded(rows: int, vocab: int, element_size: int = 2) -> Traffic:
    """`cross_entropy_stats`, then `cross_entropy_grad_`, over one slice [rows, vocab] of the logits. In between ranks
    exchange statistics, so the logits are read twice: logits, labels -> three numbers per row; logits, labels,
    logsumexp -> gradient. All count as forward, as in `cross_entropy`."""
    logits, number = rows * vocab * element_size, rows * _TABLE_BYTES
    return Traffic(forward=3 * logits + 2 * rows * _LABEL_BYTES + 4 * number, backward=0)


def norm_linear(rows: int, width: int, element_size: int = 2, n_matrices: int = 1) -> Traffic:
    """`rms_norm` before `n_matrices` linears; the backward reads dy from each, and writes y again for the weight
    gradients, so that y is not saved. Matrix products are not counted."""
    plain = rms_norm(rows, width, element_size)
    return Traffic(forward=plain.forward, backward=plain.backward + n_matrices * rows * width * element_size)


def add_norm_linear(rows: int, width: int, element_size: int = 2, n_matrices: int = 1) -> Traffic:
    """`add_rms_norm` before `n_matrices` linears; the backward reads dy from each, and writes y again."""
    plain = add_rms_norm(rows, width, element_size)
    return Traffic(forward=plain.forward, backward=plain.backward + n_matrices * rows * width * element_size)


def swiglu_linear(rows: int, width: int, element_size: int = 2) -> Traffic:
    """`swiglu` before the down projection; the backward writes the product again."""
    plain = swiglu(rows, width, element_size)
    return Traffic(forward=plain.forward, backward=plain.backward + rows * width * element_size)


TRAFFIC: dict[str, Callable[..., Traffic]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "swiglu": swiglu,
    "cross_entropy": cross_entropy,
    "cross_entropy_sharded": cross_entropy_sharded,
    "norm_linear": norm_linear,
    "add_norm_linear": add_norm_linear,
    "swiglu_linear": swiglu_linear,
}
"""By operator name; the keyword arguments are the operator's shape."""
