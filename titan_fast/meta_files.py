"""Meta's own files of Llama 2 and 3: params.json, and consolidated.NN.pth with one model-parallel part each.

Their rotary embedding rotates pairs of neighbouring rows of a head's q and k; ours pairs row i with row E / 2 + i. So
row 2 i + p of a head there is row p E / 2 + i here.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from titan_fast.errors import CheckpointError, ConfigError
from titan_fast.flavors import FLAVORS, ModelShape, RopeScaling
from titan_fast.hf import Window, hf_sizes
from titan_fast.hf_files import check_sizes, read_json, some

PARAMS = "params.json"

_TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
# Name within a layer -> their name, and the dimension that model parallelism splits.
_LAYER: dict[str, tuple[str, int | None]] = {
    "input_layernorm.weight": ("attention_norm.weight", None),
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
}
_KNOWN_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size",
}  # fmt: skip


class MetaFolder:
    """Meta's folder, read under Hugging Face's names and in their order of rows. Matrices are always read whole."""

    def __init__(self, path: Path) -> None:
        """ConfigError for a params.json that this project cannot represent, CheckpointError for files that are damaged,
        missing or do not belong together."""
        self.path, self._parts = path, _parts(path)
        params = read_json(path / PARAMS)
        opened = [_load(part) for part in self._parts]
        for part, tensors in zip(self._parts, opened, strict=True):
            if different := sorted(tensors.keys() ^ opened[0].keys()):
                raise CheckpointError(
                    f"{some(different)} is in one of {self._parts[0].name} and {part.name} only", "get the files again",
                    where=str(path),
                )  # fmt: skip
        self._dtypes = {name: tensor.dtype for name, tensor in opened[0].items()}
        sizes = {name: _whole_size([tensors[name] for tensors in opened], params, name, path) for name in opened[0]}
        sizes.pop("rope.freqs", None)  # a constant that follows from params.json
        self.shape = _shape(params, sizes, _is_tied(opened), path)
        hf_name = {_meta_name(name)[0]: name for name in hf_sizes(self.shape)}
        if self.shape.tied:
            sizes.pop("output.weight", None)
        check_sizes({hf_name.get(name, name): size for name, size in sizes.items()}, self.shape, path)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[_meta_name(name)[0]]

    def read(self, name: str, window: Window) -> Tensor:
        meta_name, dim = _meta_name(name)
        # Opened for each tensor, because what was read of a file counts as this process's memory while it is mapped.
        parts = [_load(part)[meta_name] for part in self._parts]
        whole = _joined(parts, dim, self.shape.dim)
        if meta_name.endswith(("attention.wq.weight", "attention.wk.weight")):
            whole = half_split(whole, self.shape.head_dim)
        return whole[window]


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, [heads E, D], from Meta's order (neighbours form pairs) to ours (row i pairs with E / 2 + i)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _meta_name(name: str) -> tuple[str, int | None]:
    if name in _TOP:
        return _TOP[name], {"lm_head.weight": 0, "model.norm.weight": None}.get(name, -1)
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    theirs, dim = _LAYER[rest]
    return f"layers.{layer}.{theirs}", dim


def _joined(parts: list[Tensor], dim: int | None, model_dim: int) -> Tensor:
    """dim -1 is for the embedding, which Llama 2 splits by columns and Llama 3 by rows."""
    if dim is None or len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=(0 if parts[0].shape[1] == model_dim else 1) if dim == -1 else dim)


def _whole_size(parts: list[Tensor], params: dict[str, Any], name: str, path: Path) -> torch.Size:
    """The size of the parts together; CheckpointError if they do not fit together."""
    names = dict(_LAYER.values())
    dim = names.get(name.split(".", 2)[-1]) if name.startswith("layers.") else {"output.weight": 0}.get(name)
    if name == "tok_embeddings.weight":
        dim = 0 if parts[0].ndim == 2 and parts[0].shape[1] == params.get("dim") else 1
    is_cut = dim is not None and parts[0].ndim == 2
    for part in parts[1:]:
        if part.ndim != parts[0].ndim or any(
            part.shape[i] != parts[0].shape[i] for i in range(part.ndim) if not (is_cut and i == dim)
        ):
            what = (
                f"{name} is {list(parts[0].shape)} in one of the consolidated files and {list(part.shape)} in another"
            )
            raise CheckpointError(what, "get the files again", str(path))
    if dim is None or not is_cut:
        return parts[0].shape
    size = list(parts[0].shape)
    size[dim] = sum(part.shape[dim] for part in parts)
    return torch.Size(size)


def _is_tied(parts: list[dict[str, Tensor]]) -> bool:
    """Whether the head is the embedding: absent, or with the same values (Meta's small Llama 3.2 files have both)."""
    if "output.weight" not in parts[0]:
        return True
    pairs = [(part["output.weight"], part.get("tok_embeddings.weight")) for part in parts]
    return all(
        b is not None and a.shape == b.shape and torch.equal(a[:1], b[:1]) and torch.equal(a, b) for a, b in pairs
    )


def _parts(path: Path) -> list[Path]:
    parts = sorted(part for part in path.glob("consolidated.*.pth") if part.is_file())
    expected = [f"consolidated.{i:02}.pth" for i in range(len(parts))]
    if not parts or [part.name for part in parts] != expected:
        raise CheckpointError(
            f"the weights are {some([part.name for part in parts]) or 'missing'}, not consolidated.00.pth and so on "
            "without a gap",
            "get the folder again",
            where=str(path),
        )
    return parts


def _load(path: Path) -> dict[str, Tensor]:
    """The file's tensors, mapped: nothing is read before it is used, and no code in the file is run."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:  # torch's message says how to load it nevertheless
        raise CheckpointError("damaged, or more than tensors", "get the file again", where=str(path)) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        sentence = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(f"refused or damaged: {sentence}", "get the file again", where=str(path)) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_cpu
        for name, tensor in tensors.items()
    ):
        raise CheckpointError("not a table of tensors", "give Meta's consolidated files", where=str(path))
    floating = torch.float32, torch.bfloat16, torch.float16, torch.float64
    if quantized := [name for name, tensor in tensors.items() if tensor.dtype not in floating]:
        raise CheckpointError(
            f"{some(quantized)} is {tensors[quantized[0]].dtype}", "use unquantized weights", where=str(path)
        )
    return tensors


def _shape(params: dict[str, Any], sizes: dict[str, torch.Size], tied: bool, path: Path) -> ModelShape:
    """The shape from params.json, from the weights (the feed-forward width, sometimes the vocabulary) and from the
    release (the scaling of the rotary wavelengths and the longest sequence)."""
    where = str(path / PARAMS)
    if unknown := sorted(params.keys() - _KNOWN_PARAMS):
        raise ConfigError(f"{unknown[0]} is {params[unknown[0]]!r}, and this project knows no such key",
                          "use a Llama 2 or 3 text model", where)  # fmt: skip
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if len(sizes.get(name, ())) != 2:
            raise CheckpointError(f"{name} missing or not a matrix", "give Meta's consolidated files", where=str(path))
    try:
        dim, n_layers, n_heads = (_integer(params, key) for key in ("dim", "n_layers", "n_heads"))
        n_kv_heads = _integer(params, "n_kv_heads") if params.get("n_kv_heads") else n_heads
        theta, eps = float(params.get("rope_theta", 10_000.0)), float(params["norm_eps"])
        vocab_size = _integer({"vocab_size": -1} | params, "vocab_size")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"a key is missing or not a number: {error}", "fix it", where) from error
    rows = sizes["tok_embeddings.weight"][0]
    if vocab_size not in (-1, rows):
        what = f"vocab_size is {vocab_size}, and the embedding has {rows} rows"
        raise ConfigError(what, "check that all consolidated files are there", where)
    ffn_dim = sizes["layers.0.feed_forward.w1.weight"][0]
    scaling, max_seq_len = None, 4096 if theta == 10_000.0 else 8192
    if params.get("use_scaled_rope"):
        scaling, max_seq_len = released_scaling((dim, n_layers, n_heads, n_kv_heads, ffn_dim), where)
    shape = ModelShape(dim, n_layers, n_heads, n_kv_heads, ffn_dim, rows, max_seq_len, theta, scaling, eps, tied)
    if problems := shape.problems():
        raise ConfigError("; ".join(problems), "it does not describe a Llama", where)
    return shape


def _integer(params: dict[str, Any], key: str) -> int:
    if params[key] != int(params[key]):
        raise ValueError(f"{key} is {params[key]}")
    return int(params[key])


def released_scaling(sizes: tuple[int, ...], where: str) -> tuple[RopeScaling, int]:
    """The scaling and the context length of the released model with these sizes (dim, layers, heads, key/value heads,
    feed-forward); ConfigError if there is none."""
    for known in FLAVORS.values():
        if known.rope_scaling and sizes == (known.dim, known.n_layers, known.n_heads, known.n_kv_heads, known.ffn_dim):
            return known.rope_scaling, known.max_seq_len
    raise ConfigError(
        "use_scaled_rope is true, the file does not say by how much, and no Llama 3.1 or 3.2 has this shape",
        "convert it to Hugging Face's format, whose config.json says it",
        where,
    )
