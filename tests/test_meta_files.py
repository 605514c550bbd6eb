"""Meta's files, judged by Meta's own arithmetic: rotary embedding of neighbouring pairs in complex numbers."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_folders import edit_json, meta_folder, random_meta_weights
from shapes import LLAMA2, LLAMA3
from torch import Tensor

from titan_fast.errors import CheckpointError, ConfigError
from titan_fast.flavors import FLAVORS, ModelShape
from titan_fast.hf import our_sizes, read_parameter
from titan_fast.initial_weights import load_initial_weights
from titan_fast.meta_files import MetaFolder, released_scaling
from titan_fast.model import Llama

# At least two key/value heads, so that two parts can share them; the width differs from the vocabulary.
TWO_PARTS = dataclasses.replace(LLAMA2, vocab_size=132)


def interleaved_logits(weights: dict[str, Tensor], shape: ModelShape, tokens: Tensor) -> Tensor:
    """The forward pass as Meta's code computes it, float64. tokens: [S] -> [S, V]."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    length, head = len(tokens), shape.head_dim
    frequencies = 1.0 / shape.rope_theta ** (torch.arange(0, head, 2).double() / head)
    turns = torch.polar(torch.ones(length, head // 2).double(), torch.outer(torch.arange(length).double(), frequencies))

    def rotate(x: Tensor) -> Tensor:  # [S, heads, E]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.norm_eps) * weights[name]

    x = weights["tok_embeddings.weight"][tokens]
    for i in range(shape.n_layers):
        layer = f"layers.{i}."
        y = norm(x, layer + "attention_norm.weight")
        q, k, v = ((y @ weights[f"{layer}attention.w{n}.weight"].T).unflatten(-1, (-1, head)) for n in "qkv")
        k, v = (each.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=1) for each in (rotate(k), v))
        scores = torch.einsum("qhe,khe->hqk", rotate(q), k) / head**0.5
        scores += torch.full((length, length), float("-inf")).triu(1)
        mixed = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ weights[layer + "attention.wo.weight"].T
        y = norm(x, layer + "ffn_norm.weight")
        gate, up = (y @ weights[f"{layer}feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ weights[layer + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize(("shape", "n_parts", "embedding_cut"), [(LLAMA2, 1, 1), (TWO_PARTS, 2, 1), (LLAMA3, 2, 0)])
def test_logits_are_those_of_metas_arithmetic(
    shape: ModelShape, n_parts: int, embedding_cut: int, tmp_path: Path
) -> None:
    folder = meta_folder(shape, tmp_path / "meta", n_parts, embedding_cut)
    model = Llama(shape)
    assert "float32" in load_initial_weights(model, folder, shape)
    tokens = torch.randint(shape.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    expected = interleaved_logits(random_meta_weights(shape), shape, tokens)
    logits = model(tokens[None])[0]
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-5


def test_shape_is_read_from_params_and_weights(tmp_path: Path) -> None:
    two = MetaFolder(meta_folder(LLAMA2, tmp_path / "two", 1)).shape
    assert two == dataclasses.replace(LLAMA2, max_seq_len=4096)  # params.json has no longest sequence
    assert MetaFolder(meta_folder(LLAMA3, tmp_path / "three", 2)).shape == dataclasses.replace(LLAMA3, max_seq_len=8192)


@pytest.mark.parametrize("flavor", ["llama3.1_8b", "llama3_1b"])
def test_stretch_of_the_wavelengths_is_the_releases(flavor: str) -> None:
    shape = FLAVORS[flavor]
    found = released_scaling((shape.dim, shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.ffn_dim), "")
    assert found == (shape.rope_scaling, 131_072)


@pytest.mark.parametrize("with_head", [True, False])
def test_a_head_that_is_the_embedding_is_tied(with_head: bool, tmp_path: Path) -> None:
    folder = meta_folder(LLAMA3, tmp_path / "meta", 1)
    file = folder / "consolidated.00.pth"
    weights = torch.load(file)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    if not with_head:
        del weights["output.weight"]
    torch.save(weights, file)
    found = MetaFolder(folder)
    assert found.shape.tied
    assert torch.equal(read_parameter(found, "embedding.weight"), weights["tok_embeddings.weight"])


def test_a_head_that_begins_as_the_embedding_does_is_one_of_its_own(tmp_path: Path) -> None:
    folder = meta_folder(LLAMA3, tmp_path / "meta", 1)
    file = folder / "consolidated.00.pth"
    weights = torch.load(file)
    weights["output.weight"] = torch.cat((weights["tok_embeddings.weight"][:1], weights["output.weight"][1:]))
    torch.save(weights, file)
    assert not MetaFolder(folder).shape.tied


def test_a_part_of_a_parameter_is_that_part_of_the_whole(tmp_path: Path) -> None:
    found = MetaFolder(meta_folder(LLAMA3, tmp_path / "meta", 2))
    for name, size in our_sizes(LLAMA3).items():
        window = tuple(slice(length // 3, length // 2 + 1) for length in size)
        assert torch.equal(read_parameter(found, name, window), read_parameter(found, name)[window]), name


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    folder = meta_folder(LLAMA3, tmp_path / "meta", 1)
    torch.save({"tok_embeddings.weight": Malicious(tmp_path / "ran")}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="damaged, or more than tensors"):
        MetaFolder(folder)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_represented_is_refused(tmp_path: Path) -> None:
    folder = meta_folder(LLAMA3, tmp_path / "meta", 2)
    for changes, words in (
        ({"use_scaled_rope": True}, "use_scaled_rope is true"),
        ({"vision_chunk_size": 448}, "vision_chunk_size is 448"),
        ({"n_heads": 7}, "dim 64 is not divisible by n_heads 7"),
        ({"vocab_size": 99}, "vocab_size is 99, and the embedding has 128 rows"),
        ({"dim": ...}, "'dim'"),
        ({"dim": math.inf}, "a key is missing or not a number"),
        ({"n_layers": 2.5}, "n_layers is 2.5"),
        ({"n_layers": 10**12}, "n_layers 1000000000000 is more than 10,000"),
        ({"norm_eps": 10**400}, "a key is missing or not a number"),
    ):
        before = (folder / "params.json").read_text()
        edit_json(folder / "params.json", **changes)
        with pytest.raises((ConfigError, CheckpointError), match=words):
            MetaFolder(folder)
        (folder / "params.json").write_text(before)
    edit_json(folder / "params.json", n_layers=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.\S+ and 6 more missing"):
        MetaFolder(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda held: held.update({"norm.weight": torch.ones(7)}),
            r"norm\.weight is \[64\] in one .* and \[7\] in another",
        ),
        (
            lambda held: held.update({"output.weight": torch.ones(64, 5)}),
            r"output\.weight is \[64, 64\] in one .* \[64, 5\]",
        ),
        (lambda held: held.update({7: torch.ones(1)}), "not a table of tensors"),
        (lambda held: held.update({"norm.weight": torch.ones(64).to_sparse()}), "not a table of tensors"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    change: Callable[[dict], None], words: str, tmp_path: Path
) -> None:
    last = meta_folder(LLAMA3, tmp_path / "meta", 2) / "consolidated.01.pth"
    held = torch.load(last)
    change(held)
    torch.save(held, last)
    with pytest.raises(CheckpointError, match=words):
        MetaFolder(tmp_path / "meta")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    folder = meta_folder(LLAMA3, tmp_path / "meta", 2)
    (folder / "consolidated.01.pth").unlink()
    os.mkfifo(folder / "consolidated.01.pth")
    with pytest.raises(ConfigError, match="vocab_size is 128, and the embedding has 64 rows"):
        MetaFolder(folder)


def test_incomplete_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = meta_folder(LLAMA3, tmp_path / "meta", 2)
    last = folder / "consolidated.01.pth"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth"):
        MetaFolder(folder)
    last.rename(folder / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match="without a gap"):
        MetaFolder(folder)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(ConfigError, match="vocab_size is 128, and the embedding has 64 rows"):  # half of a model
        MetaFolder(folder)
    edit_json(folder / "params.json", vocab_size=-1)
    with pytest.raises(CheckpointError, match=r"and 5 more of another size than the config's: \[32, 64\]"):
        MetaFolder(folder)
