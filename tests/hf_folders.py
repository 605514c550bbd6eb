"""Model folders as transformers and Meta write them, made of random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from titan_fast.flavors import ModelShape
from titan_fast.hf import hf_config


def random_model(shape: ModelShape, seed: int = 0) -> LlamaForCausalLM:
    """Hugging Face's model with no two weights alike, norms included."""
    model = LlamaForCausalLM(LlamaConfig(**hf_config(shape))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre, spread = (1.0, 0.2) if name.endswith("norm.weight") else (0.0, 0.1)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: LlamaForCausalLM, folder: Path, max_shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def hf_folder(shape: ModelShape, folder: Path, dtype: torch.dtype = torch.float32, max_shard: str = "1GB") -> Path:
    return save(random_model(shape).to(dtype), folder, max_shard)  # type: ignore[arg-type]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the folder's safetensors files, read by their own library. Older versions of it give tensors that
    lie in the files, which may be written anew."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


# Meta's layout, cut for model parallelism as fairscale's layers cut it.
_CUT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def random_meta_weights(shape: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """Weights under Meta's names and in its row order, whole."""
    key_value = shape.n_kv_heads * shape.head_dim
    sizes = {"tok_embeddings.weight": (shape.vocab_size, shape.dim), "norm.weight": (shape.dim,),
             "output.weight": (shape.vocab_size, shape.dim)}  # fmt: skip
    for i in range(shape.n_layers):
        rows = {"wq": shape.dim, "wk": key_value, "wv": key_value, "wo": shape.dim}
        sizes |= {f"layers.{i}.attention.{name}.weight": (count, shape.dim) for name, count in rows.items()}
        sizes |= {f"layers.{i}.feed_forward.{name}.weight": (shape.ffn_dim, shape.dim) for name in ("w1", "w3")}
        sizes |= {f"layers.{i}.feed_forward.w2.weight": (shape.dim, shape.ffn_dim)}
        sizes |= {f"layers.{i}.{name}.weight": (shape.dim,) for name in ("attention_norm", "ffn_norm")}
    generator = torch.Generator().manual_seed(seed)
    return {name: float("norm" in name) + 0.1 * torch.randn(size, generator=generator) for name, size in sizes.items()}


def meta_params(shape: ModelShape) -> dict[str, object]:
    params = {"dim": shape.dim, "n_layers": shape.n_layers, "n_heads": shape.n_heads, "multiple_of": 32,
              "norm_eps": shape.norm_eps, "vocab_size": -1}  # fmt: skip
    if shape.n_kv_heads != shape.n_heads:
        params |= {"n_kv_heads": shape.n_kv_heads, "vocab_size": shape.vocab_size}
    if shape.rope_theta != 10_000.0:
        params["rope_theta"] = shape.rope_theta
    return params


def meta_folder(shape: ModelShape, folder: Path, n_parts: int, embedding_cut: int = 0) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(meta_params(shape)))
    parts: list[dict[str, Tensor]] = [{} for _ in range(n_parts)]
    for name, tensor in random_meta_weights(shape).items():
        kind = name.split(".")[-2]
        cut = embedding_cut if kind == "tok_embeddings" else _CUT.get(kind)
        pieces = [tensor] * n_parts if cut is None else tensor.chunk(n_parts, dim=cut)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    for i, part in enumerate(parts):
        part["rope.freqs"] = torch.ones(shape.head_dim // 2)
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    return folder
