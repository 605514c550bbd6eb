"""Weights between this project and Hugging Face's `LlamaForCausalLM`: names, config.json, and q, k, v as one matrix.

`python -m titan_fast.hf import HF_FOLDER --out FOLDER` makes a checkpoint, `export CHECKPOINT --out HF_FOLDER` the
way back. Both rotate half-split, so no rows are permuted within a head; only Meta's own files need that.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol

import torch
import tyro
from torch import Tensor

from titan_fast import command_line
from titan_fast.errors import CheckpointError, ConfigError, command
from titan_fast.flavors import ModelShape, RopeScaling
from titan_fast.model import Llama

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}
_QKV = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")

Window = tuple[slice, ...]
"""A part of a tensor: one slice with start and stop for each dimension."""


class Weights(Protocol):
    """The weights of a model under Hugging Face's names, wherever they are stored, read piece by piece."""

    path: Path
    shape: ModelShape

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, window: Window) -> Tensor:
        """This part of the tensor. It may be a view of a mapped file, so copy it and do not keep it."""
        ...


def pack_qkv(q: Tensor, k: Tensor, v: Tensor, shape: ModelShape) -> Tensor:
    """q: [H E, D], k, v: [K E, D] -> [(H + 2 K) E, D], by key/value head: its queries, its key, its value. H and K may
    be those of some groups only, and D some of the columns."""
    group = shape.n_heads // shape.n_kv_heads
    rows = [group * shape.head_dim, shape.head_dim, shape.head_dim]
    parts = [matrix.unflatten(0, (-1, length)) for matrix, length in zip((q, k, v), rows, strict=True)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def unpack_qkv(qkv: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_qkv`."""
    group = shape.n_heads // shape.n_kv_heads
    rows = [group * shape.head_dim, shape.head_dim, shape.head_dim]
    q, k, v = qkv.unflatten(0, (-1, sum(rows))).split(rows, dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


@lru_cache(maxsize=16)
def our_sizes(shape: ModelShape) -> Mapping[str, torch.Size]:
    """Every parameter of ours and its size, in the model's order."""
    with torch.device("meta"):
        model = Llama(shape, max_seq_len=1)
    return MappingProxyType({name: parameter.shape for name, parameter in model.named_parameters()})


def hf_names(name: str) -> tuple[str, ...]:
    """Hugging Face's name for our parameter; for the packed projection, the names of the three that it is made of."""
    if name in _TOP:
        return (_TOP[name],)
    blocks, layer, rest = name.split(".", 2)
    assert blocks == "blocks", name
    if rest != "attention.qkv.weight" and rest not in _BLOCK:
        raise CheckpointError(f"{name} has no name in Hugging Face's Llama", "convert a Llama, or name it in hf._BLOCK")
    theirs = _QKV if rest == "attention.qkv.weight" else (_BLOCK[rest],)
    return tuple(f"model.layers.{layer}.{their}" for their in theirs)


def hf_sizes(shape: ModelShape) -> dict[str, torch.Size]:
    """Every parameter of Hugging Face's and its size."""
    sizes = {}
    query, key_value = (torch.Size((heads * shape.head_dim, shape.dim)) for heads in (shape.n_heads, shape.n_kv_heads))
    for name, size in our_sizes(shape).items():
        names = hf_names(name)
        sizes |= zip(names, (size,) if len(names) == 1 else (query, key_value, key_value), strict=True)
    return sizes


def to_hf(weights: Mapping[str, Tensor], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, tensor) of each of our weights, one at a time, so that a lazy mapping stays lazy."""
    for name in weights:
        names, tensor = hf_names(name), weights[name]
        yield from zip(names, (tensor,) if len(names) == 1 else unpack_qkv(tensor, shape), strict=True)


def read_parameter(weights: Weights, name: str, window: Window | None = None) -> Tensor:
    """Our parameter `name`, or a part of it, from Hugging Face's tensors. Of the packed projection only the groups that
    the part touches are read. CheckpointError where q, k and v differ in dtype, since packing would convert some, and
    where a value is not finite."""
    names = hf_names(name)
    if window is None:
        window = tuple(slice(0, length) for length in our_sizes(weights.shape)[name])
    if len(names) == 1:
        return _read_finite(weights, names[0], window)
    dtypes = [weights.dtype(part) for part in names]
    if len(set(dtypes)) > 1:
        raise CheckpointError(
            f"{', '.join(names)} have different dtypes {', '.join(map(str, dtypes))}",
            "save them in one dtype",
            where=str(weights.path),
        )
    shape, rows, columns = weights.shape, window[0], window[1:]
    group = shape.n_heads // shape.n_kv_heads
    packed_rows = (group + 2) * shape.head_dim
    first, last = rows.start // packed_rows, math.ceil(rows.stop / packed_rows)

    def groups(name: str, heads: int) -> Tensor:
        length = heads * shape.head_dim
        return _read_finite(weights, name, (slice(first * length, last * length), *columns))

    packed = pack_qkv(groups(names[0], group), groups(names[1], 1), groups(names[2], 1), shape)
    return packed[rows.start - first * packed_rows : rows.stop - first * packed_rows]


def _read_finite(weights: Weights, name: str, window: Window) -> Tensor:
    part = weights.read(name, window)
    if part.numel() and not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(part)):
        raise CheckpointError(f"{name} has values that are not finite", "get the weights again", str(weights.path))
    return part


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """The config.json of this shape, in the layout that transformers 4 writes and 5 reads too."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_seq_len,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    if (scaling := shape.rope_scaling) is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return config


# Features that this project does not have: key -> the values with which they are unused. The first is the key's
# default.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}
_NUMBERS: dict[str, tuple[str, type[int] | type[float], Any]] = {
    # ModelShape's field -> key, type, and transformers' default if the key is missing (...: it must not be)
    "dim": ("hidden_size", int, ...),
    "n_layers": ("num_hidden_layers", int, ...),
    "n_heads": ("num_attention_heads", int, ...),
    "n_kv_heads": ("num_key_value_heads", int, None),
    "ffn_dim": ("intermediate_size", int, ...),
    "vocab_size": ("vocab_size", int, ...),
    "max_seq_len": ("max_position_embeddings", int, 2048),
    "norm_eps": ("rms_norm_eps", float, 1e-6),
}


def shape_from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that a config.json describes, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    ConfigError names the key and the value that this project cannot represent, or the key that is missing.
    """
    _refuse_unless(config, "model_type", ("llama",), where)
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    _refuse_unless({"architectures": architectures}, "architectures", (["LlamaForCausalLM"],), where)
    for key, values in _UNUSED.items():
        if key in config:
            _refuse_unless(config, key, values, where)
    found = {field: _number(config, key, kind, default, where) for field, (key, kind, default) in _NUMBERS.items()}
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = found["n_heads"]
    tied = config.get("tie_word_embeddings") or False
    _refuse_unless({"tie_word_embeddings": tied}, "tie_word_embeddings", (False, True), where)
    theta, scaling = _rope(config, where)
    shape = ModelShape(**found, rope_theta=theta, rope_scaling=scaling, tied=tied)
    if problems := shape.problems():
        raise ConfigError("; ".join(problems), "it does not describe a Llama", where)
    if config.get("head_dim") is not None:
        _refuse_unless(config, "head_dim", (shape.head_dim,), where)
    return shape


def _refuse_unless(config: Mapping[str, Any], key: str, values: tuple[Any, ...], where: str) -> None:
    value = config.get(key)
    if value not in values:
        words = " or ".join(repr(each) for each in values if each is not None) or "nothing"
        raise ConfigError(f"{key} is {value!r}, and this project knows only {words}", "use another model", where)


def _number(config: Mapping[str, Any], key: str, kind: type[int] | type[float], default: Any, where: str) -> Any:
    value = config.get(key)
    if value is None and default is not ...:
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ConfigError(f"{key} is {value!r}, not {'an integer' if kind is int else 'a number'}", "fix it", where)
    try:
        return kind(value)
    except OverflowError as error:
        raise ConfigError(f"{key} is beyond any float", "fix it", where) from error


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from where the transformers version at hand has put them."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for key, table in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(table, Mapping):
            raise ConfigError(f"{key} is {table!r}, not a table", "fix it", where)
    if old and new and dict(old) != {key: new.get(key) for key in old}:
        raise ConfigError(f"rope_scaling {dict(old)} and rope_parameters {dict(new)} differ", "remove one", where)
    table = dict(new or old)
    theta = _number(table if table.get("rope_theta") is not None else config, "rope_theta", float, 10_000.0, where)
    if "partial_rotary_factor" in table:
        _refuse_unless(table, "partial_rotary_factor", (1, None), where)
    kind = table.get("rope_type", table.get("type", "default"))
    _refuse_unless({"rope_type": kind}, "rope_type", ("default", "llama3"), where)
    if kind == "default":
        return theta, None
    factor, low, high = (
        _number(table, key, float, ..., where) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    return theta, RopeScaling(factor, low, high, _number(table, "original_max_position_embeddings", int, ..., where))


@dataclass(frozen=True)
class Import:
    """Makes a checkpoint, step 0, of a model of Hugging Face's (or of Meta's own files): OUT/step-0."""

    folder: tyro.conf.Positional[Path]
    """Holds config.json and *.safetensors, or params.json and consolidated.*.pth."""
    out: Path
    """The folder to write step-0 into."""
    tokenizer: Path | None = None
    """A tokenizer's file or folder. None: the one in the model's folder, where there is one."""


@dataclass(frozen=True)
class Export:
    """Writes a checkpoint as a folder that transformers loads."""

    checkpoint: tyro.conf.Positional[Path]
    """A step-N folder, or a run directory, whose newest checkpoint is taken."""
    out: Path
    """The folder to make."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Of the written weights. keep: the checkpoint's own."""
    max_shard_gb: float = 4.0
    """No file holds more, unless a single matrix does; also about how much host memory is used. 1 GB is 10^9 bytes."""


@command
def main() -> None:
    from titan_fast.hf_convert import export_checkpoint, import_model

    importing, exporting = tyro.conf.subcommand("import"), tyro.conf.subcommand("export")
    commands: Any = Annotated[Import, importing] | Annotated[Export, exporting]
    if (first := " ".join(sys.argv[1:2])) not in ("import", "export", "-h", "--help"):
        raise ConfigError(f"{first!r} is neither import nor export", "write one of them first; see --help")
    arguments: Import | Export = command_line.read(commands, None, "titan_fast.hf")
    out = arguments.out.absolute()
    if isinstance(arguments, Import):
        lines = import_model(arguments.folder, out, arguments.tokenizer)
    else:
        dtype = None if arguments.dtype == "keep" else getattr(torch, arguments.dtype)
        if not 1e-9 <= arguments.max_shard_gb < math.inf:
            raise ConfigError(f"max_shard_gb is {arguments.max_shard_gb}, no size of a file", "give one like 4")
        shard_bytes = int(arguments.max_shard_gb * 1e9)
        lines = export_checkpoint(arguments.checkpoint, out, dtype, shard_bytes)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
